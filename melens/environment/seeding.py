"""The global generators of random numbers, seeded for a while and then as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch, and give them their states back at the end.

    For code of others that draws from them: the user's own draws before and after go on as if it had not run.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    gpus_are_used = torch.cuda.is_initialized()  # else to ask for their states would take memory on each
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if gpus_are_used else ()):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)  # of every GPU too
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        if not gpus_are_used:  # nothing was drawn on them yet, so that their seed is all of their state
            torch.cuda.manual_seed_all(torch.initial_seed())
