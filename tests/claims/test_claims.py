import re

import pandas as pd
import pytest
from pydantic import ValidationError

import melens
from melens import MelensError
from melens.claims.paper import CLAIMS

BASE = {"me_layer": 11, "n_prompts": 9, "distinct_first_tokens": 9, "massive_position": 0}


def verdict(experiment, claim, **metrics):
    judged = melens.judge([{"experiment": experiment, "model": {"name": "m"}, "metrics": BASE | metrics}])
    return judged.set_index("id").verdict[claim]


def test_every_claim_is_complete_and_has_an_id_of_its_own():
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS) >= 18
    for claim in CLAIMS:
        assert all((claim.claim, claim.source, claim.statistic, claim.criterion, claim.why, claim.figure))


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [
        (150, (140, 160), "holds"),
        (101, (95, 108), "holds in part"),  # the interval does not clear the threshold
        (50, (40, 60), "holds in part"),
        (5, (4, 6), "does not hold"),
        (150, (float("nan"), float("nan")), "holds in part"),  # one prompt
        (150, None, "holds"),  # a number of the whole model
        (None, None, "not measured"),
    ],
)
def test_a_mean_must_clear_its_threshold_with_its_interval(value, interval, expected):
    assert verdict("emergence", "magnification", magnification=value, magnification_interval=interval) == expected


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [(0.02, (0.01, 0.03), "holds"), (0.09, (0.05, 0.2), "holds in part"), (0.9, (0.8, 1.0), "does not hold")],
)
def test_a_mean_must_stay_below_its_threshold_with_its_interval(value, interval, expected):
    metrics = {"left_without_ffn": value, "left_without_ffn_interval": interval}
    assert verdict("ablation", "ffn-needed", **metrics) == expected


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"weight_norm_ratio": 3, "weight_norm_before": 1.6}, "holds"),
        ({"weight_norm_ratio": 3, "weight_norm_before": 2.1}, "holds in part"),
        ({"weight_norm_ratio": 3}, "holds in part"),
        ({"weight_norm_ratio": 1.6, "weight_norm_before": 1.6}, "does not hold"),
        ({"weight_norm_before": 1.6}, "not measured"),
    ],
)
def test_token_0_must_stand_out_at_the_me_layer_and_not_before(metrics, expected):
    assert verdict("rmsnorm", "weight-norm", **metrics) == expected


@pytest.mark.parametrize(
    ("peaks", "shares", "together", "expected"),
    [
        ({"gate": 11, "up": 11, "down": 11}, (1, 1, 1), 1.0, "holds"),
        ({"gate": 27, "up": 11, "down": 11}, (0, 1, 1), 0.0, "holds in part"),
        ({"gate": 27, "up": 3, "down": 11}, (0, 0, 0.5), 0.0, "does not hold"),
        ({"down": 11}, (1, 1, 1), 1.0, "not measured"),
    ],
)
def test_concentrations_must_peak_together(peaks, shares, together, expected):
    metrics = {"concentration_shares": dict(zip(("gate", "up", "down"), shares, strict=True))}
    metrics |= {"concentration_peaks": peaks, "concentration_together": together}
    assert verdict("ffn", "concentration", **metrics) == expected


@pytest.mark.parametrize(
    ("left", "over_others", "expected"),
    [
        ({"identity": 0.2, "no_gain": 0.3}, {"identity": 30, "no_gain": 40}, "holds"),
        ({"identity": 800, "no_gain": 0.3}, {"identity": 9e4, "no_gain": 40}, "holds in part"),
        ({"identity": 800, "no_gain": 16}, {"identity": 9e4, "no_gain": 1e3}, "does not hold"),
        ({"identity": 0.01, "no_gain": 0.01}, {"identity": 1, "no_gain": 1}, "does not hold"),  # it does not persist
    ],
)
def test_without_the_norm_it_must_persist_and_be_smaller(left, over_others, expected):
    metrics = {"left_without_norm": left, "over_others_without_norm": over_others}
    clear = {name: (0.9 * value, 1.1 * value) for name, value in left.items()}
    of_others = {name: (0.9 * value, 1.1 * value) for name, value in over_others.items()}
    intervals = {"left_without_norm_intervals": clear, "over_others_without_norm_intervals": of_others}
    assert verdict("ablation", "norm-scales", **metrics, **intervals) == expected
    in_part = "holds in part" if expected == "holds" else expected
    for name, wide in (("left", clear | {"identity": (0.1, 0.51)}), ("over_others", of_others | {"no_gain": (9, 90)})):
        unclear = intervals | {f"{name}_without_norm_intervals": wide}
        assert verdict("ablation", "norm-scales", **metrics, **unclear) == in_part


