"""Sites: the names of places in a block at which a probe records, and the hook points of a model that have them."""

from __future__ import annotations

import re
from typing import ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

__all__ = ["ATTENTION_BY_KEY", "ATTENTION_ON_KEYS", "RESID_PRE_0", "SiteInBlock", "Sites"]

ATTENTION_ON_KEYS = "attn.on_keys"
"""A site of melens's own: the attention on the probe's `keys`, `[batch, head, query, key]`, without the pattern."""

ATTENTION_BY_KEY = "attn.by_key"
"""Another: the attention on every key, `[batch, head, key, 2]`: its sum over the prompt's queries, and how many of them
see the key."""

RESID_PRE_0 = "blocks.0.hook_resid_pre"
"""The embeddings, as the first block sees them; everywhere else a block's input is the output of the one before."""


class SiteInBlock(NamedTuple):
    """A site, by its name in the block, of one block (-1 outside the blocks); melens's own sites have no hook point."""

    site: str
    layer: int
    hook_point: HookPoint | None


class Sites:
    """The hook points of a model by site, each looked up once: `model.hook_dict` alone takes a millisecond."""

    _known: ClassVar[WeakKeyDictionary[TransformerBridge, Sites]] = WeakKeyDictionary()

    def __init__(self, model: TransformerBridge) -> None:
        self._mode = model.compatibility_mode  # with which the names change
        self._hook_dict: dict[str, HookPoint] = model.hook_dict
        self.hook_points = list(dict.fromkeys(self._hook_dict.values()))  # some have several names
        self._n_layers = len(model.blocks)
        self._found: dict[str, list[SiteInBlock]] = {}

    @classmethod
    def of(cls, model: TransformerBridge) -> Sites:
        if model not in cls._known or cls._known[model]._mode != model.compatibility_mode:
            cls._known[model] = cls(model)
        return cls._known[model]

    def find(self, site: str) -> list[SiteInBlock]:
        """Return where a model has a site, named within a block or in full; nothing where it has none."""
        if site not in self._found:
            self._found[site] = self._look_up(site)
        return self._found[site]

    def _look_up(self, site: str) -> list[SiteInBlock]:
        if site in self._hook_dict:
            block = re.fullmatch(r"blocks\.(\d+)\.(.*)", site)
            name, layer = (block[2], int(block[1])) if block else (site, -1)
            return [SiteInBlock(name, layer, self._hook_dict[site])]
        is_own = site in (ATTENTION_ON_KEYS, ATTENTION_BY_KEY)
        names = (f"blocks.{layer}.{'attn.hook_out' if is_own else site}" for layer in range(self._n_layers))
        found = ((layer, self._hook_dict.get(name)) for layer, name in enumerate(names))
        return [SiteInBlock(site, layer, None if is_own else hook) for layer, hook in found if hook is not None]
