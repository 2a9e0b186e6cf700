"""What a grid of masks says, from tables made by hand: every expected number is worked out on paper.

With two texts an interval is as wide as the texts differ: a quarter of all resamples takes one of them twice.
"""

import math

import pandas as pd
import pytest
import torch
from handmade import study_by_hand

from melens.masks import grid as grids
from melens.masks.comparison import Measured
from melens.masks.grid import Grid, compare_grid
from melens.masks.grid_claims import UNMASKED, MaskGridMetrics
from melens.masks.grid_figures import grid_figures, nearest_paper_rate

ME_LAYER, SINK_LAYERS = 1, [2, 3]
ON_TEXTS = MaskGridMetrics(me_layer=ME_LAYER, next_attention=2, sink_layers=SINK_LAYERS, texts=2, tokens_per_text=8)
LOSS, SINK = (2.0, 4.0), (0.5, 0.8)
"""Of the two texts, without a mask."""
OF_ATTENTION = ("sink_mass", "share_of_heads", "entropy", "effective_rank", "input_cosine", "key_cosine")


def mask(select="weight", rate=0.1, dloss=(0.0, 0.0), ratio=(1.0, 1.0), entropy=(0.0,) * 4, **arguments):
    """A row of a grid: a mask's arguments, and what it does to the loss and the sink mass of each text."""
    paper = {
        "site": "attn_in",
        "start": ME_LAYER + 1,
        "layers": "all",
        "positions": "first",
        "strength": 1.0,
        "seed": 0,
    }
    return {
        "rate": rate, "select": select, **paper, "n_blocks": 2, "massive_hits": math.nan, **arguments,
        "effects": {"dloss": dloss, "ratio": ratio, "entropy": entropy},
    }  # fmt: skip


def grid(*masks):
    rows, by_text, by_block = [], [], []
    for number, arguments in enumerate((mask(), *masks)):
        effects = arguments["effects"]
        name = f"mask {number}" if number else UNMASKED
        rows += [{"cell": name, **arguments}] if number else []
        for text in range(2):
            measured = {"loss": LOSS[text] + effects["dloss"][text], "sink_mass": SINK[text] * effects["ratio"][text]}
            by_text.append({"cell": name, "text": text, "kl": text, "agreement": 0.5 + 0.2 * text, **measured})
        for layer, entropy in enumerate(effects["entropy"]):
            values = dict.fromkeys(OF_ATTENTION, 0.0) | {"entropy": entropy, "input_cosine": entropy / 10}
            by_block.append({"cell": name, "layer": layer, **values})
    return Grid(pd.DataFrame(rows).drop(columns="effects"), pd.DataFrame(by_text), pd.DataFrame(by_block))


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    monkeypatch.setattr(grids, "grid_figures", lambda *of_grid: {})


def metrics_of(*masks, **changes):
    return compare_grid(grid(*masks), {"name": "by hand"}, ON_TEXTS.model_copy(update=changes)).metrics


# --- A configuration --------------------------------------------------------------------------------------------------


def test_a_configuration_is_compared_text_by_text():
    both = (
        mask(dloss=(0.5, 0.1), ratio=(0.5, 0.25), entropy=(9.0, 9.0, 1.0, 2.0)),
        mask("random", dloss=(0.2, -0.2), ratio=(1.5, 1.0)),
    )
    first, second = compare_grid(grid(*both), {"name": "by hand"}, ON_TEXTS).tables["cells"].to_dict("records")
    expected = {
        "loss": 3.3, "perplexity": math.exp(3.3), "dloss": 0.3, "dloss_low": 0.1, "dloss_high": 0.5,
        "p": 2 / 4,  # the mean is as far from 0 with the signs ++ and --
        "p_holm": 1.0, "kl": 0.5, "kl_low": 0, "kl_high": 1, "agreement": 0.6,
        "sink_mass": (0.25 + 0.2) / 2,
        "sink_ratio": 0.375, "sink_ratio_low": 0.25, "sink_ratio_high": 0.5,  # not 0.225 / 0.65
        "entropy": 1.5, "input_cosine": 0.15,  # of the blocks 2 and 3
    }  # fmt: skip
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    assert (second["dloss"], second["p"], second["sink_ratio"]) == pytest.approx((0, 1, 1.25))


