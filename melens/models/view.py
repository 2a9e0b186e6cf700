"""One view of a `TransformerBridge` and of a plain transformers model: their blocks, and where a mask takes hold.

Where a plain model keeps its blocks, norms and attention is read from TransformerLens's adapter of its architecture.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES, ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

from melens.errors import MelensError
from melens.models.adapters import register_adapters
from melens.models.devices import weights_here
from melens.models.hybrids import HYBRIDS, parts_of, submodule
from melens.models.layout import attends
from melens.models.normalization import read_module
from melens.printing import Brief, Summary, counted

__all__ = ["Block", "ModelView", "base_of", "base_path", "is_sharded", "is_whole", "view_model"]

register_adapters()

_SKETCH = 8
"""Numbers that a weight is known by: one pair in ten million looks a tenth as far apart as it is, or less."""


@dataclass(frozen=True, repr=False)
class Block(Brief):
    """A transformer block.

    Attributes:
        module: of the transformers model.
        ln1, attention: its normalisation before attention and its attention, None where it has none.
        query, output: the first and the last linear layer of attention, None where it has no such.
        ln1_name: the name of that normalisation in the model.
        ln1_is_shared: whether more than attention reads it: the FFN of a parallel block, a state-space mixer.
        entries: by the site of a mask, the module whose first argument is masked there; of a bridge, a hook point.
    """

    module: nn.Module
    ln1: nn.Module | None
    attention: nn.Module | None
    query: nn.Module | None
    output: nn.Module | None
    ln1_name: str
    ln1_is_shared: bool
    entries: Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class ModelView(Summary):
    """A model of either kind.

    Attributes:
        bridge: the bridge, None for a plain model.
        base: the transformers model without its head: every forward pass goes through it.
        blocks: in order.
        architecture, d_model, vocabulary: of the model.
    """

    bridge: TransformerBridge | None
    base: nn.Module
    blocks: tuple[Block, ...]
    architecture: str
    d_model: int
    vocabulary: int

    def _heading(self) -> str:
        kind = "bridge" if self.bridge is not None else "transformers model"
        blocks = counted(len(self.blocks), "block")
        return f"{self.architecture} as a {kind}: {blocks}, width {self.d_model:,}, vocabulary {self.vocabulary:,}"

    def gain(self, layer: int) -> Tensor:
        """Return the factors of a block's `ln1` that take effect, float32 `[d]`.

        Raises:
            MelensError: no `ln1`, or weights that are not here in full and that accelerate would not fetch.
        """
        block = self.blocks[layer]
        if block.ln1 is None:
            raise MelensError(f"Block {layer} of this model has no normalisation before attention, so no gain.")
        with weights_here(block.ln1):
            if not all(map(_is_here, block.ln1.parameters())):
                raise MelensError("The model's weights are sharded or offloaded: install the mask before they are.")
        return read_module(block.ln1, block.ln1_name, self.d_model).gain

    def gain_sketches(self) -> list[list[float] | None]:
        """Return a few random projections of the weight of each block's `ln1`: enough to distinguish models.

        They nearly keep the distance between two weights (Johnson and Lindenstrauss 1984): that of a shuffled one is
        large, that of a rounded one small. None without `ln1`, or where the weight is not here in full.
        """
        found: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            if block.ln1 is None:
                continue
            with weights_here(block.ln1):
                weights = block.ln1.parameters()
                own = [weight for weight in weights if weight.shape == (self.d_model,) and _is_here(weight)]
                if own:
                    found[layer] = own[0].detach().double()
        if not found:
            return [None] * len(self.blocks)
        device = next(iter(found.values())).device
        stacked = torch.stack([weight.to(device) for weight in found.values()]).cpu()  # waits for a GPU once
        sketches = dict(zip(found, (stacked @ _projections(self.d_model)).tolist(), strict=True))
        return [sketches.get(layer) for layer in range(len(self.blocks))]

    def gain_parameter(self, layer: int) -> tuple[nn.Parameter, float]:
        """Return the weight that a block's gain is made of, and what is added to it: 1 in Gemma's RMSNorm.

        Raises:
            MelensError: as `gain`; a gain that is no such weight, or one that is offloaded, which no training changes.
        """
        gain = self.gain(layer)
        ln1 = self.blocks[layer].ln1
        for parameter in () if ln1 is None else ln1.parameters():
            if parameter.is_meta:
                raise MelensError(f"The gain of block {layer} is offloaded, so it cannot be read anew in each call.")
            for offset in (0.0, 1.0):
                if parameter.shape == gain.shape and torch.allclose(parameter.float() + offset, gain, rtol=1e-3):
                    return parameter, offset
        raise MelensError(f"The gain of block {layer}'s ln1 is not a weight of its own, so it cannot be read anew.")

    def can_mask_attention(self, layer: int) -> bool:
        """Tell whether a block has attention with a normalisation of its own before it."""
        return self.blocks[layer].attention is not None and self.blocks[layer].ln1 is not None


def is_whole(model: nn.Module) -> bool:
    """Tell whether all weights of a model are in memory in full: not offloaded, nor sharded over processes."""
    return all(map(_is_here, model.parameters()))


def _is_here(weight: Tensor) -> bool:
    return not (weight.is_meta or is_sharded(weight))


def is_sharded(weight: Tensor) -> bool:
    """Tell whether a process holds only a part of a weight, as under FSDP2, or none of it, as under FSDP."""
    return isinstance(weight, DTensor) or weight.numel() == 0


@cache
def _projections(d_model: int) -> Float[Tensor, "d sketch"]:
    """Return random directions, scaled so that a sketch is about as long as the weight's root mean square."""
    drawn = np.random.RandomState(0).standard_normal((d_model, _SKETCH))  # the one generator that numpy never changes
    return torch.from_numpy(drawn / math.sqrt(d_model * _SKETCH))


