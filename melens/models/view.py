"""One view of a `TransformerBridge` and of a plain transformers model: their blocks, and where a mask takes hold.

Where a plain model keeps its blocks, norms and attention is read from TransformerLens's adapter of its architecture.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformer_lens.utilities.multi_gpu import count_unique_devices

from melens.errors import MelensError
from melens.models.adapters import register_adapters
from melens.models.devices import dispatch_like, has_all_weights, input_device, is_dispatched, weights_here
from melens.models.gates import attach_gates, gates_of, is_of_gate
from melens.models.hybrids import HYBRIDS, parts_of
from melens.models.kv_cache import find_cache_by_any_name
from melens.models.layout import attends
from melens.models.normalization import read_module
from melens.models.quantization import is_quantized, share_quantized_layers

__all__ = [
    "Block",
    "ModelView",
    "base_of",
    "base_path",
    "bridge_around",
    "bridged_twin",
    "gathered_twin",
    "is_whole",
    "plain_twin",
    "twin_of",
    "view_model",
]

register_adapters()

_SKETCH = 8
"""Numbers that a weight is told by: one pair in ten million looks a tenth as far apart as it is, or less."""


@dataclass(frozen=True)
class Block:
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


@dataclass(frozen=True)
class ModelView:
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
        """Return a few random projections of the weight of each block's `ln1`: enough to tell models apart.

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


@cache
def _projections(d_model: int) -> Float[Tensor, "d sketch"]:
    """Return random directions, scaled so that a sketch is about as long as the weight's root mean square."""
    drawn = np.random.RandomState(0).standard_normal((d_model, _SKETCH))  # the one generator that numpy never changes
    return torch.from_numpy(drawn / math.sqrt(d_model * _SKETCH))


def plain_twin(bridge: TransformerBridge) -> Any:
    """Return the transformers model inside a bridge without the bridge: the same weights, its own fast modules.

    A model that is spread over devices has a twin that is spread alike; one that cannot be taken apart so comes as it
    is inside the bridge.
    """
    network = bridge.original_model
    try:
        twin = twin_of(network, "sdpa")
    except ValueError:  # an architecture without it
        twin = twin_of(network, "eager")
    if twin is None:
        return network
    if _has_gates(network):
        attach_gates(_of_plain(twin, twin.config), gates_of(_of_bridge(bridge)))
    if network.can_generate():
        twin.generation_config = copy.deepcopy(network.generation_config)
        twin.generation_config.return_dict_in_generate = False  # which the bridge asks for, as the attention below
    return twin.eval()


def is_whole(model: nn.Module) -> bool:
    """Tell whether all weights of a model are in memory in full: not offloaded, nor sharded over processes."""
    return all(map(_is_here, model.parameters()))


def bridged_twin(model: Any, name: str) -> TransformerBridge:
    """Return a bridge around a twin of a transformers model, on the same weights: to look at a model in training.

    Weights with adapters (PEFT's) on them are copied and merged; the model's own stay as they are.

    Raises:
        MelensError: weights that are not here in full, or do not fill a model of its class.
    """
    twin = twin_of(model, "eager")
    if twin is None:
        raise MelensError("This model's weights are sharded or not its own, so it cannot be looked into.")
    bridge = bridge_around(twin, name)
    if _has_gates(model):
        attach_gates(_of_bridge(bridge), gates_of(_of_plain(model, model.config)))
    return bridge


def _has_gates(model: nn.Module) -> bool:
    """Tell whether a model has gates; one without attention cannot, nor can it be opened to look for them."""
    return any(is_of_gate(name) for name, _ in model.named_modules())


def bridge_around(network: Any, name: str, architecture: str | None = None) -> TransformerBridge:
    """Build a bridge without a tokenizer into a transformers model in memory, whose modules are the bridge's then.

    Args:
        network: the model.
        name: what to call it.
        architecture: as TransformerLens names it; by default the model's class.

    Raises:
        MelensError: TransformerLens describes the architecture otherwise than the model is built.
    """
    architecture, device = architecture or type(network).__name__, input_device(network)
    try:
        bridge = build_bridge_from_module(
            network, architecture, hf_config=network.config, model_name=name, device=device
        )
    except MelensError:
        raise
    except Exception as error:  # whatever one of TransformerLens's hundred adapters makes of a model it did not expect
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise MelensError(f"TransformerLens cannot put its bridge into {name} ({architecture}): {reason}") from error
    bridge.cfg.n_devices = count_unique_devices(network)
    find_cache_by_any_name(bridge)
    return bridge.eval()


