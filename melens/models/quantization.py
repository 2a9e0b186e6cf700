"""Models whose weights are kept in few bits: which of them run here, and what of melens holds for them.

What is measured is the quantised model. Linear layers alone are quantised: norms, and with them the gains that a mask
chooses by, are as in the plain model, while what is read out of linear layers' weights has no meaning. transformers
says what a checkpoint's kind of quantisation needs, and is asked before any weight is read.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformer_lens.model_bridge.generalized_components import JointGateUpMLPBridge, JointQKVAttentionBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from melens.errors import MelensError
from melens.models.specs import Quantize

__all__ = [
    "bits_of", "check_quantization", "describe_quantization", "is_quantized", "kind_of", "mixes_rows",
    "quantization_of", "quantized_while_loading", "refuse_joint_projections", "share_quantized_layers",
]  # fmt: skip

_UNNAMED = "an unnamed method"

_PACKAGES = {
    "aqlm": "aqlm[gpu,cpu]", "auto-round": "auto-round", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors", "fbgemm_fp8": "fbgemm-gpu", "fp_quant": "fp_quant",
    "gptq": "gptqmodel optimum", "hqq": "hqq", "quanto": "optimum-quanto", "quark": "amd-quark", "sinq": "sinq",
    "spqr": "spqr_quant[gpu]", "torchao": "torchao", "vptq": "vptq",
}  # fmt: skip
"""What to install for a kind of quantisation; of others transformers' own words say it."""

_OF_WEIGHTS_ALONE = frozenset({"awq", "bitsandbytes_4bit", "gptq", "hqq", "mxfp4"})
"""Kinds that leave activations alone. Others may round a token's by those of other rows: LLM.int8() by all outliers."""


# --- What a config says -----------------------------------------------------------------------------------------------


def quantization_of(config: Any) -> dict[str, Any] | None:
    """Return what a model's config says of its quantisation, None for a plain checkpoint."""
    for each in (config, config.get_text_config(decoder=True)):
        settings = getattr(each, "quantization_config", None)
        if settings is not None:
            return dict(settings) if isinstance(settings, Mapping) else dict(settings.to_dict())
    return None


def quantized_while_loading(quantize: Quantize, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return bitsandbytes' options for a plain checkpoint."""
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_quantization(name: str, settings: Any, device_map: Any, *, is_of_checkpoint: bool) -> None:
    """Ask transformers whether a kind of quantisation runs here.

    Args:
        name: of the model.
        settings: transformers' config of it, or what config.json holds.
        device_map: where the model is to be put.
        is_of_checkpoint: whether the checkpoint is quantised, rather than to be.

    Raises:
        MelensError: a kind that transformers does not know, a package that is missing (with the command that installs
            it), or a device that cannot do it.
    """
    kind = kind_of(settings)
    quantized = f"{name} {'is' if is_of_checkpoint else 'would be'} quantised with {kind.partition('_')[0]}"
    if kind == _UNNAMED or (
        isinstance(settings, Mapping) and not AutoHfQuantizer.supports_quant_method(dict(settings))
    ):
        raise MelensError(f"{quantized}, which transformers {transformers.__version__} does not know.")
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=is_of_checkpoint)
        quantizer.validate_environment(device_map=device_map, weights_only=True)
    except ImportError as error:
        packages = _PACKAGES.get(kind.removesuffix("_8bit").removesuffix("_4bit"))
        if packages is None:
            raise MelensError(f"{quantized}, for which something is missing: {_first_sentence(error)}") from error
        install = f"pip install {packages} torch=={torch.__version__}"  # pip would take another torch
        raise MelensError(f"{quantized}, which needs a package that is not installed. Run `{install}`.") from error
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise MelensError(f"{quantized}, which does not run here: {_first_sentence(error)}") from error


