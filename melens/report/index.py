"""One page over all runs below a folder: the models with their ME layers, and which claims hold in which.

    python experiments/run.py exp=index                # outputs/index.html
    melens.report.index.write_index("outputs")         # the same from Python

1. `read_runs` reads every `result.json`, and names each folder that it cannot read with the reason.
2. Of each model the latest run that measured something counts.
3. The page has relative links and needs no other file: a lab can publish the folder as it is.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pandas as pd
from pydantic import AliasPath, BaseModel, ConfigDict, Field, ValidationError

from melens.errors import MelensError
from melens.figures.style import VERDICTS
from melens.report.ledger import claims_by_model
from melens.report.page import render
from melens.report.result import COMPLETE, PARTIAL
from melens.report.terminal import verdicts_in_words
from melens.storage.files import explain_write_errors, write_text

__all__ = ["Index", "Unread", "read_runs", "write_index"]

SIGNS = {"holds": "✔", "holds in part": "◐", "does not hold": "✘", "trivial here": "=", "not measured": "·"}


@dataclass(frozen=True)
class Unread:
    """A folder of a run without a result that can be shown, and why."""

    folder: Path
    why: str


@dataclass(frozen=True)
class Index:
    """A page that was written, how many runs and models it shows, and which folders it could not read."""

    page: Path
    n_runs: int
    n_models: int
    unread: tuple[Unread, ...]


def write_index(folder: str | Path, page: str | Path | None = None) -> Index:
    """Write a page over all runs below a folder.

    Args:
        folder: where runs lie, however deep.
        page: the file to write; by default `index.html` in that folder.

    Raises:
        MelensError: there is no such folder, no run in it, or the page cannot be written.
    """
    folder = Path(folder)
    page = folder / "index.html" if page is None else Path(page)
    if not folder.is_dir():
        raise MelensError(f"There is no folder {folder}. Give the one that your runs are written to.")
    runs, unread = read_runs(folder)
    if not runs and not unread:
        raise MelensError(f"There is no run in {folder}: no folder below it holds a result.json.")
    labels = _labels(runs)
    models = list(dict.fromkeys(labels.values()))
    newest = {label: [run for run in runs if labels[run.folder] == label] for label in models}
    claims = _claims(newest)
    text = render(
        "index.html",
        models=[_model_row(label, own, claims, page) for label, own in newest.items()],
        ledger=claims_by_model(claims.drop(columns="link")).to_dict("records") if len(claims) else [],
        links={(row["model"], row["id"]): _link(row["link"], page) for row in claims.to_dict("records")},
        runs=[_run_row(run, labels[run.folder], page) for run in runs],
        unread=[(os.path.relpath(one.folder, folder), one.why) for one in unread],
        verdicts=VERDICTS, signs=SIGNS, names=models, read=datetime.now().astimezone().strftime("%Y-%m-%d"),
    )  # fmt: skip
    with explain_write_errors(page.parent):
        page.parent.mkdir(parents=True, exist_ok=True)
    return Index(write_text(page, text), len(runs), len(models), tuple(unread))


# --- What a run left --------------------------------------------------------------------------------------------------


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class _Claim(_Read):
    id: str
    claim: str
    source: str = ""
    verdict: Literal["holds", "holds in part", "does not hold", "trivial here", "not measured"]


class _Numbers(_Read):
    """What the index shows of an experiment's metrics; a number that was not measured is not among the fields set."""

    me_layer: int | None = None
    n_layers: int | None = None
    magnification: float | None = None


class Run(_Read):
    """What the index shows of a `result.json`."""

    folder: Path
    experiment: str
    status: Literal["ok", "running", "stopped"]
    model: str = Field(validation_alias=AliasPath("model", "name"))
    path: str | None = Field(None, validation_alias=AliasPath("model", "path"))
    dtype: str | None = Field(None, validation_alias=AliasPath("model", "dtype"))
    quantization: str | None = Field(None, validation_alias=AliasPath("model", "quantization"))
    finished: datetime = Field(validation_alias=AliasPath("environment", "finished"))
    claims: list[_Claim] = []
    files: list[str] = []
    parts: list[_Numbers] = []
    missing: list[str] = []

    @property
    def pages(self) -> list[Path]:
        """The pages of the run that are there, the report first."""
        names = sorted({Path(name).name for name in self.files if name.endswith(".html")} - {"report.html"})
        return [path for name in ("report.html", *names) if (path := self.folder / name).is_file()]

    def first(self, name: str) -> Any:
        """Return a number of the first experiment that measured it."""
        return next((getattr(part, name) for part in self.parts if name in part.model_fields_set), None)

    def measured(self, name: str) -> bool:
        """Whether an experiment looked for that number."""
        return any(name in part.model_fields_set for part in self.parts)


