"""`exp=generate`: what a model writes with and without the mask of the node `wemask`, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.runner.declaration import Experiment, ExperimentOptions
from experiments.wemask import chosen_mask
from melens.validation.types import Flag

if TYPE_CHECKING:
    from experiments.options.schema import Options
    from experiments.runner.study import Run
    from melens.models.loading import PlannedModel
    from melens.report.result import Result

__all__ = ["EXPERIMENTS"]


class GenerateOptions(ExperimentOptions):
    """Its own options beside the nodes `generate` and `wemask`."""

    name: Literal["generate"]
    keep: Flag


def _request(cfg: Options) -> None:
    from experiments.options.masks import check_one_mask  # which needs the registry, and that this module

    check_one_mask(cfg.wemask, "exp=generate")


def run(run: Run, options: GenerateOptions) -> Result:
    from experiments.runner.masks import only_mask_of
    from melens.analysis import generate

    mask = only_mask_of(run.cfg.wemask, run.me, run.model)
    assert mask is not None  # a rate of 0 is refused before
    return generate(run, mask, bos=run.cfg.prompts.bos, **run.cfg.generate.model_dump())


def prepare(cfg: Options, folder: Path, planned: PlannedModel) -> None:
    """Try the prompts on the model's chat template, its tokenizer and its context."""
    from melens.analysis.generated_texts import check_prompts

    asked = cfg.generate
    check_prompts(
        planned, asked.prompt, asked.max_new_tokens, chat=asked.chat, thinking=asked.thinking, bos=cfg.prompts.bos
    )


EXPERIMENTS = (
    Experiment(
        "generate",
        GenerateOptions,
        run,
        nodes=("wemask", "generate"),
        request=_request,
        masks=chosen_mask,
        prepare=prepare,
        in_all=False,
        can_resume=False,
    ),
)
