import re
import subprocess
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from melens.environment import versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOUCHED = {
    "transformers", "transformer_lens", "torch", "trl", "lm_eval", "peft", "accelerate", "datasets", "plotly",
}  # fmt: skip


def requirements():
    lines = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    return [each for each in map(Requirement, lines) if each.name != "melens"]


def constraints():
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    return {each.name: each for each in (Requirement(line) for line in lines if not line.startswith("#"))}


@pytest.fixture
def environment(monkeypatch):
    """An environment of one's own: melens's requirements, and what is installed."""

    def of(required, **found):
        def version(name):
            if name not in found:
                raise metadata.PackageNotFoundError(name)
            return found[name]

        def requires(name):
            version(name)
            return required

        monkeypatch.setattr(versions.metadata, "requires", requires)
        monkeypatch.setattr(versions.metadata, "version", version)
        monkeypatch.setattr(versions, "_shown", False)

    return of


REQUIRED = [
    "einops>=0.8",
    "torch<2.14,>=2.6",
    'lm-eval<0.4.14,>=0.4.13; extra == "benchmark"',
    "transformers<5.25,>=5.10",
]


@pytest.mark.parametrize(
    ("found", "outside"),
    [
        ({"torch": "2.13.0+cpu", "transformers": "5.24.0"}, {}),
        ({"torch": "2.13.1", "transformers": "5.10.0", "lm_eval": "0.4.13"}, {}),
        ({"torch": "2.14.0", "transformers": "5.25.0"}, {"torch": "2.14.0", "transformers": "5.25.0"}),
        ({"torch": "2.14.0a0+git12ab", "transformers": "5.24.1.dev0"}, {"torch": "2.14.0a0+git12ab"}),
        ({"torch": "2.5.1", "lm_eval": "0.4.14"}, {"torch": "2.5.1", "lm_eval": "0.4.14"}),
        ({"einops": "0.1"}, {}),  # no library whose inside we use
    ],
)
def test_what_lies_outside_what_was_tried(environment, found, outside):
    environment(REQUIRED, melens="0.1.0", **found)
    assert versions.untried() == outside
    assert versions.installed() == {"melens": "0.1.0"} | {k: v for k, v in found.items() if k != "einops"}


def test_a_source_tree_that_was_not_installed_has_nothing_to_tell(environment):
    environment(REQUIRED, torch="9.0")
    assert versions.tried() == versions.installed() == versions.untried() == {}
    versions.warn_untried(pytest.fail)


def test_the_sentence_comes_once(environment):
    environment(REQUIRED, melens="0.1.0", torch="2.14.0", transformers="5.24.0")
    shown = []
    versions.warn_untried(shown.append)
    versions.warn_untried(shown.append)
    assert shown == [
        "melens was not tried with torch 2.14.0 (tried: <2.14,>=2.6)."
        " To install tried versions: pip install -c .ci/constraints.txt -e ."
    ]


def test_a_library_user_gets_a_warning_of_python(environment):
    environment(REQUIRED, melens="0.1.0", torch="2.14.0")
    with pytest.warns(UserWarning, match=r"not tried with torch 2\.14\.0"):
        versions.warn_untried()
    with warnings.catch_warnings(action="error"):
        versions.warn_untried()


def test_what_was_tried_is_told_by_the_package_itself():
    assert set(versions.tried()) >= TOUCHED


def test_every_library_whose_inside_is_used_ends_at_the_next_release_that_was_not_tried():
    bounds = {each.name: each.specifier for each in requirements()}
    for name in TOUCHED:
        pinned = next(iter(constraints()[canonicalize_name(name)].specifier)).version
        assert bounds[name].contains(pinned)
        series = pinned.split(".")[: 3 if pinned.startswith("0.4.") else 2]  # lm_eval releases features as 0.4.x
        following = ".".join([*series[:-1], str(int(series[-1]) + 1)])
        assert not bounds[name].contains(following), f"{name} {following} was not tried"


def test_the_constraints_pin_everything_for_every_python():
    pins = constraints()
    for pin in pins.values():
        assert re.fullmatch(r"[a-z0-9-]+==[^+ ]+", str(pin)), f"{pin}: a name and a version, no host and no local build"
    for required in requirements():
        if required.name != "pip":  # whatever the user's environment has
            assert canonicalize_name(required.name) in pins, f"{required} has no pin"
            assert required.specifier.contains(next(iter(pins[canonicalize_name(required.name)].specifier)).version)


def test_what_is_installed_with_the_tests_is_pinned():
    """Follow melens[test]'s requirements through what is installed here, as pip does."""
    pins, seen, left = constraints(), set(), [Requirement("melens[test]")]
    while left:
        required = left.pop()
        name, extras = canonicalize_name(required.name), required.extras or {""}
        if (name, frozenset(extras)) in seen:
            continue
        seen.add((name, frozenset(extras)))
        if name in pins and not pins[name].specifier.contains(metadata.version(required.name)):
            continue  # another version than was tried may need others
        for line in metadata.requires(required.name) or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(needed)
    missing = {name for name, _ in seen} - set(pins) - {"melens", "pip"}
    assert not missing


def test_the_command_line_warns_before_anything_slow():
    script = """
import importlib.metadata as metadata, runpy, sys
real = metadata.version
metadata.version = lambda name: "99.0" if name == "plotly" else real(name)
sys.path.insert(0, "experiments")
sys.argv = ["experiments/run.py", "exp=nope"]
try:
    runpy.run_path("experiments/run.py", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr  # exp=nope
    warning, *others = done.stderr.splitlines()
    assert warning.startswith("Warning: melens was not tried with ")
    assert "plotly 99.0 (tried: " in warning
    assert "not tried" not in "".join(others)
