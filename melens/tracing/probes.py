"""What to measure: a probe names its sites in a block and reduces each activation that passes there.

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

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from melens.analysis.metrics import (
    abs_max,
    abs_median,
    concentration,
    cosine_with_first,
    energy_share,
    has_triton,
    kl_to_gain,
    l2_norm,
)
from melens.errors import MelensError
from melens.printing import Brief, brief
from melens.tracing.sites import RESID_PRE_0
from melens.validation.signatures import LayerList, PositionList, ShareList, SiteList, checked
from melens.validation.types import Count, Name, Number, Said

__all__ = [
    "AbsMedian", "Batch", "Concentration", "CosineWithFirst", "GainAlignment", "LargestActivations", "Norms", "Probe",
    "TokenVectors", "first_against_others",
]  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Batch(Brief):
    """The prompts of one forward pass, padded on the right.

    Attributes:
        tokens: token ids; whatever lies beyond a prompt's length is padding.
        lengths, prompts: of each row, the number of its tokens and which prompt of the trace it is.

    Example:
        >>> batch = melens.Batch(torch.tensor([[5, 6, 7], [8, 9, 0]]), lengths=(3, 2), prompts=(0, 1))
        >>> batch.is_token
        tensor([[ True,  True,  True],
                [ True,  True, False]])
        >>> batch.weights_after(0)
        tensor([[0.0000, 0.5000, 0.5000],
                [0.0000, 1.0000, 0.0000]])
    """

    tokens: Int[Tensor, "batch pos"]
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def n_tokens(self) -> Int[Tensor, " batch"]:
        """The lengths, where the tokens are."""
        return torch.tensor(self.lengths, dtype=torch.int32).to(self.tokens.device)

    @cached_property
    def is_token(self) -> Bool[Tensor, "batch pos"]:
        """False at padding."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.n_tokens[:, None]

    def weights_after(self, key: int) -> Float[Tensor, "batch pos"]:
        """Equal weights of sum 1 for the tokens after a position, 0 for the others; NaN where there are none."""
        if ("after", key) not in self._known:
            later = self.is_token.float()
            later[:, : key + 1] = 0
            self._known["after", key] = later / later.sum(dim=-1, keepdim=True)
        return self._known["after", key]

    def columns_of(self, positions: tuple[int, ...]) -> Int[Tensor, "batch position"]:
        """The columns of positions, of which negative ones count from each prompt's own end; -1 where it has none."""
        if ("columns", positions) not in self._known:
            ends = self.n_tokens.long()
            columns = torch.stack([ends + at if at < 0 else torch.full_like(ends, at) for at in positions], dim=1)
            is_there = (columns >= 0) & (columns < ends[:, None])
            self._known["columns", positions] = columns.where(is_there, -1)
        return self._known["columns", positions]

    def times(self, n: int) -> Batch:
        """These prompts n times over, for the activations of n blocks one after the other."""
        if ("times", n) not in self._known:
            many = self if n == 1 else Batch(self.tokens.repeat(n, 1), self.lengths * n, self.prompts * n)
            if n > 1:  # from the lengths that are on the device already
                many.__dict__["n_tokens"] = self.n_tokens.repeat(n)
            self._known["times", n] = many
        return self._known["times", n]


