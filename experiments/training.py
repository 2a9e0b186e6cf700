"""`exp=sft`, `dpo`, `grpo`, `pretrain`: train a model with WeMask, with gates or plain, and see what becomes of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.runner.declaration import Experiment, ExperimentOptions
from melens.training.recipe import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.options.schema import MaskOptions, Options
    from experiments.options.training import TrainingRequest
    from experiments.runner.jobs import Job
    from experiments.runner.study import Run
    from melens.masks.mask import WeMask
    from melens.report.result import Result
    from melens.training.plan import TrainingPlan

__all__ = ["EXPERIMENTS", "mask_for", "model_options", "prepare_training"]


class TrainingOptions(ExperimentOptions):
    name: Literal["sft", "dpo", "grpo", "pretrain"]


def prepare_training(
    cfg: Options, request: TrainingRequest, tokenizer: Any, folder: Path | None = None
) -> TrainingRequest:
    """Choose the precision, load the rows and estimate the memory, before the model, which takes longer.

    Args:
        cfg, request: of the run.
        tokenizer: of the model.
        folder: of the run, if it trains one model.

    Raises:
        MelensError: the options, the data or the memory do not allow the training.
    """
    import torch
    from accelerate import PartialState
    from datasets import disable_progress_bars

    from melens.models.loading import check_memory
    from melens.training.runs import check_plan
    from melens.training.trainers import check_folder

    disable_progress_bars()
    plan = request.plan.on_device(gpu=torch.cuda.is_available())
    if folder is not None:
        planned = {"recipe": asdict(plan.recipe)}
        check_folder((request.resume or folder) / "checkpoints", planned, resume=request.resume is not None)
    options = model_options(cfg, plan)
    check_plan(plan, tokenizer)
    processes = PartialState()
    is_sharded = str(processes.distributed_type).endswith("FSDP")
    per_weight = plan.recipe.bytes_per_weight / (processes.num_processes if is_sharded else 1)
    check_memory(options.pop("name"), per_weight, "weights, gradients and the optimiser's state", **options)
    return replace(request, plan=plan)


def model_options(cfg: Options, plan: TrainingPlan) -> dict[str, Any]:
    """Return what the model is loaded with: its weights in the precision in which they are trained."""
    options = cfg.model.model_dump(exclude_unset=True)
    if plan.recipe.method == "pretrain":
        options |= {"seed": plan.recipe.seed}
        if options["tokenizer"] is None:
            options["tokenizer"] = str(_tokenizer_for(plan, options))
    return options | {"dtype": "bfloat16" if plan.recipe.precision == "bfloat16" else "float32"}


def _tokenizer_for(plan: TrainingPlan, options: dict[str, Any]) -> Path:
    """Train a tokenizer of the model's vocabulary on the plan's text, if no earlier run has."""
    from melens.training.packing import tokenizer_of_text
    from melens.training.pretraining import source_of

    return tokenizer_of_text(source_of(plan), options["config"]["vocab_size"])


def mask_for(run: Run, request: TrainingRequest) -> WeMask | None:
    """Return the mask of a training, with its dims settled on a model that is trained already; None for none."""
    from experiments.runner.masks import only_mask_of, unsettled_mask_of

    if request.mask is None:
        return None
    if request.plan.recipe.method == "pretrain":
        return unsettled_mask_of(request.mask.options, run.model)
    return only_mask_of(request.mask.options, run.me, run.model)


def _experiment(method: str) -> Experiment:
    def request_of(cfg: Options) -> TrainingRequest:
        from experiments.options.training import training_request  # which needs the registry, and that this module

        return training_request(cfg, method)

    def run(run: Run, options: TrainingOptions) -> Result:
        from melens.training.runs import training

        request: TrainingRequest = run.prepared[method]
        return training(
            run,
            request.plan,
            request.resume or run.folder,
            mask=mask_for(run, request),
            mask_name="" if request.mask is None else request.mask.name,
            resume=request.resume is not None,
        )

    def masks(cfg: Options) -> dict[str, MaskOptions]:
        preset = cfg.requests[method].mask
        return {} if preset is None else {preset.name: preset.options}

    return Experiment(
        method,
        TrainingOptions,
        run,
        nodes=("wemask", "training"),
        request=request_of,
        masks=masks,
        prepare=lambda cfg, folder, planned: prepare_training(cfg, cfg.requests[method], planned.tokenizer, folder),
        model_options=lambda cfg: model_options(cfg, cfg.requests[method].plan),
        in_all=False,
        trains=True,
        merge=merge,
    )


def merge(jobs: Sequence[Job]) -> list[Result]:
    """Draw the trainings of a sweep side by side."""
    import pandas as pd

    from melens.training.history import TrainingHistory, compare_trainings

    log, inspections = "training_log.parquet", "training_trace.parquet"
    trained = [job for job in jobs if job.is_ok and job.result["experiment"] in METHODS]
    trained = [job for job in trained if (job.folder / inspections).is_file()]
    if not trained:
        return []
    histories = [
        TrainingHistory(job.name, pd.read_parquet(job.folder / log), pd.read_parquet(job.folder / inspections))
        for job in trained
    ]
    methods = {job.result["experiment"] for job in trained}
    together = compare_trainings(histories, methods, {job.result["metrics"]["me_layer"] for job in trained})
    return [together, *_compared_arms([job for job in trained if job.result["experiment"] == "pretrain"])]


def _compared_arms(jobs: Sequence[Job]) -> list[Result]:
    """Compare the trainings from scratch, of each model that has several arms or seeds."""
    from melens.training.arms import compare_arms, read_arm

    arms = [read_arm(job.folder, job.result) for job in jobs]
    by_model = {model: [arm for arm in arms if arm.model == model] for model in sorted({arm.model for arm in arms})}
    return [compare_arms(own) for own in by_model.values() if len(own) > 1]


EXPERIMENTS = tuple(_experiment(method) for method in METHODS)
