"""The hyperparameters of a training: the user's, else those of the dataset, else the paper's for the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any

import yaml
from pydantic import Field

from melens.environment.conf import conf_folder
from melens.environment.extras import check_extra
from melens.errors import MelensError
from melens.validation.types import Count, Flag, Number, Positive, Said, Whole, check_fields, listed, one_of

__all__ = ["METHODS", "Lora", "Recipe", "check_installed", "known_datasets", "training_conf"]

METHODS = ("sft", "dpo", "grpo", "pretrain")
_UnderOne = Annotated[Number, Field(lt=1), Said("a number from 0 to under 1")]
BYTES_PER_WEIGHT = {"auto": 4, "float32": 4, "mixed": 4, "bfloat16": 2}
Precision = Annotated[str, one_of(tuple(BYTES_PER_WEIGHT)), Said(listed(tuple(BYTES_PER_WEIGHT)))]
_TRACKERS = ("none", "tensorboard", "wandb", "trackio")
Tracker = Annotated[str, one_of(_TRACKERS), Said(listed(_TRACKERS))]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear layer of the blocks, in place of training all weights."""

    rank: Count = 16
    alpha: Positive = 32
    dropout: _UnderOne = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "training.lora.{}")


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training.

    Attributes:
        method: one of `METHODS`.
        batch_size: rows in an optimiser step over all processes; with GRPO, prompts.
        micro_batch_size: rows (with GRPO, rollouts) in a forward pass of one process.
        lr, epochs, weight_decay: of AdamW; the rate falls linearly after `warmup`, a share of all steps (of `pretrain`
            as a cosine).
        steps: of the optimiser; None makes as many as the epochs need.
        max_length: tokens of a row, which is cut beyond; not used by GRPO.
        max_new_tokens, rollouts, temperature: length, number and temperature of the replies that GRPO samples.
        beta: DPO's temperature, or the coefficient of GRPO's KL term.
        format_weight: weight of GRPO's format reward, beside 1 for the right answer.
        precision: `"float32"`; `"mixed"` for float32 weights and bfloat16 arithmetic; `"bfloat16"` for weights too;
            `"auto"` for what suits the machine (`TrainingPlan.on_device`).
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        compile: by torch.compile, in minutes that long trainings earn back.
        lora: None trains all weights.
        log_every, save_every: in steps; `save_every` 0 keeps no checkpoints.
        report_to: tensorboard, wandb, trackio, or none.
        seed: of the data's order, adapters and rollouts.
        trainer: further fields of TRL's configuration of the method, of `pretrain` transformers', by their names.
    """

    method: Annotated[str, one_of(METHODS), Said(listed(METHODS))]
    batch_size: Count
    lr: Positive
    epochs: Positive = 1
    steps: Annotated[Count | None, Said("a whole number of at least 1, or null for all of the epochs'")] = None
    micro_batch_size: Count = 8
    warmup: _UnderOne = 0.03
    weight_decay: Number = 0.0
    max_length: Annotated[Count | None, Said("a whole number of at least 1, or null")] = None
    max_new_tokens: Count = 256
    rollouts: Annotated[int, Field(strict=True, ge=2), Said("a whole number of at least 2")] = 4
    temperature: Positive = 1.0
    beta: Number = 0.0
    format_weight: Number = 0.0
    precision: Precision = "float32"
    gradient_checkpointing: Flag = False
    compile: Flag = False
    lora: Lora | None = None
    log_every: Count = 1
    save_every: Whole = 100
    report_to: Tracker = "none"
    seed: Whole = 0
    trainer: Annotated[Mapping[str, Any], Said("fields of TRL's configuration by name")] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "training.{}")
        if self.method == "dpo" and not self.beta:
            raise MelensError("training.beta is 0; with dpo it must be over 0, to keep the model near its reference.")
        if self.rows_per_step % self.micro_batch_size:
            size = "batch_size × training.rollouts" if self.method == "grpo" else "batch_size"
            raise MelensError(
                f"training.{size} ({self.rows_per_step}) must be a multiple of training.micro_batch_size "
                f"({self.micro_batch_size})."
            )

    @property
    def rows_per_step(self) -> int:
        """Rows in an optimiser step; GRPO has one for each rollout."""
        return self.batch_size * (self.rollouts if self.method == "grpo" else 1)

    @property
    def bytes_per_weight(self) -> int:
        """Memory for each weight: itself, its gradient, AdamW's two moments, and the reference model's weight."""
        own = BYTES_PER_WEIGHT[self.precision]
        needs_reference = self.method == "dpo" or (self.method == "grpo" and self.beta > 0)
        if self.lora is not None:
            return own
        return 4 * own + (own if needs_reference else 0)


def training_conf(name: str, default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a method: those given, else the defaults (of a dataset), else `conf/training/`'s."""
    preset = yaml.safe_load((conf_folder("training") / f"{name}.yaml").read_text("utf-8"))
    return {**preset, **default, **given}


@cache
def known_datasets() -> dict[str, dict[str, Any]]:
    """Return the contents of `conf/training/dataset/*.yaml` by name."""
    files = sorted(conf_folder("training", "dataset").glob("*.yaml"))
    return {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in files}


def check_installed(report_to: str = "none") -> None:
    """Raise a `MelensError` with pip's command if a training needs a package that is not installed."""
    check_extra("train", "Training")
    if report_to != "none" and find_spec(report_to) is None:
        raise MelensError(f"training.report_to={report_to} needs a package that is missing: pip install {report_to}")
