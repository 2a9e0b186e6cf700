"""The numbers of a grid of masks on which the claims about masks rest: `MaskGridMetrics`.

`claim_metrics` picks them out of the grid's tables. What the grid has no masks for has a `<name>_why_not` instead,
which says what to ask for. `grid_claims.py` judges them.

Whatever is chosen among several masks is judged on other texts than it was chosen on: the lowest of several losses is
below 0 on pure noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from melens.analysis.statistics import mean_interval, mean_metric
from melens.report.result import Interval, Metrics

__all__ = ["PAPER_RATE", "SINK_REMOVED", "SINK_WEAKENED", "UNMASKED", "MaskGridMetrics", "claim_metrics", "moderation"]

UNMASKED = "unmasked"
"""What stands for the unmasked model in the tables of a grid."""
PAPER_RATE = 0.1  # of table 7
DESTROYS = 1.0
"""Nats a token from which on a mask has destroyed the model: it gives its tokens less than 1/e of their probability."""
SINK_WEAKENED, SINK_REMOVED = 0.9, 0.1
"""Share of the sink mass up to which a sink is weakened, as a tenth less is the least that a map would show, and below
which it is removed, as a tenth is next to none."""


class MaskGridMetrics(Metrics):
    """What `mask_grid` measures. An effect on the sink is that on its mass, mean over texts, relative to no mask.

    Attributes:
        texts, tokens_per_text, text: what it is measured on; `text_first_tokens`: on how many different first tokens
            the cosines rest.
        sink_layers: the blocks over which a sink mass is averaged.
        next_attention: the first block with attention behind the ME layer.
        masks: arguments by name.
        unmasked_run_was_kept, cells_kept: what was measured before.
        cells: how many configurations (masks with all their arguments) there are.
        least_p: the least p-value after correction that so many texts and masks can give.
        unmasked_loss, unmasked_perplexity, unmasked_sink_mass: without a mask; nats a token.
        paper_rate, sink_ratio, paper_dloss: of the paper's mask at the rate nearest 0.1: the sink mass relative to that
            without a mask, and the change of the loss.
        weight_where_destroyed: the largest Δloss of a weight-guided mask where a random or magnitude mask of its rate
            and site costs a nat or more; `destroyed_by`: in how many places each does; `destroyed_at`: at which sites;
            `controls_dloss`: their largest Δloss where neither does.
        best_rate, best_dloss: of the paper's mask over the rates, with the lowest loss; for the former `mask-moderate`.
        moderate_rate: of the paper's mask, the rate that weakens the sink and has the lowest loss on the even texts;
            `moderate_dloss`, `moderate_sink_ratio`: its Δloss and what it leaves of the sink on the odd texts;
            `moderate_over_full`, `full_sink_ratio`: its loss over that of rate 1, and what rate 1 leaves, on those.
        start_effect, start_effect_elsewhere, start_effect_ratio: change of the sink mass by the grid's first mask in
            the block behind the ME layer alone, by the same mask in another block alone at most
            (`start_strongest_elsewhere`), and their ratio; for the former `mask-start`.
        paper_start_effect, paper_start_elsewhere, paper_start_strongest, paper_start_ratio: the same of the paper's
            mask at the rate nearest 0.1 (`paper_start_rate`); `paper_start_margin`: the first less twice the second.
        input_cosines, key_cosines: mean cosine of token 0's attention input, and of its key, between texts that begin
            differently: where the ME layer reads it, behind it without a mask, and with the paper's mask, in the blocks
            that it masks; `input_restored`, `key_restored`: (unmasked - masked) / (unmasked - before), the share of
            the lost diversity that the mask gives back. The intervals are jackknifed, as pairs share texts.
    """

    experiment = "wemask"
    rests_on_states = False
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
    least_p: float | None = None
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
    destroyed_at: dict[str, list[str]] | None = None
    controls_dloss: float | None = None
    harm_why_not: str | None = None
    best_rate: float | None = None
    best_rate_is_largest: bool | None = None
    best_dloss: float | None = None
    best_dloss_interval: Interval | None = None
    moderation_why_not: str | None = None
    moderate_rate: float | None = None
    moderate_dloss: float | None = None
    moderate_dloss_interval: Interval | None = None
    moderate_sink_ratio: float | None = None
    moderate_sink_ratio_interval: Interval | None = None
    moderate_over_full: float | None = None
    moderate_over_full_interval: Interval | None = None
    full_sink_ratio: float | None = None
    moderate_why_not: str | None = None
    start_effect: float | None = None
    start_effect_elsewhere: float | None = None
    start_strongest_elsewhere: int | None = None
    start_effect_ratio: float | None = None
    start_why_not: str | None = None
    paper_start_rate: float | None = None
    paper_start_effect: float | None = None
    paper_start_elsewhere: float | None = None
    paper_start_strongest: int | None = None
    paper_start_ratio: float | None = None
    paper_start_margin: float | None = None
    paper_start_margin_interval: Interval | None = None
    paper_start_why_not: str | None = None
    input_cosines: tuple[float, float, float] | None = None
    input_restored: float | None = None
    input_restored_interval: Interval | None = None
    key_cosines: tuple[float, float, float] | None = None
    key_restored: float | None = None
    key_restored_interval: Interval | None = None
    diversity_why_not: str | None = None


def claim_metrics(table: pd.DataFrame, by_text: pd.DataFrame, metrics: MaskGridMetrics) -> dict[str, Any]:
    """Pick what the claims are about out of a grid, as fields of `MaskGridMetrics`.

    Args:
        table: a row a configuration, with its arguments, `dloss` and `sink_ratio`.
        by_text: as of a `Grid`.
        metrics: which blocks it is about: none of the claims is about a model without an ME layer.
    """
    if not len(table) or metrics.me_layer is None:
        return {}
    plain = table[(table["positions"] == "first") & (table["strength"] == 1)]
    behind = plain[plain["start"] == metrics.me_layer + 1]
    of_paper = behind[_is_weight(behind) & (behind["layers"] == "all")]
    first_only = plain[plain["layers"] == "first"].dropna(subset=["sink_ratio"])
    texts = by_text.pivot(index="text", columns="cell").sort_index()
    parts = (
        _sink_metrics(of_paper),
        _harm_metrics(behind),
        _best_metrics(of_paper),
        _moderation_metrics(of_paper, texts),
        _first_start_metrics(first_only, metrics.next_attention),
        _paper_start_metrics(first_only[_is_weight(first_only)], texts, metrics.next_attention),
        _diversity_metrics(of_paper, texts),
    )
    return {name: value for part in parts for name, value in part.plain().items()}


def _is_weight(table: pd.DataFrame) -> pd.Series:
    return (table["select"] == "weight") & (table["site"] == "attn_in")


def _nearest(of_paper: pd.DataFrame) -> pd.Series:
    return of_paper.iloc[int((of_paper["rate"] - PAPER_RATE).abs().to_numpy().argmin())]


NO_PAPER_MASK = "The grid does not have the paper's mask (wemask=paper)."


def _sink_metrics(of_paper: pd.DataFrame) -> MaskGridMetrics:
    if not len(of_paper):
        return MaskGridMetrics(sink_why_not=NO_PAPER_MASK)
    nearest = _nearest(of_paper)
    if np.isnan(nearest["sink_ratio"]):
        return MaskGridMetrics(sink_why_not="No block behind the ME layer has attention.")
    means = _mean(nearest, "sink_ratio", "sink_ratio") | _mean(nearest, "dloss", "paper_dloss")
    return MaskGridMetrics(paper_rate=nearest["rate"], **means)


def _harm_metrics(behind: pd.DataFrame) -> MaskGridMetrics:
    """Find where random (mean over seeds) or magnitude masks destroy, and what weight-guided ones cost there."""
    worst = None
    at: dict[str, list[str]] = {"random": [], "magnitude": []}
    controls, rates = [], []
    for (site, *_), group in behind[behind["rate"] < 1].groupby(["site", "layers", "rate"], sort=False):
        weight = group[group["select"] == "weight"]
        costs = group.groupby("select")["dloss"].mean()
        if not len(weight) or not {"random", "magnitude"} <= set(costs.index):
            continue
        rates.append(float(group["rate"].iloc[0]))
        controls.append(float(costs[[*at]].max()))
        destroyed = [select for select in at if costs[select] >= DESTROYS]
        for select in destroyed:
            at[select].append(str(site))
        if destroyed and (worst is None or weight["dloss"].iloc[0] > worst["dloss"]):
            worst = weight.iloc[0]
    if not rates:
        why_not = "The grid does not have weight, random and magnitude side by side (wemask=grid)."
        return MaskGridMetrics(harm_why_not=why_not)
    places: dict[str, Any] = {
        "destroyed_by": {select: len(sites) for select, sites in at.items()},
        "destroyed_at": {select: list(dict.fromkeys(sites)) for select, sites in at.items()},
    }
    if worst is not None:
        return MaskGridMetrics(**_mean(worst, "dloss", "weight_where_destroyed"), **places)
    why_not = f"Neither random nor magnitude masks cost {DESTROYS:g} nat a token in this grid."
    if max(rates) < PAPER_RATE:  # so few dims prove nothing of the paper's many
        return MaskGridMetrics(harm_why_not=f"{why_not} Its largest rate is {max(rates):g}; give {PAPER_RATE:g} too.")
    return MaskGridMetrics(harm_why_not=why_not, controls_dloss=max(controls), **places)


def _best_metrics(of_paper: pd.DataFrame) -> MaskGridMetrics:
    if len(of_paper) < 3:
        return MaskGridMetrics(moderation_why_not="It takes at least three rates (wemask.rate=[0.01,0.1,0.3]).")
    best = of_paper.iloc[of_paper["dloss"].argmin()]
    rate, dloss = best["rate"], _mean(best, "dloss", "best_dloss")
    return MaskGridMetrics(best_rate=rate, best_rate_is_largest=rate == of_paper["rate"].max(), **dloss)


def _moderation_metrics(of_paper: pd.DataFrame, texts: pd.DataFrame) -> MaskGridMetrics:
    of_paper = of_paper.dropna(subset=["sink_ratio"])
    cells = list(of_paper["cell"])
    if len(texts) < 2 or not (of_paper["rate"] == 1).any():
        why_not = "It takes two texts and rate 1, which takes all of token 0's attention input (wemask=grid)."
        return MaskGridMetrics(moderate_why_not=why_not)
    dloss = texts["loss"][cells].sub(texts["loss"][UNMASKED], axis=0)
    left = texts["sink_mass"][cells].div(texts["sink_mass"][UNMASKED], axis=0)
    return moderation(of_paper["rate"].to_numpy(), dloss.to_numpy().T, left.to_numpy().T)


def moderation(
    rates: Float[np.ndarray, " rate"], dloss: Float[np.ndarray, "rate text"], sink_ratio: Float[np.ndarray, "rate text"]
) -> MaskGridMetrics:
    """Choose a moderate rate on the even texts, and compare it with no mask and with rate 1 on the odd ones.

    Args:
        rates: of the paper's mask, 1 among them.
        dloss: loss over that without a mask, nats a token.
        sink_ratio: sink mass relative to that without a mask.
    """
    left = sink_ratio[:, ::2].mean(1)
    is_moderate = (rates < 1) & (left >= SINK_REMOVED) & (left <= SINK_WEAKENED)
    if not is_moderate.any():
        why_not = f"No rate of the grid below 1 leaves between {SINK_REMOVED:g} and {SINK_WEAKENED:g} of the sink."
        return MaskGridMetrics(moderate_why_not=why_not)
    chosen = int(np.where(is_moderate, dloss[:, ::2].mean(1), np.inf).argmin())
    full = int(np.flatnonzero(rates == 1)[0])
    left_by_chosen, left_by_full = float(sink_ratio[chosen, 1::2].mean()), float(sink_ratio[full, 1::2].mean())
    if left_by_full >= left_by_chosen:
        why_not = f"Rate 1 leaves {left_by_full:.2g} of the sink and rate {rates[chosen]:g} no more: it is no removal."
        return MaskGridMetrics(moderate_why_not=why_not)
    return MaskGridMetrics(
        moderate_rate=rates[chosen],
        full_sink_ratio=left_by_full,
        **mean_metric("moderate_dloss", dloss[chosen, 1::2]),
        **mean_metric("moderate_sink_ratio", sink_ratio[chosen, 1::2]),
        **mean_metric("moderate_over_full", dloss[chosen, 1::2] - dloss[full, 1::2]),
    )


OTHER_STARTS = "It takes other starts (wemask.start=all_blocks wemask.layers=first)."


def _first_start_metrics(first_only: pd.DataFrame, behind: int | None) -> MaskGridMetrics:
    """Compare the mask in the next block with attention behind the ME layer alone with that in each other alone."""
    for _, group in first_only.groupby(["select", "site", "rate", "seed"], sort=False):
        effect = (1 - group.set_index("start")["sink_ratio"]).abs()
        if behind is not None and behind in effect.index and len(effect) >= 4:
            others = effect.drop(behind)
            return MaskGridMetrics(
                start_effect=effect[behind],
                start_effect_elsewhere=others.max(),
                start_strongest_elsewhere=int(others.index.to_numpy()[others.argmax()]),
                start_effect_ratio=effect[behind] / max(others.max(), 1e-9),
            )
    return MaskGridMetrics(start_why_not=OTHER_STARTS)


def _paper_start_metrics(first_only: pd.DataFrame, texts: pd.DataFrame, behind: int | None) -> MaskGridMetrics:
    """Compare the paper's mask in the next block with attention behind the ME layer alone with that in others alone."""
    rate = _nearest(first_only)["rate"] if len(first_only) else None
    cells = first_only[first_only["rate"] == rate].set_index("start")["cell"]
    if behind is None or behind not in cells.index or len(cells) < 4:
        return MaskGridMetrics(paper_start_why_not=OTHER_STARTS)
    change = 1 - texts["sink_mass"][list(cells)].div(texts["sink_mass"][UNMASKED], axis=0)
    sizes = (change * np.sign(change.mean())).set_axis(cells.index, axis=1)  # [text, start]; each mean is positive
    elsewhere = sizes.drop(columns=behind).mean()
    strongest, own = int(elsewhere.idxmax()), float(sizes[behind].mean())
    return MaskGridMetrics(
        paper_start_rate=rate,
        paper_start_effect=own,
        paper_start_elsewhere=elsewhere.max(),
        paper_start_strongest=strongest,
        paper_start_ratio=own / max(elsewhere.max(), 1e-9),
        **mean_metric("paper_start_margin", (sizes[behind] - 2 * sizes[strongest]).to_numpy()),
    )


