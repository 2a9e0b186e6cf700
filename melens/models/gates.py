"""Gated attention (Qiu et al. 2025), the competing fix of table 7, for a model that was trained without it.

A gate multiplies what a block's attention hands to its output projection by `2 · sigmoid(W x)`, where `x` is what
attention reads. With `W = 0`, as it is added, that is exactly 1: training starts from the model as it was. (Qiu et al.
train from scratch with `sigmoid(W x)`, which would halve every head's output here.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from melens.errors import MelensError
from melens.models.devices import computing_device

if TYPE_CHECKING:
    from melens.models.view import Block, ModelView

__all__ = [
    "GATE_FILE", "Gate", "GateKind", "add_gates", "attach_gates", "gates_of", "is_of_gate", "load_gates", "save_gates",
]  # fmt: skip

GateKind = Literal["headwise", "elementwise"]
"""One gate for each head, or one for each entry of each head's output."""

GATE = "melens_gate"  # its name in the attention module
GATE_FILE = "gate.safetensors"


class Gate(nn.Module):
    """The factors for what a block's heads write: 1 for every input until it is trained."""

    def __init__(self, weight: Float[Tensor, "gate d_model"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens gate"]:
        """Return the factors for each token, from what its attention reads."""
        return 2 * torch.sigmoid(nn.functional.linear(hidden, self.weight))


class _Hooks:
    """What runs around a gated attention. (Methods, not closures: a deep copy of the model gets its own.)"""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self._read: Tensor | None = None

    def before_query(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._read = args[0]

    def before_output(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._read is not None
        factors = getattr(self._attention, GATE)(self._read)  # looked up each time: an adapter may have wrapped it
        self._read = None
        written = args[0]
        by_gate = written.unflatten(-1, (factors.shape[-1], -1)) * factors[..., None].to(written.dtype)
        return (by_gate.flatten(-2), *args[1:])


def add_gates(network: ModelView, kind: str) -> None:
    """Add gates that change nothing yet to every block with attention.

    Raises:
        MelensError: an unknown kind, a model that has gates, or one whose attention cannot be gated.
    """
    if kind not in get_args(GateKind):
        raise MelensError(f"The gate is {kind!r}; allowed are {', '.join(get_args(GateKind))}.")
    if gates_of(network):
        raise MelensError("This model has gates already: training goes on with them if training.gate is none.")
    gates = {}
    for layer in sorted(_gated_layers(network)):
        like: Any = _projections(network.blocks[layer], layer)[1].weight
        n_gates = like.shape[1] if kind == "elementwise" else _n_heads(network)
        gates[layer] = Gate(like.new_zeros(n_gates, network.d_model))
    attach_gates(network, gates)


def attach_gates(network: ModelView, gates: Mapping[int, nn.Module]) -> None:
    """Put gates on the blocks of a model, which takes them in as its own weights."""
    for layer, gate in gates.items():
        block = network.blocks[layer]
        query, output = _projections(block, layer)
        assert block.attention is not None
        block.attention.add_module(GATE, gate)
        hooks = _Hooks(block.attention)
        query.register_forward_pre_hook(hooks.before_query)
        output.register_forward_pre_hook(hooks.before_output)


def gates_of(network: ModelView) -> dict[int, nn.Module]:
    """Return the gates of a model by block; none for a model without."""
    found = {layer: getattr(block.attention, GATE, None) for layer, block in enumerate(network.blocks)}
    return {layer: gate for layer, gate in found.items() if gate is not None}


def is_of_gate(name: str) -> bool:
    """Tell whether a name in a state dict is that of a gate's weight."""
    return GATE in name.split(".")


def save_gates(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the gates' weights, by their names in a model's state dict, beside a checkpoint."""
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / GATE_FILE)


def load_gates(network: ModelView, file: Path) -> None:
    """Put saved gates on a model.

    Raises:
        MelensError: a file that is not of this model, or does not hold the gates of all its blocks with attention.
    """
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise MelensError(f"{file} holds no gates that melens saved.") from error
    like = next(network.base.parameters())
    by_layer = {}
    for name, weight in weights.items():
        layers = [int(part) for part in name.split(".") if part.isdecimal()]
        if not is_of_gate(name) or len(layers) != 1 or not _fits(network, layers[0], weight):
            raise MelensError(f"{file} holds gates of another model: {name} of shape {list(weight.shape)}.")
        query = _projections(network.blocks[layers[0]], layers[0])[0]
        by_layer[layers[0]] = Gate(weight.to(computing_device(query), like.dtype))
    if lacking := sorted(_gated_layers(network) - by_layer.keys()):
        raise MelensError(f"{file} lacks the gates of blocks {', '.join(map(str, lacking))}: save the model again.")
    attach_gates(network, by_layer)


def _gated_layers(network: ModelView) -> set[int]:
    return {layer for layer, block in enumerate(network.blocks) if block.attention is not None}


def _fits(network: ModelView, layer: int, weight: Tensor) -> bool:
    if layer not in _gated_layers(network):
        return False
    like: Any = _projections(network.blocks[layer], layer)[1].weight
    return weight.shape in {(n_gates, network.d_model) for n_gates in (_n_heads(network), like.shape[1])}


def _projections(block: Block, layer: int) -> tuple[nn.Module, nn.Module]:
    if block.query is None or block.output is None:
        raise MelensError(f"Attention in block {layer} of this model has no projections to put a gate between.")
    weight = getattr(block.output, "weight", None)
    if weight is None or weight.dtype.itemsize < 2:
        raise MelensError(f"Attention in block {layer} of this model is quantised: gates stand between plain layers.")
    return block.query, block.output


def _n_heads(network: ModelView) -> int:
    config: Any = network.base.config
    return int(config.get_text_config().num_attention_heads)
