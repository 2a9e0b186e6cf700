"""Every experiment by name: each module of `experiments/` declares its own, and is found here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from experiments.runner.declaration import Experiment

__all__ = ["EXPERIMENTS"]


_NAMES = sorted(path.stem for path in Path(__file__).parents[1].glob("*.py") if path.stem not in ("__init__", "run"))

EXPERIMENTS: dict[str, Experiment] = {
    own.name: own for name in _NAMES for own in import_module(f"experiments.{name}").EXPERIMENTS
}
