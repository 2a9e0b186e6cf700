"""Figure 4 of a study made by hand: concentrations and norms of a few prompts, every metric worked out on paper."""

import pandas as pd
import pytest
from handmade import study_by_hand, table

import melens

ME_LAYER = 2
GATE, UP, DOWN = "mlp.hook_pre", "mlp.hook_pre_linear", "hook_mlp_out"


def norms(written, read):
    """Of token 0, with another token beside it that must not count."""
    return pd.concat(
        [
            table(site=DOWN, pos=0, norm=written),
            table(site="ln2.hook_out", pos=0, norm=read),
            table(site=DOWN, pos=1, norm=[[1000.0] * len(row) for row in written]),
        ],
        ignore_index=True,
    )


def concentrations(**by_site):
    """Of token 0, by prompt and block; that of the others grows to 0.5 in block 4."""
    others = [0.1, 0.1, 0.1, 0.1, 0.5, 0.1, 0.1]
    sites = {"gate": GATE, "up": UP, "down": DOWN}
    return pd.concat(
        [
            table(site=sites[name], concentration=rows, concentration_others=[others] * len(rows))
            for name, rows in by_site.items()
        ],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def result():
    """Two prompts: amplified ×(1, 2, 20, 4, 5, 100, 100) and ×(1, 8, 40, 2, 4, 100, 100), and concentrated."""
    tables = {
        "concentration": concentrations(
            gate=[[0.2, 0.2, 0.5, 0.2, 0.6, 0.9, 0.9]] * 2,  # less the others 0.4 in block 2, 0.1 in block 4
            up=[[0.2, 0.5, 0.2, 0.2, 0.2, 0.9, 0.9], [0.2, 0.2, 0.4, 0.2, 0.2, 0.9, 0.9]],  # mean 0.25, then 0.2
            down=[[0.2, 0.2, 0.8, 0.2, 0.9, 0.2, 0.2]] * 2,
        ),
        "norm": norms(
            written=[[1.0, 4.0, 40.0, 8.0, 10.0, 200.0, 200.0], [1.0, 8.0, 40.0, 2.0, 4.0, 100.0, 100.0]],
            read=[[1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], [1.0] * 7],
        ),
    }
    return melens.analysis.ffn(study_by_hand(ME_LAYER, tables=tables))


def test_the_peaks_are_of_token_0_against_the_others_without_the_last_two_blocks(result):
    assert result.metrics.concentration_peaks == {"gate": 2, "up": 1, "down": 2}
    assert result.metrics.missing_projections == {}


def test_the_amplification_is_what_is_written_over_what_is_read(result):
    metrics = result.metrics
    assert metrics.amplification == pytest.approx((20 + 40) / 2)
    assert metrics.amplification_interval == pytest.approx((20, 40))
    assert metrics.amplification_peak == ME_LAYER


def test_the_me_layer_is_compared_with_the_next_largest_of_each_prompt(result):
    metrics = result.metrics
    assert metrics.amplification_over_next == pytest.approx((20 / 5 + 40 / 8) / 2)
    assert metrics.amplification_over_next_interval == pytest.approx((4, 5))


def test_the_verdicts(result):
    verdicts = result.claims.set_index("id").verdict
    assert verdicts.to_dict() == {"concentration": "holds in part", "amplification": "holds"}


def test_the_figure_says_what_the_field_calls_concentration(result):
    observed = result.figures["ffn"].observed
    assert (
        "inverse participation ratio) peaks in block 2 after gate, in block 1 after up, in block 2 after down"
        in observed
    )
    assert "block 2 amplifies token 0 by × 30 (20 to 40), 4.5 times as much as any other" in observed


def test_prompts_that_share_their_first_token_count_once():
    rows = [
        [1.0, 2.0, 20.0, 4.0, 5.0, 1.0, 1.0],
        [1.0, 2.0, 20.0, 4.0, 5.0, 1.0, 1.0],
        [1.0, 2.0, 50.0, 4.0, 5.0, 1.0, 1.0],
    ]
    tables = {"concentration": concentrations(down=[[0.2] * 7] * 3), "norm": norms(rows, [[1.0] * 7] * 3)}
    metrics = melens.analysis.ffn(study_by_hand(ME_LAYER, first_tokens=[8, 8, 9], tables=tables)).metrics
    assert metrics.amplification == pytest.approx((20 + 50) / 2)


def test_without_a_norm_before_the_ffn_there_is_no_amplification_but_a_reason():
    without = [[1.0, 1.0, None, 1.0, 1.0, 1.0, 1.0]] * 2
    tables = {"concentration": concentrations(down=[[0.2] * 7] * 2), "norm": norms([[1.0] * 7] * 2, without)}
    result = melens.analysis.ffn(study_by_hand(ME_LAYER, tables=tables))
    assert result.metrics.amplification is None
    assert "no norm before it" in result.claims.set_index("id").note["amplification"]
