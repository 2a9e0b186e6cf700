"""Train a model with TRL, or from scratch with transformers' own trainer, with a mask on all the time.

1. `train` checks the recipe and the folder, and finds the checkpoint to resume from (`_last_complete`).
2. The mask is put on the model, and a trainer of TRL is made from the recipe (`_trainer`); DPO's and GRPO's reference
   model is a copy with the same mask on.
3. The trainer stops at a loss or a gradient that is NaN (`_FiniteLoss`), resumes only from complete checkpoints
   (`_CompleteCheckpoint`), and reports each step to `_Recorder`, which also calls for inspections.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.models import prepare_fsdp
from trl.trainer.utils import RepeatSampler, add_fused_lm_head, disable_dropout_in_model

from melens.data.chat import PLAIN, Chat, chat_of, opened_thought
from melens.environment.seeding import seeded
from melens.errors import MelensError
from melens.masks.mask import WeMask
from melens.models.attention_kinds import mark_saved
from melens.models.gates import GATE, gates_of, is_of_gate, save_gates
from melens.models.generation import verify_generation
from melens.models.view import view_model
from melens.printing import Brief
from melens.storage.cache import fingerprint, tokenizer_fingerprint
from melens.storage.files import write_text
from melens.training.data import hash_rows
from melens.training.masking import GrowingMask
from melens.training.recipe import Recipe
from melens.training.rewards import reward_answer, reward_format

__all__ = ["TrainingOutput", "TrainingStats", "check_folder", "check_trainer", "train"]

Inspect = Callable[[int, Any], None]
"""Called as `inspect(step, model)`, with the steps that are done."""

_PLAN = "training.json"


@dataclass(frozen=True)
class TrainingStats:
    """How a training went.

    Attributes:
        seconds: of this run.
        step_seconds: median of a step, without inspections and checkpoints.
        tokens, tokens_per_second: None where TRL does not count them.
        peak_gb: memory of a GPU.
        resumed_at: the step of the checkpoint that the training resumed from, else 0.
        thinking: whether rollouts in a chat were to think, in words.
    """

    steps: int
    processes: int
    seconds: float
    step_seconds: float | None
    tokens: float | None
    tokens_per_second: float | None
    peak_gb: float | None
    mean_loss: float | None
    final_loss: float | None
    resumed_at: int
    thinking: str | None


@dataclass(frozen=True, repr=False)
class TrainingOutput(Brief):
    """What a training left.

    Attributes:
        model: the transformers model with its new weights, adapters merged into them.
        log: TRL's numbers, a row for each logged `step`: `loss`, `learning_rate`, `grad_norm` and others.
    """

    model: Any
    log: pd.DataFrame
    stats: TrainingStats


def train(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    recipe: Recipe,
    folder: Path,
    *,
    mask: WeMask | GrowingMask | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    inspect: Inspect | None = None,
    inspect_every: int = 0,
) -> TrainingOutput:
    """Train all weights of a model, or adapters, with a mask on all the time.

    Args:
        model: a transformers model, whose weights change. Its gates, if it has some, are trained too.
        tokenizer: the model's.
        rows: in TRL's form, as `format_rows` returns them; of `pretrain` token ids, as of `packed_text`.
        recipe: hyperparameters.
        folder: for checkpoints; it has none unless the training resumes.
        mask: settled on the model; the reference model of DPO and GRPO uses the same mask.
        resume: go on from the last checkpoint in the folder, which must be of the same training.
        progress: called with the steps that are done and the number of all steps.
        inspect: called before the first step, each `inspect_every` steps (0: not in between), and after the last step.

    Raises:
        MelensError: the checkpoints are of another training or incomplete, the rows make no batch, the loss is NaN, or,
            for GRPO, the model writes something else in a batch with a cache than alone without one.
    """
    check_trainer(recipe, len(rows))
    gate_sizes = {weight.shape[0] for gate in gates_of(view_model(model)).values() for weight in gate.parameters()}
    plan = {
        "model": fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "recipe": asdict(recipe),
        "mask": None if mask is None else mask.to_dict(),
        "gate": sorted(gate_sizes),  # 1 for each head, or for each entry
        "data": {"rows": len(rows), "hash": hash_rows(rows)},
    }
    chat = _chat_of_rollouts(tokenizer, rows, recipe)
    if chat.arguments:
        plan["chat"] = chat.arguments
    check_folder(folder, plan, resume=resume)
    checkpoint = _last_complete(folder) if resume else None
    if not resume and PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _PLAN, json.dumps(plan, indent=2))
    if recipe.method == "grpo":
        written = verify_generation(model, cast("WeMask | None", mask))  # it grows in exp=pretrain alone
        if not (written.use_cache and written.together):
            raise MelensError(
                "This model writes other tokens in a batch or with a key-value cache than without, and TRL's rollouts "
                "use both. Train it with sft or dpo."
            )
    with seeded(recipe.seed), nullcontext() if mask is None else mask.applied(model):
        trainer = _trainer(model, tokenizer, rows, recipe, folder, chat)
        if not len(trainer.train_dataset):
            raise MelensError("training.max_length cuts off the reply of every row, so no row is left. Raise it.")
        recorder = _Recorder(trainer, progress, inspect, inspect_every)
        trainer.add_callback(recorder)
        trainer.remove_callback(PrinterCallback)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with suppress(_NoStepsLeftError):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - start
    state = trainer.state
    log = pd.DataFrame([row for row in state.log_history if "train_runtime" not in row])
    losses = log["loss"].dropna() if "loss" in log else pd.Series(dtype=float)
    resumed_at = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    tokens, new_tokens = _count_tokens(log, resumed_at)
    step_seconds = pd.Series(recorder.step_seconds, dtype=float)
    stats = TrainingStats(
        steps=state.global_step,
        processes=PartialState().num_processes,
        seconds=seconds,
        step_seconds=float(step_seconds.median()) if len(step_seconds) else None,
        tokens=tokens,
        tokens_per_second=None if new_tokens is None else new_tokens / max(float(step_seconds.sum()), 1e-9),
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        mean_loss=float(losses.mean()) if len(losses) else None,
        final_loss=float(losses.iloc[-1]) if len(losses) else None,
        resumed_at=resumed_at,
        thinking=None if chat is PLAIN else chat.in_words(),
    )
    return TrainingOutput(_unwrapped(trainer), log, stats)


def _count_tokens(log: pd.DataFrame, resumed_at: int) -> tuple[float | None, float | None]:
    """Return how many tokens a training took, in all and since it resumed."""
    if "num_tokens" not in log:
        return None, None
    logged = log.dropna(subset=["num_tokens"])
    added = logged["num_tokens"].diff().fillna(logged["num_tokens"])
    added = added.where(added >= 0, logged["num_tokens"])  # some trainers count from 0 again after a checkpoint
    return float(added.sum()), float(added[logged["step"] > resumed_at].sum())


def check_folder(folder: Path, plan: dict[str, Any], *, resume: bool) -> None:
    """Raise a `MelensError` for a folder of checkpoints in which a training can neither begin nor resume.

    Args:
        folder: of the checkpoints.
        plan: so much of what `train` writes down as is known.
        resume: whether to go on from the last checkpoint.
    """
    if not resume:
        if _last_complete(folder) is not None:
            raise MelensError(
                f"{folder} holds the checkpoints of another run. Set training.resume={folder.parent} to go on with it, "
                "or choose another folder."
            )
        return
    if not (folder / _PLAN).is_file():
        raise MelensError(f"There is no training to resume in {folder}. Set training.resume to the folder of a run.")
    before, now = json.loads((folder / _PLAN).read_text("utf-8")), json.loads(json.dumps(plan))
    other = next((key for key in now if before.get(key) != now[key]), None)
    if other is not None:
        changed = _difference(before.get(other), now[other])
        raise MelensError(f"The training in {folder} has another {other}: {changed}. Resume it with the same options.")


def _last_complete(folder: Path) -> Path | None:
    """Return the last checkpoint that is complete; the last one of a killed training may not be."""
    checkpoints = folder.glob("checkpoint-*[0-9]")
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        with suppress(OSError, ValueError):  # the state is what transformers writes last
            if json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8")):
                return checkpoint
    return None


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [key for key in now if before.get(key) != now[key]]
        return ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed[:3])
    return f"it was {before or 'none'} and is {now or 'none'}"


# --- TRL's trainers ---------------------------------------------------------------------------------------------------


def check_trainer(recipe: Recipe, n_rows: int) -> None:
    """Raise a `MelensError` for options that TRL's configuration does not have, or rows that make no batches."""
    config = _CONFIGS[recipe.method]
    for name, value in recipe.trainer.items():
        field = config.__dataclass_fields__.get(name)
        if field is None:
            raise MelensError(f"training.trainer.{name} is not a field of {config.__name__}.")
        if name in _OWN_OPTIONS or name in {f.name for f in fields(Recipe)}:
            option = _OWN_OPTIONS.get(name, f"training.{name}")
            raise MelensError(f"training.trainer.{name} has an option of its own: set {option} instead.")
        if isinstance(field.default, int | float) and not isinstance(value, int | float):
            raise MelensError(f"training.trainer.{name} is {value!r}; it must be like {field.default!r}.")
    n_processes = PartialState().num_processes
    if recipe.rows_per_step % (recipe.micro_batch_size * n_processes):
        raise MelensError(
            f"A step has {recipe.rows_per_step} rows (training.batch_size), which must be a multiple of "
            f"{n_processes} processes × {recipe.micro_batch_size} (training.micro_batch_size)."
        )
    least = recipe.batch_size if recipe.method == "grpo" else 1  # TRL leaves out a last batch that is not full
    if n_rows < least:
        raise MelensError(f"The data has {n_rows} rows; {recipe.method} needs at least {least} for a step.")


_CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "grpo": GRPOConfig, "pretrain": TrainingArguments}

_OWN_OPTIONS = {
    "output_dir": "hydra.run.dir",
    "per_device_train_batch_size": "training.micro_batch_size",
    "auto_find_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size",
    "generation_batch_size": "training.batch_size",
    "steps_per_generation": "training.batch_size",
    "resume_from_checkpoint": "training.resume",
    "learning_rate": "training.lr",
    "warmup_steps": "training.warmup",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.steps",
    "torch_compile": "training.compile",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "use_cpu": "model.device",
    "logging_steps": "training.log_every",
    "save_strategy": "training.save_every",
    "save_steps": "training.save_every",
    "max_completion_length": "training.max_new_tokens",
    "num_generations": "training.rollouts",
    "reward_weights": "training.format_weight",
}
"""Fields of TRL's configurations that are options of melens under another name."""


def _chat_of_rollouts(tokenizer: Any, rows: Dataset, recipe: Recipe) -> Chat:
    """Return the chat options of rollouts: without thinking, as in benchmarks, unless TRL's own field says so."""
    if recipe.method != "grpo" or not len(rows) or isinstance(rows[0]["prompt"], str):
        return PLAIN
    own = recipe.trainer.get("chat_template_kwargs")
    return chat_of(tokenizer) if own is None else Chat(opened=opened_thought(tokenizer, own))


