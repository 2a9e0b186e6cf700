import json
from importlib import metadata

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from written import write_result

from melens import MelensError
from melens.analysis.ffn_concentration import FfnMetrics
from melens.analysis.token_direction import DirectionMetrics
from melens.environment.versions import untried
from melens.report.record import Record, read_results, write_failure
from melens.report.result import Figure, Result

CONFIG = {"exp": {"name": "emergence"}, "model": {"name": "tiny"}, "seed": 3}


def picture(figure=None):
    return Figure(figure or go.Figure(go.Scatter(x=[0, 1], y=[1, 2])), "figure 1", "A rise.", "A rise as well.")


def some_result(**changes):
    content = {
        "experiment": "direction",
        "model": {"name": "tiny", "device": "cpu", "dtype": "float32"},
        "metrics": DirectionMetrics(me_layer=np.int64(2), norm_drift=0.01, cosine_interval=(1.5, float("nan"))),
        "tables": {"norms": pd.DataFrame({"layer": [0, 1], "norm": [1.0, 2.0]})},
        "figures": {"norms": picture()},
    }
    return Result(**(content | changes))


@pytest.mark.newest
def test_what_a_run_leaves(tmp_path):
    paths = write_result(some_result(), tmp_path / "run", config=CONFIG, duration=1.234)
    assert {path.name for path in paths} == {"norms.parquet", "norms.html", "result.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in paths} | {"plotly.min.js"}
    content = json.loads((tmp_path / "run" / "result.json").read_text())
    assert content["metrics"] == {"me_layer": 2, "norm_drift": 0.01, "cosine_interval": [1.5, None]}
    claims = {claim["id"]: claim for claim in content["claims"]}
    assert claims["norm-stable"] | {"verdict": "holds", "value": 0.01, "low": None} == claims["norm-stable"]
    assert set(claims) == {"norm-stable", "direction-layers", "direction-inputs"}  # what this experiment measures
    assert content["figures"] == {"norms": {"source": "figure 1", "paper": "A rise.", "here": "A rise as well."}}
    environment = content["environment"]
    assert (environment["device"], environment["dtype"], environment["seed"]) == ("cpu", "float32", 3)
    assert {"python", "melens", "torch", "transformer_lens", "trl", "plotly"} <= set(environment["versions"])
    assert environment["untried"] == untried()
    assert pd.read_parquet(tmp_path / "run" / "norms.parquet").norm.tolist() == [1.0, 2.0]
    assert '"plotly.min.js"' in (tmp_path / "run" / "norms.html").read_text()


def test_a_figure_is_drawn_once_and_when_it_is_asked_for():
    drawn = []
    later = Figure(lambda: drawn.append("once") or go.Figure(), "figure 1", "A rise.", "A rise as well.")
    assert drawn == []
    assert later.plot is later.plot
    assert drawn == ["once"]


def test_a_library_of_another_version_than_was_tried_is_recorded(tmp_path, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == "plotly" else version(name))
    write_result(some_result(), tmp_path, config=CONFIG, duration=1.0)
    environment = json.loads((tmp_path / "result.json").read_text())["environment"]
    assert environment["untried"]["plotly"] == environment["versions"]["plotly"] == "99.0"


def test_a_source_tree_that_was_not_installed_leaves_a_result_too(tmp_path, monkeypatch):
    def not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_found)
    monkeypatch.setattr(metadata, "requires", not_found)
    write_result(some_result(), tmp_path, config=CONFIG, duration=1.0)
    environment = json.loads((tmp_path / "result.json").read_text())["environment"]
    assert (list(environment["versions"]), environment["untried"]) == (["python"], {})


class Breaks(go.Figure):
    @property
    def data(self):
        raise KeyboardInterrupt


def names(folder):
    return {path.name for path in folder.iterdir()}


def read(path):
    return json.loads(path.read_text())


def test_a_run_that_breaks_off_leaves_no_half_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_result(some_result(figures={"a": picture(Breaks())}), tmp_path / "0", config=CONFIG, duration=1.0)
    assert names(tmp_path / "0") == {"norms.parquet", "plotly.min.js", "result.partial.json"}
    assert read(tmp_path / "0" / "result.partial.json")["status"] == "running"
    assert read_results(tmp_path) == {}  # a part is not taken for a whole


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_experiment_has_ended_once_its_files_are_there(tmp_path, earlier):
    record = record_of(tmp_path, *["ffn"] * earlier, "direction", "sinks")
    for _ in range(earlier):
        record.add(ffn_result())
    with pytest.raises(KeyboardInterrupt):
        record.add(some_result(figures={"a": picture(Breaks())}, documents={"a.md": "a"}))
    assert record.missing == ["direction", "sinks"]
    assert len(record.parts) == earlier
    record.stop()
    partial = read(tmp_path / "result.partial.json")
    assert (partial["status"], partial["missing"]) == ("stopped", ["direction", "sinks"])
    assert list(partial["metrics"]) == ["ffn"] * earlier
    assert {"norms.parquet", "a.html", "a.md", *["ffn.html"] * earlier} <= set(partial["files"])
    write_result(some_result(tables={}, figures={}), tmp_path, config=CONFIG, duration=1.0)
    assert names(tmp_path) == {"result.json"}


def ffn_result():
    return some_result(experiment="ffn", metrics=FfnMetrics(me_layer=2), tables={}, figures={"ffn": picture()})


