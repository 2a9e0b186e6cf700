"""Which dims a mask is on, by what they are multiplied, and the model on which they were chosen.

By the gains of `ln1` or at random, dims are chosen once for each block (`choose_dims`); by values, anew for each token
in the forward pass (`DimFactors`). They mean something on their own model alone: `identify` gives what sets it apart
from others, and `check_same_model` compares.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from melens.errors import MelensError
from melens.models.layout import listed
from melens.models.view import ModelView
from melens.printing import Brief
from melens.validation.signatures import given

__all__ = [
    "BY_GAIN", "DimFactors", "FixedDims", "check_same_model", "choose_dims", "count_dims", "identify",
    "redraw_tied_dims", "tied_dims",
]  # fmt: skip

BY_GAIN = ("weight", "weight_low")
BY_VALUE = ("magnitude", "batch_magnitude")
_SAME_GAINS = 0.01
"""Relative distance of the weights of ln1 in a block up to which a model is the one saved: bfloat16 rounds by 0.002."""


@dataclass(frozen=True, repr=False)
class FixedDims(Brief):
    """The dims of a mask on a certain model.

    Attributes:
        dims: by block; None where they depend on the token.
        blocks: which are masked.
        model: what identifies the model: `architecture`, `n_layers`, `d_model`, `vocabulary`, and `gain_sketches` of
            `ln1` by block (see `melens.models.view.ModelView`).
    """

    dims: dict[int, tuple[int, ...]] | None
    blocks: tuple[int, ...]
    model: dict[str, Any]


# --- Choosing ---------------------------------------------------------------------------------------------------------


def choose_dims(
    view: ModelView, blocks: Sequence[int], *, rate: float | int, select: str, seed: int, massive_dims: Sequence[int]
) -> dict[int, tuple[int, ...]] | None:
    """Choose the dims of each block, in order, by the arguments of a `WeMask`; None where they depend on the token.

    Raises:
        MelensError: a rate that selects no dim, massive dims that the model does not have, a block without `ln1`.
    """
    d_model, count = view.d_model, 0 if select == "massive" else count_dims(rate, view.d_model)
    if select in BY_VALUE:
        return None
    if rate == 0:
        return dict.fromkeys(blocks, ())
    if select == "massive":
        if not massive_dims or max(massive_dims) >= d_model:
            raise MelensError(
                f"select=massive masks massive_dims, which is {given(massive_dims)}; the model's width is {d_model}. "
                "mask.at(melens.find_me_layer(trace)) fills in its massive dims."
            )
        return dict.fromkeys(blocks, tuple(sorted(massive_dims)))
    if select == "random":  # each block draws its own; those of a lower rate are among those of a higher
        seeds = [torch.Generator().manual_seed(seed * 1_000_003 + layer) for layer in blocks]
        chosen = [torch.randperm(d_model, generator=generator)[:count].sort().values for generator in seeds]
    else:
        gains = _gains_of(view, blocks)
        _warn_of_equal_gains(gains, blocks)
        chosen = [*_dims_by_gain(gains, count, largest=select == "weight")]
    return {layer: tuple(dims.tolist()) for layer, dims in zip(blocks, chosen, strict=True)}


def count_dims(rate: float | int, d_model: int) -> int:
    """Return k = floor(rate · d), equation 4; a `MelensError` if a rate over 0 selects no dim."""
    count = math.floor(rate * d_model + 1e-9)  # 0.29 · 100 is 28.999…
    if count < 1 and rate > 0:
        digits = 1 - math.floor(math.log10(1 / d_model))
        least = math.ceil(10**digits / d_model) / 10**digits  # two digits, rounded up: it selects one dim
        raise MelensError(f"Rate {rate:g} selects 0 of {d_model} dims; use at least {least:g}, or 0 for no mask.")
    return count


def _gains_of(view: ModelView, blocks: Sequence[int]) -> Float[Tensor, "block d"]:
    """Read the gains of some blocks, and bring them to the CPU in one transfer, as each waits for a GPU."""
    gains = [view.gain(layer) for layer in blocks]
    return torch.stack([gain.to(gains[0].device) for gain in gains]).cpu()


def _dims_by_gain(gain: Float[Tensor, "*block d"], count: int, *, largest: bool) -> Int[Tensor, "*block k"]:
    """Choose the dims with the largest |gain|, or the smallest; of equal ones the first, on every device."""
    return gain.abs().sort(descending=largest, stable=True).indices[..., :count].sort().values


def tied_dims(view: ModelView, chosen: FixedDims) -> dict[int, tuple[int, ...]]:
    """Find the equal gains of which some are masked and some are not, as those of bfloat16 take few values.

    Args:
        view: of the model.
        chosen: dims that were chosen by gain.

    Returns:
        By block the dims whose |gain| is that of the last one that is masked; blocks without such a tie are left out.
    """
    if not chosen.dims:
        return {}
    found = {}
    gains = _gains_of(view, [*chosen.dims]).abs()
    for (layer, dims), gain in zip(chosen.dims.items(), gains, strict=True):
        masked = torch.zeros(len(gain), dtype=torch.bool)
        masked[list(dims)] = True
        tied = torch.isin(gain, gain[masked]) & torch.isin(gain, gain[~masked])
        if tied.any():
            found[layer] = tuple(tied.nonzero()[:, 0].tolist())
    return found


def redraw_tied_dims(view: ModelView, chosen: FixedDims, seed: int) -> FixedDims | None:
    """Draw again which of equal gains are masked, as many as before; None where no gains are tied."""
    if not (tied := tied_dims(view, chosen)):
        return None
    drawn = dict(chosen.dims or {})
    for layer, candidates in tied.items():
        surely = set(drawn[layer]) - set(candidates)
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed * 1_000_003 + layer))
        of_tied = (candidates[at] for at in order[: len(drawn[layer]) - len(surely)].tolist())
        drawn[layer] = tuple(sorted([*surely, *of_tied]))
    return FixedDims(drawn, chosen.blocks, chosen.model)


def _warn_of_equal_gains(gains: Float[Tensor, "block d"], blocks: Sequence[int]) -> None:
    """Warn, in one sentence, of the blocks whose gains are all alike or no numbers, and so choose nothing."""
    sizes = gains.abs()
    is_alike = ~gains.isfinite().all(-1) | (sizes.amax(-1) - sizes.amin(-1) <= 1e-6 * sizes.amax(-1))
    alike = [layer for layer, is_one in zip(blocks, is_alike.tolist(), strict=True) if is_one]
    if alike:
        message = f"The gains of ln1 in {listed(alike)} are all alike, so the choice of dims there is arbitrary."
        warnings.warn(message, stacklevel=5)


# --- In a forward pass ------------------------------------------------------------------------------------------------


class DimFactors:
    """What the values of a masked token are multiplied by: 1 - strength in the dims of the mask, else 1.

    Factors that do not depend on the token are non-persistent buffers of their block: they move with the model, and no
    checkpoint holds them.
    """

    def __init__(
        self, view: ModelView, chosen: FixedDims, *, select: str, count: int, strength: float | int, refresh: bool
    ) -> None:
        self._left = 1 - strength
        self._select, self._count, self._refresh = select, count, refresh
        self._modules = {layer: view.blocks[layer].module for layer in chosen.blocks}
        self._buffer = f"melens_mask_{id(self)}"
        if refresh:
            self._gains = {layer: view.gain_parameter(layer) for layer in chosen.blocks}
        for layer, dims in (chosen.dims or {}).items():
            like = next(self._modules[layer].parameters())
            device = torch.device("cpu") if like.is_meta else like.device
            factors = torch.ones(view.d_model, dtype=like.dtype)
            masked = np.array(dims, dtype=np.int64)  # a list of Python's takes five times as long
            factors[torch.from_numpy(masked)] = self._left
            self._modules[layer].register_buffer(self._buffer, factors.to(device), persistent=False)

    def __call__(self, layer: int, rows: Float[Tensor, "*n d"]) -> Tensor:
        """Return the factors for these tokens of a block, `[d]` or `[*n, d]`."""
        if self._select in BY_VALUE:
            size = rows.detach().abs()
            if self._select == "batch_magnitude":
                size = size.flatten(0, -2).mean(0)
            dims = size.topk(self._count, dim=-1).indices
            return torch.ones_like(size).scatter(-1, dims, self._left)
        module = self._modules[layer]
        if self._refresh and module.training:
            weight, offset = self._gains[layer]
            dims = _dims_by_gain(weight.detach().float() + offset, self._count, largest=self._select == "weight")
            buffer = module.get_buffer(self._buffer)
            buffer.fill_(1).index_fill_(0, dims.to(buffer.device), self._left)
        return module.get_buffer(self._buffer).to(rows)

    def remove(self) -> None:
        """Take the buffers from the model."""
        for module in self._modules.values():
            module._buffers.pop(self._buffer, None)
            module._non_persistent_buffers_set.discard(self._buffer)


# --- Which model ------------------------------------------------------------------------------------------------------


def identify(view: ModelView) -> dict[str, Any]:
    """Return what distinguishes a model from others, whatever its precision: `FixedDims.model`."""
    return {
        "architecture": view.architecture,
        "n_layers": len(view.blocks),
        "d_model": view.d_model,
        "vocabulary": view.vocabulary,
        "gain_sketches": view.gain_sketches(),
    }


def check_same_model(chosen_on: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise a `MelensError` if dims were chosen on another model; precision may differ."""
    for name in ("architecture", "n_layers", "d_model", "vocabulary"):
        saved, own = chosen_on.get(name), model[name]
        if saved != own:
            raise MelensError(f"This mask is of another model: its {name} is {saved!r}, this model's is {own!r}.")
    for layer, (saved, own) in enumerate(zip(chosen_on["gain_sketches"], model["gain_sketches"], strict=True)):
        # relative to a size of at least 0.1: the weights that a model begins with may be 0
        if saved and (own is None or math.dist(saved, own) > _SAME_GAINS * max(math.hypot(*saved), 0.1)):
            raise MelensError(f"This mask is of another model: the weights of ln1 in block {layer} differ.")
