"""Run an experiment: `python experiments/run.py model=qwen3-4b exp=emergence` (add `-m` for a sweep)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # installing melens does not install `experiments`

from experiments.runner.interrupts import exit_on_signal

if __name__ == "__main__":
    exit_on_signal()  # before the next line, which takes a second
    from experiments.runner.command import run_command

    sys.exit(run_command())
