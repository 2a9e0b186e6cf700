"""Where a probe listens: a model's hook points by the names that probes give them."""

from __future__ import annotations

import re
from typing import ClassVar
from weakref import WeakKeyDictionary

from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

__all__ = ["ATTENTION_ON_KEYS", "RESID_PRE_0", "Places"]

ATTENTION_ON_KEYS = "attn.on_keys"
"""A site of melens's own: the attention on the probe's `keys`, `[batch, head, query, key]`, without the pattern."""

RESID_PRE_0 = "blocks.0.hook_resid_pre"
"""The embeddings, as the first block sees them; everywhere else a block's input is the output of the one before."""


class Places:
    """The hook points of a model by site, each looked up once: `model.hook_dict` alone takes a millisecond."""

    _known: ClassVar[WeakKeyDictionary[TransformerBridge, Places]] = WeakKeyDictionary()

    def __init__(self, model: TransformerBridge) -> None:
        self._mode = model.compatibility_mode  # with which the names change
        self._hook_dict: dict[str, HookPoint] = model.hook_dict
        self._n_layers = len(model.blocks)
        self._found: dict[str, list[tuple[str, int, HookPoint | None]]] = {}

    @classmethod
    def of(cls, model: TransformerBridge) -> Places:
        if model not in cls._known or cls._known[model]._mode != model.compatibility_mode:
            cls._known[model] = cls(model)
        return cls._known[model]

    def of_site(self, site: str) -> list[tuple[str, int, HookPoint | None]]:
        """Return where a site is: its name in the block, the block (-1: in none), and the hook point, if it is one."""
        if site not in self._found:
            self._found[site] = self._find(site)
        return self._found[site]

    def _find(self, site: str) -> list[tuple[str, int, HookPoint | None]]:
        if site in self._hook_dict:
            block = re.fullmatch(r"blocks\.(\d+)\.(.*)", site)
            return [(block[2] if block else site, int(block[1]) if block else -1, self._hook_dict[site])]
        is_on_keys = site == ATTENTION_ON_KEYS
        names = (f"blocks.{layer}.{'attn.hook_out' if is_on_keys else site}" for layer in range(self._n_layers))
        found = ((layer, self._hook_dict.get(name)) for layer, name in enumerate(names))
        return [(site, layer, None if is_on_keys else hook) for layer, hook in found if hook is not None]
