"""How far a run is: bars on a terminal; in the log, which `run.log` holds too, a line when a stage begins, every half
minute, and when it ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["StageOf", "log_line", "show_stages"]

EVERY = 30.0
"""Seconds between two lines of a stage."""

Done = Callable[[int, int], None]
"""Called as `done(so_far, in_all)`."""

StageOf = Callable[[str], Done]
"""Begins the stage of a name."""

_LOG = logging.getLogger(__name__)


def log_line(sentence: str) -> None:
    """Put a sentence among the lines of the log."""
    _LOG.info(sentence)


@contextmanager
def show_stages(console: Console, *, every: float = EVERY) -> Iterator[StageOf]:
    """Show each named stage of a run for as long as the context lasts.

    Args:
        console: has bars where it is a terminal; a quiet one shows and logs nothing.
        every: seconds between two lines in the log.
    """
    if console.quiet:
        yield lambda name: lambda so_far, in_all: None
        return
    has_bars = console.file.isatty() and not console.is_dumb_terminal
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not has_bars)
    stages: list[_Stage] = []

    def stage_of(name: str) -> Done:
        bar, stage = bars.add_task(name, total=None), _Stage(name)
        stages.append(stage)
        _LOG.info("%s: begins", name)

        def done(so_far: int, in_all: int) -> None:
            bars.update(bar, completed=so_far, total=in_all)
            if stage.reach(so_far, in_all):
                _LOG.info(stage.in_words())

        return done

    with _off_the_terminal() if has_bars else nullcontext(), bars, _repeating(every, lambda: _log(stages)):
        yield stage_of


def _log(stages: list[_Stage]) -> None:
    """Log each stage that goes on, or the last one where none does: what follows it may take long too."""
    for stage in [stage for stage in stages if not stage.has_ended] or stages[-1:]:
        _LOG.info(stage.in_words())


@dataclass
class _Stage:
    name: str
    so_far: int = 0
    in_all: int = 0
    began: float = field(default_factory=lambda: time.monotonic())
    ended: float | None = None

    @property
    def has_ended(self) -> bool:
        return self.ended is not None

    def reach(self, so_far: int, in_all: int) -> bool:
        """Note how far it is; True where this ends it."""
        self.so_far, self.in_all = so_far, in_all
        if self.has_ended or so_far < in_all:
            return False
        self.ended = time.monotonic()
        return True

    def in_words(self) -> str:
        return f"{self.name}: {self._so_far() if self.ended is None else self._at_its_end(self.ended)}"

    def _so_far(self) -> str:
        seconds = time.monotonic() - self.began
        if not self.so_far:
            return f"{_time(seconds)} so far"
        left = seconds * (self.in_all - self.so_far) / self.so_far
        share = self.so_far / self.in_all
        return (
            f"{self.so_far:,} of {self.in_all:,} ({share:.0%}), {_rate(self.so_far, seconds)}, about {_time(left)} left"
        )

    def _at_its_end(self, ended: float) -> str:
        seconds, since = ended - self.began, time.monotonic() - ended
        summary = f"done in {_time(seconds)}"
        if self.in_all > 1:
            summary = f"{self.in_all:,} in {_time(seconds)}, {_rate(self.in_all, seconds)}"
        return summary if since < 1 else f"{summary}; the next step has taken {_time(since)} so far"


def _rate(count: int, seconds: float) -> str:
    rate = count / max(seconds, 1e-9)
    if rate >= 100:
        return f"{rate:,.0f} a second"
    return f"{rate:.3g} a second" if rate >= 1 else f"{_time(1 / rate)} each"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _repeating(every: float, action: Callable[[], None]) -> Iterator[None]:
    """Do something every so many seconds in a thread, whatever this one is busy with."""
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(every):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def _off_the_terminal() -> Iterator[None]:
    """Keep the lines out of the log's own output to the terminal, where there are bars; its files have them."""
    handlers = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]

    def is_of_another(record: logging.LogRecord) -> bool:
        return record.name != __name__

    for handler in handlers:
        handler.addFilter(is_of_another)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_of_another)
