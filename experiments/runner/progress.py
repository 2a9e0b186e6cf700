"""How far a run is: bars on a terminal; in the log, which `run.log` holds too, a line when a stage begins, every half
minute, and when it ends."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["StageOf", "log_line", "show_stages"]

Done = Callable[[int, int], None]
"""Called as `done(so_far, in_all)`."""

StageOf = Callable[[str], Done]
"""Begins the stage of a name."""

_LOG = logging.getLogger(__name__)


def log_line(sentence: str) -> None:
    """Put a sentence among the lines of the log."""
    _LOG.info(sentence)


@contextmanager
def show_stages(console: Console, *, every: float = 30.0) -> Iterator[StageOf]:
    """Show each named stage of a run for as long as the context lasts, with a line in the log every so many seconds.

    A console that is a terminal has bars, unless other jobs of a sweep share it; a quiet one shows and logs nothing.
    """
    if console.quiet:
        yield lambda name: lambda so_far, in_all: None
        return
    is_alone = multiprocessing.parent_process() is None
    has_bars = console.file.isatty() and not console.is_dumb_terminal and is_alone
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

    def log() -> None:  # of stages within one another the innermost alone
        for stage in [stage for stage in stages if stage.ended is None][-1:]:
            _LOG.info(stage.in_words())

    with _off_the_terminal() if has_bars else nullcontext(), bars, _repeating(every, log):
        yield stage_of


@dataclass
class _Stage:
    name: str
    so_far: int = 0
    in_all: int = 0
    began: float = field(default_factory=lambda: time.monotonic())
    ended: float | None = None

    def reach(self, so_far: int, in_all: int) -> bool:
        """Note how far it is; True where this ends it."""
        self.so_far, self.in_all = so_far, in_all
        if self.ended is not None or so_far < in_all:
            return False
        self.ended = time.monotonic()
        return True

    def in_words(self) -> str:
        name, n, in_all = self.name, self.so_far, self.in_all
        if self.ended is not None:
            seconds = self.ended - self.began
            several = f"{in_all:,} in {_time(seconds)}, {_rate(in_all, seconds)}" if in_all > 1 else ""
            return f"{name}: {several or f'done in {_time(seconds)}'}"
        seconds = time.monotonic() - self.began
        if not n:
            return f"{name}: {_time(seconds)} so far"
        left = _time(seconds * (in_all - n) / n)
        return f"{name}: {n:,} of {in_all:,} ({n / in_all:.0%}), {_rate(n, seconds)}, about {left} left"


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
    with ExitStack() as stack:
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                handler.addFilter(_is_of_another)
                stack.callback(handler.removeFilter, _is_of_another)
        yield


def _is_of_another(record: logging.LogRecord) -> bool:
    return record.name != __name__
