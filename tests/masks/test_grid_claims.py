"""What the claims about masks come to, from the numbers that a grid has for them."""

import pytest

import melens

NAN = float("nan")
BASE = {"me_layer": 11, "n_prompts": 9, "distinct_first_tokens": 9, "massive_position": 0, "last_lasting_layer": 27}


def judged(claim, **metrics):
    rows = melens.judge({"experiment": "wemask", "model": {"name": "m"}, "metrics": BASE | metrics}).set_index("id")
    return rows.loc[claim]


def sink(ratio, low, high):
    return {"sink_ratio": ratio, "sink_ratio_interval": (low, high), "paper_rate": 0.1}


@pytest.mark.parametrize(
    ("metrics", "expected", "former"),
    [
        (sink(0.45, 0.4, 0.5), "holds", "holds"),
        (sink(0.45, 0.4, 0.51), "holds in part", "holds"),
        (sink(0.89, 0.887, 0.894), "holds in part", "holds"),
        (sink(0.9, 0.85, 0.95), "holds in part", "holds in part"),
        (sink(0.91, 0.88, 0.94), "does not hold", "holds in part"),
        (sink(0.89, 0.78, 1.0), "does not hold", "does not hold"),
        (sink(0.12, 0.09, 0.15), "holds in part", "does not hold"),
        (sink(0.09, 0.07, 0.11), "does not hold", "does not hold"),  # removed
        (sink(0.45, NAN, NAN), "holds in part", "holds"),  # one text
        ({"sink_why_not": "No."}, "not measured", "not measured"),
    ],
)
def test_a_sink_is_substantially_reduced_where_at_least_half_of_it_is_gone(metrics, expected, former):
    row = judged("mask-weakens-sink", **metrics)
    assert (row.verdict, row.former_verdict) == (expected, former)


def harm(value, low, high, random=("attn_in",), magnitude=("attn_in", "ln1_in")):
    at = {"random": list(random), "magnitude": list(magnitude)}
    places = {"destroyed_at": at, "destroyed_by": {select: len(sites) for select, sites in at.items()}}
    return {"weight_where_destroyed": value, "weight_where_destroyed_interval": (low, high), **places}


@pytest.mark.parametrize(
    ("metrics", "expected", "former"),
    [
        (harm(0.02, 0.0, 0.1), "holds", "holds"),
        (harm(0.02, 0.0, 0.11), "holds in part", "holds in part"),
        (harm(0.02, 0.0, 0.04, random=["resid_pre"]), "holds in part", "holds"),
        (harm(0.02, 0.0, 0.04, random=[]), "holds in part", "holds in part"),
        (harm(0.5, 0.4, 0.6), "does not hold", "does not hold"),
        (harm(0.02, NAN, NAN), "holds in part", "holds in part"),
        ({"controls_dloss": 0.4, "harm_why_not": "No."}, "does not hold", "not measured"),
        ({"harm_why_not": "No."}, "not measured", "not measured"),
    ],
)
def test_weight_guided_masks_are_harmless_where_others_destroy_and_others_do(metrics, expected, former):
    row = judged("mask-weight-harmless", **metrics)
    assert (row.verdict, row.former_verdict) == (expected, former)


def moderate(over_none, over_full, left=(0.7, 0.65, 0.75)):
    means = {"moderate_dloss": over_none[0], "moderate_over_full": over_full[0], "moderate_sink_ratio": left[0]}
    intervals = {
        "moderate_dloss_interval": over_none[1:], "moderate_over_full_interval": over_full[1:],
        "moderate_sink_ratio_interval": left[1:],
    }  # fmt: skip
    return means | intervals | {"moderate_rate": 0.1, "full_sink_ratio": 0.2}


BETTER, NOT_SHOWN, UNKNOWN = (-0.05, -0.08, -0.02), (-0.05, -0.1, 0.0), (-0.05, NAN, NAN)


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (moderate(BETTER, BETTER), "holds"),
        (moderate(BETTER, NOT_SHOWN), "holds in part"),
        (moderate(BETTER, (0.1, 0.05, 0.15)), "does not hold"),  # better than none, and full removal is better still
        (moderate(BETTER, BETTER, left=(0.89, 0.86, 0.92)), "holds in part"),
        (moderate(NOT_SHOWN, BETTER), "does not hold"),
        (moderate((0.0, 0.0, 0.0), BETTER), "does not hold"),  # a mask that changes nothing
        (moderate(UNKNOWN, UNKNOWN), "holds in part"),
        (moderate(UNKNOWN, (0.1, NAN, NAN)), "does not hold"),
        (moderate((0.1, NAN, NAN), UNKNOWN), "does not hold"),
        ({"moderate_why_not": "No."}, "not measured"),
    ],
)
def test_moderation_must_be_better_than_none_and_than_full(metrics, expected):
    assert judged("mask-moderate", **metrics).verdict == expected


