"""Train a model with WeMask, with gates or plain (`sft`, `dpo`, `grpo`), and see what becomes of it."""

from __future__ import annotations

import gc
import json
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from transformer_lens.model_bridge import TransformerBridge

import melens
from experiments.runner.masks import only_mask_of
from experiments.options import Options
from experiments.options.training import Planned, planned_training
from experiments.runner.legacy import PlainOptions
from experiments.runner.study import Run as Study
from experiments.training_report import Course, draw
from melens import MelensError, Probe, WeMask
from melens.analysis.sink_mass import sink_mass_by_layer
from melens.data.chat import check_conversations
from melens.models.devices import is_dispatched
from melens.models.gates import add_gates
from melens.models.loading import check_memory, load_tokenizer
from melens.models.quantization import is_quantized
from melens.models.view import bridged_twin, is_whole, plain_twin, view_model
from melens.report.result import Result
from melens.storage.cache import Store, code_version, store_for, tokenizer_fingerprint
from melens.storage.files import write_text
from melens.training.data import TrainingData, format_rows, hash_rows, load_training_data
from melens.training.rewards import check_answers

__all__ = ["Fitted", "fit", "free_memory", "kept_training", "model_options", "prepare_training", "probes", "run"]

_SPREAD = (
    "model.device_map and model.max_memory spread a model for looking into it, not for training: leave them out, or "
    "shard it over GPUs with accelerate launch --config_file conf/training/accelerate/fsdp2.yaml experiments/run.py ..."
)
_QUANTIZED = "A quantised model has no weights that a training could change: load it without quantisation."


def probes(model: TransformerBridge, options: PlainOptions) -> list[Probe]:
    """The mask only needs the ME layer, which the default probes find."""
    return []


# --- Before the model -------------------------------------------------------------------------------------------------


def prepare_training(cfg: Options, method: str, *, dataset: str | None = None, folder: Path | None = None) -> Planned:
    """Load the rows, and foresee the memory, before the model, which takes longer.

    Args:
        cfg: the whole configuration.
        method: `sft`, `dpo` or `grpo`.
        dataset: where the configuration names none.
        folder: of the run, if it trains one model.

    Raises:
        MelensError: options, data or memory that do not allow the training.
    """
    from melens.training.trainers import check_folder, check_trainer

    if cfg.model.device_map is not None or cfg.model.max_memory is not None:
        raise MelensError(_SPREAD)
    if cfg.model.quantize is not None:
        raise MelensError(_QUANTIZED)
    disable_progress_bars()
    planned = planned_training(cfg, method, dataset=dataset).on(gpu=torch.cuda.is_available())
    if folder is not None:
        check_folder((planned.resume or folder) / "checkpoints", planned.recipe, resume=planned.resume is not None)
    check_trainer(planned.recipe, len(_data(planned).rows))
    options = model_options(cfg, planned)
    check_rows(planned, load_tokenizer(**options))
    n_processes = PartialState().num_processes
    if torch.cuda.device_count() > 1 and n_processes == 1:
        raise MelensError(
            "There are several GPUs, and a training in one process takes one: set CUDA_VISIBLE_DEVICES=0, or start "
            "with accelerate launch --config_file conf/training/accelerate/ddp.yaml experiments/run.py ..."
        )
    sharded = _is_sharded()
    per_weight = planned.recipe.bytes_per_weight / (n_processes if sharded else 1)
    check_memory(options.pop("name"), per_weight, "weights, gradients and the optimiser's state", **options)
    return planned


def check_rows(planned: Planned, tokenizer: Any) -> None:
    """Try the rows on the chat template and the right answers on the reward.

    Raises:
        MelensError: the rows have no form for the method, the template does not take one of them, or too many right
            answers can never be rewarded.
    """
    name = planned.dataset
    rows = _formatted(*_told(planned), chat=_is_chat(planned, tokenizer))
    replies = [role for role in ("completion", "chosen", "rejected") if role in rows.column_names]
    if len(rows) and "prompt" in rows.column_names and not isinstance(rows[0]["prompt"], str):
        whole = ([*row["prompt"], *row[reply]] for reply in replies for row in rows)
        check_conversations(tokenizer, whole if replies else rows["prompt"], name)
    if planned.recipe.method == "grpo":
        check_answers(rows["answer"], name)


def _is_chat(planned: Planned, tokenizer: Any) -> bool:
    """Tell whether a model learns in its chat template."""
    if tokenizer is None:
        raise MelensError("This model has no tokenizer, so it cannot learn from texts.")
    if planned.chat and not tokenizer.chat_template:
        raise MelensError("training.chat is true, but this model's tokenizer has no chat template.")
    return bool(tokenizer.chat_template) if planned.chat is None else planned.chat


def model_options(cfg: Options, planned: Planned) -> dict[str, Any]:
    """Return what to load the model with: its weights in the precision that they are trained in."""
    options = cfg.model.model_dump(exclude_unset=True)
    return options | {"dtype": "bfloat16" if planned.recipe.precision == "bfloat16" else "float32"}


def _is_sharded() -> bool:
    return str(PartialState().distributed_type).endswith("FSDP")


