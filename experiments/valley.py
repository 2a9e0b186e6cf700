"""`exp=valley`: entropy of the states by block, with and without token 0 and the massive activation."""

from __future__ import annotations

from typing import Literal

from experiments.runner.declaration import AnalysisOptions, AtLeast2, of_analysis
from melens.validation.types import Count, Share

__all__ = ["EXPERIMENTS"]


class ValleyOptions(AnalysisOptions):
    """The arguments of `melens.analysis.valley`."""

    name: Literal["valley"]
    rank_tokens: AtLeast2
    rank_prompts: Count
    mask_rate: Share


EXPERIMENTS = (of_analysis("valley", ValleyOptions),)
