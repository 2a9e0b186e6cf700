"""Checkpoints of a training: by hand, on a planted model whose massive activation comes at a known step, and judged."""

import numpy as np
import pandas as pd
import pytest
import torch
from planted import FAMILIES, bridge, gains_apart, plain_model, plant

import melens
from melens import MelensError
from melens.analysis.checkpoint_dynamics import (
    MeasuredCheckpoint,
    compare_checkpoints,
    measure_checkpoint,
)
from melens.analysis.emergence_curve import fit_curve
from melens.figures.steps import place_of

STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1_000, 144_000, 7_000)], dtype=float)


# --- The curve --------------------------------------------------------------------------------------------------------


def equation_9(t, a, rate, gamma, t_0, k):
    x = gamma * t + t_0
    return a * np.exp(-rate * x) * np.log(x) + k


@pytest.mark.parametrize("truth", [(500, 0.3, 1e-4, 1.0, 50), (500, 1, 1e-3, 0.5, 400), (-80, 0.5, 1e-4, 1.5, 90)])
def test_the_parameters_of_the_curve_are_found_again(truth):
    fit = fit_curve(STEPS, equation_9(STEPS, *truth))
    assert fit.determined
    assert fit.r2 == pytest.approx(1)
    assert list(fit.of_equation_9.values()) == pytest.approx(truth, rel=1e-4)
    assert fit.at(STEPS) == pytest.approx(equation_9(STEPS, *truth), abs=1e-4)


def test_the_peak_is_where_the_curve_is_largest():
    fit = fit_curve(STEPS, equation_9(STEPS, 500, 0.3, 1e-4, 1.0, 50))
    fine = np.arange(0, 143_000, 10.0)
    assert fit.peak == pytest.approx(fine[equation_9(fine, 500, 0.3, 1e-4, 1.0, 50).argmax()], abs=10)


def test_the_baseline_is_in_its_interval_as_often_as_it_says():
    truth, covered = (500, 0.3, 1e-4, 1.0, 50), 0
    for seed in range(40):
        noise = 10 * np.random.default_rng(seed).normal(size=len(STEPS))
        low, high = fit_curve(STEPS, equation_9(STEPS, *truth) + noise).intervals["baseline"]
        covered += low <= 50 <= high
    assert 34 <= covered <= 40  # of 40 at 95%: 2 outside are expected


def test_of_a_pure_logarithm_no_baseline_is_told():
    fit = fit_curve(STEPS, equation_9(STEPS, 300, 0.0, 1e-3, 1.5, 3))
    assert fit.r2 > 0.999
    assert not fit.determined
    assert (fit.of_equation_9, fit.peak, fit.intervals) == (None, None, {})


def test_there_is_no_fit_of_what_does_not_change_or_of_few_points():
    assert fit_curve(STEPS, np.full(len(STEPS), 7.0)) is None
    with pytest.raises(MelensError, match="takes 10 checkpoints; there are 9"):
        fit_curve(STEPS[:9], STEPS[:9])
    with pytest.raises(MelensError, match="without NaN"):
        fit_curve(STEPS, np.where(STEPS == 4, np.nan, STEPS))


# --- By hand ----------------------------------------------------------------------------------------------------------

N_LAYERS = 8


def checkpoint(step, ratio, sink_rate, me_layer=None, inputs=(0.9, 1.0, 1.1), **more):
    """Three inputs around the given values; the ratio is that of block 3, elsewhere 5."""
    rows = [
        {
            "first_token_id": token,
            "layer": layer,
            "ratio": (ratio if layer == 3 else 5) * share,
            "largest": ratio * share,
        }
        | {"lift": 1.0 + layer, "sink_rate": sink_rate, "value_ratio": 1.0, "matrix_entropy": 0.1 * layer + 0.1}
        for token, share in enumerate(inputs)
        for layer in range(N_LAYERS)
    ]
    shared = {"n_prompts": 3, "distinct_first_tokens": 3, "me_layer": me_layer, "n_layers": N_LAYERS}
    return MeasuredCheckpoint(
        step, f"step{step}", pd.DataFrame(rows), me_layer, None, shared=shared, model={"name": "m"}, **more
    )


