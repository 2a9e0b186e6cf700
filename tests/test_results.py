import json
from importlib import metadata

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from melens import MelensError, results
from melens.results import Picture, Result, combine, read_results, write_failure, write_result
from melens.versions import untried

CONFIG = {"exp": {"name": "emergence"}, "model": {"name": "tiny"}, "seed": 3}


def picture(figure=None):
    return Picture(figure or go.Figure(go.Scatter(x=[0, 1], y=[1, 2])), "figure 1", "A rise.", "A rise as well.")


def some_result(**changes):
    content = {
        "experiment": "direction",
        "model": {"name": "tiny", "device": "cpu", "dtype": "float32"},
        "metrics": {"me_layer": np.int64(2), "norm_drift": 0.01, "interval": (np.float32(1.5), float("nan"))},
        "tables": {"norms": pd.DataFrame({"layer": [0, 1], "norm": [1.0, 2.0]})},
        "pictures": {"norms": picture()},
    }
    return Result(**(content | changes))


@pytest.mark.newest
def test_what_a_run_leaves(tmp_path):
    paths = write_result(some_result(), tmp_path / "run", config=CONFIG, duration=1.234)
    assert {path.name for path in paths} == {"norms.parquet", "norms.html", "result.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in paths} | {"plotly.min.js"}
    content = json.loads((tmp_path / "run" / "result.json").read_text())
    assert content["metrics"] == {"me_layer": 2, "norm_drift": 0.01, "interval": [1.5, None]}
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


def test_a_run_that_breaks_off_leaves_no_half_file(tmp_path):
    class Breaks(go.Figure):
        def write_html(self, path, **options):
            path.write_text("<half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_result(some_result(pictures={"a": picture(Breaks())}), tmp_path, config=CONFIG, duration=1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"norms.parquet", "plotly.min.js"}


def test_several_results_become_one():
    other = some_result(experiment="ffn", metrics={"me_layer": 2}, tables={}, pictures={"ffn": picture()})
    whole = combine([some_result(), other])
    assert whole.experiment == "all"
    assert set(whole.metrics) == {"direction", "ffn"}
    assert list(whole.pictures) == ["norms", "ffn"]
    assert set(results.claims_of(whole).experiment) == {"direction", "ffn"}


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MelensError, match="cannot be written to"):
        write_result(some_result(), tmp_path / "file" / "run", config=CONFIG, duration=1.0)


def test_the_jobs_of_a_sweep_are_read_in_order(tmp_path):
    for job in ("10", "2"):
        write_result(some_result(), tmp_path / job, config=CONFIG, duration=1.0)
    write_failure("It broke.", tmp_path / "3", config=CONFIG)
    jobs = read_results(tmp_path)
    assert [path.name for path in jobs] == ["2", "3", "10"]
    assert [result["status"] for result in jobs.values()] == ["ok", "failed", "ok"]
    assert jobs[tmp_path / "3"]["error"] == "It broke."