def test_the_unmasked_model_has_its_own_numbers():
    metrics = metrics_of(mask(), mask("random"))
    assert (metrics.cells, metrics.unmasked_loss, metrics.unmasked_sink_mass) == pytest.approx((2, 3.0, 0.65))
    assert metrics.unmasked_perplexity == pytest.approx(math.exp(3))


# --- For the claims ---------------------------------------------------------------------------------------------------


def test_the_sink_that_is_left_is_that_of_the_papers_mask_at_the_rate_nearest_its_own():
    others = [
        mask("random"), mask(site="ln1_in"), mask(layers="first"), mask(start=3), mask(positions="all"),
        mask(strength=0.5),
    ]  # fmt: skip
    metrics = metrics_of(
        mask(rate=0.05, ratio=(0.9, 0.9)), *others, mask(rate=0.12, dloss=(0.0, 0.4), ratio=(0.7, 0.5)), mask(rate=0.3)
    )
    assert metrics.paper_rate == 0.12
    assert (metrics.sink_ratio, *metrics.sink_ratio_interval) == pytest.approx((0.6, 0.5, 0.7))
    assert (metrics.paper_dloss, *metrics.paper_dloss_interval) == pytest.approx((0.2, 0.0, 0.4))
    assert metrics_of(*others).sink_why_not == "The grid does not have the paper's mask (wemask=paper)."


def at(rate, weight, random, magnitude, **place):
    """Weight, random (two seeds) and magnitude side by side, by their Δloss."""
    return [
        mask("weight", rate, (weight - 0.1, weight + 0.1), **place),
        *(mask("random", rate, (dloss, dloss), seed=seed, **place) for seed, dloss in enumerate(random)),
        mask("magnitude", rate, (magnitude, magnitude), **place),
    ]


def test_a_mask_destroys_from_a_nat_on_and_weight_guided_ones_are_judged_there():
    metrics = metrics_of(
        *at(0.1, 0.02, (0.75, 1.25), 0.5),  # random destroys: 1 on average
        *at(0.1, 0.3, (0.4, 0.4), 1.5, site="ln1_in"),  # magnitude does
        *at(0.3, 0.25, (7.0, 7.0), 1.5),  # both do
        *at(0.5, 5.0, (0.5, 1.4), 0.99),  # none does, and what the weight-guided mask costs there does not matter
        mask("weight", 0.7, (9.0, 9.0)), mask("random", 0.7, (9.0, 9.0)),  # without magnitude beside them
    )  # fmt: skip
    assert metrics.destroyed_by == {"random": 2, "magnitude": 2}
    interval = metrics.weight_where_destroyed_interval
    assert (metrics.weight_where_destroyed, *interval) == pytest.approx((0.3, 0.2, 0.4))


def test_without_destruction_or_without_the_three_side_by_side_there_is_no_harm_to_judge():
    assert metrics_of(*at(0.1, 0.0, (0.9, 1.0), 0.99)).harm_why_not.startswith(
        "Neither random nor magnitude masks cost"
    )
    assert "side by side" in metrics_of(mask("weight"), mask("random", dloss=(2.0, 2.0))).harm_why_not


@pytest.mark.parametrize(("largest", "best", "is_largest"), [(-0.2, 0.1, False), (-0.4, 0.5, True)])
def test_moderation_is_the_rate_with_the_lowest_loss(largest, best, is_largest):
    other = mask("random", rate=0.2, dloss=(-1.0, -1.0))
    rates = [mask(rate=0.01, dloss=(-0.1, -0.1)), mask(dloss=(-0.35, -0.25)), mask(rate=0.5, dloss=(largest, largest))]
    metrics = metrics_of(*rates, other)
    assert (metrics.best_rate, metrics.best_rate_is_largest) == (best, is_largest)
    expected = (-0.4, -0.4, -0.4) if is_largest else (-0.3, -0.35, -0.25)
    assert (metrics.best_dloss, *metrics.best_dloss_interval) == pytest.approx(expected)
    assert "at least three rates" in metrics_of(*rates[:2], other).moderation_why_not


