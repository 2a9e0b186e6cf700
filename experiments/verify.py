"""`exp=verify`: does melens give transformers' own numbers on this kind of model?"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from experiments.runner.declaration import ExperimentOptions, of_analysis

__all__ = ["EXPERIMENTS"]


class VerifyOptions(ExperimentOptions):
    """None but the name."""

    name: Literal["verify"]


EXPERIMENTS = (replace(of_analysis("verify", VerifyOptions, "verification"), in_all=False),)
