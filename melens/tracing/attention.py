"""Causal attention through fused kernels, without the S × S pattern.

A fused kernel never forms the pattern, but returns the log-sum-exp of each row of scores, from which
`melens.tracing.attended` reads what is paid to keys. Registered with transformers under `FUSED`, it is what a model's
own attention modules call while `melens.tracing.twin` runs them. Only where somebody wants the pattern itself is it
computed.

Sequences start at position 0 without a cache; padding, if any, is on the right, where a causal model never sees it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from melens.errors import MelensError
from melens.models.attention_kinds import WEIGHTS, kind_of
from melens.tracing.attended import Attended, FromPattern, FromScores, FromWeights, attention_scores, chunks_of

__all__ = [
    "FUSED", "attention_pattern", "causal_attention", "pattern_of", "uses_attention_function", "weigh_values",
    "weighed_attention",
]  # fmt: skip

FUSED = "melens"
"""The attention implementation for transformers' config."""


def causal_attention(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_value"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " head"] | None = None,
    mask: Tensor | None = None,
) -> tuple[Float[Tensor, "batch head pos d_value"], FromScores]:
    """Compute causal self-attention without the S × S pattern, of which any part can be read afterwards.

    Args:
        query, key, value: after rotary embedding; `kv_head` divides `head` (grouped queries).
        scale: factor on the scores.
        window: sliding window, counting the query itself; None for full attention.
        softcap: cap on the scores, `softcap · tanh(score / softcap)` (Gemma 2).
        sink_logits: learned extra logit a head, in the softmax's denominator alone (GPT-OSS).
        mask: where given, decides alone which key each query sees (boolean, True where seen, or additive).

    Returns:
        The output, and what it was computed from.
    """
    if window is not None and window >= query.shape[2]:
        window = None
    if softcap is None and sink_logits is None and mask is None:
        try:
            fused = _fused_kernel(query, key, value, scale, window)
        except RuntimeError:  # whichever shape, dtype or device the kernel does not take
            fused = None
        if fused is not None:
            output, logsumexp = fused
            return output, FromScores(query, key, logsumexp, scale, window)
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "mask": mask}
    output, logsumexp = _chunked_attention(query, key, value, sink_logits=sink_logits, **options)
    return output, FromScores(query, key, logsumexp, **options)


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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute attention for a few queries at a time, with everything that a fused kernel may lack."""
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    for rows, columns in chunks_of(query, window, sees_ahead=mask is not None):
        scores = attention_scores(query, key, rows, columns, scale=scale, window=window, softcap=softcap, mask=mask)
        logsumexp[:, :, rows] = normaliser = _normaliser(scores, sink_logits)
        output[:, :, rows] = weigh_values(torch.exp(scores - normaliser[..., None]), value[:, :, columns])
    return output, logsumexp


def weighed_attention(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_value"],
    kind: str,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Float[Tensor, "batch head pos d_value"], FromWeights]:
    """Compute attention that is not softmax without the S × S pattern; arguments as for `causal_attention`."""
    window = None if window is not None and window >= query.shape[2] else window
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "mask": mask}
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    for rows, columns in chunks_of(query, window, sees_ahead=mask is not None):
        weights = WEIGHTS[kind](attention_scores(query, key, rows, columns, **options))
        output[:, :, rows] = weigh_values(weights, value[:, :, columns])
    return output, FromWeights(query, key, kind, **options)


def attention_pattern(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " head"] | None = None,
    mask: Tensor | None = None,
    kind: str | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Compute the whole pattern in float32; arguments as for `causal_attention`, and what replaces the softmax."""
    everything = slice(None)
    scores = attention_scores(
        query, key, everything, everything, scale=scale, window=window, softcap=softcap, mask=mask
    )
    if kind in WEIGHTS:
        return WEIGHTS[kind](scores)
    return torch.exp(scores - _normaliser(scores, sink_logits)[..., None])


def _normaliser(scores: Float[Tensor, "batch head query key"], sink_logits: Tensor | None) -> Tensor:
    normaliser = torch.logsumexp(scores, dim=-1)
    if sink_logits is None:
        return normaliser
    return torch.logaddexp(normaliser, sink_logits.float()[None, :, None])


def weigh_values(
    pattern: Float[Tensor, "batch head query key"], value: Float[Tensor, "batch kv_head key d_value"]
) -> Float[Tensor, "batch head query d_value"]:
    """Sum the values by what is paid to their keys, in the values' precision."""
    weights = rearrange(pattern.to(value.dtype), "b (kv group) query key -> b kv group query key", kv=value.shape[1])
    return rearrange(weights @ value[:, :, None], "b kv group query d -> b (kv group) query d")


def pattern_of(module: nn.Module, pattern: Float[Tensor, "batch head query key"]) -> FromPattern:
    """Read attention from the pattern of a module, of which a kind other than softmax may pay nothing to seen keys."""
    is_softmax = kind_of(getattr(module, "config", None)) is None
    return FromPattern(pattern, 0 if is_softmax else getattr(module, "sliding_window", None))


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
    melens_record: Callable[[Attended], None] | None = None,
    melens_attend: Callable[..., tuple[Tensor, Attended]] | None = None,
    melens_pattern: Callable[[Tensor], Tensor | None] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if query.shape[2] != key.shape[2]:
        raise MelensError("A measurement takes whole sequences: run the model with use_cache=False.")
    _refuse_unknown(others | {"dropout": dropout or None})
    kind = kind_of(getattr(module, "config", None))
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": getattr(module, "sliding_window", None) if sliding_window == 0 else sliding_window,  # 0: not given
        "softcap": softcap,
        "sink_logits": query.new_zeros(query.shape[1]) if kind == "off_by_one" else s_aux,
        "mask": attention_mask,
    }
    attended: Attended
    if kind in (None, "off_by_one") and melens_pattern is None:  # one by a log-sum-exp
        output, attended = (melens_attend or causal_attention)(query, key, value, **options)
    elif melens_attend is not None:
        raise MelensError(f"A cache cannot be simulated in a model with {kind} attention.")
    elif melens_pattern is None:
        del options["sink_logits"]
        output, attended = weighed_attention(query, key, value, str(kind), **options)
    else:
        pattern = attention_pattern(query, key, **options, kind=kind).to(query.dtype)
        changed = melens_pattern(pattern)
        pattern = pattern if changed is None else changed
        output, attended = weigh_values(pattern, value), pattern_of(module, pattern)
    if melens_record is not None:
        melens_record(attended)
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
