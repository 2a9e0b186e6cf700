"""`exp=consequence`: the massive activation removed, brought earlier and fixed; what becomes of sinks and loss."""

from __future__ import annotations

from typing import Literal

from experiments.runner.declaration import AnalysisOptions, AtLeast2, of_analysis
from melens.validation.types import Count

__all__ = ["EXPERIMENTS"]


class ConsequenceOptions(AnalysisOptions):
    """The arguments of `melens.analysis.consequence`."""

    name: Literal["consequence"]
    n_prompts: Count
    max_tokens: AtLeast2


EXPERIMENTS = (of_analysis("consequence", ConsequenceOptions),)
