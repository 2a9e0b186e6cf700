"""What a training from scratch has besides: packed text, rows to inspect it on, and a loss on text held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor

from melens.errors import MelensError
from melens.masks.mask import WeMask
from melens.training.packing import PackedText, TextSource, packed_text
from melens.training.plan import TrainingPlan

__all__ = ["rows_to_inspect", "source_of", "text_of", "validation_losses"]

_MOST_ROWS = 1_024
"""Rows of a validation loss: at 512 tokens an interval over rows of a hundredth of a nat."""


def source_of(plan: TrainingPlan) -> TextSource:
    """Return where a plan's documents come from."""
    return TextSource(plan.dataset, plan.split, _column(plan))


def _column(plan: TrainingPlan) -> str:
    return plan.columns.get("text", "text")


def text_of(plan: TrainingPlan, tokenizer: Any) -> PackedText:
    """Return a plan's text in rows; errors as `packed_text`."""
    if plan.recipe.max_length is None:
        raise MelensError("training.max_length is null; set it to the length of a row in tokens.")
    own = None if plan.validation is None else TextSource(plan.validation, plan.split, _column(plan))
    length = plan.recipe.max_length
    return packed_text(source_of(plan), tokenizer, length=length, held_out=plan.held_out, validation=own)


def rows_to_inspect(rows: Dataset, n_rows: int) -> list[Int[Tensor, " pos"]]:
    """Choose rows with different first tokens, as rows that share it share token 0's every state."""
    chosen: dict[int, Tensor] = {}
    for row in rows.with_format("numpy"):
        chosen.setdefault(int(row["input_ids"][0]), torch.from_numpy(np.array(row["input_ids"])).long())
        if len(chosen) == n_rows:
            break
    return list(chosen.values())


@torch.no_grad()
def validation_losses(
    model: Any, rows: Dataset, masks: Sequence[WeMask | None], *, rows_per_batch: int, mixed: bool
) -> pd.DataFrame:
    """Measure the loss on rows that are held out, without a mask and with it.

    Args:
        model: a transformers model.
        rows: the first 1,024 are taken, the same for every model.
        masks: None for none, or settled on the model.
        rows_per_batch: of a forward pass.
        mixed: compute in bfloat16 where that is safe, as in training.

    Returns:
        The columns `row`, `tokens` (a hash of the row's), `masked` and `loss`, in nats a token, mean over the row.
    """
    model.eval()
    device = model.device
    ids = torch.from_numpy(np.array(rows.with_format("numpy")[:_MOST_ROWS]["input_ids"])).long()
    hashes = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in ids]
    measured = []
    for mask in masks:
        losses = []
        with nullcontext() if mask is None else mask.applied(model):
            for batch in ids.split(rows_per_batch):
                with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                    logits = model(input_ids=batch.to(device), use_cache=False).logits[:, :-1]
                wanted = batch[:, 1:].to(device)
                loss = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none")
                losses.append(loss.mean(1).cpu())
        rows_of = {"row": range(len(ids)), "tokens": hashes, "masked": mask is not None, "loss": torch.cat(losses)}
        measured.append(pd.DataFrame(rows_of))
    return pd.concat(measured, ignore_index=True)