# --- Token 0 in every two texts ---------------------------------------------------------------------------------------


def _diversity_metrics(of_paper: pd.DataFrame, texts: pd.DataFrame) -> MaskGridMetrics:
    if not len(of_paper):
        return MaskGridMetrics(diversity_why_not=NO_PAPER_MASK)
    cell = _nearest(of_paper)["cell"]
    found: dict[str, Any] = {}
    for name in ("input", "key"):
        columns = [
            texts[f"{name}_cosine_before"][UNMASKED], texts[f"{name}_cosine"][UNMASKED], texts[f"{name}_cosine"][cell]
        ]  # fmt: skip
        before, unmasked, masked = pd.concat(columns, axis=1).dropna().to_numpy().T
        if len(before) < 2:
            continue
        found[f"{name}_cosines"] = (before.mean(), unmasked.mean(), masked.mean())
        lost = _jackknifed(lambda before, unmasked: unmasked - before, before, unmasked)
        low, _ = mean_interval(lost)
        if lost.mean() <= 0 or low <= 0:  # NaN of two texts, which have no interval
            continue
        found[f"{name}_restored"] = _restored(before.mean(), unmasked.mean(), masked.mean())
        found[f"{name}_restored_interval"] = mean_interval(_jackknifed(_restored, before, unmasked, masked))
    if not {"input_restored", "key_restored"} & set(found):
        found["diversity_why_not"] = (
            "Token 0 is no more alike between texts behind the ME layer than before it: no rigidity to relax."
            if found
            else "No two texts have a cosine of token 0's attention input or key behind the ME layer."
        )
    return MaskGridMetrics(**found)


def _restored(before: Any, unmasked: Any, masked: Any) -> Any:
    return (unmasked - masked) / (unmasked - before)


def _jackknifed(statistic: Callable[..., Any], *cosines: Float[np.ndarray, " text"]) -> Float[np.ndarray, " text"]:
    """Return the jackknife's pseudo-values (Tukey 1958), whose mean's interval is that of the statistic.

    Pairs that share a text are not independent, so that the spread of the texts' own means is half of what it must be.

    Args:
        statistic: of means over all pairs of texts, one number for each of `cosines`.
        cosines: of each text with the others, mean over those. Two texts give no pseudo-value but the statistic.
    """
    n = len(cosines[0])
    whole = statistic(*(each.mean() for each in cosines))
    if n < 3:
        return np.full(n, whole)
    left = [(n * each.mean() - 2 * each) / (n - 2) for each in cosines]  # the mean over pairs without each text
    return n * whole - (n - 1) * np.asarray(statistic(*left))


def _mean(row: pd.Series, column: str, name: str) -> dict[str, Any]:
    """Return a configuration's mean over texts and its interval as fields of metrics."""
    return {name: row[column], f"{name}_interval": (float(row[f"{column}_low"]), float(row[f"{column}_high"]))}