def _trainer(model: Any, tokenizer: Any, rows: Dataset, recipe: Recipe, folder: Path, chat: Chat) -> Any:
    config = _config(recipe, folder, chat, model.device.type)
    options = {"model": model, "args": config, "train_dataset": rows, "processing_class": tokenizer}
    if recipe.method == "pretrain":
        return _Pretrain(**options, data_collator=_as_labels)
    options["peft_config"] = _lora(model, recipe)
    if recipe.method == "sft":
        return _Sft(**options)
    reference = copy.deepcopy(model) if recipe.lora is None and recipe.beta > 0 else None  # masked as the model is
    if recipe.method == "dpo":
        return _Dpo(**options, ref_model=reference)
    rewards = [partial(reward, tokenizer=tokenizer, opened=chat.opened) for reward in (reward_answer, reward_format)]
    return _Grpo(**options, reward_funcs=rewards, reference=reference, beta=recipe.beta)


def _config(recipe: Recipe, folder: Path, chat: Chat, device: str) -> Any:
    """Return TRL's configuration of the method."""
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.rows_per_step // (recipe.micro_batch_size * PartialState().num_processes),
        "learning_rate": recipe.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": recipe.warmup,
        "weight_decay": recipe.weight_decay,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.steps or -1,
        "seed": recipe.seed,
        "bf16": recipe.precision == "mixed",
        "use_cpu": device == "cpu",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "torch_compile": recipe.compile,
        "logging_steps": recipe.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if recipe.save_every else "no",
        "save_steps": recipe.save_every or 1,
        "save_total_limit": 2,
        "report_to": recipe.report_to,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": device == "cuda",
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
            "chat_template_kwargs": chat.arguments,
        },
        "pretrain": {"lr_scheduler_type": "cosine", "adam_beta2": 0.95, "remove_unused_columns": False}
        | {"save_total_limit": None},  # exp=dynamics looks at all
    }
    try:
        return _CONFIGS[recipe.method](**options | by_method[recipe.method] | dict(recipe.trainer))
    except (TypeError, ValueError) as error:
        if not recipe.trainer:
            raise
        raise MelensError(f"The trainer refuses training.trainer={dict(recipe.trainer)}: {error}") from error


