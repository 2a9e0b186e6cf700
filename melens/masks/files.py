"""The file of a mask beside a checkpoint, read and checked without the libraries that masking needs."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from melens.errors import MelensError

__all__ = ["MASK_FILE", "no_mask", "read_mask"]

MASK_FILE = "wemask.json"


def read_mask(folder: str | PathLike[str]) -> dict[str, Any]:
    """Return what `WeMask.save` wrote into a folder: `wemask`, `dims`, `blocks` and `model`.

    Raises:
        MelensError: no such file, or one that this version's `save` did not write.
    """
    path = Path(folder).expanduser() / MASK_FILE
    try:
        content = json.loads(path.read_text("utf-8"))
        found = {name: content[name] for name in ("wemask", "dims", "blocks", "model")}
        is_current = "gain_sketches" in dict(found["model"])
    except OSError as error:
        raise MelensError(f"There is no mask file {path}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise no_mask(folder) from error
    if not is_current:
        raise MelensError(
            f"{path} is from an earlier melens, whose files do not tell a model from one with shuffled weights: "
            "call mask.on(model) and save it again."
        )
    return found


def no_mask(folder: str | PathLike[str]) -> MelensError:
    """Return the error of a file that is no mask's."""
    return MelensError(f"{Path(folder).expanduser() / MASK_FILE} is not a mask that melens saved.")
