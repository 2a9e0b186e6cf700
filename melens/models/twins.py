"""From a bridge to a plain transformers model and back, on the same weights: models of their own, to train or to save.

(What `melens.tracing.twin` makes of a bridge lasts for one measurement and is no model to keep.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.utilities.multi_gpu import count_unique_devices

from melens.errors import MelensError
from melens.models.attention_kinds import attend_as_configured, implementation_of
from melens.models.devices import dispatch_like, has_all_weights, input_device, is_dispatched
from melens.models.gates import attach_gates, gates_of, is_of_gate
from melens.models.kv_cache import find_cache_by_any_name
from melens.models.quantization import is_quantized, share_quantized_layers
from melens.models.view import is_sharded, view_model

__all__ = ["bridge_around", "bridged_twin", "gathered_twin", "plain_twin", "twin_of"]


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
        attach_gates(view_model(twin), gates_of(view_model(bridge)))
    if network.can_generate():
        twin.generation_config = copy.deepcopy(network.generation_config)
        twin.generation_config.return_dict_in_generate = False  # which the bridge asks for, as the attention below
    return twin.eval()


def bridged_twin(model: Any, name: str) -> TransformerBridge:
    """Return a bridge around a twin of a transformers model, on the same weights: to look at a model in training.

    Weights with adapters (PEFT's) on them are copied and merged; the model's own stay as they are.

    Raises:
        MelensError: weights that are not here in full, or do not fill a model of its class.
    """
    twin = twin_of(model, "eager")
    if twin is None:
        raise MelensError("This model's weights are sharded or not its own, so it cannot be traced.")
    bridge = bridge_around(twin, name)
    if _has_gates(model):
        attach_gates(view_model(bridge), gates_of(view_model(model)))
    return bridge


def _has_gates(model: nn.Module) -> bool:
    """Tell whether a model has gates; one without attention cannot, nor can it be opened to look for them."""
    return any(is_of_gate(name) for name, _ in model.named_modules())


def bridge_around(network: Any, name: str, architecture: str | None = None) -> TransformerBridge:
    """Build a bridge without a tokenizer into a transformers model in memory, whose modules are the bridge's then.

    Args:
        name: what to call it.
        architecture: as TransformerLens names it; by default the model's class.

    Raises:
        MelensError: TransformerLens describes the architecture otherwise than the model is built.
    """
    architecture, device = architecture or type(network).__name__, input_device(network)
    try:
        config = network.config
        bridge = build_bridge_from_module(network, architecture, hf_config=config, model_name=name, device=device)
    except MelensError:
        raise
    except Exception as error:  # whatever one of TransformerLens's hundred adapters makes of a model it did not expect
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise MelensError(f"TransformerLens cannot put its bridge into {name} ({architecture}): {reason}") from error
    bridge.cfg.n_devices = count_unique_devices(network)
    attend_as_configured(bridge)
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
    if weights is None and any(map(is_sharded, network.parameters())):
        return None
    config = copy.deepcopy(network.config)
    config.output_attentions = False
    with init_empty_weights(include_buffers=False):
        twin = type(network)._from_config(config, attn_implementation=implementation_of(config, attention))
    names = set(twin.state_dict())
    shared = share_quantized_layers(twin, network)
    wanted = {name for name in names if not name.startswith(tuple(f"{module}." for module in shared))}
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
            own = module._buffers
            own |= {name: buffer.to(network.device) for name, buffer in own.items() if buffer is not None}
    return twin


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
