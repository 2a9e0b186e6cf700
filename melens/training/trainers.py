"""Train a model with TRL, under a mask that is on every block from the start to the end."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.models import prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from melens.errors import MelensError
from melens.gates import GATE, gates_of
from melens.masking import InstalledMask
from melens.networks import open_network
from melens.training.data import hash_rows
from melens.training.recipe import Recipe
from melens.training.rewards import reward_answer, reward_format
from melens.wemask import WeMask

__all__ = ["Trained", "check_trainer", "train"]

Watch = Callable[[int, Any, InstalledMask | None], None]
"""Called as `watch(step, model, mask)`."""

_PLAN = "training.json"


@dataclass(frozen=True)
class Trained:
    """What a training left.

    Attributes:
        model: the transformers model with its new weights, adapters merged into them.
        log: a row each time that TRL told of its numbers: `step`, `loss`, `learning_rate`, `grad_norm` and others.
        metrics: `steps`, `processes`, `seconds`, `step_seconds` (median), `tokens`, `tokens_per_second`, `peak_gb`,
            `mean_loss`, `final_loss`, `resumed_at`.
    """

    model: Any
    log: pd.DataFrame
    metrics: dict[str, Any]


def train(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    recipe: Recipe,
    folder: Path,
    *,
    mask: WeMask | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    watch: Watch | None = None,
    watch_every: int = 0,
) -> Trained:
    """Train all weights of a model, or adapters, with a mask on all the time.

    Args:
        model: a transformers model; it is changed. Its gates, if it has some, are trained too.
        tokenizer: of it.
        rows: in TRL's form, of `format_rows`.
        recipe: how.
        folder: for checkpoints.
        mask: settled on the model; also on the reference model of DPO and GRPO.
        resume: go on from the last checkpoint in the folder, which must be of the same training.
        progress: called with the steps done and all of them.
        watch: called before the first step, each `watch_every` steps (0: not between), and after the last.

    Raises:
        MelensError: a checkpoint of another training, or a loss that is no number.
    """
    check_trainer(recipe)
    n_gates = sorted(
        {weight.shape[0] for gate in gates_of(open_network(model)).values() for weight in gate.parameters()}
    )
    plan = {
        "recipe": asdict(recipe),
        "mask": None if mask is None else mask.told(),
        "gate": n_gates,  # of a block
        "data": {"rows": len(rows), "hash": hash_rows(rows)},
    }
    checkpoint = _checkpoint(folder, json.loads(json.dumps(plan)), resume=resume)
    with nullcontext() if mask is None else mask.applied(model) as installed:
        trainer = _trainer(model, tokenizer, rows, recipe, folder)
        record = _Record(trainer, installed, progress, watch, watch_every)
        trainer.add_callback(record)
        trainer.remove_callback(PrinterCallback)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        done = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - start
    state = trainer.state
    log = pd.DataFrame([row for row in state.log_history if "train_runtime" not in row])
    tokens = float(log["num_tokens"].iloc[-1]) if "num_tokens" in log else None
    resumed_at = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    new_tokens = None if tokens is None else tokens - record.tokens_before
    metrics = {
        "steps": state.global_step,
        "processes": PartialState().num_processes,
        "seconds": seconds,
        "step_seconds": record.median_step(),
        "tokens": tokens,
        "tokens_per_second": None if new_tokens is None else new_tokens / max(record.in_steps(), 1e-9),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        "mean_loss": done.training_loss,
        "final_loss": float(log["loss"].dropna().iloc[-1]) if "loss" in log and log["loss"].notna().any() else None,
        "resumed_at": resumed_at,
    }
    return Trained(_unwrapped(trainer), log, metrics)


def _checkpoint(folder: Path, plan: dict[str, Any], *, resume: bool) -> Path | None:
    """Find the checkpoint to go on from, and write down what is trained here."""
    path = folder / _PLAN
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume and path.is_file():
        before = json.loads(path.read_text("utf-8"))
        other = next((key for key in ("mask", "gate", "data", "recipe") if before.get(key) != plan[key]), None)
        if other is not None:
            changed = _difference(before.get(other), plan[other])
            raise MelensError(f"The checkpoint in {folder} was trained with another {other}: {changed}.")
        return None if last is None else Path(last)
    if resume:
        raise MelensError(f"There is no training to go on with in {folder}.")
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan, indent=2))
    return None


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [key for key in now if before.get(key) != now[key]]
        return ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed[:3])
    return f"it was {before or 'none'} and is {now or 'none'}"


# --- TRL's trainers ---------------------------------------------------------------------------------------------------


def check_trainer(recipe: Recipe) -> None:
    """Raise a `MelensError` for a field that TRL's configuration does not have, or a batch that does not divide."""
    config = {"sft": SFTConfig, "dpo": DPOConfig, "grpo": GRPOConfig}[recipe.method]
    unknown = [name for name in recipe.trainer if name not in config.__dataclass_fields__]
    if unknown:
        raise MelensError(f"training.trainer.{unknown[0]} is no field of TRL's {config.__name__}.")
    n_processes = PartialState().num_processes
    if recipe.rows_per_step % (recipe.micro_batch_size * n_processes):
        raise MelensError(
            f"training.batch_size makes steps of {recipe.rows_per_step} rows, which {n_processes} processes with micro "
            f"batches of {recipe.micro_batch_size} do not divide."
        )


