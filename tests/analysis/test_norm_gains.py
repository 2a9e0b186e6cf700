"""Figures 2 and 3 of a study made by hand: gains and norms of a few prompts, with every metric worked out on paper."""

import pandas as pd
import pytest
from handmade import study_by_hand, table

import melens
from melens import MelensError

ME_LAYER = 2


def alignment(site="ln2.hook_out", **columns):
    """The probe's table: each of two prompts differs from what is given by a factor of 0.9 or 1.1."""
    both = {name: [[factor * x for x in row] for factor in (0.9, 1.1)] for name, row in columns.items()}
    return table(site=site, **both)


MEASURED = {
    "weight_norm": [1.0, 6.0, 12.0, 9.0, 3.0, 30.0, 30.0],
    "weight_norm_others": [2.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0],  # ratios 0.5, 1.5, 4, 3, 1, 10, 10
    "kl": [3.0, 3.0, 1.0, 0.5, 3.0, 3.0, 3.0],
    "kl_others": [2.0, 2.0, 3.0, 3.0, 2.0, 2.0, 2.0],  # ΔKL 1, 1, -2, -2.5, 1, 1, 1
    "frac_0.01": [0.1, 0.5, 0.5, 0.9, 0.1, 0.1, 0.1],
    "frac_0.01_others": [0.2, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1],  # ΔFrac -0.1, 0.4, 0.3, 0.8, 0, 0, 0
    "frac_0.1": [0.1, 0.5, 0.7, 0.9, 0.1, 0.1, 0.1],
    "frac_0.1_others": [0.2] * 7,
}
BEFORE_ATTENTION = {name: [100.0] * 7 for name in MEASURED}


def normalization(tables, **settings):
    study = study_by_hand(ME_LAYER, tables={"gain_alignment": pd.concat(tables, ignore_index=True)})
    return melens.analysis.normalization(study, **{"other_shares": [0.1], **settings})


@pytest.fixture(scope="module")
def result():
    return normalization([alignment(**MEASURED), alignment("ln1.hook_out", **BEFORE_ATTENTION)])


def test_the_differences_are_token_0_minus_the_others(result):
    metrics = result.metrics
    assert metrics.delta_kl == pytest.approx(-2)
    assert metrics.delta_kl_interval == pytest.approx((-2.2, -1.8))
    assert metrics.delta_frac == pytest.approx(0.3)
    assert metrics.delta_frac_interval == pytest.approx((0.27, 0.33))
    assert metrics.delta_frac_by_share == {"0.01": pytest.approx(0.3), "0.1": pytest.approx(0.5)}


def test_the_weight_norm_is_that_of_token_0_over_the_others(result):
    """Both prompts' norms are scaled alike, so that the ratio is the same for both."""
    assert result.metrics.weight_norm_ratio == pytest.approx(4)
    assert result.metrics.weight_norm_ratio_interval == pytest.approx((4, 4))


def test_token_0_stands_out_from_twice_the_others_on(result):
    assert result.metrics.weight_norm_first_layer == ME_LAYER
    twice_before = MEASURED | {"weight_norm": [1.0, 8.0, 12.0, 9.0, 3.0, 30.0, 30.0]}
    assert normalization([alignment(**twice_before)]).metrics.weight_norm_first_layer == 1
    never = MEASURED | {"weight_norm": [1.0] * 7}
    assert normalization([alignment(**never)]).metrics.weight_norm_first_layer is None


def test_the_largest_delta_frac_is_looked_for_up_to_the_me_layer(result):
    """Behind it, in block 3, is a larger one that no claim is about."""
    assert result.metrics.delta_frac_top_layer == 1


def test_the_verdicts(result):
    claims = result.claims.set_index("id")
    expected = {"weight-norm": "holds", "delta-frac": "holds in part", "delta-kl": "holds"}
    assert claims.verdict.to_dict() == expected
    assert claims.note["delta-frac"] == "Positive, but larger at block 1."


def test_figures_and_table_hold_what_they_say(result):
    by_block = result.tables["rmsnorm_by_block"].set_index(["site", "quantity", "layer"])["mean"].sort_index()
    assert by_block["ln2.hook_out", "delta_kl"].tolist() == pytest.approx([1, 1, -2, -2.5, 1, 1, 1])
    assert by_block["ln2.hook_out", "weight_norm_ratio"].tolist() == pytest.approx([0.5, 1.5, 4, 3, 1, 10, 10])
    assert by_block["ln1.hook_out", "weight_norm", 0] == 100
    observed = "In block 2 the norm of token 0 is 4 (4 to 4) times the others'; it is first twice theirs in block 2."
    assert result.figures["weight_norm"].observed == observed
    panels = [text.text for text in result.figures["gain_alignment"].plot.layout.annotations]
    assert "ΔKL at RMSNorm post_attention_layernorm (ln2)" in panels
    curves = [curve.name for curve in result.figures["weight_norm"].plot.data if curve.showlegend]
    assert curves == ["other tokens", "token 0"]


def test_another_share_than_the_claims_is_noted():
    result = normalization([alignment(**MEASURED)], top_share=0.1, other_shares=[])
    assert result.metrics.delta_frac == pytest.approx(0.5)
    assert "Here K was 10.00% of the width." in result.claims.set_index("id").note["delta-frac"]


def test_without_a_norm_before_the_ffn_nothing_is_measured_but_why():
    result = normalization([alignment("ln1.hook_out", **BEFORE_ATTENTION)])
    assert result.metrics.why_not == "The ME layer's FFN has no norm of its own before it."
    assert set(result.claims.note) == {result.metrics.why_not}


def test_a_prompt_of_one_token_has_no_others():
    measured = alignment(**MEASURED)
    measured.loc[measured["prompt"] == 1, [name for name in measured if name.endswith("_others")]] = float("nan")
    study = study_by_hand(ME_LAYER, tables={"gain_alignment": measured}, n_tokens=[8, 1])
    metrics = melens.analysis.normalization(study, other_shares=[0.1]).metrics
    assert metrics.delta_kl == pytest.approx(-2 * 0.9)
    assert metrics.weight_norm_ratio == pytest.approx(4)


def test_a_number_that_is_missing_of_more_tokens_stops():
    measured = alignment(**MEASURED)
    measured.loc[(measured["prompt"] == 1) & (measured["layer"] == 2), "kl"] = float("nan")
    with pytest.raises(MelensError, match=r"The delta_kl of prompt 1, site ln2\.hook_out, layer 2 is NaN"):
        melens.analysis.normalization(study_by_hand(ME_LAYER, tables={"gain_alignment": measured}), other_shares=[0.1])
