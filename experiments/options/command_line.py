"""What was typed, made ready for Hydra, and checked before Hydra makes a folder for it.

Hydra's grammar reads numbers, lists and sweeps out of values, and asks for a `+` before what it does not know. Here a
text is a text as it was typed, an option is known or refused by `schema`, and `+` is never needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException

from experiments.options.masks import check_saved_masks
from experiments.options.reading import CONF, OptionError, choose_from, compose_options, is_group
from experiments.options.schema import AS_TYPED, options_of
from melens.environment.extras import check_extra
from melens.errors import MelensError
from melens.validation.types import in_words

__all__ = ["check_command", "prepare_command"]

_MULTIRUN = ("-m", "--multirun", "hydra.mode=MULTIRUN")
_KEY_AND_VALUE = re.compile(r"(?P<prefix>\+{0,2})(?P<key>[^=\s]+)=(?P<value>.*)", re.DOTALL)
_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")


def prepare_command(arguments: Sequence[str]) -> list[str]:
    """Write the arguments of the command line as Hydra reads them.

    Raises:
        OptionError: an argument that is no `key=value`, or chooses a file of `conf/` that is not there.
    """
    sweeps = any(argument in _MULTIRUN for argument in arguments)
    own_conf = any(argument.startswith(_OTHER_CONF) for argument in arguments)
    prepared = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_flag = argument.startswith("-") or before in _WITH_VALUE
        prepared.append(argument if is_flag else _prepare(argument, sweeps=sweeps, own_conf=own_conf))
    return [argument for argument in prepared if argument is not None]


_OTHER_CONF = ("--config-dir", "-cd", "--config-path", "-cp", "hydra.searchpath=")
_WITH_VALUE = (
    "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "-c", "--cfg", "-i",
    "--info", "-sc", "--shell-completion", "--experimental-rerun",
)  # fmt: skip
"""Flags of Hydra's that are followed by a value of theirs."""


def _prepare(argument: str, *, sweeps: bool, own_conf: bool) -> str | None:
    if argument.startswith("~"):
        raise OptionError(f"{argument}: an option cannot be removed; set it to null, off or none instead.")
    found = _KEY_AND_VALUE.fullmatch(argument)
    if found is None:
        raise OptionError(f"{argument!r} is no option; options are written as name=value, as exp=sinks.")
    key, value = found["key"], found["value"]
    texts = {key for key, field in options_of() if AS_TYPED in field.metadata}
    if key in texts or key in _FOLDERS:
        value = _as_text(value, sweeps=sweeps)
    if key == "generate.prompt":
        value = re.sub(r"(?<!\\)\$\{", r"\${", value)  # a text to go on with is no place for interpolations
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException as error:
        why = str(error).splitlines()[0]
        raise OptionError(f"The value of {argument} cannot be read ({why}); quotes help: {key}=\"'...'\".") from None
    if override.is_sweep_override() and not sweeps:
        in_one = ", or in one run exp=all exp.experiments=[...]" if key == "exp" else ""
        raise OptionError(f"{key}={value}: several values need -m, a run for each{in_one}.")
    if key.startswith(("hydra.", "hydra/")) or "/" in key or "@" in key:
        return argument if key not in _FOLDERS else f"{key}={value}"
    if not is_group(override):
        if (CONF / key).is_dir():
            raise OptionError(f"{key} is a group of options, as {key}.<name>=...; it has no value of its own.")
        return f"++{key}={value}"
    if key == "scale" and override.value() is None:  # which is the default, and no file
        return None
    return f"{key}={value}" if own_conf else f"{key}={','.join(_choices(override))}"


