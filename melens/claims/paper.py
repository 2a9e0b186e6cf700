"""The claims of the paper and of its review, as data: what is measured, what it must satisfy, and why that threshold.

A claim stands beside what measures it (`melens.analysis.attention_sinks.CLAIMS`); here they are in the paper's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from melens.analysis.across_inputs import CLAIMS as STABILITY
from melens.analysis.attention_sinks import CLAIMS as SINKS
from melens.analysis.block_ablation_claims import CLAIMS as ABLATION
from melens.analysis.cache_eviction_claims import CLAIMS as EVICTION
from melens.analysis.carrier_claims import CLAIMS as CARRIERS
from melens.analysis.compression_valley_claims import CLAIMS as VALLEY
from melens.analysis.dynamics_claims import CLAIMS as DYNAMICS
from melens.analysis.emergence_claims import CLAIMS as EMERGENCE
from melens.analysis.emergence_claims import EmergenceMetrics
from melens.analysis.ffn_concentration import CLAIMS as FFN
from melens.analysis.head_claims import CLAIMS as HEADS
from melens.analysis.massive_state_claims import CLAIMS as CONSEQUENCE
from melens.analysis.norm_gain_claims import CLAIMS as RMSNORM
from melens.analysis.quantization_claims import CLAIMS as QUANTIZATION
from melens.analysis.secondary_claims import CLAIMS as SECONDARY
from melens.analysis.token_direction import CLAIMS as DIRECTION
from melens.analysis.weights import CLAIMS as WEIGHTS
from melens.benchmarks.comparison import CLAIMS as BENCHMARK
from melens.benchmarks.training_table import CLAIMS as TABLES
from melens.claims.engine import Claim, Judgement
from melens.masks.grid_claims import CLAIMS as MASKS
from melens.training.arms_claims import CLAIMS as ARMS

__all__ = ["CLAIMS", "FAMILY_CLAIM", "judge_families"]

CLAIMS: tuple[Claim[Any], ...] = (
    *EMERGENCE, *RMSNORM, *FFN, *ABLATION, *DIRECTION, *STABILITY, *SINKS, *CONSEQUENCE, *WEIGHTS, *MASKS, *BENCHMARK,
    *TABLES, *HEADS, *VALLEY, *SECONDARY, *CARRIERS, *QUANTIZATION, *EVICTION, *DYNAMICS, *ARMS,
)  # fmt: skip
"""What the paper and its review say of one model, in the order of the paper; what other papers say, last."""


FAMILY_CLAIM = Claim(
    id="same-in-family", fixed="2026-11-22 a1bbeb3",
    source="appendix H, table 8", figure="emergence", metrics=EmergenceMetrics,
    claim="Models of one family have the same ME layer",
    statistic="share of a family's models with its most frequent ME layer",
    criterion="1", why="'the same' leaves no exception",
    judge=lambda metrics: Judgement("not measured", note="It takes a sweep over models."),
)  # fmt: skip


def judge_families(me_layers: Mapping[str, int | None], models: Mapping[str, Mapping[str, Any]]) -> list[Judgement]:
    """Judge `FAMILY_CLAIM` for each family with two models.

    Args:
        me_layers, models: by the label of a model; each model has its `name` and perhaps a `family`.
    """
    layers: dict[str, dict[str, int | None]] = {}
    for label, me_layer in me_layers.items():
        if (family := models[label].get("family")) is not None:
            layers.setdefault(family, {}).setdefault(models[label]["name"], me_layer)
    judged = []
    for family, found in layers.items():
        known = [layer for layer in found.values() if layer is not None]
        if len(found) > 1 and known:
            most = max(map(known.count, known)) / len(found)
            each = [f"{name} {'none' if layer is None else f'block {layer}'}" for name, layer in found.items()]
            note = f"Family {family}: {', '.join(each)}."
            judged.append(Judgement("holds" if most == 1 else "does not hold", most, note=note))
    return judged or [Judgement("not measured", note="No family has two models, of which one has an ME layer.")]
