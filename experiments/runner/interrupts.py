"""What Ctrl-C and SIGTERM do: end the process at once while nothing is loaded, later stop a run in order."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["INTERRUPTED", "exit_on_signal", "restore_signals", "sigterm_interrupts"]

INTERRUPTED = 130
"""The exit code, as the shell has it."""


def exit_on_signal() -> None:
    """Let Ctrl-C and SIGTERM end the process without a traceback, for the seconds of imports that write nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell told us to ignore it
        signal.signal(signal.SIGINT, _exit)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)


def restore_signals() -> None:
    """Let both do what they do by default, for work that has something to put away."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _exit:
            signal.signal(number, default)


def _exit(*_: Any) -> None:
    print("Interrupted: no result was written.", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, which Slurm sends at the end of a job's time, do what Ctrl-C does; not where a handler is set."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
