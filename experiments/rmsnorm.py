"""`exp=rmsnorm`: what the normalisations do to token 0 (figures 2 and 3)."""

from __future__ import annotations

from typing import Annotated, Literal

from experiments.runner.declaration import AnalysisOptions, of_analysis
from melens.validation.types import Said, Share

__all__ = ["EXPERIMENTS"]


class RmsnormOptions(AnalysisOptions):
    """The arguments of `melens.analysis.normalization`."""

    name: Literal["rmsnorm"]
    top_share: Annotated[Share, Said("a share of the width, over 0 and at most 1")]
    other_shares: Annotated[list[Share], Said("a list of shares of the width, each over 0 and at most 1")]


EXPERIMENTS = (of_analysis("rmsnorm", RmsnormOptions, "normalization", probes="norm_gains"),)
