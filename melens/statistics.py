"""Means over prompts with their bootstrap intervals: what every figure's line and every claim's number is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

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
    """Compute the percentile bootstrap interval of a mean over prompts; (nan, nan) below two prompts.

    Args:
        values: [prompt]; or [prompt, training], where prompts and trainings are both drawn anew.
        confidence, resamples, seed: of the bootstrap.
    """
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
    differences.
    """
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
    """Correct p-values for their number (Holm 1979): the chance of any false alarm among them stays below each."""
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
    """Lay a `[prompt, group]` array out as the columns `prompt`, `column` and `name`, without its NaN."""
    prompts, groups = np.nonzero(~np.isnan(values))
    return pd.DataFrame({"prompt": prompts, column: groups, name: values[prompts, groups]})


def peak_layer(points: pd.DataFrame, value: str = "mean") -> int:
    """Return the layer with the largest value."""
    return int(points["layer"].to_numpy()[points[value].to_numpy().argmax()])


def mean_by(table: pd.DataFrame, value: str, by: Sequence[str] = ("layer",)) -> pd.DataFrame:
    """Average a column over prompts: the columns `by`, `mean`, and `low` and `high`, its 95% bootstrap interval.

    Args:
        table: with one row a prompt and group; NaN rows are left out.
        value: the column.
        by: the columns that name a group.
    """
    rows = []
    for group, values in table.dropna(subset=[value]).groupby(list(by), observed=True)[value]:
        low, high = bootstrap_mean(values.to_numpy())
        rows.append((*group, float(values.mean()), low, high))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high"])
