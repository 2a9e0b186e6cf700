"""What a grid of masks says, from tables made by hand: every expected number is worked out on paper.

Three texts have an interval of 4.303 standard errors to either side: Student's t of two degrees of freedom.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import study_by_hand

from melens.claims.engine import Judgement, NotMeasuredError
from melens.masks import grid as grids
from melens.masks.comparison import Measured
from melens.masks.grid import Grid, compare_grid
from melens.masks.grid_claims import CLAIMS
from melens.masks.grid_figures import configuration_in_words, grid_figures, nearest_paper_rate
from melens.masks.grid_metrics import UNMASKED, MaskGridMetrics, moderation

ME_LAYER, SINK_LAYERS = 1, [2, 3]
ON_TEXTS = MaskGridMetrics(me_layer=ME_LAYER, next_attention=2, sink_layers=SINK_LAYERS, texts=3, tokens_per_text=8)
LOSS, SINK = (2.0, 4.0, 3.0), (0.5, 0.8, 0.4)
"""Of the three texts, without a mask."""
OF_ATTENTION = ("sink_mass", "share_of_heads", "entropy", "effective_rank", "input_cosine", "key_cosine")
SAME = {"input": (0.9, 0.9, 0.9), "key": (0.9, 0.9, 0.9)}
"""Cosines of token 0's attention input and key in a text with those in the others, behind the ME layer."""
REACH = 4.302653 / math.sqrt(3)
"""Half of an interval of three texts, in standard deviations."""


def mask(select="weight", rate=0.1, dloss=(0.0,) * 3, ratio=(1.0,) * 3, entropy=(0.0,) * 4, cosines=SAME, **arguments):
    """A row of a grid: a mask's arguments, and what it does to the loss, the sink mass and token 0 of each text."""
    paper = {
        "site": "attn_in", "start": ME_LAYER + 1, "layers": "all", "positions": "first", "strength": 1.0, "seed": 0,
    }  # fmt: skip
    of_dims = {"n_blocks": 2, "massive_hits": math.nan, "tied_blocks": math.nan}
    return {
        "rate": rate, "select": select, **paper, **of_dims, "dloss_ties_low": math.nan, "dloss_ties_high": math.nan,
        **arguments, "effects": {"dloss": dloss, "ratio": ratio, "entropy": entropy, "cosines": cosines},
    }  # fmt: skip


def grid(*masks, before=0.5):
    rows, by_text, by_block = [], [], []
    for number, arguments in enumerate((mask(), *masks)):
        effects = arguments["effects"]
        name = f"mask {number}" if number else UNMASKED
        rows += [{"cell": name, **arguments}] if number else []
        for text in range(3):
            measured = {"loss": LOSS[text] + effects["dloss"][text], "sink_mass": SINK[text] * effects["ratio"][text]}
            for part, cosines in effects["cosines"].items():
                measured |= {f"{part}_cosine": cosines[text], f"{part}_cosine_before": before}
            by_text.append({"cell": name, "text": text, "kl": text, "agreement": 0.5 + 0.2 * text, **measured})
        for layer, entropy in enumerate(effects["entropy"]):
            values = dict.fromkeys(OF_ATTENTION, 0.0) | {"entropy": entropy, "input_cosine": entropy / 10}
            by_block.append({"cell": name, "layer": layer, **values})
    return Grid(pd.DataFrame(rows).drop(columns="effects"), pd.DataFrame(by_text), pd.DataFrame(by_block))


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    monkeypatch.setattr(grids, "grid_figures", lambda *of_grid: {})


def metrics_of(*masks, before=0.5, **changes):
    return compare_grid(grid(*masks, before=before), {"name": "by hand"}, ON_TEXTS.model_copy(update=changes)).metrics


def judged(name, metrics):
    (claim,) = (claim for claim in CLAIMS if claim.id == name)
    try:
        return claim.judge(metrics)
    except NotMeasuredError as error:
        return Judgement("not measured", note=str(error))


# --- A configuration --------------------------------------------------------------------------------------------------


