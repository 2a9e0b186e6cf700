"""Figures 2 and 3 of a study made by hand: gains and norms of a few prompts, with every metric worked out on paper."""

import dataclasses
import math

import pandas as pd
import pytest
from handmade import study_by_hand, table

import melens
from melens import MelensError

ME_LAYER = 2
FACTORS = (0.9, 1.0, 1.1)
REACH = 4.302653 * 0.1 / math.sqrt(3)
"""Half of the 95% interval of the mean of these factors: Student's t with two degrees of freedom."""


def alignment(site="ln2.hook_out", factors=FACTORS, **columns):
    """The probe's table: each of three prompts differs from what is given by a factor of 0.9, 1 or 1.1."""
    each = {name: [[factor * x for x in row] for factor in factors] for name, row in columns.items()}
    return table(site=site, **each)


MEASURED = {
    "weight_norm": [1.2, 6.0, 12.0, 9.0, 3.0, 30.0, 30.0],
    "weight_norm_others": [2.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0],  # ratios 0.6, 1.5, 4, 3, 1, 10, 10
    "kl": [3.0, 3.0, 1.0, 0.5, 3.0, 3.0, 3.0],
    "kl_others": [2.0, 2.0, 3.0, 3.0, 2.0, 2.0, 2.0],  # ΔKL 1, 1, -2, -2.5, 1, 1, 1
    "frac_0.01": [0.1, 0.5, 0.5, 0.9, 0.1, 0.1, 0.1],
    "frac_0.01_others": [0.2, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1],  # ΔFrac -0.1, 0.4, 0.3, 0.8, 0, 0, 0
    "frac_0.1": [0.1, 0.5, 0.7, 0.9, 0.1, 0.1, 0.1],
    "frac_0.1_others": [0.2] * 7,
}
BEFORE_ATTENTION = {name: [100.0] * 7 for name in MEASURED}


def normalization(tables, *, model=None, settings=None, **study):
    by_hand = study_by_hand(ME_LAYER, n_prompts=3, tables={"gain_alignment": pd.concat(tables)}, **study)
    trace = dataclasses.replace(by_hand.trace, model=by_hand.trace.model | (model or {}))
    return melens.analysis.normalization(
        dataclasses.replace(by_hand, trace=trace), **{"other_shares": [0.1], **(settings or {})}
    )


def judged(claim, *, model=None, n_layers=7, factors=FACTORS, **columns):
    """Judge one claim where some columns are others; the block after the last given one and those behind are alike."""
    longer = {name: [*row, *[row[-1]] * (n_layers - len(row))] for name, row in (MEASURED | columns).items()}
    result = normalization([alignment(factors=factors, **longer)], model=model, n_layers=n_layers)
    return result.claims.set_index("id").loc[claim]


@pytest.fixture(scope="module")
def result():
    return normalization([alignment(**MEASURED), alignment("ln1.hook_out", **BEFORE_ATTENTION)])


def test_the_differences_are_token_0_minus_the_others(result):
    metrics = result.metrics
    assert metrics.delta_kl == pytest.approx(-2)
    assert metrics.delta_kl_interval == pytest.approx((-2 - 2 * REACH, -2 + 2 * REACH))
    assert metrics.delta_frac == pytest.approx(0.3)
    assert metrics.delta_frac_interval == pytest.approx((0.3 - 0.3 * REACH, 0.3 + 0.3 * REACH))
    assert metrics.delta_frac_by_share == {"0.01": pytest.approx(0.3), "0.1": pytest.approx(0.5)}


def test_the_weight_norm_is_that_of_token_0_over_the_others(result):
    """All prompts' norms are scaled alike, so that the ratio is the same for all."""
    assert result.metrics.weight_norm_ratio == pytest.approx(4)
    assert result.metrics.weight_norm_ratio_interval == pytest.approx((4, 4))


def test_token_0_stands_out_from_twice_the_others_on(result):
    assert result.metrics.weight_norm_first_layer == ME_LAYER
    twice_before = MEASURED | {"weight_norm": [1.2, 8.0, 12.0, 9.0, 3.0, 30.0, 30.0]}
    assert normalization([alignment(**twice_before)]).metrics.weight_norm_first_layer == 1
    never = MEASURED | {"weight_norm": [1.0] * 7}
    assert normalization([alignment(**never)]).metrics.weight_norm_first_layer is None


