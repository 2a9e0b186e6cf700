"""Make `Options` of what Hydra composed, and a sentence of every option that is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from experiments.options.schema import Options, options_of
from experiments.runner.registry import EXPERIMENTS
from melens.errors import MelensError
from melens.validation.types import in_words, why_not

__all__ = [
    "CONF", "OptionError", "choose_from", "compose_options", "is_group", "read_options", "said_options", "value_at",
]  # fmt: skip

CONF = Path(__file__).parents[2] / "conf"
_CHOSEN_BY = {"model": "source", "exp": "name"}
"""The key of a node by which one of several types is chosen for it; pydantic puts its value into an error's place."""
_SETTLED = ("exp.name", "model.source")
"""Options that the choice of a file sets: nobody gives them."""


class OptionError(MelensError):
    """An option that does not exist, or that cannot have the value that it was given."""


def compose_options(*overrides: str) -> Options:
    """Compose `conf/` with overrides as they are typed, and check the result."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            composed = compose("config", list(overrides))
        except ConfigCompositionException as error:  # the value has no place in the default, or there is no such file
            if (found := re.match(r"Error merging override \+*(.*)", str(error))) is None:
                raise
            raise OptionError(
                f"{found[1]}: the default is of another form (a list, a group or a single value), which --help shows."
            ) from None
        return read_options(composed, overrides)


def read_options(cfg: DictConfig, overrides: Sequence[str] = ()) -> Options:
    """Check what Hydra composed from what the user typed (`overrides`), which wins over presets of tables and masks.

    Raises:
        OptionError: a sentence for each option that is not known, or has a value that is not allowed.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain.pop("hydra", None)
    said = said_options(plain, overrides)
    for key in said["typed"]:
        if key in _SETTLED:
            raise OptionError(f"{key} is set by the choice of a file: change it with {key.partition('.')[0]}=...")
    if "given" in plain or "typed" in plain:
        raise OptionError("There is no option given or typed: melens writes them into result.json.")
    try:
        return Options.model_validate(plain | said)
    except ValidationError as error:
        known = [key for key, _ in options_of(plain) if key not in _SETTLED]
        raise OptionError("\n".join(dict.fromkeys(_sentence(one, known) for one in error.errors()))) from None


def said_options(plain: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return what the user said, without Hydra's own options: `given` and `typed` of `Options`.

    `given` holds options with their value now and config groups with what was chosen.
    """
    all_parsed = OverridesParser.create().parse_overrides(list(overrides))
    parsed = [one for one in all_parsed if not one.key_or_group.startswith(("hydra.", "hydra/"))]
    chosen = {one.key_or_group: one.value() for one in parsed if is_group(one)}
    keys = [one.key_or_group for one in parsed if not is_group(one)]
    scale = CONF / "scale" / f"{chosen.get('scale')}.yaml"
    if scale.is_file():
        keys += _leaves(yaml.safe_load(scale.read_text("utf-8")))
    given = chosen | {key: value_at(plain, key) for key in keys if not key.startswith("defaults")}
    return {"given": given, "typed": [one.key_or_group for one in parsed]}


def is_group(override: Override) -> bool:
    """Whether an override chooses a file of a folder of `conf/`, as `model=qwen3-4b`."""
    return override.key_or_group in _groups()


@cache
def _groups() -> set[str]:
    defaults = yaml.safe_load((CONF / "config.yaml").read_text("utf-8"))["defaults"]
    return {group for chosen in defaults if isinstance(chosen, dict) for group in chosen}


def value_at(plain: Any, key: str) -> Any:
    """Return what an option by its dotted name is in a configuration; None where it is not there."""
    for name in key.split("."):
        plain = plain.get(name) if isinstance(plain, Mapping) else None
    return plain


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


# --- Sentences --------------------------------------------------------------------------------------------------------


def _sentence(error: Mapping[str, Any], known: Sequence[str]) -> str:
    places = list(error["loc"])
    if len(places) > 1 and places[0] in _CHOSEN_BY:
        del places[1]
    key, given = ".".join(map(str, places)), in_words(error["input"])
    match error["type"]:
        case "extra_forbidden":
            return f"There is no option {key}{_nearest(key, known)}"
        case "value_error":  # a rule about several options, which has its own sentence
            return str(error["ctx"]["error"])
        case "missing" if places[:-1] == ["exp"] and places[-1] in EXPERIMENTS:
            return f"{key} is missing: add {places[-1]}@{places[-1]} to `defaults` of conf/exp/all.yaml."
        case "missing":
            return f"{key} is missing: give {key}=..."
        case "model_type" | "model_attributes_type":
            return f"{key} is {given}; it is a group of options, as {key}.<name>=..."
        case "union_tag_invalid":
            return f"{key}.{_CHOSEN_BY[key]} cannot be changed: choose with {key}=."
    return f"{key} is {given}; {why_not(error)}."


def _nearest(key: str, known: Sequence[str]) -> str:
    """Name the known options that a wrong one may have been meant for, or those that stand where it stands."""
    same_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    if same_name:
        return f"; did you mean {' or '.join(same_name[:3])}?"
    node = key.rpartition(".")[0]
    beside = [other for other in known if other.rpartition(".")[0] == node]
    nodes = dict.fromkeys(other.partition(".")[0] for other in known)
    return choose_from(known, key, beside) if node else choose_from([*known, *nodes], key, list(nodes))


def choose_from(known: Sequence[str], wrong: str, allowed: Sequence[str] | None = None, *, n: int = 1) -> str:
    """End a sentence about a wrong name with the `n` nearest known ones, or else with those that are allowed."""
    close = difflib.get_close_matches(wrong, known, n=n, cutoff=0.7)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    allowed = known if allowed is None else allowed
    return f"; allowed are {', '.join(allowed)}." if allowed else "; --help shows all."
