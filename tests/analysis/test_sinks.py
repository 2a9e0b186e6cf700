import pandas as pd
import pytest
import torch
from handmade import study_by_hand, table

import melens
from melens import MelensError
from melens.analysis import attention_inputs, attention_sinks
from melens.analysis.sink_mass import even_attention, find_sink_onset, sink_mass_by_layer

PROMPT = pd.DataFrame({"prompt": [0], "n_tokens": [100]})


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
    return melens.Trace(model={"n_layers": len(mass_by_layer)}, prompts=PROMPT, tables={"sink_mass": table})


@pytest.mark.parametrize(
    ("mass", "layer", "first_layer"),
    [
        ((0.1, 0.1, 0.5, 0.5, 0.6, 0.1, 0.1), 2, 2),
        ((0.1, 0.4, 0.1, 0.5, 0.6, 0.5, 0.1), 1, 1),  # a dip
        ((0.5, 0.1, 0.1, 0.5, 0.6, 0.5, 0.1), 3, 0),  # comes, goes and returns
        ((0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5), 0, 0),
        ((0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5), None, 5),  # in the trailing blocks alone
        ((0.1, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1), None, 1),  # does not last
        ((0.1,) * 7, None, None),
    ],
)
def test_the_onset_is_where_sinks_come_to_stay(mass, layer, first_layer):
    onset = find_sink_onset(trace_with(*mass))
    assert (onset.layer, onset.first_layer) == (layer, first_layer)


def test_a_dip_breaks_the_sinks_without_moving_their_onset():
    assert find_sink_onset(trace_with(0.1, 0.4, 0.1, 0.5, 0.6, 0.5, 0.1)).unbroken_layer == 3


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


def test_even_attention_by_hand():
    assert even_attention(2) == pytest.approx(1 / 2)
    assert even_attention(4) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


# --- `melens.analysis.sinks` by hand: 7 blocks, of which the last two count apart; block 2 is the ME layer ------------


@pytest.fixture
def sinks_of(monkeypatch):
    """Analyse inputs of these sink masses by block, mean over two heads; there are no sink rates, ranks and inputs."""
    maps = melens.Trace({"n_layers": 7}, pd.DataFrame(), {}, {"attention_maps": torch.full((1, 2, 2, 8, 8), 0.25)})
    monkeypatch.setattr(attention_sinks, "trace", lambda *told, **options: maps)
    monkeypatch.setattr(attention_inputs, "compare_inputs", lambda study: ({}, pd.DataFrame()))
    monkeypatch.setattr(attention_sinks.sink_rate, "probes", lambda model: [])
    monkeypatch.setattr(attention_sinks.sink_rate, "measure_sink_rate", lambda trace: {})
    monkeypatch.setattr(attention_sinks.sink_rate, "sink_rate_by_block", lambda trace: pd.DataFrame())
    monkeypatch.setattr(attention_sinks.sink_rate, "sink_rate_figure", lambda *told: None)

    def analyse(masses, n_tokens=40, me_layer=2, born=None, first_tokens=None):
        heads = []
        for head, shift in ((0, -0.05), (1, 0.05)):
            of_head = [[None if mass is None else mass + shift for mass in of_input] for of_input in masses]
            heads.append(table(head=head, sink_mass=of_head))
        born = born or [(me_layer, 0)] * len(masses)
        told = {"first_tokens": first_tokens, "n_tokens": [n_tokens] * len(masses)}
        study = study_by_hand(me_layer, born=born, tables={"sink_mass": pd.concat(heads)}, **told)
        return melens.analysis.sinks(study)

    return analyse


TEXTBOOK = [0.06, 0.095, 0.079, 0.485, 0.2, 0.2, 0.2]
LATE = [0.05, 0.05, 0.05, 0.1, 0.6, 0.6, 0.6]
EARLY = [0.05, 0.5, 0.5, 0.6, 0.6, 0.6, 0.6]
CAME_AND_WENT = [0.5, 0.05, 0.05, 0.6, 0.6, 0.6, 0.6]
NEVER = [0.1] * 7


@pytest.mark.parametrize(
    ("masses", "expected", "share"),
    [
        ([TEXTBOOK] * 17, "holds", 1.0),
        ([TEXTBOOK] * 16, "holds in part", 1.0),  # 16 of 16 reach down to 0.79
        ([TEXTBOOK] * 34 + [LATE] * 2, "holds", 34 / 36),
        ([TEXTBOOK] * 33 + [LATE] * 3, "holds in part", 33 / 36),
        ([TEXTBOOK] * 8 + [LATE] * 9, "does not hold", 8 / 17),
        ([LATE] * 17, "does not hold", 0.0),
        ([EARLY] * 17, "does not hold", 0.0),
        ([[0.05, 0.05, 0.5, 0.6, 0.6, 0.6, 0.6]] * 17, "does not hold", 0.0),  # in the ME layer itself
        ([NEVER] * 17, "does not hold", 0.0),
        ([CAME_AND_WENT] * 17, "holds in part", 0.0),
        ([CAME_AND_WENT] * 13 + [LATE] * 4, "does not hold", 0.0),  # 13 of 17 are 0.76
    ],
)
def test_a_sink_emerges_where_it_is_first(sinks_of, masses, expected, share):
    judged = sinks_of(masses).claims.set_index("id").loc["sink-next"]
    assert (judged.verdict, judged.value) == (expected, pytest.approx(share))


def test_the_former_verdict_on_sinks_is_shown(sinks_of):
    former = {
        name: sinks_of([mass] * 17).claims.set_index("id").loc["sink-next"].former_verdict
        for name, mass in {"dips": TEXTBOOK, "stays": [0.1] * 3 + [0.6] * 4, "before": CAME_AND_WENT}.items()
    }
    assert former == {"dips": "does not hold", "stays": "holds", "before": "holds in part"}