def _lora(model: Any, recipe: Recipe) -> LoraConfig | None:
    if recipe.lora is None:
        return None
    return LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules="all-linear",
        modules_to_save=[GATE] if gates_of(view_model(model)) else None,
        task_type="CAUSAL_LM",
    )


class _FiniteLoss:
    """Stops a training at a loss or a gradient that is NaN: every weight would be NaN after the step."""

    _batch: Any = None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._batch = inputs
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss).all():
            raise MelensError(self.explain("loss"))
        return loss

    def explain(self, what: str) -> str:
        """Say in which step and batch a quantity is NaN, and which checkpoint is good."""
        trainer, inputs = cast(Any, self), self._batch
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if isinstance(inputs, dict) and "input_ids" in inputs:
            texts = tokenizer.batch_decode(inputs["input_ids"][:, :40], skip_special_tokens=True)
        else:
            texts = [str(row.get("prompt", "")) for row in inputs] if isinstance(inputs, list) else []
        begins = ", ".join(repr(" ".join(text.split())[:50]) for text in texts[:4])
        last = _last_complete(Path(trainer.args.output_dir))
        kept = f"The last good checkpoint is {last}" if last else "There is no checkpoint yet"
        return (
            f"The {what} is NaN or infinite in step {trainer.state.global_step + 1}, in a batch of {len(texts)} rows "
            f"that begins with {begins}. {kept}. Lower training.lr, or look for NaN in the model's weights."
        )