def test_when_things_appear_is_read_off_half_way():
    ratios, rates = [6, 6, 70, 800, 600], [0.0, 0.0, 0.0, 0.1, 0.4]
    me_layers = [None, 3, None, 3, 3]
    told = zip((0, 10, 100, 1_000, 10_000), ratios, rates, me_layers, strict=True)
    result = compare_checkpoints([checkpoint(*each) for each in told])
    metrics = result.metrics
    assert metrics.massive_step == 100  # √(6 · 800) is 69
    assert metrics.sinks_step == 10_000
    assert metrics.sinks_later == 2
    assert (metrics.me_from, metrics.me_from_layer) == (1_000, 3)  # step 10 did not last
    assert metrics.ratio_growth == pytest.approx(100)
    curves = result.tables["dynamics_curves"].set_index(["quantity", "step"])
    assert curves.loc[("ratio", 1_000), "mean"] == pytest.approx(800)
    low, high = curves.loc[("ratio", 1_000), ["low", "high"]]
    assert (low, high) == pytest.approx((800 - 4.3027 * 80 / 3**0.5, 800 + 4.3027 * 80 / 3**0.5), rel=1e-4)
    assert curves.loc[("matrix_entropy", 0), "mean"] == pytest.approx(0.1)
    assert curves.loc[("lift", 0), "mean"] == pytest.approx(4)  # of block 3, also where it is no ME layer yet
    assert metrics.middle_rising == pytest.approx(3 / 4)  # blocks 2, 4 and 5 do not change, block 3 falls to 600


def test_order_does_not_matter_and_a_rise_of_noise_is_none():
    pair = [checkpoint(5, 7, 0.05), checkpoint(0, 6, 0.0)]
    metrics = compare_checkpoints(pair).metrics
    assert (metrics.first_step, metrics.last_step) == (0, 5)
    assert metrics.massive_step is None
    assert "does not rise 10-fold" in metrics.massive_why_not
    assert "does not rise by 0.1" in metrics.sinks_why_not


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ([], "There is no checkpoint"),
        ([checkpoint(1, 5, 0), checkpoint(1, 6, 0)], "Two checkpoints are of step 1"),
        ([checkpoint(1, 5, 0), checkpoint(2, 5, 0, inputs=(1, 1))], "on different prompts"),
    ],
)
def test_checkpoints_that_do_not_go_together_are_refused(others, sentence):
    with pytest.raises(MelensError, match=sentence):
        compare_checkpoints(others)


def test_what_was_left_out_is_said():
    result = compare_checkpoints([checkpoint(0, 5, 0), checkpoint(7, 5, 0)], ["checkpoint-9"])
    assert "Incomplete and left out: checkpoint-9." in result.findings[0][1]


def test_one_checkpoint_makes_no_curve_and_no_claim():
    result = compare_checkpoints([checkpoint(7, 5, 0)])
    assert result.figures == {}
    assert "makes no curve" in result.findings[0][1]
    assert set(result.claims["verdict"]) == {"not measured"}


def verdicts(steps, ratios, rates):
    told = [checkpoint(*each) for each in zip(steps, ratios, rates, strict=True)]
    return compare_checkpoints(told).claims.set_index("id")["verdict"]


def test_claims_can_come_out_either_way():
    steps = (0, 10, 100, 1_000, 10_000)
    learned = verdicts(steps, (6, 10, 100, 900, 1_000), (0, 0, 0, 0.2, 0.4))
    assert learned[["sinks-learned", "massive-learned", "sinks-not-first"]].tolist() == ["holds"] * 3
    assert learned["emergence-curve"] == "not measured"
    there = verdicts(steps, (6, 6, 7, 10, 12), (0.4, 0.4, 0.4, 0.4, 0.4))
    assert there[["sinks-learned", "massive-learned"]].tolist() == ["does not hold"] * 2
    assert there[["middle-rises", "sinks-not-first"]].tolist() == ["not measured"] * 2
    before = verdicts(steps, (6, 6, 6, 6, 1_000), (0, 0.4, 0.4, 0.4, 0.4))
    assert before["sinks-not-first"] == "does not hold"
    late = verdicts((5_000, 6_000, 7_000, 8_000, 9_000), (6, 10, 100, 900, 1_000), (0, 0, 0, 0.2, 0.4))
    assert late[["sinks-learned", "massive-learned"]].tolist() == ["not measured"] * 2
    assert set(verdicts(steps[:4], (6, 10, 100, 900), (0, 0, 0, 0.2))) == {"not measured"}


def test_a_curve_of_few_checkpoints_holds_in_part_at_most():
    steps = [int(step) for step in STEPS]
    ratios = equation_9(STEPS, 500, 0.3, 1e-4, 1.0, 50)
    alike = [checkpoint(step, ratio, 0) for step, ratio in zip(steps, ratios, strict=True)]
    result = compare_checkpoints(alike)
    assert result.metrics.curve_blocks == 1  # block 3: the others do not change
    assert result.claims.set_index("id")["verdict"]["emergence-curve"] == "holds"
    row = result.tables["dynamics_fits"].iloc[0]
    assert (row["layer"], row["K"], row["gamma"]) == (3, pytest.approx(50, rel=1e-3), pytest.approx(1e-4, rel=1e-3))
    few = compare_checkpoints(alike[:4] + alike[-8:])
    assert few.claims.set_index("id")["verdict"]["emergence-curve"] == "holds in part"
    assert result.draw().figures.keys() == {"dynamics", "dynamics_by_block", "dynamics_fits"}


