"""What a user gets back prints in a few lines, and never a tensor, a table or a module."""

import ast
import re
from html import unescape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from handmade import study_by_hand
from planted import gains_apart, plain_model
from torch import nn

import melens
from melens.analysis.emergence_norms import EmergenceMetrics
from melens.data.prompts import TokenizedPrompts
from melens.masks.dims import FixedDims
from melens.models.normalization import Normalization
from melens.models.view import view_model
from melens.printing import brief
from melens.report.result import Figure, Metrics, Result
from melens.tracing.batching import BatchRule
from melens.tracing.verification import Verification

SOURCES = sorted(Path(melens.__file__).parent.rglob("*.py"))
WIDE = re.compile(r"Tensor|DataFrame|ndarray|nn\.Module|go\.Figure|Bridge|\bTrace\b|Emergence|FixedDims|\bPrompt\b")
FIXED = FixedDims({2: tuple(range(9)), 3: tuple(range(9))}, (2, 3), {"architecture": "Llama", "d_model": 64})


def _dataclasses():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            options = " ".join(map(ast.unparse, getattr(node, "decorator_list", ())))
            if isinstance(node, ast.ClassDef) and node.name[0] != "_" and "dataclass" in options:
                fields = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
                yield f"{path.stem}.{node.name}", options, " ".join(map(ast.unparse, fields))


def test_no_dataclass_prints_the_tensors_tables_and_modules_in_it():
    wide = {name: options for name, options, fields in _dataclasses() if WIDE.search(fields)}
    internal = {"recording.Chunk", "runs.TrainedModel"}  # the latter's are of those that print in a line
    assert {"trace.Trace", "view.Block", "comparison.Measured"} <= set(wide)
    assert [name for name, options in wide.items() if "repr=False" not in options and name not in internal] == []


PRINTED = {
    "trace": "Trace of 36 prompts (8 tokens) through by hand, 7 blocks\nprompts: trace.prompts\ntables: trace['norm']",
    "study": "Study of by hand on 36 prompts: block 2 of 7, × 200 (180 to 220), token 0, dim 5",
    "emergence": "block 2 of 7, × 200 (180 to 220), token 0, dim 5",
    "a model": "LlamaForCausalLM as a transformers model: 4 blocks, width 64, vocabulary ",
    "block": "Block(module=LlamaDecoderLayer, ln1=LlamaRMSNorm",
    "mask": "WeMask(rate=0.1, select='weight', site='attn_in', start='me+1')",
    "mask with dims": "WeMask(rate=0.1, select='weight', site='attn_in', start=2, positions=(0, 3)), "
    "9 of 64 dims in blocks 2 and 3 of Llama",
    "figure": "Figure(source='figure 1', expected='', observed='Block 2 stands out.')",
    "metrics": "Metrics(me_layer=2, ffn_layers=[0, 1, 2, 3, ...])",
    "result": "onset of m\nonset: block 3 | block 4\ntables: t\nfigures: f",
    "verification": "Verification: the fast way agrees with transformers; largest error 2.0e-06, hook_resid_post of ",
    "probe": "Norms(",
    "norm": "Normalization(name='n', kind='RMSNorm', gain=Tensor of 2,048",
    "batch": "Batch(tokens=Tensor of 40 × 2,048, lengths=(9, 9",
    "prompt": "Prompt(text='word word",
    "prompts": "TokenizedPrompts(prompts=[Prompt(text='a')]",
}


@pytest.fixture(scope="module")
def made():
    study = study_by_hand(2, n_prompts=36, tables={"norm": pd.DataFrame({"norm": range(999)})})
    view = view_model(gains_apart(plain_model("llama")))
    errors = pd.DataFrame({"site": ["hook_resid_post"], "layer": [3], "error": [2e-6], "limit": [1e-3]})
    numbers, tokens = torch.zeros(2048), torch.zeros(40, 2048, dtype=torch.long)
    drawn = Figure(go.Figure(go.Scatter(y=list(range(999)))), "figure 1", "", "Block 2 stands out.")
    return {
        "trace": study.trace,
        "study": study,
        "emergence": study.me,
        "a model": view,
        "block": view.blocks[0],
        "mask": melens.WeMask(),
        "mask with dims": melens.WeMask(start=2, positions=(0, 3), fixed=FIXED),
        "figure": drawn,
        "metrics": Metrics(me_layer=2, ffn_layers=list(range(30))),
        "result": Result(
            "onset", {"name": "m"}, Metrics(), {"t": errors}, {"f": drawn}, [("onset", "block 3", "block 4")]
        ),
        "verification": Verification("fast", BatchRule(), errors),
        "probe": melens.Norms(["ln1.hook_out"]).named("own"),
        "norm": Normalization("n", "RMSNorm", numbers, numbers),
        "batch": melens.Batch(tokens, (9,) * 40, tuple(range(40))),
        "prompt": melens.Prompt("word " * 999),
        "prompts": TokenizedPrompts([melens.Prompt("a")], [tokens[0]]),
    }


@pytest.mark.parametrize("name", PRINTED)
def test_what_a_user_gets_prints_in_a_few_lines(made, name):
    printed = repr(made[name])
    assert printed == str(made[name])
    assert printed.startswith(PRINTED[name])
    assert len(printed) < 400
    assert printed.count("\n") < 5


@pytest.mark.parametrize("name", ["trace", "study", "emergence", "a model", "mask with dims", "result", "verification"])
def test_a_notebook_shows_a_table_under_the_same_heading(made, name):
    heading, table = re.fullmatch(r"<p><b>(.*)</b></p>(.*)", made[name]._repr_html_()).groups()
    assert unescape(heading).startswith(PRINTED[name].split("\n")[0])
    assert ("<td" in table) is (name not in ("a model", "mask with dims", "verification"))


def test_a_result_shows_its_claims_with_their_verdicts(made):
    assert "verdict" not in made["result"]._repr_html_()  # no claim of the paper's is measured in it
    judged = Result("emergence", {"name": "m"}, EmergenceMetrics(me_layer=2, n_prompts=9))._repr_html_()
    assert ">verdict</th>" in judged
    assert ">not measured</td>" in judged


def test_text_of_a_model_is_no_html_in_a_notebook():
    result = Result("generate", {"name": "m"}, Metrics(), findings=[("<b>", "</td><script>")])
    assert "<script>" not in result._repr_html_()
    assert "&lt;b&gt;" in result._repr_html_()


def test_a_value_in_a_few_words_is_no_page():
    assert brief(torch.zeros(3, 4000)) == "Tensor of 3 × 4,000"
    assert brief(torch.tensor(1.5)) == "Tensor of one number"
    assert brief(pd.DataFrame({"a": range(5)})) == "DataFrame of 5 × 1"
    assert brief(nn.Linear(3, 4)) == "Linear"
    assert brief(print) == "print"
    assert brief(list(range(99))) == "[0, 1, 2, 3, ...]"
    assert len(brief("x" * 999)) <= 80
