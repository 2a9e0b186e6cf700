"""What the last blocks do to the massive state, of states made by hand in two dims, and of a planted model."""

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import study_by_hand, table
from planted import bridge, plain_model, plant

import melens
from melens.analysis.trailing_blocks import find_trailing_blocks, follow_last_blocks

PLATEAU = [(0.1, 0.0), (0.1, 0.0), (100.0, 0.0), (100.0, 0.0), (100.0, 0.0)]  # massive from block 2 on, in dim 0


def study(*last, others=1.0, n_prompts=3, writes=None, **options):
    """Prompts alike, whose state after the last blocks is as given; the other tokens have that norm."""
    states = torch.tensor([*PLATEAU, *last]).expand(n_prompts, -1, -1)[:, :, None]
    n_layers = states.shape[1]
    norms = [
        table(site="hook_resid_post", pos=0, norm=states[:, :, 0].norm(dim=-1).tolist()),
        table(site="hook_resid_post", pos=1, norm=[[others] * n_layers] * n_prompts),
        table(site="hook_mlp_out", pos=0, norm=[[1.0] * n_layers] * n_prompts),
    ]
    tensors = {"token_vectors": states}
    if writes is not None:
        tensors["ffn_writes"] = torch.tensor(writes).expand(n_prompts, -1, -1)[:, :, None]
    tables = {
        "norm": pd.concat(norms, ignore_index=True),
        "sink_mass": table(head=0, sink_mass=[[0.1] * n_layers] * n_prompts),
    }
    return study_by_hand(2, n_prompts=n_prompts, tables=tables, tensors=tensors, n_layers=n_layers, **options)


def judged(given):
    return melens.analysis.emergence(given).claims.set_index("id").loc["second-massive"]


@pytest.mark.parametrize(
    ("last", "layer", "second", "erased", "verdict"),
    [
        (((100.0, 50.0), (100.0, 40.0)), 5, 0.5, 0, "holds"),  # another dim
        (((100.0, 0.0), (400.0, 0.0)), 6, 3, 0, "holds"),  # the same, along it
        (((-50.0, 0.0), (-150.0, 0.0)), 6, 1.5, 1, "holds"),  # turned around, and larger
        (((40.0, 0.0), (20.0, 10.0)), 6, 0.1, 0.8, "does not hold"),  # the first one is erased
        (((100.0, 9.0), (100.0, 9.0)), 5, 0.09, 0, "does not hold"),  # little is written
        (((50.0, 25.0), (50.0, 50.0)), 6, 0.5, 0.5, "holds"),  # as much is made as is erased
        (((60.0, 30.0), (60.0, 39.0)), 6, 0.39, 0.4, "does not hold"),
        (((100.0, 60.0), (10.0, 15.0)), 5, 0.6, 0.9, "does not hold"),  # something new, then the first one is erased
    ],
)
def test_what_is_new_is_told_from_what_is_left(last, layer, second, erased, verdict):
    given = study(*last)
    found = follow_last_blocks(given)
    assert found.layer == layer
    assert (found.second, found.erased) == pytest.approx((second, erased), abs=1e-6)
    assert judged(given).verdict == verdict


def test_a_second_one_that_is_no_order_of_magnitude_over_the_other_tokens_holds_in_part():
    assert judged(study((100.0, 50.0), (100.0, 50.0), others=5.0)).verdict == "holds"
    row = judged(study((100.0, 50.0), (100.0, 50.0), others=5.1))
    assert row.verdict == "holds in part"
    assert "The new part is largest after block 5, × 9.8 the other tokens." in row.note


def test_more_than_two_trailing_blocks_hold_in_part_and_are_told():
    given = study((100.0, 0.0), (100.0, 80.0), (100.0, 80.0), (100.0, 80.0))  # nine blocks: 7 and 8 count apart
    result = melens.analysis.emergence(given)
    assert (result.metrics.trailing_from, result.metrics.second_norm) == (6, pytest.approx(0.8))
    assert result.claims.set_index("id").verdict["second-massive"] == "holds in part"
    assert "They are 3; elsewhere 2 count apart" in dict(result.findings)["last blocks"]


