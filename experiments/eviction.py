"""`exp=eviction`: loss and needles under a sliding KV cache, with and without sinks, unmasked and under a mask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from experiments.runner.declaration import AS_TYPED, AnalysisOptions, Experiment
from experiments.wemask import chosen_mask
from melens.validation.types import Count, Name, Said, Whole

if TYPE_CHECKING:
    from experiments.options.schema import Options
    from experiments.runner.study import Run
    from melens.models.loading import PlannedModel
    from melens.report.result import Result

__all__ = ["EXPERIMENTS"]

_Cache = Annotated[int, Field(strict=True, ge=16), Said("a whole number of at least 16")]
_Sinks = Annotated[int, Field(strict=True, ge=0, le=8)]
_AtLeast3 = Annotated[int, Field(strict=True, ge=3), Said("a whole number of at least 3")]


class EvictionOptions(AnalysisOptions):
    """The arguments of `melens.analysis.eviction`, but for the mask; the text by where it is read from."""

    name: Literal["eviction"]
    cache: _Cache
    sinks: Annotated[list[_Sinks], Said("a list of numbers of first tokens, each from 0 to 8")]
    draws: Count
    text: Annotated[Name | None, AS_TYPED, Said("a file, a dataset of the hub (org/name), or null")]
    n_texts: _AtLeast3
    n_tokens: Count
    needles: Whole


def _request(cfg: Options) -> None:
    from experiments.options.masks import check_one_mask  # which needs the registry, and that this module

    check_one_mask(cfg.wemask, "exp=eviction")


def _prepare(cfg: Options, folder: Path, planned: PlannedModel) -> str | None:
    """Read the text, and try it on the model's tokenizer."""
    from melens.analysis.cache_eviction import long_texts
    from melens.data.texts import read_text
    from melens.errors import MelensError

    asked = cfg.experiments["eviction"]
    if asked.text is not None and planned.tokenizer is None:
        raise MelensError(
            "This model has no tokenizer to read exp.text with. Leave exp.text out: random tokens are then taken."
        )
    text = None if asked.text is None else read_text(asked.text, option="exp.text")
    sizes = {"cache": asked.cache, "n_texts": asked.n_texts, "n_tokens": asked.n_tokens}
    long_texts(planned, text, **sizes, bos=cfg.prompts.bos, seed=cfg.seed)
    return text


def _run(run: Run, options: EvictionOptions) -> Result:
    from experiments.options.schema import as_list
    from experiments.runner.masks import only_mask_of
    from melens.analysis import eviction

    is_from_me = any(isinstance(start, str) for start in as_list(run.cfg.wemask.start))
    mask = None if is_from_me and run.me.layer is None else only_mask_of(run.cfg.wemask, run.me, run.model)
    asked = options.own | {"text": run.prepared["eviction"]}
    return eviction(run, mask, bos=run.cfg.prompts.bos, **asked)


EXPERIMENTS = (
    Experiment(
        "eviction",
        EvictionOptions,
        _run,
        nodes=("wemask",),
        request=_request,
        masks=chosen_mask,
        prepare=_prepare,
        in_all=False,
        can_resume=False,
    ),
)
