"""The masks of a run as options: presets of `conf/wemask/` by name, with what the user says otherwise, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from experiments.options.reading import CONF, OptionError
from experiments.options.schema import MaskOptions, Options, as_list
from experiments.runner.registry import EXPERIMENTS
from melens.masks.files import read_mask
from melens.validation.types import in_words

__all__ = ["Preset", "check_one_mask", "check_saved_masks", "mask_in_words", "masks_in_use", "presets_of"]

_MASKS = CONF / "wemask"


@dataclass(frozen=True)
class Preset:
    """A file of `conf/wemask/`, with the user's own options of the node `wemask` over it."""

    name: str
    options: MaskOptions
    has_own_layers: bool


def presets_of(
    names: Sequence[str], options: Options, *, key: str, rates: Sequence[float] | None = None
) -> list[Preset]:
    """Read presets by name; what the user gives of the node `wemask` holds for all of them.

    Args:
        key: the option that names the presets.
        rates: of a table, where neither preset nor user says another.

    Raises:
        OptionError: no such preset, or a choice of dims beside that of the presets.
    """
    chosen = options.given.get("wemask", "paper")
    if chosen != "paper" or "wemask.select" in options.given:
        other = "wemask.select" if chosen == "paper" else f"wemask={chosen}"
        raise OptionError(
            f"The masks are those of {key} (off, paper, random, ...), so {other} has no effect: leave it out."
        )
    given = {name: value for name, value in options.wemask if f"wemask.{name}" in options.given}
    known = sorted(path.stem for path in _MASKS.glob("*.yaml"))
    presets = []
    for name in names:
        if name not in known:
            raise OptionError(f"{key} names {name!r}; allowed are {', '.join(known)}.")
        own = {} if name == "paper" else _read(name)
        values = _read("paper") | ({} if rates is None else {"rate": list(rates)}) | own | given
        if own.get("rate") == 0:
            values["rate"] = 0  # no mask has no other rate
        presets.append(Preset(name, MaskOptions.model_validate(values), "layers" in own or "layers" in given))
    return presets


def masks_in_use(options: Options) -> dict[str, MaskOptions]:
    """Return the masks that a run will use, by the name of their preset; of several experiments with theirs before."""
    used: dict[str, MaskOptions] = {}
    for name in options.experiments:
        before = f"of {name}: " if len(options.experiments) > 1 else ""
        if (masks := EXPERIMENTS[name].masks) is not None:
            used |= {f"{before}{preset}": mask for preset, mask in masks(options).items()}
    return used


def check_one_mask(mask: MaskOptions, what: str) -> None:
    """Raise an `OptionError` for options that make several masks, or none, where `what` takes one."""
    for name, value in mask:
        are_blocks = name in ("layers", "positions") and isinstance(value, list) and isinstance(value[0], int)
        if "all_blocks" in as_list(value) or (isinstance(value, list) and len(value) > 1 and not are_blocks):
            raise OptionError(
                f"wemask.{name} is {in_words(value)}, but {what} takes one mask. Sweep with -m wemask.{name}=..."
            )
    if mask.rate in (0, [0]):
        raise OptionError(f"wemask.rate is 0, which masks nothing, but {what} takes a mask. Give a rate over 0.")


def check_saved_masks(options: Options) -> None:
    """Raise a `MelensError` where a run takes the mask that its model was trained with, and the folder has none."""
    if any("saved" in as_list(mask.select) for mask in masks_in_use(options).values()):
        read_mask(options.model.name)


def mask_in_words(mask: MaskOptions) -> str:
    """Write a mask's options in a line, as one types them."""
    if mask.rate == 0:
        return "no mask"
    return " ".join(f"{name}={in_words(value).replace(chr(39), '')}" for name, value in mask)


def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((_MASKS / f"{name}.yaml").read_text("utf-8"))
    values.pop("defaults", None)
    return values
