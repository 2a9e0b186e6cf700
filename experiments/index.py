"""`exp=index`: one page over all runs in a folder. It is no run itself, and loads no model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from experiments.runner.declaration import AS_TYPED, Experiment, ExperimentOptions
from melens.errors import MelensError
from melens.validation.types import Name, Said

__all__ = ["EXPERIMENTS"]

_SHOWN = 5


class IndexOptions(ExperimentOptions):
    """The arguments of `melens.report.index.write_index`."""

    name: Literal["index"]
    folder: Annotated[Name, AS_TYPED, Said("a folder")]
    page: Annotated[Name | None, AS_TYPED, Said("a file, or null")]


def _write(options: IndexOptions) -> str:
    """Write the page, and say what it shows and which folders it could not read."""
    from melens.report.index import write_index
    from melens.report.terminal import path_from_here

    page = None if options.page is None else Path(os.path.expanduser(options.page))
    index = write_index(os.path.expanduser(options.folder), page)
    lines = [f"{index.n_runs} runs of {index.n_models} models."]
    if index.unread:
        lines.append(f"Not shown ({len(index.unread)}):")
        lines += [f"  {path_from_here(one.folder)}: {one.why}" for one in index.unread[:_SHOWN]]
        lines += ["  ... (the page names them all)"] * (len(index.unread) > _SHOWN)
    return "\n".join([*lines, f"Page:   {path_from_here(index.page)}"])


def _refuse(*_: Any) -> NoReturn:
    raise MelensError("exp=index takes no options but exp.folder and exp.page, and no flags such as -m.")


EXPERIMENTS = (Experiment("index", IndexOptions, run=_refuse, request=_refuse, without_model=_write, in_all=False),)