def view_model(model: Any) -> ModelView:
    """Look into a bridge or a transformers model, also one in a wrapper for data parallelism, compilation or adapters.

    Raises:
        MelensError: neither of them, or an architecture that TransformerLens does not know.

    Example:
        >>> view = view_model(model)
        >>> len(view.blocks) == len(model.blocks), view.gain(2).shape == (view.d_model,)
        (True, True)
    """
    if isinstance(model, TransformerBridge):
        return _of_bridge(model)
    model = _unwrapped(model)
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        raise MelensError(
            f"A {type(model).__name__} cannot be masked; allowed are a TransformerBridge and a transformers model."
        )
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise MelensError("This model is the inside of a TransformerBridge: give the bridge instead.")
    return _of_plain(model, config)


def _unwrapped(model: Any) -> Any:
    """Take off what only wraps a model: hooks on the modules inside it work all the same."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile's
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # PEFT's
            model = model.get_base_model()
        else:
            return model


def _of_bridge(model: TransformerBridge) -> ModelView:
    blocks = []
    config = model.original_model.config
    for block in getattr(model, "blocks", ()):
        norm, attn = getattr(block, "ln1", None), getattr(block, "attn", None)
        components = (norm, attn, *(getattr(attn, part, None) for part in ("q", "qkv", "o")))
        ln1, attention, query, joint, output = (getattr(own, "original_component", None) for own in components)
        entries = {"resid_pre": getattr(block, "hook_resid_pre", block.hook_in)}
        if norm is not None:
            entries |= {"ln1_in": norm.hook_in, "attn_in": norm.hook_out}
        ln1 = None if _is_post_norm(config) else ln1
        query = joint if query is None else query
        name, is_shared = getattr(norm, "name", "") or "", _is_ln1_shared(block._modules, config)
        blocks.append(Block(block.original_component, ln1, attention, query, output, name, is_shared, entries))
    return _checked(model.original_model, tuple(blocks), str(model.cfg.architecture), int(model.cfg.d_model), model)


def _of_plain(model: nn.Module, config: Any) -> ModelView:
    of_classes = [kind.__name__ for kind in type(model).__mro__]  # sharding makes a subclass of its own
    architecture = next((name for name in of_classes if name in SUPPORTED_ARCHITECTURES), of_classes[0])
    try:
        dtype = next(model.parameters()).dtype
        cfg = build_bridge_config_from_hf(config, architecture, architecture, dtype)
        mapping: Any = ArchitectureAdapterFactory.select_architecture_adapter(cfg).get_component_mapping()
        described = mapping["blocks"]
        modules = list(model.get_submodule(described.name))  # type: ignore[call-overload]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise MelensError(
            f"TransformerLens does not know where {architecture} keeps its blocks, so it cannot be masked."
        ) from error
    blocks = []
    for module in modules:
        submodules = parts_of(described, module)
        names = {part: getattr(submodules.get(part), "name", None) for part in ("ln1", "attn")}
        if _is_post_norm(config):
            names["ln1"] = None
        of_attention = getattr(submodules.get("attn"), "submodules", None) or {}
        names |= {part: getattr(of_attention.get(part), "name", None) for part in ("q", "qkv", "o")}
        attention = submodule(module, names["attn"])
        query, joint, output = (submodule(attention, names[part]) for part in ("q", "qkv", "o"))
        query = joint if query is None else query
        paths = {part: component.name for part, component in submodules.items()}
        present = [part for part, path in paths.items() if path is None or submodule(module, path) is not None]
        ln1, name = submodule(module, names["ln1"]), names["ln1"] or ""
        entries = {"resid_pre": module, "ln1_in": ln1, "attn_in": attention}
        blocks.append(Block(module, ln1, attention, query, output, name, _is_ln1_shared(present, config), entries))
    return _checked(model, tuple(blocks), architecture, int(cfg.d_model), None)


def _is_post_norm(config: Any) -> bool:
    """Tell whether what TransformerLens calls `ln1` comes after attention: in OPT-350m and OpenAI's first GPT."""
    return not getattr(config, "do_layer_norm_before", True) or config.model_type == "openai-gpt"


