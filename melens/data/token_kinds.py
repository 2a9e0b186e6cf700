"""Kinds of tokens by their text and by what stands before them: delimiters, newlines, digits, repeats, words.

    token_kinds([5, 5, 9, 5], tokenizer)   # run of token 0, token 0 again, and what the text of the others is

A token is of the first kind of `KINDS` that fits. Without a tokenizer all that repeat nothing are "other".
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

__all__ = ["AGAIN", "KINDS", "REPETITION", "RUN", "kind_of_text", "token_kinds", "token_texts"]

FIRST, RUN, REPETITION, AGAIN, OTHER = "token 0", "run of token 0", "repeated in a row", "token 0 again", "other"
KINDS = (
    FIRST, RUN, REPETITION, AGAIN, "special", "newline", "delimiter", "digits", "space", "part of a character", "word",
    OTHER,
)  # fmt: skip

IN_A_ROW = 8
"""A token is "repeated in a row" that is the same as each of so many before it."""


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token; its number where there is no tokenizer."""
    return [str(token) if tokenizer is None else tokenizer.decode([token]) for token in ids]


def token_kinds(ids: Sequence[int], tokenizer: Any = None) -> list[str]:
    """Tell of which kind each token of a prompt is.

    A run of token 0 goes from the start on: without learned positions and learned sinks such tokens have the states of
    token 0 by construction, as attention averages over equal values.

    Args:
        ids: of the prompt's tokens.
        tokenizer: the model's, or None.
    """
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    of_text: dict[int, str] = {}
    kinds, is_run = [FIRST], True
    for at, token in enumerate(ids[1:], 1):
        is_run = is_run and token == ids[0]
        if is_run:
            kinds.append(RUN)
        elif at >= IN_A_ROW and all(before == token for before in ids[at - IN_A_ROW : at]):
            kinds.append(REPETITION)
        elif token == ids[0]:
            kinds.append(AGAIN)
        elif token in special:
            kinds.append("special")
        else:
            if token not in of_text:
                of_text[token] = OTHER if tokenizer is None else kind_of_text(tokenizer.decode([token]))
            kinds.append(of_text[token])
    return kinds


def kind_of_text(text: str) -> str:
    """Tell of which kind a token of this text is, whatever stands around it.

    Example:
        >>> [kind_of_text(text) for text in (" fly", ".\\n", ' ("', " 12", "  ")]
        ['word', 'newline', 'delimiter', 'digits', 'space']
    """
    inside = text.strip()
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "part of a character"
    if "\n" in text and not any(map(str.isalnum, text)):
        return "newline"
    if not inside:
        return "space"
    if all(unicodedata.category(letter)[0] in "PS" for letter in inside):
        return "delimiter"
    return "digits" if inside.isdigit() else "word"
