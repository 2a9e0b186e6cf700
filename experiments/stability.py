"""`exp=stability`: the ME layer by task type and length, and the massive token under other beginnings (figure 10)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from experiments.runner.declaration import AnalysisOptions, AtLeast2, of_analysis
from melens.validation.types import Count, Flag, Number, Said

__all__ = ["EXPERIMENTS"]


def _rising(bins: list[int]) -> list[int]:
    if bins != sorted(set(bins)):
        raise ValueError
    return bins


class StabilityOptions(AnalysisOptions):
    """The arguments of `melens.analysis.stability`."""

    name: Literal["stability"]
    length_bins: Annotated[list[Count], AfterValidator(_rising), Said("a list of rising whole numbers of tokens")]
    n_prompts: Count
    max_tokens: AtLeast2
    n_first_tokens: Count
    min_ratios: Annotated[list[Number], Said("a list of numbers of at least 0")]
    judge_all: Flag


EXPERIMENTS = (of_analysis("stability", StabilityOptions),)
