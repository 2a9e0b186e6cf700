"""Experiments that are not declared in their own module yet (while they are being moved)."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from pydantic import create_model

from experiments.runner.declaration import Experiment, ExperimentOptions
from experiments.wemask import chosen_mask
from melens.validation.types import Flag

MODULES = (
    "generate", "verify",

)  # fmt: skip


PlainOptions = ExperimentOptions


class KeptOptions(ExperimentOptions):
    name: Literal["generate"]
    keep: Flag


def _plain(name: str) -> Any:
    own: Any = {"name": (Literal[name], ...)}
    return create_model("PlainOptions", __base__=ExperimentOptions, **own)


def _experiment(name: str, options: Any = None, *, masks: Any = None, in_all: bool = True) -> Experiment:
    def run(run: Any, own: Any) -> Any:
        return import_module(f"experiments.{name}").run(run, own)

    def probes(model: Any, own: Any) -> Any:
        return import_module(f"experiments.{name}").probes(model, own)

    return Experiment(name, options or _plain(name), run, probes, masks=masks, in_all=in_all)


EXPERIMENTS = (
    _experiment("generate", KeptOptions, masks=chosen_mask, in_all=False),
    _experiment("verify", in_all=False),
)
