"""Save a trained model as a transformers folder, with its mask and its gates beside the weights."""

from __future__ import annotations

import json
import warnings
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from melens.masks.mask import WeMask
from melens.models.attention_kinds import mark_saved
from melens.models.gates import is_of_gate, save_gates
from melens.models.twins import gathered_twin
from melens.storage.files import atomic_folder

__all__ = ["save_trained"]

_RECORD = "training.json"


def save_trained(model: Any, tokenizer: Any, folder: Path, *, mask: WeMask | None, record: dict[str, Any]) -> Path:
    """Write a model that `load_model` reads: weights, tokenizer, `wemask.json` if masked, `gate.safetensors` if gated.

    The folder is written completely or not at all. It replaces that of an earlier training; anything else in its place
    is moved aside. All processes must call this; the first one writes.

    Args:
        model, tokenizer: the model as `train` returns it.
        folder: to make.
        mask: that it was trained with.
        record: what `training.json` says of the training.

    Raises:
        MelensError: the weights gathered from several processes do not fill the model that the mask is for.
    """
    sharded = any(isinstance(weight, DTensor) for weight in model.parameters())
    accelerator = Accelerator()
    weights = accelerator.get_state_dict(model) if sharded else model.state_dict()
    if accelerator.is_main_process:
        of_gates = {name: weight for name, weight in weights.items() if is_of_gate(name)}
        _put_aside(folder)
        with atomic_folder(folder, replace=True) as partial:
            model.save_pretrained(partial, state_dict={name: w for name, w in weights.items() if name not in of_gates})
            mark_saved(partial, model.config)
            tokenizer.save_pretrained(partial)
            if of_gates:
                save_gates(of_gates, partial)
            if mask is not None:
                mask.moved_to(gathered_twin(model, weights) if sharded else model).save(partial)
            (partial / _RECORD).write_text(json.dumps(record, indent=2, default=str), "utf-8")
    accelerator.wait_for_everyone()
    return folder


def _put_aside(folder: Path) -> None:
    """Move what no training wrote aside: it is not ours, and hours of training should not be lost over it."""
    if folder.exists() and not (folder / _RECORD).is_file():
        aside = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
        folder.rename(aside)
        warnings.warn(f"{folder} held something other than a trained model; it was moved to {aside}.", stacklevel=2)
