"""The matrices of an FFN and the experts of a mixture: which blocks have them, and how to change entries for a while.

    weights = ffn_weights(model, 11)
    with scaled(Scaling(weights.down, (41, 507), 0)):
        ...  # however the model is run, what neuron 41 writes to dim 507 is nothing

What is given are views of the model's own parameters, in one orientation for every architecture. `scaled` changes them
in place and puts back what was there, bit for bit, whatever happens inside; what would change something else as well,
or nothing at all, is refused in a sentence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from melens.errors import MelensError
from melens.models.quantization import is_quantized
from melens.models.view import is_whole
from melens.printing import Brief

__all__ = ["FfnWeights", "Scaling", "experts_of", "ffn_of", "ffn_weights", "has_neurons", "scaled", "without_expert"]

_OF_EXPERT = ("down_proj", "down_proj_bias")
"""What an expert writes with, as transformers names the stacks `[expert, ...]` of those that it calls by number."""


@dataclass(frozen=True, repr=False)
class FfnWeights(Brief):
    """The matrices of a dense FFN, as views of the model's parameters; `gate` is None where there is none."""

    gate: Float[Tensor, "d neuron"] | None
    up: Float[Tensor, "d neuron"]
    down: Float[Tensor, "neuron d"]


@dataclass(frozen=True, repr=False)
class Scaling(Brief):
    """A factor for some entries of a weight: of `weight[index]`, with an index as of any tensor."""

    weight: Tensor
    index: Any
    factor: float | int


def ffn_of(model: TransformerBridge, layer: int) -> Any:
    """Return a block's FFN; beside experts, `shared_mlp` is only a part of it."""
    parts = model.blocks[layer]._modules
    return parts.get("mlp", None if "moe" in parts else parts.get("shared_mlp"))


def has_neurons(model: TransformerBridge, layer: int) -> bool:
    """Tell whether a block's FFN is one module of an input, with an up and a down projection."""
    ffn = ffn_of(model, layer)
    if any(getattr(ffn, name, None) is None for name in ("in", "out")) or ffn.name is None:
        return False
    arguments = inspect.signature(type(ffn.original_component).forward).parameters.values()
    return sum(argument.default is argument.empty for argument in arguments) == 2  # itself and the input


def ffn_weights(model: TransformerBridge, layer: int) -> FfnWeights:
    """Return the matrices of a block's dense FFN, to be changed.

    Args:
        model: a bridge.
        layer: a block for which `has_neurons` is true.

    Raises:
        MelensError: weights that cannot be changed: quantised, offloaded or sharded, folded, shared with another block,
            or copied by TransformerLens out of what is computed with.
    """
    ffn = ffn_of(model, layer)
    _check_changeable(model, layer, ffn)
    for name in ("gate", "in", "out"):
        part = getattr(ffn, name, None)
        if part is not None and not _overlap([part.weight], ffn.original_component.parameters()):
            raise MelensError(
                f"TransformerLens holds a copy of the {name} projection of block {layer}, so a change of it would "
                "change nothing that is computed."
            )
    gate = None if getattr(ffn, "gate", None) is None else ffn.W_gate.detach()
    return FfnWeights(gate, ffn.W_in.detach(), ffn.W_out.detach())


def experts_of(model: TransformerBridge, layer: int) -> nn.Module | None:
    """Return the module of a block that holds its experts as stacks `[expert, ...]` and calls them by number, or None.

    transformers calls it as `experts(hidden, index, weights)`: `[token, d]`, and of each token the experts it goes to
    and their weights, `[token, chosen]`.
    """
    for module in model.blocks[layer].original_component.modules():
        stack = module._parameters.get(_OF_EXPERT[0])
        if stack is not None and stack.ndim == 3 and len(inspect.signature(type(module).forward).parameters) == 4:
            return module
    return None


def without_expert(model: TransformerBridge, layer: int, expert: int) -> list[Scaling]:
    """Return what takes an expert out: it is called as before, and writes nothing.

    Raises:
        MelensError: no such experts, or weights that cannot be changed, as of `ffn_weights`.
    """
    experts = experts_of(model, layer)
    if experts is None:
        raise MelensError(f"Block {layer} of this model has no experts that are called by number.")
    _check_changeable(model, layer, experts)
    stacks = (experts._parameters.get(name) for name in _OF_EXPERT)
    return [Scaling(stack.detach(), expert, 0) for stack in stacks if stack is not None]


@contextmanager
@torch.no_grad()
def scaled(*scalings: Scaling) -> Iterator[None]:
    """Multiply entries of weights in place for as long as the context lasts; then they are what they were, bit for bit.

    Args:
        scalings: of views of parameters; of entries named twice both factors count.
    """
    before: list[tuple[Tensor, Any, Tensor]] = []
    try:
        for change in scalings:
            weight = change.weight
            before.append((weight, change.index, weight[change.index].clone()))
            weight[change.index] = before[-1][-1] * change.factor
        yield
    finally:
        for weight, index, entries in reversed(before):
            weight[index] = entries


# --- What cannot be changed -------------------------------------------------------------------------------------------


def _check_changeable(model: TransformerBridge, layer: int, module: nn.Module) -> None:
    """Raise where a change of a module's weights would change nothing that is computed, or more than this block."""
    if is_quantized(model.original_model):
        raise MelensError("The weights of this model are quantised, so no entry of them can be changed: load it plain.")
    if not is_whole(module):
        raise MelensError(f"The FFN weights of block {layer} are offloaded or sharded, so none of them can be changed.")
    if model.compatibility_mode or getattr(model, "_weights_processed", False):
        raise MelensError("The weights of this bridge were folded (compatibility mode): load the model anew.")
    own = list(module.parameters())
    for other, block in enumerate(model.blocks):
        if other != layer and _overlap(own, block.parameters()):
            raise MelensError(f"Blocks {layer} and {other} share FFN weights, so a change in one would be in both.")


def _overlap(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Tell whether any of some tensors lies in the memory of any of the others."""
    spans = [(each.device, each.data_ptr(), each.data_ptr() + each.nbytes) for each in others]
    return any(
        device == each.device and start < each.data_ptr() + each.nbytes and each.data_ptr() < end
        for each in some
        for device, start, end in spans
    )
