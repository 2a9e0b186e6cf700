"""What Ctrl-C does: before there is work, end at once; after that, leave in order."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

__all__ = ["INTERRUPTED", "leave_in_order", "stop_at_once"]

INTERRUPTED = 130
"""The exit code, as the shell has it."""


def stop_at_once() -> None:
    """Let Ctrl-C end the process without a traceback: the imports that come first take seconds and leave nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell told us to ignore it
        signal.signal(signal.SIGINT, _stop)


def leave_in_order() -> None:
    """Let Ctrl-C raise `KeyboardInterrupt` again, for work that has something to put away."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*told: Any) -> None:
    print("Interrupted: no result was written.", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
