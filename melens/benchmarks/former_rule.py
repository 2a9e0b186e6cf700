"""The rule until 2026-11-26 for differences between scores, whose verdicts stand beside those of today's.

It tested over items alone, as if one training told of others, and asked of several trainings that a bootstrap over
items and trainings excludes 0. Of trainings that differ by chance by 2 points it called 47% of single ones better or
worse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from melens.analysis.statistics import holm

__all__ = ["former_verdicts", "two_way_bootstrap"]


def two_way_bootstrap(values: np.ndarray, *, resamples: int = 2_000, seed: int = 0) -> tuple[float, float]:
    """Compute the percentile bootstrap's 95% interval of a mean over items and trainings, `[item, training]`."""
    generator = np.random.default_rng(seed)
    means = []
    for begin in range(0, resamples, batch := max(1, 2**20 // len(values))):  # 8 MB at once
        rows = generator.integers(len(values), size=(min(batch, resamples - begin), len(values)))
        means.append(np.stack([column[rows].mean(axis=1) for column in values.T], axis=1))
    by_training = np.concatenate(means)
    drawn = np.take_along_axis(by_training, generator.integers(values.shape[1], size=by_training.shape), axis=1)
    low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
    return (float(low), float(high))


def former_verdicts(scores: pd.DataFrame, alpha: float) -> list[str]:
    """Give each difference its former verdict, from `p_items`, and of several trainings `former_low`, `former_high`."""
    corrected = holm(scores["p_items"].where(scores["shown"]).to_numpy())
    rows = scores.assign(p_corrected=corrected).to_dict("records")
    return [_verdict(row, alpha) for row in rows]


def _verdict(row: Any, alpha: float) -> str:
    if np.isnan(row["p_corrected"]):
        return ""
    if row["p_corrected"] >= alpha or row["former_low"] <= 0 <= row["former_high"]:  # NaN of one training is neither
        return "no difference shown"
    return "better" if (row["difference"] > 0) == row["higher_is_better"] else "worse"
