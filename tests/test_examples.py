"""The examples in the docstrings run, and every public name has one.

They run on a tiny model into which a massive activation is built: in block 2, at token 0.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import string
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import bridge, gains_apart, plain_model, plant

import melens
from melens.data.texts import cut_texts, read_text
from melens.models.loading import load_tokenizer

NAMES = [
    *(f"melens.{name}" for name in melens.__all__),
    *(f"melens.analysis.{name}" for name in melens.analysis.__all__),
    *(f"melens.analysis.metrics.{name}" for name in import_module("melens.analysis.metrics").__all__),
    *("melens.data.texts.cut_texts", "melens.data.texts.read_text"),
    *("melens.models.view.view_model", "melens.report.result.Figure", "melens.report.result.Result"),
]
ROOT = Path(__file__).parent.parent
PROMPTS = [
    "The ferry left at dawn, and nobody on the quay waved.",
    "Once upon a time there was a king who had no ears.",
    "Birds fly south in autumn, and come back in spring.",
]


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    """What the examples take for granted: a model, prompts, their study and trace, and texts of equal length."""
    sizes = {"vocab_size": 259, "num_hidden_layers": 6, "max_position_embeddings": 256}
    network = gains_apart(plain_model("llama", **sizes))
    tokenizer = load_tokenizer("random", tokenizer="bytes", config={"vocab_size": 259})
    plant(network, block=2, token=torch.tensor(tokenizer.convert_tokens_to_ids(list(string.ascii_uppercase))), dim=5)
    model = bridge(network)
    model.tokenizer = tokenizer
    study = melens.study(model, PROMPTS)
    texts = cut_texts(model, read_text()[:2000], n_texts=2, n_tokens=16)
    named = {"model": model, "prompts": PROMPTS, "study": study, "trace": study.trace, "texts": texts}
    return named | {"melens": melens, "torch": torch}


@pytest.mark.parametrize("name", NAMES)
def test_example_of_a_public_name_prints_what_it_says(name, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, _, last = name.rpartition(".")
    public = getattr(import_module(module), last)
    around = vars(inspect.getmodule(public)) | examples
    (found,) = doctest.DocTestFinder(recurse=False).find(public, name, globs=around)
    assert found.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(found, out=said.append)
    assert not said, "".join(said)


def test_pages_of_the_reference_are_modules_that_describe_what_they_name():
    script = ast.parse((ROOT / ".ci" / "docs").read_text())
    pages = next(node.value for node in script.body if isinstance(node, ast.Assign) and node.targets[0].id == "PAGES")
    public = [
        getattr(module, name) for module in map(import_module, ast.literal_eval(pages)) for name in module.__all__
    ]
    described = [each for each in public if inspect.isclass(each) or inspect.isfunction(each)]
    assert len(described) > len(melens.__all__)
    assert [each.__qualname__ for each in described if not each.__doc__] == []