def test_a_configuration_is_compared_text_by_text():
    both = (
        mask(dloss=(0.5, 0.1, 0.3), ratio=(0.5, 0.25, 0.75), entropy=(9.0, 9.0, 1.0, 2.0)),
        mask("random", dloss=(0.2, -0.2, 0.0), ratio=(1.5, 1.0, 1.25)),
    )
    first, second = compare_grid(grid(*both), {"name": "by hand"}, ON_TEXTS).tables["cells"].to_dict("records")
    expected = {
        "loss": 3.3, "perplexity": math.exp(3.3),
        "dloss": 0.3, "dloss_low": 0.3 - 0.2 * REACH, "dloss_high": 0.3 + 0.2 * REACH,
        "p": 2 / 8,  # the mean is as far from 0 with the signs +++ and ---
        "p_holm": 0.5, "kl": 1, "kl_low": 1 - REACH, "kl_high": 1 + REACH, "agreement": 0.7,
        "sink_mass": (0.25 + 0.2 + 0.3) / 3,
        "sink_ratio": 0.5,  # not 0.25 / 0.567
        "sink_ratio_low": 0.5 - 0.25 * REACH, "sink_ratio_high": 0.5 + 0.25 * REACH,
        "entropy": 1.5, "input_cosine": 0.15,  # of the blocks 2 and 3
    }  # fmt: skip
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    assert (second["dloss"], second["p"], second["sink_ratio"]) == pytest.approx((0, 1, 1.25))


def test_the_unmasked_model_has_its_own_numbers():
    metrics = metrics_of(mask(), mask("random"))
    assert (metrics.cells, metrics.unmasked_loss, metrics.unmasked_sink_mass) == pytest.approx((2, 3.0, 1.7 / 3))
    assert metrics.unmasked_perplexity == pytest.approx(math.exp(3))


@pytest.mark.parametrize(
    ("texts", "masks", "least"), [(5, 1, 2 / 32), (6, 1, 2 / 64), (6, 2, 4 / 64), (2, 9, 1.0), (16, 45, 0.0045)]
)
def test_few_texts_or_many_masks_say_that_no_difference_can_be_shown(texts, masks, least):
    metrics = ON_TEXTS.model_copy(update={"texts": texts})
    result = compare_grid(grid(*[mask("random", seed=seed) for seed in range(masks)]), {"name": "by hand"}, metrics)
    assert result.metrics.least_p == pytest.approx(least)
    said = dict(result.findings)
    assert ("p" in said) == (least >= 0.05)
    if least >= 0.05:
        assert said["p"].startswith(
            f"{texts} texts and {masks} masks give no p below {least:.2g}, so that no difference"
        )


def test_another_choice_among_equal_gains_is_told_where_the_loss_is():
    tied = mask(dloss=(0.1, 0.1, 0.1), tied_blocks=2.0, dloss_ties_low=0.05, dloss_ties_high=0.12)
    result = compare_grid(grid(tied), {"name": "by hand"}, ON_TEXTS)
    assert dict(result.findings)["equal gains"] == (
        "In 2 of 2 blocks equal gains decide which dims come last in mask 1: the first are masked. By other choices "
        "Δloss is +0.0500 to +0.1200."
    )
    words = configuration_in_words(result.tables["cells"].iloc[0].to_dict())
    assert words.startswith("Δloss +0.100 (+0.100 to +0.100), +0.050 to +0.120 by other choices among equal gains, p")


# --- For the claims ---------------------------------------------------------------------------------------------------


