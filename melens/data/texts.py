"""Texts of one length, to measure a loss on; by default from Python's documentation topics, which every machine has.

    tokens = cut_texts(model, read_text(), n_texts=32, n_tokens=256)

`read_text` also reads files, and datasets of the hub.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from melens.data.prompts import Bos, random_tokens
from melens.data.reading import check_source, file_text
from melens.errors import MelensError

__all__ = ["bos_prefix", "cut_texts", "hub_dataset", "read_text"]


def read_text(
    source: str | None = None, *, split: str = "test", column: str = "text", option: str = "data.text"
) -> str:
    """Read a long text.

    Args:
        source: a file (`.jsonl`, `.json` or `.csv` with a column, or any text: `melens.data.reading`), or a dataset of
            the hub, `org/name` or `org/name:config`; None for Python's documentation topics, whose words differ a
            little between versions of Python.
        split: of a dataset.
        column: of a dataset, or of a file that has columns.
        option: what the source is called where it is refused.

    Raises:
        MelensError: the file, the dataset or the column does not exist, or a row has no text in that column.

    Example:
        >>> len(read_text()) > 100_000
        True
    """
    if source is None:
        return "\n\n".join(topics[name] for name in sorted(topics))
    if check_source(option, source):
        return file_text(Path(os.path.expanduser(source)), column)
    rows = hub_dataset(source, split, "give a file")
    if column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise MelensError(f"The dataset {source} has no column {column!r}. Set data.column to one of {columns}.")
    texts = list(rows[column])
    wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise MelensError(f"{source}, row {wrong + 1}: {column!r} is {texts[wrong]!r:.80}; it must be a text.")
    return "".join(texts)


def hub_dataset(place: str, split: str, otherwise: str) -> Any:
    """Load a split of a dataset of the hub, `org/name` or `org/name:config`.

    Raises:
        MelensError: it could not be loaded; the sentence ends in what the user can do `otherwise`.
    """
    from datasets import load_dataset  # takes seconds, and only hub datasets need it

    name, _, config = place.partition(":")
    try:
        return load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub's client, pyarrow and builders raise errors of many kinds
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise MelensError(
            f"The dataset {name} could not be loaded from the hub ({why[:150]}). Check its name and the connection, or "
            f"{otherwise}."
        ) from error


def bos_prefix(tokenizer: Any, bos: Bos = "auto") -> list[int]:
    """Return the token ids that every text begins with: BOS, or none.

    Args:
        tokenizer: of a model; None for a model without one.
        bos: as for prompts: `"auto"` for what the tokenizer itself puts before a text, `"true"` for BOS, `"false"` for
            nothing.

    Raises:
        MelensError: the tokenizer has no BOS token.
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
    model: Any,
    text: str | Sequence[int],
    *,
    n_texts: int,
    n_tokens: int,
    bos: Bos = "auto",
    seed: int = 0,
    beyond_context: bool = False,
) -> Int[Tensor, "text pos"]:
    """Cut pieces of one length out of a long text, evenly spaced, with different first tokens where possible.

    Args:
        model: a bridge; without a tokenizer the pieces are random tokens.
        text: the text, or its token ids without BOS.
        n_texts, n_tokens: number of pieces, and their length with BOS.
        bos: as for prompts.
        seed: of random tokens.
        beyond_context: let pieces be longer than the context that the model was trained on.

    Returns:
        Token ids, `[text, pos]`.

    Raises:
        MelensError: the text is too short, the pieces are longer than the context, or the tokenizer has no BOS token.

    Example:
        >>> cut_texts(model, read_text()[:5000], n_texts=2, n_tokens=16).shape
        torch.Size([2, 16])
    """
    tokenizer = model.tokenizer
    if n_tokens > model.cfg.n_ctx and not beyond_context:
        raise MelensError(f"data.n_tokens is {n_tokens:,}; lower it to the model's context of {model.cfg.n_ctx:,}.")
    if tokenizer is None:
        return torch.stack(random_tokens(n_texts, n_tokens, model.cfg.d_vocab, seed=seed))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if isinstance(text, str) else text
    prefix = bos_prefix(tokenizer, bos)
    length = n_tokens - len(prefix)
    stride = len(ids) // n_texts
    if stride < length:
        raise MelensError(
            f"The text has {len(ids):,} tokens, too few for {n_texts} pieces of {n_tokens}. Lower data.n_texts or "
            "data.n_tokens, or give a longer text with data.text."
        )
    firsts: set[int] = set()
    pieces = []
    for begin in range(0, n_texts * stride, stride):
        candidates = range(begin, begin + stride - length + 1)
        at = next((place for place in candidates if ids[place] not in firsts), begin)
        firsts.add(ids[at])
        pieces.append(torch.tensor([*prefix, *ids[at : at + length]]))
    return torch.stack(pieces)
