"""A transformers model from a checkpoint that fills it.

transformers gives random values to the weights that a checkpoint lacks, and says so in a log alone. TransformerLens's
`boot_transformers` runs `pip install torchvision` where a multimodal model comes without a processor. So the model is
loaded here, and put into a bridge by `build_bridge_from_module`, which installs nothing:

1. Lay the model out on the meta device, which reads the headers of the checkpoint alone.
2. Refuse it where a weight is missing or has another shape; warn where the checkpoint holds more than the model uses.
3. Load it, and check again: a quantised model cannot be laid out first.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformer_lens.model_bridge.sources.transformers.helpers import get_hf_model_class_for_architecture
from transformer_lens.utilities.multi_gpu import find_misplaced_modules
from transformers import PreTrainedConfig, PreTrainedModel

from melens.errors import MelensError
from melens.models.gates import GATE_FILE, is_of_gate
from melens.models.quantization import is_quantized, quantization_of
from melens.models.sources import Source, explain, in_short

__all__ = ["damaged_file", "load_network"]


def load_network(
    source: Source,
    config: PreTrainedConfig,
    architecture: str,
    *,
    dtype: torch.dtype,
    device_map: str | dict[str, Any],
    max_memory: dict[int | str, int] | None = None,
    offload_folder: str | None = None,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a transformers model with eager attention, all of whose weights are the checkpoint's.

    Args:
        source, config, dtype: of the model.
        architecture: TransformerLens's name of it.
        device_map, max_memory, offload_folder: as transformers takes them; `{"": device}` for one device.
        quantization: transformers' config of how a plain checkpoint is to be quantised; None: not at all.

    Raises:
        MelensError: a checkpoint that cannot be read, lacks weights or has them in other shapes, or a device map that a
            bridge does not run on.
    """
    options = {"config": config, "dtype": dtype, "attn_implementation": "eager"} | source.options
    cfg = build_bridge_config_from_hf(config, architecture, source.path, dtype)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
    adapter.prepare_loading(source.path, options)
    kind = get_hf_model_class_for_architecture(architecture)
    if source.gguf_file is not None:
        # before transformers 5.24 a GGUF gives plain weights alone, and there is nothing to ask
        quantization = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
    elif quantization_of(config) is None:  # a quantiser may need the device
        _load(kind, source, {"": "meta"}, copy.deepcopy(options))
    if quantization is not None:
        options["quantization_config"] = quantization
    network = _load(kind, source, device_map, options | {"max_memory": max_memory, "offload_folder": offload_folder})
    _check_placement(network, is_stateful=bool(getattr(adapter.cfg, "is_stateful", False)))
    return network


_UNREADABLE = (SafetensorError, UnpicklingError, json.JSONDecodeError, EOFError, LookupError, TypeError, AttributeError)
"""What the readers of weights raise for files that are cut off, or no such files."""


def _load(kind: Any, source: Source, device_map: str | dict[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    network: PreTrainedModel
    is_layout = device_map == {"": "meta"}
    try:
        network, info = kind.from_pretrained(
            source.path, device_map=device_map, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except _UNREADABLE as error:
        raise MelensError(_why_unreadable(source, error)) from error
    except RuntimeError as error:
        if "conversion of the weights" in str(error):
            raise MelensError(
                f"The weights in {source.name} do not fill the model that its config.json describes, because some are "
                "missing or have other shapes. Fetch or save the checkpoint again."
            ) from error
        if not is_layout:  # what only reads headers needs no memory
            raise
        raise MelensError(_why_unreadable(source, error)) from error
    except (OSError, ValueError, ImportError) as error:
        raise MelensError(explain(source.name, error)) from error
    if source.file(GATE_FILE) is not None:  # which a checkpoint of a training has among its weights as well
        info["unexpected_keys"] = {name for name in info["unexpected_keys"] if not is_of_gate(name)}
    _check_weights(network, info, source.name, warn=not is_layout)
    return network


def _why_unreadable(source: Source, error: BaseException) -> str:
    """Name the file that is damaged, if there is one, and what is wrong with it."""
    file, reason = damaged_file(Path(source.path)) or (source.name, in_short(error))
    return f"The weights in {file} cannot be read ({reason}). Fetch or save them again."


def damaged_file(folder: Path) -> tuple[Path, str] | None:
    """Return the first file of weights whose header cannot be read, and why; None where all can."""
    for file, read in ((file, read) for pattern, read in _HEADERS.items() for file in sorted(folder.glob(pattern))):
        try:
            read(file)
        except Exception as error:  # of JSON, pickles, zip archives, or whatever else the file seems to be
            return file, in_short(error) if isinstance(
                error, SafetensorError
            ) else "it ends early or has another format"
    return None


_HEADERS: dict[str, Callable[[Path], Any]] = {
    "*.index.json": lambda file: dict(json.loads(file.read_text("utf-8"))["weight_map"]),
    "*.safetensors": lambda file: safe_open(file, framework="pt").__enter__(),
    "*model*.bin": lambda file: torch.load(file, map_location="meta", weights_only=True),  # no training_args.bin
}
"""What reads the headers of a file of weights, by its name."""


def _check_weights(network: PreTrainedModel, info: dict[str, Any], path: str, *, warn: bool) -> None:
    """Compare what a checkpoint holds with what its model needs; transformers has taken out tied and ignorable keys."""
    made_anew = {name for name, buffer in network.named_buffers() if not buffer.is_floating_point()}
    missing = sorted(set(info["missing_keys"]) - made_anew)  # without masks and indices
    shapes = sorted(f"{name} ({list(found)} for {list(wanted)})" for name, found, wanted in info["mismatched_keys"])
    parts = [f"{len(missing)} weights are missing ({_first(missing)})"] if missing else []
    parts += [f"{len(shapes)} have other shapes ({_first(shapes)})"] if shapes else []
    if parts:
        kind = type(network).__name__
        saved_as = next(iter(network.config.architectures or ()), kind)
        of_other = f" (it was saved as a {saved_as})" if saved_as != kind else ""
        message = (
            f"{path} does not hold the {kind} that its config.json describes{of_other}: "
            f"{' and '.join(parts)}. Fetch or save the checkpoint again, or correct its config.json."
        )
        if not is_quantized(network):
            raise MelensError(message)
        warnings.warn(message, stacklevel=2)  # a quantiser makes weights under names that no checkpoint has
    # No reason to refuse: sound checkpoints hold layers that predict further tokens, value heads, old masks.
    if warn and (more := sorted(info["unexpected_keys"])):
        warnings.warn(
            f"{path} holds {len(more)} weights that the model of its config.json does not use ({_first(more)}). The "
            "model is measured without them.",
            stacklevel=2,
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_placement(network: PreTrainedModel, *, is_stateful: bool) -> None:
    """Raise for a distribution over devices that TransformerLens refuses in its own loading."""
    devices = set(getattr(network, "hf_device_map", {}).values())
    if is_stateful and len(devices) > 1:
        raise MelensError("A state-space model must be on one device. Set model.device in place of a device map.")
    if misplaced := find_misplaced_modules(network):
        module, wanted, found = misplaced[0]
        raise MelensError(
            f"model.device_map puts {module} on {wanted}, but its weights, shared with another module, are on {found}. "
            "Put both modules on one device."
        )