def test_the_me_layer_is_compared_with_the_next_block_without_the_trailing_ones(result):
    """ΔFrac is 0.8 in block 3 and ΔKL -2.5; of four other blocks two have a larger ΔFrac and one a lower ΔKL."""
    metrics = result.metrics
    assert metrics.delta_frac_top_layer == 1
    assert (metrics.delta_frac_next_layer, metrics.delta_kl_next_layer) == (3, 3)
    assert metrics.delta_frac_lead == pytest.approx(-0.5)
    assert metrics.delta_frac_lead_interval == pytest.approx((-0.5 - 0.5 * REACH, -0.5 + 0.5 * REACH))
    assert metrics.delta_kl_lead == pytest.approx(-0.5)
    assert (metrics.delta_frac_share_larger, metrics.delta_kl_share_lower) == (0.5, 0.25)
    assert (metrics.weight_norm_lead, metrics.weight_norm_next_layer) == (pytest.approx(4 / 3), 3)
    assert (metrics.norm_lead, metrics.norm_next_layer) == (pytest.approx(12 / 9), 3)
    assert (metrics.weight_norm_before, metrics.weight_norm_before_layer) == (pytest.approx(0.6), 0)


def test_the_verdicts_and_the_former_ones(result):
    claims = result.claims.set_index("id")
    assert claims.verdict.to_dict() == {
        "weight-norm": "holds",
        "weight-norm-peak": "holds in part",
        "delta-frac": "does not hold",
        "delta-kl": "does not hold",
        "rmsnorm-peak": "holds in part",
    }
    former = claims.former_verdict.dropna().to_dict()
    assert former == {"weight-norm": "holds", "delta-frac": "holds in part", "delta-kl": "holds"}
    note = "ΔFrac is +0.300; the next is block 3, and 50% of the other blocks have a larger one."
    assert claims.note["delta-frac"] == note


def test_before_the_me_layer_token_0_is_alike_either_way():
    assert judged("weight-norm", weight_norm=[0.8, 6.0, 12.0, 9.0, 3.0]).verdict == "holds in part"  # ratio 0.4
    larger = judged("weight-norm", weight_norm=[1.2, 8.4, 12.0, 9.0, 3.0])  # ratio 2.1
    assert (larger.verdict, larger.former_verdict) == ("holds in part", "holds in part")
    assert judged("weight-norm", weight_norm=[1.2, 6.0, 5.7, 9.0, 3.0]).verdict == "does not hold"  # 1.9 there


def test_a_ratio_that_reaches_twice_the_others_in_some_prompts_is_not_alike():
    """Its mean of 1.9 before the ME layer is under two, which the former criterion took for alike."""
    measured = alignment(**MEASURED | {"weight_norm": [1.2, 7.6, 12.0, 9.0, 3.0, 30.0, 30.0]})
    of_first = (measured["layer"] == 1) & (measured["prompt"] == 0)
    measured.loc[of_first, "weight_norm"] *= 0.8
    claims = normalization([measured]).claims.set_index("id").loc["weight-norm"]
    assert (claims.verdict, claims.former_verdict) == ("holds in part", "holds")


def test_far_more_than_in_other_blocks_is_twice_as_much():
    assert judged("weight-norm-peak", weight_norm=[1.2, 4.0, 12.0, 5.9, 3.0]).verdict == "holds"  # next 1.97
    largest = judged("weight-norm-peak", weight_norm=[1.2, 4.0, 12.0, 6.1, 3.0])
    assert (largest.verdict, largest.value) == ("holds in part", pytest.approx(12 / 6.1))
    assert judged("weight-norm-peak", weight_norm=[1.2, 4.0, 12.0, 13.0, 3.0]).verdict == "does not hold"


def frac(*deltas):
    """Token 0's share on the dims K, where that of the others is 0.5 and ΔFrac as given."""
    return {"frac_0.01": [0.5 + delta for delta in deltas], "frac_0.01_others": [0.5] * len(deltas)}


def test_delta_frac_must_be_larger_than_in_any_other_block():
    special = judged("delta-frac", **frac(0, 0.1, 0.4, 0.2, 0))
    assert (special.verdict, special.value) == ("holds", pytest.approx(0.2))
    everywhere = judged("delta-frac", **frac(0.1, 0.1, 0.2, 0.3, 0.1))  # the sign alone, as in 28 blocks of 30
    assert everywhere.verdict == "does not hold"
    negative = judged("delta-frac", **frac(-0.3, -0.3, -0.1, -0.2, -0.2))  # the largest, but not over 0
    assert negative.verdict == "does not hold"


def test_a_lead_that_not_all_prompts_have_holds_in_part():
    """It is 0.3, 0.3 and -0.1: 0.17 on average, with an interval around 0."""
    measured = alignment(factors=(1, 1, 1), **MEASURED | frac(0, 0.1, 0.4, 0.1, 0, 0, 0))
    measured.loc[(measured["layer"] == 3) & (measured["prompt"] == 2), "frac_0.01"] = 1.0
    claim = normalization([measured]).claims.set_index("id").loc["delta-frac"]
    assert (claim.verdict, claim.value) == ("holds in part", pytest.approx((0.3 + 0.3 - 0.1) / 3))


