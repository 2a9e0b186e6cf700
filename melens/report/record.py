"""What a run writes into its folder: `result.json`, tables as parquet, figures and pages as HTML.

    record = Record(folder, config=config, experiments=["emergence", "sinks"])
    record.add(result)     # as each experiment ends
    record.finish()        # or record.stop(), where it was interrupted

1. `result.partial.json` names the files that are about to be written; its status is "running", or "stopped".
2. Tables and figures are written, each whole or not at all.
3. `result.partial.json` holds what was found, and no longer names the experiment as missing.
4. `result.json` takes its place once everything is there: a folder that has one is complete.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from melens.claims.engine import judge_parts
from melens.environment import versions
from melens.errors import MelensError
from melens.figures.saving import page, save_images
from melens.report.result import COMPLETE, PARTIAL, Result, plain
from melens.storage.cache import RUN_CACHE
from melens.storage.files import atomic_file, explain_write_errors, write_text

__all__ = ["COMPLETE", "PARTIAL", "Record", "read_results", "write_failure", "write_tables_and_figures"]


class Record:
    """Writes what a run finds into its folder, each experiment as it ends.

    What an earlier run left in the folder goes as the first experiment ends: figures of two runs never lie together.

    Attributes:
        folder: of the run.
        experiments, name: those that the run was asked for; the one, or `all` where there are several.
        parts: the results that are written.
        claims: of the parts, as `melens.judge` returns them, judged once as each part ends.
        content: what `result.json`, or `result.partial.json`, holds now.
    """

    def __init__(
        self, folder: str | Path, *, config: dict[str, Any], experiments: Sequence[str], images: str | None = None,
        began: float | None = None,
    ) -> None:  # fmt: skip
        """Prepare to write.

        Args:
            folder: made if need be.
            config: all options.
            experiments: that the run was asked for.
            images: "svg", "pdf" or "png": an image of each figure too.
            began: `time.perf_counter()` when the run began.

        Raises:
            MelensError: a folder with a `result.json` that does not list its files.
        """
        self.folder, self.experiments, self.parts = Path(folder), list(experiments), list[Result]()
        self.name = self.experiments[0] if len(self.experiments) == 1 else "all"
        self.claims, self.content = judge_parts([]), dict[str, Any]()
        self._config, self._images = config, images
        self._began = time.perf_counter() if began is None else began
        self._earlier = _files_of_earlier_run(self.folder)
        self._being_written: list[Result] = []
        self._paths: list[Path] = []
        self._is_finished = False

    @property
    def missing(self) -> list[str]:
        """The experiments that have not ended: their files are not all there."""
        found = {part.experiment for part in self.parts}
        return [name for name in self.experiments if name not in found]

    def add(self, result: Result) -> None:
        """Write the result of an experiment.

        Raises:
            MelensError: the folder cannot be written to.
        """
        with explain_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._being_written = [result]
            self._write_content("running")
            if not self.parts:
                for name in (COMPLETE, *self._earlier):
                    (self.folder / name).unlink(missing_ok=True)
                self._earlier = []
            figures = {name: figure.plot for name, figure in result.figures.items()}
            self._paths += write_tables_and_figures(result.tables, figures, self.folder, images=self._images)
            self._paths += [write_text(self.folder / name, text) for name, text in result.documents.items()]
            self.parts.append(result)
            self.claims = judge_parts(self.parts)
            self._being_written = []
            self._write_content("running")

    def stop(self) -> None:
        """Write that no more will come, unless everything is there."""
        if (self.parts or self._being_written) and not self._is_finished:
            self._write_content("stopped")

    def finish(self) -> list[Path]:
        """Write `result.json`; return the files that a user wants to open.

        Raises:
            MelensError: the folder cannot be written to.
        """
        path = self._write_content("ok")
        self._is_finished = True
        (self.folder / PARTIAL).unlink(missing_ok=True)
        return [*self._paths, path]

    def _write_content(self, status: str) -> Path:
        parts, begun, config = self.parts, [*self.parts, *self._being_written], self._config
        by_experiment = {part.experiment: part.metrics.plain() for part in parts}
        figures = {name: figure for part in parts for name, figure in part.figures.items()}
        model = begun[0].model
        content = {
            "experiment": self.name,
            "status": status,
            "model": {name: value for name, value in model.items() if name != "verified"},
            "verified": model.get("verified"),
            "metrics": by_experiment if len(self.experiments) > 1 else by_experiment.get(self.name, {}),
            "claims": self.claims.drop(columns="model").to_dict("records"),
            "figures": {
                name: {"source": figure.source, "paper": figure.expected, "here": figure.observed}
                for name, figure in figures.items()
            },
            "files": sorted({name for part in begun for name in self._files(part)} | {*self._earlier}),
            "environment": {
                "versions": {"python": platform.python_version()} | versions.installed(),
                "untried": versions.untried(),
                **{name: model.get(name) for name in ("device", "dtype", "quantization")},
                "seed": config.get("seed"),
                "git_commit": versions.git_commit(),
                "duration_s": round(time.perf_counter() - self._began, 2),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            "config": config,
        }
        if status != "ok":
            content |= {"missing": self.missing, "goes_on": RUN_CACHE.can_resume}
        self.content = plain(content)
        return _write_json(self.folder / (COMPLETE if status == "ok" else PARTIAL), self.content)

    def _files(self, result: Result) -> list[str]:
        figures = [f"{name}.html" for name in result.figures]
        figures += [path.name for name in result.figures for path in _images(Path(name), self._images)]
        shared = ["plotly.min.js", "report.html", "claims.md"]
        return [*(f"{name}.parquet" for name in result.tables), *figures, *result.documents, *shared]


def write_failure(message: str, folder: str | Path, *, config: dict[str, Any]) -> None:
    """Write into `result.json` why a job of a sweep gave no result."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"experiment": config["exp"]["name"], "status": "failed", "error": message}
    _write_json(folder / COMPLETE, plain(content | {"files": _files_of_earlier_run(folder), "config": config}))