@pytest.mark.parametrize(
    ("causal", "strongest", "expected"),
    [([11], 11, "holds"), ([0, 8, 11], 11, "does not hold"), ([0, 11], 0, "does not hold"), ([], 3, "does not hold")],
)
def test_only_the_me_layer_may_be_a_cause(causal, strongest, expected):
    left = {layer: 0.1 if layer in causal else 0.9 for layer in range(28)}
    clear = {layer: (value - 0.05, value + 0.05) for layer, value in left.items()}
    metrics = {"causal_layers": causal, "strongest_cause": strongest, "left_by_cause": {"ffn": left}}
    assert verdict("ablation", "only-me-causal", **metrics, left_by_ffn_intervals=clear) == expected
    for unclear in ({11: (0.1, 0.6)}, {20: (0.4, 0.9)}):
        in_part = "holds in part" if expected == "holds" else expected
        assert verdict("ablation", "only-me-causal", **metrics, left_by_ffn_intervals=clear | unclear) == in_part
    in_part = "holds in part" if strongest == 11 else "does not hold"
    assert verdict("ablation", "only-me-causal", **metrics) == in_part  # of one or two prompts


@pytest.mark.parametrize(
    ("highest", "end", "expected"),
    [
        ((30, (11, 49)), (0.05, (0.01, 0.09)), "holds"),
        ((30, (9, 51)), (0.05, (0.01, 0.09)), "holds in part"),
        ((30, (11, 49)), (0.05, (0.01, 0.11)), "holds in part"),
        ((30, (11, 49)), (0.5, (0.4, 0.6)), "holds in part"),
        ((30, (11, 49)), (0.51, (0.4, 0.6)), "does not hold"),  # it lasts
        ((9.9, (9, 11)), (0.05, (0.01, 0.09)), "does not hold"),  # it does not emerge
        ((None, None), (None, None), "not measured"),
    ],
)
def test_without_the_ffn_it_must_emerge_and_fade(highest, end, expected):
    metrics = dict(zip(("highest_without_ffn", "highest_without_ffn_interval"), highest, strict=True))
    metrics |= dict(zip(("end_without_ffn", "end_without_ffn_interval"), end, strict=True))
    assert verdict("ablation", "ffn-fades", **metrics) == expected


@pytest.mark.parametrize(
    ("risen", "expected"),
    [((2.5, (2.0, 3.0)), "holds"), ((2.5, (1.9, 3.1)), "holds in part"), ((1.1, (1.0, 1.2)), "does not hold")],
)
def test_what_token_0_was_before_the_me_layer_does_not_emerge_without_its_ffn(risen, expected):
    metrics = {"highest_without_ffn": 30, "highest_without_ffn_interval": (11, 49)}
    metrics |= {"end_without_ffn": 0.05, "end_without_ffn_interval": (0.01, 0.09)}
    metrics |= dict(zip(("risen_without_ffn", "risen_without_ffn_interval"), risen, strict=True))
    assert verdict("ablation", "ffn-fades", **metrics) == expected


def test_each_sense_of_without_the_norm_is_said_in_words():
    left = {"identity": 840.0, "no_gain": 16.6, "no_norm": 50.7}
    metrics = BASE | {"left_without_norm": left, "over_others_without_norm": left}
    rows = melens.judge({"experiment": "ablation", "model": {"name": "m"}, "metrics": metrics}).set_index("id")
    assert rows.note["norm-scales"] == (
        "Without the norm: × 840, without its gain alone: × 16.6, without its normalisation alone: × 50.7."
    )


