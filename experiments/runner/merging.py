"""What the jobs of a sweep found, together: one table of metrics, the claims of all models, table 8."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from experiments import emergence, training, wemask
from experiments.runner.jobs import Job, read_jobs
from melens import judge
from melens.figures.scores import verdicts
from melens.report.record import write_tables_and_figures
from melens.report.result import Figure, Result
from melens.report.terminal import show_claims, show_findings, show_paths

__all__ = ["merge_jobs"]


def merge_jobs(folder: Path, among: Collection[Path] | None = None) -> None:
    """Write and show the merged results of the jobs in a sweep's folder.

    Args:
        folder: of the sweep.
        among: the folders of its jobs, where others lie there too.
    """
    jobs = read_jobs(folder, among)
    if not jobs:
        return
    sweep = pd.DataFrame([_row(job) for job in jobs])
    for key in jobs[0].swept:  # a column of one kind, as parquet wants it
        if not _are_numbers(sweep[key]):
            sweep[key] = [job.swept_in_words[key] for job in jobs]
    paths = write_tables_and_figures({"sweep": sweep}, {}, folder)
    claims = _merge_claims(jobs)
    merged = [] if claims is None else [claims]
    if any(job.result["experiment"] in ("emergence", "all") for job in jobs):
        merged.append(emergence.merge(jobs))
    grids = wemask.merge(jobs)
    models = Counter(result.model["name"] for result in grids)
    for result in grids:  # several models, or texts: the figures of each under a name
        texts = f"-{result.metrics.texts}x{result.metrics.tokens_per_text}"
        name = result.model["name"] + (texts if models[result.model["name"]] > 1 else "")
        merged.append(result if len(grids) == 1 else _named(result, re.sub(r"[^\w.=-]+", "-", name)))
    trainings = training.merge(jobs)
    if trainings is not None:
        merged.append(trainings)
    console = Console()
    for result in merged:
        plots = {name: figure.plot for name, figure in result.figures.items()}
        paths += write_tables_and_figures(result.tables, plots, folder)
        show_findings(result.experiment, result.findings, console)
        if result.metrics:
            show_claims(result.claims, console)
    show_paths(paths, console)


def _named(result: Result, name: str) -> Result:
    """Put a name to that of every table and figure."""
    tables = {f"{table}-{name}": content for table, content in result.tables.items()}
    figures = {f"{figure}-{name}": content for figure, content in result.figures.items()}
    return replace(result, tables=tables, figures=figures)


def _are_numbers(values: pd.Series) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _row(job: Job) -> dict[str, Any]:
    """Lay the plain metrics of a job out as a row; those of `exp=all` are named `<experiment>.<metric>`."""
    result = job.result
    metrics: dict[str, Any] = {}
    for key, value in result.get("metrics", {}).items():
        if result["experiment"] == "all":
            metrics |= {f"{key}.{name}": of_part for name, of_part in value.items()}
        else:
            metrics[key] = value
    plain = {key: value for key, value in metrics.items() if not isinstance(value, list | dict)}
    shared = {"experiment": result["experiment"], "model": job.model, "status": result["status"]}
    return {"job": job.folder.name, **shared, "error": result.get("error"), **job.swept, **plain}


def _merge_claims(jobs: Sequence[Job]) -> Result | None:
    """Judge the claims of every model, or of every job where several did the same with one model; None without any."""
    ok = [(job, copy.deepcopy(job.result)) for job in jobs if job.is_ok]
    times = Counter((result["model"]["name"], result["experiment"]) for _, result in ok)
    for job, result in ok:
        name = result["model"]["name"]
        if times[name, result["experiment"]] > 1:
            result["model"]["label"] = job.name if job.name.startswith(name) else f"{name}, {job.name}"
    claims = judge(result for _, result in ok)
    if claims.empty:
        return Result("claims", model={}, metrics={}, findings=[("claims", "no job gave a result")])
    claims = claims[~((claims["verdict"] == "not measured") & claims["note"].str.endswith("was not run."))]
    if set(claims["model"]) <= {"all models"}:  # nothing was measured that a claim is about
        return None
    counts = claims.groupby("model", sort=False)["verdict"].value_counts().unstack(fill_value=0)
    findings = [
        (str(model), ", ".join(f"{n} {what}" for what, n in row.items() if n)) for model, row in counts.iterrows()
    ]
    across = claims[claims["model"] == "all models"]
    findings += [(claim["claim"], f"{claim['verdict']}. {claim['note']}") for claim in across.to_dict("records")]
    paper = "The paper makes its claims of every model it looks at."
    figure = Figure(verdicts(claims), "every figure", paper, f"{len(ok)} jobs.")
    return Result(
        "claims", model={}, metrics={}, tables={"claims": claims}, figures={"verdicts": figure}, findings=findings
    )
