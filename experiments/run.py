"""Run an experiment: `python experiments/run.py model=qwen3-4b exp=emergence` (add `-m` for a sweep)."""

import sys

from experiments.interrupts import stop_at_once

if __name__ == "__main__":
    stop_at_once()
    from experiments.command import run_command  # takes a second, in which Ctrl-C is heard already

    sys.exit(run_command())
