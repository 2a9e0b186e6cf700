"""Leave out of a forward pass what nobody listens to, and read attention in O(positions) memory.

A `TransformerBridge` re-implements attention eagerly so that its hooks on scores and pattern can fire, which costs
memory quadratic in the sequence. Most questions about massive activations need only the attention paid to one or two
keys. `fused_attention` routes each block whose pattern nobody listens to back through the wrapped transformers module
(the bridge's projections stay in it, so the hooks on q, k, v and o still fire) and hands the listener that block's
attention on chosen keys: `exp(q·k_j·scale - logsumexp)`, exact, from the log-sum-exp that the fused kernels return.

Sequences are prefilled from position 0 without a cache; padding, if any, is on the right, where a causal model never
sees it, so that no mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    JointQKVPositionEmbeddingsAttentionBridge,
    NormalizationBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

__all__ = ["KeyListener", "attention_on_keys", "causal_attention", "fused_attention"]

KeyListener = Callable[[int, Tensor], None]
"""Called as `listener(layer, attention)` with a `[batch, head, query, key]` tensor, a column for each wanted key."""

_FUSED = "melens"
_FUSED_BESIDE_EAGER = "melens_beside_eager"
_CHUNK_BYTES = 64 * 2**20  # what the scores of one chunk of queries may take where no fused kernel applies


@contextmanager
def fused_attention(
    model: TransformerBridge, keys: Sequence[int] = (), listener: KeyListener | None = None
) -> Iterator[None]:
    """Run the model's attention through fused kernels while the context lasts.

    Blocks with a listener on their scores or pattern, and blocks whose attention is of a kind that no fused kernel
    computes, stay as they are. Whatever happens inside, the model leaves the context as it entered it.

    Args:
        model: the bridge; its hooks must already be attached, since they decide which blocks stay eager.
        keys: key positions whose attention the listener wants.
        listener: called once a block and forward pass, whichever way the block computes its attention.
    """
    with ExitStack() as stack:
        eager_blocks = 0
        for layer, block in enumerate(model.blocks):
            _skip_unheard_norm_hooks(block, stack)
            attn = block._modules.get("attn")
            if attn is None:
                continue
            if _can_fuse(attn):
                _override_forward(attn, _fused_forward(attn, layer, keys, listener), stack)
            else:
                eager_blocks += 1
                pattern = getattr(attn, "hook_pattern", None)
                if listener is not None and pattern is not None:
                    stack.enter_context(_pattern_columns(pattern, layer, keys, listener))
        _select_attention(model, _FUSED_BESIDE_EAGER if eager_blocks else _FUSED, stack)
        yield


def _can_fuse(attn: nn.Module) -> bool:
    if not isinstance(attn, PositionEmbeddingsAttentionBridge | JointQKVPositionEmbeddingsAttentionBridge):
        return False
    config = attn.config
    if any(getattr(config, flag, False) for flag in ("use_split_qkv_input", "use_attn_in", "use_attn_result")):
        return False
    still_fire = {id(attn.hook_in), id(attn.hook_out)}
    still_fire.update(id(hook) for hook in attn.original_component.modules() if isinstance(hook, HookPoint))
    hooks = (module for module in attn.modules() if isinstance(module, HookPoint))
    return all(id(hook) in still_fire or not hook.has_hooks() for hook in hooks)


def _fused_forward(
    attn: Any, layer: int, keys: Sequence[int], listener: KeyListener | None
) -> Callable[..., tuple[Any, ...]]:
    def report(attention: Tensor) -> None:
        if listener is not None:
            listener(layer, attention)

    def forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        hidden_states = kwargs.pop("hidden_states", None)
        if hidden_states is None:
            hidden_states, *args = args
        output, *rest = attn.original_component(
            attn.hook_in(hidden_states),
            *args,
            melens_keys=tuple(keys) if listener is not None else (),
            melens_report=report,
            **kwargs,
        )
        return (attn.hook_out(output), *rest)

    return forward


def _override_forward(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    # Into __dict__: bridge components pass ordinary attribute writes on to the module that they wrap.
    module.__dict__["forward"] = forward
    stack.callback(module.__dict__.pop, "forward", None)


def _skip_unheard_norm_hooks(block: nn.Module, stack: ExitStack) -> None:
    """Spare the fp32 copies that a norm bridge makes for `hook_scale` and `hook_normalized`."""
    for norm in block.modules():
        if not isinstance(norm, NormalizationBridge) or not norm.use_native_layernorm_autograd:
            continue
        if norm.hook_scale.has_hooks() or norm.hook_normalized.has_hooks():
            continue

        def forward(hidden_states: Tensor, _norm: Any = norm, **_: Any) -> Tensor:
            return _norm.hook_out(_norm.original_component(_norm.hook_in(hidden_states)).to(hidden_states.dtype))

        _override_forward(norm, forward, stack)


@contextmanager
def _pattern_columns(
    hook_pattern: HookPoint, layer: int, keys: Sequence[int], listener: KeyListener
) -> Iterator[None]:
    def report(pattern: Float[Tensor, "batch head query key"], hook: HookPoint) -> None:
        listener(layer, pattern[..., list(keys)].float())

    handle = hook_pattern.add_hook(report)
    try:
        yield
    finally:
        handle.hook.remove()
        hook_pattern.fwd_hooks.remove(handle)


def _select_attention(model: TransformerBridge, name: str, stack: ExitStack) -> None:
    modules = (model.original_model, *(block._modules.get("attn") for block in model.blocks))
    configs = {id(config): config for module in modules if (config := _hf_config(module)) is not None}
    for config in configs.values():
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = name


def _hf_config(module: Any) -> Any:
    original = getattr(module, "original_component", module)
    config = getattr(original, "config", None)
    return config if hasattr(config, "_attn_implementation") else None


# --- What transformers calls ------------------------------------------------------------------------------------------


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    melens_keys: tuple[int, ...] = (),
    melens_report: Callable[[Tensor], None] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    output, on_keys = causal_attention(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        keys=melens_keys,
        window=sliding_window,
        softcap=softcap,
        sink_logits=s_aux,
        mask=attention_mask,
    )
    if melens_keys and melens_report is not None:
        melens_report(on_keys)
    return output.transpose(1, 2), None


def _no_mask_where_causal(*, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """Leave out the S × S mask wherever `causal_attention` knows it from its arguments."""
    if allow_is_causal_skip and not kwargs.pop("allow_is_bidirectional_skip", False):
        return None
    return sdpa_mask(allow_is_causal_skip=False, **kwargs)


AttentionInterface.register(_FUSED, _attention_function)
AttentionMaskInterface.register(_FUSED, _no_mask_where_causal)


def _attention_beside_eager(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    module, query, key, value, _mask, *rest = args  # the mask is there for the blocks that stay eager
    return _attention_function(module, query, key, value, None, *rest, **kwargs)


AttentionInterface.register(_FUSED_BESIDE_EAGER, _attention_beside_eager)
AttentionMaskInterface.register(_FUSED_BESIDE_EAGER, eager_mask)


# --- The computation --------------------------------------------------------------------------------------------------


def causal_attention(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_head"],
    *,
    scale: float,
    keys: Sequence[int] = (),
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " head"] | None = None,
    mask: Tensor | None = None,
) -> tuple[Float[Tensor, "batch head pos d_head"], Float[Tensor, "batch head pos key"]]:
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
    if softcap is None and sink_logits is None and mask is None:
        fused = _fused_kernel(query, key, value, scale, window)
        if fused is not None:
            output, logsumexp = fused
            return output, attention_on_keys(query, key, logsumexp, keys=keys, scale=scale, window=window)
    return _chunked_attention(query, key, value, scale, keys, window, softcap, sink_logits, mask)


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
    kv_heads = key.shape[1]
    grouped = rearrange(query, "b (kv group) pos d -> (b kv) (group pos) d", kv=kv_heads)
    wanted = rearrange(key[:, :, list(keys)], "b kv key d -> (b kv) d key")
    scores = rearrange(
        _matmul_float32(grouped, wanted), "(b kv) (group pos) key -> b (kv group) pos key", b=batch, pos=n_pos
    )
    attention = torch.exp(scores * scale - logsumexp[..., None].float())
    return attention * _sees(torch.arange(n_pos, device=query.device), torch.tensor(keys, device=query.device), window)


def _matmul_float32(a: Float[Tensor, "n p d"], b: Float[Tensor, "n d q"]) -> Float[Tensor, "n p q"]:
    """Multiply with the result in float32: a bf16 score of 20 is off by 0.06, its exponential by 6%."""
    if a.is_cuda and a.dtype != torch.float32:
        try:
            return torch.bmm(a, b, out_dtype=torch.float32)
        except (TypeError, RuntimeError):  # before torch 2.8, or no such kernel
            pass
    return torch.bmm(a.float(), b.float())


def _sees(query_pos: Tensor, key_pos: Tensor, window: int | None) -> Bool[Tensor, "query key"]:
    distance = query_pos[:, None] - key_pos[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _fused_kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor] | None:
    """Call the device's fused kernel: the output and the log-sum-exp a query; None where there is none."""
    aten = torch.ops.aten
    if query.device.type == "cpu" and window is None:
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
    if query.device.type != "cuda":
        return None
    if query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        n_pos = query.shape[2]
        output, logsumexp, *_ = aten._flash_attention_forward(
            *(tensor.transpose(1, 2) for tensor in (query, key, value)),
            None,
            None,
            n_pos,
            n_pos,
            0.0,
            True,
            False,
            scale=scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )
        return output.transpose(1, 2), logsumexp
    if window is None:
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        output, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, True, scale=scale
        )
        return output, logsumexp[..., : query.shape[2]]
    return None


