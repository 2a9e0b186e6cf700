"""A run that is refused leaves nothing behind.

Hydra writes its configuration and its log, and melens its lock, before a job can look at its options and its model.
`note_folder` remembers what was there before; `nothing_left_if_refused` takes away what came since.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from melens.errors import MelensError

__all__ = ["note_folder", "nothing_left_if_refused"]

_WRITTEN_FIRST = (".hydra", ".melens.lock", "run.log")
"""By Hydra as conf/config.yaml has it, and by melens's lock: nothing else in the folder is touched."""


@dataclass(frozen=True)
class _Before:
    """What a run found: names in its folder, and the folders up to it that were not there, the deepest first."""

    names: frozenset[str]
    missing: tuple[Path, ...]


_before: dict[Path, _Before] = {}


def note_folder(folder: Path) -> None:
    """Remember what is in the folder of a run before anything is written there."""
    folder = folder.resolve()
    names = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
    missing = tuple(place for place in (folder, *folder.parents) if not place.exists())
    _before[folder] = _Before(names, missing)


@contextmanager
def nothing_left_if_refused(folder: Path) -> Iterator[None]:
    """Where a `MelensError` is raised within, take away what this run has written first, and pass the error on.

    A folder that was not noted, as that of a sweep's job, stays as it is.
    """
    try:
        yield
    except MelensError:
        if (before := _before.get(folder.resolve())) is not None:
            _clear(folder.resolve(), before)
        raise


def _clear(folder: Path, before: _Before) -> None:
    for name in set(_WRITTEN_FIRST) - before.names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # some systems do not let go of a file that is open
                path.unlink()
    with suppress(OSError):  # something else lies in it, as another run's folder of the same day
        for place in before.missing:
            place.rmdir()