def test_the_sink_that_is_left_is_that_of_the_papers_mask_at_the_rate_nearest_its_own():
    others = [
        mask("random"), mask(site="ln1_in"), mask(layers="first"), mask(start=3), mask(positions="all"),
        mask(strength=0.5),
    ]  # fmt: skip
    of_paper = mask(rate=0.12, dloss=(0.0, 0.4, 0.2), ratio=(0.7, 0.5, 0.6))
    metrics = metrics_of(mask(rate=0.05, ratio=(0.9, 0.9, 0.9)), *others, of_paper, mask(rate=0.3))
    assert metrics.paper_rate == 0.12
    assert metrics.sink_ratio == pytest.approx(0.6)
    assert metrics.sink_ratio_interval == pytest.approx((0.6 - 0.1 * REACH, 0.6 + 0.1 * REACH))
    assert metrics.paper_dloss == pytest.approx(0.2)
    assert metrics.paper_dloss_interval == pytest.approx((0.2 - 0.2 * REACH, 0.2 + 0.2 * REACH))
    assert metrics_of(*others).sink_why_not == "The grid does not have the paper's mask (wemask=paper)."


def at(rate, weight, random, magnitude, **place):
    """Weight, random (two seeds) and magnitude side by side, by their Δloss."""
    return [
        mask("weight", rate, (weight - 0.1, weight + 0.1, weight), **place),
        *(mask("random", rate, (dloss,) * 3, seed=seed, **place) for seed, dloss in enumerate(random)),
        mask("magnitude", rate, (magnitude,) * 3, **place),
    ]


def test_a_mask_destroys_from_a_nat_on_and_weight_guided_ones_are_judged_there():
    metrics = metrics_of(
        *at(0.1, 0.02, (0.75, 1.25), 0.5),  # random destroys: 1 on average
        *at(0.1, 0.3, (0.4, 0.4), 1.5, site="ln1_in"),  # magnitude does
        *at(0.3, 0.25, (7.0, 7.0), 1.5),  # both do
        *at(0.5, 5.0, (0.5, 1.4), 0.99),  # none does, and what the weight-guided mask costs there does not matter
        *at(1.0, 9.0, (9.0, 9.0), 9.0),  # all three take all dims
        mask("weight", 0.7, (9.0,) * 3), mask("random", 0.7, (9.0,) * 3),  # without magnitude beside them
    )  # fmt: skip
    assert metrics.destroyed_by == {"random": 2, "magnitude": 2}
    assert metrics.destroyed_at == {"random": ["attn_in"], "magnitude": ["ln1_in", "attn_in"]}
    assert metrics.weight_where_destroyed == pytest.approx(0.3)
    assert metrics.weight_where_destroyed_interval == pytest.approx((0.3 - 0.1 * REACH, 0.3 + 0.1 * REACH))


def test_controls_that_destroy_nowhere_refute_that_they_do():
    metrics = metrics_of(*at(0.1, 0.0, (0.9, 1.0), 0.99))
    assert metrics.controls_dloss == pytest.approx(0.99)
    assert judged("mask-weight-harmless", metrics).verdict == "does not hold"
    few_dims = metrics_of(*at(0.09, 0.0, (0.9, 1.0), 0.99))
    assert judged("mask-weight-harmless", few_dims).note.endswith("Its largest rate is 0.09; give 0.1 too.")
    for metrics in (few_dims, metrics_of(mask("weight"), mask("random", dloss=(2.0,) * 3))):
        assert judged("mask-weight-harmless", metrics).verdict == "not measured"
    assert "side by side" in metrics.harm_why_not


@pytest.mark.parametrize(("largest", "best", "is_largest"), [(-0.2, 0.1, False), (-0.4, 0.5, True)])
def test_the_lowest_loss_over_the_rates_is_still_measured(largest, best, is_largest):
    other = mask("random", rate=0.2, dloss=(-1.0,) * 3)
    rates = [mask(rate=0.01, dloss=(-0.1,) * 3), mask(dloss=(-0.35, -0.25, -0.3)), mask(rate=0.5, dloss=(largest,) * 3)]
    metrics = metrics_of(*rates, other)
    assert (metrics.best_rate, metrics.best_rate_is_largest) == (best, is_largest)
    expected = (-0.4, -0.4, -0.4) if is_largest else (-0.3, -0.3 - 0.05 * REACH, -0.3 + 0.05 * REACH)
    assert (metrics.best_dloss, *metrics.best_dloss_interval) == pytest.approx(expected)
    assert "at least three rates" in metrics_of(*rates[:2], other).moderation_why_not


