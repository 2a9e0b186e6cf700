"""Attention without the softmax that asks for sinks: three kinds that models are trained from scratch with.

    set_attention(network, "softpick")  # a transformers model, or a bridge; before it is trained
    network.config.melens_attention     # goes into config.json, and `load_model` puts it on again

Each kind turns the scores of a query into what it pays to each key (`WEIGHTS`); the rest of attention is transformers'.
The kind is a field of the model's config, so that every copy of the model has it: the plain model and its twins ask
for it by transformers' AttentionInterface, a bridge's components by their softmax, a measurement in
`melens.tracing.attention`. Rows need not sum to 1: what is missing goes to no token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from melens.errors import MelensError
from melens.models.specs import AttentionKind

__all__ = [
    "WEIGHTS", "attend_as_configured", "check_configured", "implementation_of", "kind_of", "mark_saved",
    "set_attention",
]  # fmt: skip

_FIELD = "melens_attention"  # of a config

Scores = Float[Tensor, "*batch query key"]
"""Scaled scores in float32; a key that the query does not see has -inf, or a number as low as the dtype's lowest."""


def softpick(scores: Scores) -> Scores:
    """Weigh keys by `relu(eˣ - 1) / Σ |eˣ - 1|` (Zuhri et al. 2025, arXiv 2504.20966): exactly 0 for a score up to 0.

    Numerator and denominator are multiplied by e⁻ᵐ, m the largest score, as theirs are; unseen keys count in neither.
    """
    seen = _seen(scores)
    largest = scores.amax(-1, keepdim=True).clamp(min=0)  # of negative scores e⁻ᵐ would be infinite
    excess = (torch.exp(scores - largest) - torch.exp(-largest)).masked_fill(~seen, 0)
    return torch.relu(excess) / (excess.abs().sum(-1, keepdim=True) + 1e-8)


def off_by_one(scores: Scores) -> Scores:
    """Weigh keys by `eˣ / (1 + Σ eˣ)` (Miller 2023, "Attention is off by one"): a softmax beside a key of score 0."""
    largest = scores.amax(-1, keepdim=True).clamp(min=0)  # of a row that sees nothing a log-sum-exp has no gradient
    shifted = torch.exp(scores - largest)
    return shifted / (torch.exp(-largest) + shifted.sum(-1, keepdim=True))


def sigmoid(scores: Scores) -> Scores:
    """Weigh each key on its own by `σ(x - log n)` (Ramapuram et al. 2024, arXiv 2409.04431), of n keys that are seen.

    They take one n for all queries, the length of the training; with each query's own a token decodes as it prefills.
    """
    n_seen = _seen(scores).sum(-1, keepdim=True).clamp(min=1)  # the padding on the left sees nothing
    return torch.sigmoid(scores - torch.log(n_seen.to(scores.dtype)))


def _seen(scores: Scores) -> Tensor:
    return scores > torch.finfo(scores.dtype).min / 2


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {"softpick": softpick, "off_by_one": off_by_one, "sigmoid": sigmoid}


def set_attention(model: Any, kind: str) -> None:
    """Let a model attend otherwise from now on; the weights stay as they are, so do this before training.

    Args:
        model: a transformers model, or a bridge.
        kind: what replaces the softmax, an `AttentionKind`.

    Raises:
        MelensError: an unknown kind, or a model with attention of another making.
    """
    if kind not in get_args(AttentionKind):
        raise MelensError(f"The attention is {kind!r}; allowed are {', '.join(get_args(AttentionKind))}.")
    network = getattr(model, "original_model", model)
    _check(network, kind)
    setattr(network.config, _FIELD, kind)
    attend_as_configured(model)


def check_configured(network: Any) -> None:
    """Raise a `MelensError` for a model, with or without weights, that cannot attend as its config asks for."""
    if (kind := kind_of(network.config)) is not None:
        _check(network, kind)


