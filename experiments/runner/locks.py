"""Locks on folders: two runs that wrote to one at once would mix their files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.runner.refusals import note_folder
from melens.errors import MelensError

__all__ = ["LockFolder", "lock_folder", "locked_folder", "locked_job_folder"]

_LOCK = ".melens.lock"
"""In the folder of a run: held for as long as its process lives, and given back by the system when that is killed."""

_taken: dict[Path, FileLock] = {}
"""The folders that this process has, or has had."""


def lock_folder(folder: Path) -> None:
    """Take a folder for this process, until it ends or gives it back; a second time does nothing.

    Raises:
        MelensError: another process has it.
        OSError: there is no such folder, and none can be made.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _taken.setdefault(folder, FileLock(folder / _LOCK))
    try:
        if not lock.is_locked:
            lock.acquire(timeout=0)
    except Timeout:
        raise MelensError(
            f"Another run is writing to {folder}. Wait until it has ended, or choose another folder: "
            "hydra.run.dir=..., for a sweep hydra.sweep.dir=..."
        ) from None
    except NotImplementedError:  # by a file system that has no locks
        pass


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Do what `lock_folder` does for as long as the context lasts; a folder that this process had before it keeps."""
    lock = _taken.get(folder.resolve())
    had_it_before = lock is not None and lock.is_locked
    lock_folder(folder)
    try:
        yield
    finally:
        if not had_it_before:
            _taken[folder.resolve()].release()


@contextmanager
def locked_job_folder(folder: Path) -> Iterator[None]:
    """Do the same with the folder of a job; in a sweep, one in which another job has written is taken."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN and folder.resolve() in _taken:
        raise MelensError(
            f"Another job of this sweep has written to {folder}. Give each job a folder of its own: "
            "hydra.sweep.subdir=${hydra.job.num}."
        )
    with locked_folder(folder):
        yield


class LockFolder(Callback):
    """Takes the folder of a run or a sweep before Hydra writes to it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with suppress(OSError):  # no place that can be read: what writes there says so
            note_folder(Path(config.hydra.run.dir))
        _lock_or_exit(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _lock_or_exit(Path(config.hydra.sweep.dir))


def _lock_or_exit(folder: Path) -> None:
    try:
        lock_folder(folder)
    except MelensError as error:  # Hydra goes on after an error in a callback
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError:  # no such place: what writes there says so
        pass
