"""`exp=ffn`: how the FFN concentrates and amplifies token 0 (figure 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from experiments.runner.declaration import ExperimentOptions, of_analysis

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from melens.tracing.probes import Probe

__all__ = ["EXPERIMENTS"]


class FfnOptions(ExperimentOptions):
    """`melens.analysis.ffn` has none."""

    name: Literal["ffn"]


def _probes(model: TransformerBridge, options: FfnOptions) -> list[Probe]:
    from melens.analysis.ffn_concentration import probes

    return probes(model)


EXPERIMENTS = (of_analysis("ffn", FfnOptions, probes=_probes),)
