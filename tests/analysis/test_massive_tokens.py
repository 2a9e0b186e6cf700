"""Which tokens `massive_tokens` keeps: its thresholds against traces made by hand, and against planted models."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import study_by_hand, tiny_model
from planted import D_MODEL, FAMILIES, bridge, gains_apart, plain_model, plant

import melens
from melens import MelensError

WIDTH = 16
"""Of the models made by hand."""


def trace_by_hand(largest, *, median=0.01, n_tokens=8):
    """A trace in which `largest[layer][prompt]` lists (pos, dim, value) of what is kept of that prompt there."""
    n_prompts, kept = 2, [(0, 0, 1.0), (1, 0, 1.0)]
    rows = [
        {"prompt": prompt, "layer": layer, "site": "hook_resid_post", "rank": rank, "pos": pos, "dim": dim, "value": h}
        for layer in range(7)
        for prompt in range(n_prompts)
        for rank, (pos, dim, h) in enumerate(largest.get(layer, [kept] * n_prompts)[prompt])
    ]
    medians = [
        {"prompt": prompt, "layer": layer, "site": "hook_resid_post", "abs_median": median}
        for layer in range(7)
        for prompt in range(n_prompts)
    ]
    tables = {"largest": pd.DataFrame(rows), "abs_median": pd.DataFrame(medians)}
    return study_by_hand(2, n_prompts=n_prompts, tables=tables, n_tokens=[n_tokens] * n_prompts).trace


APART = {
    2: [
        [(0, 5, -4_000.0), (0, 7, 300.0), (3, 1, 9.0)],  # the token's second massive entry changes nothing
        [(0, 5, 2_500.0), (0, 7, 2.0), (6, 2, -25.0)],
    ]
}


def states(*largest, dim=5, dtype=torch.float32):
    """One text whose tokens have these entries in a dim, and 1 in all others."""
    hidden = torch.ones(1, len(largest), WIDTH, dtype=dtype)
    hidden[0, :, dim] = torch.tensor(largest, dtype=dtype)
    return hidden


# --- Thresholds -------------------------------------------------------------------------------------------------------


def test_the_threshold_is_half_way_between_the_largest_other_and_the_smallest_massive_token():
    keep = melens.massive_tokens(trace_by_hand(APART))
    block = keep.blocks[2]
    assert list(keep.blocks) == [2]
    assert (block.n_massive, block.dims, block.largest_other, block.smallest_massive) == (2, (5, 7), 25.0, 2_500.0)
    assert block.margin == 100
    assert keep.threshold(2) == 250  # √(25 · 2,500)
    assert block.margin == pytest.approx((block.smallest_massive / keep.threshold(2)) ** 2)
    assert keep.threshold(1) == math.inf
    assert (keep.n_prompts, keep.distinct_first_tokens) == (2, 2)


def test_both_sides_of_the_threshold_and_both_signs():
    keep = melens.massive_tokens(trace_by_hand(APART))
    assert keep(states(249.9, 250.1, -249.9, -250.1), 2).tolist() == [[True, False, True, False]]
    assert keep(states(9_999.0), 1).tolist() == [[True]]
    assert keep(states(9_999.0, dim=9), 2).tolist() == [[False]]  # whatever the dim


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_precision_and_any_shape(dtype):
    keep = melens.massive_tokens(trace_by_hand(APART))
    hidden = states(1.0, 300.0, 200.0, dtype=dtype)
    assert keep(hidden, 2).tolist() == [[True, False, True]]
    assert keep(hidden[0], np.int64(2)).tolist() == [True, False, True]
    assert keep(hidden[0, 1], 2).item() is False
    assert keep(hidden[:, :0], 2).shape == (1, 0)
    assert not keep(hidden.requires_grad_(), 2).requires_grad


def test_padding_is_not_kept_in_any_block():
    keep = melens.massive_tokens(trace_by_hand(APART))
    mask = torch.tensor([[0, 1, 1]])
    assert keep(states(1.0, 1.0, 999.0), 2, mask).tolist() == [[False, True, False]]
    assert keep(states(1.0, 1.0, 999.0), 0, attention_mask=mask.bool()).tolist() == [[False, True, True]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_a_gpu():
    keep = melens.massive_tokens(trace_by_hand(APART))
    hidden, mask = states(1.0, 300.0).cuda(), torch.ones(1, 2).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = [keep(hidden, layer, mask) for layer in (1, 2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [each.is_cuda for each in kept] == [True, True]
    assert [each.tolist() for each in kept] == [[[True, True]], [[True, False]]]


def test_a_broken_state_stays_in_view_and_an_overflow_is_massive():
    keep = melens.massive_tokens(trace_by_hand(APART))
    assert keep(states(float("nan"), float("inf"), 1.0), 2).tolist() == [[True, False, True]]


def test_other_tokens_that_the_trace_does_not_keep_count_with_what_they_may_have():
    """All of prompt 0 that is kept is massive; its other tokens are below the 100 that a trace keeps any from."""
    largest = {2: [[(0, 5, 4_000.0), (1, 5, 3_600.0)], [(0, 5, 4_900.0), (1, 2, 3.0)]]}
    assert melens.massive_tokens(trace_by_hand(largest)).blocks[2].largest_other == 100
    everything = {2: [[(0, 5, 4_000.0)], [(0, 5, 4_900.0)]]}
    assert melens.massive_tokens(trace_by_hand(everything)).threshold(2) == pytest.approx(math.sqrt(100 * 4_000))


def test_a_block_where_they_are_not_apart_is_refused():
    """With a median of 0.3 an entry over 300 is massive; 201 is more than half of 400."""
    apart, near = ([[(0, 5, 400.0), (3, 1, other)]] * 2 for other in (200.0, 201.0))
    keep = melens.massive_tokens(trace_by_hand({2: near, 4: apart}, median=0.3))
    assert keep.threshold(4) == pytest.approx(math.sqrt(400 * 200))
    sentence = r"cannot be told .* block 2 .* 400, the largest other 201, and 2 times .* can in block 4\. .*min_ratio"
    with pytest.raises(MelensError, match=sentence):
        keep(states(1.0), 2)
    assert repr(keep) == "Massive tokens of by hand: |h| > 283 behind block 4; not told from others behind block 2"
    nowhere = melens.massive_tokens(trace_by_hand({2: near}, median=0.3))
    assert repr(nowhere) == "Massive tokens of by hand: none are told; not told from others behind block 2"


def test_a_model_without_massive_tokens_keeps_all_and_says_so():
    with pytest.warns(UserWarning, match=r"by hand has no massive activation in 2 prompts \(the largest \|h\| is 1\)"):
        keep = melens.massive_tokens(trace_by_hand({}))
    assert keep(states(1e9, 1.0), 3).all()
    assert repr(keep) == "Massive tokens of by hand: none"


def test_the_criterion_of_the_study_counts_unless_another_is_given():
    trace = trace_by_hand({2: [[(0, 5, 150.0), (1, 1, 2.0)]] * 2})
    study = study_by_hand(2, tables=trace.tables)
    strict = melens.Criterion(min_abs=200)
    assert 2 in melens.massive_tokens(study).blocks
    with pytest.warns(UserWarning, match="no massive activation"):
        assert melens.massive_tokens(study, strict).blocks == {}
    with pytest.warns(UserWarning, match="no massive activation"):
        assert melens.massive_tokens(replace(study, me=replace(study.me, criterion=strict))).criterion == strict


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_saved_one_is_the_same_and_its_json_can_be_used_without_melens(tmp_path):
    keep = melens.massive_tokens(trace_by_hand(APART), melens.Criterion(min_ratio=500))
    path = keep.save(tmp_path / "keep.json")
    loaded = melens.MassiveTokens.load(str(path))
    assert loaded == keep
    assert loaded(states(249.0, 251.0), 2).tolist() == [[True, False]]
    content = json.loads(path.read_text())
    assert content["blocks"]["2"]["threshold"] == keep.threshold(2)
    assert content["criterion"]["min_ratio"] == 500


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"name": "m"}}', None])
def test_a_file_that_is_none_is_told(tmp_path, text):
    path = tmp_path / "keep.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MelensError, match=r"keep\.json (cannot be read|is no file that)"):
        melens.MassiveTokens.load(path)


def test_wrong_arguments_are_told(tmp_path):
    keep = melens.massive_tokens(trace_by_hand(APART))
    wrong = {
        "width": lambda: keep(torch.ones(1, 3, 5), 2),
        r"floats \[\*batch, 16\]": lambda: keep(torch.ones(1, 3, WIDTH, dtype=torch.long), 2),
        "hidden is .*; it must be a tensor": lambda: keep([[1.0]], 2),
        "attention_mask has the shape": lambda: keep(states(1.0, 2.0), 2, torch.ones(2)),
        "has no block 7: its blocks are 0 to 6": lambda: keep(states(1.0), 7),
        "a block, counted from 0": lambda: keep(states(1.0), "blocks.2.hook_resid_post"),
        "There is no folder": lambda: keep.save(tmp_path / "none" / "keep.json"),
        "source is .*a study, a trace, or a TransformerBridge": lambda: melens.massive_tokens(tiny_model),
    }
    for sentence, call in wrong.items():
        with pytest.raises(MelensError, match=sentence):
            call()


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_tokens_are_left_out_wherever_they_stand(family):
    """Token 7 is massive from block 1 on, in new texts too; what the criterion says of each text is the truth."""
    network = gains_apart(plain_model(family))
    plant(network, block=1, token=7, dim=5)
    model = bridge(network)
    keep = melens.massive_tokens(melens.study(model, [[7, 20, 21, 22, 23], [30, 31, 32, 7, 33], [40, 7, 42, 43, 44]]))
    assert keep.blocks[1].dims[0] == 5
    assert keep.model["d_model"] == D_MODEL
    texts = torch.tensor([[50, 51, 7, 52, 53, 7], [7, 7, 60, 61, 62, 63], [70, 71, 72, 73, 74, 75]])
    _, cache = model.run_with_cache(texts)
    for layer in range(len(model.blocks)):
        hidden = cache[f"blocks.{layer}.hook_resid_post"]
        size, median = hidden.abs().amax(-1), hidden.abs().flatten(1).median(-1).values[:, None]
        is_massive = (size > 100) & (size > 1_000 * median)
        assert keep(hidden, layer).equal(~is_massive), layer
        assert is_massive.any().item() is (layer >= 1)


def test_a_model_alone_is_traced_on_prompts_of_the_project():
    network = gains_apart(plain_model("llama"))
    plant(network, block=2, token=7, dim=5)
    keep = melens.massive_tokens(bridge(network))  # without a tokenizer: random tokens, whose firsts are distinct
    assert keep.distinct_first_tokens == keep.n_prompts == 36
    assert keep.blocks[2].dims[0] == 5
    assert keep.blocks[2].n_massive >= 1
