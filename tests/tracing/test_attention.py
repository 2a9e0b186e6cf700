import math

import pytest
import torch

from melens import MelensError
from melens.tracing import attended, attention
from melens.tracing.attended import FromPattern
from melens.tracing.attention import causal_attention


def reference(query, key, value, *, scale, window=None, softcap=None, sink_logits=None):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])[None]
    seen = (distance >= 0) & (distance < (window or query.shape[2]))
    scores = scores.masked_fill(~seen, -math.inf)
    if sink_logits is not None:
        column = sink_logits[None, :, None, None].expand(*scores.shape[:3], 1)
        pattern = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        pattern = scores.softmax(-1)
    return pattern @ value, pattern


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 37, 16, generator=generator) for heads in (6, 2, 2)]


VARIANTS = [
    {},
    {"window": 5},
    {"window": 36},
    {"softcap": 2.0},
    {"sink_logits": torch.linspace(-1, 3, 6)},
    {"window": 7, "softcap": 3.0, "sink_logits": torch.linspace(-1, 3, 6)},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("rows_in_a_chunk", [1, 4, 1000])
def test_output_and_columns_equal_the_pattern(qkv, options, rows_in_a_chunk, monkeypatch):
    monkeypatch.setattr(attended, "_CHUNK_BYTES", rows_in_a_chunk * 4 * 2 * 6 * 37)
    monkeypatch.setattr(attended, "_MOST_ROWS", 16)
    output, read = causal_attention(*qkv, scale=0.7, **options)
    expected, pattern = reference(*qkv, scale=0.7, **options)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.on_keys((0, 3, 20)), pattern[..., [0, 3, 20]], rtol=1e-5, atol=1e-6)
    for each in (read, FromPattern(pattern)):
        check_by_key(each.by_key(torch.tensor(N_TOKENS)), pattern, options.get("window"))


def test_what_no_key_gets_goes_to_the_learned_sink(qkv):
    logits = torch.linspace(-1, 3, 6)
    _, read = causal_attention(*qkv, scale=0.7, sink_logits=logits)
    on_tokens = read.by_key(torch.tensor([37, 37]))[..., 0].sum(-1) / 37
    torch.testing.assert_close(1 - on_tokens, torch.exp(logits[None, :, None] - read.logsumexp).mean(-1))


N_TOKENS = [37, 30]


def check_by_key(found, pattern, window):
    """Of two prompts, one with 7 tokens of padding, each key's sum and how many queries see it, counted one by one."""
    for row, n in enumerate(N_TOKENS):
        torch.testing.assert_close(found[row, ..., 0], pattern[row, :, :n].sum(1), rtol=1e-5, atol=1e-5)
        seen_by = [sum(0 <= at - of_key < (window or 37) for at in range(n)) for of_key in range(37)]
        assert found[row, 2, :, 1].tolist() == seen_by


@pytest.mark.parametrize("additive", [False, True])
def test_a_given_mask_alone_decides_what_is_seen(qkv, additive):
    seen = torch.ones(37, 37).tril().bool()
    seen[:, 5] = False
    seen[5, 5] = True
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if additive else seen
    _, read = causal_attention(*qkv, scale=0.3, mask=mask[None, None])
    on_keys = read.on_keys((5,))
    assert read.by_key(torch.tensor(N_TOKENS))[:, 0, [4, 5, 6], 1].tolist() == [[33, 1, 31], [26, 1, 24]]
    assert on_keys[:, :, 6:].abs().max() == 0
    assert on_keys[:, :, 5].min() > 0


def test_no_keys_gives_an_empty_column(qkv):
    assert causal_attention(*qkv, scale=1.0)[1].on_keys(()).shape == (2, 6, 37, 0)


def test_a_fused_kernel_that_raises_is_replaced_by_chunks(qkv, monkeypatch):
    def raises(*shapes):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(attention, "_fused_kernel", raises)
    output, read = causal_attention(*qkv, scale=0.7)
    expected, pattern = reference(*qkv, scale=0.7)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.on_keys((0,)), pattern[..., [0]], rtol=1e-5, atol=1e-6)


def test_values_of_another_width_than_the_keys_keep_it(qkv):
    query, key, value = qkv
    narrow = value[..., :12]
    output, _ = causal_attention(query, key, narrow, scale=0.7)
    torch.testing.assert_close(output, reference(query, key, narrow, scale=0.7)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "is_known"),
    [
        ({"position_ids": torch.arange(37), "use_cache": False, "is_causal": True, "position_bias": None}, True),
        ({"dropout": 0.0}, True),
        ({"dropout": 0.1}, False),
        ({"position_bias": torch.zeros(1)}, False),
        ({"is_causal": False}, False),
        ({"indices": torch.zeros(1)}, False),
    ],
)
def test_arguments_that_could_change_the_attention_are_refused_by_name(qkv, arguments, is_known):
    module = torch.nn.Module()
    if is_known:
        output, _ = attention._attention_function(module, *qkv, None, scaling=0.7, **arguments)
        torch.testing.assert_close(output.transpose(1, 2), reference(*qkv, scale=0.7)[0], rtol=1e-5, atol=1e-5)
    else:
        (name,) = arguments
        with pytest.raises(MelensError, match=f"does not know the argument '{name}'"):
            attention._attention_function(module, *qkv, None, scaling=0.7, **arguments)
