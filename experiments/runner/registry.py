"""Every experiment by name: each module of `experiments/` declares its own, and is found here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from experiments.runner.declaration import Experiment

__all__ = ["EXPERIMENTS"]


def _declared() -> dict[str, Experiment]:
    folder = Path(__file__).parents[1]
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "run"))
    modules = [import_module(f"experiments.{name}") for name in names]
    return {experiment.name: experiment for module in modules for experiment in module.EXPERIMENTS}


EXPERIMENTS = _declared()