def test_a_moderate_rate_is_chosen_on_the_even_texts_and_judged_on_the_odd_one():
    rates = [
        mask(rate=0.01, dloss=(-9.0,) * 3, ratio=(0.91,) * 3),  # it does not weaken the sink
        mask(rate=0.1, dloss=(-0.3, 0.2, -0.1), ratio=(0.9,) * 3),
        mask(rate=0.3, dloss=(-0.1, -0.4, -0.2), ratio=(0.5,) * 3),
        mask(rate=0.5, dloss=(-9.0,) * 3, ratio=(0.09,) * 3),  # it removes it
    ]
    full = mask(rate=1.0, dloss=(0.5, 0.6, 0.5), ratio=(0.4, 0.7, 0.4))
    metrics = metrics_of(*rates, full, mask("random", rate=0.2, dloss=(-9.0,) * 3, ratio=(0.5,) * 3))
    assert metrics.moderate_rate == 0.1
    found = (metrics.moderate_dloss, metrics.moderate_over_full, metrics.moderate_sink_ratio, metrics.full_sink_ratio)
    assert found == pytest.approx((0.2, -0.4, 0.9, 0.7))
    assert judged("mask-moderate", metrics).verdict == "does not hold"
    assert "rate 1, which takes all" in metrics_of(*rates).moderate_why_not
    unmoderate = metrics_of(rates[0], rates[3], full)
    assert unmoderate.moderate_why_not == "No rate of the grid below 1 leaves between 0.1 and 0.9 of the sink."
    no_removal = metrics_of(rates[2], mask(rate=1.0, ratio=(0.4, 0.5, 0.4)))
    assert no_removal.moderate_why_not.startswith("Rate 1 leaves 0.5 of the sink and rate 0.3 no more")
    assert judged("mask-moderate", no_removal).verdict == "not measured"


RATES = np.array([0.01, 0.03, 0.1, 0.3, 0.5, 1.0])


def moderated(generator, effect=0.0, texts=16):
    """Rates of which each changes the loss by noise alone, or one of them by `effect`, while rate 1 costs 0.4 nats."""
    dloss = generator.normal(scale=0.02, size=(6, texts))
    dloss[2] += effect
    dloss[-1] += 0.4
    ratio = np.array([0.8, 0.7, 0.6, 0.5, 0.4, 0.2])[:, None] + generator.normal(scale=0.01, size=(6, texts))
    return moderation(RATES, dloss, ratio)


def test_pure_noise_is_seldom_better_than_no_mask():
    generator = np.random.default_rng(0)
    verdicts = [judged("mask-moderate", moderated(generator)).verdict for _ in range(400)]
    assert verdicts.count("holds") <= 20
    assert verdicts.count("holds in part") <= 20


def test_a_rate_that_helps_is_found():
    generator = np.random.default_rng(0)
    verdicts = [judged("mask-moderate", moderated(generator, effect=-0.05)).verdict for _ in range(50)]
    assert verdicts.count("holds") >= 45
    assert judged("mask-moderate", moderated(generator, effect=-0.2, texts=5)).verdict == "holds in part"


def test_the_effect_of_a_start_is_compared_with_the_strongest_elsewhere_whatever_its_sign():
    ratios = {0: 1.3, 1: 0.9, 2: 0.4, 3: 0.8}
    of_random = [mask("random", start=start, layers="first", ratio=(0.5,) * 3) for start in ratios]
    masks = [mask(start=start, layers="first", ratio=(ratio,) * 3) for start, ratio in ratios.items()]
    metrics = metrics_of(*of_random, *masks)
    assert metrics.start_effect_ratio == 1  # of the grid's first mask, which the former criterion was of
    assert (metrics.paper_start_effect, metrics.paper_start_elsewhere) == pytest.approx((0.6, 0.3))
    assert (metrics.paper_start_rate, metrics.paper_start_strongest) == (0.1, 0)
    assert metrics.paper_start_ratio == pytest.approx(2)
    assert metrics.paper_start_margin == pytest.approx(0)
    behind = metrics_of(*masks, next_attention=3)  # in a hybrid model block 2 may have no attention
    assert (behind.paper_start_ratio, behind.paper_start_strongest) == (pytest.approx(0.2 / 0.6), 2)
    assert "other starts" in metrics_of(*of_random, *masks[:3]).paper_start_why_not


