"""What a run leaves: `result.json`, tidy tables as parquet, figures as HTML; each file whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from melens.analysis.statistics import with_interval
from melens.claims.engine import judge_parts
from melens.environment import versions
from melens.errors import MelensError
from melens.report.result import Result, combine, plain, plain_metrics
from melens.storage.cache import RUN_CACHE
from melens.storage.files import atomic_file

__all__ = [
    "PARTIAL",
    "WHOLE",
    "Record",
    "claims_of",
    "number_with_interval",
    "read_results",
    "show_result",
    "write_failure",
    "write_result",
    "write_tables_and_figures",
    "write_text",
]


WHOLE, PARTIAL = "result.json", "result.partial.json"


class Record:
    """Writes what a run finds into its folder, each experiment as it ends.

    1. `result.partial.json` names the files, of which some are there; its status is "running", or "stopped".
    2. Tables and figures are written, each whole or not at all.
    3. `result.partial.json` holds what was found, and no longer names the experiment as missing.
    4. `result.json` takes its place once everything is there: a folder that has one is complete.

    What an earlier run left in the folder goes as the first experiment ends: figures of two runs never lie together.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        config: dict[str, Any],
        experiments: Sequence[str],
        png: bool = False,
        began: float | None = None,
    ) -> None:
        """Prepare to write.

        Args:
            folder: made if need be.
            config: all options.
            experiments: that the run was asked for.
            png: static images too.
            began: `time.perf_counter()` when the run began.

        Raises:
            MelensError: a folder with a `result.json` that does not tell which files belong to it.
        """
        self.folder, self.experiments, self.parts = Path(folder), list(experiments), list[Result]()
        self._config, self._png = config, png
        self._began = time.perf_counter() if began is None else began
        self._earlier = [*_noted_files(self.folder / WHOLE), *_noted_files(self.folder / PARTIAL)]
        self._being_written: list[Result] = []
        self._paths: list[Path] = []
        self._is_finished = False

    @property
    def whole(self) -> Result:
        """All that was found and written so far."""
        if not self.parts:
            name = self.experiments[0] if len(self.experiments) == 1 else "all"
            return Result(name, self._being_written[0].model, {})
        return self.parts[0] if len(self.experiments) == 1 else combine(self.parts)

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
        is_first = not self.parts
        self._being_written = [result]
        with _told_in_a_sentence(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._note("running")
            if is_first:
                (self.folder / WHOLE).unlink(missing_ok=True)
                for name in self._earlier:
                    (self.folder / name).unlink(missing_ok=True)
                self._earlier = []
            figures = {name: picture.plot for name, picture in result.figures.items()}
            self._paths += write_tables_and_figures(result.tables, figures, self.folder, png=self._png)
            self._paths += [write_text(self.folder / name, text) for name, text in result.documents.items()]
            self.parts.append(result)
            self._being_written = []
            self._note("running")

    def stop(self) -> None:
        """Note that no more will come, unless all is there."""
        if (self.parts or self._being_written) and not self._is_finished:
            with _told_in_a_sentence(self.folder):
                self._note("stopped")

    def finish(self) -> list[Path]:
        """Write `result.json`; return the files that a user wants to open.

        Raises:
            MelensError: the folder cannot be written to.
        """
        with _told_in_a_sentence(self.folder):
            path = _write(self.folder / WHOLE, _json_writer(self.content("ok")))
            self._is_finished = True
            (self.folder / PARTIAL).unlink(missing_ok=True)
        return [*self._paths, path]

    def content(self, status: str) -> dict[str, Any]:
        """Lay out what `result.json` holds."""
        result = self.whole
        shared = {
            "experiment": result.experiment,
            "status": status,
            "model": {name: value for name, value in result.model.items() if name != "verified"},
            "verified": result.model.get("verified"),
            "metrics": plain_metrics(result.metrics),
            "claims": claims_of(result).drop(columns="model").to_dict("records"),
            "figures": {
                name: {"source": picture.source, "paper": picture.expected, "here": picture.observed}
                for name, picture in result.figures.items()
            },
            "files": sorted({name for part in [*self.parts, *self._being_written] for name in self._files(part)}),
            "environment": _environment(result.model, self._config, time.perf_counter() - self._began),
            "config": self._config,
        }
        return shared if status == "ok" else shared | {"missing": self.missing, "goes_on": RUN_CACHE.can_resume}

    def _note(self, status: str) -> None:
        content = self.content(status)
        content["files"] = sorted({*content["files"], *self._earlier})
        _write(self.folder / PARTIAL, _json_writer(content))

    def _files(self, result: Result) -> list[str]:
        figures = [f"{name}.{kind}" for name in result.figures for kind in ("html", *["png"] * self._png)]
        shared = ["plotly.min.js", "report.html"]
        return [*(f"{name}.parquet" for name in result.tables), *figures, *result.documents, *shared]


def _noted_files(path: Path) -> list[str]:
    """Return the files that an earlier run noted in its result as its own; none where there is no result.

    Raises:
        MelensError: a result that notes none.
    """
    try:
        return [Path(name).name for name in json.loads(path.read_text("utf-8"))["files"]]
    except OSError:  # it is not there, or cannot be read, as then nothing can be written either
        return []
    except (ValueError, LookupError, TypeError) as error:
        raise MelensError(
            f"{path} does not tell which files belong to it, as one of an earlier melens does not: give another "
            f"folder, or move what is in {path.parent}."
        ) from error


def write_result(
    result: Result, folder: str | Path, *, config: dict[str, Any], duration: float, png: bool = False
) -> list[Path]:
    """Write a result into a folder; `result.json` comes last, so that a folder that has one is complete.

    Returns:
        The files that a user wants to open.

    Raises:
        MelensError: the folder cannot be written to, or as `Record`.
    """
    began = time.perf_counter() - duration
    record = Record(folder, config=config, experiments=[result.experiment], png=png, began=began)
    record.add(result)
    return record.finish()


def claims_of(result: Result) -> pd.DataFrame:
    """Judge the claims that a result measures, in the columns of `melens.judge`."""
    return judge_parts([result])


def write_tables_and_figures(
    tables: dict[str, pd.DataFrame], figures: dict[str, go.Figure], folder: str | Path, *, png: bool = False
) -> list[Path]:
    """Write tables as parquet and figures as HTML, with one plotly.min.js beside them; return the files.

    Args:
        tables, figures: by name.
        folder: made if need be.
        png: write each figure as a static image too, which takes the extra `png` (kaleido) and a Chrome or Chromium.
    """
    folder = Path(folder)
    with _told_in_a_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if figures:
            _write(folder / "plotly.min.js", lambda path: path.write_text(get_plotlyjs(), "utf-8"))
        paths = [_write(folder / f"{name}.parquet", table.to_parquet) for name, table in tables.items()]
        for name, figure in figures.items():
            paths.append(_write(folder / f"{name}.html", _html_writer(figure)))
            if png:
                paths.append(_write(folder / f"{name}.png", _png_writer(figure)))
        return paths


def _png_writer(figure: go.Figure) -> Callable[[Path], object]:
    still = go.Figure(figure)
    still.layout.updatemenus = still.layout.sliders = ()
    return lambda path: path.write_bytes(still.to_image("png", width=1100, height=figure.layout.height or 700, scale=2))


@contextmanager
def _told_in_a_sentence(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MelensError(f"The results cannot be written to {folder} ({error.strerror or error}).") from error


def write_failure(message: str, folder: str | Path, *, config: dict[str, Any]) -> None:
    """Record in `result.json` why a job of a sweep gave no result."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"experiment": config["exp"]["name"], "status": "failed", "error": message}
    content["files"] = sorted({*_noted_files(folder / WHOLE), *_noted_files(folder / PARTIAL)})
    _write(folder / WHOLE, _json_writer(content | {"config": config}))


_COLORS = {
    "holds": "green",
    "holds in part": "cyan",
    "does not hold": "red",
    "trivial here": "yellow",
    "not measured": "yellow",
}


def show_result(result: Result, paths: list[Path], console: Console) -> None:
    """Print a short table of the findings, the verdicts and the paths."""
    side_by_side = any(len(row) > 2 for row in result.findings)
    findings = Table(show_header=False, show_lines=side_by_side, title=result.experiment)
    for row in result.findings:
        findings.add_row(*map(Text, row))  # as it is: brackets in it are no markup
    console.print(findings)
    if result.metrics:
        _show_claims(claims_of(result), console)
    if paths:
        written = (os.path.relpath(path) for path in paths)
        console.print("Written:", *written, sep="\n  ", markup=False, highlight=False, soft_wrap=True)


def _show_claims(claims: pd.DataFrame, console: Console) -> None:
    if claims.empty:
        return
    table = Table("verdict", "claim", "value", title="The paper's claims on this model")
    for claim in claims.to_dict("records"):
        verdict = f"[{_COLORS[claim['verdict']]}]{claim['verdict']}[/]"
        measured = f"{claim['statistic']}: {claim['criterion']}. {claim['note']}".strip()
        what = f"{claim['claim']} ({claim['source']})\n[dim]{escape(measured)}[/]"
        table.add_row(verdict, what, number_with_interval(claim))
    console.print(table)


def number_with_interval(claim: Mapping[Hashable, Any]) -> str:
    """Format a claim's value with its interval, as far as it has them."""
    if pd.isna(claim["value"]):
        return "-"
    return with_interval(claim["value"], None if pd.isna(claim["low"]) else (claim["low"], claim["high"]))


def read_results(folder: str | Path) -> dict[Path, dict[str, Any]]:
    """Read every job's `result.json` below a sweep's folder, however deep (`hydra.sweep.subdir`), in order."""
    paths = sorted(Path(folder).glob(f"*/**/{WHOLE}"), key=lambda path: (len(path.parent.name), path.parent.name))
    return {path.parent: json.loads(path.read_text("utf-8")) for path in paths}


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all; a `MelensError` if its folder cannot be written to."""
    with _told_in_a_sentence(path.parent):
        return _write(path, lambda partial: partial.write_text(text, "utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> Path:
    with atomic_file(path) as partial:
        write(partial)
    return path


def _html_writer(figure: go.Figure) -> Callable[[Path], object]:
    return lambda path: figure.write_html(path, include_plotlyjs="plotly.min.js", config={"displaylogo": False})


def _json_writer(content: dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", "utf-8")


def _environment(model: dict[str, Any], config: dict[str, Any], duration: float) -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version()} | versions.installed(),
        "untried": versions.untried(),
        "device": model.get("device"),
        "dtype": model.get("dtype"),
        "quantization": model.get("quantization"),
        "seed": config.get("seed"),
        "git_commit": _git_commit(),
        "duration_s": round(duration, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def _git_commit() -> str | None:
    """Return the commit of the source that ran, marked where it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
