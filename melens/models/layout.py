"""Which blocks of a model have attention, and which an FFN: of a hybrid not all do, and not all can be measured.

Layout.of(model).attention_in_words  # "attention in blocks 2, 5 and 8 of 12"
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from melens.tracing.attention import uses_attention_function
from melens.tracing.sites import ATTENTION_ON_KEYS, Sites

__all__ = ["Layout", "attends", "listed"]


@dataclass(frozen=True)
class Layout:
    """The blocks of a model by what is in them, 0-based.

    Attributes:
        n_layers: how many there are.
        attention: those whose attention can be measured.
        ffn: those where it can be measured what the FFN writes to the residual stream.
        unnamed_attention, unnamed_ffn: those that have one which TransformerLens does not name.
        unrecorded_attention: those whose attention returned no pattern in a trace.
    """

    n_layers: int
    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    unnamed_attention: tuple[int, ...] = ()
    unnamed_ffn: tuple[int, ...] = ()
    unrecorded_attention: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: TransformerBridge) -> Layout:
        """Look at a bridge's blocks."""
        found = map(Sites.of(model).find, (ATTENTION_ON_KEYS, "hook_mlp_out"))
        attention, ffn = (tuple(place.layer for place in places) for places in found)
        blocks: list[Any] = list(model.blocks)
        return cls(
            len(blocks),
            attention,
            ffn,
            tuple(layer for layer, block in enumerate(blocks) if layer not in attention and attends(block)),
            tuple(layer for layer, block in enumerate(blocks) if layer not in ffn and _has_ffn(block)),
        )

    def as_measured(self, layers: Collection[int]) -> Layout:
        """Return the layout as a trace shows it, in which the attention of these blocks was recorded."""
        return replace(
            self,
            attention=tuple(layer for layer in self.attention if layer in layers),
            unrecorded_attention=tuple(layer for layer in self.attention if layer not in layers),
        )

    @property
    def attention_in_words(self) -> str:
        """Say where there is attention."""
        if self.unrecorded_attention and not self.attention:
            return f"attention in {listed(self.unrecorded_attention)} that returns no pattern"
        return _in_words("attention", self.attention, self.unnamed_attention, self.n_layers)

    @property
    def ffn_in_words(self) -> str:
        """Say where there is an FFN."""
        return _in_words("an FFN", self.ffn, self.unnamed_ffn, self.n_layers)

    def metrics(self) -> dict[str, Any]:
        """Return what the claims must know, ready for JSON."""
        return {"n_layers": self.n_layers, "attention_layers": list(self.attention), "ffn_layers": list(self.ffn)}

    def next_attention(self, layer: int) -> int | None:
        """Return the first block behind another whose attention can be measured."""
        return next((attending for attending in self.attention if attending > layer), None)


def attends(module: Any) -> bool:
    """Tell whether transformers computes attention somewhere in a module, by whatever name."""
    own = (part for part in module.modules() if type(part).__module__.startswith("transformers."))
    return any(uses_attention_function(part) for part in own)


def _has_ffn(block: Any) -> bool:
    """Tell whether a block has an FFN, by TransformerLens's names or transformers', or nothing that has a name."""
    parts = {name for name in block._modules if name != "_original_component" and not name.startswith("hook_")}
    inside = {name.rpartition(".")[2] for name, _ in block.original_component.named_modules()}
    has_named = not parts.isdisjoint(("mlp", "moe", "shared_mlp", "channel_mix"))
    return not parts or has_named or not inside.isdisjoint(("down_proj", "experts"))  # which no mixer has


def _in_words(what: str, measured: Sequence[int], unnamed: Sequence[int], n_layers: int) -> str:
    if len(measured) == n_layers:
        return f"{what} in all {n_layers} blocks"
    of_unnamed = f"{what} in {listed(unnamed)} that TransformerLens does not name" if unnamed else ""
    if not measured:
        return of_unnamed or f"no block with {what}"
    words = f"{what} in {listed(measured)} of {n_layers}"
    return f"{words}, and {of_unnamed}" if unnamed else words


def listed(layers: Collection[int]) -> str:
    """List blocks in words: "block 3", "blocks 2, 5 and 8"; five or more in a row by the first and the last."""
    numbers = sorted(layers)
    if len(numbers) == 1:
        return f"block {numbers[0]}"
    if len(numbers) >= 5 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"blocks {numbers[0]} to {numbers[-1]}"
    return f"blocks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
