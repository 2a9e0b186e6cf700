"""Which file the rows of a training come from, if they come from one: told without the libraries that load them."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from melens.data.reading import names_file
from melens.errors import MelensError
from melens.training.recipe import known_datasets

__all__ = ["OWN_FILE", "PYTHON_DOCS", "file_of"]

OWN_FILE = "a .jsonl, .json or .csv file"

PYTHON_DOCS = "python_docs"
"""Python's own documentation topics, 0.2 million tokens: enough to see a training run, not to learn a language."""


def file_of(name: str, method: str, data_dir: str | None = None) -> Path | None:
    """Return the file of a dataset, None for one of the hub.

    Args:
        name: of `conf/training/dataset/`, a file, or a hub id.
        method: `sft`, `dpo` or `grpo`.
        data_dir: the folder of a preset's file.

    Raises:
        MelensError: no such dataset, one without rows for the method, or a folder for what is no preset.
    """
    known = known_datasets()
    if (preset := known.get(name)) is not None:
        if method not in preset["methods"]:
            able = [other for other, its in known.items() if method in its["methods"]]
            raise MelensError(f"training.dataset={name} has no rows for {method}. Use {', '.join(able)}, or your own.")
        return None if data_dir is None else Path(os.path.expanduser(data_dir), preset["file"])
    if data_dir is not None:
        raise MelensError(f"training.data_dir is for the datasets {', '.join(known)}. Leave it out for {name}.")
    if names_file(name):
        return Path(os.path.expanduser(name))
    if "/" not in name:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
        raise MelensError(
            f"There is no dataset {name!r}; the nearest known are {', '.join(close)}. You can also give a hub id "
            f"(org/name) or {OWN_FILE}."
        )
    return None
