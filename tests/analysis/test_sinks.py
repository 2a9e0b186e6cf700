import pandas as pd
import pytest
import torch
from handmade import study_by_hand, table

import melens
from melens import MelensError
from melens.analysis import attention_sinks
from melens.analysis.sink_mass import find_sink_onset, sink_mass_by_layer


def trace_with(*mass_by_layer):
    """A trace of two heads a block; None for a block without attention."""
    table = pd.DataFrame(
        [
            {"prompt": 0, "layer": layer, "head": head, "sink_mass": mass + shift}
            for layer, mass in enumerate(mass_by_layer)
            if mass is not None
            for head, shift in ((0, -0.1), (1, 0.1))
        ]
    )
    return melens.Trace(model={"n_layers": len(mass_by_layer)}, prompts=pd.DataFrame(), tables={"sink_mass": table})


@pytest.mark.parametrize(
    ("mass", "layer", "first_layer"),
    [
        ((0.1, 0.1, 0.5, 0.5, 0.6, 0.1, 0.1), 2, 2),
        ((0.1, 0.4, 0.1, 0.5, 0.6, 0.5, 0.1), 3, 1),  # comes, goes and returns
        ((0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5), 0, 0),
        ((0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5), None, 5),  # in the trailing blocks alone
        ((0.1, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1), None, 1),  # does not last
        ((0.1,) * 7, None, None),
    ],
)
def test_the_onset_is_where_sinks_come_to_stay(mass, layer, first_layer):
    onset = find_sink_onset(trace_with(*mass))
    assert (onset.layer, onset.first_layer) == (layer, first_layer)


@pytest.mark.parametrize(
    ("mass", "layer", "first_layer", "looked_at"),
    [
        (
            (None, 0.1, None, None, 0.5, None, None, 0.1),
            4,
            4,
            (1, 4),
        ),  # the last two blocks count apart
        ((None, 0.1, None, None, 0.1, None, None, 0.5), None, 7, (1, 4)),
        ((None, None, None, None, None, None, None, 0.5), None, 7, ()),
        ((0.5, None, 0.5, None, None, None, None, None), 0, 0, (0, 2)),
    ],
)
def test_of_a_hybrid_the_blocks_with_attention_are_looked_at(mass, layer, first_layer, looked_at):
    onset = find_sink_onset(trace_with(*mass))
    assert (onset.layer, onset.first_layer, onset.looked_at) == (layer, first_layer, looked_at)


def test_the_summary_counts_heads_with_a_sink():
    summary = sink_mass_by_layer(trace_with(0.25, 0.5, 0.1))
    assert summary["mean"].tolist() == pytest.approx([0.25, 0.5, 0.1])
    assert summary["share_of_heads"].tolist() == [0.5, 1.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_whose_sink_mass_is_no_number_is_named(value):
    trace = trace_with(0.5, 0.5, 0.5, 0.5)
    trace["sink_mass"].loc[3, "sink_mass"] = value
    with pytest.raises(MelensError, match=f"The sink mass of block 1, head 1 is {value} in prompt 0"):
        find_sink_onset(trace)


def test_sinks_of_the_embedded_model_start_right_after_its_me_layer(embedded_trace):
    assert find_sink_onset(embedded_trace).layer == melens.find_me_layer(embedded_trace).layer + 1


# --- `melens.analysis.sinks`: three prompts by hand, of which two have their massive token born in block 2 of 7 -------

MASS = {
    0: [[0.1, 0.3, 0.1, 0.5, 0.5, 0, 0], [0.1, 0.3, 0.3, 0.9, 0.5, 0, 0], [1] * 7],
    1: [[0.1, 0.5, 0.2, 0.7, 0.7, 0, 0], [0.1, 0.5, 0.4, 0.7, 0.7, 0, 0], [1] * 7],
}
"""By head, of each prompt and block; the third prompt, born elsewhere, does not count."""

ATTENTION = [[8, 8, 8, 2, 2, 99, 99], [2, 2, 8, 4, 4, 99, 99]]
HIDDEN = [[10, 10, 5, 5, 5, 99, 99], [20, 40, 3, 9, 15, 99, 99]]
"""Effective ranks of each prompt and block; two heads are one above and one below those of the attention."""


@pytest.fixture
def study(monkeypatch):
    """A study of these numbers, whose further passes find them."""
    spectrum = table(effective_rank=HIDDEN, first_share=0.5)
    heads = [table(head=head, effective_rank=ATTENTION, first_share=0.5) for head in (0, 1)]
    heads[0]["effective_rank"] -= 1
    heads[1]["effective_rank"] += 1
    tables = {"spectrum": spectrum, "attention_spectrum": pd.concat(heads)}
    tensors = {"attention_maps": torch.full((1, 2, 2, 8, 8), 0.25)}
    found = melens.Trace({"n_layers": 7}, pd.DataFrame(), tables, tensors)
    monkeypatch.setattr(attention_sinks, "trace", lambda *told, **options: found)
    mass = pd.concat([table(head=head, sink_mass=mass) for head, mass in MASS.items()])
    return study_by_hand(2, born=[(2, 0), (2, 0), (4, 0)], tables={"sink_mass": mass})


def test_sink_mass_is_compared_between_the_me_layer_and_the_next_block(study):
    metrics = melens.analysis.sinks(study, rank_tokens=8).metrics
    assert metrics.sink_mass_at_me_layer == pytest.approx((0.15 + 0.35) / 2)
    assert metrics.sink_mass_at_me_layer_interval == pytest.approx((0.15, 0.35))
    assert metrics.sink_mass_after == pytest.approx((0.6 + 0.8) / 2)
    assert metrics.sink_mass_after_interval == pytest.approx((0.6, 0.8))
    assert (metrics.sink_onset_layer, metrics.first_sink_layer) == (3, 1)


def test_the_rank_ratio_is_after_over_before_the_massive_activation(study):
    """Attention in block 2 still reads states without it, the hidden states after block 2 hold it."""
    metrics = melens.analysis.sinks(study, rank_tokens=8).metrics
    assert (metrics.attention_rank_before, metrics.attention_rank_after) == ((8 + 4) / 2, (2 + 4) / 2)
    assert metrics.attention_rank_ratio == (2 / 8 + 4 / 4) / 2
    assert metrics.attention_rank_ratio_interval == (2 / 8, 4 / 4)
    assert (metrics.hidden_rank_before, metrics.hidden_rank_after) == ((10 + 30) / 2, (5 + 9) / 2)
    assert metrics.hidden_rank_ratio == pytest.approx((5 / 10 + 9 / 30) / 2)
    assert metrics.hidden_rank_ratio_interval == pytest.approx((9 / 30, 5 / 10))
    assert metrics.rank_prompts == 2


def test_the_verdicts_on_sinks_by_hand(study):
    verdicts = melens.analysis.sinks(study, rank_tokens=8).claims.set_index("id").verdict
    assert verdicts.to_dict() == {
        "sink-next": "holds in part", "attention-rank": "holds in part", "hidden-rank": "holds",
    }  # fmt: skip


def test_ranks_are_measured_across_tasks_on_prompts_that_are_long_enough():
    study = study_by_hand(2, n_prompts=6, task=["a", "a", "a", "b", "b", None], n_tokens=[9, 7, 8, 8, 8, 8])
    assert attention_sinks._across_tasks(study, 8) == [0, 3, 5, 2, 4]
    assert attention_sinks._across_tasks(study, 10) == []