@cache
def _load(
    name: str, method: str, data_dir: str | None, columns: tuple, split: str, limit: int | None, seed: int
) -> Any:
    return load_training_data(
        name, method, data_dir=data_dir, columns=dict(columns), split=split, limit=limit, seed=seed
    )


@cache
def _formatted(*told: Any, chat: bool) -> Any:
    return format_rows(_load(*told), told[1], chat=chat)


def _told(planned: Planned) -> tuple[Any, ...]:
    columns, recipe = tuple(sorted(planned.columns.items())), planned.recipe
    return planned.dataset, recipe.method, planned.data_dir, columns, planned.split, planned.limit, recipe.seed


def _data(planned: Planned) -> TrainingData:
    data: TrainingData = _load(*_told(planned))
    return data


def kept_training(study: Study, planned: Planned, base: TransformerBridge) -> Store:
    """Return where a trained model is kept, for all that it, its log and its looks depend on.

    Args:
        study: of the model before any training, by which the mask starts and on whose prompts the training is watched.
        planned: the training.
        base: the model that is trained.
    """
    learnt = [replace(planned, resume=None), hash_rows(_data(planned).rows), tokenizer_fingerprint(base.tokenizer)]
    me = [study.me.layer, study.me.dims, study.me.criterion]
    watched = [study.tokens, study.distinct_carriers, study.position, study.cfg.max_batch_tokens]
    own = [code_version(Path(__file__).parent), PartialState().num_processes, str(PartialState().distributed_type)]
    libraries = ("trl", "peft", "datasets", "jinja2", "math-verify", "sympy", "latex2sympy2-extended")
    return store_for("trainings", base.original_model, learnt, me, watched, own, libraries=libraries)


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A model that was trained.

    Attributes:
        folder: it, to be loaded by `load_model`.
        mask: that it was trained with.
        log: numbers by step.
        looks: of `_Looks`.
        metrics: of the training.
    """

    folder: Path
    mask: WeMask | None
    log: pd.DataFrame
    looks: pd.DataFrame
    metrics: dict[str, Any] = field(default_factory=dict)


def fit(study: Study, planned: Planned, folder: Path, *, resume: bool) -> Fitted:
    """Train the model of a study, whose weights change, and save it.

    Args:
        study: of the model as it is before.
        planned: what was asked for.
        folder: for `checkpoints` and `model`.
        resume: go on from the checkpoints there.
    """
    from melens.training.saving import save_trained
    from melens.training.trainers import train

    tokenizer = study.model.tokenizer
    chat = _is_chat(planned, tokenizer)
    if is_dispatched(study.model.original_model):
        raise MelensError(_SPREAD)
    if is_quantized(study.model.original_model):
        raise MelensError(_QUANTIZED)
    model = plain_twin(study.model)
    if model is study.model.original_model:
        raise MelensError("This model cannot be taken out of its bridge, so it cannot be trained.")
    mask = _mask(study, planned, model)
    if planned.gate is not None:
        add_gates(view_model(model), planned.gate)
    rows = _formatted(*_told(planned), chat=chat)
    looks = _Looks(study, planned, mask, folder / "checkpoints" / "looks.json", resume=resume)
    progress = study.stage(f"steps of {planned.recipe.method}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of TRL and transformers among themselves
        trained = train(
            model,
            tokenizer,
            rows,
            planned.recipe,
            folder / "checkpoints",
            mask=mask,
            resume=resume,
            progress=progress,
            watch=looks.look,
            watch_every=planned.trace_every,
        )
    told = {"training": asdict(planned.recipe), "dataset": planned.dataset, "rows": len(rows), "gate": planned.gate}
    told |= {"model": study.trace.model["name"], "mask": None if mask is None else mask.to_dict(), **trained.metrics}
    save_trained(trained.model, tokenizer, folder / "model", mask=mask, told=told)
    return Fitted(
        folder / "model", mask, trained.log, looks.table(), trained.metrics | {"rows": len(rows), "chat": chat}
    )


def _mask(study: Study, planned: Planned, model: Any) -> WeMask | None:
    if planned.mask is None:
        return None
    mask = only_mask_of(planned.mask.options, study.me, study.model)
    return None if mask is None else mask.on(model)


class _Looks:
    """What becomes of the massive activation and the sinks, without the mask and with it, by step.

    What was seen is kept beside the checkpoints, for a training that goes on from one.
    """

    def __init__(self, study: Study, planned: Planned, mask: WeMask | None, file: Path, *, resume: bool) -> None:
        self._study, self._mask, self._file = study, mask, file
        self._rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8")) if resume and file.is_file() else []
        prompts = (study.distinct_carriers or study.trace.prompts["prompt"].tolist())[: planned.trace_prompts]
        self._tokens = [torch.tensor(study.tokens[prompt]) for prompt in prompts]
        after = [] if study.me.layer is None else range(study.me.layer + 1, study.last_lasting + 1)
        self._after = list(after) or list(range(study.n_layers))

    def look(self, step: int, model: Any, installed: Any) -> None:
        if not is_whole(model):
            return
        bridge = bridged_twin(model, self._study.trace.model["name"])
        self._rows = [row for row in self._rows if row["step"] < step]  # a stopped training may have seen more
        for masked in (False, True) if self._mask is not None else (False,):
            with self._mask.moved_to(bridge).applied(bridge) if masked and self._mask is not None else nullcontext():
                self._rows.append({"step": step, "masked": masked} | self._seen(bridge))
        if PartialState().is_main_process:
            write_text(self._file, json.dumps(self._rows))

    def _seen(self, bridge: TransformerBridge) -> dict[str, Any]:
        study = self._study
        probes = melens.default_probes(bridge, min_abs=study.me.criterion.min_abs)
        trace = melens.trace(bridge, self._tokens, probes, max_batch_tokens=study.cfg.max_batch_tokens)
        me = melens.find_me_layer(trace, study.me.criterion)
        sinks = sink_mass_by_layer(trace)
        return {
            "me_layer": me.layer,
            "magnification": me.magnification,
            "magnification_there": self._magnification(trace),
            "sink_mass": float(sinks[sinks["layer"].isin(self._after)]["mean"].mean()) if len(sinks) else None,
        }

    def _magnification(self, trace: Any) -> float | None:
        """Return by how much the block that was the ME layer at first lifts the first token."""
        if self._study.me.layer is None:
            return None
        norms = trace["norm"].query(f"pos == {self._study.position}")
        before, after = (
            norms[(norms["layer"] == layer) & (norms["site"] == site)].set_index("prompt")["norm"]
            for layer, site in self._places(norms)
        )
        return float((after / before).mean())

    def _places(self, norms: pd.DataFrame) -> list[tuple[int, str]]:
        layer = self._study.me.layer
        assert layer is not None
        before = (layer - 1, "hook_resid_post") if layer else (0, "hook_resid_pre")
        return [before, (layer, "hook_resid_post")]

    def table(self) -> pd.DataFrame:
        columns = ["step", "masked", "me_layer", "magnification", "magnification_there", "sink_mass"]
        kinds: dict[str, Any] = {"step": int, "masked": bool, "me_layer": "Int64", **dict.fromkeys(columns[3:], float)}
        return pd.DataFrame(self._rows, columns=columns).astype(kinds)


def free_memory() -> None:
    """Give back what a training left: trainer and optimiser hold each other until they are collected."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Telling ----------------------------------------------------------------------------------------------------------


