"""`exp=weights`: which weights carry the massive activation: a scalar, a few rows, or a few experts."""

from __future__ import annotations

from typing import Annotated, Literal

from experiments.runner.declaration import AnalysisOptions, AtLeast2, of_analysis
from melens.validation.types import Count, Name, Number, Said

__all__ = ["EXPERIMENTS"]


class WeightsOptions(AnalysisOptions):
    """The arguments of `melens.analysis.carriers`."""

    name: Literal["weights"]
    factors: Annotated[list[Number], Said("a list of numbers of at least 0")]
    n_scalars: Count
    n_rows: Count
    n_random: Count
    n_prompts: Count
    max_tokens: AtLeast2
    prompt: Name
    new_tokens: Count


EXPERIMENTS = (of_analysis("weights", WeightsOptions, "carriers", probes="super_weights"),)
