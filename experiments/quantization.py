"""`exp=quantization`: what rounding linear layers costs, with and without massive tokens, and under masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from experiments.runner.declaration import AnalysisOptions, AtLeast2, Experiment
from melens.validation.types import Count, Said

if TYPE_CHECKING:
    from experiments.options.schema import MaskOptions, Options
    from experiments.runner.study import Run
    from melens.models.loading import PlannedModel
    from melens.report.result import Result

__all__ = ["EXPERIMENTS"]

_Bit = Annotated[int, Field(strict=True, ge=2, le=16)]


class QuantizationOptions(AnalysisOptions):
    """The arguments of `melens.analysis.quantization`, but for masks and texts."""

    name: Literal["quantization"]
    bits: Annotated[list[_Bit], Field(min_length=1), Said("a list of whole numbers from 2 to 16")]
    n_texts: Count
    max_tokens: AtLeast2


def _masks(cfg: Options) -> dict[str, MaskOptions]:
    """Return the mask of the node `wemask`, and those it is compared with, unless the user chose its dims."""
    chosen = str(cfg.given.get("wemask", "paper"))
    if chosen != "paper" or {"wemask.select", "wemask.site"} & cfg.given.keys():
        return {chosen: cfg.wemask}
    others = {"resid_pre": {"site": "resid_pre"}, "random": {"select": "random"}, "magnitude": {"select": "magnitude"}}
    return {chosen: cfg.wemask} | {name: cfg.wemask.model_copy(update=own) for name, own in others.items()}


def _prepare(cfg: Options, folder: Path, planned: PlannedModel) -> None:
    """Try the texts on the model's tokenizer and context."""
    from experiments.runner.texts import texts_of

    texts_of(cfg, planned)


def _run(run: Run, options: QuantizationOptions) -> Result:
    from experiments.runner.masks import masks_of
    from experiments.runner.texts import texts_of
    from melens.analysis import quantization

    asked = _masks(run.cfg).values() if run.me.layer is not None else ()  # else there is nothing to mask
    masks = [mask for own in asked for mask in masks_of(own, run.me, run.model) if mask is not None]
    return quantization(run, masks, texts_of(run.cfg, run.model), **options.own)


EXPERIMENTS = (
    Experiment(
        "quantization",
        QuantizationOptions,
        _run,
        nodes=("wemask", "data"),
        masks=_masks,
        prepare=_prepare,
        in_all=False,
        can_resume=False,
    ),
)