def run(study: Study, options: PlainOptions) -> Result:
    """Train, save, and tell what became of the model."""
    planned = planned_training(study.cfg, options.name).on(gpu=torch.cuda.is_available())
    folder = study.folder if planned.resume is None else planned.resume
    fitted = fit(study, planned, folder, resume=planned.resume is not None)
    course = Course("", fitted.log, fitted.looks)
    first, last = course.ends
    metrics = study.metrics(
        method=planned.recipe.method,
        dataset=planned.dataset,
        training_mask=None if fitted.mask is None else fitted.mask.to_dict(),
        gate=planned.gate,
        saved_in=str(fitted.folder),
        **{f"training_{key}": value for key, value in fitted.metrics.items()},
        **{f"{key}_before": first.get(key) for key in ("me_layer", "magnification_there", "sink_mass")},
        **{f"{key}_after": last.get(key) for key in ("me_layer", "magnification_there", "sink_mass")},
    )
    tables = {"training_log": fitted.log, "training_trace": fitted.looks}
    return Result(
        planned.recipe.method,
        study.trace.model,
        metrics,
        tables,
        draw(
            [course],
            f"{planned.recipe.method.upper()} of {study.trace.model['name']} on {planned.dataset}",
            study.me.layer,
        ),
        _findings(planned, fitted, course),
    )


def _findings(planned: Planned, fitted: Fitted, course: Course) -> list[tuple[str, ...]]:
    metrics = fitted.metrics
    mask = "none"
    if fitted.mask is not None and planned.mask is not None:
        mask = f"{planned.mask.name} rate={fitted.mask.rate:g} start={fitted.mask.start}"
    what = f"{planned.recipe.method} on {metrics['rows']} rows of {planned.dataset}"
    resumed = f", from step {metrics['resumed_at']} on" if metrics["resumed_at"] else ""
    speed = f"{metrics['seconds']:.0f} s, {metrics['step_seconds'] or 0:.3g} s a step"
    if metrics["tokens_per_second"]:
        speed += f", {metrics['tokens_per_second']:,.0f} tokens a second"
    if metrics["peak_gb"]:
        speed += f", {metrics['peak_gb']:.1f} GB at most"
    thinking = [("thinking", f"{metrics['thinking']} in rollouts")] if metrics["thinking"] else []
    return [
        ("training", f"{what}, mask {mask}, gate {planned.gate or 'none'}"),
        *thinking,
        ("steps", f"{metrics['steps']}{resumed}; {course.learnt()}"),
        ("speed", speed),
        ("massive activation", course.moved()),
        ("saved", f"{fitted.folder}: model=hub model.name={fitted.folder} in any experiment"),
    ]
