"""Means over prompts with their bootstrap intervals: what every figure's line and every claim's number is.

NaN is never averaged and never dropped on the way: a statistic of values that are not all numbers raises `MelensError`.
Where NaN says "not measured", as of a block without attention or a difference that is not tested, the function says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from melens.errors import MelensError

__all__ = [
    "bootstrap_mean",
    "holm",
    "mcnemar_p",
    "mean_by",
    "paired_permutation_p",
    "peak_layer",
    "tidy",
    "with_interval",
]


def bootstrap_mean(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a mean over prompts; (nan, nan) below two prompts: there is none.

    Args:
        values: [prompt]; or [prompt, training], where prompts and trainings are both drawn anew.
        confidence, resamples, seed: of the bootstrap.

    Raises:
        MelensError: a value is NaN or infinite.
    """
    _check_finite(values)
    if len(values) < 2:
        return (float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    columns = np.asarray(values, dtype=float).reshape(len(values), -1).T
    rows = generator.integers(len(values), size=(resamples, len(values)))
    means = np.stack([column[rows].mean(axis=1) for column in columns], axis=1)
    if len(columns) > 1:
        means = np.take_along_axis(means, generator.integers(len(columns), size=means.shape), axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means.mean(axis=1), [tail, 1 - tail])
    return (float(low), float(high))


def paired_permutation_p(differences: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Compute the two-sided p-value of a paired permutation test: could each difference as well have the other sign?

    Every choice of signs is tried where there are at most `resamples` of them, else so many random ones; nan below two
    differences: there is nothing to test.

    Raises:
        MelensError: a difference is NaN or infinite.
    """
    _check_finite(differences)
    differences = np.asarray(differences, dtype=float)
    n = len(differences)
    if n < 2:
        return float("nan")
    observed = abs(differences.mean()) * (1 - 1e-12)
    if 2**n <= resamples:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((np.abs((signs * differences).mean(1)) >= observed).mean())
    signs = 1 - 2 * np.random.default_rng(seed).integers(2, size=(resamples, n))
    as_extreme = int((np.abs((signs * differences).mean(1)) >= observed).sum())
    return (as_extreme + 1) / (resamples + 1)


def mcnemar_p(better: int, worse: int) -> float:
    """Compute the exact two-sided p-value of McNemar's test from the items on which two answers differ (1947)."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Correct p-values for their number (Holm 1979): the chance of any false alarm among them stays below each.

    NaN stands for a difference that is not tested: it stays NaN and does not count.
    """
    p_values = np.asarray(p_values, dtype=float)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    corrected = np.full(len(p_values), np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)))
    return corrected


def with_interval(value: float, interval: tuple[float, float] | None, form: str = ".3g") -> str:
    """Write a mean with its interval, `1.64 (1.61 to 1.67)`, or alone where there is none."""
    if interval is None or np.isnan(interval[0]):
        return format(value, form)
    return f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"


def tidy(values: np.ndarray, name: str, column: str = "layer") -> pd.DataFrame:
    """Lay a `[prompt, group]` array out as the columns `prompt`, `column` and `name`.

    A prompt or a group of NaN alone was not measured, and has no rows.

    Raises:
        MelensError: NaN in a prompt and a group that were both measured.
    """
    missing = np.isnan(values)
    not_measured = missing.all(axis=0, keepdims=True) | missing.all(axis=1, keepdims=True)
    for prompt, group in np.argwhere(missing & ~not_measured)[:1]:
        raise MelensError(f"The {name} of prompt {prompt} at {column} {group} is NaN: {_LOOK}")
    prompts, groups = np.nonzero(~missing)
    return pd.DataFrame({"prompt": prompts, column: groups, name: values[prompts, groups]})


def peak_layer(points: pd.DataFrame, value: str = "mean") -> int:
    """Return the layer with the largest value; a `MelensError` if one is NaN or infinite."""
    _check_finite(points[value])
    return int(points["layer"].to_numpy()[points[value].to_numpy().argmax()])


def mean_by(table: pd.DataFrame, value: str, by: Sequence[str] = ("layer",)) -> pd.DataFrame:
    """Average a column over prompts: the columns `by`, `mean`, and `low` and `high`, its 95% bootstrap interval.

    Args:
        table: with one row a `prompt` and group. A prompt or a group of NaN alone was not measured, as the other tokens
            of a prompt that has one, and is left out.
        value: the column.
        by: the columns that name a group.

    Raises:
        MelensError: NaN in a prompt and a group that were both measured, or an infinite value.
    """
    measured = table[value].notna()
    both = [measured.groupby([table[name] for name in names]).transform("any") for names in (by, ["prompt"])]
    broken = table[~measured & both[0] & both[1]]
    for row in broken.head(1).to_dict("records"):
        place = ", ".join(f"{name} {row[name]}" for name in ("prompt", *by))
        raise MelensError(f"The {value} of {place} is NaN: {_LOOK}")
    rows = []
    for group, values in table[measured].groupby(list(by), observed=True)[value]:
        low, high = bootstrap_mean(values.to_numpy())
        rows.append((*group, float(values.mean()), low, high))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high"])


_LOOK = "look for NaN in the model's weights, or load it in float32."


def _check_finite(values: object) -> None:
    array = np.asarray(values, dtype=float)
    if broken := int((~np.isfinite(array)).sum()):
        raise MelensError(f"{broken} of {array.size} values are NaN or infinite, so they have no statistic: {_LOOK}")
