"""Causal attention through fused kernels, with the attention paid to chosen keys and without the S × S pattern.

A fused kernel never forms the pattern, but returns the log-sum-exp of each row of scores; the attention on key j is
then `exp(q·k_j·scale - logsumexp)`, exact, in memory linear in the sequence. Registered with transformers under
`FUSED`, it is what a model's own attention modules call while `melens.tracing.twin` runs them. Only where somebody
wants the pattern itself is it computed.

Sequences start at position 0 without a cache; padding, if any, is on the right, where a causal model never sees it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from melens.analysis.metrics import has_triton
from melens.errors import MelensError

__all__ = [
    "FUSED", "attention_on_keys", "attention_pattern", "causal_attention", "columns_of", "uses_attention_function",
]  # fmt: skip

FUSED = "melens"
"""The attention implementation for transformers' config."""

_CHUNK_BYTES = 64 * 2**20  # what the scores of one chunk of queries may take where no fused kernel applies


def causal_attention(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_value"],
    *,
    scale: float,
    keys: Sequence[int] = (),
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " head"] | None = None,
    mask: Tensor | None = None,
) -> tuple[Float[Tensor, "batch head pos d_value"], Float[Tensor, "batch head pos key"]]:
    """Compute causal self-attention and the attention paid to some keys, without the S × S pattern.

    Args:
        query, key, value: after rotary embedding; `kv_head` divides `head` (grouped queries).
        scale: factor on the scores.
        keys: key positions to report.
        window: sliding window, counting the query itself; None for full attention.
        softcap: cap on the scores, `softcap · tanh(score / softcap)` (Gemma 2).
        sink_logits: learned extra logit a head, in the softmax's denominator alone (GPT-OSS).
        mask: where given, decides alone which key each query sees (boolean, True where seen, or additive).

    Returns:
        The output and, in float32, each query's attention on `keys` (0 where the query does not see the key).
    """
    n_pos = query.shape[2]
    if window is not None and window >= n_pos:
        window = None
    wanted, keys = keys, [position for position in keys if position < n_pos]
    if softcap is None and sink_logits is None and mask is None:
        try:
            fused = _fused_kernel(query, key, value, scale, window)
        except RuntimeError:  # whichever shape, dtype or device the kernel does not take
            fused = None
        if fused is not None:
            output, logsumexp = fused
            on_keys = attention_on_keys(query, key, logsumexp, keys=keys, scale=scale, window=window)
            return output, _missing_as_zero(on_keys, wanted, n_pos)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    output, on_keys = _chunked_attention(query, key, value, keys, window=window, mask=mask, **options)
    return output, _missing_as_zero(on_keys, wanted, n_pos)


def columns_of(
    pattern: Float[Tensor, "batch head query key"], keys: Sequence[int]
) -> Float[Tensor, "batch head query wanted"]:
    """Return the columns of some keys in float32, zeros for keys behind the end of the sequences."""
    within = [position for position in keys if position < pattern.shape[-1]]
    return _missing_as_zero(pattern[..., within].float(), keys, pattern.shape[-1])


def _missing_as_zero(
    on_keys: Float[Tensor, "batch head query within"], keys: Sequence[int], n_pos: int
) -> Float[Tensor, "batch head query key"]:
    if on_keys.shape[-1] == len(keys):
        return on_keys
    whole = on_keys.new_zeros((*on_keys.shape[:-1], len(keys)))
    whole[..., [column for column, position in enumerate(keys) if position < n_pos]] = on_keys
    return whole


