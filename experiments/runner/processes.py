"""The several processes that accelerate may start for one run: the first writes and talks."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

__all__ = ["is_first_process", "shared_folder"]


def is_first_process() -> bool:
    """Tell whether this is the process that writes and talks, of those that accelerate may have started."""
    return int(os.environ.get("RANK", "0")) == 0


def shared_folder(folder: Path) -> Path:
    """Return the first process's folder to all of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return folder
    PartialState(cpu=not torch.cuda.is_available())
    return Path(broadcast_object_list([str(folder)])[0])