def test_it_says_where_the_first_sink_of_each_input_is(sinks_of):
    result = sinks_of([CAME_AND_WENT] * 3 + [NEVER] + [LATE] * 2)
    assert result.metrics.first_sinks == {"0": 3, "4": 2, "none": 1}
    found = "First sink of the 6 prompts that agree on the ME layer: block 0 in 3, block 4 in 2, none in 1."
    assert found in str(result)
    assert "None of the 3 prompts that agree on the ME layer has a sink." in str(sinks_of([NEVER] * 3))


def test_prompts_that_share_their_first_token_count_as_one_input(sinks_of):
    masses = [TEXTBOOK] * 15 + [EARLY, LATE, CAME_AND_WENT]
    metrics = sinks_of(masses, first_tokens=[10] * 15 + [11, 12, 12]).metrics
    assert metrics.sink_inputs == 3
    assert metrics.sink_mass_after == pytest.approx((0.485 + 0.6 + (0.1 + 0.6) / 2) / 3)
    assert metrics.sink_rises_next == pytest.approx(2 / 3)  # the last two are 0.35 in block 3, and 0.275 before
    of_one = sinks_of([TEXTBOOK] * 17, first_tokens=[10] * 17).claims.set_index("id").loc["sink-next"]
    assert of_one.verdict == "holds in part"


def test_prompts_whose_massive_token_is_born_elsewhere_do_not_count(sinks_of):
    metrics = sinks_of([TEXTBOOK, TEXTBOOK, EARLY], born=[(2, 0), (2, 0), (4, 0)]).metrics
    assert (metrics.sink_inputs, metrics.sink_rises_next) == (2, 1.0)


def test_even_attention_is_no_sink_in_a_short_prompt(sinks_of):
    mass = [0.4, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6]  # in a prompt of 10 tokens even attention is 0.21
    assert sinks_of([mass] * 17, n_tokens=10).claims.set_index("id").verdict["sink-next"] == "holds"
    assert sinks_of([mass] * 17, n_tokens=18).claims.set_index("id").verdict["sink-next"] == "holds in part"


def test_the_mass_of_both_blocks_has_students_interval(sinks_of):
    metrics = sinks_of([[0.1, 0.1, at, 0.5, 0.5, 0, 0] for at in (0.1, 0.2, 0.3)]).metrics
    reach = 4.302653 * 0.1 / 3**0.5
    assert metrics.sink_mass_at_me_layer == pytest.approx(0.2)
    assert metrics.sink_mass_at_me_layer_interval == pytest.approx((0.2 - reach, 0.2 + reach))
    assert (metrics.sink_mass_after, metrics.sink_mass_after_interval) == (0.5, pytest.approx((0.5, 0.5)))


@pytest.mark.parametrize(
    ("mass", "at_me", "blocks"),
    [
        (TEXTBOOK, "does not hold", "holds in part"),  # one of two blocks behind
        (EARLY, "holds", "holds"),
        (LATE, "does not hold", "holds in part"),
        (NEVER, "does not hold", "does not hold"),
        ([0.1, 0.1, None, 0.5, 0.5, 0.5, 0.5], "not measured", "holds"),
    ],
)
def test_a_sink_at_the_me_layer_and_sinks_behind_it_are_claims_of_their_own(sinks_of, mass, at_me, blocks):
    verdicts = sinks_of([mass] * 17).claims.set_index("id").verdict
    assert (verdicts["sink-at-me"], verdicts["sink-blocks"]) == (at_me, blocks)


def test_three_inputs_that_are_all_alike_show_nothing_of_others(sinks_of):
    verdicts = sinks_of([EARLY] * 3).claims.set_index("id").verdict
    assert (verdicts["sink-at-me"], verdicts["sink-blocks"]) == ("holds in part", "holds in part")


def test_in_prompts_of_four_tokens_even_attention_is_no_sink_in_the_me_layer(sinks_of):
    rows = sinks_of([[0.36] * 7] * 17, n_tokens=4).claims.set_index("id")
    assert rows.verdict["sink-at-me"] == "does not hold"
    assert "The mean sink mass there is 0.36." in rows.note["sink-at-me"]


def test_most_inputs_must_have_sinks_in_nearly_all_blocks_behind(sinks_of):
    judged = sinks_of([EARLY] * 12 + [LATE] * 5).claims.set_index("id").loc["sink-blocks"]
    assert (judged.verdict, judged.value) == ("holds in part", pytest.approx(12 / 17))
    assert "It is in 85% of these blocks, mean over inputs." in judged.note


def test_earlier_sinks_that_are_gone_at_the_me_layer_are_told_with_their_share(sinks_of):
    judged = sinks_of([CAME_AND_WENT] * 16 + [LATE]).claims.set_index("id").loc["sink-next"]
    assert "Earlier ones are gone in the ME layer and back in the next in 94%." in judged.note


def test_where_nothing_before_attends_a_sink_need_not_be_new(sinks_of):
    judged = sinks_of([[None, None, None, 0.5, 0.5, 0.5, 0.5]] * 17).claims.set_index("id").loc["sink-next"]
    assert judged.verdict == "not measured"
    assert judged.note == "No block up to the ME layer has attention: a sink in block 3 need not be new."


def test_of_a_hybrid_the_next_block_with_attention_counts(sinks_of):
    judged = sinks_of([[0.1, None, None, None, 0.5, None, 0.5]] * 17).claims.set_index("id").loc["sink-next"]
    assert (judged.verdict, judged.value) == ("holds", 1.0)
    assert "The next block with attention is 4." in judged.note
