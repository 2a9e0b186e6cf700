"""`exp=direction`: norm and direction of token 0 across inputs and blocks (figure 5)."""

from __future__ import annotations

from typing import Literal

from experiments.runner.declaration import AnalysisOptions, of_analysis

__all__ = ["EXPERIMENTS"]


class DirectionOptions(AnalysisOptions):
    """`melens.analysis.direction` has none."""

    name: Literal["direction"]


EXPERIMENTS = (of_analysis("direction", DirectionOptions),)
