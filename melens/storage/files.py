"""Files and folders that are whole or not there: written beside their place under another name, then renamed.

An error or an interrupt removes what was written so far. What a killed process left behind goes when something is next
written beside it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors import SafetensorError

from melens.errors import MelensError

__all__ = ["atomic_file", "atomic_folder", "explain_write_errors", "write_text"]

_PARTIAL = re.compile(r"\..+\.(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}\.partial")
_A_DAY = 24 * 3600.0


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Lend a name to write a file under; at the end it takes the file's place.

    Raises:
        OSError: it cannot be written, as on a full or read-only disk, or its folder does not exist.
    """
    _remove_leftovers(path.parent)
    partial = _beside(path)
    try:
        yield partial
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """Lend an empty folder to write in; at the end it takes the place of another.

    Args:
        folder: to make; those above it are made too.
        replace: also where there is one with files in it, which is then removed. Else that one stays, and nobody who
            reads it is disturbed.

    Raises:
        OSError: as `atomic_file`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    partial, before = _beside(folder), _beside(folder)
    partial.mkdir()
    try:
        yield partial
        if replace and folder.exists():
            folder.rename(before)
        try:
            partial.rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            if replace or not folder.is_dir():
                raise
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def write_text(path: Path, text: str) -> Path:
    """Write a text file, whole or not at all; return its path.

    Raises:
        MelensError: its folder cannot be written to.
    """
    with explain_write_errors(path.parent), atomic_file(path) as partial:
        partial.write_text(text, "utf-8")
    return path


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says of a folder that it cannot write to into a `MelensError`."""
    try:
        yield
    except OSError as error:
        raise MelensError(f"Cannot write to {folder}: {error.strerror or error}.") from error


def _beside(path: Path) -> Path:
    """Name a new file beside a path, after the host and the process that write it."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes that have ended left in a folder."""
    for path in [path for path in folder.iterdir() if path.name.endswith(".partial")]:
        with suppress(OSError):  # another process was faster, or this one may not
            named = _PARTIAL.fullmatch(path.name)
            if named is not None and _has_ended(named["host"], int(named["pid"]), path.stat().st_mtime):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _has_ended(host: str, pid: int, last_written: float) -> bool:
    """Tell whether a process has ended; of one on another machine, by a day without a word from it."""
    if host != platform.node():
        return time.time() - last_written > _A_DAY
    try:
        return psutil.Process(pid).create_time() > last_written  # another, with the same number
    except psutil.NoSuchProcess:
        return True
