"""Can the ME layer be told from the weights alone? Scores of each block's FFN, without a forward pass of the model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from melens.errors import MelensError
from melens.models.devices import weights_here
from melens.models.normalization import has_normalization, read_normalization
from melens.models.quantization import is_quantized
from melens.validation.arguments import Bridge
from melens.validation.signatures import checked

__all__ = ["SCORES", "rank_of", "score_blocks"]

SCORES = {
    "response": "the FFN's answer to the unit-RMS input that its strongest neurons amplify most, ‖FFN(g ⊙ x)‖ / ‖x‖",
    "neuron": "the strongest neuron's largest output: ‖x‖ (‖gate‖ ‖up‖ + |gate · up|) / 2 · ‖down‖, gain folded in",
    "alignment": "outlierness of the neuron whose gate, up and down are large and aligned: largest over median product",
    "down_max": "largest |entry| of the down projection",
    "down_outlierness": "the same over the root mean square of the entries",
}
"""What the columns of `score_blocks` are; in each a larger value points to the ME layer."""

_N_STRONGEST = 64


@dataclass(frozen=True)
class _Neurons:
    """An FFN's weights by neuron; the gain of the normalisation before it is folded into `gate` and `up`."""

    gate: Float[Tensor, "d neuron"] | None
    up: Float[Tensor, "d neuron"]
    down: Float[Tensor, "neuron d"]


@checked
@torch.no_grad()
def score_blocks(model: Bridge) -> pd.DataFrame:
    """Score every block by what its FFN's weights could amplify.

    Args:
        model: a bridge.

    Returns:
        A row a block: `layer`, the columns of `SCORES`, and what they predict: the strongest `neuron_index` and the
        `dim` it writes most to. Blocks without an FFN whose neurons can be told apart are left out.

    Raises:
        MelensError: no block has such an FFN (mixture of experts, state-space blocks), or the weights are quantised.
    """
    if is_quantized(model.original_model):
        raise MelensError("The weights of this model are quantised, so none can be read: load it without quantisation.")
    rows = [_score(model, layer) for layer in range(len(model.blocks)) if _has_neurons(model, layer)]
    if not rows:
        raise MelensError(
            "TransformerLens tells no FFN module with one up and one down projection apart in any block of this model."
        )
    return pd.DataFrame(rows)


def rank_of(layer: int, scores: pd.DataFrame, score: str) -> int | None:
    """Rank a block by a score: 1 for the largest; None for a block that has no score."""
    if layer not in set(scores["layer"]):
        return None
    own = scores.loc[scores["layer"] == layer, score].iloc[0]
    return int((scores[score] > own).sum()) + 1


def _has_neurons(model: TransformerBridge, layer: int) -> bool:
    """Tell whether a block's FFN is one module of an input, with an up and a down projection."""
    ffn = _ffn(model, layer)
    if any(getattr(ffn, name, None) is None for name in ("in", "out")) or ffn.name is None:
        return False
    arguments = inspect.signature(type(ffn.original_component).forward).parameters.values()
    return sum(argument.default is argument.empty for argument in arguments) == 2  # itself and the input


def _ffn(model: TransformerBridge, layer: int) -> Any:
    """Return a block's FFN; what its experts share is not all of it."""
    parts = model.blocks[layer]._modules
    return parts.get("mlp", None if "moe" in parts else parts.get("shared_mlp"))


def _score(model: TransformerBridge, layer: int) -> dict[str, Any]:
    neurons = _read_neurons(model, layer)
    up, down = _norms(neurons.up, 0), _norms(neurons.down, 1)
    radius = model.cfg.d_model**0.5  # of an input whose root mean square is 1
    if neurons.gate is None:
        largest_output, aligned = radius * up * down, up * down
    else:
        gate, overlap = _norms(neurons.gate, 0), (neurons.gate * neurons.up).sum(0, dtype=torch.float32).abs()
        largest_output = radius**2 * (gate * up + overlap) / 2 * down
        aligned = overlap * down
    strongest = int(largest_output.argmax())
    down_max = neurons.down.abs().max().float()
    down_rms = _norms(neurons.down.flatten(), 0) / neurons.down.numel() ** 0.5
    return {
        "layer": layer,
        "response": _response(model, layer, neurons, largest_output) / radius,
        "neuron": float(largest_output[strongest]),
        "alignment": float(aligned.max() / aligned.median()),
        "down_max": float(down_max),
        "down_outlierness": float(down_max / down_rms),
        "neuron_index": strongest,
        "dim": int(neurons.down[strongest].abs().argmax()),
    }


def _read_neurons(model: TransformerBridge, layer: int) -> _Neurons:
    ffn = _ffn(model, layer)
    with weights_here(ffn):
        up, down = ffn.W_in.detach(), ffn.W_out.detach()
        gate = ffn.W_gate.detach() if getattr(ffn, "gate", None) is not None else None
    if has_normalization(model, layer, "ln2"):
        gain = read_normalization(model, layer, "ln2").gain.to(up)[:, None]
        up, gate = up * gain, None if gate is None else gate * gain
    return _Neurons(gate, up, down)


def _norms(weights: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(weights, dim=dim, dtype=torch.float32)


def _response(model: TransformerBridge, layer: int, neurons: _Neurons, strength: Float[Tensor, " neuron"]) -> float:
    """Let the FFN itself, and the norm behind it if there is one, answer to its strongest neurons' favourite inputs."""
    block, width = model.blocks[layer], model.cfg.d_model
    strongest = strength.topk(min(_N_STRONGEST, len(strength))).indices
    favourites = torch.nn.functional.normalize(neurons.up[:, strongest].float(), dim=0)
    if neurons.gate is not None:
        gate = torch.nn.functional.normalize(neurons.gate[:, strongest].float(), dim=0)
        favourites = gate + (gate * favourites).sum(0).sign() * favourites
    inputs = width**0.5 * torch.nn.functional.normalize(favourites, dim=0).T  # [input, d], in front of the gain
    if has_normalization(model, layer, "ln2"):
        inputs = inputs * read_normalization(model, layer, "ln2").gain.to(inputs.device)
    output = _ffn(model, layer).original_component(inputs[None].to(neurons.up))
    if (norm_after := getattr(block, "ln2_post", None)) is not None:
        output = norm_after.original_component(output)
    return float(torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32).max())
