"""Statistics of a benchmark's items: means, differences to the unmasked model, and the best rate.

`summarise` compares every mask with the unmasked model on the same items, `correct` corrects the p-values of all
comparisons together and gives each a verdict, and `best_rates` chooses the best rate on one half of the items and
scores it on the other.

Masks on one model are compared over items alone: what is shown is shown of that model. Where models were trained, their
trainings are sampled as well, and it takes three of them: of two that differ by chance, many items show a difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from melens.analysis.statistics import (
    holm,
    least_paired_p,
    mcnemar_p,
    mean_interval,
    paired_permutation_p,
    share_interval,
    two_way_interval,
    two_way_p,
)  # fmt: skip
from melens.benchmarks.former_rule import former_verdicts, two_way_bootstrap
from melens.errors import MelensError

__all__ = [
    "ALPHA", "FEW_ITEMS", "FEW_TRAININGS", "LEAST_TRAININGS", "best_rates", "check_scores", "correct", "count_verdicts",
    "summarise",
]  # fmt: skip

ALPHA = 0.05
"""A difference is shown where its corrected p-value is below this."""

LEAST_TRAININGS = 3
"""So many trainings of each row tell what others would give; `two_way_p` is sized for that."""

FEW_TRAININGS, FEW_ITEMS = "too few trainings", "too few items"
"""Verdicts on differences that could not be shown whatever their size."""


def check_scores(names: Iterable[str], scores: Iterable[float], what: str) -> None:
    """Raise a `MelensError` that names the first item whose score is NaN or infinite.

    Without this check a broken model would score like one that guesses: among choices `argmax` takes NaN for the
    likeliest, and greedy decoding for the wrong token.

    Args:
        names, scores: of each item.
        what: kind of score, such as "log-likelihood".
    """
    for name, score in zip(names, scores, strict=True):
        if not math.isfinite(score):
            raise MelensError(
                f"{name}: the {what} is {score}. Look for NaN in the model's weights, or load it in float32."
            )


def summarise(items: pd.DataFrame, unmasked: str) -> pd.DataFrame:
    """Average the items of each benchmark, metric and mask, and compare them with those of the unmasked model.

    Args:
        items: a row for each item, with `task`, `mask`, `seed` and the columns of `harness.COLUMNS`. Where trainings
            are compared, `training` is the seed of each; a mask with one training is compared with every training of
            another, as is right for the model before any training alone.
        unmasked: name of the unmasked model among the masks.

    Returns:
        A row for each `task`, `metric` and `mask`: `n` items, `n_seeds` (of samples and trainings), `n_trainings`
        (compared, or its own; 0 without the column `training`), `mean`, its interval over items `low` to `high` (exact
        for right or wrong answers), `sd` of the seeds' means (NaN with one seed), `chance`, `higher_is_better`,
        `shown`, `n_replies`, and `n_unfinished` replies that end inside a thought. Where the unmasked model was scored
        on the same items also `difference` with its interval `difference_low` to `difference_high`, `p`, and `least_p`,
        which so many items can give at least. Of one model these are over items (exact McNemar for right or wrong
        answers of one seed, else a paired permutation test); of trainings over items and trainings (`two_way_p`), with
        no interval and no p for fewer than three. Of all comparisons together come `p_corrected` (Holm, over all
        tested differences of shown metrics) and `verdict`. `p_items` (over items, whatever the trainings),
        `former_low`, `former_high` and `former_verdict` are the rule's until 2026-11-26.

    Raises:
        MelensError: an item's value is NaN or infinite, or some seeds or trainings of a mask lack an item.
    """
    has_trainings = "training" in items
    defaults = {"training": 0, "unfinished": False}
    items = items.assign(**{name: value for name, value in defaults.items() if name not in items})
    _check_items(items)
    rows = []
    for (task, metric), of_metric in items.groupby(["task", "metric"], sort=False):
        own = dict(iter(of_metric.groupby("mask", sort=False)))
        by_mask = {mask: _by_item(of_mask, ["training", "seed"]) for mask, of_mask in own.items()}
        for mask, values in by_mask.items():
            per_item = values.mean(axis=1)
            interval = share_interval if np.isin(values, (0.0, 1.0)).all() else mean_interval
            low, high = interval(per_item.to_numpy())
            row = {"task": task, "metric": metric, "mask": mask, "n": len(per_item), "n_seeds": values.shape[1]}
            row["n_trainings"] = own[mask]["training"].nunique() if has_trainings else 0
            row |= {"mean": float(per_item.mean()), "low": low, "high": high, "sd": float(values.mean().std())}
            row["chance"] = float(of_metric["chance"].mean(skipna=False))  # NaN where items have no choices
            row |= {name: bool(of_metric[name].iloc[0]) for name in ("higher_is_better", "shown")}
            row |= {"n_replies": len(own[mask]), "n_unfinished": int(own[mask]["unfinished"].sum())}
            row |= dict.fromkeys(_COMPARED, float("nan"))
            if mask != unmasked and unmasked in by_mask:
                row |= _difference(by_mask[unmasked], values, has_trainings)
            rows.append(row)
    return correct(pd.DataFrame(rows))


_COMPARED = (
    "difference", "difference_low", "difference_high", "p", "least_p", "p_items", "former_low", "former_high",
)  # fmt: skip


def _check_items(items: pd.DataFrame) -> None:
    names = items["task"] + ", " + items["mask"] + ", item " + items["item"].astype(str)
    check_scores(names, items["value"], "score")


def _by_item(items: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Lay one metric's values out, `[item, columns]`; a `MelensError` names an item that some columns lack."""
    wide = items.pivot_table(index="item", columns=columns, values="value", sort=False)
    incomplete = wide.index[wide.isna().any(axis=1)]
    if len(incomplete):
        raise MelensError(
            f"{items['task'].iloc[0]}: item {incomplete[0]} was not scored for every {' and '.join(columns)}, so the "
            "means cannot be compared. Score the same items each time."
        )
    return wide


