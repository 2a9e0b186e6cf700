"""The sink rate of Gu et al. (2024), against values worked out by hand."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

import melens
from melens import MelensError
from melens.analysis.sink_rate import SinkRateMetrics, measure_sink_rate, sink_rate_by_block, sink_rate_in_words

LENGTHS = (64, 20, 80)


def trace_of(off=0.0):
    """Three prompts, two blocks of two heads; the second prompt is too short for a rate, and its keys for others."""
    prompts = pd.DataFrame({"prompt": [0, 1, 2], "n_tokens": LENGTHS, "first_token_id": [5, 6, 5]})
    heads = [(prompt, layer, head) for prompt in (0, 1, 2) for layer in (0, 1) for head in (0, 1)]
    importance = pd.DataFrame(heads, columns=["prompt", "layer", "head"])
    importance["importance"] = [0.9, 0.29, 0.31, 0.3, *[float("nan")] * 4, 0.9, 0.9, 0.9, 0.1]
    keys = [(prompt, layer, pos) for prompt, n in enumerate(LENGTHS) for layer in (0, 1) for pos in range(n)]
    by_key = pd.DataFrame(keys, columns=["prompt", "layer", "pos"]).assign(share_of_heads=0.0)
    for prompt, layer, pos, share in ((0, 0, 7, 0.5), (0, 0, 60, 1.0), (0, 1, 0, 1.0), (2, 0, 3, 0.5), (2, 1, 3, 1.0)):
        at = (by_key.prompt == prompt) & (by_key.layer == layer) & (by_key.pos == pos)
        by_key.loc[at, "share_of_heads"] = share  # key 60 of prompt 0 is seen by four queries alone
    tables = {"importance": importance, "importance_by_key": by_key, "off_tokens": importance.assign(off_tokens=off)}
    return melens.Trace(model={"n_layers": 2}, prompts=prompts, tables=tables)


def test_the_rate_is_the_share_of_prompts_blocks_and_heads_over_the_threshold():
    measured = measure_sink_rate(trace_of())
    assert measured["sink_rate"] == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert measured["sink_rate_prompts"] == 2
    assert measured["sink_rate_elsewhere"] == pytest.approx((0.25 + 0 + 0.75) / 3)
    assert (measured["off_tokens"], measured["off_tokens_rate"]) == (0, 0)
    by_block = sink_rate_by_block(trace_of(off=0.4)).set_index("layer")
    assert by_block["sink_rate"].tolist() == [0.75, 0.5]
    assert by_block["elsewhere"].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert by_block["off_tokens_rate"].tolist() == [1, 1]


def test_short_prompts_alone_have_no_rate_and_nan_in_a_long_one_is_told():
    short = trace_of()
    short = replace(short, prompts=short.prompts.assign(n_tokens=20))
    measured = measure_sink_rate(short)
    assert measured["sink_rate_prompts"] == 0
    assert "sink_rate" not in measured
    long = replace(short, prompts=short.prompts.assign(n_tokens=64))
    with pytest.raises(MelensError, match="The importance of token 0 of block 0, head 0 is nan in prompt 1"):
        measure_sink_rate(long)


def test_a_learned_sink_is_told_where_there_is_one():
    told = sink_rate_in_words(SinkRateMetrics(**measure_sink_rate(trace_of(off=0.2))))
    assert told.endswith(" 0.200 of the attention goes to no token, and over 0.3 of it in 0.000 of all heads.")
    assert "learned" not in sink_rate_in_words(SinkRateMetrics(**measure_sink_rate(trace_of(off=1e-6))))


def test_an_importance_counts_the_keys_own_query_and_stops_at_the_first_tokens():
    attention = torch.tensor([[[0.0, 1.0, 0.5, 0.3, 0.9]]] * 2)[..., None]
    batch = melens.Batch(torch.zeros(2, 5, dtype=torch.long), lengths=(5, 3), prompts=(0, 1))
    found = melens.Importance(key=1, n_tokens=4).reduce(attention, batch)["importance"]
    assert found[0].tolist() == pytest.approx([(1 + 0.5 + 0.3) / 3])
    assert found[1].isnan().all()
    with pytest.raises(MelensError, match="The key at position 64 is not among the first 64 tokens"):
        melens.Importance(key=64)