@pytest.mark.parametrize(("n_larger", "verdict"), [(1, "holds in part"), (2, "does not hold")])
def test_a_tenth_of_the_other_blocks_may_have_a_larger_one(n_larger, verdict):
    """Of thirteen blocks ten are compared with the ME layer."""
    before = [0.4] * n_larger + [0.1] * (2 - n_larger)
    assert judged("delta-frac", n_layers=13, **frac(*before, 0.3, 0.1, 0)).verdict == verdict
    closer = {"kl": [2 - 10 * delta for delta in (*before, 0.3, 0.1, 0)], "kl_others": [2.0] * 5}
    assert judged("delta-kl", n_layers=13, **closer).verdict == verdict


def test_among_the_first_blocks_the_sign_must_be_that_of_all_prompts():
    """ΔFrac is 0.3, 0.3 and -0.1 in the ME layer, larger in one of ten blocks."""
    longer = {name: [*row, *[row[-1]] * (13 - len(row))] for name, row in (MEASURED | frac(0.4, 0, 0.3, 0)).items()}
    measured = alignment(factors=(1, 1, 1), **longer)
    measured.loc[(measured["layer"] == ME_LAYER) & (measured["prompt"] == 2), "frac_0.01"] = 0.4
    result = normalization([measured], n_layers=13)
    assert result.metrics.delta_frac_share_larger == 0.1
    assert result.claims.set_index("id").verdict["delta-frac"] == "does not hold"


def test_delta_kl_must_be_lower_than_in_any_other_block():
    special = judged("delta-kl", kl=[2.0, 2.0, 1.0, 2.5, 2.0])  # ΔKL 0, 0, -2, -0.5, 0
    assert (special.verdict, special.value) == ("holds", pytest.approx(1.5))
    positive = judged("delta-kl", kl=[4.0, 4.0, 3.5, 5.0, 4.0])  # 2, 2, 0.5, 2, 2
    assert (positive.verdict, positive.value) == ("does not hold", pytest.approx(1.5))


LLAMA, QWEN = {"family": "llama"}, {"family": "qwen3"}


def test_behind_the_me_layer_the_family_decides_what_the_paper_says():
    sharp = {"weight_norm": [1.0, 2.0, 12.0, 5.0, 3.0]}
    rising = {"weight_norm": [1.0, 2.0, 12.0, 13.0, 14.0]}
    assert judged("rmsnorm-peak", model=QWEN, **sharp).verdict == "holds"
    assert judged("rmsnorm-peak", model=QWEN, **rising).verdict == "does not hold"
    assert judged("rmsnorm-peak", model=LLAMA, **sharp).verdict == "does not hold"
    holds = judged("rmsnorm-peak", model=LLAMA, **rising)
    assert (holds.verdict, holds.value) == ("holds", pytest.approx(14 / 12))
    assert "the paper's Llama and Mistral, a rise" in holds.note


def test_a_norm_that_ends_larger_but_falls_on_the_way_rises_in_part():
    """Of three pairs the later has the larger norm in two."""
    claim = judged("rmsnorm-peak", model=LLAMA, weight_norm=[1.0, 2.0, 12.0, 14.0, 13.0])
    assert claim.verdict == "holds in part"
    assert "67% of pairs" in claim.note


def test_without_a_family_the_architecture_says_it():
    rising = {"weight_norm": [1.0, 2.0, 12.0, 13.0, 14.0]}
    assert judged("rmsnorm-peak", model={"architecture": "MistralForCausalLM"}, **rising).verdict == "holds"
    other = {"architecture": "MistralForCausalLM", "family": "qwen3"}
    assert judged("rmsnorm-peak", model=other, **rising).verdict == "does not hold"


def test_with_one_norm_before_an_ffn_there_is_no_block_to_compare_with():
    alone = alignment(**MEASURED)
    claims = normalization([alone[alone["layer"] == ME_LAYER]]).claims.set_index("id")
    compared = claims.loc[["weight-norm-peak", "delta-frac", "delta-kl", "rmsnorm-peak"]]
    assert set(compared.verdict) == {"not measured"}
    assert set(compared.note) == {"No other block has a norm before its FFN to compare with."}
    assert claims.verdict["weight-norm"] == "holds in part"


def test_prompts_that_share_their_first_token_count_once():
    """The prompts of factors 0.9 and 1.1 are left; two states have no interval, and show nothing whole."""
    result = normalization([alignment(**MEASURED | frac(0, 0.1, 0.4, 0.2, 0, 0, 0))], first_tokens=[8, 8, 9])
    assert result.metrics.delta_frac == pytest.approx((0.9 * 0.4 + 1.1 * 0.4) / 2)
    assert result.claims.set_index("id").verdict["delta-frac"] == "holds in part"
    assert "2 prompts" in result.figures["gain_alignment"].plot.layout.title.text


