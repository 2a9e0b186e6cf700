"""A result in a folder, as a run of one experiment leaves it."""

import time
from pathlib import Path

from melens.report.record import Record
from melens.report.result import Result


def write_result(result: Result, folder: Path, *, config: dict, duration: float) -> list[Path]:
    """Write the result of an experiment that took `duration` seconds; return the files that a user wants to open."""
    began = time.perf_counter() - duration
    record = Record(folder, config=config, experiments=[result.experiment], began=began)
    record.add(result)
    return record.finish()
