"""Which masks a run is asked for in the end, presets and the user's options put together."""

from __future__ import annotations

from experiments.options.benchmark import benchmark_request
from experiments.options.schema import MaskOptions, Options
from experiments.options.table import table_request
from experiments.options.training import training_request
from melens.training.recipe import METHODS
from melens.validation.types import in_words

__all__ = ["mask_in_words", "masks_asked"]


def masks_asked(options: Options) -> dict[str, MaskOptions]:
    """Return the masks that a run will use, by the name of their preset; of several experiments with theirs before."""
    several = len(options.experiments) > 1
    return {
        f"of {name}: {preset}" if several else preset: mask
        for name in options.experiments
        for preset, mask in _masks_of(name, options).items()
    }


def _masks_of(name: str, options: Options) -> dict[str, MaskOptions]:
    if name in ("wemask", "generate"):
        return {str(options.given.get("wemask", "paper")): options.wemask}
    if name == "benchmark":
        return {preset.name: preset.options for preset in benchmark_request(options).masks}
    if name in METHODS:
        preset = training_request(options, name).mask
        return {} if preset is None else {preset.name: preset.options}
    if name == "tables":
        return {"paper": options.wemask.model_copy(update={"rate": list(table_request(options).rates)})}
    return {}


def mask_in_words(mask: MaskOptions) -> str:
    """Write a mask's options in a line, as one types them."""
    if mask.rate == 0:
        return "no mask"
    return " ".join(f"{name}={in_words(value).replace(chr(39), '')}" for name, value in mask)
