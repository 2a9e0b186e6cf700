"""Let a bridge's attention find the cache of keys and values under the name that transformers gives it.

TransformerLens 4.3 computes attention itself and looks for the cache as `past_key_values`. transformers 5.24 hands it
over as `cache`, so that each decode step attends to its own token alone, without an error.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import AttentionBridge

__all__ = ["find_cache_by_any_name"]

_DONE: WeakSet[nn.Module] = WeakSet()


def find_cache_by_any_name(model: TransformerBridge) -> None:
    """Let every attention component of a bridge take the cache as `cache` too; a second time does nothing."""
    for component in model.modules():
        # The base class hands everything on to transformers' own attention, which knows its names.
        computes_itself = isinstance(component, AttentionBridge) and type(component) is not AttentionBridge
        if computes_itself and component not in _DONE:
            component.register_forward_pre_hook(_rename, with_kwargs=True)
            _DONE.add(component)


def _rename(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if kwargs.get("cache") is None or kwargs.get("past_key_values") is not None:
        return None
    renamed = {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values")}
    return args, {**renamed, "past_key_values": kwargs["cache"]}
