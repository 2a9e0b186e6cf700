"""Means and shares over prompts, texts or items: their 95% intervals, and paired tests of differences.

Every line of a figure and every number of a claim is one of them. A statistic never averages NaN and never drops it:
`MelensError` says how many values are no numbers. `tidy`, `mean_by` and `holm` alone take NaN, as "not measured": a
block without attention, a prompt of one token, a difference without a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from scipy.special import betainccinv, betaincinv, stdtrit

from melens.errors import MelensError

__all__ = [
    "holm", "least_paired_p", "mcnemar_p", "mean_by", "mean_interval", "mean_metric", "mean_of_pairs",
    "paired_permutation_p", "peak_layer", "share_interval", "tidy", "two_way_interval", "two_way_p", "two_way_reach",
    "with_interval",
]  # fmt: skip

FEW = 50
"""From so many values on a mean has a bootstrap interval. Of fewer the percentile bootstrap is too narrow: it covers
the mean of normal values in 41, 72, 80 and 84% of samples of 2, 3, 4 and 5, where Student's t covers it in 95%."""

_RESAMPLES = 10_000
"""Choices of signs of a permutation test."""

_MOST_DRAWN = 2**20
"""Numbers drawn at once, 8 MB: 10,000 resamples of MMLU's 14,000 items in one piece are 2.2 GB."""