def _is_ln1_shared(parts: Collection[str], config: Any) -> bool:
    """Tell from the parts of a block, by TransformerLens's names, whether more than attention reads its `ln1`."""
    beside_attention = {"mamba", "mixer", "laurel"}
    if getattr(config, "apply_residual_connection_post_layernorm", False):  # BLOOM's: the residual stream is ln1's
        return True
    return not beside_attention.isdisjoint(parts) or ("ln2" not in parts and "mlp" in parts)


def _checked(
    model: Any, blocks: tuple[Block, ...], architecture: str, d_model: int, bridge: TransformerBridge | None
) -> ModelView:
    is_decoder = not getattr(model.config, "is_encoder_decoder", False)
    if not is_decoder or not any(block.attention is not None for block in blocks):
        if is_decoder and attends(model):
            bridged_before = "; melens.load_model does" if architecture in HYBRIDS else ", so it cannot be masked"
            raise MelensError(f"TransformerLens does not name the attention of {architecture}{bridged_before}.")
        raise MelensError(f"{architecture} is no decoder with attention, so it cannot be masked.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return ModelView(bridge, base_of(model), blocks, architecture, d_model, int(vocabulary))


def base_of(network: nn.Module) -> nn.Module:
    """Return the part of a transformers model that every forward pass goes through: all but the head."""
    return network.get_submodule(base_path(network))


def base_path(network: Any) -> str:
    """Return the name of that part within the model.

    Where the base model is but a shell around one other (OPT's), or not under its name (Llama 4's), it is what holds
    the embedding.
    """
    prefix = str(network.base_model_prefix)
    if len(getattr(network._modules.get(prefix), "_modules", ())) > 1:
        return prefix
    embedding = network.get_input_embeddings()
    return next(name for name, module in network.named_modules() if module is embedding).rpartition(".")[0]