def write_tables_and_figures(
    tables: Mapping[str, pd.DataFrame], figures: Mapping[str, go.Figure], folder: str | Path, *,
    images: str | None = None,
) -> list[Path]:  # fmt: skip
    """Write tables as parquet and figures as HTML, with one plotly.min.js beside them; return the files.

    Args:
        tables, figures: by name.
        folder: made if need be.
        images: "svg", "pdf" or "png" to write each figure for a paper too, for one column and for two, as `save` does.

    Raises:
        MelensError: the folder cannot be written to.
    """
    folder, paths = Path(folder), []
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if figures:
            write_text(folder / "plotly.min.js", get_plotlyjs())
        for name, table in tables.items():
            paths.append(folder / f"{name}.parquet")
            with atomic_file(paths[-1]) as partial:
                table.to_parquet(partial)
        for name, figure in figures.items():
            paths.append(write_text(folder / f"{name}.html", page(figure, plotlyjs="plotly.min.js")))
        for_paper = [
            (figure, path, columns)
            for name, figure in figures.items()
            for columns, path in enumerate(_images(folder / name, images), 1)
        ]
    return paths + save_images(for_paper)


def _images(path: Path, kind: str | None) -> list[Path]:
    """Return the files of a figure for a paper: `emergence-1col.pdf`, `emergence-2col.pdf`."""
    return [path.with_name(f"{path.name}-{columns}col.{kind}") for columns in (1, 2)] if kind else []


def read_results(folder: str | Path) -> dict[Path, dict[str, Any]]:
    """Read every job's `result.json` below a sweep's folder, however deep (`hydra.sweep.subdir`), in order."""
    paths = sorted(Path(folder).glob(f"*/**/{COMPLETE}"), key=lambda path: (len(path.parent.name), path.parent.name))
    return {path.parent: json.loads(path.read_text("utf-8")) for path in paths}


def _files_of_earlier_run(folder: Path) -> list[str]:
    """Return the files that an earlier run listed in its results as its own; raise where one lists none."""
    files: set[str] = set()
    for path in (folder / COMPLETE, folder / PARTIAL):
        try:
            files |= {Path(name).name for name in json.loads(path.read_text("utf-8"))["files"]}
        except OSError:  # it is not there, or cannot be read, as then nothing can be written either
            continue
        except (ValueError, LookupError, TypeError) as error:
            raise MelensError(
                f"{path} does not list the files that belong to it, so a new run cannot replace them. Choose another "
                f"folder, or move the contents of {folder} away."
            ) from error
    return sorted(files)


def _write_json(path: Path, content: Any) -> Path:
    return write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