class Probe(ABC):
    """A reduction of activations, fed as they pass in `melens.trace`.

    Attributes:
        name: of its table (or tensor) in the trace; `named` gives another to a second probe of the class.
        sites: hook names within a block (`"hook_resid_post"`, `"ln2.hook_out"`), full hook names
            (`"blocks.0.hook_resid_pre"`), or `ATTENTION_ON_KEYS`.
        index: what the dimensions after the batch of each returned tensor run over: `"pos"` is the token's position,
            any other name becomes a column of its own. Rows at padded positions are dropped.
        keys: key positions, for `ATTENTION_ON_KEYS`.
        layers: blocks to measure; None for all.
        kind: `"table"`, or `"tensor"` for wide results, kept as `[prompt, layer, *index]`.
        may_miss: a hook that does not fire in this model leaves a gap; otherwise it is an error.
        by_row: each row of a batch is reduced by itself, from the activation and the batch's tensors alone. Then one
            `reduce` may get several blocks' activations of a site at once, one after the other along the batch, and be
            recorded as a CUDA graph that runs on other prompts.

    Example:
        >>> class LargestEntry(melens.Probe):
        ...     name = "largest_entry"
        ...     sites = ("hook_resid_post",)
        ...     index = ("pos",)
        ...
        ...     def reduce(self, activation, batch):
        ...         return {"value": activation.abs().amax(dim=-1)}
        >>> melens.trace(model, prompts, LargestEntry())["largest_entry"].columns.tolist()
        ['prompt', 'layer', 'site', 'pos', 'value']
    """

    name: str
    sites: tuple[str, ...]
    index: tuple[str, ...] = ()
    keys: tuple[int, ...] = ()
    layers: Sequence[int] | None = None
    kind: Literal["table", "tensor"] = "table"
    may_miss: bool = False
    by_row: bool = False

    def __repr__(self) -> str:
        settings = [f"{name}={brief(value)}" for name, value in vars(self).items() if name[0] != "_"]
        return f"{type(self).__name__}({', '.join(settings)})"

    @abstractmethod
    def reduce(self, activation: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Reduce one activation to small tensors `[batch, ...]`, one a quantity.

        The activation is the model's own, shape as at that hook point: it must not be changed, nor kept.
        """

    def reduce_at(self, site: str, layer: int, activation: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Do what `reduce` does; for a probe that must know the site and the block: override it."""
        return self.reduce(activation, batch)

    def complete(self, quantities: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn what `reduce` returned for a batch, stacked to `[place, batch, ...]` on the CPU, into the quantities."""
        return quantities

    @checked
    def named(self, name: Name) -> Probe:
        """Return the probe under another name, so that two of one class can be traced together."""
        probe = copy.copy(self)
        probe.name = name
        return probe


class Norms(Probe):
    """L2 norm by layer and position: figures 1, 2, 5a, 10 and 11-20.

    The column is `norm`, of each token at each site.

    Example:
        >>> melens.trace(model, prompts, melens.Norms())["norm"].columns.tolist()
        ['prompt', 'layer', 'site', 'pos', 'norm']
    """

    name = "norm"
    by_row = True
    index = ("pos",)

    @checked
    def __init__(
        self,
        sites: SiteList = (RESID_PRE_0, "ln2.hook_out", "hook_mlp_out", "hook_resid_post"),
        layers: LayerList | None = None,
    ):
        self.sites = tuple(sites)
        self.layers = layers

    def reduce(self, activation: Float[Tensor, "batch pos *d"], batch: Batch) -> dict[str, Tensor]:
        return {"norm": l2_norm(activation)}


class LargestActivations(Probe):
    """The largest |h| of each hidden state with their positions and dims: the criterion for "massive".

    Of the `n_tokens` tokens with the largest |h|, the `n_dims` largest entries each; rank 0 is the largest of all.
    Where more tokens have an entry over `min_abs`, each of the others adds a row: its largest |h|, no sign, dim -1.
    Rows for which a prompt has no token have pos -1 and NaN.

    Example:
        >>> melens.trace(model, prompts, melens.LargestActivations(n_tokens=1, n_dims=4))["largest"].columns.tolist()
        ['prompt', 'layer', 'site', 'rank', 'pos', 'dim', 'value']
    """

    name = "largest"
    by_row = True
    index = ("rank",)

    @checked
    def __init__(
        self, n_tokens: Count = 8, n_dims: Count = 8, sites: SiteList = ("hook_resid_post",), min_abs: Number = 100
    ):
        self.n_tokens, self.n_dims, self.min_abs = n_tokens, n_dims, min_abs
        self.sites = tuple(sites)

    def reduce(self, activation: Float[Tensor, "batch pos d"], batch: Batch) -> dict[str, Tensor]:
        sizes = abs_max(activation)
        if min(batch.lengths) < activation.shape[1]:
            sizes = sizes.masked_fill(~batch.is_token.to(activation.device), -1)
        n_tokens, n_dims = min(self.n_tokens, activation.shape[1]), min(self.n_dims, activation.shape[2])
        if sizes.is_cuda and has_triton():
            from melens.tracing.kernels import largest_dims, largest_tokens

            positions = largest_tokens(sizes, n_tokens)
            values, dims = largest_dims(activation, positions, n_dims)
        else:
            largest, positions = sizes.topk(n_tokens, dim=-1)
            tokens = activation[torch.arange(len(positions), device=positions.device)[:, None], positions]
            dims = tokens.abs().topk(n_dims, dim=-1).indices
            is_missing = largest < 0  # the prompt has fewer tokens
            positions = positions.masked_fill(is_missing, -1)
            values = tokens.gather(-1, dims).float().masked_fill(is_missing[..., None], float("nan"))
        at = positions[..., None].expand_as(dims)
        entries = {"pos": at.int(), "dim": dims.int(), "value": values}
        return {name: of_rank.flatten(1) for name, of_rank in entries.items()} | {"of_token": sizes}

    def complete(self, quantities: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the other tokens with an entry over `min_abs`, in as many rows as the fullest hidden state needs."""
        of_token, positions = quantities.pop("of_token").float(), quantities["pos"]
        n_large = (of_token > self.min_abs).sum(-1)
        n_rows = int(n_large.max()) - self.n_tokens
        if n_rows <= 0:
            return quantities
        others = of_token.scatter(-1, positions.clamp(min=0).long(), -1)
        values, at = others.topk(n_rows, dim=-1)
        is_large = values > self.min_abs
        more = {
            "pos": at.where(is_large, -1).int(),
            "dim": torch.full_like(at, -1).int(),
            "value": values.masked_fill(~is_large, float("nan")),
        }
        return {name: torch.cat([values, more[name]], dim=-1) for name, values in quantities.items()}


class AbsMedian(Probe):
    """The median of |h| over all tokens and dims of a hidden state: the other half of the criterion for "massive".

    The column is `abs_median`, by prompt and block (Sun et al. 2024).

    Example:
        >>> melens.trace(model, prompts, melens.AbsMedian())["abs_median"].columns.tolist()
        ['prompt', 'layer', 'site', 'abs_median']
    """

    name = "abs_median"
    by_row = True

    @checked
    def __init__(self, sites: SiteList = ("hook_resid_post",)):
        self.sites = tuple(sites)

    def reduce(self, activation: Float[Tensor, "batch pos d"], batch: Batch) -> dict[str, Tensor]:
        if activation.is_cuda and activation.element_size() == 2 and has_triton():
            from melens.tracing.kernels import abs_medians

            return {"abs_median": abs_medians(activation, batch.n_tokens.to(activation.device))}
        if min(batch.lengths) == max(batch.lengths):
            return {"abs_median": abs_median(activation[:, : batch.lengths[0]])}
        hiddens = (hidden[:length] for hidden, length in zip(activation, batch.lengths, strict=True))
        return {"abs_median": torch.stack(list(map(abs_median, hiddens)))}


class TokenVectors(Probe):
    """The vectors of chosen positions at one site, `[prompt, layer, pos, dim]`: figures 5b and 5c.

    Negative positions count from each prompt's own end: -1 is its last token. A prompt shorter than a position has NaN
    there; of keys, queries and values the heads come one after the other.

    Example:
        >>> vectors = melens.trace(model, prompts, melens.TokenVectors([0, -1])).tensors["token_vectors"]
        >>> vectors.shape == (len(prompts), len(model.blocks), 2, model.cfg.d_model)
        True
    """

    name = "token_vectors"
    by_row = True
    index = ("pos", "dim")
    kind = "tensor"

    @checked
    def __init__(self, positions: PositionList = (0,), site: Name = "hook_resid_post"):
        self.positions = tuple(positions)
        self.sites = (site,)

    def reduce(self, activation: Float[Tensor, "batch pos *d"], batch: Batch) -> dict[str, Tensor]:
        columns = batch.columns_of(self.positions).to(activation.device)
        if self.positions == (0,):
            vectors = activation[:, :1].flatten(2)
        else:
            rows = torch.arange(len(columns), device=activation.device)[:, None]
            vectors = activation[rows, columns].flatten(2)
        return {"vector": vectors.masked_fill((columns < 0)[..., None], float("nan"))}


def first_against_others(quantities: Mapping[str, Float[Tensor, "batch pos *head"]], batch: Batch) -> dict[str, Tensor]:
    """Keep each quantity of token 0 and, as `<name>_others`, its mean over the prompt's other tokens."""
    kept: dict[str, Tensor] = {}
    for name, values in quantities.items():
        weights = batch.weights_after(0).to(values.device)
        weights = weights.view(*weights.shape, *[1] * (values.ndim - 2))
        of_tokens = values.masked_fill(weights == 0, 0)  # padding may hold 0 / 0
        kept |= {name: values[:, 0], f"{name}_others": (of_tokens * weights).sum(1)}
    return kept


Gains = Annotated[
    Mapping[tuple[str, int], Float[Tensor, " d"]],
    Field(min_length=1),
    Said("a dict of gains by (site, layer), such as ('ln2', 3)"),
]


class GainAlignment(Probe):
    """How far a normalisation's output lies along its gain, token 0 against the others: figures 2 and 3.

    The columns are `weight_norm` (‖ĥ‖, figure 2), `kl` (equation 2), and, for each share of the width, `frac_<share>`
    (equation 1), each with its `_others`.

    Example:
        >>> gains = {("ln2", 2): melens.read_normalization(model, 2, "ln2").gain}
        >>> melens.trace(model, prompts, melens.GainAlignment(gains))["gain_alignment"].columns[3:].tolist()
        ['weight_norm', 'weight_norm_others', 'kl', 'kl_others', 'frac_0.01', 'frac_0.01_others']
    """

    name = "gain_alignment"

    @checked
    def __init__(self, gains: Gains, shares: ShareList = (0.01,)):
        """Take gains by site (`"ln1"` or `"ln2"`) and layer, and which shares of the width are the top gains K."""
        self.sites = tuple(dict.fromkeys(f"{site}.hook_out" for site, _ in gains))
        self.layers = sorted({layer for _, layer in gains})
        self._gains = {(f"{site}.hook_out", layer): gain for (site, layer), gain in gains.items()}
        self._top = {place: {share: _top_dims(gain, share) for share in shares} for place, gain in self._gains.items()}

    def reduce(self, activation: Float[Tensor, "batch pos d"], batch: Batch) -> dict[str, Tensor]:
        return first_against_others({"weight_norm": l2_norm(activation)}, batch)

    def reduce_at(self, site: str, layer: int, activation: Tensor, batch: Batch) -> dict[str, Tensor]:
        gain = self._gains[site, layer]
        if len(gain) != (width := activation.shape[-1]):
            raise MelensError(f"The gain of {site} in block {layer} has {len(gain)} dims, its output {width}.")
        along_gain = {"kl": kl_to_gain(activation, gain)}
        for share, top in self._top[site, layer].items():
            along_gain[f"frac_{share:g}"] = energy_share(activation, top.to(activation.device))
        return self.reduce(activation, batch) | first_against_others(along_gain, batch)


def _top_dims(gain: Float[Tensor, " d"], share: float) -> Bool[Tensor, " d"]:
    """Mark the dims of the largest |gain|: `share` of the width, at least one."""
    top = torch.zeros(gain.shape, dtype=torch.bool, device=gain.device)
    top[gain.abs().topk(max(1, int(share * len(gain)))).indices] = True
    return top


class Concentration(Probe):
    """How few dims hold an activation's energy, token 0 against the others (equation 3, figure 4).

    The columns are `concentration`, from 1/d (spread evenly) to 1 (all in one dim), of token 0, and
    `concentration_others`, the mean over the prompt's other tokens.

    Example:
        >>> melens.trace(model, prompts, melens.Concentration("hook_mlp_out"))["concentration"].columns.tolist()
        ['prompt', 'layer', 'site', 'concentration', 'concentration_others']
    """

    name = "concentration"

    @checked
    def __init__(self, sites: SiteList):
        self.sites = tuple(sites)

    def reduce(self, activation: Float[Tensor, "batch pos d"], batch: Batch) -> dict[str, Tensor]:
        return first_against_others({"concentration": concentration(activation)}, batch)


class CosineWithFirst(Probe):
    """The cosine of each token's state with token 0's of the same prompt: which tokens have turned to its direction.

    The columns are `cosine`, and `centred_cosine`, without what the states of the prompt's other tokens share
    (`melens.analysis.metrics.cosine_with_first`). Where token 0 is an ordinary token neither tells of a sink.

    Example:
        >>> melens.trace(model, prompts, melens.CosineWithFirst())["cosine_with_first"].columns.tolist()
        ['prompt', 'layer', 'site', 'pos', 'cosine', 'centred_cosine']
    """

    name = "cosine_with_first"
    by_row = True
    index = ("pos",)

    @checked
    def __init__(self, sites: SiteList = ("hook_resid_post",)):
        self.sites = tuple(sites)

    def reduce(self, activation: Float[Tensor, "batch pos d"], batch: Batch) -> dict[str, Tensor]:
        cosine, centred = cosine_with_first(activation, batch.weights_after(0).to(activation.device))
        return {"cosine": cosine, "centred_cosine": centred}
