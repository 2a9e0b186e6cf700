"""Where the weights of a model lie that is larger than one device, and how to read them.

`from_pretrained(device_map=...)` puts modules on several GPUs, or leaves their weights in memory or on disk, where they
are meta tensors between two calls. Accelerate hooks every module's `forward` to bring what goes in to the module's
device, and offloaded weights with it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

__all__ = [
    "computing_device", "dispatch_like", "has_all_weights", "input_device", "is_dispatched", "placement",
    "weights_here",
]  # fmt: skip


def is_dispatched(network: nn.Module) -> bool:
    """Tell whether accelerate brings each module what it needs: on several devices, or from memory or disk."""
    return any("_hf_hook" in vars(module) for module in network.modules())


def placement(network: Any) -> dict[str, float]:
    """Return the share of a model's weights that lies on each device, in memory ("cpu") or on disk."""
    device_map = getattr(network, "hf_device_map", None) or {"": next(network.parameters()).device}
    sizes: Counter[str] = Counter()
    for name, place in device_map.items():
        where = "disk" if place == "disk" else str(torch.device(place))
        sizes[where] += sum(weight.numel() for weight in network.get_submodule(name).parameters())
    return {where: round(size / sizes.total(), 4) for where, size in sizes.items()}


def input_device(network: Any) -> torch.device:
    """Return the device that token ids must be on: where the embedding is looked up."""
    return computing_device(network.get_input_embeddings())


def computing_device(module: nn.Module) -> torch.device:
    """Return the device that a module computes on: its weights', or the one that they are fetched to."""
    device: torch.device = next(module.parameters()).device
    hooks = [vars(part)["_hf_hook"] for part in module.modules() if "_hf_hook" in vars(part)]
    return torch.device(hooks[0].execution_device) if device.type == "meta" and hooks else device


@contextmanager
def weights_here(module: nn.Module) -> Iterator[None]:
    """Bring a module's offloaded weights, and those inside it, to where they compute, for the context."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


def dispatch_like(twin: Any, network: Any) -> None:
    """Let accelerate serve a plain twin as it serves the model, perhaps in a bridge, whose weights it shares."""
    hook = vars(network).get("_hf_hook")
    if hook is not None:
        add_hook_to_module(twin, copy.copy(hook))  # it keeps notes from call to call
    for name, part in twin.named_children():
        served = network._modules.get(name)
        if served is not None:
            dispatch_like(part, served._modules.get("_original_component", served))
    if hasattr(network, "hf_device_map"):
        twin.hf_device_map = network.hf_device_map


def has_all_weights(network: nn.Module) -> bool:
    """Tell whether every weight is in memory, or would be fetched when its module runs."""
    return all(
        has_offloaded_params(module) or not any(weight.is_meta for weight in module.parameters(recurse=False))
        for module in network.modules()
    )