def correct(scores: pd.DataFrame) -> pd.DataFrame:
    """Correct the p-values by Holm's method, over all tested differences of shown metrics, and give each a verdict.

    A difference whose corrected p-value could not be below `ALPHA`, had all of its items differed the same way, has the
    verdict `FEW_ITEMS` and counts among the corrected ones; one of fewer than three trainings has `FEW_TRAININGS`.
    """
    corrected, least = (holm(scores[name].where(scores["shown"]).to_numpy()) for name in ("p", "least_p"))
    scores = scores.assign(p_corrected=corrected)
    verdicts = [_verdict(row, of_least) for row, of_least in zip(scores.to_dict("records"), least, strict=True)]
    return scores.assign(verdict=verdicts, former_verdict=former_verdicts(scores, ALPHA))


def _difference(unmasked: pd.DataFrame, masked: pd.DataFrame, has_trainings: bool) -> dict[str, Any]:
    items = unmasked.index.intersection(masked.index, sort=False)
    before, after = (
        values.loc[items].T.groupby(level="training").mean().T.to_numpy() for values in (unmasked, masked)
    )  # [item, training]; a single training of one side is broadcast over the other's
    differences = after - before
    per_item, n_trainings = differences.mean(axis=1), differences.shape[1]
    is_right_or_wrong = np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all()
    if is_right_or_wrong and unmasked.shape[1] == masked.shape[1] == 1:
        p_items = mcnemar_p(int((per_item > 0).sum()), int((per_item < 0).sum()))
    else:
        p_items = paired_permutation_p(per_item)
    found: dict[str, Any] = {"difference": float(per_item.mean()), "p_items": p_items}
    if not has_trainings:
        low, high = mean_interval(per_item)
        found |= {"p": p_items, "least_p": least_paired_p(len(items))}
    else:
        low, high = two_way_interval(differences)
        found |= {"n_trainings": n_trainings, "p": two_way_p(differences)}
        if n_trainings >= LEAST_TRAININGS:
            found["least_p"] = least_paired_p(len(items))
    if n_trainings > 1:
        found["former_low"], found["former_high"] = two_way_bootstrap(differences)
    return found | {"difference_low": low, "difference_high": high}


