"""`exp=predict`: can the ME layer be predicted from the weights alone? (the review, the research note)"""

from __future__ import annotations

from typing import Literal

from experiments.runner.declaration import AnalysisOptions, of_analysis

__all__ = ["EXPERIMENTS"]


class PredictOptions(AnalysisOptions):
    """`melens.analysis.prediction` has none."""

    name: Literal["predict"]


EXPERIMENTS = (of_analysis("predict", PredictOptions, "prediction"),)
