"""The checkpoints of one training: where they lie, at which step each was taken, and which of them to measure.

    names = hub_revisions("EleutherAI/pythia-160m", r"step\\d+")  # ["step0", "step1", ...]
    spread(in_order(names), 20)                                  # `Checkpoint`s, by step, spread over its logarithm

A step is read out of a name by one rule (`melens.models.folders.step_of`). A name without one, or with two, needs the
step beside it.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import numpy as np
from huggingface_hub.errors import CacheNotFound

from melens.errors import MelensError
from melens.models.checkpoints import damaged_file
from melens.models.folders import step_of
from melens.models.sources import HUB_NOT_REACHABLE, hub_answers, why_not_on_hub
from melens.printing import Brief
from melens.storage.cache import hash_of

__all__ = [
    "Checkpoint", "commit_of", "hash_of_weights", "hub_revisions", "in_order", "spread", "tokens_of", "why_incomplete",
]  # fmt: skip

_TOKENS = re.compile(r"tokens?[-_]?(\d+(?:\.\d+)?)([MBT])$|[-_](\d+(?:\.\d+)?)([MB])T$", re.IGNORECASE)
_STAGE = re.compile(r"(?:^|[-_])stage[-_]?(\d+)", re.IGNORECASE)
_SIZES = {"M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True, repr=False)
class Checkpoint(Brief):
    """A checkpoint of a training.

    Attributes:
        name: its revision on the hub, or its folder's name.
        step: of the optimiser.
        tokens: trained on, as far as the name or the series tells.
    """

    name: str
    step: int
    tokens: float | None = None


def tokens_of(name: str) -> float | None:
    """Read the tokens trained on out of a name: 3e9 of `step1000-tokens3B` and `step-001000-3BT`."""
    if (found := _TOKENS.search(name)) is None:
        return None
    number, size = (group for group in found.groups() if group is not None)
    return float(number) * _SIZES[size.upper()]


def in_order(
    names: Sequence[str], steps: Sequence[int] | None = None, tokens_per_step: int | None = None
) -> list[Checkpoint]:
    """Sort checkpoints by step.

    Args:
        names: of revisions or folders.
        steps: of each, where the names do not tell.
        tokens_per_step: where the names do not tell the tokens.

    Raises:
        MelensError: steps for other than each name, a name without a step, two with the same one, or stages of a
            training of which a later one counts anew.
    """
    if steps is not None and len(steps) != len(names):
        raise MelensError(f"dynamics.steps has {len(steps)} steps for {len(names)} checkpoints: give one for each.")
    found: list[Checkpoint] = []
    for number, name in enumerate(names):
        step = step_of(name) if steps is None else steps[number]
        if step is None:
            raise MelensError(f"{name!r} does not tell at which step it was taken: give dynamics.steps=[...] as well.")
        tokens = tokens_of(name)
        if tokens is None and tokens_per_step is not None:
            tokens = float(step * tokens_per_step)
        found.append(Checkpoint(name, step, tokens))
    found.sort(key=lambda checkpoint: checkpoint.step)
    for before, after in pairwise(found):
        if before.step == after.step:
            raise MelensError(f"{before.name!r} and {after.name!r} are both of step {after.step}: leave one out.")
    stages = [int(stage[1]) if (stage := _STAGE.search(one.name)) else 0 for one in found]
    if steps is None and stages != sorted(stages):
        at = next(at for at, (before, after) in enumerate(pairwise(stages)) if before > after)
        raise MelensError(
            f"{found[at].name!r} counts its steps anew: it would come before {found[at + 1].name!r}. Take the "
            "checkpoints of one stage, or give dynamics.steps=[...]."
        )
    return found


def spread(checkpoints: Sequence[Checkpoint], most: int) -> list[Checkpoint]:
    """Choose at most so many checkpoints, the first, the last and those nearest to even steps of log(1 + step)."""
    if len(checkpoints) <= most:
        return list(checkpoints)
    places = np.log1p([checkpoint.step for checkpoint in checkpoints])
    chosen = {len(checkpoints) - 1}
    for wanted in np.linspace(places[0], places[-1], most)[: most - 1]:
        left = [at for at in range(len(checkpoints)) if at not in chosen]
        chosen.add(min(left, key=lambda at: abs(places[at] - wanted)))
    return [checkpoints[at] for at in sorted(chosen)]


# --- Folders ----------------------------------------------------------------------------------------------------------


def why_incomplete(folder: Path) -> str | None:
    """Say what a folder lacks of a checkpoint, as one does whose training was killed while it was written."""
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    if not _weights_in(folder):
        return "it has no weights"
    damaged = damaged_file(folder)
    return None if damaged is None else f"{damaged[0].name} cannot be read"


def hash_of_weights(folder: Path) -> str:
    """Hash all files of a folder that decide what its model computes: weights, configs and code."""
    files = [*_weights_in(folder), *folder.glob("*config.json"), *folder.glob("*.py")]
    digests = {}
    for path in sorted(files):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hash_of(digests)


def _weights_in(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]


# --- The hub ----------------------------------------------------------------------------------------------------------


def hub_revisions(repo: str, pattern: str) -> list[str]:
    """List the branches and tags of a model on the hub whose whole name has a form; offline those in the local cache.

    Args:
        repo: `org/model`.
        pattern: a regular expression.

    Raises:
        MelensError: no such model, a hub that cannot be reached and nothing in the cache, or no such name.
    """
    if hub_answers():
        try:
            refs = huggingface_hub.list_repo_refs(repo)
        except Exception as error:  # as when a model is loaded
            raise MelensError(why_not_on_hub(repo, error)) from error
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    elif not (names := _cached_revisions(repo)):
        raise MelensError(HUB_NOT_REACHABLE.format(path=repo))
    else:
        logging.getLogger(__name__).warning(
            "The hub cannot be reached: of %s only the %d revisions in the local cache are known.", repo, len(names)
        )
    found = sorted({name for name in names if re.fullmatch(pattern, name)})
    if not found:
        where = f"{repo} has no revision named like '{pattern}'"
        raise MelensError(f"{where} ({len(names)} have other names): give dynamics.revisions=[...].")
    return found


def commit_of(repo: str, revision: str | None) -> str | None:
    """Name the commit of a revision whose config was fetched, `org/model@0123abc...`; None where the cache lacks it."""
    file = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=revision)
    return f"{repo}@{Path(file).parent.name}" if isinstance(file, str) else None


def _cached_revisions(repo: str) -> list[str]:
    try:
        cached = huggingface_hub.scan_cache_dir()
    except CacheNotFound:
        return []
    return [ref for own in cached.repos if own.repo_id == repo for ref in own.refs]
