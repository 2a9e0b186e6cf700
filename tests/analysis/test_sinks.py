import pandas as pd
import pytest

import melens
from melens import MelensError
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
