"""`exp=secondary`: tokens behind the first that are massive or turn to its direction, and the attention on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.runner.declaration import AnalysisOptions, AtLeast2, of_analysis
from melens.validation.types import Flag, Whole

if TYPE_CHECKING:
    from experiments.options.schema import Options
    from melens.models.loading import PlannedModel

__all__ = ["EXPERIMENTS"]


class SecondaryOptions(AnalysisOptions):
    """The arguments of `melens.analysis.secondary`."""

    name: Literal["secondary"]
    provoke: Flag
    long_tokens: Whole
    map_tokens: AtLeast2


def _prepare(cfg: Options, folder: Path, planned: PlannedModel) -> None:
    from melens.analysis.secondary_sinks import check_texts

    options = cfg.experiments["secondary"]
    check_texts(planned, provoke=options.provoke, long_tokens=options.long_tokens)


EXPERIMENTS = (replace(of_analysis("secondary", SecondaryOptions, probes="secondary_sinks"), prepare=_prepare),)