def _verdict(row: Any, least_corrected: float) -> str:
    if not row["shown"] or np.isnan(row["difference"]):
        return ""
    if 0 < row["n_trainings"] < LEAST_TRAININGS:
        return FEW_TRAININGS
    if np.isnan(row["p_corrected"]) or least_corrected >= ALPHA:
        return FEW_ITEMS
    if row["p_corrected"] >= ALPHA:
        return "no difference shown"
    return "better" if (row["difference"] > 0) == row["higher_is_better"] else "worse"


def count_verdicts(scores: pd.DataFrame, by: str, verdict: str = "verdict") -> dict[str, dict[str, int]]:
    """Count verdicts on differences of shown metrics, for each value of a column.

    Returns:
        `all`, those that were tested; of them `better`, `worse`, and the benchmarks (`tasks`) that they are of; and
        those that were not tested, by `FEW_TRAININGS` and `FEW_ITEMS`.
    """
    compared = scores[scores["shown"] & (scores[verdict] != "")]
    counts = {}
    for group, own in compared.groupby(by, sort=False):
        tested = own[~own[verdict].isin([FEW_TRAININGS, FEW_ITEMS])]
        counts[str(group)] = {"all": len(tested), "tasks": tested["task"].nunique()} | {
            name: int((own[verdict] == name).sum()) for name in ("better", "worse", FEW_TRAININGS, FEW_ITEMS)
        }
    return counts


def best_rates(items: pd.DataFrame, rates: pd.DataFrame, unmasked: str, *, seed: int = 0) -> pd.DataFrame:
    """Choose the best rate on half of a benchmark's items and score it on the other half; compare with all items.

    Choosing and scoring on the same items is biased: the best of several rates looks good by chance alone, and the more
    rates there are, the better it looks.

    Args:
        items: as for `summarise`.
        rates: a row for each `mask`, with its `rate` and its `family`: masks that differ in the rate only.
        unmasked: name of the unmasked model among the masks.
        seed: of the split into halves.

    Returns:
        A row for each `task`, `metric`, `family` and `selection` (`held-out half`, `same items`): the chosen `rate` and
        `mask`, `n` items scored, their `mean`, its `difference` to the unmasked model on the same items, and that
        difference's interval `low` to `high`. Families with one rate have no row.

    Raises:
        MelensError: as `summarise`.
    """
    _check_items(items)
    rows = []
    for (task, metric), of_metric in items.groupby(["task", "metric"], sort=False):
        per_item = _by_item(of_metric, ["mask"])
        sign = 1 if of_metric["higher_is_better"].iloc[0] else -1
        order = np.random.default_rng(seed).permutation(len(per_item))
        chosen_on, scored_on = (per_item.iloc[part] for part in np.array_split(order, 2))
        selections = ("held-out half", chosen_on, scored_on), ("same items", per_item, per_item)
        for family, of_family in rates.groupby("family", sort=False):
            names = [name for name in of_family["mask"] if name in per_item]
            if len(names) < 2 or unmasked not in per_item or len(per_item) < 4:
                continue
            for selection, choosing, scoring in selections:
                best = str((sign * choosing[names].mean()).idxmax())
                differences = (scoring[best] - scoring[unmasked]).to_numpy()
                rate = float(of_family.set_index("mask")["rate"][best])
                difference = (float(differences.mean()), *mean_interval(differences))
                mean = float(scoring[best].mean())
                rows.append((task, metric, family, selection, rate, best, len(scoring), mean, *difference))
    columns = ["task", "metric", "family", "selection", "rate", "mask", "n", "mean", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)
