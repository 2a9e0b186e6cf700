"""What the jobs of a sweep found, together: one table of metrics, the claims of all models, table 8."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from experiments import emergence, mask_grid, training_report
from melens import figures, judge
from melens.results import Picture, Result, read_results, show_result, write_tables_and_figures

__all__ = ["merge_jobs"]

Jobs = dict[Path, dict[str, Any]]


def merge_jobs(folder: Path) -> None:
    """Write and show the merged results of the jobs in a sweep's folder."""
    jobs = read_results(folder)
    if not jobs:
        return
    varied = _varied(jobs)
    sweep = pd.DataFrame([_row(job, result, varied[job]) for job, result in jobs.items()])
    paths = write_tables_and_figures({"sweep": sweep}, {}, folder)
    claims = _merge_claims(jobs)
    merged = [] if claims is None else [claims]
    if any(result["experiment"] in ("emergence", "all") for result in jobs.values()):
        merged.append(emergence.merge(jobs))
    grids = mask_grid.merge(jobs)
    models = Counter(result.model["name"] for result in grids)
    for result in grids:  # several models, or texts: the figures of each under a name
        texts = f"-{result.metrics['texts']}x{result.metrics['tokens_per_text']}"
        name = result.model["name"] + (texts if models[result.model["name"]] > 1 else "")
        merged.append(result if len(grids) == 1 else _named(result, name.replace("/", "-")))
    trainings = training_report.merge(jobs, _names(jobs, varied))
    if trainings is not None:
        merged.append(trainings)
    for number, result in enumerate(merged, 1):
        plots = {name: picture.figure for name, picture in result.pictures.items()}
        paths += write_tables_and_figures(result.tables, plots, folder)
        show_result(result, paths if number == len(merged) else [], Console())


def _names(jobs: Jobs, varied: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """Name each job by what tells it from the others."""
    models = {job: result["config"]["model"]["name"] for job, result in jobs.items()}
    names = {}
    for job, own in varied.items():
        told = [models[job]] if len(set(models.values())) > 1 else []
        names[job] = ", ".join([*told, *(f"{key}={value}" for key, value in own.items())]) or f"job {job.name}"
    return names


def _named(result: Result, name: str) -> Result:
    """Put a name to that of every table and figure."""
    tables = {f"{table}-{name}": content for table, content in result.tables.items()}
    pictures = {f"{picture}-{name}": content for picture, content in result.pictures.items()}
    return replace(result, tables=tables, pictures=pictures)


def _varied(jobs: Jobs) -> dict[Path, dict[str, Any]]:
    """Return the options by which the jobs differ, as `wemask.rate`, beside model and experiment."""
    options = pd.DataFrame([dict(_flat(result["config"])) for result in jobs.values()], index=list(jobs), dtype=object)
    differing = [key for key in options if options[key].nunique(dropna=False) > 1]
    options = options[[key for key in differing if not str(key).startswith(("model.", "exp."))]]
    rows = options.apply(lambda column: column if _are_numbers(column) else column.map(str)).to_dict("records")
    return {job: {str(key): value for key, value in row.items()} for job, row in zip(jobs, rows, strict=True)}


def _are_numbers(values: pd.Series) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if isinstance(value, list) else value


def _row(job: Path, result: dict[str, Any], varied: dict[str, Any]) -> dict[str, Any]:
    """Lay the plain metrics of a job out as a row; those of `exp=all` are named `<experiment>.<metric>`."""
    metrics: dict[str, Any] = {}
    for key, value in result.get("metrics", {}).items():
        if result["experiment"] == "all":
            metrics |= {f"{key}.{name}": of_part for name, of_part in value.items()}
        else:
            metrics[key] = value
    plain = {key: value for key, value in metrics.items() if not isinstance(value, list | dict)}
    told = {"experiment": result["experiment"], "model": result["config"]["model"]["name"], "status": result["status"]}
    return {"job": job.name, **told, "error": result.get("error"), **varied, **plain}


def _merge_claims(jobs: Jobs) -> Result | None:
    """Judge the claims of every model, or of every job where several did the same with one model; None without any."""
    ok = {job: copy.deepcopy(result) for job, result in jobs.items() if result["status"] == "ok"}
    times = Counter((result["model"]["name"], result["experiment"]) for result in ok.values())
    for job, result in ok.items():
        if times[result["model"]["name"], result["experiment"]] > 1:
            result["model"]["label"] = f"{result['model']['name']} (job {job.name})"
    claims = judge(ok.values())
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
    picture = Picture(figures.verdicts(claims), "every figure", paper, f"{len(ok)} jobs.")
    return Result(
        "claims", model={}, metrics={}, tables={"claims": claims}, pictures={"verdicts": picture}, findings=findings
    )