def test_the_effect_of_a_start_has_an_interval_by_text():
    elsewhere = [mask(start=start, layers="first", ratio=(1.1, 1.2, 1.3)) for start in (0, 1)]
    elsewhere.append(mask(start=3, layers="first", ratio=(1.9, 0.1, 1.3)))  # by 0.1 on average
    far = [mask(rate=0.5, start=start, layers="first", ratio=(0.1,) * 3) for start in range(4)]
    metrics = metrics_of(*far, *elsewhere, mask(start=2, layers="first", ratio=(0.5, 0.4, 0.6)))
    assert metrics.paper_start_rate == 0.1
    assert metrics.paper_start_ratio == pytest.approx(0.5 / 0.2)
    margins = (0.5 - 0.2, 0.6 - 0.4, 0.4 - 0.6)  # 0.3, 0.2, -0.2
    mean, spread = 0.1, math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2)
    assert np.mean(margins) == pytest.approx(mean)
    assert metrics.paper_start_margin_interval == pytest.approx((mean - spread * REACH, mean + spread * REACH))
    assert judged("mask-start", metrics).verdict == "holds in part"


# --- Token 0 in every two texts ---------------------------------------------------------------------------------------


def masked(value, key=None):
    return mask(cosines={"input": (value,) * 3, "key": (value if key is None else key,) * 3})


@pytest.mark.parametrize(
    ("value", "key", "share", "verdict"),
    [
        (0.65, 0.5, 0.625, "holds"),  # of the 0.4 that was lost 0.25 is back, of the key all
        (0.71, 0.5, 0.475, "holds in part"),
        (0.5, 0.87, 0.075, "does not hold"),
        (0.95, 0.95, -0.125, "does not hold"),
    ],
)
def test_what_the_mask_gives_back_is_measured_on_what_token_0_lost(value, key, share, verdict):
    metrics = metrics_of(masked(value, key))
    assert min(metrics.input_restored, metrics.key_restored) == pytest.approx(share)
    assert metrics.input_cosines == pytest.approx((0.5, 0.9, value))
    found = judged("mask-restores-diversity", metrics)
    assert (found.verdict, found.value) == (verdict, pytest.approx(share))
    assert f"cosine of the key 0.5000 at the ME layer, 0.9000 behind it, {key:.4f} masked" in found.note


def test_a_token_that_was_as_rigid_before_has_no_diversity_to_restore():
    for before in (0.9, 0.95):
        found = judged("mask-restores-diversity", metrics_of(masked(0.1), before=before))
        assert found.verdict == "not measured"
        assert "no rigidity to relax" in found.note
    assert judged("mask-restores-diversity", metrics_of(mask("random"))).verdict == "not measured"
    assert judged("mask-restores-diversity", metrics_of(masked(0.5), text_first_tokens=1)).verdict == "trivial here"


