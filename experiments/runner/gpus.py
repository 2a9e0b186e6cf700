"""Which GPU a run computes on where there are several: one that no other run has.

Jobs that a sweep's launcher runs side by side, or commands in two terminals, would else all compute on the first one.

1. `take_gpu` lists the GPUs that this process may use (`CUDA_VISIBLE_DEVICES`).
2. It locks the file of one that no process has, or of one that the fewest have. The lock is the process's, which may
   run one job after the other; the system gives it back when the process ends, however that is.
3. `CUDA_VISIBLE_DEVICES` names that GPU alone from then on, so that every library finds it as `cuda:0`.
"""

from __future__ import annotations

import getpass
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from experiments.options.schema import ModelOptions

__all__ = ["take_gpu"]

_log = logging.getLogger(__name__)
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class _Taken(NamedTuple):
    name: str
    n_visible: int
    lock: FileLock


_taken: _Taken | None = None
"""What this process has: CUDA looks at the environment once, when it starts."""


def take_gpu(model: ModelOptions) -> None:
    """Take a GPU for this process before CUDA starts, if it is left to us which of several; a second time keeps it.

    A model that names its GPU (`model.device=cuda:1`) or is spread over several has them all in sight, and so has a
    process of accelerate's, which has its GPU already.
    """
    global _taken
    is_spread = model.device_map is not None or model.max_memory is not None
    if model.device not in ("auto", "cuda") or is_spread or "LOCAL_RANK" in os.environ:
        return
    if _taken is None:
        visible = _visible_gpus()
        if len(visible) < 2 or torch.cuda.is_initialized():
            return
        try:
            name, lock = _lock_one(visible, Path(tempfile.gettempdir()) / f"melens-gpus-{getpass.getuser()}")
        except (OSError, NotImplementedError) as error:  # no place for files, or a file system without locks
            _log.warning("Which GPUs are free is not known (%s): this run takes the first.", error)
            return
        os.environ[_VISIBLE] = name
        if torch._C._cuda_getDeviceCount() > 1:  # by CUDA's own count: PyTorch's reads the environment anew
            os.environ[_VISIBLE] = ",".join(visible)
            _log.warning("CUDA had started before a GPU was chosen: this run takes the first of %d.", len(visible))
            return
        _taken = _Taken(name, len(visible), lock)
    _log.info("computes on GPU %s, one of %d (%s=%s)", _taken.name, _taken.n_visible, _VISIBLE, _taken.name)


def _visible_gpus() -> list[str]:
    """Return the names of this process's GPUs, as `CUDA_VISIBLE_DEVICES` has them, without starting CUDA."""
    n_gpus = torch.cuda.device_count()
    named = os.environ.get(_VISIBLE)
    return [name.strip() for name in named.split(",")][:n_gpus] if named else [str(gpu) for gpu in range(n_gpus)]


def _lock_one(gpus: Sequence[str], folder: Path) -> tuple[str, FileLock]:
    """Lock a GPU's first free place; the n-th place of any is tried only where every GPU has n-1 runs."""
    folder.mkdir(exist_ok=True)
    place = 0
    while True:
        for gpu in gpus:
            lock = FileLock(folder / f"{gpu.replace('/', '-')}.{place}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            return gpu, lock
        place += 1
