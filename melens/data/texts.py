"""Texts of one length, to measure a loss on: by default what every machine has, Python's own documentation topics."""

from __future__ import annotations

import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from melens.data.prompts import Bos, random_tokens
from melens.data.reading import file_text, names_file
from melens.errors import MelensError

__all__ = ["bos_prefix", "cut_texts", "read_text"]


def read_text(source: str | None = None, *, split: str = "test", column: str = "text") -> str:
    """Read a long text.

    Args:
        source: a file, `.jsonl`, `.json` or `.csv` with a column or any text (`melens.data.reading`), or a dataset of
            the hub, `org/name` or `org/name:config`; None for Python's documentation topics, whose words differ a
            little between versions of Python.
        split: of a dataset.
        column: of a dataset or a file that has columns.

    Raises:
        MelensError: no such file or dataset, no such column, or a row without a text in it.
    """
    if source is None:
        return "\n\n".join(topics[name] for name in sorted(topics))
    if names_file(source):
        return file_text(Path(os.path.expanduser(source)), column)
    if source.count("/") != 1:
        raise MelensError(f"data.text is {source!r}; give a file that is there or a dataset of the hub, org/name.")
    return "".join(_column_of_dataset(source, split, column))


def _column_of_dataset(source: str, split: str, column: str) -> list[str]:
    from datasets import load_dataset  # seconds, which nobody else needs

    name, _, config = source.partition(":")
    try:
        rows: Any = load_dataset(name, config or None, split=split)
    except Exception as error:  # whichever of the hub client's many
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise MelensError(f"The dataset {source} could not be loaded: {why}") from error
    if column not in rows.column_names:
        raise MelensError(f"The dataset {source} has no column {column!r}, only {', '.join(rows.column_names)}.")
    texts = list(rows[column])
    wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise MelensError(f"Row {wrong} of {source} holds {texts[wrong]!r:.80} as {column!r}; it must be a text.")
    return texts


def bos_prefix(tokenizer: Any, bos: Bos = "auto") -> list[int]:
    """Return the token ids that every text begins with: BOS, or none.

    Args:
        tokenizer: of a model; None for a model that has none, whose texts begin with nothing.
        bos: as for prompts: `"auto"` whatever the tokenizer itself puts before a text, `"true"` BOS, `"false"` nothing.

    Raises:
        MelensError: no BOS token.
    """
    if tokenizer is None or bos == "false":
        return []
    if bos == "true":
        if tokenizer.bos_token_id is None:
            raise MelensError("prompts.bos is 'true', but this model's tokenizer has no BOS token.")
        return [tokenizer.bos_token_id]
    with_special, own = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    begin = next(at for at in range(len(with_special)) if with_special[at : at + len(own)] == own)
    return with_special[:begin]


def cut_texts(
    model: Any, text: str, *, n_texts: int, n_tokens: int, bos: Bos = "auto", seed: int = 0
) -> Int[Tensor, "text pos"]:
    """Cut pieces of one length out of a long text, evenly spread, each beginning with another token where it can.

    Args:
        model: a bridge; without a tokenizer it gets random tokens.
        text: the text.
        n_texts, n_tokens: how many pieces, and how long, BOS included.
        bos: as for prompts.
        seed: of random tokens.

    Raises:
        MelensError: a text too short for that, pieces longer than the context, or no BOS token.
    """
    tokenizer = model.tokenizer
    if n_tokens > model.cfg.n_ctx:
        raise MelensError(f"data.n_tokens is {n_tokens}, more than the model's context of {model.cfg.n_ctx:,}.")
    if tokenizer is None:
        return torch.stack(random_tokens(n_texts, n_tokens, model.cfg.d_vocab, seed=seed))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = bos_prefix(tokenizer, bos)
    length = n_tokens - len(prefix)
    stride = len(ids) // n_texts
    if stride < length:
        raise MelensError(
            f"The text has {len(ids):,} tokens, too few for {n_texts} of {n_tokens}: lower data.n_texts or "
            "data.n_tokens."
        )
    firsts: set[int] = set()
    pieces = []
    for begin in range(0, n_texts * stride, stride):
        candidates = range(begin, begin + stride - length + 1)
        at = next((place for place in candidates if ids[place] not in firsts), begin)
        firsts.add(ids[at])
        pieces.append(torch.tensor([*prefix, *ids[at : at + length]]))
    return torch.stack(pieces)