def test_the_share_that_is_restored_has_the_interval_of_leaving_each_text_out():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(7, 4, generator=generator) + shift for shift in (0.3, 3.0, 1.0)]  # before, unmasked, masked

    def cosines(vectors):
        unit = torch.nn.functional.normalize(vectors, dim=-1)
        return (unit @ unit.T - torch.eye(len(unit))).numpy()

    def share(kept):
        before, unmasked, masked = (cosines(each[kept]).sum() / (len(kept) * (len(kept) - 1)) for each in states)
        return (unmasked - masked) / (unmasked - before)

    texts = list(range(7))
    pseudo = [7 * share(texts) - 6 * share([text for text in texts if text != left]) for left in texts]
    spread = 2.446912 * np.std(pseudo, ddof=1) / math.sqrt(7)
    columns = dict(zip(("before", "unmasked", "masked"), (cosines(each).sum(1) / 6 for each in states), strict=True))
    numbers = {"sink_mass": 0.5, "loss": 1.0, "kl": 0.0, "agreement": 1.0}
    by_text = []
    for cell, own in ((UNMASKED, "unmasked"), ("mask 1", "masked")):
        of_parts = {f"{part}_cosine": columns[own] for part in ("input", "key")}
        of_parts |= {f"{part}_cosine_before": columns["before"] for part in ("input", "key")}
        by_text.append(pd.DataFrame({"cell": cell, "text": texts, **numbers, **of_parts}))
    of_hand = grid(mask())
    of_seven = Grid(of_hand.configurations, pd.concat(by_text), of_hand.by_block)
    metrics = compare_grid(of_seven, {"name": "by hand"}, ON_TEXTS).metrics
    assert metrics.input_restored == pytest.approx(share(texts), rel=1e-5)
    expected = (np.mean(pseudo) - spread, np.mean(pseudo) + spread)
    assert metrics.input_restored_interval == pytest.approx(expected, rel=1e-4)


# --- From what was measured to tables ---------------------------------------------------------------------------------


def test_sinks_are_averaged_over_the_blocks_behind_the_me_layer_that_have_attention():
    sink_mass = torch.zeros(7, 2, 2)  # [layer, head, text]
    sink_mass[2] = torch.tensor([[0.2, 0.6], [0.4, 0.8]])
    sink_mass[3] = math.nan  # without attention
    sink_mass[4] = torch.tensor([[0.0, 0.2], [0.2, 0.4]])
    sink_mass[5] = 1.0  # the last two count apart
    cosines = torch.zeros(7, 2)  # [layer, text]
    cosines[[0, 1]], cosines[2], cosines[4] = torch.tensor([[0.9], [0.5]]), torch.tensor([0.6, math.nan]), 0.8
    of_text, by_head = torch.zeros(2), torch.zeros(7, 2)
    other = {"entropy": by_head, "effective_rank": by_head, "input_cosine": cosines, "key_cosine": cosines / 2}
    measured = Measured(of_text, of_text, of_text, sink_mass, **other, first_key=torch.zeros(7, 4))
    found = grids._lay_out(study_by_hand(me_layer=1), measured, [], [])
    assert found.by_text["sink_mass"].tolist() == pytest.approx([0.2, 0.5])
    cosines = found.by_text[["input_cosine", "input_cosine_before", "key_cosine", "key_cosine_before"]].iloc[0]
    assert cosines.tolist() == pytest.approx([0.7, 0.5, 0.35, 0.25])  # of the blocks 2 and 4, and of the ME layer, 1
    assert found.by_block["input_cosine"].tolist()[:3] == pytest.approx([0.9, 0.5, 0.6])
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
    masks = [mask(rate=0.05, dloss=(0.1, 0.3, 0.2)), *at(0.1, -0.2, (0.5, 1.5), 3.0)]
    of_grid = grid(*masks)
    result = compare_grid(of_grid, {"name": "by hand"}, ON_TEXTS)
    figures = grid_figures(result.tables["cells"], of_grid.by_block, result.metrics, "by hand")
    assert set(figures) == {"loss_change", "rates", "loss_and_sinks", "by_block"}
    observed = "Δloss over the grid: weight -0.200 to +0.200, random +0.500 to +1.500, magnitude +3.000 to +3.000 nats"
    assert figures["loss_change"].observed.startswith(observed)
    (heatmap,) = figures["loss_change"].plot.data
    by_rate = dict(zip(heatmap.y, heatmap.text, strict=True))
    assert by_rate["random"][1] == "+1.000"  # the mean of two seeds
    assert figures["loss_and_sinks"].observed.startswith("The lowest loss is with mask 2: Δloss -0.200 (-0.448 to +0.0")
    assert figures["loss_and_sinks"].observed.endswith("The lowest of 5 is low by chance too.")
