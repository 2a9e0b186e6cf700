"""Train the model of a study, inspect it meanwhile, save it, and draw what became of it.

    plan = TrainingPlan(Recipe("sft", batch_size=16, lr=1e-5), dataset="gsm8k")
    check_plan(plan, model.tokenizer)
    result = training(study, plan, Path("my-run"), mask=WeMask(0.1, start=12))
    result.figures["training_loss"], melens.load_model("my-run/model")

1. The rows are loaded once in a process and tried on the chat template (`check_plan`).
2. `train_model` takes the plain twin of the study's model, which shares its weights, adds gates, trains it with the
   mask on, lets an `Inspector` measure it, and saves it. The weights of the study's own model have changed then.
3. `training` turns that into metrics, tables, figures and findings.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState

from melens.analysis.study import Study
from melens.data.chat import check_conversations
from melens.errors import MelensError
from melens.masks.mask import WeMask
from melens.models.attention_kinds import kind_of
from melens.models.devices import is_dispatched
from melens.models.gates import add_gates
from melens.models.quantization import is_quantized
from melens.models.twins import plain_twin
from melens.models.view import view_model
from melens.report.result import Metrics, Result
from melens.storage.cache import Store, store_for, tokenizer_fingerprint
from melens.training.data import TrainingData, format_rows, hash_rows, load_training_data
from melens.training.flops import flops_per_token, peak_flops
from melens.training.history import TrainingHistory, draw_histories, method_in_words
from melens.training.inspection import Inspector
from melens.training.masking import GrowingMask
from melens.training.plan import QUANTIZED, SPREAD, TrainingPlan
from melens.training.pretraining import rows_to_inspect, text_of, validation_losses
from melens.training.rewards import check_answers
from melens.training.saving import save_trained
from melens.training.trainers import TrainingStats, check_trainer, train

__all__ = ["TrainedModel", "TrainingMetrics", "check_plan", "train_model", "training", "training_store"]


@dataclass(frozen=True)
class TrainedModel:
    """A model that was trained and saved.

    Attributes:
        folder: of the model, for `load_model`.
        n_rows: that it learnt from.
        chat: whether it learnt in its chat template.
        tables: of a training from scratch, `validation` (as `validation_losses`) and with a mask `mask_moves`.
        flops_per_token: of a training from scratch, as `flops_per_token`.
    """

    folder: Path
    mask: WeMask | None
    history: TrainingHistory
    stats: TrainingStats
    n_rows: int
    chat: bool
    tables: dict[str, pd.DataFrame]
    flops_per_token: float | None = None

    @property
    def share_of_peak(self) -> float | None:
        """Of what the GPUs could do in bfloat16; None where that is not known."""
        peak, speed = peak_flops(), self.stats.tokens_per_second
        if self.flops_per_token is None or peak is None or speed is None:
            return None
        return speed * self.flops_per_token / (peak * self.stats.processes)


def check_plan(plan: TrainingPlan, tokenizer: Any) -> None:
    """Load the rows, and try them on the trainer, the chat template and GRPO's reward.

    Raises:
        MelensError: the rows make no batch or have no form for the method, the chat template refuses one of them, too
            many right answers can never be rewarded, or a single process has several GPUs.
    """
    if plan.recipe.method == "pretrain":
        _check_from_scratch(plan, tokenizer)
        return
    data = _data(plan)
    check_trainer(plan.recipe, len(data.rows))
    rows = _format_once(data, plan.recipe.method, chat=_is_chat(plan, tokenizer))
    replies = [role for role in ("completion", "chosen", "rejected") if role in rows.column_names]
    if len(rows) and "prompt" in rows.column_names and not isinstance(rows[0]["prompt"], str):
        whole = ([*row["prompt"], *row[reply]] for reply in replies for row in rows)
        check_conversations(tokenizer, whole if replies else rows["prompt"], plan.dataset)
    if plan.recipe.method == "grpo":
        check_answers(rows["answer"], plan.dataset)
    _check_gpus()


def _check_from_scratch(plan: TrainingPlan, tokenizer: Any) -> None:
    if tokenizer is None:
        raise MelensError("This model has no tokenizer, so it cannot learn from texts. Set model.tokenizer.")
    check_trainer(plan.recipe, len(text_of(plan, tokenizer).training))
    _check_gpus()


def _check_gpus() -> None:
    if torch.cuda.device_count() > 1 and PartialState().num_processes == 1:
        raise MelensError(
            "There are several GPUs, but a training in one process uses one. Set CUDA_VISIBLE_DEVICES=0, or start "
            "accelerate launch --config_file conf/training/accelerate/ddp.yaml experiments/run.py ..."
        )


def _is_chat(plan: TrainingPlan, tokenizer: Any) -> bool:
    if tokenizer is None:
        raise MelensError("This model has no tokenizer, so it cannot learn from texts.")
    if plan.chat and not tokenizer.chat_template:
        raise MelensError("training.chat is true, but this model's tokenizer has no chat template. Set it to false.")
    return bool(tokenizer.chat_template) if plan.chat is None else plan.chat


def _data(plan: TrainingPlan) -> TrainingData:
    options = {"data_dir": plan.data_dir, "split": plan.split, "limit": plan.limit, "seed": plan.recipe.seed}
    return _load_once(plan.dataset, plan.recipe.method, tuple(sorted(plan.columns.items())), **options)


@cache
def _load_once(name: str, method: str, columns: tuple[tuple[str, str], ...], **options: Any) -> TrainingData:
    return load_training_data(name, method, columns=dict(columns), **options)


_format_once = cache(format_rows)


def train_model(
    study: Study, plan: TrainingPlan, folder: Path, *, mask: WeMask | None = None, resume: bool = False
) -> TrainedModel:
    """Train the model of a study, whose weights change, and save it.

    Args:
        study: of the model before the training.
        plan: what is trained on what.
        folder: for `checkpoints` and `model`.
        mask: on all the time, as on the reference model of DPO and GRPO.
        resume: go on from the checkpoints in the folder.

    Raises:
        MelensError: the model is spread, quantised or cannot be taken out of its bridge; or as `train`.
    """
    tokenizer, from_scratch = study.model.tokenizer, plan.recipe.method == "pretrain"
    chat = not from_scratch and _is_chat(plan, tokenizer)
    if is_dispatched(study.model.original_model):
        raise MelensError(SPREAD)
    if is_quantized(study.model.original_model):
        raise MelensError(QUANTIZED)
    model = plain_twin(study.model)
    if model is study.model.original_model:
        raise MelensError("This model cannot be taken out of its bridge, so it cannot be trained.")
    own: WeMask | GrowingMask | None = mask
    if mask is not None:
        own = GrowingMask(mask) if from_scratch else mask.on(model)
    if plan.gate is not None:
        add_gates(view_model(model), plan.gate)
    text = text_of(plan, tokenizer) if from_scratch else None
    rows = _format_once(_data(plan), plan.recipe.method, chat=chat) if text is None else text.training
    prompts = None if text is None else rows_to_inspect(text.validation, plan.trace_prompts)
    inspector = Inspector(
        study, own, folder / "checkpoints", n_prompts=plan.trace_prompts, tokens=prompts, resume=resume
    )

    def inspect(step: int, model: Any) -> None:
        inspector.inspect(step, model)
        if isinstance(own, GrowingMask):
            for looked_at, me_layer in inspector.me_layers(plan.trace_every):
                own.look(looked_at, me_layer)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's use of transformers
        trained = train(
            model,
            tokenizer,
            rows,
            plan.recipe,
            folder / "checkpoints",
            mask=own,
            resume=resume,
            progress=study.stage(f"steps of {plan.recipe.method}"),
            inspect=inspect,
            inspect_every=plan.trace_every,
        )
    tables: dict[str, pd.DataFrame] = {}
    if isinstance(own, GrowingMask):
        own.end(trained.stats.steps)
        tables["mask_moves"], mask = own.table(), own.moved_to(trained.model)
    else:
        mask = own
    record = {"training": asdict(plan.recipe), "dataset": plan.dataset, "rows": len(rows), "gate": plan.gate}
    record |= {"model": str(study.model.cfg.model_name), "mask": None if mask is None else mask.to_dict()}
    save_trained(trained.model, tokenizer, folder / "model", mask=mask, record=record | asdict(trained.stats))
    history = TrainingHistory("", trained.log, inspector.table())
    n_flops = None if text is None else flops_per_token(trained.model, plan.recipe.max_length or 0)
    if text is not None:
        rows_per_batch, mixed = plan.recipe.micro_batch_size, plan.recipe.precision == "mixed"
        masks = [None] if mask is None else [None, mask]
        tables["validation"] = validation_losses(
            trained.model, text.validation, masks, rows_per_batch=rows_per_batch, mixed=mixed
        )
    return TrainedModel(folder / "model", mask, history, trained.stats, len(rows), chat, tables, n_flops)


def training_store(study: Study, plan: TrainingPlan, mask: WeMask | None) -> Store:
    """Return where a trained model is kept in the user's cache, by all that decides it, its log and its inspections.

    Args:
        study, plan, mask: as for `train_model`, the mask settled on the model.
    """
    model, me, processes = study.model, study.me, PartialState()
    decides = [
        plan,
        mask,
        hash_rows(_data(plan).rows),
        tokenizer_fingerprint(model.tokenizer),
        [me.layer, me.dims, me.criterion],  # and what the inspections measure:
        [study.tokens, study.distinct_massive_prompts, study.position, study.max_batch_tokens],
        [processes.num_processes, str(processes.distributed_type)],
    ]
    libraries = ("trl", "peft", "datasets", "jinja2", "math-verify", "sympy", "latex2sympy2-extended")
    return store_for("trainings", model.original_model, *decides, libraries=libraries)


# --- As an experiment -------------------------------------------------------------------------------------------------


class TrainingMetrics(Metrics):
    """What `training` measures.

    Attributes:
        method, dataset, gate: as planned.
        training_mask: as `WeMask.to_dict` gives it; None where there was none, or it never came on.
        training_seed: of the data's order, and of `pretrain` of the weights.
        mask_planned, mask_follows: whether a mask was asked for, and whether it was to begin behind the ME layer.
        saved_in: the folder of the trained model.
        training_steps, ...: as `TrainingStats`.
        me_layer_before, ...: the first inspection without the mask, and the last one, as in `TrainingHistory`.
        training_share_of_peak: of `pretrain`, of what the GPUs could do in bfloat16 (MFU); None where that is unknown.
        attention: what replaces the softmax, None for softmax.
        validation_loss, validation_loss_masked: of `pretrain`, nats a token on text held out, without the mask that it
            was trained with and under it.
        largest_over_median_after, sink_rate_after: as `me_layer_after`.
    """

    method: str = ""
    dataset: str = ""
    training_mask: dict[str, Any] | None = None
    training_seed: int = 0
    mask_planned: bool = False
    mask_follows: bool = False
    gate: str | None = None
    saved_in: str = ""
    training_rows: int = 0
    training_chat: bool = False
    training_steps: int = 0
    training_processes: int = 1
    training_seconds: float = 0.0
    training_step_seconds: float | None = None
    training_tokens: float | None = None
    training_tokens_per_second: float | None = None
    training_peak_gb: float | None = None
    training_share_of_peak: float | None = None
    training_mean_loss: float | None = None
    training_final_loss: float | None = None
    training_resumed_at: int = 0
    training_thinking: str | None = None
    me_layer_before: int | None = None
    magnification_there_before: float | None = None
    sink_mass_before: float | None = None
    me_layer_after: int | None = None
    magnification_there_after: float | None = None
    sink_mass_after: float | None = None
    attention: str | None = None
    validation_loss: float | None = None
    validation_loss_masked: float | None = None
    largest_over_median_after: float | None = None
    sink_rate_after: float | None = None


def training(
    study: Study,
    plan: TrainingPlan,
    folder: str | Path,
    *,
    mask: WeMask | None = None,
    mask_name: str = "mask",
    resume: bool = False,
) -> Result:
    """Train the model of a study with a mask or without, save it, and report what became of it (`exp=sft` and others).

    The weights of the study's model change: load it again for what is to be compared with it.

    Args:
        study: of the model before the training.
        plan: what is trained on what; `check_plan` tells what is wrong with it before a large model is loaded.
        folder: for `checkpoints` and `model`, the trained one.
        mask: on all the time, as on the reference model of DPO and GRPO.
        mask_name: what findings call the mask.
        resume: go on from the checkpoints in the folder.

    Returns:
        Metrics `TrainingMetrics`; the tables `training_log` and `training_trace` and the figures `training_loss` and
        `training_trace`, of a `TrainingHistory`.

    Raises:
        MelensError: as `train_model`.

    Example:
        >>> from melens.training.plan import TrainingPlan
        >>> from melens.training.recipe import Recipe
        >>> plan = TrainingPlan(Recipe("sft", batch_size=2, micro_batch_size=2, lr=0.01, steps=2), "sums", limit=8)
        >>> mask = melens.WeMask(0.1, select="random", start=1)
        >>> before = melens.study(melens.load_model("tiny"), prompts)
        >>> result = melens.analysis.training(before, plan, "trained", mask=mask)
        >>> result.metrics.training_steps, sorted(result.figures)
        (2, ['training_loss', 'training_trace'])
        >>> trained = melens.load_model("trained/model")
    """
    trained = train_model(study, plan, Path(folder), mask=mask, resume=resume)
    name, method = study.trace.model["name"], plan.recipe.method
    first, last = trained.history.ends
    inspected = ("me_layer", "magnification_there", "sink_mass")
    metrics = study.metrics(
        TrainingMetrics,
        method=method,
        dataset=plan.dataset,
        training_mask=None if trained.mask is None else trained.mask.to_dict(),
        training_seed=plan.recipe.seed,
        mask_planned=mask is not None,
        mask_follows=mask is not None and isinstance(mask.start, str),
        gate=plan.gate,
        saved_in=str(trained.folder),
        training_rows=trained.n_rows,
        training_chat=trained.chat,
        **{f"training_{key}": value for key, value in asdict(trained.stats).items()},
        **{f"{key}_before": first.get(key) for key in inspected},
        **{f"{key}_after": last.get(key) for key in (*inspected, "largest_over_median", "sink_rate")},
        **_validation_metrics(trained),
        training_share_of_peak=trained.share_of_peak,
        attention=kind_of(study.model.original_model.config),
    )
    return Result(
        method,
        study.trace.model,
        metrics,
        tables={"training_log": trained.history.log, "training_trace": trained.history.inspections} | trained.tables,
        figures=draw_histories(
            [trained.history], f"{method_in_words(method)} of {name} on {plan.dataset}", study.me.layer
        ),
        findings=_findings(plan, trained, mask_name),
    )


def _validation_metrics(trained: TrainedModel) -> dict[str, float]:
    if "validation" not in trained.tables:
        return {}
    means = trained.tables["validation"].groupby("masked")["loss"].mean()
    return {"validation_loss_masked" if masked else "validation_loss": float(loss) for masked, loss in means.items()}


def _findings(plan: TrainingPlan, trained: TrainedModel, mask_name: str) -> Sequence[tuple[str, str]]:
    stats, own = trained.stats, trained.mask
    mask = "none" if own is None else f"{mask_name} rate={own.rate:g} start={own.start}"
    speed = f"{stats.seconds:.0f} s, {stats.step_seconds or 0:.3g} s a step"
    if stats.tokens_per_second:
        speed += f", {stats.tokens_per_second:,.0f} tokens a second"
    if trained.share_of_peak:
        speed += f" ({trained.share_of_peak:.0%} of the peak in bfloat16)"
    if stats.peak_gb:
        speed += f", {stats.peak_gb:.1f} GB at most"
    what = f"{method_in_words(plan.recipe.method)} on {trained.n_rows} rows of {plan.dataset}, mask {mask}, "
    what += f"gate {plan.gate or 'none'}"
    resumed = f", from step {stats.resumed_at} on" if stats.resumed_at else ""
    return [
        ("training", what),
        *([("thinking", f"{stats.thinking} in rollouts")] if stats.thinking else []),
        ("steps", f"{stats.steps}{resumed}; {trained.history.loss_in_words()}"),
        *_validation_in_words(trained),
        ("massive activation", trained.history.change_in_words()),
        ("saved", f"model=hub model.name={trained.folder} takes it in any experiment"),
        ("speed", speed),
    ]


def _validation_in_words(trained: TrainedModel) -> list[tuple[str, str]]:
    losses = _validation_metrics(trained)
    if not losses:
        return []
    said = f"{losses['validation_loss']:.4f} nats a token"
    if "validation_loss_masked" in losses:
        said += f" without the mask, {losses['validation_loss_masked']:.4f} under it"
    return [("validation loss", said)]