def test_one_prompt_refutes_nothing():
    at_all = BASE | {"n_prompts": 30, "norm_drift": 0.9, "norm_drift_interval": (0.8, 1.0)}
    verdicts = {}
    for n_prompts in (30, 1):
        metrics = at_all | {"n_prompts": n_prompts}
        judged = melens.judge({"experiment": "direction", "model": {"name": "m"}, "metrics": metrics})
        verdicts[n_prompts] = judged.set_index("id").loc["norm-stable"]
    assert verdicts[30].verdict == "does not hold"
    assert verdicts[1].verdict == "not measured"
    assert "no evidence" in verdicts[1].note
    assert verdicts[1].value == verdicts[30].value


def test_a_changed_threshold_shows_what_the_former_one_gives():
    metrics = {"left_without_norm": {"identity": 0.2}, "over_others_without_norm": {"identity": 30}}
    judged = melens.judge({"experiment": "ablation", "model": {"name": "m"}, "metrics": BASE | metrics})
    row = judged.set_index("id").loc["norm-scales"]
    assert (row.verdict, row.former_verdict) == ("holds in part", "holds")
    assert row.former_criterion.endswith("(set on 2026-11-22, commit a1bbeb3)")


@pytest.mark.parametrize(
    ("attention", "onset", "first", "expected"),
    [
        (None, 12, 12, "holds"),
        (None, 12, 3, "holds in part"),
        (None, 14, 14, "does not hold"),
        (None, None, None, "does not hold"),
        ([2, 5, 13, 17], 13, 13, "holds"),  # the next block with attention
        ([2, 5, 13, 17], 17, 17, "does not hold"),
        ([2, 5, 13, 17], 5, 5, "does not hold"),
        ([2, 5, 28], 28, 28, "not measured"),  # among the last two alone
    ],
)
def test_by_the_former_threshold_sinks_must_last_from_the_next_block_on(attention, onset, first, expected):
    metrics = BASE | {"unbroken_sink_layer": onset, "first_sink_layer": first, "last_lasting_layer": 27}
    result = {"experiment": "sinks", "model": {"name": "m"}, "metrics": metrics | {"attention_layers": attention}}
    assert melens.judge(result).set_index("id").former_verdict["sink-next"] == expected


def test_what_a_hybrid_has_no_ffn_for_is_not_judged():
    """The ME layer may be a block that a mixer alone makes massive."""
    elsewhere = dict.fromkeys(("gate", "up", "down"), 3)
    metrics = {"concentration_peaks": elsewhere, "concentration_shares": dict.fromkeys(elsewhere, 0.0), "n_layers": 30}
    metrics |= {"concentration_together": 0.0}
    assert verdict("ffn", "concentration", **metrics, ffn_layers=[3, 12]) == "not measured"
    assert verdict("ffn", "concentration", **metrics, ffn_layers=[3, 11]) == "does not hold"
    result = {"experiment": "ffn", "model": {"name": "m"}, "metrics": BASE | metrics | {"ffn_layers": [3, 11]}}
    notes = melens.judge(result).set_index("id").note
    assert "Of 30 blocks 2 have an FFN that can be measured." in notes["concentration"]


@pytest.mark.parametrize(
    ("n_scored", "rank", "expected"),
    [(1, 1, "not measured"), (3, 1, "holds"), (3, 2, "does not hold"), (30, 3, "holds in part")],
)
def test_a_rank_among_few_says_little(n_scored, rank, expected):
    assert verdict("predict", "predictable", ranks={"response": rank}, n_scored=n_scored) == expected


def test_a_metric_that_is_missing_says_why():
    result = {
        "experiment": "sinks",
        "model": {"name": "m"},
        "metrics": BASE | {"input_rank_ratio_why_not": "No block."},
    }
    assert melens.judge(result).set_index("id").note["hidden-rank"] == "No block."


