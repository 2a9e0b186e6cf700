"""What the paper claims of masks, and the numbers of a grid that say whether it holds: `CLAIMS` and `MaskGridMetrics`.

`claim_metrics` picks them out of the table of configurations. A claim that the grid has no masks for has a
`<name>_why_not` instead, which says what to ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from melens.claims.engine import Claim, Judgement, Verdict, at_least, at_most
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "PAPER_RATE", "UNMASKED", "MaskGridMetrics", "claim_metrics"]

UNMASKED = "unmasked"
"""What stands for the unmasked model in the tables of a grid."""
PAPER_RATE = 0.1  # of table 7
DESTROYS = 1.0
"""Nats a token from which on a mask has destroyed the model: it gives its tokens less than 1/e of their probability."""


class MaskGridMetrics(Metrics):
    """What `mask_grid` measures.

    Attributes:
        texts, tokens_per_text, text: what it is measured on; `text_first_tokens`: on how many different first tokens
            the cosines rest.
        sink_layers: the blocks over which a sink mass is averaged.
        next_attention: the first block with attention behind the ME layer.
        masks: arguments by name.
        unmasked_run_was_kept, cells_kept: what was measured before.
        cells: how many configurations (masks with all their arguments) there are.
        unmasked_loss, unmasked_perplexity, unmasked_sink_mass: without a mask; nats a token.
        paper_rate, sink_ratio, paper_dloss: of the paper's mask at the rate nearest 0.1: the sink mass relative to that
            without a mask, and the change of the loss.
        weight_where_destroyed: the largest Δloss of a weight-guided mask where a random or magnitude mask of its rate
            and site costs a nat or more; `destroyed_by`: in how many places each does.
        best_rate, best_dloss: of the paper's mask over the rates, with the lowest loss.
        start_effect, start_effect_elsewhere, start_effect_ratio: change of the sink mass by a mask in the block behind
            the ME layer alone, by the same mask in another block alone at most (`start_strongest_elsewhere`), and how
            many times as large the first is.
    """

    experiment = "wemask"
    texts: int = 0
    tokens_per_text: int = 0
    text_first_tokens: int | None = None
    text: str | None = None
    sink_layers: Sequence[int] = ()
    next_attention: int | None = None
    masks: dict[str, dict[str, Any]] | None = None
    unmasked_run_was_kept: bool | None = None
    cells_kept: list[str] | None = None
    cells: int | None = None
    unmasked_loss: float | None = None
    unmasked_perplexity: float | None = None
    unmasked_sink_mass: float | None = None
    paper_rate: float | None = None
    sink_ratio: float | None = None
    sink_ratio_interval: Interval | None = None
    sink_why_not: str | None = None
    paper_dloss: float | None = None
    paper_dloss_interval: Interval | None = None
    weight_where_destroyed: float | None = None
    weight_where_destroyed_interval: Interval | None = None
    destroyed_by: dict[str, int] | None = None
    harm_why_not: str | None = None
    best_rate: float | None = None
    best_rate_is_largest: bool | None = None
    best_dloss: float | None = None
    best_dloss_interval: Interval | None = None
    moderation_why_not: str | None = None
    start_effect: float | None = None
    start_effect_elsewhere: float | None = None
    start_strongest_elsewhere: int | None = None
    start_effect_ratio: float | None = None
    start_why_not: str | None = None


# --- Out of the table -------------------------------------------------------------------------------------------------


def claim_metrics(table: pd.DataFrame, me_layer: int | None, next_attention: int | None) -> dict[str, Any]:
    """Pick what the claims are about out of a grid, as fields of `MaskGridMetrics`.

    Args:
        table: a row a configuration, with its arguments, `dloss` and `sink_ratio`.
        me_layer: none of the claims is about a model without one.
        next_attention: the first block with attention behind it.
    """
    if not len(table) or me_layer is None:
        return {}
    plain = table[(table["positions"] == "first") & (table["strength"] == 1)]
    behind = plain[plain["start"] == me_layer + 1]
    of_paper = behind[(behind["select"] == "weight") & (behind["site"] == "attn_in") & (behind["layers"] == "all")]
    parts = (
        _sink_metrics(of_paper),
        _harm_metrics(behind),
        _moderation_metrics(of_paper),
        _start_metrics(plain[plain["layers"] == "first"], next_attention),
    )
    return {name: value for part in parts for name, value in part.plain().items()}


def _sink_metrics(of_paper: pd.DataFrame) -> MaskGridMetrics:
    if not len(of_paper):
        return MaskGridMetrics(sink_why_not="The grid does not have the paper's mask (wemask=paper).")
    nearest = of_paper.iloc[(of_paper["rate"] - PAPER_RATE).abs().argmin()]
    if np.isnan(nearest["sink_ratio"]):
        return MaskGridMetrics(sink_why_not="No block behind the ME layer has attention.")
    return MaskGridMetrics(
        paper_rate=nearest["rate"],
        sink_ratio=nearest["sink_ratio"],
        sink_ratio_interval=_interval(nearest, "sink_ratio"),
        paper_dloss=nearest["dloss"],
        paper_dloss_interval=_interval(nearest, "dloss"),
    )


def _harm_metrics(behind: pd.DataFrame) -> MaskGridMetrics:
    """Find where random (mean over seeds) or magnitude masks destroy, and what weight-guided ones cost there."""
    worst = None
    places = {"random": 0, "magnitude": 0}
    compared = 0
    for _, group in behind.groupby(["site", "layers", "rate"]):
        weight = group[group["select"] == "weight"]
        costs = group.groupby("select")["dloss"].mean()
        if not len(weight) or not {"random", "magnitude"} <= set(costs.index):
            continue
        compared += 1
        destroyed = [select for select in places if costs[select] >= DESTROYS]
        for select in destroyed:
            places[select] += 1
        if destroyed and (worst is None or weight["dloss"].iloc[0] > worst["dloss"]):
            worst = weight.iloc[0]
    if not compared:
        why_not = "The grid does not have weight, random and magnitude side by side (wemask=grid)."
        return MaskGridMetrics(harm_why_not=why_not)
    if worst is None:
        why_not = f"Neither random nor magnitude masks cost {DESTROYS:g} nat a token in this grid."
        return MaskGridMetrics(harm_why_not=why_not)
    return MaskGridMetrics(
        weight_where_destroyed=worst["dloss"],
        weight_where_destroyed_interval=_interval(worst, "dloss"),
        destroyed_by=places,
    )


def _moderation_metrics(of_paper: pd.DataFrame) -> MaskGridMetrics:
    if len(of_paper) < 3:
        return MaskGridMetrics(moderation_why_not="It takes at least three rates (wemask.rate=[0.01,0.1,0.3]).")
    best = of_paper.iloc[of_paper["dloss"].argmin()]
    return MaskGridMetrics(
        best_rate=best["rate"],
        best_rate_is_largest=best["rate"] == of_paper["rate"].max(),
        best_dloss=best["dloss"],
        best_dloss_interval=_interval(best, "dloss"),
    )


def _start_metrics(first_only: pd.DataFrame, behind: int | None) -> MaskGridMetrics:
    """Compare the mask in the next block with attention behind the ME layer alone with that in each other alone."""
    for _, group in first_only.dropna(subset=["sink_ratio"]).groupby(["select", "site", "rate", "seed"], sort=False):
        effect = (1 - group.set_index("start")["sink_ratio"]).abs()
        if behind is not None and behind in effect.index and len(effect) >= 4:
            others = effect.drop(behind)
            return MaskGridMetrics(
                start_effect=effect[behind],
                start_effect_elsewhere=others.max(),
                start_strongest_elsewhere=int(others.index.to_numpy()[others.argmax()]),
                start_effect_ratio=effect[behind] / max(others.max(), 1e-9),
            )
    return MaskGridMetrics(start_why_not="It takes other starts (wemask.start=all_blocks wemask.layers=first).")


def _interval(row: pd.Series, name: str) -> Interval:
    return float(row[f"{name}_low"]), float(row[f"{name}_high"])


# --- Claims -----------------------------------------------------------------------------------------------------------


def _weakens(metrics: MaskGridMetrics) -> Judgement:
    judged = at_most(metrics.sink_ratio, metrics.sink_ratio_interval, 0.9, why_not=metrics.sink_why_not)
    if judged.value is None:
        return judged
    low, high = judged.interval or (judged.value, judged.value)
    verdict: Verdict = "does not hold" if low < 0.1 or high >= 1 else "holds" if high <= 0.9 else "holds in part"
    return replace(judged, verdict=verdict, note=f"At rate {metrics.paper_rate:g}.")


def _harmless(metrics: MaskGridMetrics) -> Judgement:
    judged = at_most(
        metrics.weight_where_destroyed, metrics.weight_where_destroyed_interval, 0.1, why_not=metrics.harm_why_not
    )
    if judged.value is None or metrics.destroyed_by is None:
        return judged
    places = metrics.destroyed_by
    if judged.verdict == "holds" and not all(places.values()):
        judged = replace(judged, verdict="holds in part")
    note = ", ".join(f"{select} masks destroy in {n} places" for select, n in places.items()) + " of the grid."
    return replace(judged, note=note)


def _moderate(metrics: MaskGridMetrics) -> Judgement:
    judged = at_most(metrics.best_dloss, metrics.best_dloss_interval, 0, why_not=metrics.moderation_why_not)
    if judged.value is None:
        return judged
    verdict: Verdict = "does not hold"
    if judged.value < 0 and not metrics.best_rate_is_largest:
        verdict = "holds" if judged.interval is not None and judged.interval[1] < 0 else "holds in part"
    return replace(judged, verdict=verdict, note=f"At rate {metrics.best_rate:g}.")


def _is_of_the_start(metrics: MaskGridMetrics) -> Judgement:
    judged = at_least(metrics.start_effect_ratio, None, 2, why_not=metrics.start_why_not)
    if judged.value is None:
        return judged
    if 1 < judged.value < 2:
        judged = replace(judged, verdict="holds in part")
    return replace(judged, note=f"The strongest elsewhere is in block {metrics.start_strongest_elsewhere}.")


CLAIMS: tuple[Claim[MaskGridMetrics], ...] = (
    Claim(
        id="mask-weakens-sink", fixed="2026-11-22 aed234a",
        source="section 4, figure 8", figure="by_block", metrics=MaskGridMetrics,
        claim="WeMask weakens the sink and does not remove it",
        statistic="sink mass behind the ME layer with the paper's mask, relative to without",
        criterion="between 0.1 and 0.9; in part below 1",
        why="a tenth less is the least that a map would show, a tenth left is next to none",
        of_token_0=True, blocks_after=1, judge=_weakens,
    ),
    Claim(
        id="mask-weight-harmless", fixed="2026-11-22 aed234a",
        source="section 5, table 5", figure="loss_change", metrics=MaskGridMetrics,
        claim="Weight-guided masks are harmless or better where random and magnitude masks destroy",
        statistic="largest Δloss of a weight-guided mask where a random or a magnitude mask of its rate and site costs "
        "a nat or more",
        criterion="<= 0.1 nats, with random and magnitude masks both destroying somewhere; in part: only one does",
        why="0.1 nats is a tenth more perplexity; with a nat lost a token has less than 1/e of its probability",
        of_token_0=True, judge=_harmless,
    ),
    Claim(
        id="mask-moderate", fixed="2026-11-22 aed234a",
        source="section 4", figure="loss_and_sinks", metrics=MaskGridMetrics,
        claim="Moderate attenuation of the sink is better than none and than full",
        statistic="lowest Δloss of the paper's mask over the rates",
        criterion="< 0, at a rate below the largest; in part: on average only",
        why="better is any lower loss on the same tokens",
        of_token_0=True, judge=_moderate,
    ),
    Claim(
        id="mask-start", fixed="2026-11-22 aed234a",
        source="the review, point 5", figure="starts", metrics=MaskGridMetrics,
        claim="The effect is specific to starting behind the ME layer",
        statistic="change of the sink mass by a mask in the block behind the ME layer alone, over the largest by the "
        "same mask in another block alone",
        criterion=">= 2; in part > 1",
        why="twice the next is the least that can be called specific",
        of_token_0=True, judge=_is_of_the_start,
    ),
)  # fmt: skip
