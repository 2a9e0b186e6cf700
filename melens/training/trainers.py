"""Train a model with TRL, under a mask that is on every block from the start to the end."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.models import prepare_fsdp
from trl.trainer.utils import RepeatSampler, add_fused_lm_head, disable_dropout_in_model

from melens.data.chat import PLAIN, Chat, chat_of, opened_thought
from melens.environment.seeding import seeded
from melens.errors import MelensError
from melens.masks.hooks import InstalledMask
from melens.masks.mask import WeMask
from melens.models.gates import GATE, gates_of
from melens.models.generation import verify_generation
from melens.models.view import view_model
from melens.storage.cache import fingerprint, tokenizer_fingerprint
from melens.storage.files import atomic_file
from melens.training.data import hash_rows
from melens.training.recipe import Recipe
from melens.training.rewards import reward_answer, reward_format

__all__ = ["Trained", "check_folder", "check_trainer", "train"]

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
            `mean_loss`, `final_loss`, `resumed_at`, and of rollouts in a chat `thinking`.
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
        folder: for checkpoints; without `resume`, one that has none.
        mask: settled on the model; also on the reference model of DPO and GRPO.
        resume: go on from the last checkpoint in the folder, which must be of the same training.
        progress: called with the steps done and all of them.
        watch: called before the first step, each `watch_every` steps (0: not between), and after the last.

    Raises:
        MelensError: checkpoints of another training or with parts missing, rows that make no batch, a loss that is no
            number, or for GRPO a model that does not write in a batch with a cache what it writes alone without one.
    """
    check_trainer(recipe, len(rows))
    n_gates = sorted({weight.shape[0] for gate in gates_of(view_model(model)).values() for weight in gate.parameters()})
    plan = {
        "model": fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "recipe": asdict(recipe),
        "mask": None if mask is None else mask.to_dict(),
        "gate": n_gates,  # of a block
        "data": {"rows": len(rows), "hash": hash_rows(rows)},
    }
    chat = _chat_of_rollouts(tokenizer, rows, recipe)
    if chat.arguments:
        plan["chat"] = chat.arguments
    checkpoint = _checkpoint(folder, _as_written(plan), resume=resume)
    if recipe.method == "grpo":
        written = verify_generation(model, mask)
        if not (written.use_cache and written.together):
            raise MelensError(
                "With a cache of keys and values, or in a batch, this model writes something else than alone and "
                "without one, and TRL's rollouts use both: it cannot be trained with grpo."
            )
    with seeded(recipe.seed), nullcontext() if mask is None else mask.applied(model) as installed:
        trainer = _trainer(model, tokenizer, rows, recipe, folder, chat)
        if not len(trainer.train_dataset):
            raise MelensError("No row is left to train on: training.max_length cuts off all that there is to learn.")
        record = _Record(trainer, installed, progress, watch, watch_every)
        trainer.add_callback(record)
        trainer.remove_callback(PrinterCallback)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with suppress(_NothingLeftError):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - start
    state = trainer.state
    log = pd.DataFrame([row for row in state.log_history if "train_runtime" not in row])
    losses = log["loss"].dropna() if "loss" in log else pd.Series(dtype=float)
    resumed_at = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    tokens, new_tokens = _count_tokens(log, resumed_at)
    metrics = {
        "steps": state.global_step,
        "processes": PartialState().num_processes,
        "seconds": seconds,
        "step_seconds": record.median_step(),
        "tokens": tokens,
        "tokens_per_second": None if new_tokens is None else new_tokens / max(record.in_steps(), 1e-9),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        "mean_loss": float(losses.mean()) if len(losses) else None,
        "final_loss": float(losses.iloc[-1]) if len(losses) else None,
        "resumed_at": resumed_at,
        "thinking": None if chat is PLAIN else chat.in_words(),
    }
    return Trained(_unwrapped(trainer), log, metrics)


def _count_tokens(log: pd.DataFrame, resumed_at: int) -> tuple[float | None, float | None]:
    """Return how many tokens a training took, in all and since it was resumed: some trainers begin anew at 0 there."""
    if "num_tokens" not in log:
        return None, None
    told = log.dropna(subset=["num_tokens"])
    added = told["num_tokens"].diff().fillna(told["num_tokens"])
    added = added.where(added >= 0, told["num_tokens"])
    return float(added.sum()), float(added[told["step"] > resumed_at].sum())