@pytest.mark.parametrize(
    ("value", "interval", "largest", "former"),
    [
        (-0.05, (-0.08, -0.02), False, "holds"),
        (-0.05, (-0.1, 0.02), False, "holds in part"),
        (-0.05, (-0.08, -0.02), True, "does not hold"),
        (0.01, (0.0, 0.02), False, "does not hold"),
    ],
)
def test_moderation_is_also_judged_as_it_was(value, interval, largest, former):
    lowest = {"best_dloss": value, "best_dloss_interval": interval, "best_rate_is_largest": largest, "best_rate": 0.1}
    row = judged("mask-moderate", **lowest, moderate_why_not="No.")
    assert (row.verdict, row.former_verdict) == ("not measured", former)


def start(ratio, margin, low, high):
    where = {"paper_start_rate": 0.1, "paper_start_strongest": 4}
    return where | {
        "paper_start_ratio": ratio,
        "paper_start_margin": margin,
        "paper_start_margin_interval": (low, high),
    }


@pytest.mark.parametrize(
    ("metrics", "expected", "former"),
    [
        (start(3, 0.1, 0.01, 0.2), "holds", "not measured"),
        (start(3, 0.1, -0.01, 0.2), "holds in part", "not measured"),
        (start(1.5, -0.1, -0.2, -0.01), "holds in part", "not measured"),
        (start(1, -0.3, -0.4, -0.2), "does not hold", "not measured"),
        (start(3, 0.1, NAN, NAN), "holds in part", "not measured"),  # one text
        ({"paper_start_why_not": "No.", "start_effect_ratio": 3.0}, "not measured", "holds"),
        ({"paper_start_why_not": "No.", "start_effect_ratio": 1.5}, "not measured", "holds in part"),
        ({"paper_start_why_not": "No.", "start_effect_ratio": 0.7}, "not measured", "does not hold"),
    ],
)
def test_the_start_is_judged_by_the_papers_mask(metrics, expected, former):
    row = judged("mask-start", **metrics)
    assert (row.verdict, row.former_verdict) == (expected, former)


def restored(of_input, of_key, **changes):
    metrics = {"text_first_tokens": 16}
    for name, (value, low, high) in (("input", of_input), ("key", of_key)):
        metrics |= {f"{name}_restored": value, f"{name}_restored_interval": (low, high)}
        metrics[f"{name}_cosines"] = (0.5, 0.9, 0.9 - 0.4 * value)
    return metrics | changes


HALF, TENTH = (0.6, 0.5, 0.7), (0.1, 0.01, 0.19)


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (restored(HALF, HALF), "holds"),
        (restored(HALF, (0.6, 0.49, 0.7)), "holds in part"),
        (restored(TENTH, HALF), "holds in part"),
        (restored(HALF, (0.1, 0.0, 0.2)), "does not hold"),
        (restored((0.09, 0.05, 0.13), HALF), "does not hold"),
        (restored((0.6, NAN, NAN), (0.6, NAN, NAN)), "holds in part"),  # two texts
        (restored(HALF, HALF, key_restored=None), "holds"),  # a model whose keys are not projected alone
        (restored(HALF, HALF, text_first_tokens=1), "trivial here"),
        ({"text_first_tokens": 16, "diversity_why_not": "No."}, "not measured"),
    ],
)
def test_diversity_is_restored_where_half_of_what_was_lost_is_back_in_input_and_key(metrics, expected):
    assert judged("mask-restores-diversity", **metrics).verdict == expected


def test_prompts_that_share_their_first_token_change_nothing_as_a_grid_has_texts_of_its_own():
    assert judged("mask-moderate", **moderate(BETTER, BETTER), distinct_first_tokens=1).verdict == "holds"


def test_the_loss_of_full_removal_is_compared_with_that_of_the_moderate_rate():
    ends = {
        judged("mask-moderate", **moderate(BETTER, over_full)).note.partition("Rate 1 ")[2]
        for over_full in (BETTER, (0.1, 0.05, 0.15))
    }
    assert ends == {
        "leaves 0.2 and has a loss 0.05 nats higher than that.", "leaves 0.2 and has a loss 0.1 nats lower than that.",
    }  # fmt: skip