def _as_text(value: str, *, sweeps: bool) -> str:
    """Quote a text, or each one of a sweep, unless it is quoted, null, or a list or a function of Hydra's."""
    functions = r"|(choice|range|sort|shuffle)\(" if sweeps else ""
    is_file = os.path.exists(os.path.expanduser(value))  # Path.exists raises where a text is too long for a name
    may_be_read = re.match(rf"""\[|['"]{functions}""", value) and not is_file
    if value == "null" or (may_be_read and _parsed(value) is not None):
        return value
    texts = value.split(",") if sweeps and not is_file else [value]
    return ",".join(text if _is_quoted(text) else QuotedString(text, Quote.single).with_quotes() for text in texts)


def _is_quoted(text: str) -> bool:
    """Whether it is one quoted text, and not one that begins and ends with a quote: "Yes," she said, "please"."""
    parsed = _parsed(text) if re.fullmatch(r"""(['"]).*\1""", text, re.DOTALL) else None
    return parsed is not None and isinstance(parsed._value, QuotedString)


def _parsed(value: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return None


def _choices(override: Override) -> list[str]:
    """Return which files of a folder of `conf/` are chosen; Hydra would take the last of a list, and show its paths."""
    group, value = override.key_or_group, override.value()
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if isinstance(value, Glob):
        return value.filter(names)
    chosen = list(override.sweep_iterator()) if override.is_choice_sweep() else [value]
    for name in chosen:
        if not isinstance(name, str | int):
            several = "; several in one run are exp=all exp.experiments=[...]" if group == "exp" else ""
            raise OptionError(f"{group} is {in_words(name)}; it takes one name, as {group}={names[0]}{several}.")
        if str(name) not in names:
            hub = " For a hub id or a folder: model=hub model.name=..." if group == "model" else ""
            raise OptionError(f"There is no {group}={name}{choose_from(names, str(name), n=3)}{hub}")
    return [str(name) for name in chosen]


def check_command(arguments: Sequence[str]) -> None:
    """Compose and check what a prepared command asks for, of a sweep each value once.

    Raises:
        OptionError: a sentence for each wrong option.
    """
    own = [argument for argument in arguments if argument not in _MULTIRUN]
    if any(argument.startswith(("-", "hydra/sweeper=", "hydra.searchpath=")) for argument in own):
        return  # Hydra composes something else than conf/, or nothing: the job checks its own options
    parser = OverridesParser.create()
    overrides = [parser.parse_override(one) for one in own if not one.startswith(("hydra.", "hydra/"))]
    try:
        for one in own:
            if one in _LAUNCHERS:
                check_extra("slurm", one, package=f"hydra_plugins.{_LAUNCHERS[one]}")
        for variant in _variants(overrides):
            options = compose_options(*variant)
            _ = options.requests  # which checks what the presets and the options give together
            check_saved_masks(options)
            if len(own) == len(arguments):  # the jobs of a sweep may run on other machines
                _check_device(options.model.device)
    except MelensError as error:  # of the library, as for a benchmark that it does not know
        raise OptionError(str(error)) from None


_LAUNCHERS = {
    "hydra/launcher=joblib": "hydra_joblib_launcher",
    "hydra/launcher=submitit_local": "hydra_submitit_launcher",
    "hydra/launcher=submitit_slurm": "hydra_submitit_launcher",
}
"""The plugins of Hydra's that bring them."""


def _check_device(name: str) -> None:
    if name in ("auto", "cpu"):
        return
    import torch  # a second, of the five that all takes

    from melens.models.presence import check_present

    if name == "mps" or not torch.cuda.device_count():  # to ask more would start CUDA before a GPU is chosen
        check_present(name, "device")


def _variants(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Yield overrides without sweeps: the first values together, then each other value beside the first ones."""
    values = []
    for one in overrides:
        swept = one.sweep_string_iterator() if one.is_discrete_sweep() else None
        values.append([one.input_line] if swept is None else [f"{one.get_key_element()}={value}" for value in swept])
    first = [several[0] for several in values]
    yield first
    for place, several in enumerate(values):
        for value in several[1:]:
            yield [*first[:place], value, *first[place + 1 :]]
