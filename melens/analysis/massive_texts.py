"""The texts on which a change of the model is measured: prompts cut short, one for each massive state.

In a causal model prompts that share their first token share token 0's every state, so that one of them is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from melens.analysis.me_layer import massive_activations
from melens.analysis.study import Study
from melens.errors import MelensError
from melens.printing import Brief

__all__ = ["MIN_BEHIND", "MassiveTexts", "massive_texts"]

MIN_BEHIND = 8
"""Tokens that must follow the massive one: of fewer each pays it much attention without any sink."""


@dataclass(frozen=True, repr=False)
class MassiveTexts(Brief):
    """Texts with a massive token each.

    Attributes:
        prompts: which of the study's they are.
        tokens: of each, cut short.
        positions: of each one's largest massive entry.
        entries: `text`, `pos`, `dim` of all massive entries.
    """

    prompts: list[int]
    tokens: list[Tensor]
    positions: list[int]
    entries: pd.DataFrame


def massive_texts(study: Study, n_prompts: int, max_tokens: int) -> MassiveTexts:
    """Choose the prompts that have most tokens, one for each massive state, and cut them.

    Args:
        study: with an ME layer.
        n_prompts: at most so many.
        max_tokens: of each of them.

    Raises:
        MelensError: none has `MIN_BEHIND` tokens behind its massive one.
    """
    massive = massive_activations(study.trace, study.me.criterion)
    massive = massive[massive["prompt"].isin(study.massive_states)]
    massive = massive[(massive["layer"] == study.me.formed) & (massive["pos"] < max_tokens)]
    largest = massive.loc[massive["value"].abs().groupby(massive["prompt"]).idxmax()]
    positions = dict(zip(largest["prompt"].tolist(), largest["pos"].tolist(), strict=True))
    lengths = {prompt: min(len(study.tokens[prompt]), max_tokens) for prompt in positions}
    usable = [prompt for prompt, at in positions.items() if lengths[prompt] - at > MIN_BEHIND]
    if not usable:
        raise MelensError(
            f"No prompt has {MIN_BEHIND} tokens behind its massive token among its first {max_tokens}: give longer "
            "prompts, or raise exp.max_tokens."
        )
    prompts = sorted(usable, key=lambda prompt: -lengths[prompt])[:n_prompts]
    entries = massive.assign(
        text=massive["prompt"].map({prompt: text for text, prompt in enumerate(prompts)}),
        dim=massive["dim"].where(massive["dim"] >= 0, study.me.dims[0]),  # of the smaller of many tokens none is kept
    )
    return MassiveTexts(
        prompts,
        [study.tokens[prompt][: lengths[prompt]] for prompt in prompts],
        [positions[prompt] for prompt in prompts],
        entries[entries["text"].notna()].astype({"text": int}),
    )
