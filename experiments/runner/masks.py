"""The masks that options ask for, on a model: each combination of the lists in the node `wemask`."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from experiments.options.schema import MaskOptions, as_list
from melens import Emergence, MelensError, WeMask
from melens.masks.dims import FixedDims, count_dims
from melens.models.loading import PlannedModel
from melens.models.view import ModelView, view_model

__all__ = ["check_masks", "masks_of", "on_blocks", "only_mask_of", "unsettled_mask_of"]

_BY_RATE = ("weight", "weight_low", "random", "magnitude")
"""Selections that differ below rate 1 alone."""


def check_masks(options: MaskOptions, planned: PlannedModel) -> None:
    """Refuse a rate, a block or a file that no weights and no ME layer would make right.

    Raises:
        MelensError: a mask that this model cannot have.
    """
    view = view_model(planned.network)
    for arguments in _combinations(options, view):
        if arguments["select"] == "saved":
            on_blocks(WeMask.load(planned.name), arguments["layers"])
        elif arguments["rate"]:
            if arguments["select"] != "massive":
                count_dims(arguments["rate"], view.d_model)
            if isinstance(arguments["layers"], list) or not isinstance(arguments["start"], str):
                WeMask(**arguments).blocks(planned.network)


def masks_of(options: MaskOptions, me: Emergence, model: TransformerBridge) -> list[WeMask | None]:
    """Return the masks of a grid with their dims chosen, None for a rate of 0; each once.

    Raises:
        MelensError: a mask that this model cannot have.
    """
    masks: list[WeMask | None] = []
    for arguments in _combinations(options, view_model(model)):
        mask = None
        if arguments["select"] == "saved":  # with the model, which was trained with it
            mask = on_blocks(WeMask.load(str(model.cfg.model_name)).on(model), arguments["layers"])
        elif arguments["rate"]:
            mask = WeMask(**arguments).at(me).on(model)
        if mask not in masks:
            masks.append(mask)
    return masks


def only_mask_of(options: MaskOptions, me: Emergence, model: TransformerBridge) -> WeMask | None:
    """Return the one mask of an experiment that takes no grid, None for a rate of 0."""
    masks = masks_of(options, me, model)
    if len(masks) != 1:
        raise MelensError(f"This experiment takes one mask, but wemask makes {len(masks)}: give no lists in it.")
    return masks[0]


def unsettled_mask_of(options: MaskOptions, model: TransformerBridge) -> WeMask:
    """Return the one mask of a training from scratch: its dims, and perhaps its start, are found as the model grows."""
    combined = _combinations(options, view_model(model))
    if len(combined) != 1:
        raise MelensError(f"This experiment takes one mask, but wemask makes {len(combined)}: give no lists in it.")
    if combined[0]["select"] == "saved":
        raise MelensError("wemask=saved is the mask of a trained model, and exp=pretrain has none yet.")
    return WeMask(**combined[0])


def on_blocks(mask: WeMask, layers: Any) -> WeMask:
    """Leave a mask with its dims on `all` of its blocks, the `first` (for maths and safety, appendix C) or a list.

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


def _combinations(options: MaskOptions, view: ModelView) -> list[dict[str, Any]]:
    """Combine what is given as lists: arguments of `WeMask`, with a rate of 0 for no mask."""
    plain = options.model_dump()
    lists = {name: as_list(plain[name]) for name in ("rate", "select", "site", "start", "seed")}
    are_blocks = isinstance(plain["layers"], list) and isinstance(plain["layers"][0], int)
    lists["layers"] = [plain["layers"]] if are_blocks else as_list(plain["layers"])
    combined = []
    for values in itertools.product(*lists.values()):
        arguments = plain | dict(zip(lists, values, strict=True))
        if arguments["rate"] == 1 and arguments["select"] in _BY_RATE:
            arguments["select"] = next(name for name in _BY_RATE if name in lists["select"])  # each takes all dims
        if arguments["select"] != "random" or arguments["rate"] == 1:
            arguments["seed"] = 0  # else the same mask would count more than once
        if arguments["start"] == "all_blocks":  # one after the other, where the mask has a place
            anywhere = arguments["site"] == "resid_pre"
            starts = [block for block in range(len(view.blocks)) if anywhere or view.can_mask_attention(block)]
            combined += [arguments | {"start": start} for start in starts]
        else:
            combined.append(arguments)
    return combined
