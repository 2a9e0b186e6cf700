"""Probes of attention: what is paid to one key or to every key, without the pattern; entropy and maps, from it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from melens.analysis.metrics import SINK_THRESHOLD, sink_mass
from melens.errors import MelensError
from melens.tracing.probes import Batch, Probe
from melens.tracing.sites import ATTENTION_BY_KEY, ATTENTION_ON_KEYS
from melens.validation.signatures import LayerList, Position, checked
from melens.validation.types import Count, Rate

__all__ = [
    "AttentionEntropy", "AttentionMaps", "AttentionOffTokens", "Importance", "ImportanceByKey", "SinkByQuery",
    "SinkMass",
]  # fmt: skip


class SinkMass(Probe):
    """How much attention the later queries pay to one key, by layer and head (section 6, figure 7).

    The column is `sink_mass`: the mean probability, from 0 to 1, over all queries after the key, by default token 0. Of
    attention that is not softmax it is the weight as it is paid, whatever the row's other weights sum to.

    Example:
        >>> melens.trace(model, prompts, melens.SinkMass())["sink_mass"].columns.tolist()
        ['prompt', 'layer', 'site', 'head', 'sink_mass']
    """

    name = "sink_mass"
    by_row = True
    sites = (ATTENTION_ON_KEYS,)
    index = ("head",)

    @checked
    def __init__(self, key: Position = 0):
        self.keys = (key,)

    def reduce(self, activation: Float[Tensor, "batch head query 1"], batch: Batch) -> dict[str, Tensor]:
        return {"sink_mass": sink_mass(activation[..., 0], batch.weights_after(self.keys[0]).to(activation.device))}


class SinkByQuery(Probe):
    """The attention that each position pays to one key, averaged over heads: figure 7's first column, at any length.

    The column is `attention`, a probability; the key is token 0 by default.

    Example:
        >>> melens.trace(model, prompts, melens.SinkByQuery())["sink_by_query"].columns.tolist()
        ['prompt', 'layer', 'site', 'pos', 'attention']
    """

    name = "sink_by_query"
    by_row = True
    sites = (ATTENTION_ON_KEYS,)
    index = ("pos",)

    @checked
    def __init__(self, key: Position = 0):
        self.keys = (key,)

    def reduce(self, activation: Float[Tensor, "batch head query 1"], batch: Batch) -> dict[str, Tensor]:
        return {"attention": activation[..., 0].mean(dim=1)}


class Importance(Probe):
    """The importance score α of one key, by layer and head (Gu et al. 2024, section 3.1), of which `sink_rate` is made.

    The column is `importance`: the mean attention that the first `n_tokens` tokens pay to the key, those before it left
    out and its own included, from 0 to 1. It grows as a prompt gets shorter: prompts of fewer tokens have NaN.

    Example:
        >>> melens.trace(model, prompts, melens.Importance(n_tokens=4))["importance"].columns.tolist()
        ['prompt', 'layer', 'site', 'head', 'importance']
    """

    name = "importance"
    by_row = True
    sites = (ATTENTION_ON_KEYS,)
    index = ("head",)

    @checked
    def __init__(self, key: Position = 0, n_tokens: Count = 64):
        if key >= n_tokens:
            raise MelensError(f"The key at position {key} is not among the first {n_tokens} tokens.")
        self.keys, self.n_tokens = (key,), n_tokens

    def reduce(self, activation: Float[Tensor, "batch head query 1"], batch: Batch) -> dict[str, Tensor]:
        importance = activation[:, :, self.keys[0] : self.n_tokens, 0].mean(-1)
        is_shorter = batch.n_tokens.to(activation.device) < self.n_tokens
        return {"importance": importance.masked_fill(is_shorter[:, None], float("nan"))}


class ImportanceByKey(Probe):
    """The importance score α of every key of whole prompts, by layer and position (Gu et al. 2024): sinks anywhere.

    The columns are `importance`, the mean over heads of the mean attention that the queries which see a key pay to it,
    its own included, and `share_of_heads`, of those where it is over `threshold`. Near a prompt's end few queries see a
    key: the last one pays to itself alone.

    Example:
        >>> melens.trace(model, prompts, melens.ImportanceByKey())["importance_by_key"].columns.tolist()
        ['prompt', 'layer', 'site', 'pos', 'importance', 'share_of_heads']
    """

    name = "importance_by_key"
    by_row = True
    sites = (ATTENTION_BY_KEY,)
    index = ("pos",)

    @checked
    def __init__(self, threshold: Rate = SINK_THRESHOLD):
        self.threshold = threshold

    def reduce(self, activation: Float[Tensor, "batch head key 2"], batch: Batch) -> dict[str, Tensor]:
        importance = activation[..., 0] / activation[..., 1].clamp(min=1)
        is_sink = (importance > self.threshold).float()
        return {"importance": importance.mean(1), "share_of_heads": is_sink.mean(1)}


class AttentionOffTokens(Probe):
    """The attention that goes to no token, by layer and head: what a learned sink takes (GPT-OSS), `exp(s_h - lse)`.

    The column is `off_tokens`, the mean over a prompt's queries of what their attention lacks to 1; 0 up to rounding in
    a model whose attention sums to 1, what is not paid at all in one of softpick or off by one, and below 0 where
    sigmoid attention pays more than 1.

    Example:
        >>> found = melens.trace(model, prompts, melens.AttentionOffTokens())["off_tokens"]
        >>> bool(found["off_tokens"].abs().max() < 1e-5)
        True
    """

    name = "off_tokens"
    by_row = True
    sites = (ATTENTION_BY_KEY,)
    index = ("head",)

    def reduce(self, activation: Float[Tensor, "batch head key 2"], batch: Batch) -> dict[str, Tensor]:
        return {"off_tokens": 1 - activation[..., 0].sum(-1) / batch.n_tokens.to(activation.device)[:, None]}


class AttentionEntropy(Probe):
    """The entropy in nats of what a query attends to, averaged over the queries that have a choice, by block and head.

    The column is `entropy`: 0 on one token alone, log of the number of tokens where all get as much. Weights that do
    not sum to 1 (a learned sink, attention that is not softmax) are divided by their sum; a query that pays nothing
    counts as 0. The pattern takes memory quadratic in the length.

    Example:
        >>> melens.trace(model, prompts, melens.AttentionEntropy())["attention_entropy"].columns.tolist()
        ['prompt', 'layer', 'site', 'head', 'entropy']
    """

    name = "attention_entropy"
    sites = ("attn.hook_pattern",)
    index = ("head",)

    def reduce(self, activation: Float[Tensor, "batch head query key"], batch: Batch) -> dict[str, Tensor]:
        paid = activation.float()
        shares = paid / paid.sum(-1, keepdim=True).clamp(min=torch.finfo(paid.dtype).tiny)
        entropy = -torch.xlogy(shares, shares).sum(-1)
        weights = batch.weights_after(0).to(entropy.device)
        return {"entropy": (entropy * weights[:, None]).sum(-1)}


class AttentionMaps(Probe):
    """The attention pattern of chosen blocks, `[prompt, layer, head, query, key]` (figure 7): quadratic in the length.

    All prompts of the trace must have the same length.

    Example:
        >>> maps = melens.trace(model, [[5, 6, 7, 8]], melens.AttentionMaps([2, 3])).tensors["attention_maps"]
        >>> maps.shape == (1, 2, model.cfg.n_heads, 4, 4)
        True
    """

    name = "attention_maps"
    sites = ("attn.hook_pattern",)
    index = ("head", "query", "key")
    kind = "tensor"

    @checked
    def __init__(self, layers: LayerList):
        self.layers = layers

    def reduce(self, activation: Float[Tensor, "batch head query key"], batch: Batch) -> dict[str, Tensor]:
        if min(batch.lengths) < max(batch.lengths):
            raise MelensError(f"The probe {self.name!r} takes prompts of one length: trace them apart, or cut them.")
        return {"pattern": activation.clone()}
