"""A model as its config describes it, without weights: what is known of it before any is read."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from typing import Any

import psutil
import torch
import transformers
from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES, ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config
from transformer_lens.model_bridge.sources.transformers.helpers import get_hf_model_class_for_architecture
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig

from melens.errors import MelensError
from melens.models.quantization import Quantize, bits_of, quantization_of, refuse_joint_projections
from melens.models.sources import in_short

__all__ = ["Skeleton", "by_place"]


class Skeleton:
    """A model on the meta device; its `architecture` is TransformerLens's name.

    Raises:
        MelensError: an architecture that TransformerLens does not support, or a config that its class does not take.
    """

    def __init__(self, config: PreTrainedConfig, name: str, *, trust_remote_code: bool = False) -> None:
        self.name, self.config = name, config
        self.architecture = _architecture(config, name)
        _check_pad_id(config, name)
        kind = get_hf_model_class_for_architecture(self.architecture)
        plain = copy.deepcopy(config)
        if hasattr(plain, "quantization_config"):
            del plain.quantization_config
        options = {"trust_remote_code": trust_remote_code, "attn_implementation": "eager"}
        try:
            with torch.device("meta"):
                self.network: Any = kind.from_config(plain, **options)
        except ImportError:
            raise
        except Exception as error:  # whatever a class of transformers, or of the checkpoint's, makes of the config
            raise MelensError(
                f"transformers cannot make a {self.architecture} of the config of {name}: {in_short(error)}."
            ) from error

    def check(self, quantize: Quantize | None = None) -> Any:
        """Return the bridge's config, if TransformerLens puts its bridge in and melens can measure there.

        Raises:
            MelensError: an encoder, an encoder and decoder, a model of images or sound, one without blocks, or one that
                is quantised, or to be, with joint projections.
        """
        config, what = self.network.config, f"{self.name} ({self.architecture})"
        if getattr(config, "is_encoder_decoder", False):
            raise MelensError(f"{what} is an encoder with a decoder. {_MEASURED}")
        if self.network.main_input_name != "input_ids":
            raise MelensError(f"{what} reads no text. {_MEASURED}")
        is_for_gaps = type(config) in MODEL_FOR_MASKED_LM_MAPPING  # trained with every token in sight
        if is_for_gaps and getattr(config, "is_decoder", False) is False:
            raise MelensError(f"{what} is an encoder, whose tokens see those behind them. {_MEASURED}")
        dtype = next(self.network.parameters()).dtype
        cfg = build_bridge_config_from_hf(config, self.architecture, self.name, dtype)
        mapping: Any = ArchitectureAdapterFactory.select_architecture_adapter(cfg).get_component_mapping()
        if "blocks" not in mapping:
            raise MelensError(f"TransformerLens gives {what} no blocks, so there is nothing to measure at.")
        if quantize is not None or quantization_of(self.config) is not None:
            refuse_joint_projections(self.name, mapping)
        return cfg

    # --- Memory -------------------------------------------------------------------------------------------------------

    def n_bytes(self, bytes_per_weight: float | int, settings: Any = None) -> float:
        """Return what the weights take; `settings` say how linear layers but the head are quantised, None for not."""
        n_weights = sum(weight.numel() for weight in self.network.parameters())
        if settings is None:
            return float(n_weights * bytes_per_weight)
        head = self.network.get_output_embeddings()
        linear = (module for module in self.network.modules() if isinstance(module, nn.Linear) and module is not head)
        n_linear = sum(module.weight.numel() for module in linear)
        return float((n_weights - n_linear) * bytes_per_weight + n_linear * bits_of(settings) / 8)

    def check_memory(
        self, needed: float, purpose: str, device: torch.device, max_memory: Any = None, device_map: Any = None
    ) -> None:
        """Raise a `MelensError` if a model needs more than is free."""
        if max_memory is not None:
            _check_max_memory(max_memory, needed, self.name)
            return
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            return
        if device.type == "cuda":
            devices = range(torch.cuda.device_count()) if device_map is not None else [device]
            free = sum(torch.cuda.mem_get_info(d)[0] for d in devices)
        else:
            free = psutil.virtual_memory().available
        if needed > free:
            raise MelensError(
                f"{self.name} needs {needed / 1e9:.1f} GB for {purpose}, but {device} has {free / 1e9:.1f} GB free. "
                "Choose a smaller dtype, a smaller model or several GPUs, quantise it with model.quantize, or keep a "
                "part elsewhere with model.max_memory."
            )


_MEASURED = "melens measures only decoders of text."


def _architecture(config: PreTrainedConfig, name: str) -> str:
    try:
        architecture = str(determine_architecture_from_hf_config(config))
    except ValueError:
        architecture = str((config.architectures or [config.model_type])[0])
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise MelensError(f"{name} has the architecture {architecture}, which TransformerLens does not support.")
    described = getattr(getattr(transformers, architecture, None), "config_class", None)
    if described is not None and not isinstance(config, described):  # each would be taken for a part of the loading
        raise MelensError(
            f"The config.json of {name} names the architecture {architecture}, but its model_type is "
            f"{config.model_type!r}, that of another architecture. Correct the one that is wrong."
        )
    needed = SUPPORTED_ARCHITECTURES[architecture].required_libraries
    if missing := [library for library in needed if importlib.util.find_spec(library) is None]:
        install = f"pip install {' '.join(missing)} torch=={torch.__version__}"  # pip would take another torch
        raise MelensError(
            f"{name} has the architecture {architecture}, for which TransformerLens needs {' and '.join(missing)}. "
            f"Install it with `{install}`."
        )
    return architecture


def _check_pad_id(config: PreTrainedConfig, name: str) -> None:
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise MelensError(
            f"The config of {name} gives the padding the id {pad}, but its embedding has only {rows} rows. Correct "
            "pad_token_id or vocab_size."
        )


# --- Places -----------------------------------------------------------------------------------------------------------


def _check_max_memory(max_memory: Mapping[Any, Any], needed: float, name: str) -> None:
    """Fill the places as accelerate does, one after the other; the disk takes what is left."""
    for place, limit in by_place(max_memory).items():
        share = min(limit, needed)
        if place != "disk" and share > (free := _free_bytes(place)):
            raise MelensError(
                f"{name} would take {share / 1e9:.1f} GB of {place if place == 'cpu' else f'GPU {place}'}, which has "
                f"{free / 1e9:.1f} GB free. Set model.max_memory.{place} to less; the rest stays on disk."
            )
        needed -= share


def _free_bytes(place: int | str) -> int:
    if isinstance(place, str):
        return int(psutil.virtual_memory().available)
    if place >= torch.cuda.device_count():
        raise MelensError(f"model.max_memory names GPU {place}, but this machine has {torch.cuda.device_count()} GPUs.")
    return int(torch.cuda.mem_get_info(place)[0])


def by_place(max_memory: Mapping[Any, Any]) -> dict[int | str, int]:
    """Return bytes by GPU number, "cpu" and "disk", in accelerate's order: GPUs before the CPU."""
    found: dict[int | str, int] = {
        int(place) if str(place).isdecimal() else str(place): convert_file_size_to_int(limit)
        for place, limit in max_memory.items()
    }
    return dict(sorted(found.items(), key=lambda item: (isinstance(item[0], str), item[0])))