def mean_interval(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """Compute the interval of a mean over prompts; (nan, nan) for fewer than three, of which t is 13 errors wide.

    Student's t (1908) where there are fewer than `FEW`, else the percentile bootstrap (Efron 1979).

    Args:
        values: [prompt].
        confidence: how often such an interval covers the mean.
        resamples, seed: of the bootstrap.

    Raises:
        MelensError: a value is NaN or infinite.
    """
    _check_finite(values)
    values = np.asarray(values, dtype=float)
    if len(values) < 3:
        return (float("nan"), float("nan"))
    if len(values) < FEW:
        mean, error = float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5
        reach = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * error
        return (mean - reach, mean + reach)
    from scipy.stats import bootstrap  # a third of a second and 20 MiB, which few runs need

    found = bootstrap(
        (values,), np.mean, n_resamples=resamples, batch=_batch_of(len(values)), confidence_level=confidence,
        method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    return (float(found.confidence_interval.low), float(found.confidence_interval.high))


def share_interval(has: np.ndarray, *, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the exact interval of a share (Clopper & Pearson 1934): 36 of 36 is 0.90 to 1; of none (nan, nan).

    Args:
        has: [prompt], whether each has it; or how often in several tries, from 0 to 1. As prompts differ among
            themselves less in such means, the interval then covers the share more often.
        confidence: how often such an interval covers the share, at least.

    Raises:
        MelensError: a value is NaN or infinite.
    """
    _check_finite(has)
    n, n_have, tail = len(has), float(np.sum(has)), (1 - confidence) / 2
    if not n:
        return (float("nan"), float("nan"))
    low = float(betaincinv(n_have, n - n_have + 1, tail)) if n_have > 0 else 0.0
    high = float(betainccinv(n_have + 1, n - n_have, tail)) if n_have < n else 1.0
    return (low, high)


# --- Items and trainings, both sampled --------------------------------------------------------------------------------


def mean_of_pairs(
    cosines: Float[np.ndarray, "n n"], counts: Bool[np.ndarray, "n n"]
) -> tuple[float, tuple[float, float]]:
    """Average over pairs of inputs, with the interval of the jackknife's pseudo-values n·U - (n - 1)·U without one.

    An input is in n - 1 pairs: the interval of each input's mean over its pairs would be half as wide as it should be
    (Tukey 1958).

    Args:
        cosines, counts: symmetric; which pairs count. The diagonal does not.

    Returns:
        The mean, NaN without a pair, and its interval, (NaN, NaN) for fewer than three inputs.
    """
    counts = counts & ~np.eye(len(counts), dtype=bool)
    paired = counts.any(axis=1)
    sums, numbers = np.where(counts, cosines, 0).sum(axis=1)[paired], counts.sum(axis=1)[paired]
    total, n_pairs, n = sums.sum(), numbers.sum(), len(sums)
    if n < 2:
        return float("nan"), (float("nan"), float("nan"))
    mean, left = total / n_pairs, n_pairs - 2 * numbers
    if n < 3 or (left == 0).any():
        return float(mean), (float("nan"), float("nan"))
    pseudo_values = n * mean - (n - 1) * (total - 2 * sums) / left
    low, high = mean_interval(pseudo_values)
    return float(mean), (max(-1.0, low), min(1.0, high))


def two_way_reach(
    error_of_items: Any, error_of_trainings: Any, n_items: int, n_trainings: int, *, alpha: Any = 0.05
) -> Any:
    """Compute how far the interval of a mean over items and trainings reaches to either side.

    `reach² = (t_items * error_of_items)² + (t_trainings * error_of_trainings)²`, where t is Student's for n - 1 degrees
    of freedom at alpha / 2 (Banerjee 1961, Sankhya 23, "Confidence interval for linear combination of means of k
    populations"). It covers the mean in at least 1 - alpha of samples, whatever the ratio of the two errors. One t for
    the sum of the variances with Satterthwaite's degrees of freedom does not: of three trainings a false difference
    comes in 8% of samples at 0.05, and in 2.5% at 0.05 / 12, as after Holm's correction for twelve.

    Args:
        error_of_items, error_of_trainings: standard errors, of the items' means over trainings and the other way round.
            Both hold what an item does in one training alone, which makes the interval a little wider than it need be.
        n_items, n_trainings: at least two of each.
        alpha: how often the mean may be outside.
    """
    of_items, of_trainings = (-stdtrit(n - 1, np.asarray(alpha) / 2) for n in (n_items, n_trainings))
    return np.sqrt((of_items * error_of_items) ** 2 + (of_trainings * error_of_trainings) ** 2)


def two_way_interval(values: np.ndarray, *, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the interval of a mean over items and trainings by `two_way_reach`.

    Args:
        values: [item, training]; fewer than three of either have no interval (nan, nan).
        confidence: how often such an interval covers the mean, at least.

    Raises:
        MelensError: a value is NaN or infinite.
    """
    _check_finite(values)
    if min(values.shape) < 3:
        return (float("nan"), float("nan"))
    mean, errors = float(values.mean()), _two_errors(values)
    reach = float(two_way_reach(*errors, *values.shape, alpha=1 - confidence))
    return (mean - reach, mean + reach)


def two_way_p(values: np.ndarray) -> float:
    """Compute the two-sided p-value of a mean over items and trainings: the alpha whose interval ends at 0.

    Args:
        values: [item, training]; fewer than three of either have no p-value (nan).

    Raises:
        MelensError: a value is NaN or infinite.
    """
    _check_finite(values)
    if min(values.shape) < 3:
        return float("nan")
    mean, errors = abs(float(values.mean())), _two_errors(values)
    if mean == 0 or max(errors) == 0:
        return float(mean == 0)

    def beyond(exponent: float) -> float:
        return float(two_way_reach(*errors, *values.shape, alpha=10**exponent)) - mean

    least = -30.0
    return float(10 ** brentq(beyond, least, 0)) if beyond(least) > 0 else 10**least


def _two_errors(values: np.ndarray) -> tuple[float, float]:
    """Return the standard errors of a mean over items, and over trainings, of `[item, training]`."""
    n_items, n_trainings = values.shape
    of_items, of_trainings = values.mean(axis=1).std(ddof=1), values.mean(axis=0).std(ddof=1)
    return float(of_items / n_items**0.5), float(of_trainings / n_trainings**0.5)


# --- Tests over items -------------------------------------------------------------------------------------------------


def paired_permutation_p(differences: np.ndarray, *, resamples: int = _RESAMPLES, seed: int = 0) -> float:
    """Compute the two-sided p-value of a paired permutation test: how often random signs give as large a mean.

    Args:
        differences: [item], of two values each; fewer than two have no p-value (nan).
        resamples: random choices of signs; where there are no more choices than that, each is tried once.
        seed: of the random signs.

    Raises:
        MelensError: a difference is NaN or infinite.
    """
    _check_finite(differences)
    differences = np.asarray(differences, dtype=float)
    if len(differences) < 2:
        return float("nan")

    def size_of_mean(values: np.ndarray, axis: int) -> Any:
        return np.abs(values.mean(axis=axis))

    from scipy.stats import monte_carlo_test, permutation_test  # as above

    if 2 ** len(differences) <= resamples:
        exact = permutation_test(
            (differences,), size_of_mean, permutation_type="samples", n_resamples=resamples, alternative="greater"
        )
        return float(exact.pvalue)
    generator = np.random.default_rng(seed)

    def with_random_signs(size: tuple[int, int]) -> np.ndarray:
        return (1 - 2 * generator.integers(2, size=size)) * differences

    # permutation_test draws signs too, as permutations of each pair in turn: 13 s instead of 0.9 for MMLU's items
    drawn = monte_carlo_test(
        differences, with_random_signs, size_of_mean, n_resamples=resamples, batch=_batch_of(len(differences)),
        alternative="greater",
    )  # fmt: skip
    return float(drawn.pvalue)


def mcnemar_p(better: int, worse: int) -> float:
    """Compute the exact two-sided p-value of McNemar's test from the items on which two answers differ (1947)."""
    from scipy.stats import binomtest  # as above

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def least_paired_p(n: int) -> float:
    """Return the least two-sided p-value that a paired test of n items can give: all differ the same way.

    Of five or fewer, whose 2 / 2^n is 0.06 or more, none is below 0.05.
    """
    return max(2 / 2**n, 1 / (_RESAMPLES + 1)) if n else float("nan")


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


# --- Tables and words -------------------------------------------------------------------------------------------------


def with_interval(value: float, interval: tuple[float | None, float | None] | None, form: str = ".3g") -> str:
    """Write a mean with its interval, `1.64 (1.61 to 1.67)`, or alone where there is none."""
    low, high = interval or (None, None)
    if low is None or high is None or np.isnan(low):
        return format(value, form)
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def mean_metric(name: str, values: np.ndarray) -> dict[str, Any]:
    """Return the mean over prompts `[prompt]` and its interval as fields of metrics: `name` and `name_interval`."""
    return {name: float(values.mean()), f"{name}_interval": mean_interval(values)}


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
    """Average a column over prompts: the columns `by`, `mean`, and `low` and `high`, its 95% interval.

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
        low, high = mean_interval(values.to_numpy())
        rows.append((*group, float(values.mean()), low, high))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high"])


_LOOK = "look for NaN in the model's weights, or load it in float32."


def _batch_of(n: int) -> int:
    """Return how many resamples of n values to draw at once; a generator gives the same ones in any number of parts."""
    return max(1, _MOST_DRAWN // n)


def _check_finite(values: object) -> None:
    array = np.asarray(values, dtype=float)
    if broken := int((~np.isfinite(array)).sum()):
        raise MelensError(f"{broken} of {array.size} values are NaN or infinite, so they have no statistic: {_LOOK}")
