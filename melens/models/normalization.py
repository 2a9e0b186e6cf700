"""What a block's normalisations do, read off the modules themselves, whatever the family.

A gain is the factor that takes effect: Gemma's RMSNorm multiplies by 1 + weight.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from melens.errors import MelensError
from melens.models.devices import weights_here
from melens.printing import Brief
from melens.validation.arguments import Bridge, check_layer
from melens.validation.signatures import Layer, checked
from melens.validation.types import Said

__all__ = ["Normalization", "has_normalization", "named_normalization", "read_module", "read_normalization"]

NormSite = Annotated[str, Field(pattern="^ln[12]$"), Said("ln1 or ln2")]


@dataclass(frozen=True, repr=False)
class Normalization(Brief):
    """An RMSNorm, `gain · h / rms(h)`, or a LayerNorm, `gain · (h - mean(h)) / std(h) + bias`.

    Attributes:
        name: of the module in the transformers model, such as `post_attention_layernorm`.
        kind: which of the two it is.
        gain, bias: float32; the bias of an RMSNorm is 0.
    """

    name: str
    kind: Literal["RMSNorm", "LayerNorm"]
    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]

    def without(self, part: Literal["all", "gain", "norm"], h: Tensor, output: Tensor) -> Tensor:
        """Return what comes out of it without one of its parts.

        Args:
            part: `"all"`: h itself; `"gain"`: normalised only; `"norm"`: only multiplied by the gain (and shifted by
                the bias).
            h, output: what goes into it and comes out, `[..., d]`.
        """
        if part == "all":
            return h
        gain = self.gain.to(h.device)
        if part == "norm":
            return (gain * h.float() + self.bias.to(h.device)).to(h.dtype)
        centred = h.float() if self.kind == "RMSNorm" else h.float() - h.float().mean(-1, keepdim=True)
        scaled = gain * centred
        shifted = output.float() - self.bias.to(h.device)
        # output = scale · gain · centred: the scale by least squares needs neither epsilon nor division by a gain of 0.
        scale = (shifted * scaled).sum(-1, keepdim=True) / (scaled**2).sum(-1, keepdim=True)
        return (scale * centred).to(h.dtype)


def has_normalization(model: TransformerBridge, layer: int, site: str) -> bool:
    """Tell whether a block has a normalisation of its own at `ln1` or `ln2`."""
    return getattr(getattr(model.blocks[layer], site, None), "original_component", None) is not None


@checked
def read_normalization(model: Bridge, layer: Layer, site: NormSite) -> Normalization:
    """Read a normalisation's kind, gain and bias off its answers to known inputs.

    Args:
        model: a bridge.
        layer: 0-based block.
        site: `"ln1"` (before attention) or `"ln2"` (before the FFN).

    Returns:
        A `Normalization`, whose `gain` `[d_model]` is the factor that takes effect: Gemma's is 1 + the parameter.

    Raises:
        MelensError: no such block, or one without that normalisation.

    Example:
        >>> norm = melens.read_normalization(model, 2, "ln2")
        >>> norm.kind, norm.gain.shape == (model.cfg.d_model,)
        ('RMSNorm', True)
    """
    check_layer(model, layer)
    if not has_normalization(model, layer, site):
        raise MelensError(f"Block {layer} of this model has no normalisation {site!r}.")
    component = getattr(model.blocks[layer], site)
    return read_module(component.original_component, component.name, model.cfg.d_model)


def named_normalization(model: TransformerBridge, site: str) -> str | None:
    """Name a normalisation as the model does, `RMSNorm post_attention_layernorm (ln2)`; None where no block has it."""
    for layer in range(len(model.blocks)):
        if has_normalization(model, layer, site):
            normalization = read_normalization(model, layer, site)
            return f"{normalization.kind} {normalization.name} ({site})"
    return None


@torch.no_grad()
def read_module(module: nn.Module, name: str, d_model: int) -> Normalization:
    """Do the same for a normalisation of a transformers model, given as the module."""
    twin = copy.copy(module)
    with weights_here(module):
        twin._parameters = {
            key: weight if weight is None else nn.Parameter(weight.float(), requires_grad=False)
            for key, weight in module._parameters.items()
        }
    device = next((weight.device for weight in twin.parameters()), torch.device("cpu"))
    # Large, so that epsilon does not count; of mean 0 and variance 1 but for the size, so that nothing is centred away.
    alternating = torch.ones(d_model, device=device)
    alternating[1::2] = -1
    inputs = 1e4 * torch.stack([alternating, -alternating, torch.ones_like(alternating)])[None]
    up, down, constant = type(module).forward(twin, inputs)[0]  # past the hooks that others may have put on it
    gain, bias = alternating * (up - down) / 2, (up + down) / 2
    is_centred = torch.linalg.vector_norm(constant - bias) < 0.5 * torch.linalg.vector_norm(gain)
    kind: Literal["RMSNorm", "LayerNorm"] = "LayerNorm" if is_centred else "RMSNorm"
    return Normalization(name, kind, gain, bias if is_centred else torch.zeros_like(bias))
