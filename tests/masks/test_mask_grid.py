"""exp=wemask on planted models: the grid, what it keeps, how a sweep's jobs are put together."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from planted import VOCABULARY, bridge, gains_apart, plain_model, plant
from written import write_result

import melens
from experiments import wemask
from experiments.options import compose_options
from experiments.runner.jobs import jobs_of
from experiments.runner.masks import masks_of
from experiments.runner.study import begin_study, run_experiments
from experiments.runner.texts import texts_of
from melens import MelensError, WeMask
from melens.masks.grid_metrics import UNMASKED

TOKEN, DIM, BLOCK = 7, 21, 1


def configuration(*overrides):
    return compose_options("exp=wemask", "model=random", "data.n_texts=6", "data.n_tokens=12", *overrides)


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    network = gains_apart(plain_model("llama"))
    plant(network, block=BLOCK, token=TOKEN, dim=DIM)
    return bridge(network)


def study_of(model, *overrides):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, VOCABULARY, (length,), generator=generator) for length in range(12, 16)]
    for prompt in prompts:
        prompt[0] = TOKEN
    return begin_study(model, prompts, configuration(*overrides), lambda name: lambda done, total: None)


def run(model, *overrides):
    (result,) = run_experiments(study_of(model, *overrides))
    return result


GRID = (
    "wemask.rate=[0,0.3]", "wemask.select=[weight,random,magnitude]", "wemask.site=[attn_in,ln1_in]",
    "wemask.seed=[0,1]",
)  # fmt: skip


@pytest.mark.usefixtures("_own_cache")
def test_every_combination_is_a_row_and_a_second_run_measures_none(model):
    first = run(model, *GRID)
    cells = first.tables["cells"]
    assert len(cells) == 2 * (1 + 2 + 1)  # a rate of 0 is no mask; only random masks have seeds
    assert set(cells["start"]) == {BLOCK + 1}
    assert cells["cell"].is_unique
    assert (cells["p_holm"] >= cells["p"]).all()
    assert first.metrics.cells_kept == []
    second = run(model, *GRID)
    assert len(second.metrics.cells_kept) == len(cells)
    assert second.metrics.unmasked_run_was_kept
    pd.testing.assert_frame_equal(second.tables["cells"], cells)
    third = run(model, *GRID, "exp.keep=false")
    assert third.metrics.cells_kept == []
    pd.testing.assert_frame_equal(third.tables["cells"], cells)
    assert {"attention_change", "key", "loss_change", "rates", "loss_and_sinks", "by_block"} == set(first.figures)


@pytest.mark.usefixtures("_own_cache")
def test_which_of_equal_gains_are_masked_has_its_spread_at_the_papers_rate():
    network = gains_apart(plain_model("llama"))
    plant(network, block=BLOCK, token=TOKEN, dim=DIM)
    for block in network.base_model.layers:
        gain = block.input_layernorm.weight
        gain.data = (4 * gain).round() / 4  # few values, as bfloat16 has
    cells = run(bridge(network), "wemask.rate=[0.1,0.3]", "exp.patterns=none").tables["cells"].set_index("rate")
    assert cells["tied_blocks"].tolist() == [2, 2]
    of_paper = cells.loc[0.1]
    assert of_paper["dloss_ties_low"] <= of_paper["dloss"] <= of_paper["dloss_ties_high"]
    assert of_paper["dloss_ties_high"] - of_paper["dloss_ties_low"] > 1e-5
    assert math.isnan(cells.loc[0.3, "dloss_ties_low"])


def test_all_dims_are_one_mask_however_they_are_chosen(model):
    study = study_of(model, "wemask.rate=[0.3,1]", "wemask.select=[random,weight]", "wemask.seed=[0,1]")
    masks = [(mask.rate, mask.select, mask.seed) for mask in masks_of(study.cfg.wemask, study.me, model)]
    assert masks == [(0.3, "random", 0), (0.3, "random", 1), (0.3, "weight", 0), (1, "weight", 0)]


def test_a_notebook_compares_masks_with_the_unmasked_model_text_by_text(model):
    study = study_of(model)
    texts, study = texts_of(study.cfg, model)[:4], melens.study(model, study.tokens)
    mask = WeMask(0.3, "magnitude", site="ln1_in")
    with pytest.raises(MelensError, match="patterns is 'some'; it must be drawn, all or none"):
        melens.analysis.mask_grid(study, [mask], texts, patterns="some")
    result = melens.analysis.mask_grid(study, [mask], texts, patterns="none", keep=False)
    by_text = result.tables["by_text"].pivot(index="text", columns="cell", values="loss")
    (cell,) = result.tables["cells"].to_dict("records")
    difference = by_text[cell["cell"]] - by_text[UNMASKED]
    assert cell["dloss"] == pytest.approx(difference.mean())
    assert cell["dloss_low"] <= cell["dloss"] <= cell["dloss_high"]
    assert cell["perplexity"] == pytest.approx(np.exp(by_text[cell["cell"]].mean()))
    assert np.isnan(cell["massive_hits"])


def test_hits_count_the_blocks_that_mask_the_massive_dim(model):
    study = study_of(model, "wemask=random", "wemask.rate=0.5", "exp.keep=false")
    (mask,) = masks_of(study.cfg.wemask, study.me, model)
    (result,) = run_experiments(study)
    hits = sum(DIM in dims for dims in mask.fixed.dims.values())
    assert study.me.dims[0] == DIM
    assert result.tables["cells"]["massive_hits"].tolist() == [hits]


def test_each_block_in_turn(model):
    result = run(model, "wemask.start=all_blocks", "wemask.layers=first", "wemask.rate=0.5", "exp.keep=false")
    assert result.tables["cells"]["start"].tolist() == [0, 1, 2, 3]
    assert "starts" in result.figures
    assert result.metrics.start_effect_ratio > 0
    claims = melens.judge([result]).set_index("id")
    assert claims.verdict["mask-start"] != "not measured"
    assert claims.verdict["mask-weight-harmless"] == "not measured"


@pytest.mark.usefixtures("_own_cache")
def test_the_jobs_of_a_sweep_make_the_tables_of_one_run(model, tmp_path):
    whole = run(model, "wemask.rate=[0,0.1,0.3]", "wemask.select=[weight,magnitude]", "exp.patterns=all")
    jobs = {}
    for number, rate in enumerate((0, 0.1, 0.3)):
        result = run(model, f"wemask.rate={rate}", "wemask.select=[weight,magnitude]", "exp.patterns=all")
        folder = tmp_path / str(number)
        write_result(result, folder, config={"model": {"name": "tiny"}}, duration=0.0)
        jobs[folder] = json.loads((folder / "result.json").read_text())
    (merged,) = wemask.merge(jobs_of(jobs))
    pd.testing.assert_frame_equal(merged.tables["cells"], whole.tables["cells"])
    for name in ("sink_ratio", "unmasked_loss", "cells"):
        assert getattr(merged.metrics, name) == getattr(whole.metrics, name)
    assert {"loss_change", "rates", "by_block"} <= set(merged.figures)


def test_what_no_model_allows_is_refused_before_there_is_one():
    for override, message in (
        ("wemask.rate=[0.1,2]", r"wemask.rate is \[0.1, 2\]; it must be a number from 0 \(no mask\) to 1, or a list"),
        ("wemask.rate=false", "wemask.rate is false; it must be a number"),
        ("wemask.select=[weight,wieght]", "'wieght'\\]; it must be weight, "),
        ("wemask.site=[]", r"wemask.site is \[\]; it must be attn_in, ln1_in or resid_pre, or a list of them"),
        ("wemask.layers=[first,some]", r"wemask.layers is \['first', 'some'\]; it must be all, first or a list"),
    ):
        with pytest.raises(MelensError, match=message):
            configuration(override)
    for preset in ("paper", "random", "magnitude", "released", "off", "grid"):
        assert configuration(f"wemask={preset}").given["wemask"] == preset


def test_a_text_that_nobody_can_read_is_refused(model, tmp_path):
    (tmp_path / "text.txt").write_text("Where is the key?")
    with pytest.raises(MelensError, match=r"no tokenizer to read data\.text with"):
        run(model, f"data.text={tmp_path / 'text.txt'}")


def test_a_list_of_blocks_is_one_mask_and_a_list_of_words_several(model):
    study = study_of(model)

    def layers(value):
        cfg = configuration(f"wemask.layers={value}")
        return [mask.fixed.blocks for mask in masks_of(cfg.wemask, study.me, model)]

    assert layers("[1,3]") == [(1, 3)]
    assert layers("[all,first,[0,3]]") == [(2, 3), (2,), (0, 3)]


def test_a_model_without_an_me_layer_needs_a_start():
    plain = bridge(gains_apart(plain_model("qwen2")))
    with pytest.raises(MelensError, match="no ME layer to start from"):
        run(plain, "exp.keep=false")
    result = run(plain, "wemask.start=1", "exp.keep=false")
    assert len(result.tables["cells"]) == 1
    assert set(melens.judge([result]).query("experiment == 'wemask'").verdict) == {"not measured"}


def test_all_blocks_are_those_where_a_mask_has_a_place(model, monkeypatch):
    study = study_of(model, "wemask.start=all_blocks", "wemask.layers=first", "wemask.site=[attn_in,resid_pre]")
    monkeypatch.setattr("melens.models.view.ModelView.can_mask_attention", lambda network, layer: layer != 0)
    starts = [(mask.site, mask.start) for mask in masks_of(study.cfg.wemask, study.me, model)]
    assert starts == [("attn_in", 1), ("attn_in", 2), ("attn_in", 3), *(("resid_pre", block) for block in range(4))]