def test_step_0_has_a_place_left_of_all_others():
    places = place_of([0, 1, 10, 100_000])
    assert list(places) == [1, 10, 100_000, 0]
    assert (places[1], places[10], places[100_000]) == (0, 1, 5)
    assert places[0] == pytest.approx(-0.4)
    assert place_of([0]).keys() == {0}


# --- On models --------------------------------------------------------------------------------------------------------

PROMPTS = [torch.tensor([first, *torch.arange(30, 100).tolist()]) for first in (5, 6, 7)]


def grown(strength):
    """A model in which token 0 of the prompts is made massive by block 1, the more the larger its strength."""
    network = gains_apart(plain_model("llama"))
    plant(network, block=1, token=torch.tensor([5, 6, 7]), dim=5)
    network.base_model.layers[1].mlp.down_proj.weight.data[5, 0] = 5_000 * strength
    return bridge(network)


def test_the_step_of_a_planted_massive_activation_is_found_one_model_at_a_time():
    strengths = {0: 0.0, 10: 0.001, 100: 1.0, 1_000: 1.0}
    model = grown(1.0)
    (written,) = (
        w for name, w in model.original_model.named_parameters() if "layers.1." in name and "down_proj" in name
    )

    def studies():
        for step, strength in strengths.items():
            written.data[5, 0] = 5_000 * strength  # the model of the step before is gone
            yield step, melens.study(model, PROMPTS)

    result = melens.analysis.dynamics(studies())
    assert (result.metrics.me_from, result.metrics.me_from_layer) == (100, 1)
    assert result.metrics.massive_step == 100
    table = result.tables["dynamics_by_step"]
    assert table["me_layer"].tolist() == [pd.NA, pd.NA, 1, 1]


def test_every_quantity_is_what_the_model_computes():
    model = grown(1.0)
    own = measure_checkpoint(3, melens.study(model, PROMPTS))
    _, cache = model.run_with_cache(PROMPTS[1][None])
    row = own.by_input.query("first_token_id == 6 and layer == 2").iloc[0]
    hidden, before = cache["blocks.2.hook_resid_post"][0], cache["blocks.1.hook_resid_post"][0]
    assert row["largest"] == pytest.approx(float(hidden.abs().max()), rel=1e-4)
    assert row["ratio"] == pytest.approx(float(hidden.abs().max() / hidden.abs().median()), rel=1e-4)
    assert row["lift"] == pytest.approx(float(hidden[0].norm() / before[0].norm()), rel=1e-4)
    attention = cache["blocks.2.attn.hook_pattern"][0][:, :64, 0].mean(-1)
    assert row["sink_rate"] == pytest.approx(float((attention > 0.3).float().mean()))
    norms = cache["blocks.2.attn.v.hook_out"][0].norm(dim=-1)
    norms = norms if norms.ndim == 2 else cache["blocks.2.attn.v.hook_out"][0].unflatten(-1, (2, 16)).norm(dim=-1)
    assert row["value_ratio"] == pytest.approx(float((norms[0] / norms[1:].mean(0)).mean()), rel=1e-3)
    before_massive = own.by_input.query("first_token_id == 6 and layer == 0").iloc[0]["matrix_entropy"]
    shares = torch.linalg.svdvals(cache["blocks.0.hook_resid_post"][0, :64].double()) ** 2
    shares = shares / shares.sum()
    assert before_massive == pytest.approx(float(-torch.xlogy(shares, shares).sum() / np.log(64)), abs=1e-5)


@pytest.mark.parametrize(
    "family", [name if name == "gemma3" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_is_measured(family):
    model = bridge(plain_model(family))
    own = measure_checkpoint(0, melens.study(model, PROMPTS))
    assert {"ratio", "largest", "lift", "sink_rate", "matrix_entropy"} <= set(own.by_input.columns)
    assert own.by_input.drop(columns="value_ratio", errors="ignore").notna().all().all()


def test_short_prompts_leave_out_what_needs_64_tokens():
    own = measure_checkpoint(0, melens.study(grown(1.0), [ids[:20] for ids in PROMPTS]))
    assert own.values("ratio").shape == (3, 4)
    assert own.values("matrix_entropy") is None
    result = compare_checkpoints([own])
    assert result.metrics.sinks_why_not == "No prompt has 64 tokens."


def test_a_training_that_diverged_is_told():
    network = gains_apart(plain_model("llama"))
    network.base_model.layers[2].mlp.down_proj.weight.data[:] = torch.nan
    with pytest.raises(MelensError, match=r"NaN|not finite"):
        measure_checkpoint(5, melens.study(bridge(network), PROMPTS))