def attention_on_keys(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    logsumexp: Float[Tensor, "batch head pos"],
    *,
    keys: Sequence[int],
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "batch head pos key"]:
    """Recover the attention on some keys from each query's log-sum-exp: `exp(q·k_j·scale - lse)`, in float32."""
    batch, n_heads, n_pos, _ = query.shape
    if not keys:
        return logsumexp.new_empty((batch, n_heads, n_pos, 0), dtype=torch.float32)
    if query.is_cuda and has_triton():
        from melens.tracing.kernels import on_keys

        return on_keys(query, key, logsumexp, keys, scale, window)
    group = n_heads // key.shape[1]
    wanted = torch.stack([key[:, :, at] for at in keys], dim=-1).repeat_interleave(group, dim=1)
    scores = _matmul_float32(query.flatten(0, 1), wanted.flatten(0, 1)).unflatten(0, (batch, n_heads))
    attention = scores.mul_(scale).sub_(logsumexp[..., None]).exp_()
    for column, position in enumerate(keys):
        if position > 0:
            attention[:, :, :position, column] = 0
        if window is not None:
            attention[:, :, position + window :, column] = 0
    return attention


def _matmul_float32(a: Float[Tensor, "head p d"], b: Float[Tensor, "head d q"]) -> Float[Tensor, "head p q"]:
    """Multiply with the result in float32: a bf16 score of 20 is off by 0.06, its exponential by 6%."""
    if a.is_cuda and a.dtype != torch.float32:
        try:
            return torch.bmm(a, b, out_dtype=torch.float32)
        except (TypeError, RuntimeError):  # before torch 2.8, or no such kernel
            pass
    return torch.bmm(a.float(), b.float())


def _fused_kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor] | None:
    """Call the device's fused kernel: the output and the log-sum-exp a query; None where there is none.

    On a GPU the kernel is the one that PyTorch itself would choose for this shape.
    """
    aten = torch.ops.aten
    if query.shape[-1] != value.shape[-1]:  # latent attention
        return None
    if query.device.type == "cpu" and window is None:
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
    if query.device.type != "cuda":
        return None
    n_pos = query.shape[2]
    if window is None:
        choice = torch._fused_sdp_choice(query, key, value, None, 0.0, True, scale=scale, enable_gqa=True)
    else:  # only this one knows windows, and only these inputs
        fits = query.element_size() == 2 and query.shape[-1] <= 256
        choice = (SDPBackend.FLASH_ATTENTION if fits else SDPBackend.MATH).value
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        attend = aten._scaled_dot_product_cudnn_attention
        output, logsumexp, *_ = attend(query, key, value, None, True, 0.0, True, scale=scale)
        return output, logsumexp.reshape(query.shape[:3])
    if choice == SDPBackend.FLASH_ATTENTION.value:
        to_right = None if window is None else 0
        to_left = None if window is None else window - 1
        output, logsumexp, *_ = aten._flash_attention_forward(
            *(tensor.transpose(1, 2) for tensor in (query, key, value)),
            *(None, None, n_pos, n_pos, 0.0, True, False),
            scale=scale, window_size_left=to_left, window_size_right=to_right,
        )  # fmt: skip
        return output.transpose(1, 2), logsumexp
    if window is None:  # the memory-efficient kernel, which knows no grouped queries
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        attend = aten._scaled_dot_product_efficient_attention
        output, logsumexp, *_ = attend(query, key, value, None, True, 0.0, True, scale=scale)
        return output, logsumexp[..., :n_pos]
    return None