def test_a_metric_of_another_type_is_refused_by_name():
    result = {"experiment": "sinks", "model": {"name": "m"}, "metrics": BASE | {"sink_onset_layer": "twelve"}}
    with pytest.raises(MelensError, match=r"the metric sink_onset_layer is 'twelve', .*: run the experiment again"):
        melens.judge(result)


@pytest.mark.parametrize("kind", dict.fromkeys(claim.metrics for claim in CLAIMS))
def test_a_field_that_an_experiment_does_not_have_is_an_error(kind):
    with pytest.raises(ValidationError, match="sink_onset_leyer"):
        kind(sink_onset_leyer=3)


def test_what_follows_from_a_shared_first_token_is_trivial():
    metrics = {"cosine": 1.0, "cosine_interval": (1.0, 1.0), "distinct_first_tokens": 1}
    assert verdict("direction", "direction-inputs", **metrics) == "trivial here"
    assert verdict("direction", "direction-inputs", **metrics | {"distinct_first_tokens": 2}) == "holds"
    varied = {"n_tasks": 4, "n_length_bins": 4}
    same = {"weakest_share": 1.0, "weakest_share_interval": (0.66, 1.0), "distinct_first_tokens": 1} | varied
    assert verdict("stability", "same-layer", **same) == "trivial here"
    assert verdict("stability", "same-layer", **same | {"massive_position": 3}) == "holds"


def test_a_layer_is_not_the_same_for_all_kinds_of_prompts_when_there_is_one_kind():
    metrics = {"weakest_share": 1.0, "weakest_share_interval": (0.66, 1.0), "n_tasks": 1, "n_length_bins": 3}
    assert verdict("stability", "same-layer", **metrics) == "not measured"
    assert verdict("stability", "same-layer", **metrics | {"n_tasks": 2}) == "holds"


@pytest.mark.parametrize(
    ("share", "interval", "elsewhere", "expected"),
    [
        (1.0, (0.66, 1.0), [], "holds"),  # 9 of 9
        (8 / 9, (0.52, 1.0), [], "holds"),
        (7 / 9, (0.4, 0.97), [], "holds in part"),
        (0.4, (0.1, 0.8), [], "holds in part"),  # the most frequent all the same
        (0.4, (0.1, 0.8), ["maths"], "does not hold"),
        (None, None, None, "not measured"),
    ],
)
def test_over_half_of_every_kind_of_prompts_must_have_the_layer(share, interval, elsewhere, expected):
    metrics = {"weakest_share": share, "weakest_share_interval": interval, "groups_with_another_layer": elsewhere}
    assert verdict("stability", "same-layer", n_tasks=4, n_length_bins=4, **metrics) == expected


@pytest.mark.parametrize(
    ("claim", "metrics"),
    [
        ("norm-stable", {"norm_drift": 0.0, "massive_position": 3}),  # token 0 is not the massive token
        ("norm-stable", {"norm_drift": 0.0, "last_lasting_layer": 11}),  # no block in which it could last
        ("direction-inputs", {"cosine": 1.0, "last_lasting_layer": 10}),
    ],
)
def test_what_could_not_be_seen_is_not_measured(claim, metrics):
    assert verdict("direction", claim, **metrics) == "not measured"


def test_other_settings_than_the_claim_states_are_noted():
    criterion = {"min_abs": 10, "min_ratio": 1_000}
    metrics = BASE | {"states_with": 1.0, "criterion": criterion}
    judged = melens.judge([{"experiment": "emergence", "model": {"name": "m"}, "metrics": metrics}]).set_index("id")
    assert "|h| > 10" in judged.note["exists"]


def test_intervals_from_json_are_read_like_those_of_a_result():
    metrics = BASE | {"norm_drift": 0.01, "consecutive_cosine": 0.999}
    empty = {"norm_drift_interval": (float("nan"),) * 2, "consecutive_cosine_interval": (float("nan"),) * 2}
    of_result, of_json = (
        melens.judge([{"experiment": "direction", "model": {"name": "m"}, "metrics": metrics | intervals}])
        for intervals in (empty, {name: [None, None] for name in empty})
    )
    pd.testing.assert_frame_equal(of_result, of_json)


