"""The paper's tables with their trainings: 1 to 4, 6 and 7. What is trained and scored is kept, and not done twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from transformer_lens.model_bridge import TransformerBridge

from experiments.benchmark import Bench, Cell, how_asked, load_tasks
from experiments.runner.masks import masks_of, on_blocks
from experiments.options import Options
from experiments.options.benchmark import asked_for
from experiments.options.masks import Preset, presets_of
from experiments.options.table import Part, Table, asked_table, of_part
from experiments.options.training import Planned
from experiments.runner.legacy import ReportedOptions
from experiments.runner.progress import log_line
from experiments.runner.study import Run as Study
from experiments.runner.study import begin_study
from experiments.training import fit, free_memory, kept_training, model_options, prepare_training
from experiments.training_report import Course, averaged, draw
from melens import MelensError, Probe, WeMask, load_model
from melens.benchmarks.scores import correct, count_verdicts, summarise
from melens.benchmarks.tables import lay_out
from melens.data.chat import Chat
from melens.figures.scores import score_differences, score_table
from melens.report.result import Figure, Result
from melens.storage.cache import cache_folder

BASE = "base"


def probes(model: TransformerBridge, options: ReportedOptions) -> list[Probe]:
    """The masks only need the ME layer, which the default probes find."""
    return []


def prepare_table(cfg: Options) -> Planned:
    """Load all data before the model, and foresee the memory; return the first training.

    Raises:
        MelensError: as `load_tasks` and `prepare_training`; a cache that cannot be written to.
    """
    _check_cache()
    table = asked_table(cfg)
    planned = []
    for part in table.parts:
        own = of_part(cfg, part)
        load_tasks(own)
        planned.append(prepare_training(own, table.method, dataset=part.dataset))
    return planned[0]


def _check_cache() -> None:
    """Raise a `MelensError` where a trained model could not be kept: the table's rows are read from there."""
    folder = cache_folder() / "trainings"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise MelensError(
            f"exp=tables keeps what it trains in {folder}, which cannot be written to: set MELENS_CACHE to a folder "
            "that can be."
        )


def run(study: Study, options: ReportedOptions) -> Result:
    """Train what is missing, score every row, and lay the table out."""
    table = asked_table(study.cfg)
    scores, items, notes = [], [], []
    courses: list[Course] = []
    chat = None
    for part in table.parts:
        rows = _Rows(study, table, part)
        of_part_items = pd.concat(list(rows.items()), ignore_index=True)
        items.append(of_part_items.assign(dataset=part.dataset))
        kinds = of_part_items[["mask", "kind"]].drop_duplicates()
        of_part_scores = summarise(of_part_items, rows.label(table.method.upper())).merge(kinds, on="mask")
        scores.append(of_part_scores.assign(dataset=part.dataset))
        courses += rows.courses
        chat = rows.chat or chat
        notes.append(how_asked(asked_for(rows.cfg), rows.chat))
    together = correct(pd.concat(scores, ignore_index=True))  # over all parts, not each alone
    pairs = _pairs(items)
    reference = f"{table.method.upper()} without a mask"
    layout = lay_out(together, study.trace.model["name"], " ".join(dict.fromkeys(notes)), reference)
    compared = together[together["shown"] & together["p_corrected"].notna()]
    n_shown = int((compared["verdict"] != "no difference shown").sum())
    here = f"{n_shown} of {len(compared)} differences to {reference} are shown."
    name = study.trace.model["name"]
    title = f"Table {table.number}: {name}"
    figure = score_table(layout.columns, layout.rows, layout.cells, layout.best, title=title)
    paper = "Training with WeMask scores best, WeMask at inference alone comes next."
    pictures = {"table": Figure(figure, f"table {table.number}", paper, f"{here} {layout.caption}")}
    if len(compared):
        differences = score_differences(compared, title=f"Differences to {reference}: {name}")
        pictures["table_differences"] = Figure(differences, f"table {table.number}", paper, here)
    pictures |= draw(averaged(courses), f"table {table.number}, {name}", study.me.layer)
    counts = count_verdicts(pd.concat([together, pairs]), "kind")
    metrics = study.metrics(
        table=table.number,
        method=table.method,
        datasets=[part.dataset for part in table.parts],
        left_out=list(table.left_out),
        n_compared=len(compared),
        n_shown=n_shown,
        thinking=None if chat is None else chat.in_words(),
        n_unfinished=int(together.loc[together["shown"], "n_unfinished"].sum()),
        compared=counts,
    )
    tables = {"table_items": pd.concat(items, ignore_index=True), "table_scores": together, "table_pairs": pairs}
    tables["training_log"] = pd.concat([course.log for course in courses], ignore_index=True)
    tables["training_trace"] = pd.concat([course.looks for course in courses], ignore_index=True)
    documents = {"table.md": layout.markdown(), "table.tex": layout.latex()}
    findings = _findings(together, here, counts, table)
    return Result("tables", study.trace.model, metrics, tables, pictures, findings, documents)


