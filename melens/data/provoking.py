"""Prompts that may bring massive activations behind the first token: newlines, delimiters, digits, repeats, BOS inside.

    provoking_prompts(tokenizer)   # one of each kind for each of four openings, which begin with different words

They are made to bring sinks, and say nothing of how often ordinary text does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from melens.data.prompts import Prompt, TokenizedPrompts

__all__ = ["provoking_prompts"]

_OPENINGS = (
    ("Birds fly south in autumn", " and come back in spring, when the nights are short and there is enough to eat."),
    ("The ferry left at dawn", " and nobody on the quay waved, because the fog was too thick to see a hand in it."),
    ("My neighbour keeps bees", " and sells the honey at a small table by the gate, where people leave their money."),
    ("Every clock had stopped", " and the caretaker walked from room to room with a key that would not fit any lock."),
)
_DIGITS = " 3 1 4 1 5 9 2 6 5 3 5 8 9 7 9 3"
_REPEATS = 24


def provoking_prompts(tokenizer: Any, prefix: list[int] | None = None) -> TokenizedPrompts:
    """Make the prompts, whose `task` says what is in them.

    Args:
        tokenizer: the model's.
        prefix: token ids that each begins with, such as BOS.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before = prefix or []
    texts: dict[str, Callable[[str, str], str]] = {
        "newlines": lambda opening, rest: (opening + rest).replace(" ", "\n"),
        "delimiters": lambda opening, rest: (opening + rest).replace(" ", ". "),
        "digits": lambda opening, rest: f"{opening}{_DIGITS}{rest}{_DIGITS}",
    }
    made: dict[str, Callable[[list[int], list[int]], list[int]]] = {
        "repeated in a row": lambda opening, rest: [*opening, *_REPEATS * ids(" poem")[-1:], *rest],
        "run of token 0": lambda opening, rest: [*_REPEATS * (before or opening)[:1], *opening, *rest],
        "token 0 again": lambda opening, rest: _every_fourth([*opening, *rest], (before or opening)[0]),
    }
    for token in _special(tokenizer):
        name = tokenizer.convert_ids_to_tokens(token)
        made[f"{name} inside"] = partial(_with_special, token, [])
        made[f"{name} first"] = partial(_with_special, token, [token])
    prompts, tokens = [], []
    for number, (opening, rest) in enumerate(_OPENINGS):
        of_texts = {name: ids(make(opening, rest)) for name, make in texts.items()}
        for name, own in (of_texts | {name: make(ids(opening), ids(rest)) for name, make in made.items()}).items():
            prompts.append(Prompt(tokenizer.decode(own), name, f"{name}-{number}"))
            tokens.append(torch.tensor([*before, *own]))
    return TokenizedPrompts(prompts, tokens)


def _special(tokenizer: Any) -> list[int]:
    """List the tokens that may stand between texts: BOS, EOS, what stands for unknown text, padding."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    return list(dict.fromkeys(token for token in ids if token is not None))


def _with_special(token: int, first: list[int], opening: list[int], rest: list[int]) -> list[int]:
    return [*first, *opening, token, *rest, token, *opening, *rest]


def _every_fourth(ids: list[int], token: int) -> list[int]:
    """Put a token behind every four."""
    return [each for at in range(0, len(ids), 4) for each in (*ids[at : at + 4], token)]