def test_without_an_me_layer_nothing_is_measured_but_that():
    judged = melens.judge(
        [{"experiment": "all", "model": {"name": "m"}, "metrics": {c.experiment: {"me_layer": None} for c in CLAIMS}}]
    )
    assert judged.set_index("id").verdict["exists"] == "does not hold"
    assert set(judged[judged.id != "exists"].verdict) == {"not measured"}
    needing = judged[judged.id.isin([claim.id for claim in CLAIMS if claim.needs_me_layer])]
    assert len(needing) > 40
    assert (needing.note == "The model has no ME layer.").all()


def test_what_was_not_run_or_does_not_apply_says_so():
    judged = melens.judge(
        [{"experiment": "ffn", "model": {"name": "m"}, "metrics": BASE | {"not_applicable": "No FFN."}}]
    )
    notes = judged.set_index("id").note
    assert notes["concentration"] == "No FFN."
    assert notes["sink-next"] == "exp=sinks was not run."


def test_a_result_that_lacks_a_metric_is_not_measured_rather_than_an_error():
    judged = melens.judge(
        [{"experiment": "all", "model": {"name": "m"}, "metrics": {c.experiment: BASE for c in CLAIMS}}]
    )
    assert set(judged[judged.id != "exists"].verdict) == {"not measured"}


def of_model(name, family, me_layer, **label):
    return {
        "experiment": "emergence",
        "status": "ok",
        "model": {"name": name, "family": family, **label},
        "metrics": BASE | {"me_layer": me_layer, "kind": "one block"},
    }


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((7, 7), "holds"), ((7, 8), "does not hold"), ((7, None), "does not hold"), ((None, None), "not measured")],
)
def test_a_family_must_agree_on_its_me_layer(layers, expected):
    jobs = [of_model(f"q{i}", "qwen3", layer) for i, layer in enumerate(layers)] + [of_model("l", "llama", 1)]
    judged = melens.judge([*jobs, {"experiment": "emergence", "status": "failed", "error": "It broke."}])
    (family,) = judged[judged.id == "same-in-family"].to_dict("records")
    assert family["verdict"] == expected
    assert set(judged.model) == {"q0", "q1", "l", "all models"}


def test_one_model_twice_is_no_family():
    jobs = [of_model("q", "qwen3", 7, label=f"q (job {job})") for job in (0, 1)]
    (family,) = melens.judge(jobs).query("id == 'same-in-family'").to_dict("records")
    assert family["verdict"] == "not measured"


def test_several_experiments_of_a_model_belong_together():
    results = [
        {"experiment": "ffn", "model": {"name": "m"}, "metrics": BASE | {"concentration_peaks": {}}},
        {"experiment": "direction", "model": {"name": "m"}, "metrics": BASE | {"norm_drift": 0.01}},
    ]
    judged = melens.judge(results)
    assert len(judged) == len(CLAIMS)
    assert judged.set_index("id").verdict["norm-stable"] == "holds"
    assert pd.isna(judged.set_index("id").low["norm-stable"])


WORSE = {"all": 4, "better": 0, "worse": 4}


@pytest.mark.parametrize(
    ("claim", "compared", "expected"),
    [
        ("scores-weight-better", {"weight": {"all": 4, "better": 3, "worse": 0}}, "holds"),
        ("scores-weight-better", {"weight": {"all": 4, "better": 3, "worse": 1}}, "holds in part"),
        ("scores-weight-better", {"weight": {"all": 4, "better": 0, "worse": 0}}, "does not hold"),
        ("scores-weight-better", {"random": {"all": 4, "better": 0, "worse": 4}}, "not measured"),
        ("scores-others-worse", {"random": WORSE, "magnitude": WORSE}, "holds"),
        ("scores-others-worse", {"random": WORSE}, "holds in part"),
        ("scores-others-worse", {"random": WORSE, "magnitude": WORSE | {"worse": 2}}, "holds in part"),
        ("scores-others-worse", {"random": WORSE | {"worse": 0}, "magnitude": WORSE | {"worse": 0}}, "does not hold"),
        (
            "scores-others-worse",
            {"random": {"all": 4, "better": 1, "worse": 0}, "magnitude": {"all": 4, "better": 0, "worse": 4}},
            "holds in part",
        ),
        ("scores-others-worse", {"weight": {"all": 4, "better": 3, "worse": 0}}, "not measured"),
    ],
)
def test_claims_about_scores(claim, compared, expected):
    of_four_benchmarks = {group: counts | {"tasks": 4} for group, counts in compared.items()}
    assert verdict("benchmark", claim, compared=of_four_benchmarks) == expected