def _chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    keys: Sequence[int],
    window: int | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute attention for a few queries at a time, with everything that a fused kernel may lack."""
    batch, n_heads, n_pos, _ = query.shape
    kv_heads = key.shape[1]
    span = n_pos if window is None else min(2 * window, n_pos)
    rows = max(1, _CHUNK_BYTES // (4 * batch * n_heads * span))
    rows = min(rows, n_pos if window is None else window)
    output = torch.empty_like(query)
    on_keys = query.new_zeros((batch, n_heads, n_pos, len(keys)), dtype=torch.float32)
    grouped = rearrange(query, "b (kv group) pos d -> b kv group pos d", kv=kv_heads)
    for start in range(0, n_pos, rows):
        stop = min(start + rows, n_pos)
        first = 0 if window is None else max(0, start - window + 1)
        last = n_pos if mask is not None else stop
        k, v = (tensor[:, :, None, first:last] for tensor in (key, value))
        scores = (grouped[..., start:stop, :].float() @ k.float().transpose(-1, -2)) * scale
        scores = rearrange(scores, "b kv group query key -> b (kv group) query key")
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            seen = mask[..., start:stop, first:last]
            scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
        else:
            positions = torch.arange(n_pos, device=query.device)
            scores = scores.masked_fill(~_sees(positions[start:stop], positions[first:last], window), float("-inf"))
        normaliser = torch.logsumexp(scores, dim=-1, keepdim=True)
        if sink_logits is not None:
            normaliser = torch.logaddexp(normaliser, sink_logits.float()[None, :, None, None])
        pattern = torch.exp(scores - normaliser)
        for column, position in enumerate(keys):
            if first <= position < last:
                on_keys[:, :, start:stop, column] = pattern[..., position - first]
        weights = rearrange(pattern.to(value.dtype), "b (kv group) query key -> b kv group query key", kv=kv_heads)
        output[:, :, start:stop] = rearrange(weights @ v, "b kv group query d -> b (kv group) query d")
    return output, on_keys
