"""The jobs of a sweep as they ended, each named after the options that differ between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.options.reading import value_at
from melens.report.record import read_results
from melens.validation import types as allowed

__all__ = ["Job", "job_name", "jobs_of", "read_jobs"]

_OWN_COLUMN = ("model", "model.name", "exp")
"""Swept options that have a column of their own in every merged table: the model's name, the experiment's."""


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    Attributes:
        folder: where it wrote.
        result: its `result.json`.
        swept: the options that the user gave, in which the jobs differ, beside model and experiment.
        name: its model, if the jobs have several, and those options; the job's number where that is nothing.
    """

    folder: Path
    result: dict[str, Any]
    swept: dict[str, Any]
    name: str

    @property
    def model(self) -> str:
        return str(self.result["config"]["model"]["name"])

    @property
    def swept_in_words(self) -> dict[str, str]:
        """What differs, as it is typed."""
        return {key: _plain(value) for key, value in self.swept.items()}

    @property
    def is_ok(self) -> bool:
        return bool(self.result["status"] == "ok")

    @property
    def has_failed(self) -> bool:
        """Whether it, or one experiment of several, ended with an error."""
        parts = self.result.get("metrics", {}).values()
        return not self.is_ok or any(isinstance(part, dict) and part.get("failed") is True for part in parts)

    def named_by(self, keys: Sequence[str]) -> str:
        """Name the model with some of the swept options."""
        return job_name(self.model, {key: value for key, value in self.swept.items() if key in keys})


def read_jobs(folder: Path, among: Collection[Path] | None = None) -> list[Job]:
    """Read the jobs of a sweep's folder, all or those among some, the failed ones with them, in order."""
    results = read_results(folder)
    return jobs_of({job: result for job, result in results.items() if among is None or job in among})


def jobs_of(results: Mapping[Path, dict[str, Any]]) -> list[Job]:
    """Tell results by folder from each other by what the user swept."""
    keys = dict.fromkeys(key for result in results.values() for key in result["config"].get("typed", ()))
    values = {key: [_value(result["config"], key) for result in results.values()] for key in keys}
    differing = [key for key in keys if key not in _OWN_COLUMN and len(set(map(repr, values[key]))) > 1]
    models = Counter(result["config"]["model"]["name"] for result in results.values())
    jobs = []
    for number, (folder, result) in enumerate(results.items()):
        swept = {key: values[key][number] for key in differing}
        model = result["config"]["model"]["name"] if len(models) > 1 else ""
        jobs.append(Job(folder, result, swept, job_name(model, swept) or f"job {folder.name}"))
    times = Counter(job.name for job in jobs)  # the same command twice, or two experiments, have one name
    return [job if times[job.name] == 1 else replace(job, name=f"{job.name} (job {job.folder.name})") for job in jobs]


def job_name(model: str, swept: Mapping[str, Any]) -> str:
    """Name a model with options: "qwen3-4b, model.dtype=float32"."""
    return ", ".join(filter(None, [model, *(f"{key}={_plain(value)}" for key, value in swept.items())]))


def _value(config: Mapping[str, Any], key: str) -> Any:
    """Return what an option is in a job, also where only other jobs had it typed; of a config group what was chosen."""
    groups = {} if "." in key else config.get("given", {})
    return groups[key] if key in groups else value_at(config, key)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else allowed.in_words(value).replace("'", "")
