"""`exp=heads`: whether sink heads are idle: values of the sink, what heads write, and the loss without some of them."""

from __future__ import annotations

from typing import Annotated, Literal

from experiments.runner.declaration import AnalysisOptions, AtLeast2, of_analysis
from melens.validation.types import Count, Said, Share

__all__ = ["EXPERIMENTS"]


class HeadsOptions(AnalysisOptions):
    """The arguments of `melens.analysis.heads`."""

    name: Literal["heads"]
    shares: Annotated[list[Share], Said("a list of shares of all heads, each over 0 and at most 1")]
    draws: Count
    n_prompts: AtLeast2
    max_tokens: AtLeast2
    entropy_tokens: AtLeast2
    entropy_prompts: Count
    tasks: Annotated[list[Literal["induction", "copy"]], Said("a list of induction and copy, [] for none")]
    items: AtLeast2


EXPERIMENTS = (of_analysis("heads", HeadsOptions, probes="head_idleness"),)
