"""What to measure: a probe names the places it listens at and reduces each activation as it passes.

A new probe is a class with a name, its sites and a `reduce`:

    class Kurtosis(Probe):
        name = "kurtosis"
        sites = ("hook_resid_post",)
        index = ("pos",)

        def reduce(self, activation, batch):
            centred = activation.float() - activation.float().mean(-1, keepdim=True)
            return {"kurtosis": centred.pow(4).mean(-1) / centred.pow(2).mean(-1) ** 2}

`trace(model, prompts, [Kurtosis()])["kurtosis"]` is then a table with a row for each prompt, layer, site and position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melens.metrics import abs_max, abs_median, l2_norm, sink_mass

__all__ = [
    "ATTENTION_ON_KEYS",
    "AbsMedian",
    "Batch",
    "LargestActivations",
    "Norms",
    "Probe",
    "SinkByQuery",
    "SinkMass",
    "TokenVectors",
    "default_probes",
]

ATTENTION_ON_KEYS = "attn.on_keys"
"""A site of melens's own: the attention on the probe's `keys`, `[batch, head, query, key]`, without the pattern."""

RESID_PRE_0 = "blocks.0.hook_resid_pre"
"""The embeddings, as the first block sees them; everywhere else a block's input is the output of the one before."""


@dataclass(frozen=True)
class Batch:
    """The prompts of one forward pass, padded on the right.

    Attributes:
        tokens: token ids; whatever lies beyond a prompt's length is padding.
        lengths: number of real tokens a prompt.
        prompts: which prompt of the trace each row is.
    """

    tokens: Int[Tensor, "batch pos"]
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]


class Probe(ABC):
    """A reduction of activations, fed as they pass in `melens.trace`.

    Attributes:
        name: of its table (or tensor) in the trace.
        sites: hook names within a block (`"hook_resid_post"`, `"ln2.hook_out"`), full hook names
            (`"blocks.0.hook_resid_pre"`), or `ATTENTION_ON_KEYS`.
        index: what the dimensions after the batch of each returned tensor run over: `"pos"` is the token's position,
            any other name becomes a column of its own. Rows at padded positions are dropped.
        keys: key positions, for `ATTENTION_ON_KEYS`.
        layers: blocks to listen in; None for all.
        kind: `"table"`, or `"tensor"` for wide results, kept as `[prompt, layer, *index]`.
    """

    name: ClassVar[str]
    sites: tuple[str, ...]
    index: tuple[str, ...] = ()
    keys: tuple[int, ...] = ()
    layers: Sequence[int] | None = None
    kind: Literal["table", "tensor"] = "table"

    @abstractmethod
    def reduce(self, activation: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Reduce one activation to small tensors `[batch, *index]`, one a quantity.

        The activation is the model's own, shape as at that hook point: it must not be changed, nor kept.
        """


class Norms(Probe):
    """L2 norm by layer and position: figures 1, 2, 5a, 10 and 11-20."""

    name = "norm"
    index = ("pos",)

    def __init__(
        self,
        sites: Sequence[str] = (RESID_PRE_0, "ln2.hook_out", "hook_mlp_out", "hook_resid_post"),
        layers: Sequence[int] | None = None,
    ):
        self.sites = tuple(sites)
        self.layers = layers

    def reduce(self, activation: Float[Tensor, "batch pos d"], batch: Batch) -> dict[str, Tensor]:
        return {"norm": l2_norm(activation)}


class LargestActivations(Probe):
    """The largest |h| of each hidden state with their positions and dims: the criterion for "massive".

    Of the `n_tokens` tokens with the largest |h|, the `n_dims` largest entries each; rank 0 is the largest of all.
    """

    name = "largest"
    index = ("rank",)

    def __init__(self, n_tokens: int = 8, n_dims: int = 8, sites: Sequence[str] = ("hook_resid_post",)):
        self.n_tokens = n_tokens
        self.n_dims = n_dims
        self.sites = tuple(sites)

    def reduce(self, activation: Float[Tensor, "batch pos d"], batch: Batch) -> dict[str, Tensor]:
        by_token = abs_max(activation)
        for row, length in enumerate(batch.lengths):
            by_token[row, length:] = -1
        n_tokens, n_dims = min(self.n_tokens, activation.shape[1]), min(self.n_dims, activation.shape[2])
        positions = by_token.topk(n_tokens, dim=-1).indices
        tokens = activation.gather(1, positions[..., None].expand(-1, -1, activation.shape[-1]))
        dims = tokens.abs().topk(n_dims, dim=-1).indices
        padding = by_token.gather(1, positions)[..., None] < 0
        values = tokens.gather(2, dims).float().masked_fill(padding, float("nan"))
        positions = positions[..., None].expand_as(dims)
        return {"pos": positions.flatten(1), "dim": dims.flatten(1), "value": values.flatten(1)}


class AbsMedian(Probe):
    """The median of |h| over all tokens and dims of a hidden state: the other half of the criterion for "massive"."""

    name = "abs_median"

    def __init__(self, sites: Sequence[str] = ("hook_resid_post",)):
        self.sites = tuple(sites)

    def reduce(self, activation: Float[Tensor, "batch pos d"], batch: Batch) -> dict[str, Tensor]:
        medians = [abs_median(hidden[:length]) for hidden, length in zip(activation, batch.lengths, strict=True)]
        return {"abs_median": torch.stack(medians)}


class TokenVectors(Probe):
    """The vectors of chosen positions at one site, `[prompt, layer, pos, dim]`: figures 5b and 5c.

    A prompt shorter than a position has NaN there.
    """

    name = "token_vectors"
    index = ("pos", "dim")
    kind = "tensor"

    def __init__(self, positions: Sequence[int] = (0,), site: str = "hook_resid_post"):
        self.positions = tuple(positions)
        self.sites = (site,)

    def reduce(self, activation: Float[Tensor, "batch pos d"], batch: Batch) -> dict[str, Tensor]:
        vectors = activation.new_full(
            (activation.shape[0], len(self.positions), activation.shape[-1]), float("nan"), dtype=torch.float32
        )
        for row, length in enumerate(batch.lengths):
            for column, position in enumerate(self.positions):
                if position < length:
                    vectors[row, column] = activation[row, position]
        return {"vector": vectors}


class SinkMass(Probe):
    """How much attention the later queries pay to one key, by layer and head (section 6, figure 7)."""

    name = "sink_mass"
    sites = (ATTENTION_ON_KEYS,)
    index = ("head",)

    def __init__(self, key: int = 0):
        self.keys = (key,)

    def reduce(self, activation: Float[Tensor, "batch head query 1"], batch: Batch) -> dict[str, Tensor]:
        rows = zip(activation[..., 0], batch.lengths, strict=True)
        return {"sink_mass": torch.stack([sink_mass(row[:, :length], self.keys[0]) for row, length in rows])}


class SinkByQuery(Probe):
    """The attention that each position pays to one key, averaged over heads: the sink map of any length."""

    name = "sink_by_query"
    sites = (ATTENTION_ON_KEYS,)
    index = ("pos",)

    def __init__(self, key: int = 0):
        self.keys = (key,)

    def reduce(self, activation: Float[Tensor, "batch head query 1"], batch: Batch) -> dict[str, Tensor]:
        return {"attention": activation[..., 0].mean(dim=1)}


def default_probes() -> list[Probe]:
    """All that `find_me_layer` and the emergence figures need."""
    return [Norms(), LargestActivations(), AbsMedian(), TokenVectors(), SinkMass()]
