import pandas as pd
import pytest
from handmade import study_by_hand, table

import melens
from melens.analysis import low_rank
from melens.analysis.low_rank import LowRankMetrics, compare_ranks, measure_ranks, rank_by_block, ranks_in_words

ATTENTION = [[8, 8, 8, 2, 2, 99, 99], [2, 2, 8, 4, 4, 99, 99], [4, 4, 4, 2, 2, 99, 99]]
"""Effective ranks of each prompt and block; two heads are one above and one below those of the attention."""
INPUTS = [[10, 10, 10, 4, 6, 99, 99], [20, 40, 30, 9, 9, 99, 99], [10, 10, 10, 4, 4, 99, 99]]
OUTPUTS = [[10, 10, 5, 5, 5, 99, 99], [20, 40, 3, 9, 15, 99, 99], [10, 10, 4, 4, 4, 99, 99]]
SITES = {"ln1.hook_out": INPUTS, "hook_resid_post": OUTPUTS}


def spectrum(site, ranks, without_first=20.0, unit_rows=30.0):
    columns = {"effective_rank": ranks, "effective_rank_without_first": without_first, "effective_rank_unit_rows": 30.0}
    entropies = {f"matrix_entropy{suffix}": 0.5 for suffix in ("", "_without_first", "_unit_rows")}
    shares = {f"first_share{suffix}": 0.5 for suffix in ("", "_without_first", "_unit_rows")}
    return table(site, **columns, **entropies, **shares)


@pytest.fixture
def measured(monkeypatch):
    """Compare the ranks of three prompts by hand, of which a fourth has its massive token born in another block."""

    def measure(sites=SITES, attention=ATTENTION, me_layer=2, **prompts):
        heads = [table(head=head, effective_rank=attention, first_share=0.5, matrix_entropy=0.5) for head in (0, 1)]
        heads[0]["effective_rank"] -= 1
        heads[1]["effective_rank"] += 1
        states = pd.concat([spectrum(site, ranks) for site, ranks in sites.items()])
        found = melens.Trace(
            {"n_layers": 7}, pd.DataFrame(), {"spectrum": states, "attention_spectrum": pd.concat(heads)}
        )
        monkeypatch.setattr(low_rank, "trace", lambda *told, **options: found)
        study = study_by_hand(me_layer, born=[(me_layer, 0)] * 3 + [(4, 0)], **prompts)
        ranks = measure_ranks(study, 8, 8)
        return study, ranks, LowRankMetrics(**study.shared_metrics, **compare_ranks(study, ranks, study.layout))

    return measure


def verdicts(metrics):
    return melens.judge({"experiment": "sinks", "model": {"name": "m"}, "metrics": metrics}).set_index("id")


def test_the_rank_ratio_is_after_over_before_the_massive_activation(measured):
    """Attention in block 2 still reads states without it, the states that leave block 2 hold it."""
    _, _, metrics = measured()
    assert (metrics.attention_rank_before, metrics.attention_rank_after) == ((8 + 4 + 4) / 3, (2 + 4 + 2) / 3)
    assert metrics.attention_rank_ratio == pytest.approx((2 / 8 + 4 / 4 + 2 / 4) / 3)
    assert (metrics.input_rank_before, metrics.input_rank_after) == ((10 + 30 + 10) / 3, (5 + 9 + 4) / 3)
    assert metrics.input_rank_ratio == pytest.approx((5 / 10 + 9 / 30 + 4 / 10) / 3)
    reach = 4.302653 * 0.1 / 3**0.5  # Student's t; 0.5, 0.3 and 0.4 are 0.1 apart
    assert metrics.input_rank_ratio_interval == pytest.approx((0.4 - reach, 0.4 + reach))
    assert (metrics.hidden_rank_before, metrics.hidden_rank_after) == ((10 + 30 + 10) / 3, (5 + 9 + 4) / 3)
    assert metrics.hidden_rank_ratio == pytest.approx((5 / 10 + 9 / 30 + 4 / 10) / 3)
    assert metrics.rank_prompts == 3


def test_each_kind_of_states_has_its_ratio_and_entropies(measured):
    _, _, metrics = measured()
    assert metrics.rank_ratios == {
        "attention": pytest.approx((2 / 8 + 4 / 4 + 2 / 4) / 3),
        "attention inputs": pytest.approx(0.4), "attention inputs without token 0": 1.0,
        "attention inputs on unit rows": 1.0,
        "block outputs": pytest.approx(0.4), "block outputs without token 0": 1.0, "block outputs on unit rows": 1.0,
    }  # fmt: skip
    assert set(metrics.matrix_entropies.values()) == {(0.5, 0.5)}
    said = "the ratio of block outputs is 1.00 without token 0 and 1.00 with every token's state scaled to norm 1."
    assert ranks_in_words(metrics).endswith(said)