def _trainer(model: Any, tokenizer: Any, rows: Dataset, recipe: Recipe, folder: Path) -> Any:
    per_step = recipe.micro_batch_size * PartialState().num_processes
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.rows_per_step // per_step,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": recipe.warmup,
        "weight_decay": recipe.weight_decay,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.steps or -1,
        "seed": recipe.seed,
        "bf16": recipe.precision == "mixed",
        "use_cpu": model.device.type == "cpu",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "logging_steps": recipe.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if recipe.save_every else "no",
        "save_steps": recipe.save_every or 1,
        "save_total_limit": 2,
        "report_to": recipe.report_to,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": model.device.type == "cuda",
    }
    by_method: dict[str, dict[str, Any]] = {
        "sft": {"max_length": recipe.max_length},
        "dpo": {"max_length": recipe.max_length, "beta": recipe.beta},
        "grpo": {
            "max_completion_length": recipe.max_new_tokens,
            "num_generations": recipe.rollouts,
            "temperature": recipe.temperature,
            "beta": recipe.beta if recipe.lora is not None else 0.0,
            "reward_weights": [1.0, recipe.format_weight],
        },
    }
    kind, config = {"sft": (_Sft, SFTConfig), "dpo": (_Dpo, DPOConfig), "grpo": (_Grpo, GRPOConfig)}[recipe.method]
    options |= by_method[recipe.method] | dict(recipe.trainer)
    common = {
        "model": model,
        "args": config(**options),
        "train_dataset": rows,
        "processing_class": tokenizer,
        "peft_config": _lora(model, recipe),
    }
    if recipe.method == "sft":
        return kind(**common)
    reference = copy.deepcopy(model) if recipe.lora is None and recipe.beta > 0 else None  # masked as the model is
    if recipe.method == "dpo":
        return kind(**common, ref_model=reference)
    return kind(**common, reward_funcs=[reward_answer, reward_format], reference=reference, beta=recipe.beta)


def _lora(model: Any, recipe: Recipe) -> LoraConfig | None:
    if recipe.lora is None:
        return None
    return LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules="all-linear",
        modules_to_save=[GATE] if gates_of(open_network(model)) else None,
        task_type="CAUSAL_LM",
    )


class _Checked:
    """Stops a training whose loss is no number: what comes after would be worth nothing."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss).all():
            raise MelensError(self._explain(inputs))
        return loss

    def _explain(self, inputs: Any) -> str:
        trainer: Any = self
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if isinstance(inputs, dict) and "input_ids" in inputs:
            texts = tokenizer.batch_decode(inputs["input_ids"][:, :40], skip_special_tokens=True)
        else:
            texts = [str(row.get("prompt", "")) for row in inputs] if isinstance(inputs, list) else []
        begins = "; ".join(repr(" ".join(text.split())[:50]) for text in texts[:4])
        last = get_last_checkpoint(trainer.args.output_dir)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        step = trainer.state.global_step + 1
        return f"The loss is no number in step {step}, in a batch of {len(texts)} that begins with {begins}; {kept}."


class _Sft(_Checked, SFTTrainer):
    pass


class _Dpo(_Checked, DPOTrainer):
    pass


class _Grpo(_Checked, GRPOTrainer):
    """GRPO whose reference is a model at hand, where TRL would load one by its name."""

    def __init__(self, *, reference: Any, beta: float, **options: Any) -> None:
        super().__init__(**options)
        if reference is None:
            return
        self.beta = self.args.beta = beta
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        if self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)


class _Record(TrainerCallback):
    """Shows how far a training is, and lets its model be looked at."""

    def __init__(
        self,
        trainer: Any,
        mask: InstalledMask | None,
        progress: Callable[[int, int], None] | None,
        watch: Watch | None,
        watch_every: int,
    ) -> None:
        self._trainer, self._mask = trainer, mask
        self._progress, self._watch, self._every = progress, watch, watch_every
        self._began: float | None = None
        self._steps: list[float] = []
        self.tokens_before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        told = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        self.tokens_before = float(told[-1]) if told else 0.0
        self._look(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._began is not None:
            self._steps.append(time.perf_counter() - self._began)
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps)
        if self._every and state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._look(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look(state)

    def in_steps(self) -> float:
        """Return the seconds of all steps, without what looks, checkpoints and the start take."""
        return sum(self._steps)

    def median_step(self) -> float | None:
        """Return the median seconds of a step."""
        return float(pd.Series(self._steps).median()) if self._steps else None

    def _look(self, state: Any) -> None:
        if self._watch is None:
            return
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        adapted = hasattr(model, "merge_adapter")
        if adapted:
            model.merge_adapter()
        try:
            self._watch(state.global_step, model.get_base_model() if adapted else model, self._mask)
        finally:
            if adapted:
                model.unmerge_adapter()


def _unwrapped(trainer: Any) -> Any:
    """Return the model that was trained, without what the trainer put around and into it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.__dict__.pop("forward", None)  # TRL's, which leaves the head out
    return model.eval()
