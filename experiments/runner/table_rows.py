"""The rows of one training set of `exp=tables`: models that are trained now or were kept, scored under their masks.

1. `items` goes through the rows of the table, and scores each of its models under its masks (`_scored`).
2. A model is trained only if the user's cache has none under all that decides it (`_trained`); runs that want the same
   one take turns.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from experiments.benchmark import data_for
from experiments.options.masks import Preset, presets_of
from experiments.options.schema import Options
from experiments.options.table import TableRequest, TrainingSet
from experiments.options.training import TrainingRequest, training_request
from experiments.runner.masks import masks_of, on_blocks
from experiments.runner.progress import log_line
from experiments.runner.study import Run, begin_study
from experiments.training import mask_for, model_options, prepare_training
from melens.benchmarks.evaluation import Evaluator, MaskConfiguration
from melens.data.chat import Chat
from melens.masks.mask import WeMask
from melens.models.loading import load_model
from melens.training.history import TrainingHistory
from melens.training.runs import train_model, training_store

__all__ = ["TableRows", "one_at_a_time"]


@dataclass(frozen=True)
class _Row:
    """A row of a table: a model with no mask, with WeMask of a rate, or with the mask that it was trained with."""

    label: str
    kind: Literal["base", "plain", "inference", "training", "gates"]
    mask: float | int | WeMask | None = None


class TableRows:
    """The rows of one training set."""

    def __init__(self, run: Run, request: TableRequest, own: TrainingSet) -> None:
        self._run, self._request, self._set = run, request, own
        self.histories: list[TrainingHistory] = []
        self.chat: Chat | None = None  # how the chat template was used, once a row was scored

    def label(self, row: str) -> str:
        """Name a row; where training sets share their benchmarks, by the training set too."""
        return f"{row}, {self._set.dataset}" if self._request.shares_benchmarks else row

    def items(self) -> Iterator[pd.DataFrame]:
        """Train and score row by row."""
        method, rates = self._request.method.upper(), self._request.rates
        self._masks(self._run, "all")  # a model without an ME layer fails now, and not after the first training
        yield self._scored(self._run, [_Row(self.label("base"), "base")], seed=0)
        for seed in self._request.seeds:
            plain = _Row(self.label(method), "plain")
            free = [_Row(self.label(f"{method} + WeMask rate={rate:g} (TF)"), "inference", rate) for rate in rates]
            yield self._scored(self._trained(plain.label, seed), [plain, *free], seed)
            for rate in rates:
                label = self.label(f"WeMask rate={rate:g} ({method})")
                trained = self._trained(label, seed, rate=rate)
                saved = WeMask.load(str(trained.model.cfg.model_name))
                yield self._scored(trained, [_Row(label, "training", saved)], seed)
                del trained
            for gate in self._request.gates:
                label = self.label(f"gated attention, {gate} ({method})")
                yield self._scored(self._trained(label, seed, gate=gate), [_Row(label, "gates")], seed)

    def _trained(self, label: str, seed: int, *, rate: float | None = None, gate: str = "none") -> Run:
        """Return a run on the trained model, with a mask of this rate or a gate; train it now if it is not kept."""
        mask, masked = ("off", {}) if rate is None else ("paper", {"wemask": {"rate": rate}})
        cfg = self._set.options.changed(training={"seed": [seed], "mask": mask, "gate": gate}, **masked)
        _free_memory()
        request = training_request(cfg, self._request.method, dataset=self._set.dataset)
        request = prepare_training(cfg, request, self._run.model.tokenizer)
        store = training_store(self._run, request.plan, mask_for(self._run, request))
        kept = partial(store.load_table, "training_log")  # it is written last
        if kept() is None:
            waiting = f"Waiting for another run that trains {label} (seed {seed})."
            with one_at_a_time(store.folder, partial(log_line, waiting)):
                if kept() is None:
                    trained = self._train(cfg, request, store.folder)
                    store.save_table("training_trace", trained.inspections)
                    store.save_table("training_log", trained.log)
                    shutil.rmtree(store.folder / "checkpoints", ignore_errors=True)
        mask = "none" if rate is None else f"rate={rate:g}"
        about: dict[str, Any] = {"dataset": self._set.dataset, "training_mask": mask, "gate": gate, "seed": seed}
        log, inspections = (
            pd.DataFrame(store.load_table(name)).assign(**about) for name in ("training_log", "training_trace")
        )
        has_one_name = len(self._request.sets) == 1 or self._request.shares_benchmarks
        name = label if has_one_name else f"{label}, {self._set.dataset}"
        self.histories.append(TrainingHistory(name, log, inspections))
        options = model_options(cfg, request.plan)
        options |= {"name": str(store.folder / "model"), "source": "hub", "hub_id": None}
        return begin_study(load_model(**options), self._run.tokens, cfg, self._run.stage, self._run.folder)

    def _train(self, cfg: Options, request: TrainingRequest, folder: Path) -> TrainingHistory:
        """Train a fresh copy of the model, whose weights change; resume where a run was stopped."""
        base = replace(self._run, model=load_model(**model_options(cfg, request.plan)), cfg=cfg)
        has_begun = (folder / "checkpoints" / "training.json").is_file()
        trained = train_model(base, request.plan, folder, mask=mask_for(base, request), resume=has_begun)
        del base
        _free_memory()
        return trained.history

    def _scored(self, run: Run, rows: Sequence[_Row], seed: int) -> pd.DataFrame:
        """Score a model row by row; `training` is the seed, `kind` that of the row."""
        request = self._set.benchmarks
        data = data_for(run.cfg, request.benchmarks, run.model)
        evaluator = Evaluator(run, request.benchmarks, request.options, data, keep=run.cfg.exp.is_kept)
        self.chat = evaluator.chat
        found = []
        for benchmark in request.benchmarks:
            layers = request.layers_of(benchmark, self._preset())
            configurations = []
            for row in rows:
                mask = on_blocks(row.mask, layers) if isinstance(row.mask, WeMask) else None
                if isinstance(row.mask, float | int):
                    mask = self._masks(run, layers)[row.mask]
                configurations.append(MaskConfiguration(row.label, mask, row.label))
            found.append(evaluator.score(benchmark, configurations)[0])
        items = pd.concat(found, ignore_index=True)
        return items.assign(training=seed, kind=items["mask"].map({row.label: row.kind for row in rows}))

    def _preset(self) -> Preset:
        cfg = self._set.options.changed(wemask={"rate": list(self._request.rates)})
        return presets_of(["paper"], cfg, key="the table")[0]

    def _masks(self, run: Run, layers: Any) -> dict[float | int, WeMask]:
        """Return the masks at inference by rate; as in training, they start from the ME layer before the training."""
        options = self._preset().options.model_copy(update={"layers": layers})
        masks = [mask for mask in masks_of(options, self._run.me, run.model) if mask is not None]
        return dict(zip(self._request.rates, masks, strict=True))


@contextmanager
def one_at_a_time(folder: Path, report_wait: Callable[[], object]) -> Iterator[None]:
    """Let one run at a time into a kept training's folder. The processes of one run train together, and all go in."""
    if PartialState().num_processes > 1:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _free_memory() -> None:
    """Give back the memory of a training: trainer and optimiser refer to each other until they are collected."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
