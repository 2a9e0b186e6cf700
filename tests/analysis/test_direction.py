"""Figure 5 of a study made by hand: token 0's states in two dims, by norm and angle, with every metric worked out."""

import math

import numpy as np
import pytest
import torch
from handmade import study_by_hand

import melens

ME_LAYER = 2  # massive in blocks 2, 3 and 4; the last two count apart


def states(norms, degrees):
    """Vectors `[prompt, layer, pos, dim]` of token 0, by prompt and block."""
    norms, angles = torch.tensor(norms), torch.deg2rad(torch.tensor(degrees))
    return torch.stack([norms * angles.cos(), norms * angles.sin()], dim=-1)[:, :, None]


NORMS = [
    [1.0, 2.0, 100.0, 90.0, 105.0, 9.0, 1.0],  # changes by 10%, then by 5%
    [1.0, 2.0, 200.0, 260.0, 240.0, 9.0, 1.0],  # by 30%, then by 20%
    [1.0, 2.0, 100.0, 100.0, 100.0, 9.0, 1.0],
    [1.0, 2.0, 3.0, 100.0, 100.0, 9.0, 1.0],  # massive from block 3 on: it is another phenomenon
]
DEGREES = [
    [0.0, 90.0, 0.0, 60.0, 30.0, 180.0, 0.0],
    [60.0, 90.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [60.0, 90.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [180.0] * 7,
]


@pytest.fixture(scope="module")
def result():
    born = [(2, 0), (2, 0), (2, 0), (3, 0)]
    return melens.analysis.direction(
        study_by_hand(ME_LAYER, born=born, tensors={"token_vectors": states(NORMS, DEGREES)})
    )


def test_the_drift_is_the_largest_change_of_the_norm_since_the_me_layer(result):
    assert result.metrics.norm_drift == pytest.approx((0.1 + 0.3 + 0) / 3, rel=1e-5)
    error = 4.303 * math.sqrt((0.1**2 + 0.3**2 - 0.4**2 / 3) / 2 / 3)  # Student's t of two degrees of freedom
    assert result.metrics.norm_drift_interval == pytest.approx((0.4 / 3 - error, 0.4 / 3 + error), rel=1e-3)


def test_consecutive_states_are_compared_from_the_block_after_the_me_layer_on(result):
    """In the ME layer itself the direction turns by 90 degrees, in the last two blocks by 180."""
    assert result.metrics.consecutive_cosine == pytest.approx((0.5 + 1 + 1) / 3)


def test_inputs_are_compared_where_they_differ_most(result):
    """In block 3 prompt 0 is 60 degrees from both others: of the three pairs the cosines are 0.5, 0.5 and 1."""
    assert result.metrics.cosine == pytest.approx(2 / 3)
    assert result.metrics.least_cosine == pytest.approx(0.5)
    assert result.metrics.cosine_before == pytest.approx((2 / 3 + 1) / 2)


def test_the_table_has_every_block(result):
    by_block = result.tables["direction_by_block"].set_index(["quantity", "layer"])["mean"]
    assert by_block["norm", 2] == pytest.approx(400 / 3)
    assert by_block["norm_cv", 2] == pytest.approx(math.sqrt(10_000 / 3) / (400 / 3), rel=1e-5)
    assert by_block["cosine_between_inputs", 3] == pytest.approx(2 / 3)
    assert by_block["least_cosine_between_inputs", 5] == pytest.approx(-1)
    assert by_block["cosine_to_previous_block", 2] == pytest.approx(0, abs=1e-6)
    assert ("cosine_to_previous_block", 0) not in by_block.index


def test_the_verdicts(result):
    verdicts = result.claims.set_index("id").verdict.to_dict()
    assert verdicts == {
        "norm-stable": "holds in part",
        "direction-layers": "does not hold",
        "direction-inputs": "does not hold",
    }


CLIMB = [[1.0, 2.0, 50.0, 100.0, 105.0, 9.0, 1.0]] * 3


def test_once_formed_counts_from_the_block_that_ends_the_climb():
    """From block 3 the norm changes by 5%, from the ME layer by 110%; in block 3 the direction turns by 60 degrees."""
    turning = [[0.0, 0.0, 0.0, 60.0, 60.0, 60.0, 60.0]] * 3
    given = study_by_hand(ME_LAYER, n_prompts=3, formed=3, tensors={"token_vectors": states(CLIMB, turning)})
    result = melens.analysis.direction(given)
    assert (result.metrics.norm_drift, result.metrics.norm_drift_since_me) == pytest.approx((0.05, 1.1), rel=1e-5)
    assert result.metrics.consecutive_cosine == pytest.approx(1)
    assert result.metrics.consecutive_cosine_since_me == pytest.approx(0.5)
    claims = result.claims.set_index("id")
    assert claims.verdict[["norm-stable", "direction-layers"]].eq("holds").all()
    assert claims.former_verdict[["norm-stable", "direction-layers"]].eq("does not hold").all()
    assert result.findings[0][1].startswith("From block 3, which forms it, to the last two blocks")


def test_inputs_are_compared_from_the_block_that_forms_the_state():
    apart = [[0.0, 0.0, angle, 0.0, 0.0, 0.0, 0.0] for angle in (0.0, 60.0, 120.0)]
    given = study_by_hand(ME_LAYER, n_prompts=3, formed=3, tensors={"token_vectors": states(CLIMB, apart)})
    result = melens.analysis.direction(given)
    assert (result.metrics.cosine, result.metrics.cosine_since_me) == pytest.approx((1, (0.5 + 0.5 - 0.5) / 3))
    judged = result.claims.set_index("id").loc["direction-inputs"]
    assert (judged.verdict, judged.former_verdict) == ("holds", "does not hold")


def test_where_the_norm_leaves_its_plateau_before_the_last_two_blocks_the_note_says_what_it_was_till_then():
    """Nine blocks, of which the last two count apart: block 6 takes nine tenths of the norm away."""
    norms = [[1.0, 2.0, 100.0, 102.0, 101.0, 100.0, 10.0, 9.0, 1.0]] * 3
    tensors = {"token_vectors": states(norms, [[0.0] * 9] * 3)}
    result = melens.analysis.direction(study_by_hand(ME_LAYER, n_prompts=3, n_layers=9, tensors=tensors))
    assert (result.metrics.norm_drift, result.metrics.plateau_end) == (pytest.approx(0.9), 6)
    assert result.metrics.norm_drift_on_plateau == pytest.approx(0.02)
    judged = result.claims.set_index("id").loc["norm-stable"]
    assert judged.verdict == "does not hold"
    assert judged.note == "From block 6 on the norm is off its plateau, on which it changes by 0.02."


def test_the_figures_show_who_is_compared(result):
    assert list(result.figures["cosine_by_block"].plot.data[0].z[:, 3]) == pytest.approx([0.5, 0.75, 0.75])
    assert result.figures["dims_by_block"].observed == (
        "The largest dim is 1 after block 1, 0 after block 2, 0 after block 3, 0 after block 6."
    )
    assert "3 distinct first tokens." in result.figures["norms"].observed


def test_one_first_token_makes_it_trivial():
    """Prompts that share it have the same states, of which one is compared with none."""
    same = states([NORMS[0]] * 2, [DEGREES[0]] * 2)
    result = melens.analysis.direction(study_by_hand(ME_LAYER, first_tokens=[8, 8], tensors={"token_vectors": same}))
    assert (result.metrics.cosine, result.metrics.norm_drift) == (1, pytest.approx(0.1, rel=1e-5))
    assert np.isnan(result.metrics.norm_drift_interval).all()
    assert result.claims.set_index("id").verdict["direction-inputs"] == "trivial here"
    for figure in ("norms", "dims_by_block", "cosine_by_block", "between_blocks"):
        assert "trivial by construction" in result.figures[figure].plot.layout.title.text


OF_INPUTS = {"cosine", "cosine_interval", "cosine_since_me", "cosine_since_me_interval"}


@pytest.mark.parametrize(
    ("me_layer", "measured"),
    [
        (None, set()),
        (4, {*OF_INPUTS, "cosine_before", "least_cosine"}),
        (5, set()),
    ],
)
def test_what_has_no_block_to_be_seen_in_is_not_measured(me_layer, measured):
    study = study_by_hand(me_layer, n_prompts=4, tensors={"token_vectors": states(NORMS, DEGREES)})
    result = melens.analysis.direction(study)
    assert set(result.metrics.plain()) - set(study.shared_metrics) == measured
    assert "no massive state to follow" in result.findings[0][1]


def test_before_the_first_block_there_is_none():
    study = study_by_hand(0, n_prompts=4, tensors={"token_vectors": states(NORMS, DEGREES)})
    assert melens.analysis.direction(study).metrics.cosine_before is None