class _CompleteCheckpoint:
    """Resumes only from a checkpoint that holds all that was trained; transformers would only log what is missing."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapters = Path(resume_from_checkpoint) / SAFETENSORS_WEIGHTS_NAME
        if adapters.is_file():  # PEFT only warns of missing keys
            trainer: Any = self
            unwrapped = trainer.accelerator.unwrap_model(trainer.model if model is None else model)
            with safe_open(adapters, "pt") as file:
                present = set(file.keys())
            _check_complete(set(get_peft_model_state_dict(unwrapped, save_embedding_layers=False)) - present)
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        weights = dict(cast(Any, self).model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(weight) for name, weight in weights.items() if name not in missing}
        # Tied weights are saved once, under one of their names
        _check_complete({name for name in missing if id(weights.get(name)) not in loaded})
        super()._issue_warnings_after_load(load_result)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not cast(Any, self).is_deepspeed_enabled:
            names = ("optimizer", "scheduler")
            _check_complete({f"the {name}'s state" for name in names if not any(Path(checkpoint).glob(f"{name}*"))})
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


class _LoadableCheckpoint:
    """Writes checkpoints that `load_model` reads as the model is: gates beside the weights, the attention by name."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        trainer: Any = self
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        folder = Path(output_dir or trainer.args.output_dir)
        if not (folder / "config.json").is_file():  # of adapters
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = model.state_dict() if state_dict is None else state_dict
        if of_gates := {name: weight for name, weight in weights.items() if is_of_gate(name)}:
            save_gates(of_gates, folder)
        mark_saved(folder, model.config)


def _check_complete(missing: set[str]) -> None:
    if missing:
        raise MelensError(
            f"The last checkpoint lacks {', '.join(sorted(missing)[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}. Remove it to resume from the one before."
        )


class _Sft(_FiniteLoss, _CompleteCheckpoint, _LoadableCheckpoint, SFTTrainer):
    pass


class _Pretrain(_FiniteLoss, _CompleteCheckpoint, _LoadableCheckpoint, Trainer):
    """Counts tokens as TRL's trainers do; a checkpoint holds the count."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers' own count (include_num_input_tokens_seen) waits for the GPU in each forward pass
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["num_tokens"] = float(self.state.num_input_tokens_seen)
        super().log(logs, *args, **kwargs)


def _as_labels(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack rows of token ids, each of which is to be predicted from those before it."""
    ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    return {"input_ids": ids, "labels": ids}


class _Dpo(_FiniteLoss, _CompleteCheckpoint, _LoadableCheckpoint, DPOTrainer):
    pass


class _Grpo(_FiniteLoss, _CompleteCheckpoint, _LoadableCheckpoint, GRPOTrainer):
    """GRPO with a reference model in memory, where TRL would load one by its name, without the mask."""

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

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        drawn = super()._get_train_sampler(dataset)
        repeats = (drawn.mini_repeat_count, drawn.batch_size, drawn.repeat_count)
        return _OrderByEpoch(drawn.data_source, *repeats, drawn.shuffle, drawn.seed)


class _OrderByEpoch(RepeatSampler):
    """Draws the order of an epoch from its number, so that a resumed training has the order of one never stopped."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class _NoStepsLeftError(Exception):
    """The training resumed at its end."""


class _Recorder(TrainerCallback):
    """Reports the progress of a training, measures its steps alone in `step_seconds`, and has its model inspected."""

    def __init__(
        self, trainer: Any, progress: Callable[[int, int], None] | None, inspect: Inspect | None, inspect_every: int
    ) -> None:
        self._trainer, self._progress, self._inspect, self._every = trainer, progress, inspect, inspect_every
        self._began: float | None = None
        self.step_seconds: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._inspect_model(state)
        if state.global_step >= state.max_steps:  # TRL would make one step more
            raise _NoStepsLeftError

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        gradients = [weight.grad for weight in self._trainer.model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
            raise MelensError(self._trainer.explain("gradient"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._began is not None:
            self.step_seconds.append(time.perf_counter() - self._began)
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps)
        if self._every and state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._inspect_model(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._inspect_model(state)

    def _inspect_model(self, state: Any) -> None:
        if self._inspect is not None:
            model = self._trainer.accelerator.unwrap_model(self._trainer.model)
            self._inspect(state.global_step, model.get_base_model() if hasattr(model, "get_base_model") else model)


def _unwrapped(trainer: Any) -> Any:
    """Return the trained model without the trainer's wrappers, its adapters merged."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    # TRL's forward leaves the head out; with accelerate's marks another training would not prepare the model
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)
    return model.eval()
