"""What the project's extras install, and the command for one that is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from melens.errors import MelensError

__all__ = ["EXTRAS", "check_extra"]

EXTRAS = {"benchmark": ("lm_eval",), "png": ("kaleido",), "train": ("trl", "peft", "math_verify")}
"""Packages by the extra of `pyproject.toml` that brings them."""


def check_extra(extra: str, purpose: str) -> None:
    """Raise a `MelensError` with pip's command where a package of an extra is not installed.

    Args:
        extra: one of `EXTRAS`.
        purpose: what needs it, as the sentence begins.
    """
    missing = [package for package in EXTRAS[extra] if find_spec(package) is None]
    if missing:
        raise MelensError(f"{purpose} needs {missing[0]}, which is not installed: {_command(extra)}")


def _command(extra: str) -> str:
    in_checkout = (Path(__file__).resolve().parents[2] / ".ci" / "constraints.txt").is_file()
    return f"pip install -c .ci/constraints.txt -e '.[{extra}]'" if in_checkout else f"pip install 'melens[{extra}]'"