def test_nothing_is_measured_without_an_me_layer_a_plateau_or_on_another_token():
    last = ((100.0, 50.0), (100.0, 50.0))
    assert follow_last_blocks(study(*last, born=[(2, 3)] * 3)) is None
    given = study(*last, formed=5)
    assert follow_last_blocks(given) is None
    row = judged(given)
    assert (row.verdict, row.note) == (
        "not measured",
        "No block lies between that which forms the state and the last two.",
    )


def test_one_state_is_no_plain_yes():
    assert judged(study((100.0, 50.0), (100.0, 50.0), first_tokens=[8, 8, 8])).verdict == "holds in part"


def test_a_single_trailing_block_is_told_in_the_singular():
    found = follow_last_blocks(study((100.0, 0.0), (20.0, 1.0)))
    assert found.in_words(7, 2).startswith("block 6 erases the massive activation: 80% of its norm is gone")


def test_who_writes_against_it():
    """Of the first one 60 are erased in block 5, 50 of them by its FFN, and 20 in block 6, all by its FFN."""
    writes = [(0.0, 0.0)] * 5 + [(-50.0, 7.0), (-20.0, 0.0)]
    found = follow_last_blocks(study((40.0, 10.0), (20.0, 10.0), writes=writes))
    assert found.layer == 5  # equally much is new after both
    assert (found.written, found.written_by_ffn) == pytest.approx((-0.6, -0.5))
    assert found.write_cosine == pytest.approx(-60 / np.hypot(60, 10))
    by_block = found.by_block.set_index(["quantity", "layer"])["mean"]
    assert by_block["written", 6] == by_block["written_by_ffn", 6] == pytest.approx(-0.2)
    assert by_block["norm", 5] == pytest.approx(np.hypot(0.4, 0.1))
    said = found.in_words(7, 2)
    assert said.startswith(
        "blocks 5 to 6 erase the massive activation: 80% of its norm is gone, and what is new is 10% of it after"
    )
    assert "of which their FFNs -0.50 (the cosine of the whole with it is -0.99)." in said
    assert "elsewhere" not in said


@pytest.mark.parametrize(
    ("norms", "begin"),
    [
        ((1, 100, 100, 100, 100, 40, 20), 5),
        ((1, 100, 100, 100, 40, 30, 20), 4),  # earlier than the two that count apart
        ((1, 100, 100, 100, 100, 100, 300), 6),
        ((1, 100, 100, 100, 100, 111, 112), 5),
        ((1, 100, 100, 100, 100, 109, 109), None),
        ((1, 100, 100, 100, 100, 50, 100), None),  # it comes back
        ((1, 100, 105, 110, 115, 120, 126), None),  # a drift is no step
        ((1, 100, 100, 100, 50, 100, 20), 6),  # a dip that is over does not count
    ],
)
def test_trailing_blocks_begin_where_the_norm_leaves_its_plateau_for_good(norms, begin):
    assert find_trailing_blocks(np.array([norms, norms], dtype=float), range(1, 5)) == begin


def test_a_planted_model_erases_what_it_made_or_makes_another():
    """One neuron of block 0 writes dim 21; one of the last block reads it and writes 80% of it back, or to dim 40."""
    network = plain_model("llama")
    plant(network, block=0, token=7, dim=21)
    model, criterion = bridge(network), melens.Criterion(trailing_blocks=1)
    last = model.original_model.model.layers[3].mlp
    with torch.no_grad():
        last.down_proj.weight[:, 0] = 0
        for projection in (last.gate_proj, last.up_proj):
            projection.weight[0] = 0
            projection.weight[0, 21] = 1
    state = melens.study(model, [torch.arange(7, 10)], criterion=criterion).trace.tensors["token_vectors"][0, 2, 0, 21]
    neuron = torch.nn.functional.silu(torch.tensor(8.0)) * 8  # a norm of √64 in a single dim
    found = {}
    for dim, share in ((21, -0.8), (40, 0.8)):
        with torch.no_grad():
            last.down_proj.weight[:, 0] = 0
            last.down_proj.weight[dim, 0] = share * state / neuron
        found[dim] = follow_last_blocks(melens.study(model, [torch.arange(7, 10)], criterion=criterion))
    assert (found[21].found, found[21].what) == (3, "erase the massive activation")
    assert found[21].written_by_ffn == pytest.approx(-0.8, abs=0.02)
    assert (found[40].found, found[40].what) == (3, "make a second one")
    assert (found[40].second, found[40].erased) == pytest.approx((0.8, 0), abs=0.02)
