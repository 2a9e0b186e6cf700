"""`exp=sinks`: where attention sinks start, their maps, what attention gets of token 0, and ranks."""

from __future__ import annotations

from typing import Literal

from experiments.runner.declaration import AnalysisOptions, AtLeast2, of_analysis
from melens.validation.types import Count

__all__ = ["EXPERIMENTS"]


class SinksOptions(AnalysisOptions):
    """The arguments of `melens.analysis.sinks`."""

    name: Literal["sinks"]
    map_tokens: AtLeast2
    rank_tokens: AtLeast2
    rank_prompts: Count


EXPERIMENTS = (of_analysis("sinks", SinksOptions, probes="sink_rate"),)
