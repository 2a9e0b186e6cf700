"""Which library versions melens was tried with: its own requirements that have an upper bound, extras included.

melens reads and replaces what lies inside these libraries, where any release may change what a number means without an
error. `pyproject.toml` is the only place that names them, and pip keeps to it; but a user, a cluster's image or a later
`pip install` may put another version there. A warning says so once and the result records it; nothing is refused, since
most releases change nothing.
"""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

__all__ = ["git_commit", "installed", "tried", "untried", "warn_untried"]

_shown = False


def tried() -> dict[str, SpecifierSet]:
    """Return, by library, the versions that were tried; nothing for a source tree that pip did not install."""
    try:
        requirements = [Requirement(line) for line in metadata.requires("melens") or ()]
    except metadata.PackageNotFoundError:
        return {}
    upper = {"<", "<=", "==", "~="}
    bounded = [each for each in requirements if upper & {part.operator for part in each.specifier}]
    return {each.name.replace("-", "_"): each.specifier for each in bounded}


def installed() -> dict[str, str]:
    """Return melens's own version and those of the libraries in `tried` that are installed."""
    versions = {}
    for name in ("melens", *tried()):
        with suppress(metadata.PackageNotFoundError):  # of an extra that is not there
            versions[name] = metadata.version(name)
    return versions


def untried() -> dict[str, str]:
    """Return the installed versions outside those that were tried, by library."""
    specifiers = {"melens": SpecifierSet(), **tried()}
    found = installed().items()
    return {name: own for name, own in found if not specifiers[name].contains(own, prereleases=True)}


def warn_untried(show: Callable[[str], object] | None = None) -> None:
    """Warn, once in a process, of untried versions: by `show`, or by a `UserWarning` at the caller's caller."""
    global _shown
    if _shown or not (versions := untried()):
        return
    _shown = True
    specifiers = tried()
    found = ", ".join(f"{name} {version} (tried: {specifiers[name]})" for name, version in versions.items())
    sentence = f"melens was not tried with {found}. To install tried versions: pip install -c .ci/constraints.txt -e ."
    if show is None:
        warnings.warn(sentence, stacklevel=3)
    else:
        show(sentence)


@cache
def git_commit() -> str | None:
    """Return the commit of melens's source, marked where it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
