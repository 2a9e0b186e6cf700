"""Which devices this machine has: told before anything but torch is imported."""

from __future__ import annotations

import torch

from melens.errors import MelensError

__all__ = ["MAPS", "check_present"]

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that transformers makes."""


def check_present(place: str, option: str) -> torch.device:
    """Return a device by its name.

    Args:
        place: as PyTorch names it.
        option: of the node `model`, which names it.

    Raises:
        MelensError: no name of a device, or this machine does not have it.
    """
    try:
        device = torch.device(place)
    except RuntimeError:
        words = "" if option == "device" else f"; allowed are {', '.join(MAPS)}, or devices"
        raise MelensError(f"model.{option} names {place!r}, which is not a device{words}.") from None
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = {"cpu": 1, "cuda": n_gpus, "mps": int(torch.mps.is_available())}
    if not present.get(device.type):
        there = ", ".join(kind for kind, n in present.items() if n)
        raise MelensError(f"model.{option} is {place!r}, but this machine has only {there}.")
    if device.type == "cuda" and device.index is not None and device.index >= n_gpus:
        there = "one GPU, cuda:0" if n_gpus == 1 else f"{n_gpus} GPUs, cuda:0 to cuda:{n_gpus - 1}"
        raise MelensError(f"model.{option} is {place!r}, but this machine has {there}.")
    return device
