"""What each attention head reads and writes, as probes, and the hooks that set heads to zero.

    found = melens.trace(model, prompts, [melens.ValueNorms(), melens.HeadOutputs(model)])
    with model.hooks(fwd_hooks=zero_heads(model, [(3, 0), (3, 2)])): ...  # heads 0 and 2 of block 3 write nothing

1. A head's output on a token is z_h W_O^h: what it mixed of the values, through its rows of the output projection
   (TransformerLens's `hook_result`). The projection's bias belongs to no head.
2. Its norm is that of R_h z_h, where (W_O^h)^T = Q_h R_h: d_value numbers a head and token instead of d_model.
3. z is what enters the output projection, so whatever lies before it (a gate, a norm) counts, and what lies behind it,
   as Gemma's norm after attention, does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D

from melens.analysis.metrics import l2_norm
from melens.errors import MelensError
from melens.models.devices import weights_here
from melens.models.quantization import is_quantized
from melens.models.view import view_model
from melens.tracing.interventions import Hook
from melens.tracing.probes import Batch, Probe, first_against_others
from melens.tracing.sites import Sites
from melens.validation.arguments import Bridge
from melens.validation.signatures import checked

__all__ = ["HeadOutputs", "ValueNorms", "zero_heads"]

Z, VALUES = "attn.hook_z", "attn.v.hook_out"


class ValueNorms(Probe):
    """‖v‖ of token 0 and of the others, by block and value head (value-state drains, Guo et al. 2024).

    The columns are `value_norm`, of token 0, and `value_norm_others`, the mean over the prompt's other tokens. With
    grouped queries a value head serves several heads: head h reads value head h // (heads per value head).

    Example:
        >>> melens.trace(model, prompts, melens.ValueNorms())["value_norms"].columns.tolist()
        ['prompt', 'layer', 'site', 'value_head', 'value_norm', 'value_norm_others']
    """

    name = "value_norms"
    by_row = True
    sites = (VALUES,)
    index = ("value_head",)

    def reduce(self, activation: Float[Tensor, "batch pos value_head d_value"], batch: Batch) -> dict[str, Tensor]:
        return first_against_others({"value_norm": l2_norm(activation)}, batch)


class HeadOutputs(Probe):
    """‖z_h W_O^h‖, the norm of what a head writes to a token, by block and head (Sandoval-Segura et al. 2025).

    The columns are `output_norm`, of token 0, which attends to itself alone, and `output_norm_others`, the mean over
    the prompt's other tokens. Biases belong to no head, and do not count.

    Example:
        >>> melens.trace(model, prompts, melens.HeadOutputs(model))["head_outputs"].columns.tolist()
        ['prompt', 'layer', 'site', 'head', 'output_norm', 'output_norm_others']
    """

    name = "head_outputs"
    sites = (Z,)
    index = ("head",)

    @checked
    def __init__(self, model: Bridge):
        """Read the output projections of a model.

        Raises:
            MelensError: no block has one that can be read: TransformerLens names none, or it is quantised.
        """
        self._factors = _output_factors(model)
        self.layers = sorted(self._factors)

    def reduce(self, activation: Tensor, batch: Batch) -> dict[str, Tensor]:
        raise MelensError("The output of a head depends on its block: `reduce_at` is told which.")

    def reduce_at(self, site: str, layer: int, activation: Tensor, batch: Batch) -> dict[str, Tensor]:
        factor = self._factors[layer].to(activation.device)
        # of latent attention TransformerLens cuts z at another width than the heads'
        z = activation.flatten(2).unflatten(-1, (factor.shape[0], factor.shape[2])).float()
        written = torch.einsum("bphd,hrd->bphr", z, factor)
        return first_against_others({"output_norm": l2_norm(written)}, batch)


@torch.no_grad()
def _output_factors(model: TransformerBridge) -> dict[int, Float[Tensor, "head rank d_value"]]:
    """Return, by block, the triangular factor R of each head's (W_O^h)^T = Q R, of which ‖R z‖ = ‖z W_O^h‖."""
    if is_quantized(model.original_model):
        raise MelensError("The output projections of this model are quantised, so what a head writes cannot be read.")
    blocks, n_heads = view_model(model).blocks, int(model.cfg.n_heads)
    factors: dict[int, Tensor] = {}
    for at in Sites.of(model).find(Z):
        output: Any = blocks[at.layer].output
        if type(output) not in (nn.Linear, Conv1D):
            continue
        with weights_here(output):
            weight: Tensor = output.weight.detach()
            into_rows = weight if isinstance(output, nn.Linear) else weight.mT  # [d_model, head * d_value]
            if into_rows.shape[1] % n_heads:
                continue
            by_head = into_rows.float().cpu().unflatten(1, (n_heads, -1)).transpose(0, 1)
            factors[at.layer] = torch.linalg.qr(by_head, mode="r").R.to(weight.device)
    if not factors:
        raise MelensError("TransformerLens names no linear output projection of attention in any block of this model.")
    return factors


def zero_heads(model: TransformerBridge, heads: Collection[tuple[int, int]]) -> list[Hook]:
    """Return the hooks that let heads write nothing, at every position; the projection's bias stays.

    Args:
        model: a bridge.
        heads: pairs of a block and a head, both counted from 0.

    Raises:
        MelensError: a block without heads that TransformerLens names, or a head that it has not.
    """
    by_layer: defaultdict[int, list[int]] = defaultdict(list)
    n_heads, named = int(model.cfg.n_heads), {at.layer for at in Sites.of(model).find(Z)}
    for layer, head in heads:
        if layer not in named or not 0 <= head < n_heads:
            raise MelensError(
                f"Block {layer} has no head {head} that TransformerLens names; heads are 0 to {n_heads - 1}."
            )
        by_layer[layer].append(head)

    def zeroing(of_block: list[int]) -> Any:
        def zero(z: Float[Tensor, "batch pos *head_d"], hook: HookPoint) -> Tensor:
            by_head = z.flatten(2).unflatten(-1, (n_heads, -1)).clone()
            by_head[:, :, of_block] = 0
            return by_head.flatten(2).view(z.shape)

        return zero

    return [(f"blocks.{layer}.{Z}", zeroing(of_block)) for layer, of_block in sorted(by_layer.items())]
