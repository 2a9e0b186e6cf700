"""What a run writes when an experiment ends, when all have, and when Ctrl-C, Slurm or an error stops it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.options import Options
from experiments.runner.processes import is_first_process
from experiments.runner.progress import log_line
from experiments.runner.registry import EXPERIMENTS
from melens import MelensError
from melens.report.ledger import write_claims
from melens.report.page import write_report
from melens.report.record import COMPLETE, Record
from melens.report.result import Result
from melens.storage.cache import RUN_CACHE

__all__ = ["finish", "note_if_stopped", "write_part"]


def write_part(record: Record, part: Result, cfg: Options) -> None:
    """Write what an experiment found; of several also the report, as far as it goes. The first process writes."""
    if is_first_process():
        record.add(part)
        if record.missing:
            _write_report(record, cfg)


def finish(record: Record, cfg: Options) -> list[Path]:
    """Write `result.json`, once everything else is there; return the files that a user wants to open."""
    if not is_first_process():
        return []
    return [*record.finish(), *_write_report(record, cfg)]


def _write_report(record: Record, cfg: Options) -> list[Path]:
    if len(record.experiments) == 1 and not getattr(cfg.exp, "report", False):  # an option of some experiments
        return []
    page = write_report(record.parts, record.content, record.folder, command=" ".join(["python", *sys.argv]))
    return [write_claims(record.content, record.folder), page] if record.content["claims"] else [page]


@contextmanager
def note_if_stopped(record: Record, cfg: Options) -> Iterator[None]:
    """Write into the run's folder that it was stopped; an interrupt says what is there and how to go on."""
    RUN_CACHE.reset()  # an earlier job of a sweep had its own
    try:
        yield
    except BaseException as error:
        with suppress(MelensError):  # the disk may be full
            record.stop()
            if record.missing and record.parts:
                _write_report(record, cfg)
        if isinstance(error, KeyboardInterrupt):
            error = KeyboardInterrupt(stopped_message(record, cfg))
        log_line(f"stopped: {str(error) or type(error).__name__}")
        raise error


def stopped_message(record: Record, cfg: Options) -> str:
    """Say what a run that was interrupted has written, and how to go on."""
    again = "Run the same command again to go on with"
    if record.parts and record.missing:
        written = f"{len(record.parts)} of {len(record.experiments)} experiments are written to {record.folder}."
        return f"{written} " + (f"{again} {record.missing[0]}." if RUN_CACHE.can_resume else "The others did not end.")
    if record.parts:
        return f"the results are in {record.folder}."
    earlier = record.folder / COMPLETE
    nothing = "no result was written" + (f" ({earlier} is of an earlier run)." if earlier.is_file() else ".")
    if RUN_CACHE.can_resume and all(EXPERIMENTS[name].can_resume for name in cfg.experiments):
        return f"{nothing} What was measured so far is kept. {again} the rest."
    folder = record.folder if cfg.training.resume is None else Path(os.path.expanduser(cfg.training.resume))
    trains = any(EXPERIMENTS[name].trains for name in cfg.experiments)
    if trains and any((folder / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        return f"{nothing} Add training.resume={folder} to go on from the last checkpoint."
    return nothing