def _chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Sequence[int], *, window: int | None, mask: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention for a few queries at a time, with everything that a fused kernel may lack."""
    batch, n_heads, n_pos, _ = query.shape
    span = n_pos if window is None else min(2 * window, n_pos)
    rows = max(1, _CHUNK_BYTES // (4 * batch * n_heads * span))
    rows = min(rows, n_pos if window is None else window)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    on_keys = query.new_zeros((batch, n_heads, n_pos, len(keys)), dtype=torch.float32)
    for start in range(0, n_pos, rows):
        stop = min(start + rows, n_pos)
        first = 0 if window is None else max(0, start - window + 1)
        seen = slice(first, n_pos if mask is not None else stop)
        pattern = attention_pattern(query, key, slice(start, stop), seen, window=window, mask=mask, **options)
        for column, position in enumerate(keys):
            if seen.start <= position < seen.stop:
                on_keys[:, :, start:stop, column] = pattern[..., position - first]
        output[:, :, start:stop] = _attend(pattern, value[:, :, seen])
    return output, on_keys


def attention_pattern(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    rows: slice,
    columns: slice,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " head"] | None = None,
    mask: Tensor | None = None,
) -> Float[Tensor, "batch head row column"]:
    """Compute the attention of some queries on some keys in float32; other arguments as for `causal_attention`.

    The keys must be all that these queries see.
    """
    grouped = rearrange(query[..., rows, :], "b (kv group) pos d -> b kv group pos d", kv=key.shape[1])
    scores = (grouped.float() @ key[:, :, None, columns].float().transpose(-1, -2)) * scale
    scores = rearrange(scores, "b kv group query key -> b (kv group) query key")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        seen = mask[..., rows, columns]
        scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
    else:
        positions = torch.arange(query.shape[2], device=query.device)
        distance = positions[rows, None] - positions[None, columns]
        sees = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        scores = scores.masked_fill(~sees, float("-inf"))
    normaliser = torch.logsumexp(scores, dim=-1, keepdim=True)
    if sink_logits is not None:
        normaliser = torch.logaddexp(normaliser, sink_logits.float()[None, :, None, None])
    return torch.exp(scores - normaliser)


def _attend(
    pattern: Float[Tensor, "batch head query key"], value: Float[Tensor, "batch kv_head key d_value"]
) -> Float[Tensor, "batch head query d_value"]:
    weights = rearrange(pattern.to(value.dtype), "b (kv group) query key -> b kv group query key", kv=value.shape[1])
    return rearrange(weights @ value[:, :, None], "b kv group query d -> b (kv group) query d")


# --- What transformers calls ------------------------------------------------------------------------------------------


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = 0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    melens_keys: tuple[int, ...] = (),
    melens_record: Callable[[Tensor], None] | None = None,
    melens_pattern: Callable[[Tensor], Tensor | None] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if query.shape[2] != key.shape[2]:
        raise MelensError("A measurement takes whole sequences: run the model with use_cache=False.")
    _refuse_unknown(others | {"dropout": dropout or None})
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": getattr(module, "sliding_window", None) if sliding_window == 0 else sliding_window,  # 0: not given
        "softcap": softcap,
        "sink_logits": s_aux,
        "mask": attention_mask,
    }
    if melens_pattern is None:
        output, on_keys = causal_attention(query, key, value, keys=melens_keys, **options)
    else:
        pattern = attention_pattern(query, key, slice(None), slice(None), **options).to(query.dtype)
        changed = melens_pattern(pattern)
        pattern = pattern if changed is None else changed
        output, on_keys = _attend(pattern, value), columns_of(pattern, melens_keys)
    if melens_record is not None:
        melens_record(on_keys)
    return output.transpose(1, 2).contiguous(), None


_WITHOUT_EFFECT = {
    "cache", "cache_params", "cache_position", "logits_to_keep", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "position_ids",
    "return_dict", "use_cache",
}  # fmt: skip
"""What transformers hands every attention function and none of a whole sequence's depends on."""


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise a `MelensError` that names an argument which could change the attention in a way that is not known here."""
    for name, value in arguments.items():
        is_default = value is None or (name == "is_causal" and value is True)
        if not is_default and name not in _WITHOUT_EFFECT:
            raise MelensError(f"The fused attention of melens does not know the argument {name!r} of this model.")


def _no_mask_where_causal(
    *,
    config: Any,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Leave out the S × S mask where `causal_attention` knows it from its arguments; chunks (Llama 4) it does not."""
    is_in_chunks = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    if allow_is_causal_skip and not allow_is_bidirectional_skip and not is_in_chunks:
        return None
    return sdpa_mask(allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs)


def uses_attention_function(module: nn.Module) -> bool:
    """Tell whether this is an attention module of transformers that lets its config choose the attention function."""
    return _names_attention_functions(type(module).forward)


@cache
def _names_attention_functions(forward: Callable[..., Any]) -> bool:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


AttentionInterface.register(FUSED, _attention_function)
AttentionMaskInterface.register(FUSED, _no_mask_where_causal)
