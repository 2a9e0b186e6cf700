"""The texts of the node `data`, for a model or for its plan: a loss is measured on them."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from experiments.options.schema import Options
from melens.data.texts import cut_texts, read_text
from melens.errors import MelensError

__all__ = ["text_of", "texts_of"]


def text_of(cfg: Options, tokenizer: Any) -> str:
    """Read the text that is asked for; empty for a model without a tokenizer.

    Raises:
        MelensError: a text is given that the model has no tokenizer to read with; or as `read_text`.
    """
    data = cfg.data
    if tokenizer is not None:
        return read_text(data.text, split=data.split, column=data.column)
    if data.text is not None:
        raise MelensError(
            "This model has no tokenizer to read data.text with. Leave data.text out: the loss is then measured on "
            "random tokens."
        )
    return ""


def texts_of(cfg: Options, model: Any) -> Int[Tensor, "text pos"]:
    """Cut that text into pieces of one length; random tokens for a model without a tokenizer.

    Args:
        cfg: all options.
        model: a bridge, or a `melens.models.loading.PlannedModel`.

    Raises:
        MelensError: as `text_of` and `cut_texts`.
    """
    data, text = cfg.data, text_of(cfg, model.tokenizer)
    return cut_texts(model, text, n_texts=data.n_texts, n_tokens=data.n_tokens, bos=cfg.prompts.bos, seed=cfg.seed)
