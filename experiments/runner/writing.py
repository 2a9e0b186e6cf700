"""What a run leaves when it ends, and when it is stopped: by Ctrl-C, by Slurm, by an error."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.options import Options
from experiments.runner.processes import is_first_process
from experiments.runner.progress import note
from melens import MelensError
from melens.report.page import write_report
from melens.report.record import WHOLE, Record
from melens.report.result import Result, combine
from melens.storage.cache import RUN_CACHE
from melens.training.recipe import METHODS

__all__ = ["finish", "note_if_stopped", "sigterm_interrupts", "write_part"]


def write_part(record: Record, part: Result, cfg: Options) -> None:
    """Write what an experiment found; of several also the report, as far as it goes. The first process writes."""
    if is_first_process():
        record.add(part)
        if record.missing:
            _write_report(record, cfg)


def finish(record: Record, cfg: Options) -> list[Path]:
    """Write what says that all is there; return the files that a user wants to open."""
    if not is_first_process():
        return []
    return [*record.finish(), *_write_report(record, cfg)]


def _write_report(record: Record, cfg: Options) -> list[Path]:
    if len(record.experiments) == 1 and not cfg.exp.has_report:
        return []
    return [write_report(combine(record.parts), record.folder, command=" ".join(["python", *sys.argv]))]


@contextmanager
def note_if_stopped(record: Record, cfg: Options) -> Iterator[None]:
    """Note in what a run leaves that it was stopped; an interrupt tells where the same command goes on."""
    RUN_CACHE.has_trace = RUN_CACHE.is_incomplete = False  # an earlier job of a sweep had its own
    try:
        yield
    except BaseException as error:
        with suppress(MelensError):  # the disk may be full
            record.stop()
            if record.missing and record.parts:
                _write_report(record, cfg)
        if isinstance(error, KeyboardInterrupt):
            error = KeyboardInterrupt(stopped_message(record, cfg))
        note(f"stopped: {str(error) or type(error).__name__}")
        raise error


def stopped_message(record: Record, cfg: Options) -> str:
    """Say what a run that was interrupted has done, and what to do to go on."""
    if record.parts and record.missing:
        done = f"{len(record.parts)} of {len(record.experiments)} experiments are written to {record.folder}"
        goes_on = f"the same command goes on with {record.missing[0]}" if RUN_CACHE.can_resume else "the others are not done"
        return f"{done}; {goes_on}."
    if record.parts:
        return f"what was found is in {record.folder}."
    earlier = (record.folder / WHOLE).is_file()
    nothing = "no result was written" + f" ({record.folder / WHOLE} is of an earlier run)" * earlier
    if RUN_CACHE.can_resume and cfg.exp.name != "generate":  # which keeps its trace alone
        return f"{nothing}; what was measured so far is kept, and the same command goes on with the rest."
    folder = record.folder if cfg.training.resume is None else Path(cfg.training.resume)
    if cfg.exp.name in METHODS and any((folder / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        return f"{nothing}; training.resume={folder} goes on from the last checkpoint."
    return f"{nothing}."


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, as Slurm sends it at the end of a job's time, do what Ctrl-C does; not where another listens."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def interrupt(*told: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