def _check(network: Any, kind: str) -> None:
    """Raise for a model whose attention is not a plain softmax that transformers lets a function replace."""
    name = type(network).__name__
    if not network._can_set_attn_implementation():
        raise MelensError(f"{name} computes attention in code of its own, so it cannot be {kind}.")
    if any(getattr(module, "sinks", None) is not None for module in network.modules()):
        raise MelensError(f"{name} has learned sinks in its softmax, so its attention cannot be {kind}.")
    if getattr(network.config, "attn_logit_softcapping", None) is not None:
        raise MelensError(f"{name} caps its scores, which {kind} attention does not know.")
    config = network.config.get_text_config()
    if getattr(config, "attention_chunk_size", None) or getattr(config, "use_bidirectional_attention", None):
        raise MelensError(f"{name} attends in chunks or both ways, so its attention cannot be {kind}.")


def kind_of(config: Any) -> AttentionKind | None:
    """Return the kind of attention that a config asks for; None for softmax.

    Raises:
        MelensError: a kind of which this version knows nothing.
    """
    kind = getattr(config, _FIELD, None)
    if kind is not None and kind not in WEIGHTS:
        raise MelensError(f"The config says {_FIELD}={kind!r}; this version of melens knows {', '.join(WEIGHTS)}.")
    return kind


def implementation_of(config: Any, otherwise: str) -> str:
    """Return the attention implementation by which transformers computes what a config asks for."""
    kind = kind_of(config)
    return otherwise if kind is None else f"melens_{kind}"


def mark_saved(folder: Path, config: Any) -> None:
    """Write into a saved model's `config.json` by which implementation it attends.

    transformers without melens then refuses the model, where it would run it with a softmax, without a word.
    """
    if kind_of(config) is None:
        return
    file = folder / "config.json"
    saved = json.loads(file.read_text("utf-8")) | {"attn_implementation": implementation_of(config, "")}
    file.write_text(json.dumps(saved, indent=2), "utf-8")


def attend_as_configured(model: Any) -> None:
    """Put the attention that the config asks for on a transformers model or a bridge; softmax stays as it is."""
    network = getattr(model, "original_model", model)
    if (kind := kind_of(network.config)) is None:
        return
    network.set_attn_implementation(implementation_of(network.config, "eager"))
    for component in model.modules():
        if isinstance(component, AttentionBridge):
            component._masked_softmax = _InBridge(kind)


class _InBridge:
    """What a bridge's attention calls in place of its softmax. (No closure: a deep copy of the model gets its own.)"""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __call__(self, scores: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        unseen = ~_seen(scores)  # by the lowest number of its own dtype: float16's is not low in float32
        return WEIGHTS[self._kind](scores.to(dtype or scores.dtype).masked_fill(unseen, float("-inf")))


# --- What transformers calls ------------------------------------------------------------------------------------------


def _function(weigh: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def attend(
        module: nn.Module,
        query: Float[Tensor, "batch head query d_head"],
        key: Float[Tensor, "batch kv_head key d_head"],
        value: Float[Tensor, "batch kv_head key d_value"],
        attention_mask: Float[Tensor, "batch 1 query key"] | None,
        scaling: float,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        grouped = rearrange(query, "b (kv group) q d -> b kv group q d", kv=key.shape[1])
        scores = (grouped @ key[:, :, None].transpose(-1, -2)).float() * scaling
        if attention_mask is not None:
            mask = attention_mask[:, :, None, :, : key.shape[-2]]
            scores = (scores + mask).masked_fill(~_seen(mask), float("-inf"))
        weights = nn.functional.dropout(weigh(scores).to(query.dtype), dropout, module.training)
        output = rearrange(weights @ value[:, :, None], "b kv group q d -> b q (kv group) d")
        return output.contiguous(), weights.flatten(1, 2)

    return attend


for _kind, _weigh in WEIGHTS.items():
    AttentionInterface.register(f"melens_{_kind}", _function(_weigh))
    AttentionMaskInterface.register(f"melens_{_kind}", eager_mask)
