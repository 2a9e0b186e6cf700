"""Resume from a block: start a forward pass at a block, or at the head, from what another pass recorded before it.

A pass inside `RecordedBlocks.recording` keeps what blocks return. In a pass inside `resuming_at(start)` the blocks
before `start` return what was recorded instead of computing, so that only the others take time.

    with running(model) as network, blocks.resuming_at(start, network):
        network(input_ids=tokens, use_cache=False)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.modeling_outputs import BaseModelOutputWithPast

from melens.models.view import base_path

__all__ = ["RecordedBlocks", "apply_head", "is_skipped"]


class RecordedBlocks:
    """Recorded outputs of a bridge's blocks, in whatever form they return them, for other passes to start from."""

    def __init__(self, model: TransformerBridge, outputs: dict[int, Any] | None = None) -> None:
        self._network, self._names = model.original_model, [block.name for block in model.blocks]
        self._blocks = self._blocks_of(self._network)
        self.outputs: dict[int, Any] = outputs or {}

    @contextmanager
    def recording(self, layers: Iterable[int]) -> Iterator[None]:
        """Record what these blocks return in the forward pass inside the context."""
        handles = [self._blocks[layer].register_forward_hook(partial(self._record, layer)) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def resuming_at(self, start: int, network: nn.Module | None = None, *, times: int = 1) -> Iterator[None]:
        """Let the blocks before `start` return what block `start - 1` returned, instead of computing anything.

        Args:
            start: the first block that computes.
            network: what is run, as `running` gives it; by default the model inside the bridge. (The bridge's twin is
                made anew whenever that one changes.)
            times: how often the rows that were recorded are in the pass, one copy of all after the other.
        """
        blocks = [vars(block) for block in self._blocks_of(network or self._network)[:start]]
        of_accelerate = [attributes.get("forward") for attributes in blocks]  # on a model that is spread over devices
        output = self.outputs[start - 1] if start else None
        if start and times > 1:
            hidden, *others = output if isinstance(output, tuple) else (output,)
            hidden = hidden.repeat(times, *[1] * (hidden.ndim - 1))
            output = (hidden, *others) if isinstance(output, tuple) else hidden
        try:
            _SKIPPED.update(self._blocks[:start])
            for attributes in blocks:
                attributes["forward"] = partial(_skip, output)
            yield
        finally:
            _SKIPPED.difference_update(self._blocks[:start])
            for attributes, forward in zip(blocks, of_accelerate, strict=True):
                del attributes["forward"]
                if forward is not None:
                    attributes["forward"] = forward

    @classmethod
    def cut(
        cls, model: TransformerBridge, recorded: Sequence[RecordedBlocks], rows: Sequence[int], n_tokens: int
    ) -> RecordedBlocks:
        """Return what a pass over some rows of these batches, cut short, would have recorded in a causal model."""

        def cut(outputs: Sequence[Any]) -> Any:
            in_tuple = isinstance(outputs[0], tuple)
            hidden = torch.cat([(output[0] if in_tuple else output)[:, :n_tokens] for output in outputs])[list(rows)]
            return (hidden, *outputs[0][1:]) if in_tuple else hidden

        return cls(model, {layer: cut([of.outputs[layer] for of in recorded]) for layer in recorded[0].outputs})

    def _blocks_of(self, network: nn.Module) -> list[nn.Module]:
        blocks = [network.get_submodule(name) for name in self._names]
        return [block._modules.get("_original_component") or block for block in blocks]

    def _record(self, layer: int, module: Any, args: Any, output: Any) -> None:
        self.outputs[layer] = output


_SKIPPED: WeakSet[nn.Module] = WeakSet()
"""Blocks of the models inside bridges that compute nothing, whether they or their twins are run."""


def is_skipped(block: nn.Module) -> bool:
    """Tell whether a block of the model inside a bridge returns what was recorded, instead of computing."""
    return block in _SKIPPED


def _skip(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


class _Output(BaseModelOutputWithPast):
    """A final hidden state, and None for whatever else an architecture's head hands on (GPT-2's cross-attention)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands where a model without its head stands, and returns a final hidden state that is known."""

    def __init__(self, final: Float[Tensor, "batch pos d"], base: nn.Module) -> None:
        super().__init__()
        self.__dict__["_base"] = base  # no part of this one
        self._output = _Output(last_hidden_state=final)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)  # a head may read what the model holds

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return self._output


@torch.no_grad()
def apply_head(network: Any, final: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos vocabulary"]:
    """Let a transformers model's own head, soft caps and all, turn final hidden states into logits."""
    path, _, name = base_path(network).rpartition(".")
    parts = network.get_submodule(path)._modules
    base: Any = parts[name]
    parts[name] = _Given(final, base)
    try:
        tokens = torch.zeros(final.shape[:2], dtype=torch.long, device=final.device)
        return network(input_ids=tokens, use_cache=False).logits
    finally:
        parts[name] = base