def record_of(folder, *experiments):
    return Record(folder, config=CONFIG, experiments=experiments)


def test_each_experiment_is_written_as_it_ends(tmp_path):
    folder = tmp_path / "0"
    record = record_of(folder, "direction", "ffn")
    assert not folder.exists()
    record.add(some_result())
    assert names(folder) == {"norms.parquet", "norms.html", "plotly.min.js", "result.partial.json"}
    partial = read(folder / "result.partial.json")
    assert (partial["status"], partial["missing"], set(partial["metrics"])) == ("running", ["ffn"], {"direction"})
    assert {claim["experiment"] for claim in partial["claims"]} == {"direction"}
    assert read_results(tmp_path) == {}
    record.stop()
    assert read(folder / "result.partial.json")["status"] == "stopped"
    record.add(ffn_result())
    assert record.missing == []
    paths = record.finish()
    assert [path.name for path in paths] == ["norms.parquet", "norms.html", "ffn.html", "result.json"]
    assert names(folder) == {"plotly.min.js", *(path.name for path in paths)}
    whole = read(folder / "result.json")
    assert (whole["status"], set(whole["metrics"]), whole["experiment"]) == ("ok", {"direction", "ffn"}, "all")
    assert list(whole["figures"]) == ["norms", "ffn"]
    assert {claim["experiment"] for claim in whole["claims"]} == set(record.claims.experiment) == {"direction", "ffn"}
    assert whole == record.content
    assert "missing" not in whole


def test_a_run_that_found_nothing_yet_leaves_nothing(tmp_path):
    record_of(tmp_path / "run", "direction").stop()
    assert names(tmp_path) == set()


def test_figures_of_two_runs_never_lie_in_one_folder(tmp_path):
    (tmp_path / "notes.md").write_text("three years")
    write_result(some_result(), tmp_path, config=CONFIG, duration=1.0)
    before = names(tmp_path)
    record = record_of(tmp_path, "ffn", "rmsnorm")
    assert names(tmp_path) == before  # until there is something to take its place
    record.add(ffn_result())
    assert names(tmp_path) == {"notes.md", "plotly.min.js", "ffn.html", "result.partial.json"}
    write_result(some_result(), tmp_path, config=CONFIG, duration=1.0)  # after a part of a run
    assert names(tmp_path) == before
    with pytest.raises(KeyboardInterrupt):
        write_result(some_result(figures={"a": picture(Breaks())}), tmp_path, config=CONFIG, duration=1.0)
    write_failure("It broke.", tmp_path, config=CONFIG)
    write_result(ffn_result(), tmp_path, config=CONFIG, duration=1.0)
    assert names(tmp_path) == {"notes.md", "plotly.min.js", "ffn.html", "result.json"}


def test_files_of_an_earlier_run_stay_listed_until_they_are_gone(tmp_path, monkeypatch):
    write_result(some_result(), tmp_path, config=CONFIG, duration=1.0)
    unlink = type(tmp_path).unlink

    def stopped(path, **options):
        if path.name == "norms.parquet":
            raise KeyboardInterrupt
        unlink(path, **options)

    record = record_of(tmp_path, "ffn")
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", stopped)
        with pytest.raises(KeyboardInterrupt):
            record.add(ffn_result())
    assert names(tmp_path) == {"norms.parquet", "plotly.min.js", "result.partial.json"}
    write_result(ffn_result(), tmp_path, config=CONFIG, duration=1.0)
    assert names(tmp_path) == {"plotly.min.js", "ffn.html", "result.json"}


@pytest.mark.parametrize("content", ["{}", "[1]", "half", '{"files": 3}'])
def test_a_result_that_does_not_list_its_files_is_left_alone(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(MelensError, match=r"does not list the files that belong to it.*Choose another folder"):
        record_of(tmp_path, "ffn")
    assert (tmp_path / "result.json").read_text() == content


def test_only_files_of_the_folder_itself_are_removed(tmp_path):
    outside = tmp_path / "thesis.txt"
    outside.write_text("three years")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"files": ["../thesis.txt"]}')
    write_result(ffn_result(), tmp_path / "run", config=CONFIG, duration=1.0)
    assert outside.read_text() == "three years"


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MelensError, match=r"^Cannot write to .*run: Not a directory\.$"):
        write_result(some_result(), tmp_path / "file" / "run", config=CONFIG, duration=1.0)


def test_jobs_in_folders_of_their_own_making_are_read_too(tmp_path):
    for job in ("ffn/0", "direction/1"):
        write_result(some_result(), tmp_path / job, config=CONFIG, duration=1.0)
    write_result(some_result(), tmp_path, config=CONFIG, duration=1.0)  # of another run
    assert [path.name for path in read_results(tmp_path)] == ["0", "1"]


def test_the_jobs_of_a_sweep_are_read_in_order(tmp_path):
    for job in ("10", "2"):
        write_result(some_result(), tmp_path / job, config=CONFIG, duration=1.0)
    write_failure("It broke.", tmp_path / "3", config=CONFIG)
    jobs = read_results(tmp_path)
    assert [path.name for path in jobs] == ["2", "3", "10"]
    assert [result["status"] for result in jobs.values()] == ["ok", "failed", "ok"]
    assert jobs[tmp_path / "3"]["error"] == "It broke."
