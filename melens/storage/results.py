"""Results in the cache, which a run that was stopped finds again: a folder each, whole or not there.

They are plain files, since others may share a cache, and unpickling theirs could run code: parquet for tables,
plotly's JSON for figures, JSON for the rest, with NaN as null as in `result.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import pandas as pd
import plotly.io

from melens.report.result import Figure, Metrics, Result, plain
from melens.storage.files import atomic_folder

__all__ = ["load_cached", "load_result", "save_result"]

_Cached = TypeVar("_Cached")
_REST = "result.json"


def save_result(result: Result, folder: Path) -> None:
    """Write a result into a folder, whole or not at all; where there is one, that one stays.

    Raises:
        OSError: the folder cannot be written to.
    """
    rest = {
        "experiment": result.experiment,
        "model": result.model,
        "metrics": result.metrics.plain(),
        "metrics_class": [type(result.metrics).__module__, type(result.metrics).__qualname__],
        "tables": list(result.tables),
        "figures": {name: [figure.source, figure.expected, figure.observed] for name, figure in result.figures.items()},
        "findings": [list(row) for row in result.findings],
        "documents": result.documents,
    }
    with atomic_folder(folder, replace=False) as partial:
        for name, table in result.tables.items():
            table.to_parquet(partial / f"{name}.parquet")
        for name, figure in result.figures.items():
            (partial / f"{name}.figure.json").write_text(figure.plot.to_json(), "utf-8")
        (partial / _REST).write_text(json.dumps(plain(rest), allow_nan=False), "utf-8")


def load_result(folder: Path) -> Result:
    """Read what `save_result` wrote."""
    rest = json.loads((folder / _REST).read_text("utf-8"))
    module, kind = rest["metrics_class"]
    if not module.startswith("melens."):  # a file may name any class
        raise ValueError(f"{module}.{kind} is no class of metrics.")
    metrics: Metrics = getattr(import_module(module), kind).model_validate(rest["metrics"])
    plots = {name: plotly.io.from_json((folder / f"{name}.figure.json").read_text("utf-8")) for name in rest["figures"]}
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in rest["tables"]}
    figures = {name: Figure(plots[name], *texts) for name, texts in rest["figures"].items()}
    findings = [tuple(row) for row in rest["findings"]]
    return Result(rest["experiment"], rest["model"], metrics, tables, figures, findings, rest["documents"])


def load_cached(folder: Path, load: Callable[[Path], _Cached]) -> _Cached | None:
    """Read a folder of the cache; None where there is none, or a damaged one, which is removed."""
    if not folder.is_dir():
        return None
    try:
        return load(folder)
    except Exception:  # whichever the readers have for what they cannot read
        shutil.rmtree(folder, ignore_errors=True)
        return None