def test_the_effect_of_a_start_is_compared_with_the_strongest_elsewhere_whatever_its_sign():
    ratios = {0: 1.3, 1: 0.9, 2: 0.4, 3: 0.8}
    masks = [mask(start=start, layers="first", ratio=(ratio, ratio)) for start, ratio in ratios.items()]
    metrics = metrics_of(*masks)
    assert (metrics.start_effect, metrics.start_effect_elsewhere) == pytest.approx((0.6, 0.3))
    assert metrics.start_strongest_elsewhere == 0
    assert metrics.start_effect_ratio == pytest.approx(2)
    behind = metrics_of(*masks, next_attention=3)  # in a hybrid model block 2 may have no attention
    assert (behind.start_effect_ratio, behind.start_strongest_elsewhere) == (pytest.approx(0.2 / 0.6), 2)
    assert "other starts" in metrics_of(*masks[:3]).start_why_not


# --- From what was measured to tables ---------------------------------------------------------------------------------


def test_sinks_are_averaged_over_the_blocks_behind_the_me_layer_that_have_attention():
    sink_mass = torch.zeros(7, 2, 2)  # [layer, head, text]
    sink_mass[2] = torch.tensor([[0.2, 0.6], [0.4, 0.8]])
    sink_mass[3] = math.nan  # without attention
    sink_mass[4] = torch.tensor([[0.0, 0.2], [0.2, 0.4]])
    sink_mass[5] = 1.0  # the last two count apart
    by_text, by_head, by_layer = torch.zeros(2), torch.zeros(7, 2), torch.zeros(7)
    other = {"entropy": by_head, "effective_rank": by_head, "input_cosine": by_layer, "key_cosine": by_layer}
    measured = Measured(by_text, by_text, by_text, sink_mass, **other, first_key=torch.zeros(7, 4))
    found = grids._lay_out(study_by_hand(me_layer=1), measured, [], [])
    assert found.by_text["sink_mass"].tolist() == pytest.approx([0.2, 0.5])
    of_block = found.by_block.set_index("layer")
    assert of_block.loc[2, ["sink_mass", "share_of_heads"]].tolist() == pytest.approx([0.5, 1])  # heads: 0.4 and 0.6
    assert of_block.loc[4, ["sink_mass", "share_of_heads"]].tolist() == pytest.approx([0.2, 0])  # heads: 0.1 and 0.3


@pytest.mark.parametrize(("me_layer", "layers"), [(1, [2, 3, 4]), (5, [6]), (None, [0, 1, 2, 3, 4, 5, 6])])
def test_sinks_are_looked_for_behind_the_me_layer(me_layer, layers):
    assert grids._sink_layers(study_by_hand(me_layer=me_layer)) == layers


# --- Figures ----------------------------------------------------------------------------------------------------------


def test_a_figure_of_few_masks_shows_of_each_selection_the_rate_nearest_the_papers():
    rates = [("weight", 0.3), ("random", 0.05), ("weight", 0.12), ("random", 0.3), ("weight", 0.12), ("weight", 0.01)]
    assert nearest_paper_rate(pd.DataFrame(rates, columns=["select", "rate"])).index.tolist() == [1, 2]


def test_figures_say_what_is_seen_in_them():
    masks = [mask(rate=0.05, dloss=(0.1, 0.3)), *at(0.1, -0.2, (0.5, 1.5), 3.0)]
    of_grid = grid(*masks)
    result = compare_grid(of_grid, {"name": "by hand"}, ON_TEXTS)
    figures = grid_figures(result.tables["cells"], of_grid.by_block, result.metrics, "by hand")
    assert set(figures) == {"loss_change", "rates", "loss_and_sinks", "by_block"}
    observed = "Δloss over the grid: weight -0.200 to +0.200, random +0.500 to +1.500, magnitude +3.000 to +3.000 nats"
    assert figures["loss_change"].observed.startswith(observed)
    (heatmap,) = figures["loss_change"].plot.data
    by_rate = dict(zip(heatmap.y, heatmap.text, strict=True))
    assert by_rate["random"][1] == "+1.000"  # the mean of two seeds
    assert figures["loss_and_sinks"].observed.startswith("The lowest loss is with mask 2: Δloss -0.200 (-0.300 to -0.1")
