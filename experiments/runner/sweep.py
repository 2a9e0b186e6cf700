"""Merge what the jobs of a sweep (`-m`) left, and note which of them failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

failed_jobs: list[Path] = []
"""Folders of the jobs that failed in this process's sweep: a launcher may run jobs in processes of their own."""


class MergeSweep(Callback):
    """Runs once all jobs of a sweep have ended, on those that it has written: a folder may hold an earlier sweep's."""

    def __init__(self) -> None:
        self._earlier: dict[Path, tuple[int, int]] = {}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._earlier = _written_in(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from experiments.runner.jobs import read_jobs  # Hydra makes this object before it looks at the options
        from experiments.runner.merging import merge_jobs

        folder = Path(config.hydra.sweep.dir)
        jobs = [job for job, version in _written_in(folder).items() if self._earlier.get(job) != version]
        failed_jobs.extend(job.folder for job in read_jobs(folder, jobs) if job.has_failed)
        merge_jobs(folder, jobs)


def _written_in(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return inode and time of each job's result: one written later is another file."""
    results = ((path.parent, path.stat()) for path in folder.glob("*/**/result.json"))
    return {job: (stat.st_ino, stat.st_mtime_ns) for job, stat in results}
