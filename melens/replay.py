"""Start a forward pass at a block, from what another pass recorded before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

__all__ = ["Replay"]


class Replay:
    """Recorded outputs of blocks, for other passes over the same tokens to start from.

    Attributes:
        outputs: by block, in whatever form it returns them.
    """

    def __init__(self, model: TransformerBridge, outputs: dict[int, Any] | None = None) -> None:
        self._modules = [block.original_component for block in model.blocks]
        self.outputs: dict[int, Any] = outputs or {}

    @contextmanager
    def recording(self, layers: Iterable[int]) -> Iterator[None]:
        """Record what these blocks return in the forward pass inside the context."""
        handles = [self._modules[layer].register_forward_hook(partial(self._record, layer)) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def starting_at(self, start: int) -> Iterator[None]:
        """Let the blocks before `start` hand on what block `start - 1` returned, instead of computing anything."""
        modules = self._modules[:start]
        try:
            for module in modules:
                module.__dict__["forward"] = partial(_hand_on, self.outputs[start - 1])
            yield
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)

    def cut(self, model: TransformerBridge, n_rows: int, n_tokens: int) -> Replay:
        """Return what a pass over the first rows and tokens would have recorded, in a causal model."""

        def cut(output: Any) -> Any:
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            hidden = hidden[:n_rows, :n_tokens]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return Replay(model, {layer: cut(output) for layer, output in self.outputs.items()})

    def _record(self, layer: int, module: Any, args: Any, output: Any) -> None:
        self.outputs[layer] = output


def _hand_on(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output
