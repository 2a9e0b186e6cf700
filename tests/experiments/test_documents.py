"""What the README and the guides tell people to type works, and what they name is there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from planted import plain_model

import melens
from experiments.options.command_line import check_command, prepare_command
from experiments.runner.registry import EXPERIMENTS
from melens.claims.paper import CLAIMS
from melens.data.prompts import load_prompts

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("tests/*/*.md"), *ROOT.glob(".github/*.md")})


DATA = {
    "mine.jsonl": {"text": "Where is the key?"},
    "my.jsonl": {"question": "What is 9 + 9?", "solution": "18"},
    "my-data/piqa.jsonl": {"question": "To open a jar,", "choices": ["turn its lid.", "sing."], "answer": 0},
    "my-data/gsm8k.test.jsonl": {"question": "What is 9 + 9?", "answer": "18"},
}


def code_of(document):
    return "".join(document.read_text("utf-8").replace("\\\n", " ").split("```")[1::2])


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder with the files that the commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-data").mkdir()
    for name, line in DATA.items():
        (tmp_path / name).write_text(json.dumps(line) + "\n")
    (trained := tmp_path / "outputs" / "2026-01-31" / "12-00-00-000000" / "model").mkdir(parents=True)
    (trained / "config.json").write_text("{}")
    for step in (100, 200):
        (checkpoint := trained.parent / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
    melens.WeMask(0.1, start=1).on(plain_model("llama")).save(trained)
    for module in ("melens.environment.extras", "melens.training.recipe"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)


@pytest.mark.usefixtures("somewhere")
def test_every_command_is_one():
    lines = [line for document in DOCUMENTS for line in code_of(document).splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if "experiments/run.py" in line]
    assert len(commands) > 30
    for command in commands:
        typed = command[command.index("experiments/run.py") + 1 :]
        check_command(prepare_command([argument for argument in typed if argument != "..."]))


def test_every_command_that_installs_takes_what_was_tried():
    texts = "".join(document.read_text("utf-8") for document in DOCUMENTS) + (ROOT / ".ci" / "run").read_text()
    installs = re.findall(r"pip install [^`\n]*-e [^`\n]*", texts)
    assert len(installs) > 5
    assert [line for line in installs if "-c .ci/constraints.txt" not in line] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8"))
    for link in (link for link in links if "://" not in link):
        name, _, heading = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE) if heading else []
        assert heading in ["", *(re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings)], link


def test_every_script_and_module_that_is_named_is_there():
    named = {
        name
        for document in DOCUMENTS
        for name in re.findall(
            r"`(?:python )?((?:melens|experiments|tests|conf|\.ci|\.github)/[\w./-]+)", document.read_text("utf-8")
        )
    }
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = set(tracked.stdout.splitlines())
    invented = {"melens/analysis/heavy_tails.py", "experiments/tails.py", "conf/exp/tails.yaml"}  # in a walk
    folders = {f"{parent}" for file in files for parent in Path(file).parents}
    assert {name for name in named if name not in files and name.rstrip("/") not in folders} <= invented


def test_the_readme_is_short_and_names_every_experiment():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert {name for name in EXPERIMENTS if f"`{name}`" not in text} == set()


def test_the_guide_of_the_experiments_has_the_options_and_claims_of_each():
    guide = (ROOT / "experiments" / "README.md").read_text("utf-8")
    rows = {
        name: row
        for row in re.findall(r"^\| `.*$", guide, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert set(EXPERIMENTS) - {"all"} <= set(rows)
    rows["arms"] = rows["pretrain"]  # whose runs are compared
    for claim in CLAIMS:
        assert re.search(rf"\b{claim.id}\b", rows[claim.metrics.experiment]), claim.id
    for name in set(EXPERIMENTS) - {"all"}:
        own = set(EXPERIMENTS[name].options.model_fields) - {"name", "keep", "report"}
        assert {option for option in own if f"`{option}`" not in rows[name]} == set(), name


def test_the_recipe_of_a_probe_runs_as_it_is_pasted(monkeypatch):
    guide = (ROOT / "experiments" / "README.md").read_text("utf-8")
    code = re.search(r"## Add a probe.*?```python\n(.*?)```", guide, re.DOTALL)[1]
    tiny = melens.load_model("tiny")
    monkeypatch.setattr(melens, "load_model", lambda name: tiny)
    exec(code, names := {"__name__": "recipe"})
    assert names["table"].columns.tolist() == ["prompt", "layer", "site", "pos", "kurtosis"]
    assert names["table"]["kurtosis"].between(1, tiny.cfg.d_model).all()


def test_the_readmes_library_runs(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    monkeypatch.setattr(melens, "load_prompts", lambda: sorted(load_prompts(), key=lambda prompt: len(prompt.text))[:2])
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda figure: print("a figure"))
    exec(code, {"__name__": "readme"})
    said = capsys.readouterr().out
    assert said.startswith("block 11 of 30")
    assert "a figure" in said
    assert "No block's output holds" in said


class StoreOfSAELens:
    """The part of SAELens 6.49's `ActivationsStore` that the guide changes: the iterator asks for filtered batches."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def get_filtered_llm_batch(self, raise_on_epoch_end=False):
        return next(self.batches)

    def __iter__(self):
        try:
            while True:
                yield self.get_filtered_llm_batch(raise_on_epoch_end=True)
        except StopIteration:
            return


class RunnerOfSAELens:
    def __init__(self, cfg):
        self.activations_store = StoreOfSAELens(cfg["batches"])

    def run(self):
        self.trained_on = torch.cat(list(self.activations_store))


def test_the_guide_of_the_library_keeps_massive_tokens_out(embedded, tmp_path, monkeypatch, capsys):
    section = (ROOT / "melens" / "README.md").read_text("utf-8").split("\n## Sparse autoencoders and probes\n")[1]
    loop, of_saelens = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    own = sorted(load_prompts(), key=lambda prompt: len(prompt.text))[:2]
    monkeypatch.setattr("melens.analysis.massive_tokens.load_prompts", lambda: own)
    monkeypatch.setattr(melens, "load_model", lambda name: embedded)
    monkeypatch.setattr(embedded.tokenizer, "padding_side", embedded.tokenizer.padding_side)  # as it was, afterwards
    exec(loop, names := {"__name__": "guide"})
    assert capsys.readouterr().out.startswith("Massive tokens of smollm2-135m: |h| > ")
    hidden, is_token = names["hidden"], names["batch"]["attention_mask"].bool()
    massive = int((hidden[is_token].abs().amax(-1) > 10_000).sum())
    assert massive >= 2  # token 0 of each text
    assert len(names["states"]) == int(is_token.sum()) - massive
    assert names["states"].abs().max() < 1_000
    stand_in = ModuleType("sae_lens")
    stand_in.LanguageModelSAETrainingRunner = RunnerOfSAELens
    monkeypatch.setitem(sys.modules, "sae_lens", stand_in)
    exec(of_saelens, of_runner := {"cfg": {"batches": hidden[:, :5]}, "__name__": "guide"})
    kept = names["keep"](hidden[:, :5], 14)
    assert not kept.all()
    assert of_runner["runner"].trained_on.equal(hidden[:, :5][kept])