def read_runs(folder: Path) -> tuple[list[Run], list[Unread]]:
    """Read all runs below a folder, the latest first, and those that cannot be read in the order of their folders."""
    runs, unread = list[Run](), list[Unread]()

    def note(error: OSError) -> None:
        unread.append(Unread(Path(error.filename), f"It cannot be opened: {error.strerror}."))

    for place, folders, files in os.walk(folder, onerror=note):
        own = Path(place)
        name = next((name for name in (COMPLETE, PARTIAL) if name in files), None)
        if name is not None:
            found = _read(own / name)
            if isinstance(found, Run):
                runs.append(found)
            else:
                unread.append(found)
        elif ".hydra" in folders:
            unread.append(Unread(own, "It has no result: the run goes on, or ended before its first experiment did."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return sorted(runs, key=lambda run: run.finished.timestamp(), reverse=True), unread


def _read(path: Path) -> Run | Unread:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        return Unread(path.parent, f"{path.name} cannot be read: {error.strerror}.")
    except (ValueError, RecursionError):  # also bytes that are no text
        return Unread(path.parent, f"{path.name} is damaged: it is no JSON.")
    if not isinstance(content, dict):
        return Unread(path.parent, f"{path.name} is no result of melens.")
    if content.get("status") == "failed":
        return Unread(path.parent, f"The run failed: {content.get('error')}")
    metrics = content.get("metrics")
    parts = metrics.values() if content.get("experiment") == "all" and isinstance(metrics, Mapping) else [metrics]
    try:
        return Run.model_validate(content | {"folder": path.parent, "parts": list(parts)})
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        return Unread(
            path.parent, f"{path.name} cannot be used: {place} is missing or wrong. Run the experiment again."
        )


# --- What the page shows ----------------------------------------------------------------------------------------------


def _labels(runs: Sequence[Run]) -> dict[Path, str]:
    """Name each run's model: a local folder by its last part, and with dtype and quantisation where those differ."""
    kinds: dict[str, set[tuple[str | None, str | None]]] = {}
    for run in runs:
        kinds.setdefault(run.path or run.model, set()).add((run.dtype, run.quantization))
    times = Counter(Path(place).name for place in kinds)
    labels = {}
    for run in runs:
        place = run.path or run.model
        last = Path(place).name
        name = last if Path(place).is_absolute() and times[last] == 1 else place
        differing = (run.dtype, run.quantization) if len(kinds[place]) > 1 else ()
        labels[run.folder] = ", ".join(filter(None, (name, *differing)))
    return labels


def _claims(newest: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Return the verdict of each claim on each model: of the latest run that measured it."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for label, runs in newest.items():
        for run in runs:
            for claim in run.claims:
                before = rows.get((label, claim.id))
                if before is None or (before["verdict"] == "not measured" and claim.verdict != "not measured"):
                    report = run.folder / "report.html"
                    link = report if report in run.pages else None
                    rows[label, claim.id] = {"model": label, **claim.model_dump(), "link": link}
    longest = max((run for runs in newest.values() for run in runs), key=lambda run: len(run.claims), default=None)
    of_paper = {} if longest is None else {claim.id: place for place, claim in enumerate(longest.claims)}
    in_order = sorted(rows.values(), key=lambda row: of_paper.get(row["id"], len(of_paper)))
    return pd.DataFrame(in_order, columns=["model", "id", "claim", "source", "verdict", "link"])


def _model_row(label: str, runs: Sequence[Run], claims: pd.DataFrame, page: Path) -> dict[str, Any]:
    own = claims.loc[claims["model"] == label, "verdict"]
    born = next((run for run in runs if run.measured("magnification")), None)
    born = born or next((run for run in runs if run.measured("me_layer")), runs[0])
    report = next((run for run in runs if run.folder / "report.html" in run.pages), born)
    return {
        "label": label,
        "me_layer": born.first("me_layer"),
        "n_layers": born.first("n_layers"),
        "looked": born.measured("me_layer"),
        "magnification": born.first("magnification"),
        "verdicts": own.value_counts().to_dict(),
        "date": _date(runs[0]),
        "link": _link(report.pages[0], page) if report.pages else None,
    }


def _run_row(run: Run, label: str, page: Path) -> dict[str, Any]:
    return {
        "label": label,
        "experiment": run.experiment,
        "date": _date(run),
        "status": {"ok": "", "running": "not finished", "stopped": "stopped"}[run.status],
        "missing": run.missing,
        "verdicts": verdicts_in_words(claim.verdict for claim in run.claims),
        "pages": [(path.stem, _link(path, page)) for path in run.pages],
    }


def _date(run: Run) -> str:
    return run.finished.strftime("%Y-%m-%d %H:%M")


def _link(path: Path | None, page: Path) -> str | None:
    """Return a link from the page to a file, relative, so that both can be moved together."""
    return None if path is None else quote(Path(os.path.relpath(path, page.parent)).as_posix())