def bits_of(settings: Any) -> int:
    """Return the bits of a quantised weight, at least as far as the settings say: 4 where they do not."""
    kind, settings = kind_of(settings), settings if isinstance(settings, Mapping) else settings.to_dict()
    bits = settings.get("bits") or settings.get("w_bit") or settings.get("nbits")
    return int(bits) if isinstance(bits, int) else 8 if "8" in kind else 4


def kind_of(settings: Any) -> str:
    """Name the kind of quantisation; of bitsandbytes with the bits, as transformers does."""
    settings = settings if isinstance(settings, Mapping) else settings.to_dict()
    kind = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method", _UNNAMED)))
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return f"bitsandbytes_{'4' if settings.get('load_in_4bit') else '8'}bit"
    return kind


def _first_sentence(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return words.partition(". ")[0].rstrip(".") + "."


def refuse_joint_projections(name: str, mapping: Mapping[str, Any]) -> None:
    """Raise for a quantised model whose queries, keys and values, or gate and up, are one matrix.

    TransformerLens splits such a matrix when it puts its bridge in, which packed weights do not allow. `mapping` holds
    its components by name.
    """
    joint = (JointQKVAttentionBridge, JointGateUpMLPBridge)
    waiting: list[GeneralizedComponent] = [part for part in mapping.values() if isinstance(part, GeneralizedComponent)]
    for part in waiting:
        if isinstance(part, joint):
            what = "queries, keys and values" if isinstance(part, JointQKVAttentionBridge) else "gate and up"
            raise MelensError(
                f"{name} holds {what} in one quantised matrix ({part.name}), which TransformerLens cannot split. Load "
                "the model without quantisation."
            )
        waiting += part.submodules.values()


# --- What is loaded ---------------------------------------------------------------------------------------------------


def is_quantized(network: Any) -> bool:
    """Tell whether a transformers model computes with quantised weights: one may be dequantised as it is loaded."""
    quantizer = getattr(network, "hf_quantizer", None)
    return quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False)


def describe_quantization(network: Any) -> str | None:
    """Name the quantisation that a transformers model computes with, None for a plain one."""
    return kind_of(network.hf_quantizer.quantization_config) if is_quantized(network) else None


def mixes_rows(network: Any) -> bool:
    """Tell whether the rows of a batch may change each other's numbers, by how activations are rounded."""
    return is_quantized(network) and describe_quantization(network) not in _OF_WEIGHTS_ALONE


def share_quantized_layers(twin: nn.Module, network: Any) -> set[str]:
    """Put a model's quantised layers, perhaps in a bridge, into its plain twin without hooks; return their names."""
    shared: set[str] = set()
    if not is_quantized(network):
        return shared
    plain = dict(twin.named_modules())
    for path, module in network.named_modules():
        name = ".".join(part for part in path.split(".") if part != "_original_component")
        if name in plain and not isinstance(module, GeneralizedComponent) and _is_quantized(module, plain[name]):
            twin.set_submodule(name, _without_hooks(module))
            shared.add(name)
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(network, attribute):
            setattr(twin, attribute, getattr(network, attribute))
    return shared


def _is_quantized(module: nn.Module, plain: nn.Module) -> bool:
    """Tell whether a layer is kept otherwise than its class makes it."""
    own, usual = _tensors(module), _tensors(plain)
    return bool(own) and (type(module) is not type(plain) or own != usual)


def _tensors(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a layer's own weights and of what is saved with them."""
    return {
        name: tensor.shape
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if name not in module._non_persistent_buffers_set
    }


def _without_hooks(layer: nn.Module) -> nn.Module:
    """Return another module on the same weights, which neither the bridge's hooks nor accelerate's see."""
    twin = copy.copy(layer)
    own = vars(twin)
    for name in ("_parameters", "_buffers", "_modules"):
        own[name] = dict(own[name])
    for name in [name for name in own if name.startswith(("_forward_", "_backward_")) and "hooks" in name]:
        own[name] = OrderedDict()
    if own.pop("_hf_hook", None) is not None:
        own.pop("forward", None)
        own.pop("_old_forward", None)
    return twin