@pytest.mark.parametrize(
    ("claim", "group"),
    [
        ("inference-over-none", "inference"),
        ("training-over-none", "training"),
        ("training-over-inference", "training over inference"),
        ("training-over-gates", "training over gates"),
    ],
)
@pytest.mark.parametrize(
    ("better", "worse", "expected"), [(3, 0, "holds"), (3, 1, "holds in part"), (1, 1, "does not hold")]
)
def test_training_must_be_better_in_most_comparisons_and_worse_in_none(claim, group, better, worse, expected):
    counts = {"all": 4, "better": better, "worse": worse, "tasks": 4}
    assert verdict("tables", claim, compared={group: counts}) == expected
    assert verdict("tables", claim, compared={"other": counts}) == "not measured"
    assert verdict("tables", claim, compared={group: {"all": 0, "too few trainings": 4}}) == "not measured"


@pytest.mark.parametrize(("position", "of_one"), [(0, "first token"), (3, "prompt")])
def test_what_rests_on_one_prompt_says_of_what(position, of_one):
    metrics = {"me_layer": 11, "n_prompts": 1, "distinct_first_tokens": 1, "massive_position": position}
    metrics |= {"magnification": 150, "magnification_interval": (140, 160)}
    rows = melens.judge({"experiment": "emergence", "model": {"name": "m"}, "metrics": metrics}).set_index("id")
    assert rows.verdict["magnification"] == "holds in part"
    assert rows.note["magnification"] == f"It rests on a single {of_one}."


def test_a_claim_can_be_read_without_the_one_before_it():
    """Tables list claims by verdict, so that none may speak of what another one names."""
    of_another = re.compile(r"^(That|There its) | that (output|FFN)\b|\bthey do\b|\bFFN it\b| for it$")
    assert [claim.id for claim in CLAIMS if of_another.search(claim.claim)] == []


@pytest.mark.parametrize(
    ("of_first", "interval", "over_even", "expected"),
    [
        (0.6, (0.5, 0.7), 5, "holds"),
        (0.6, (-0.3, 1.4), 5, "holds in part"),
        (1.4, (1.2, 1.6), 5, "does not hold"),
        (0.6, (0.5, 0.7), 1.5, "does not hold"),  # no more than an ordinary token
        (None, None, None, "not measured"),
    ],
)
def test_later_sinks_are_weaker_than_the_first_and_stronger_than_none(of_first, interval, over_even, expected):
    metrics = {"of_first": of_first, "of_first_interval": interval, "over_even": over_even}
    reach = None if over_even is None else (over_even - 0.1, over_even + 0.1)
    assert verdict("secondary", "secondary-weaker", **metrics, over_even_interval=reach) == expected


def test_a_sink_elsewhere_needs_no_me_layer_and_says_how_many_heads_a_tenth_is():
    metrics = {"me_layer": None, "elsewhere": 0.9, "elsewhere_interval": (0.7, 1.0), "n_heads": 9}
    judged = melens.judge({"experiment": "secondary", "model": {"name": "m"}, "metrics": BASE | metrics})
    judged = judged.set_index("id").loc[["secondary-elsewhere", "secondary-aligned"]]
    assert judged["verdict"].tolist() == ["holds", "not measured"]
    assert judged["note"].iloc[0] == "A tenth is 1 of 9 heads."
