"""`exp=generate`: what a model writes with and without the mask of the node `wemask`, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.runner.declaration import Experiment, ExperimentOptions
from experiments.wemask import chosen_mask
from melens.errors import MelensError
from melens.validation.types import Flag

if TYPE_CHECKING:
    from experiments.options.schema import Options
    from experiments.runner.study import Run
    from melens.report.result import Result

__all__ = ["EXPERIMENTS"]


class GenerateOptions(ExperimentOptions):
    """Its own options beside the nodes `generate` and `wemask`."""

    name: Literal["generate"]
    keep: Flag


def run(run: Run, options: GenerateOptions) -> Result:
    from experiments.runner.masks import only_mask_of
    from melens.analysis import generate

    mask = only_mask_of(run.cfg.wemask, run.me, run.model)
    if mask is None:
        raise MelensError("wemask.rate is 0: without a mask there is nothing to compare. Give a rate over 0.")
    return generate(run, mask, bos=run.cfg.prompts.bos, **run.cfg.generate.model_dump())


def prepare(cfg: Options, folder: Path) -> None:
    """Try the chat template of the model, before the model is loaded."""
    from melens.analysis.generated_texts import make_chat
    from melens.models.loading import load_tokenizer

    if cfg.generate.chat:
        make_chat(load_tokenizer(**cfg.model.model_dump(exclude_unset=True)), cfg.generate.thinking)


EXPERIMENTS = (
    Experiment(
        "generate",
        GenerateOptions,
        run,
        nodes=("wemask", "generate"),
        masks=chosen_mask,
        prepare=prepare,
        in_all=False,
        can_resume=False,
    ),
)
