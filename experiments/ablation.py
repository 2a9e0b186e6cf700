"""`exp=ablation`: parts of blocks removed, restored and patched (figure 9; the review's point 1)."""

from __future__ import annotations

from typing import Literal

from experiments.runner.declaration import AnalysisOptions, of_analysis
from melens.validation.types import Count

__all__ = ["EXPERIMENTS"]


class AblationOptions(AnalysisOptions):
    """The arguments of `melens.analysis.ablation`."""

    name: Literal["ablation"]
    max_position: Count


EXPERIMENTS = (of_analysis("ablation", AblationOptions),)
