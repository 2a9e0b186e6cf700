"""Intervals and tests, next to values worked out by hand."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest

from melens.analysis import statistics
from melens.analysis.statistics import holm, paired_permutation_p


def test_bootstrap_interval_holds_the_mean_and_is_repeatable():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    low, high = statistics.bootstrap_mean(values)
    assert 1 < low < 2.5 < high < 4
    assert statistics.bootstrap_mean(values) == (low, high)
    assert all(np.isnan(statistics.bootstrap_mean(values[:1])))


def test_means_are_taken_by_group_without_what_is_missing():
    table = pd.DataFrame({"layer": [0, 0, 0, 1, 1], "prompt": [0, 1, 2, 0, 1], "x": [1.0, 3.0, np.nan, 5.0, 5.0]})
    summary = statistics.mean_by(table, "x")
    assert summary["mean"].tolist() == [2, 5]
    assert summary.loc[1, ["low", "high"]].tolist() == [5, 5]
    assert 1 <= summary.low[0] < summary.high[0] <= 3


def test_a_number_is_written_with_its_interval_if_it_has_one():
    assert statistics.with_interval(1.638, (1.6, 1.7)) == "1.64 (1.6 to 1.7)"
    assert statistics.with_interval(0.021, None, ".1%") == "2.1%"
    assert statistics.with_interval(2.0, (float("nan"), float("nan"))) == "2"


def test_the_peak_is_the_layer_of_the_largest_value():
    assert statistics.peak_layer(pd.DataFrame({"layer": [3, 4, 9], "mean": [-2.0, 5.0, 1.0]})) == 4


HALF = np.tile([0.0, 1.0], 200)
"""400 coin flips: their mean 0.5 has the standard error 0.5 / 20 = 0.025."""


@pytest.mark.parametrize("n_trainings", [1, 2])
@pytest.mark.parametrize(
    ("confidence", "standard_errors"), [({}, 1.960), ({"confidence": 0.9}, 1.645), ({"confidence": 0.99}, 2.576)]
)
def test_an_interval_reaches_as_far_as_its_confidence_says_and_95_percent_by_default(
    n_trainings, confidence, standard_errors
):
    interval = statistics.bootstrap_mean(np.stack([HALF] * n_trainings, axis=1), **confidence)
    np.testing.assert_allclose(np.subtract(interval, 0.5) / 0.025, [-standard_errors, standard_errors], atol=0.15)


def test_the_interval_of_a_table_is_95_percent():
    table = pd.DataFrame({"layer": 0, "prompt": range(400), "x": HALF})
    assert statistics.mean_by(table, "x").loc[0, ["low", "high"]].tolist() == pytest.approx([0.451, 0.549], abs=0.004)


def test_trainings_are_drawn_anew_as_prompts_are():
    # Two trainings of 0 and 1 on every prompt: the mean of two draws is 0, 0.5 or 1, at 25, 50 and 25 percent.
    values = np.stack([np.zeros(50), np.ones(50)], axis=1)
    assert statistics.bootstrap_mean(values) == (0, 1)
    assert statistics.bootstrap_mean(values, confidence=0.4) == (0.5, 0.5)
    assert statistics.bootstrap_mean(values.mean(axis=1)) == (0.5, 0.5)


def test_what_is_drawn_in_parts_is_what_is_drawn_at_once(monkeypatch):
    differences = np.random.default_rng(2).normal(0.1, size=(33, 3))

    def results():
        return (
            statistics.bootstrap_mean(differences),
            statistics.bootstrap_mean(differences[:, 0]),
            paired_permutation_p(differences[:, 0]),
        )

    at_once = results()
    monkeypatch.setattr(statistics, "_MOST_DRAWN", 33 * 7)
    assert results() == at_once


def test_memory_does_not_grow_with_the_number_of_resamples():
    differences = np.random.default_rng(3).normal(size=2_000)
    tracemalloc.start()
    paired_permutation_p(differences)  # all signs at once: 160 MB
    for values in (differences, np.stack([differences] * 2, axis=1)):
        statistics.bootstrap_mean(values, resamples=10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_a_paired_permutation_test_tries_every_sign():
    # Of the 8 choices of signs of (1, 2, 3), two have a mean as far from 0 as 2.
    assert paired_permutation_p(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert paired_permutation_p(np.array([1.0, -1.0])) == 1
    assert np.isnan(paired_permutation_p(np.array([1.0])))
    noise = np.random.default_rng(0).normal(size=40)
    assert paired_permutation_p(noise - noise.mean()) > 0.9
    assert paired_permutation_p(noise + 3) == 1 / 10_001


def test_the_same_holds_for_drawn_signs_as_for_all():
    differences = np.random.default_rng(1).normal(size=12)
    assert 0.2 < paired_permutation_p(differences) < 0.3
    drawn = paired_permutation_p(differences, resamples=4_000)
    assert drawn == pytest.approx(paired_permutation_p(differences, resamples=2**12), abs=0.02)


def test_holm_multiplies_by_how_many_are_left():
    np.testing.assert_allclose(holm(np.array([0.03, 0.01, 0.02])), [0.04, 0.03, 0.04])
    np.testing.assert_allclose(holm(np.array([0.5, np.nan, 0.001])), [0.5, np.nan, 0.002])
    assert holm(np.array([0.9, 0.8])).tolist() == [1, 1]
