"""`exp=ffn`: how the FFN concentrates and amplifies token 0 (figure 4)."""

from __future__ import annotations

from typing import Literal

from experiments.runner.declaration import AnalysisOptions, of_analysis

__all__ = ["EXPERIMENTS"]


class FfnOptions(AnalysisOptions):
    """`melens.analysis.ffn` has none."""

    name: Literal["ffn"]


EXPERIMENTS = (of_analysis("ffn", FfnOptions, probes="ffn_concentration"),)
