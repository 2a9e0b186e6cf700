"""What the project's extras install, and the command for one that is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from melens.errors import MelensError

__all__ = ["EXTRAS", "check_extra"]

EXTRAS = {"benchmark": ("lm_eval",), "figures": ("kaleido",), "train": ("trl", "peft", "math_verify")}
"""Packages by the extra of `pyproject.toml` that brings them."""


def check_extra(extra: str, purpose: str) -> None:
    """Raise a `MelensError` with pip's command where a package of an extra, one of `EXTRAS`, is not installed."""
    for package in EXTRAS[extra]:
        if find_spec(package) is None:
            in_checkout = (Path(__file__).resolve().parents[2] / ".ci" / "constraints.txt").is_file()
            what = f"-c .ci/constraints.txt -e '.[{extra}]'" if in_checkout else f"'melens[{extra}]'"
            raise MelensError(f"{purpose} needs {package}, which is not installed: pip install {what}")
