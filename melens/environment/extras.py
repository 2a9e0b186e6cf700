"""What the project's extras install, and the command for one that is missing."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from melens.errors import MelensError

__all__ = ["EXTRAS", "check_extra"]

EXTRAS = {"benchmark": ("lm_eval",), "figures": ("kaleido",), "train": ("trl", "peft", "math_verify")}
"""Packages by the extra of `pyproject.toml` that brings them."""


def check_extra(extra: str, purpose: str, *, package: str | None = None) -> None:
    """Raise a `MelensError` with pip's command where a package of an extra is not installed.

    Args:
        extra: of `pyproject.toml`.
        purpose: what needs it, as the sentence begins.
        package: the only one that is needed; by default all those of `EXTRAS` are.
    """
    for each in EXTRAS[extra] if package is None else (package,):
        if not _is_installed(each):
            in_checkout = (Path(__file__).resolve().parents[2] / ".ci" / "constraints.txt").is_file()
            what = f"-c .ci/constraints.txt -e '.[{extra}]'" if in_checkout else f"'melens[{extra}]'"
            name = each.rpartition(".")[2]
            raise MelensError(f"{purpose} needs {name}, which is not installed: pip install {what}")


def _is_installed(package: str) -> bool:
    with suppress(ModuleNotFoundError):  # of the namespace that it is in
        return find_spec(package) is not None
    return False
