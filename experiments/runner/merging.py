"""What the jobs of a sweep found, together: one table of metrics, the claims of all models, table 8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from experiments.runner.jobs import Job, read_jobs
from experiments.runner.registry import EXPERIMENTS
from melens import judge
from melens.report.record import write_tables_and_figures
from melens.report.result import Result
from melens.report.terminal import show_claims, show_findings, show_paths
from melens.report.verdicts import of_what_was_run, verdicts

__all__ = ["merge_jobs"]


def merge_jobs(folder: Path, among: Collection[Path] | None = None) -> None:
    """Write and show the merged results of the jobs in a sweep's folder, or of those whose folders `among` has."""
    jobs = read_jobs(folder, among)
    if not jobs:
        return
    sweep = pd.DataFrame([_row(job) for job in jobs])
    for key in jobs[0].swept:  # a column of one kind, as parquet wants it
        if not all(type(value) in (int, float) for value in sweep[key].tolist()):
            sweep[key] = [job.swept_in_words[key] for job in jobs]
    paths = write_tables_and_figures({"sweep": sweep}, {}, folder)
    config = jobs[0].result.get("config", {})
    images, verbose = config.get("figures"), bool(config.get("verbose"))
    merges = dict.fromkeys(experiment.merge for experiment in EXPERIMENTS.values() if experiment.merge is not None)
    console = Console()
    for result in (*(result for merge in merges for result in merge(jobs)), *_merge_claims(jobs)):
        plots = {name: figure.plot for name, figure in result.figures.items()}
        paths += write_tables_and_figures(result.tables, plots, folder, images=images)
        show_findings(f"{len(jobs)} runs: {result.experiment}", result.findings, console, verbose=verbose)
        if result.model:
            show_claims(result.claims, console, verbose=verbose)
    _show_failures(jobs, console)
    show_paths(paths, console, verbose=verbose)


def _show_failures(jobs: Sequence[Job], console: Console) -> None:
    """Say which jobs failed and why; of one that ran several experiments, which of these."""
    failed = [job for job in jobs if job.has_failed]
    if failed:
        console.print(f"{len(failed)} of {len(jobs)} jobs failed:", highlight=False)
    for job in failed:
        parts = job.result.get("metrics", {}).items()
        broken = [f"exp={name} failed" for name, own in parts if isinstance(own, dict) and own.get("failed")]
        why = job.result.get("error") or ", ".join(broken)
        console.print(f"  {job.name}: {why}", markup=False, highlight=False)


def _row(job: Job) -> dict[str, Any]:
    """Lay the plain metrics of a job out as a row; those of `exp=all` are named `<experiment>.<metric>`."""
    result, metrics = job.result, job.result.get("metrics", {})
    if result["experiment"] == "all":
        metrics = {f"{part}.{name}": value for part, own in metrics.items() for name, value in own.items()}
    plain = {key: value for key, value in metrics.items() if not isinstance(value, list | dict)}
    shared = {"experiment": result["experiment"], "model": job.model, "status": result["status"]}
    return {"job": job.folder.name, **shared, "error": result.get("error"), **job.swept, **plain}


def _merge_claims(jobs: Sequence[Job]) -> list[Result]:
    """Judge the claims of every model, or of every job where several did the same with one model."""
    ok = [job for job in jobs if job.is_ok]
    times = Counter((job.result["model"]["name"], job.result["experiment"]) for job in ok)
    results = []
    for job in ok:
        model, name = job.result["model"], job.result["model"]["name"]
        if times[name, job.result["experiment"]] > 1:
            model = model | {"label": job.name if job.name.startswith(name) else f"{name}, {job.name}"}
        results.append(job.result | {"model": model})
    claims = judge(results)
    return [] if of_what_was_run(claims).empty else [verdicts(claims)]
