"""What lies at a path that should be a model: told before a library is imported that could load it.

Whatever is not a transformers model is named, with what to give instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from melens.environment.conf import conf_folder
from melens.errors import MelensError

__all__ = ["find_model", "local_model", "read_json", "refuse_adapter"]


def find_model(path: str) -> Path | None:
    """Return where a model is, a folder or a GGUF file; None for what looks like a hub id.

    Raises:
        MelensError: nothing is there, or no model: a file of weights alone, an adapter, a folder of another format.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _checked_file(place)
    if place.is_dir():
        if not (place / "config.json").is_file():
            refuse_adapter(str(place), place / "adapter_config.json")
            raise MelensError(_why_no_model(place))
        return place
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise MelensError(f"There is no folder {place}.")
    return None


def local_model(name: str) -> Path | None:
    """Return where a model that was loaded by this name lies on this machine; None of a preset or the hub's."""
    place = Path(name).expanduser()
    is_preset = conf_folder("model").joinpath(f"{name}.yaml").is_file()
    return place.resolve() if place.exists() and not is_preset else None


def refuse_adapter(path: str, file: Path) -> None:
    """Raise for PEFT's adapter, with which transformers would load a base model that nobody asked for."""
    if not file.is_file():
        return
    content = read_json(file)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    raise MelensError(
        f"{path} holds an adapter for {base or 'a base model that it does not name'}, not a model. Merge the "
        "two with PEFT's merge_and_unload(), save the merged model, and give its folder."
    )


def read_json(file: Path) -> Any:
    """Return what a file holds, or the error of reading it."""
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        return error


def _checked_file(file: Path) -> Path:
    if file.suffix == ".gguf":
        return file
    if (folder := file.parent.resolve()).joinpath("config.json").is_file():
        raise MelensError(f"{file} is a single file. Give the folder that holds the model, {folder}.")
    raise MelensError(f"{file} has no config.json beside it. Give the folder of a transformers model, or a .gguf file.")


_OTHER_FORMATS = (
    ("*.gguf", "GGUF files. Give one of them, {file}"),
    ("checkpoint-*", "checkpoints of a training. Give one of them, {file}"),
    ("*/config.json", "a model in a folder inside it. Give {parent}"),
    ("*.distcp", "a sharded checkpoint of FSDP. Join it with `accelerate merge-weights`, and add the config.json"),
    ("*.safetensors* pytorch_model*.bin", "weights. Add the config.json of their model"),
    ("params.json", "a model in its makers' own format (params.json). Convert it to that of transformers first"),
    ("*.pth *.pt", "a model in PyTorch's or TransformerLens's format. Save it as a transformers model first"),
    ("model_index.json", "a pipeline of diffusers, which is not a language model"),
    ("*.onnx", "an ONNX model. Give the transformers model that it was made from"),
)
"""By the files in a folder, what it holds instead of a transformers model, and what to do."""


def _why_no_model(folder: Path) -> str:
    for patterns, what in _OTHER_FORMATS:
        if found := sorted(file for pattern in patterns.split() for file in folder.glob(pattern)):
            hint = what.format(file=found[-1], parent=found[-1].parent)
            return f"The folder {folder} has no config.json, but {hint}."
    return f"The folder {folder} holds no transformers model (it has no config.json)."
