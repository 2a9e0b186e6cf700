"""The masks that a configuration asks for: each combination of the lists in `wemask`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from experiments.options.schema import MaskOptions
from melens import Emergence, MelensError, WeMask
from melens.masks.mask import FixedDims
from melens.models.view import ModelView, view_model

__all__ = ["masks_of", "on_blocks", "only_mask_of"]

SAVED = "saved"
"""Of `wemask.select`: the mask that the model was trained with."""
_LISTS = ("rate", "select", "site", "start", "seed")


def masks_of(options: MaskOptions, me: Emergence, model: TransformerBridge) -> list[WeMask | None]:
    """Return the masks of a grid with their dims settled, None for a rate of 0; each once.

    Raises:
        MelensError: a mask that this model cannot have.
    """
    masks: list[WeMask | None] = []
    for cell in _cells(options, view_model(model)):
        mask = _saved(cell, model) if cell["select"] == SAVED else None
        if mask is None and cell["rate"]:
            mask = WeMask(**cell).at(me).on(model)
        if mask not in masks:
            masks.append(mask)
    return masks


def only_mask_of(options: MaskOptions, me: Emergence, model: TransformerBridge) -> WeMask | None:
    """Return the one mask of an experiment that takes no grid, None for a rate of 0."""
    masks = masks_of(options, me, model)
    if len(masks) != 1:
        raise MelensError(f"This experiment takes one mask, but wemask gives {len(masks)}: no lists here.")
    return masks[0]


def _saved(cell: dict[str, Any], model: TransformerBridge) -> WeMask:
    """Return the mask beside a trained model, on all of its blocks or on some."""
    return on_blocks(WeMask.load(str(model.cfg.model_name)).on(model), cell["layers"])


def on_blocks(mask: WeMask, layers: Any) -> WeMask:
    """Leave a settled mask on `all` of its blocks, on the `first` (for maths and safety, appendix C), or on a list.

    Raises:
        MelensError: a list with a block that it does not mask.
    """
    fixed = mask.fixed
    assert fixed is not None
    if layers == "all":
        return mask
    kept = fixed.blocks[:1] if layers == "first" else tuple(layers)
    other = sorted(set(kept) - set(fixed.blocks))
    if other:
        blocks = ", ".join(map(str, fixed.blocks))
        raise MelensError(f"The model was trained with a mask on the blocks {blocks}; block {other[0]} is not masked.")
    dims = None if fixed.dims is None else {layer: fixed.dims[layer] for layer in kept}
    return replace(mask, layers=kept, fixed=FixedDims(dims, kept, fixed.model))


def _starts(cell: Mapping[str, Any], network: ModelView) -> list[Any]:
    """Return where a mask starts; of all blocks, one after the other those where it has a place."""
    if cell["start"] != "all_blocks":
        return [cell["start"]]
    blocks = range(len(network.blocks))
    return [block for block in blocks if cell["site"] == "resid_pre" or network.can_mask_attention(block)]


def _cells(options: MaskOptions, network: ModelView) -> list[dict[str, Any]]:
    """Combine what is given as lists: arguments of `WeMask`, with a rate of 0 for no mask."""
    plain = options.model_dump()
    lists = {name: plain[name] if isinstance(plain[name], list) else [plain[name]] for name in _LISTS}
    layers = plain["layers"]
    are_blocks = isinstance(layers, list) and all(isinstance(block, int) for block in layers)
    lists["layers"] = layers if isinstance(layers, list) and not are_blocks else [layers]
    combined = [plain | dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    cells = [cell | {"start": start} for cell in combined for start in _starts(cell, network)]
    for cell in cells:
        if cell["select"] != "random":
            cell["seed"] = 0  # else the same mask would count more than once
    return cells