def test_prompts_that_share_their_first_token_are_one(measured):
    _, _, metrics = measured(first_tokens=[10, 10, 11, 12])
    # the second of a first token is measured last: the ratios 0.5, 0.3 and 0.4 are of prompts 0, 2 and 1
    assert metrics.input_rank_ratio == pytest.approx(((0.5 + 0.4) / 2 + 0.3) / 2)
    assert metrics.input_rank_ratio_interval == pytest.approx((float("nan"),) * 2, nan_ok=True)


def test_a_figure_has_a_table_of_all_kinds(measured):
    _, ranks, _ = measured()
    by_block = rank_by_block(ranks)
    block_3 = by_block.query("layer == 3 and quantity == 'effective_rank'").set_index("of")["mean"]
    assert block_3.to_dict() == {"attention": pytest.approx(8 / 3), "attention inputs": pytest.approx(17 / 3),
                                 "block outputs": pytest.approx(6)}  # fmt: skip
    assert len(by_block) == 7 * (3 * 3 + 2 * 6)


def ranks_of(ratio, without=0.5, hidden=0.2):
    ratios = {"attention inputs": ratio, "attention inputs without token 0": without, "block outputs": hidden}
    return {
        "me_layer": 2, "last_lasting_layer": 4, "massive_position": 0, "distinct_first_tokens": 8, "n_prompts": 8,
        "input_rank_ratio": ratio, "input_rank_ratio_interval": (ratio - 0.01, ratio + 0.01),
        "hidden_rank_ratio": hidden, "hidden_rank_ratio_interval": (hidden - 0.01, hidden + 0.01),
        "rank_ratios": ratios,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "expected", "former"),
    [
        (ranks_of(0.4), "holds", "holds"),
        (ranks_of(0.495), "holds in part", "holds"),
        (ranks_of(0.7), "holds in part", "holds"),
        (ranks_of(0.9), "does not hold", "holds"),
        (ranks_of(1.02, 1.02, 0.23), "does not hold", "holds"),  # one row collapses the block outputs alone
        (ranks_of(0.4, without=0.9), "holds in part", "holds"),  # one row collapses the attention inputs alone
        (ranks_of(0.4, hidden=1.2), "holds", "does not hold"),
        ({"me_layer": 2, "last_lasting_layer": 4, "input_rank_ratio_why_not": "No."}, "not measured", "not measured"),
    ],
)
def test_what_enters_attention_must_collapse_and_not_one_row_of_it(metrics, expected, former):
    judged = verdicts(metrics).loc["hidden-rank"]
    assert (judged.verdict, judged.former_verdict) == (expected, former)


@pytest.mark.parametrize(
    ("ratio", "expected", "former"),
    [
        (0.4, "holds", "holds"),
        (0.75, "holds in part", "holds in part"),
        (0.9, "does not hold", "holds in part"),
        (1.0, "does not hold", "does not hold"),
    ],
)
def test_attention_must_lose_a_fifth_of_its_rank_at_least(ratio, expected, former):
    shared = ranks_of(1.0)
    interval = (ratio - 0.01, ratio + 0.01)
    judged = verdicts(shared | {"attention_rank_ratio": ratio, "attention_rank_ratio_interval": interval})
    row = judged.loc["attention-rank"]
    assert (row.verdict, row.former_verdict) == (expected, former)


def test_a_massive_activation_of_block_0_leaves_no_block_before(measured):
    _, _, metrics = measured(me_layer=0)
    assert metrics.hidden_rank_ratio is None
    assert metrics.hidden_rank_ratio_why_not == "Nothing lies both before and after the ME layer."
    assert metrics.input_rank_before == pytest.approx((10 + 20 + 10) / 3)  # what block 0 reads is without it


def test_ranks_are_measured_across_first_tokens_and_tasks_on_prompts_that_are_long_enough():
    study = study_by_hand(2, n_prompts=6, task=["a", "a", "a", "b", "b", None], n_tokens=[9, 7, 8, 8, 8, 8])
    assert low_rank.prompts_of_length(study, 8) == [0, 3, 5, 2, 4]
    assert low_rank.prompts_of_length(study, 10) == []
    study = study_by_hand(2, first_tokens=[10, 10, 11, 12], task=["a", "b", "a", "b"])
    assert low_rank.prompts_of_length(study, 8) == [0, 3, 2, 1]
