"""Where `conf/` lies, whose models, trainings and benchmarks the library knows by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

__all__ = ["conf_folder"]


@cache
def conf_folder(*names: str) -> Path:
    """Return a folder of `conf/`: in an installed wheel inside the package, in a checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    in_wheel = package.joinpath("conf", *names)
    return in_wheel if in_wheel.is_dir() else package.parent.joinpath("conf", *names)
