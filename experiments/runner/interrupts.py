"""What Ctrl-C and SIGTERM do: before there is work, end at once; after that, leave in order."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

__all__ = ["INTERRUPTED", "exit_on_signal", "restore_signals"]

INTERRUPTED = 130
"""The exit code, as the shell has it."""


def exit_on_signal() -> None:
    """Let Ctrl-C and SIGTERM end the process without a traceback, for the seconds of imports that leave nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell told us to ignore it
        signal.signal(signal.SIGINT, _stop)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)


def restore_signals() -> None:
    """Let them do what they do by default, for work that has something to put away."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _stop:
            signal.signal(number, default)


def _stop(*told: Any) -> None:
    print("Interrupted: no result was written.", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
