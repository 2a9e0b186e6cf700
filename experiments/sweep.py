"""Merge what the jobs of a sweep (`-m`) left into one table and its figures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from melens.results import read_results, write_tables_and_figures


class MergeSweep(Callback):
    """Runs once all jobs of a sweep have ended: writes `sweep.parquet` and what the experiment merges of its own."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        jobs = read_results(folder)
        if not jobs:
            return
        tables = {"sweep": pd.DataFrame([_row(job, result) for job, result in jobs.items()])}
        figures: dict[str, Any] = {}
        for name in dict.fromkeys(result["experiment"] for result in jobs.values()):
            experiment = importlib.import_module(f"experiments.{name}")
            of_experiment = {job: result for job, result in jobs.items() if result["experiment"] == name}
            if hasattr(experiment, "merge"):
                merged_tables, merged_figures = experiment.merge(of_experiment)
                tables |= merged_tables
                figures |= merged_figures
        paths = write_tables_and_figures(tables, figures, folder)
        console = Console()
        for name, table in tables.items():
            if name != "sweep":
                console.print(_as_rich(name, table))
        console.print(f"Merged {len(jobs)} jobs into", *(str(path) for path in paths), sep="\n  ")


def _row(job: Path, result: dict[str, Any]) -> dict[str, Any]:
    metrics = {key: value for key, value in result.get("metrics", {}).items() if not isinstance(value, list | dict)}
    model = result["config"]["model"]["name"]
    return {"job": job.name, "experiment": result["experiment"], "model": model, "status": result["status"]} | metrics


def _as_rich(name: str, table: pd.DataFrame) -> Table:
    shown = table.drop(columns=[column for column in table if table[column].isna().all()])
    rich = Table(*map(str, shown.columns), title=name)
    for row in shown.itertuples(index=False):
        rich.add_row(*("" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    return rich