def check_folder(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Raise a `MelensError` for a folder of checkpoints that this training can neither begin nor go on in."""
    _check_folder(folder, {"recipe": _as_written(asdict(recipe))}, resume=resume)


def _check_folder(folder: Path, plan: dict[str, Any], *, resume: bool) -> None:
    if not resume:
        if _last_whole(folder) is not None:
            raise MelensError(
                f"{folder} holds the checkpoints of a training: training.resume={folder.parent} goes on with it, "
                "another folder begins a new one."
            )
        return
    if not (folder / _PLAN).is_file():
        raise MelensError(f"There is no training to go on with in {folder}.")
    before = json.loads((folder / _PLAN).read_text("utf-8"))
    other = next((key for key in plan if before.get(key) != plan[key]), None)
    if other is not None:
        changed = _difference(before.get(other), plan[other])
        raise MelensError(f"The checkpoint in {folder} was trained with another {other}: {changed}.")


def _checkpoint(folder: Path, plan: dict[str, Any], *, resume: bool) -> Path | None:
    """Find the checkpoint to go on from, or write down what is trained here."""
    _check_folder(folder, plan, resume=resume)
    if resume:
        return _last_whole(folder)
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / _PLAN) as partial:
            partial.write_text(json.dumps(plan, indent=2), "utf-8")
    return None


def _last_whole(folder: Path) -> Path | None:
    """Return the last checkpoint that was written to its end; that of a killed training is written anew."""
    numbers = {path: int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*[0-9]")}
    return max((path for path in numbers if _is_whole(path)), key=lambda path: numbers[path], default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:  # what transformers writes last
        return bool(json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8")))
    except (OSError, ValueError):
        return False


def _as_written(plan: dict[str, Any]) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(plan))
    return written


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [key for key in now if before.get(key) != now[key]]
        return ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed[:3])
    return f"it was {before or 'none'} and is {now or 'none'}"


# --- TRL's trainers ---------------------------------------------------------------------------------------------------


def check_trainer(recipe: Recipe, n_rows: int) -> None:
    """Raise a `MelensError` for what TRL's configuration does not take, or rows that make no batches."""
    config = _CONFIGS[recipe.method]
    for name, value in recipe.trainer.items():
        field = config.__dataclass_fields__.get(name)
        if field is None:
            raise MelensError(f"training.trainer.{name} is no field of TRL's {config.__name__}.")
        if name in _OWN_OPTIONS:
            raise MelensError(f"training.trainer.{name} would contradict {_OWN_OPTIONS[name]}: give that instead.")
        if isinstance(field.default, int | float) and not isinstance(value, int | float):
            raise MelensError(f"training.trainer.{name} is {value!r}; it must be like {field.default!r}.")
    n_processes = PartialState().num_processes
    if recipe.rows_per_step % (recipe.micro_batch_size * n_processes):
        raise MelensError(
            f"training.batch_size makes steps of {recipe.rows_per_step} rows, which {n_processes} processes with micro "
            f"batches of {recipe.micro_batch_size} do not divide."
        )
    least = recipe.batch_size if recipe.method == "grpo" else 1  # TRL leaves out a last batch that is not full
    if n_rows < least:
        raise MelensError(f"There are {n_rows} rows to train on; {recipe.method} needs at least {least} for a step.")


_CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "grpo": GRPOConfig}

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
    "weight_decay": "training.weight_decay",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.steps",
    "seed": "training.seed",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "use_cpu": "model.device",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "logging_steps": "training.log_every",
    "save_strategy": "training.save_every",
    "save_steps": "training.save_every",
    "report_to": "training.report_to",
    "max_length": "training.max_length",
    "beta": "training.beta",
    "max_completion_length": "training.max_new_tokens",
    "num_generations": "training.rollouts",
    "temperature": "training.temperature",
    "reward_weights": "training.format_weight",
}
"""Fields of TRL's configurations that melens has an option of its own for."""


def _chat_of_rollouts(tokenizer: Any, rows: Dataset, recipe: Recipe) -> Chat:
    """Return how rollouts are asked for: without thinking, as in benchmarks, unless TRL's own field says otherwise."""
    if recipe.method != "grpo" or not len(rows) or isinstance(rows[0]["prompt"], str):
        return PLAIN
    own = recipe.trainer.get("chat_template_kwargs")
    return chat_of(tokenizer) if own is None else Chat(opened=opened_thought(tokenizer, own))


