"""The command line as a user runs it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from melens.report.ledger import KEPT

ROOT = Path(__file__).parents[2]


def command(*overrides):
    return [sys.executable, "experiments/run.py", *overrides]


def run(*overrides):
    return subprocess.run(command(*overrides), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def short_prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("Where is the key?\nMy dog likes rain.\nSeven times six is\n")
    return f"prompts.file={path}"


def test_the_default_model_from_the_command_line(tmp_path, short_prompts):
    done = run(short_prompts, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "block 11 (layer 12 counting from 1)" in done.stdout
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert metrics["me_layer"] == 11
    assert metrics["magnification"] == pytest.approx(153, rel=0.1)
    assert metrics["relative_magnification"] > 100
    assert (metrics["agreement"], metrics["positions"], metrics["dims"][0]) == (1, [0], 507)
    assert (metrics["n_prompts"], metrics["distinct_first_tokens"]) == (3, 3)
    assert metrics["sink_onset_layer"] == 12
    for name in ("emergence.html", "top_dims.html", "plotly.min.js"):
        assert (tmp_path / name).stat().st_size > 1000
    assert pd.read_parquet(tmp_path / "table8.parquet").me_layer.tolist() == [11]
    assert (tmp_path / ".hydra" / "config.yaml").is_file()


@pytest.mark.slow
def test_everything_about_the_embedded_model_on_one_page(tmp_path, short_prompts):
    done = run("exp=all", short_prompts, "exp.sinks.rank_tokens=4", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    verdicts = {claim["id"]: claim["verdict"] for claim in result["claims"]}
    assert {part["me_layer"] for part in result["metrics"].values()} == {11}
    assert verdicts["ffn-needed"] == verdicts["amplification"] == verdicts["direction-inputs"] == "holds"
    assert verdicts["norm-scales"] == "does not hold"  # replacing the norm by the identity makes it larger
    assert verdicts["only-me-causal"] == "does not hold"
    ablation = result["metrics"]["ablation"]
    assert ablation["strongest_cause"] == 11
    assert {0, 8, 9, 11} <= set(ablation["causal_layers"])
    assert ablation["left_without_norm"]["identity"] > 100
    assert ablation["block_evaluations"] == 3 * sum(range(1, 31))
    assert result["metrics"]["ffn"]["amplification"] == pytest.approx(4_000, rel=0.1)
    assert result["metrics"]["predict"]["predicted_dim"] == 507
    assert (tmp_path / "report.html").stat().st_size < 6 * 2**20
    for figure in result["figures"]:
        assert (tmp_path / f"{figure}.html").is_file()
    assert "Of 38 claims, " in done.stdout


@pytest.mark.slow
def test_the_findings_in_the_documents_are_what_is_measured(tmp_path):
    done = run("exp=all", "exp.keep=false", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    kept = {claim["id"]: claim for claim in json.loads((ROOT / KEPT).read_text("utf-8"))["claims"]}
    claims = json.loads((tmp_path / "result.json").read_text("utf-8"))["claims"]
    assert len(claims) > 30
    for claim in claims:
        was = kept[claim["id"]]
        assert (claim["id"], claim["verdict"]) == (was["id"], was["verdict"])
        assert claim["value"] == pytest.approx(was["value"], rel=0.01, abs=1e-3), claim["id"]


def test_an_experiment_that_does_not_apply_says_why(tmp_path):
    done = run("exp=ablation", "model=random", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert "There is no massive activation whose causes could be removed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_a_sweep_merges_table_8_and_survives_a_model_that_fails(tmp_path):
    (broken := tmp_path / "broken").mkdir()
    (broken / "config.json").write_text("{}")
    done = run("-m", "model=random,qwen3-4b", f"model.hub_id={broken}", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 1
    table8 = pd.read_parquet(tmp_path / "table8.parquet").set_index("model")
    assert (table8.n_layers["random"], table8.family["qwen3-4b"]) == (6, "qwen3")
    assert "has no model_type" in table8.error["qwen3-4b"]
    sweep = pd.read_parquet(tmp_path / "sweep.parquet")
    assert sweep.status.tolist() == ["ok", "failed"]
    assert "has no model_type" in sweep.error[1]
    claims = pd.read_parquet(tmp_path / "claims.parquet").set_index("id")
    assert claims.verdict["exists"] == "does not hold"
    assert (tmp_path / "verdicts.html").is_file()
    assert (tmp_path / "norms_side_by_side.html").is_file()
    assert "Traceback" not in done.stderr
    assert "leaked" not in done.stderr  # as nanobind says of what a library holds to the end


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (("exp.loq_scale=true",), 2, "There is no option exp.loq_scale; did you mean exp.log_scale?"),
        (("model=hub", "model.name=qwen3-4bb"), 2, "nearest known are"),
        (("model=random", "model.config.num_key_value_heads=3"), 1, "cannot share"),
        (("model=random", "hydra.run.dir=README.md/run"), 1, "README.md"),
    ],
)
def test_a_mistake_gets_a_sentence_and_no_traceback(overrides, code, message, tmp_path):
    where = () if any("run.dir" in override for override in overrides) else (f"hydra.run.dir={tmp_path}",)
    done = run(*overrides, *where)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_a_sweep_of_everything_is_merged_too(tmp_path, short_prompts):
    overrides = ("exp=all", "exp.experiments=[emergence,direction]", "prompts.bos=true", "seed=0,1")
    done = run("-m", *overrides, short_prompts, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert pd.read_parquet(tmp_path / "table8.parquet").me_layer.tolist() == [11, 11]
    sweep = pd.read_parquet(tmp_path / "sweep.parquet")
    assert sweep["emergence.me_layer"].tolist() == [11, 11]
    claims = pd.read_parquet(tmp_path / "claims.parquet")
    assert set(claims[claims.id == "direction-inputs"].verdict) == {"trivial here"}
    assert claims[claims.id == "same-in-family"].verdict.tolist() == ["not measured"]  # it is one model, twice


def test_the_traceback_is_there_for_those_who_want_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = run(f"model.name={tmp_path}", "model=hub", "hydra.verbose=true", f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_an_interrupt_ends_without_a_result(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    try:
        process = subprocess.Popen(
            command(f"hydra.run.dir={tmp_path}"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    while not (tmp_path / ".hydra" / "overrides.yaml").exists():  # from here on the job runs
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Interrupted" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "result.json").exists()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("sweep", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_masks_do_to_the_embedded_model(tmp_path, short_prompts, sweep):
    grid = ["exp=wemask", "wemask.rate=0.1", "wemask.select=[weight,magnitude]", "data.n_texts=3", "data.n_tokens=48"]
    if sweep:
        done = run("-m", *grid, "wemask.site=attn_in,ln1_in", short_prompts, f"hydra.sweep.dir={tmp_path}")
    else:
        done = run(*grid, "wemask.site=[attn_in,ln1_in]", short_prompts, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    cells = pd.read_parquet(tmp_path / "cells.parquet").set_index(["site", "select"])
    assert set(cells.start) == {12}
    assert cells.dloss["attn_in", "weight"] < 0.1 < cells.dloss["attn_in", "magnitude"]
    assert cells.dloss["ln1_in", "weight"] < 0.1
    assert cells.dloss["ln1_in", "magnitude"] > 3
    assert cells.massive_hits["attn_in", "weight"] == 0
    for figure in ("loss_change", "rates", "loss_and_sinks", "by_block"):
        assert (tmp_path / f"{figure}.html").is_file()