def test_figures_and_table_hold_what_they_say(result):
    by_block = result.tables["rmsnorm_by_block"].set_index(["site", "quantity", "layer"])["mean"].sort_index()
    assert by_block["ln2.hook_out", "delta_kl"].tolist() == pytest.approx([1, 1, -2, -2.5, 1, 1, 1])
    assert by_block["ln2.hook_out", "weight_norm_ratio"].tolist() == pytest.approx([0.6, 1.5, 4, 3, 1, 10, 10])
    assert by_block["ln1.hook_out", "weight_norm", 0] == 100
    said = dict(result.findings)
    assert said["against others"] == (
        "In block 2, the ME layer, the output of the norm before the FFN is 4 (4 to 4) times as large for token 0 as "
        "for the other tokens; it is twice as large first in block 2."
    )
    assert said["against other blocks"].startswith("For token 0 it is × 1.33 that in block 3, the largest of the other")
    assert result.figures["weight_norm"].observed == f"{said['against others']} {said['against other blocks']}"
    assert said["ΔFrac"].endswith("in block 2, 0.500 less than in block 3.")
    assert " -2.000 (" in said["ΔKL"]
    assert said["ΔKL"].endswith("nats in block 2, 0.500 higher than in block 3.")
    assert result.figures["gain_alignment"].observed == f"{said['ΔFrac']} {said['ΔKL']}"
    panels = [text.text for text in result.figures["gain_alignment"].plot.layout.annotations]
    assert "ΔKL at RMSNorm post_attention_layernorm (ln2)" in panels
    curves = [curve.name for curve in result.figures["weight_norm"].plot.data if curve.showlegend]
    assert curves == ["other tokens", "token 0"]


def test_another_share_than_the_claims_is_noted():
    result = normalization([alignment(**MEASURED)], settings={"top_share": 0.1, "other_shares": []})
    assert result.metrics.delta_frac == pytest.approx(0.5)
    assert "Here K was 10.00% of the width." in result.claims.set_index("id").note["delta-frac"]


def test_without_a_norm_before_the_ffn_nothing_is_measured_but_why():
    result = normalization([alignment("ln1.hook_out", **BEFORE_ATTENTION)])
    assert result.metrics.why_not == "The ME layer's FFN has no norm of its own before it."
    assert set(result.claims.note) == {result.metrics.why_not}


def test_a_prompt_of_one_token_has_no_others():
    measured = alignment(**MEASURED)
    measured.loc[measured["prompt"] == 1, [name for name in measured if name.endswith("_others")]] = float("nan")
    study = study_by_hand(ME_LAYER, tables={"gain_alignment": measured}, n_prompts=3, n_tokens=[8, 1, 8])
    metrics = melens.analysis.normalization(study, other_shares=[0.1]).metrics
    assert metrics.delta_kl == pytest.approx(-2 * (0.9 + 1.1) / 2)
    assert metrics.weight_norm_ratio == pytest.approx(4)


def test_one_state_shows_nothing_of_others():
    """As where BOS begins every prompt: what would hold of three states holds in part."""
    measured = MEASURED | frac(0, 0.1, 0.4, 0.2, 0, 0, 0) | {"weight_norm": [1.2, 6.0, 30.0, 6.0, 3.0, 9.0, 9.0]}
    measured |= {"kl": [2.0, 2.0, 1.0, 2.5, 2.0, 2.0, 2.0]}
    assert set(normalization([alignment(**measured)], model=QWEN).claims.verdict) == {"holds"}
    shared = normalization([alignment(**measured)], model=QWEN, first_tokens=[8, 8, 8]).claims
    assert set(shared.verdict) == {"holds in part"}
    assert shared.note.str.contains("It rests on a single first token.").all()


def test_of_prompts_with_one_first_token_one_is_taken_that_has_others():
    measured = alignment(**MEASURED)
    measured.loc[measured["prompt"] == 0, [name for name in measured if name.endswith("_others")]] = float("nan")
    study = study_by_hand(ME_LAYER, tables={"gain_alignment": measured}, first_tokens=[8, 8, 9], n_tokens=[1, 8, 8])
    assert melens.analysis.normalization(study, other_shares=[0.1]).metrics.delta_kl == pytest.approx(
        -2 * (1 + 1.1) / 2
    )


def test_a_number_that_is_missing_of_more_tokens_stops():
    measured = alignment(**MEASURED)
    measured.loc[(measured["prompt"] == 1) & (measured["layer"] == 2), "kl"] = float("nan")
    with pytest.raises(MelensError, match=r"The delta_kl of prompt 1, site ln2\.hook_out, layer 2 is NaN"):
        melens.analysis.normalization(study_by_hand(ME_LAYER, tables={"gain_alignment": measured}), other_shares=[0.1])
