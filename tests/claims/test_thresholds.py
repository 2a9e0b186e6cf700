"""Thresholds say when they were fixed, and the commit that they name has them."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from melens.claims.paper import CLAIMS, FAMILY_CLAIM

ROOT = Path(__file__).parents[2]
FIXED = {f"{claim.id}, {claim.fixed}": claim for claim in (*CLAIMS, FAMILY_CLAIM)}
FORMER = {f"{claim.id}, {claim.former.fixed}": claim.former for claim in CLAIMS if claim.former is not None}


def _git(*command: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


@cache
def _criteria_in(commit: str) -> str:
    """Return the lines of a commit around its criteria, with ≥ for >=; a text that goes over two lines is joined."""
    found = _git("grep", "-h", "-A", "3", "criterion", commit, "--", "*.py")
    return re.sub(r'"\s+"', "", found).replace(">=", "≥").replace("<=", "≤")


@pytest.mark.parametrize(
    "one", [*FIXED.values(), *FORMER.values()], ids=[*FIXED, *(f"former {name}" for name in FORMER)]
)
def test_a_threshold_is_that_of_the_commit_that_fixed_it(one):
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [0-9a-f]{7}", one.fixed)
    date, commit = one.fixed.split()
    if not (committed := _git("show", "-s", "--format=%as", commit).strip()):
        pytest.skip("The history is not here.")
    assert committed == date
    assert f'"{one.criterion}"' in _criteria_in(commit)
