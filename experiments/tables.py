"""The paper's tables with their trainings: 1 to 4, 6 and 7. What is trained and scored is kept, and not done twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from transformer_lens.model_bridge import TransformerBridge

from experiments.benchmark import Bench, Cell, how_asked, load_tasks
from experiments.benchmark_options import asked_for, read_presets
from experiments.masks import masks_of, on_first_block
from experiments.study import Study, begin_study
from experiments.table_options import Part, Table, asked_table, of_part
from experiments.training import fit, model_options, prepare_training
from experiments.training_options import Planned
from melens import Probe, WeMask, figures, load_model
from melens.benchmarks.layout import lay_out
from melens.benchmarks.scores import correct, summarise
from melens.cache import store_for
from melens.results import Picture, Result

BASE = "base"


def probes(model: TransformerBridge, options: DictConfig) -> list[Probe]:
    """The masks only need the ME layer, which the default probes find."""
    return []


def prepare_table(cfg: DictConfig) -> Planned:
    """Load all data before the model, and foresee the memory; return the first training.

    Raises:
        MelensError: as `load_tasks` and `prepare_training`.
    """
    table = asked_table(cfg)
    planned = []
    for part in table.parts:
        own = of_part(cfg, part)
        load_tasks(own)
        planned.append(prepare_training(own, table.method, dataset=part.dataset))
    return planned[0]


def run(study: Study, options: DictConfig) -> Result:
    """Train what is missing, score every row, and lay the table out."""
    table = asked_table(study.cfg)
    scores, items, notes = [], [], []
    trainings: dict[str, list[pd.DataFrame]] = {}
    for part in table.parts:
        rows = _Rows(study, table, part)
        of_part_items = pd.concat(list(rows.items()), ignore_index=True)
        items.append(of_part_items.assign(dataset=part.dataset))
        scores.append(summarise(of_part_items, rows.label(table.method.upper())).assign(dataset=part.dataset))
        for kind, found in rows.trainings.items():
            trainings.setdefault(kind, []).extend(found)
        notes.append(how_asked(asked_for(rows.cfg)))
    together = correct(pd.concat(scores, ignore_index=True))  # over all parts, not each alone
    reference = f"{table.method.upper()} without a mask"
    layout = lay_out(together, study.trace.model["name"], " ".join(dict.fromkeys(notes)), reference)
    compared = together[together["shown"] & together["p_corrected"].notna()]
    n_shown = int((compared["verdict"] != "no difference shown").sum())
    here = f"{n_shown} of {len(compared)} differences to {reference} are shown."
    name = study.trace.model["name"]
    title = f"Table {table.number}: {name}"
    figure = figures.score_table(layout.columns, layout.rows, layout.cells, layout.best, title=title)
    paper = "Training with WeMask scores best, WeMask at inference alone comes next."
    pictures = {"table": Picture(figure, f"table {table.number}", paper, f"{here} {layout.caption}")}
    if len(compared):
        differences = figures.score_differences(compared, title=f"Differences to {reference}: {name}")
        pictures["table_differences"] = Picture(differences, f"table {table.number}", paper, here)
    metrics = study.metrics(
        table=table.number,
        method=table.method,
        datasets=[part.dataset for part in table.parts],
        left_out=list(table.left_out),
        n_compared=len(compared),
        n_shown=n_shown,
    )
    tables = {"table_items": pd.concat(items, ignore_index=True), "table_scores": together}
    tables |= {kind: pd.concat(found, ignore_index=True) for kind, found in trainings.items() if found}
    documents = {"table.md": layout.markdown(), "table.tex": layout.latex()}
    return Result("tables", study.trace.model, metrics, tables, pictures, _findings(together, here, table), documents)


def _findings(scores: pd.DataFrame, here: str, table: Table) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("in all", here, "")]
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


@dataclass(frozen=True)
class _Variant:
    """A training: with a mask of this rate, or a gate, or neither."""

    rate: float | int | None = None
    gate: str | None = None


class _Rows:
    """The rows of one part of a table."""

    def __init__(self, study: Study, table: Table, part: Part) -> None:
        self._study, self._table, self._part = study, table, part
        self.cfg = of_part(study.cfg, part)
        self._asked = asked_for(self.cfg)
        self.trainings: dict[str, list[pd.DataFrame]] = {"training_trace": [], "training_log": []}

    def label(self, row: str) -> str:
        """Name a row; where parts share their benchmarks, by the dataset too."""
        return f"{row}, {self._part.dataset}" if self._table.shares_tasks else row

    def items(self) -> Iterator[pd.DataFrame]:
        """Train and score row by row."""
        method = self._table.method.upper()
        self._masked_cells(self._study)  # a model without an ME layer is told now
        yield self._scored(self._study, [(self.label(BASE), None)], seed=0)
        for seed in self._table.seeds:
            plain = self._trained(_Variant(), seed)
            free = [(self.label(f"{method} + WeMask rate={rate:g} (TF)"), rate) for rate in self._table.rates]
            yield self._scored(plain, [(self.label(method), None), *free], seed)
            for rate in self._table.rates:
                aware = self._trained(_Variant(rate=rate), seed)
                saved = WeMask.load(aware.trace.model["name"])
                yield self._scored(aware, [(self.label(f"WeMask rate={rate:g} ({method})"), saved)], seed)
            for gate in self._table.gates:
                gated = self._trained(_Variant(gate=gate), seed)
                yield self._scored(gated, [(self.label(f"gated attention, {gate} ({method})"), None)], seed)

    def _trained(self, variant: _Variant, seed: int) -> Study:
        """Return a study of the trained model, trained now if it is not kept."""
        cfg = OmegaConf.merge(self.cfg, {"training": {"seed": seed, "mask": "off", "gate": variant.gate or "none"}})
        if variant.rate is not None:
            cfg.training.mask = "paper"
            cfg.wemask.rate = variant.rate
        planned = prepare_training(cfg, self._table.method, dataset=self._part.dataset)
        base = load_model(**model_options(cfg, planned))
        told = [repr(replace(planned, trace_every=0, resume=None)), self._study.me.layer]
        folder = store_for("trainings", base.original_model, *told).folder
        if not (folder / "model" / "training.json").is_file():
            fitted = fit(replace(self._study, model=base, cfg=cfg), planned, folder, resume=_was_begun(folder))
            fitted.looks.to_parquet(folder / "training_trace.parquet")
            fitted.log.to_parquet(folder / "training_log.parquet")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        del base
        mask = "none" if variant.rate is None else f"rate={variant.rate:g}"
        told_of: dict[str, Any] = {
            "dataset": self._part.dataset,
            "training_mask": mask,
            "gate": variant.gate or "none",
            "seed": seed,
        }
        for name in self.trainings:
            table = pd.read_parquet(folder / f"{name}.parquet")
            self.trainings[name].append(table.assign(**told_of))
        options = model_options(cfg, planned) | {"name": str(folder / "model"), "source": "hub", "hub_id": None}
        tokens = [torch.tensor(ids) for ids in self._study.tokens]
        return begin_study(load_model(**options), tokens, cfg, self._study.stage, self._study.folder)

    def _scored(self, study: Study, rows: Sequence[tuple[str, Any]], seed: int) -> pd.DataFrame:
        """Score a model with masks: none, a rate of WeMask at inference, or the mask it was trained with."""
        bench = Bench(study, self._asked, keep=bool(study.cfg.exp.keep))
        found = []
        for benchmark in self._asked.benchmarks:
            cells = []
            for label, given in rows:
                layers = self._asked.layers_of(benchmark, self._preset()).get("layers", "all")
                if isinstance(given, WeMask):
                    mask: WeMask | None = given if layers == "all" else on_first_block(given)
                else:
                    mask = None if given is None else self._masked_cells(study, layers)[given]
                cells.append(Cell(label, label, 0.0 if mask is None else float(mask.rate), mask))
            items = bench.run(benchmark, cells).items
            found.append(items.assign(training=seed))
        return pd.concat(found, ignore_index=True)

    def _preset(self) -> Any:
        wemask = OmegaConf.merge(self.cfg.wemask, {"rate": list(self._table.rates)})
        (preset,) = read_presets(["paper"], wemask, {}, "the table's masks")
        return preset

    def _masked_cells(self, study: Study, layers: Any = "all") -> dict[float | int, WeMask]:
        options = OmegaConf.create(self._preset().options | {"layers": layers})
        masks = [mask for mask in masks_of(options, study.me, study.model) if mask is not None]
        return dict(zip(self._table.rates, masks, strict=True))


def _was_begun(folder: Any) -> bool:
    return bool((folder / "checkpoints" / "training.json").is_file())
