"""Merge what the jobs of a sweep (`-m`) left into one table and its figures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from melens.results import read_results, show_result, write_tables_and_figures


class MergeSweep(Callback):
    """Runs once all jobs of a sweep have ended: writes `sweep.parquet` and what each experiment merges of its own."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        jobs = read_results(folder)
        if not jobs:
            return
        sweep = pd.DataFrame([_row(job, result) for job, result in jobs.items()])
        write_tables_and_figures({"sweep": sweep}, {}, folder)
        for name in dict.fromkeys(result["experiment"] for result in jobs.values()):
            experiment = importlib.import_module(f"experiments.{name}")
            merged = experiment.merge({job: result for job, result in jobs.items() if result["experiment"] == name})
            paths = write_tables_and_figures(merged.tables, merged.figures, folder)
            show_result(merged, [folder / "sweep.parquet", *paths], Console())


def _row(job: Path, result: dict[str, Any]) -> dict[str, Any]:
    metrics = {key: value for key, value in result.get("metrics", {}).items() if not isinstance(value, list | dict)}
    model = result["config"]["model"]["name"]
    return {"job": job.name, "experiment": result["experiment"], "model": model, "status": result["status"]} | metrics
