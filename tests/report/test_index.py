"""The page over all runs of a folder, by runs made by hand: nothing here loads a model."""

import json
import re
import sys
from urllib.parse import unquote

import pytest

from experiments.runner.command import run_command
from melens import MelensError
from melens.report.index import write_index

CLAIM = {"claim": "It is <large>", "source": "section 3"}


def write_run(folder, model="tiny", experiment="emergence", day=1, verdicts=None, name="result.json", kind=(), **more):
    metrics = {"me_layer": 3, "n_layers": 6, "magnification": 12.5}
    folder.mkdir(parents=True)
    content = {
        "experiment": experiment,
        "status": "ok",
        "model": {"name": model, "dtype": "float32", "quantization": None, **dict(kind)},
        "metrics": {"emergence": metrics} if experiment == "all" else metrics,
        "claims": [{"id": id, **CLAIM, "verdict": verdict} for id, verdict in (verdicts or {}).items()],
        "files": ["report.html", "emergence.html", "norms.parquet", "gone.html"],
        "environment": {"finished": f"2026-11-{day:02}T10:00:00+00:00"},
    }
    (folder / name).write_text(json.dumps(content | more))
    for page in ("report.html", "emergence.html"):
        (folder / page).write_text("")


@pytest.fixture
def outputs(tmp_path):
    """Two models, a damaged result, one that failed, one without a result, and a run that goes on."""
    folder = tmp_path / "my runs"
    write_run(folder / "1" / "a", day=1, verdicts={"large": "does not hold", "early": "holds"}, experiment="all")
    write_run(folder / "1" / "b", day=2, verdicts={"large": "holds", "early": "not measured"})
    write_run(
        folder / "2" / "c#1", model="/home/me/<b>", day=3, metrics={"me_layer": None}, verdicts={"early": "holds"}
    )
    write_run(folder / "2" / "d", status="running", name="result.partial.json", missing=["sinks"])
    (folder / "3").mkdir()
    (folder / "3" / "result.json").write_text('{"experiment": ')
    (folder / "4" / ".hydra").mkdir(parents=True)
    write_run(folder / "5", status="failed", error="It has no <config>.")
    write_run(folder / "6", model=7)
    return folder


def test_models_runs_and_claims_are_on_one_page_with_links_that_lead_somewhere(outputs):
    index = write_index(outputs)
    page = index.page.read_text("utf-8")
    assert (index.page, index.n_runs, index.n_models) == (outputs / "index.html", 4, 2)
    assert "Massive activations in 2 models" in page
    assert "block 3 of 6" in page
    assert "× 12.5" in page
    assert page.index("&lt;b&gt;") < page.index(">tiny<")  # the latest first, and as text
    assert "<b>" not in page
    assert "/home/me" not in page
    assert "missing: sinks" in page
    links = [unquote(link) for link in re.findall(r'href="(?!#|data:)([^"#]*)', page)]
    assert {"1/a/report.html", "2/c#1/report.html", "1/b/emergence.html"} <= set(links)
    assert all((outputs / link).is_file() for link in links)
    assert not re.search(r'(src|href)="(http|/)', page)


def test_of_each_claim_the_latest_verdict_that_was_measured_counts(outputs):
    page = write_index(outputs).page.read_text("utf-8")
    of_tiny = re.findall(r'title="tiny: ([^"]*)">\s*<a href="([^"]*)"', page)
    assert sorted(of_tiny) == [("holds", "1/a/report.html#claim-early"), ("holds", "1/b/report.html#claim-large")]
    assert "2 of 2" in page  # the claim `early`, which holds in both, is first
    assert page.index("2 of 2") < page.index("1 of 1")


def test_what_cannot_be_read_is_named_with_the_reason(outputs):
    index = write_index(outputs)
    why = {one.folder.name: one.why for one in index.unread}
    assert set(why) == {"3", "4", "5", "6"}
    assert why["3"] == "result.json is damaged: it is no JSON."
    assert why["4"].startswith("It has no result: the run goes on")
    assert why["5"] == "The run failed: It has no <config>."
    assert "model.name" in why["6"]
    page = index.page.read_text("utf-8")
    assert "It has no &lt;config&gt;." in page
    assert "4 folders are not shown." in page


def test_two_dtypes_of_a_model_are_two_models(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", kind={"dtype": "bfloat16", "quantization": "4bit"})
    page = write_index(tmp_path).page.read_text("utf-8")
    assert "tiny, bfloat16, 4bit" in page
    assert "tiny, float32" in page


def test_a_folder_is_one_model_by_whatever_path_it_was_given_and_two_folders_are_two(tmp_path):
    runs = (("mine", "/a/mine"), ("mine", "/a/mine"), ("mine", "/b/mine"), ("its", "/a/its"))
    for day, (name, path) in enumerate(runs, 1):
        write_run(tmp_path / str(day), model=name, day=day, kind={"path": path})
    index = write_index(tmp_path)
    assert index.n_models == 3
    rows = re.findall(r'<th scope="row"><a href="(\d)/report.html">(.*?)</a>', index.page.read_text("utf-8"))
    assert rows == [("4", "its"), ("3", "/b/mine"), ("2", "/a/mine")]


@pytest.mark.parametrize(
    ("folder", "words"), [("nowhere", "There is no folder"), (".", "There is no run in .*no folder below it holds")]
)
def test_a_folder_without_runs_is_refused(tmp_path, folder, words):
    with pytest.raises(MelensError, match=words):
        write_index(tmp_path / folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        ([], 0, "4 runs of 2 models."),
        (["exp.page={}/site/all.html"], 0, "site/all.html"),
        (["-m"], 2, "exp=index takes no options but exp.folder and exp.page"),
        (["model=random"], 2, "exp=index takes no options but exp.folder and exp.page"),
    ],
)
def test_the_command_writes_the_page_and_takes_nothing_else(outputs, monkeypatch, capsys, typed, code, words):
    arguments = [argument.format(outputs) for argument in typed]
    monkeypatch.setattr(sys, "argv", ["run.py", "exp=index", f"exp.folder={outputs}", *arguments])
    monkeypatch.setattr("experiments.runner.command._failures", [])
    monkeypatch.chdir(outputs)
    before = set(outputs.rglob("*"))
    assert run_command() == code
    shown = capsys.readouterr()
    assert words in shown.out + shown.err
    if code == 0:
        page = "site/all.html" if typed else "index.html"
        assert shown.out.splitlines()[-1] == f"Page:   {page}"
        links = re.findall(r'<a href="(?!#)([^"#]*)', (outputs / page).read_text("utf-8"))
        assert all((outputs / page).parent.joinpath(unquote(link)).is_file() for link in links)
        assert "  3: result.json is damaged" in shown.out
    assert {path.name for path in set(outputs.rglob("*")) - before} <= {"index.html", "site", "all.html"}