def _trainer(model: Any, tokenizer: Any, rows: Dataset, recipe: Recipe, folder: Path, chat: Chat) -> Any:
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
            "chat_template_kwargs": chat.arguments,
        },
    }
    kind: Any = {"sft": _Sft, "dpo": _Dpo, "grpo": _Grpo}[recipe.method]
    options |= by_method[recipe.method] | dict(recipe.trainer)
    common = {
        "model": model,
        "args": _configured(recipe, options),
        "train_dataset": rows,
        "processing_class": tokenizer,
        "peft_config": _lora(model, recipe),
    }
    if recipe.method == "sft":
        return kind(**common)
    reference = copy.deepcopy(model) if recipe.lora is None and recipe.beta > 0 else None  # masked as the model is
    if recipe.method == "dpo":
        return kind(**common, ref_model=reference)
    rewards = [partial(reward, tokenizer=tokenizer, opened=chat.opened) for reward in (reward_answer, reward_format)]
    return kind(**common, reward_funcs=rewards, reference=reference, beta=recipe.beta)


def _configured(recipe: Recipe, options: dict[str, Any]) -> Any:
    try:
        return _CONFIGS[recipe.method](**options)
    except (TypeError, ValueError) as error:
        if recipe.trainer:
            raise MelensError(f"TRL does not take training.trainer={dict(recipe.trainer)}: {error}") from error
        raise


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


class _Checked:
    """Stops a training whose loss or gradient is no number: what comes after would be worth nothing."""

    _batch: Any = None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._batch = inputs
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss).all():
            raise MelensError(self.explain("loss"))
        return loss

    def explain(self, what: str) -> str:
        """Say of which step and batch a quantity is no number, and from where to go on."""
        trainer: Any = self
        inputs = self._batch
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if isinstance(inputs, dict) and "input_ids" in inputs:
            texts = tokenizer.batch_decode(inputs["input_ids"][:, :40], skip_special_tokens=True)
        else:
            texts = [str(row.get("prompt", "")) for row in inputs] if isinstance(inputs, list) else []
        begins = "; ".join(repr(" ".join(text.split())[:50]) for text in texts[:4])
        last = _last_whole(Path(trainer.args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        step = trainer.state.global_step + 1
        return f"The {what} is no number in step {step}, in a batch of {len(texts)} that begins with {begins}; {kept}."


class _Resumed:
    """Goes on only from a checkpoint that holds all that was trained, where transformers logs what is missing."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapters = Path(resume_from_checkpoint) / SAFETENSORS_WEIGHTS_NAME
        if adapters.is_file():  # PEFT looks for the adapters' own keys alone, and only warns
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
        _check_complete({name for name in missing if id(weights.get(name)) not in loaded})  # tied ones are written once
        super()._issue_warnings_after_load(load_result)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not cast(Any, self).is_deepspeed_enabled:
            folder = Path(checkpoint)
            _check_complete(
                {f"the {name}'s state" for name in ("optimizer", "scheduler") if not [*folder.glob(f"{name}*")]}
            )
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


def _check_complete(missing: set[str]) -> None:
    if missing:
        raise MelensError(
            f"The checkpoint to go on from lacks {', '.join(sorted(missing)[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}: remove it, to go on from the one before."
        )


class _Sft(_Checked, _Resumed, SFTTrainer):
    pass


class _Dpo(_Checked, _Resumed, DPOTrainer):
    pass


class _Grpo(_Checked, _Resumed, GRPOTrainer):
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

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        drawn = super()._get_train_sampler(dataset)
        repeats = (drawn.mini_repeat_count, drawn.batch_size, drawn.repeat_count)
        return _OrderByEpoch(drawn.data_source, *repeats, drawn.shuffle, drawn.seed)


class _OrderByEpoch(RepeatSampler):
    """Draws the order of an epoch from its number, so that a resumed training goes on as if it had not been stopped."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class _NothingLeftError(Exception):
    """There is nothing left to train."""


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look(state)
        if state.global_step >= state.max_steps:  # resumed at the end, where TRL would do one more step
            raise _NothingLeftError

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
            self._steps.append(time.perf_counter() - self._began)
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps)
        if self._every and state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._look(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look(state)

    def in_steps(self) -> float:
        """Return the seconds of all steps, without what looks, checkpoints and the start take."""
        return float(sum(self._steps))

    def median_step(self) -> float | None:
        """Return the median seconds of a step."""
        return float(pd.Series(self._steps).median()) if self._steps else None

    def _look(self, state: Any) -> None:
        if self._watch is None:
            return
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        self._watch(
            state.global_step, model.get_base_model() if hasattr(model, "get_base_model") else model, self._mask
        )


def _unwrapped(trainer: Any) -> Any:
    """Return the model that was trained, without what the trainer put around and into it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    # TRL's forward, which leaves the head out, and accelerate's marks, by which another training would not prepare it
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)
    return model.eval()