_PAIRS = {"training over inference": "inference", "training over gates": "gates"}


def _pairs(items: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Compare training with WeMask row by row with WeMask at inference of the same rate, and with gated attention.

    Returns:
        As `summarise`, with `kind` of `_PAIRS` and `reference`, what is compared with.
    """
    found = []
    for own in items:
        rows = own[["mask", "kind", "rate"]].drop_duplicates()
        for aware in rows[rows["kind"] == "training"].itertuples():
            for kind, other_kind in _PAIRS.items():
                others = rows[(rows["kind"] == other_kind) & ((rows["rate"] == aware.rate) | (other_kind == "gates"))]
                for other in others["mask"]:
                    scores = summarise(own[own["mask"].isin([aware.mask, other])], other)
                    found.append(scores[scores["mask"] == aware.mask].assign(kind=kind, reference=other))
    return correct(pd.concat(found, ignore_index=True))


def _findings(
    scores: pd.DataFrame, here: str, counts: dict[str, dict[str, int]], table: Table
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("in all", here, "")]
    for kind in _PAIRS:
        if kind in counts:
            count = counts[kind]
            rows.append((kind, f"{count['better']} better and {count['worse']} worse of {count['all']}", ""))
    for row in scores[scores["shown"]].to_dict("records"):
        score = f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f}; n={row['n']}, {row['n_seeds']} seeds)"
        told = ""
        if row["verdict"]:
            interval = f"{row['difference_low']:+.3f} to {row['difference_high']:+.3f}"
            told = f"{row['difference']:+.3f} ({interval}): {row['verdict']}"
        rows.append((f"{row['task']}, {row['metric']}: {row['mask']}", score, told))
    if table.left_out:
        rows.append(("left out", f"{', '.join(table.left_out)}: only the hub has them", ""))
    return rows


# --- Rows -------------------------------------------------------------------------------------------------------------


@contextmanager
def _taking_turns(folder: Path, tell: Callable[[], object]) -> Iterator[None]:
    """Let one run at a time into a kept training's folder; wait, and tell so. Of several processes all go in."""
    if PartialState().num_processes > 1:  # of one run, all of which train
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class _Row:
    """A row of a table: a model, with no mask, with WeMask of a rate, or with the mask that it was trained with."""

    label: str
    kind: Literal["base", "plain", "inference", "training", "gates"]
    mask: float | int | WeMask | None = None


class _Rows:
    """The rows of one part of a table."""

    def __init__(self, study: Study, table: Table, part: Part) -> None:
        self._study, self._table, self._part = study, table, part
        self.cfg = of_part(study.cfg, part)
        self._asked = asked_for(self.cfg)
        self.courses: list[Course] = []
        self.chat: Chat | None = None  # in which all of its models are asked

    def label(self, row: str) -> str:
        """Name a row; where parts share their benchmarks, by the dataset too."""
        return f"{row}, {self._part.dataset}" if self._table.shares_tasks else row

    def items(self) -> Iterator[pd.DataFrame]:
        """Train and score row by row."""
        method = self._table.method.upper()
        self._masked_cells(self._study, "all")  # a model without an ME layer is told now
        yield self._scored(self._study, [_Row(self.label(BASE), "base")], seed=0)
        for seed in self._table.seeds:
            plain = _Row(self.label(method), "plain")
            free = [
                _Row(self.label(f"{method} + WeMask rate={rate:g} (TF)"), "inference", rate)
                for rate in self._table.rates
            ]
            yield self._scored(self._trained(plain.label, seed), [plain, *free], seed)
            for rate in self._table.rates:
                label = self.label(f"WeMask rate={rate:g} ({method})")
                study = self._trained(label, seed, rate=rate)
                saved = WeMask.load(study.trace.model["name"])
                yield self._scored(study, [_Row(label, "training", saved)], seed)
                del study
            for gate in self._table.gates:
                label = self.label(f"gated attention, {gate} ({method})")
                yield self._scored(self._trained(label, seed, gate=gate), [_Row(label, "gates")], seed)

    def _trained(self, label: str, seed: int, *, rate: float | None = None, gate: str = "none") -> Study:
        """Return a study of the trained model, trained now if it is not kept: with a mask of this rate, or a gate."""
        mask = "off" if rate is None else "paper"
        cfg = self.cfg.changed(training={"seed": [seed], "mask": mask, "gate": gate})
        if rate is not None:
            cfg = cfg.changed(wemask={"rate": rate})
        free_memory()
        planned = prepare_training(cfg, self._table.method, dataset=self._part.dataset)
        base = load_model(**model_options(cfg, planned))
        store = kept_training(self._study, planned, base)
        folder = store.folder
        kept = partial(store.load_table, "training_log")  # which is written last
        if kept() is None:
            with _taking_turns(folder, lambda: log_line(f"another run trains {label} (seed {seed}): waiting for it")):
                if kept() is None:
                    begun = (folder / "checkpoints" / "training.json").is_file()
                    fitted = fit(replace(self._study, model=base, cfg=cfg), planned, folder, resume=begun)
                    store.save_table("training_trace", fitted.looks)
                    store.save_table("training_log", fitted.log)
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        del base
        free_memory()
        told: dict[str, Any] = {
            "training_mask": "none" if rate is None else f"rate={rate:g}",
            "gate": gate,
            "seed": seed,
        }
        log, looks = (
            pd.DataFrame(store.load_table(name)).assign(dataset=self._part.dataset, **told)
            for name in ("training_log", "training_trace")
        )
        name = label if len(self._table.parts) == 1 or self._table.shares_tasks else f"{label}, {self._part.dataset}"
        self.courses.append(Course(name, log, looks))
        options = model_options(cfg, planned) | {"name": str(folder / "model"), "source": "hub", "hub_id": None}
        tokens = [torch.tensor(ids) for ids in self._study.tokens]
        return begin_study(load_model(**options), tokens, cfg, self._study.stage, self._study.folder)

    def _scored(self, study: Study, rows: Sequence[_Row], seed: int) -> pd.DataFrame:
        """Score a model row by row; `training` is the seed, `kind` that of the row."""
        bench = Bench(study, self._asked, keep=study.cfg.exp.is_kept)
        self.chat = bench.chat
        found = []
        for benchmark in self._asked.benchmarks:
            preset = self._preset()
            layers = self._asked.layers_of(benchmark, preset)
            cells = []
            for row in rows:
                if isinstance(row.mask, WeMask):
                    mask: WeMask | None = on_blocks(row.mask, layers)
                elif row.mask is None:
                    mask = None
                else:
                    mask = self._masked_cells(study, layers)[row.mask]
                cells.append(Cell(row.label, row.label, 0.0 if mask is None else float(mask.rate), mask))
            found.append(bench.run(benchmark, cells).items)
        kinds = {row.label: row.kind for row in rows}
        items = pd.concat(found, ignore_index=True)
        return items.assign(training=seed, kind=items["mask"].map(kinds))

    def _preset(self) -> Preset:
        cfg = self.cfg.changed(wemask={"rate": list(self._table.rates)})
        (preset,) = presets_of(["paper"], cfg, key="the table")
        return preset

    def _masked_cells(self, study: Study, layers: Any) -> dict[float | int, WeMask]:
        options = self._preset().options.model_copy(update={"layers": layers})
        me = self._study.me  # as it was before the training, where training with WeMask starts from too
        masks = [mask for mask in masks_of(options, me, study.model) if mask is not None]
        return dict(zip(self._table.rates, masks, strict=True))