def gathered_twin(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return a model of the class of one whose weights are sharded, on its gathered weights.

    Raises:
        MelensError: weights that do not fill a model of its class.
    """
    twin = twin_of(model, "eager", weights)
    if twin is None:
        raise MelensError(f"The weights gathered from all processes do not fill a {type(model).__name__}.")
    return twin


def twin_of(network: Any, attention: str, weights: Mapping[str, Tensor] | None = None) -> Any:
    """Make a model of the same class on the same weights, or on others; None where they do not fill it.

    Its own weights stay on the devices, in memory or on disk where they are.
    """
    if weights is None and any(map(_is_sharded, network.parameters())):
        return None
    config = copy.deepcopy(network.config)
    config.output_attentions = False
    with init_empty_weights(include_buffers=False):
        twin = type(network)._from_config(config, attn_implementation=attention)
    names = set(twin.state_dict())
    shared = share_quantized_layers(twin, network)
    wanted = {name for name in names if not _is_in(name, shared)}
    own = {name: weight for name, weight in (weights or _weights_of(network)).items() if name in wanted}
    missing = wanted.intersection(twin.load_state_dict(own, strict=False, assign=True).missing_keys)
    twin.tie_weights()
    if missing:
        return None
    if weights is None and is_dispatched(network):
        dispatch_like(twin, network)
        return twin if has_all_weights(twin) else None
    if not has_all_weights(twin):
        return None
    if weights is None:
        # The weights are there already, and `to` would rearrange bitsandbytes', which the model shares.
        for module in twin.modules():
            module._buffers |= {
                name: buffer.to(network.device) for name, buffer in module._buffers.items() if buffer is not None
            }
    return twin


def _is_in(weight: str, modules: Collection[str]) -> bool:
    """Tell whether a weight's name is that of one in these modules."""
    parts = weight.split(".")
    return any(".".join(parts[:n]) in modules for n in range(1, len(parts)))


def _weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Return weights under the names that a model of the class has: without bridge, gates and adapters."""
    weights = {
        name.replace("_original_component.", "").replace(".base_layer.", "."): weight
        for name, weight in _state_of(network)
        if not is_of_gate(name)
    }
    for name, module in network.named_modules():
        if hasattr(module, "get_delta_weight") and not module.merged:  # PEFT's
            weight = f"{name}.weight"
            for adapter in module.active_adapters:
                weights[weight] = weights[weight] + module.get_delta_weight(adapter).to(weights[weight])
    return weights


def _state_of(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Return all that a state dict would hold; to make one rearranges bitsandbytes' weights, and not quite back."""
    if not is_quantized(network):
        return network.state_dict().items()
    tensors = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
    return ((name, tensor.detach()) for name, tensor in tensors)


def _is_here(weight: Tensor) -> bool:
    """Tell whether a weight is in memory in full: not offloaded, nor sharded over processes."""
    return not (weight.is_meta or _is_sharded(weight))


def _is_sharded(weight: Tensor) -> bool:
    return isinstance(weight, DTensor) or weight.numel() == 0


def view_model(model: Any) -> ModelView:
    """Look into a bridge or a transformers model, also one in a wrapper for data parallelism, compilation or adapters.

    Raises:
        MelensError: neither of them, or an architecture that TransformerLens does not know.
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
    for block in getattr(model, "blocks", ()):
        parts = {name: getattr(block, name, None) for name in ("ln1", "attn")}
        ln1 = None if _is_post_norm(model.original_model.config) else getattr(parts["ln1"], "original_component", None)
        attention = getattr(parts["attn"], "original_component", None)
        query, output = (getattr(getattr(parts["attn"], name, None), "original_component", None) for name in ("q", "o"))
        if query is None:
            query = getattr(getattr(parts["attn"], "qkv", None), "original_component", None)
        name = getattr(parts["ln1"], "name", "") or ""
        is_shared = _is_ln1_shared(block._modules, model.original_model.config)
        entries = {"resid_pre": getattr(block, "hook_resid_pre", block.hook_in)}
        if parts["ln1"] is not None:
            entries |= {"ln1_in": parts["ln1"].hook_in, "attn_in": parts["ln1"].hook_out}
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
        attention = _part(module, names["attn"])
        query, joint, output = (_part(attention, names[part]) for part in ("q", "qkv", "o"))
        query = joint if query is None else query
        present = [
            part
            for part, component in submodules.items()
            if component.name is None or _part(module, component.name) is not None
        ]
        ln1, name = _part(module, names["ln1"]), names["ln1"] or ""
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


def _part(block: nn.Module | None, name: str | None) -> nn.Module | None:
    try:
        return None if name is None or block is None else block.get_submodule(name)
    except AttributeError:  # a block of another kind in a hybrid model
        return None


def _checked(
    model: Any, blocks: tuple[Block, ...], architecture: str, d_model: int, bridge: TransformerBridge | None
) -> ModelView:
    is_decoder = not getattr(model.config, "is_encoder_decoder", False)
    if not is_decoder or not any(block.attention is not None for block in blocks):
        if is_decoder and attends(model):
            bridged_before = "; melens.load_model does" if architecture in HYBRIDS else ", so it cannot be masked"
            raise MelensError(f"TransformerLens does not tell {architecture}'s attention apart{bridged_before}.")
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
