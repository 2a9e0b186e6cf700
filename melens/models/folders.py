"""What lies at a path that should be a model: told before a library is imported that could load it.

Whatever is not a transformers model is named, with what to give instead.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from melens.environment.conf import conf_folder
from melens.errors import MelensError

__all__ = ["checkpoint_folders", "find_model", "local_model", "read_json", "refuse_adapter", "step_of"]

_STEP = re.compile(r"(?:^|[-_./])(?:global[-_]?)?(?:steps?|checkpoint|ckpt|iter)[-_]?(\d+)(?![\d.])", re.IGNORECASE)


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


def step_of(name: str) -> int | None:
    """Read the step out of a name: 1000 of `step1000`, `checkpoint-1000`, `stage1-step1000-tokens3B`, `iter_0001000`.

    A name of digits alone is a step. None where no step is named, or two different ones.
    """
    if name.isdecimal() and len(name) < 13:  # longer ones may be commits
        return int(name)
    steps = {int(step) for step in _STEP.findall(name)}
    return steps.pop() if len(steps) == 1 else None


def checkpoint_folders(path: str) -> list[str]:
    """List the subfolders of a training's folder whose name has a step: `checkpoint-100` of transformers' Trainer.

    A folder that is a model itself has none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return []
    return sorted(place.name for place in folder.iterdir() if place.is_dir() and step_of(place.name) is not None)


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
    ("checkpoint-*", "checkpoints of a training. Give one of them, {file}, or all of them to exp=dynamics"),
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
