"""Intervals and tests, next to values worked out by hand."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest

from melens.analysis import statistics
from melens.analysis.statistics import holm, paired_permutation_p


def test_the_mean_of_few_has_the_interval_of_student():
    # 1, 2, 3, 4: mean 2.5, standard deviation 1.2910, standard error 0.6455; t of 3 degrees of freedom at 97.5%: 3.1824
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert statistics.mean_interval(values) == pytest.approx((2.5 - 2.0543, 2.5 + 2.0543), abs=1e-4)
    assert all(np.isnan(statistics.mean_interval(values[:2])))


@pytest.mark.parametrize("n", [3, 5, 20, statistics.FEW])
def test_an_interval_covers_the_mean_as_often_as_it_says(n):
    # The percentile bootstrap covers it in 72% of samples of 3 and in 84% of samples of 5.
    samples = np.random.default_rng(0).normal(size=(1_000, n))
    low, high = np.array([statistics.mean_interval(sample, resamples=500) for sample in samples]).T
    assert ((low <= 0) & (high >= 0)).mean() > 0.92


@pytest.mark.parametrize(
    ("has", "of", "low", "high"),  # worked out: all of n have from 0.025 ** (1 / n) to 1
    [(36, 36, 0.025 ** (1 / 36), 1), (9, 9, 0.025 ** (1 / 9), 1), (0, 9, 0, 1 - 0.025 ** (1 / 9)), (1, 1, 0.025, 1)],
)
def test_a_share_has_an_exact_interval(has, of, low, high):
    assert statistics.share_interval(np.arange(of) < has) == pytest.approx((low, high))


def test_means_of_several_tries_have_the_interval_of_as_many_that_have():
    half = statistics.share_interval(np.array([0.5, 0.5, 0.25, 0.75]))
    assert half == pytest.approx(statistics.share_interval(np.array([True, True, False, False])))


def test_means_are_taken_by_group_without_what_is_missing():
    layers, prompts = [0, 0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2]
    table = pd.DataFrame({"layer": layers, "prompt": prompts, "x": [1.0, 3.0, 2.0, np.nan, 5.0, 5.0, 5.0]})
    summary = statistics.mean_by(table, "x")
    assert summary["mean"].tolist() == [2, 5]
    assert summary.loc[1, ["low", "high"]].tolist() == [5, 5]
    assert summary.loc[0, ["low", "high"]].tolist() == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], 1e-4)


def test_a_number_is_written_with_its_interval_if_it_has_one():
    assert statistics.with_interval(1.638, (1.6, 1.7)) == "1.64 (1.6 to 1.7)"
    assert statistics.with_interval(0.021, None, ".1%") == "2.1%"
    assert statistics.with_interval(2.0, (float("nan"), float("nan"))) == "2"


def test_the_peak_is_the_layer_of_the_largest_value():
    assert statistics.peak_layer(pd.DataFrame({"layer": [3, 4, 9], "mean": [-2.0, 5.0, 1.0]})) == 4


HALF = np.tile([0.0, 1.0], 200)
"""400 coin flips: their mean 0.5 has the standard error 0.5 / 20 = 0.025."""


def three_times(values, **options):
    return statistics.two_way_interval(np.stack([values] * 3, axis=1), **options)


@pytest.mark.parametrize("interval", [statistics.mean_interval, three_times])
@pytest.mark.parametrize(
    ("confidence", "standard_errors"), [({}, 1.960), ({"confidence": 0.9}, 1.645), ({"confidence": 0.99}, 2.576)]
)
def test_an_interval_reaches_as_far_as_its_confidence_says_and_95_percent_by_default(
    interval, confidence, standard_errors
):
    reached = np.subtract(interval(HALF, **confidence), 0.5) / 0.025
    np.testing.assert_allclose(reached, [-standard_errors, standard_errors], atol=0.15)


def test_the_interval_of_a_table_is_95_percent():
    table = pd.DataFrame({"layer": 0, "prompt": range(400), "x": HALF})
    assert statistics.mean_by(table, "x").loc[0, ["low", "high"]].tolist() == pytest.approx([0.451, 0.549], abs=0.004)


# --- Items and trainings ----------------------------------------------------------------------------------------------


def test_items_and_trainings_each_have_their_own_student():
    # Means of the items 2, 3, 4: error 1 / sqrt(3); of the trainings 1, 3, 5: 2 / sqrt(3); t of 2 degrees: 4.3027
    values = np.array([[0.0, 2.0, 4.0], [1.0, 3.0, 5.0], [2.0, 4.0, 6.0]])
    reach, t = 4.3027 * (5 / 3) ** 0.5, 3 / (5 / 3) ** 0.5
    assert statistics.two_way_interval(values) == pytest.approx((3 - reach, 3 + reach), abs=1e-3)
    assert statistics.two_way_p(values) == pytest.approx(1 - t / (2 + t**2) ** 0.5)  # of 2 degrees it is algebraic
    items = np.array([1.0, 2.0, 3.0, 4.0])
    assert three_times(items) == pytest.approx(statistics.mean_interval(items))
    trainings = np.array([[1.0, 3.0, 5.0]] * 4)
    assert statistics.two_way_interval(trainings) == pytest.approx(statistics.mean_interval(trainings[0]))
    assert statistics.two_way_p(items[:, None] * [1, 1, 0]) > 0.05 > statistics.two_way_p(items[:, None] + [9, 9, 9])


@pytest.mark.parametrize("shape", [(400, 1), (400, 2), (2, 5)])
def test_one_or_two_trainings_tell_nothing_of_others(shape):
    values = np.random.default_rng(0).normal(5, size=shape)
    assert np.isnan([*statistics.two_way_interval(values), statistics.two_way_p(values)]).all()


def test_what_does_not_vary_is_certain():
    assert statistics.two_way_p(np.full((4, 3), 0.5)) == 0
    assert statistics.two_way_p(np.zeros((4, 3))) == 1
    assert statistics.two_way_p(1e6 + np.eye(4, 3) * 1e-9) == 1e-30  # the least that is told apart


N_ITEMS, SPREAD, DIFFER = 3_000, 0.02, 0.2
"""Trainings whose true scores spread by 2 points, on 3,000 items, of which 20% turn out otherwise."""


@pytest.mark.parametrize("n_trainings", [3, 4, 5])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 12])
@pytest.mark.parametrize("of_items", [DIFFER, 0.002])
def test_a_difference_by_chance_is_shown_no_more_often_than_alpha(n_trainings, alpha, of_items):
    """Normal two-way samples are drawn by their mean and its two errors, which are independent."""
    n, generator = 200_000, np.random.default_rng(0)
    trainings, items = SPREAD**2 / n_trainings, of_items / N_ITEMS
    mean = generator.normal(scale=(trainings + items) ** 0.5, size=n)
    errors = (
        (variance * generator.chisquare(degrees, size=n) / degrees) ** 0.5
        for variance, degrees in ((items, N_ITEMS - 1), (trainings, n_trainings - 1))
    )
    shown = np.abs(mean) > statistics.two_way_reach(*errors, N_ITEMS, n_trainings, alpha=alpha)
    assert shown.mean() < alpha + 3 * (alpha / n) ** 0.5
    if of_items < DIFFER and alpha == 0.05:  # almost only trainings differ: not less often either
        assert shown.mean() > 0.8 * alpha


def test_items_that_turn_out_otherwise_by_chance_do_so_too():
    generator, shown, one = np.random.default_rng(0), [], []
    for _ in range(200):
        gains = generator.normal(scale=SPREAD, size=3)
        drawn = generator.uniform(size=(N_ITEMS, 3))
        better, worse = drawn < (DIFFER + gains) / 2, drawn > 1 - (DIFFER - gains) / 2
        shown.append(statistics.two_way_p(better * 1.0 - worse) < 0.05)
        one.append(statistics.mcnemar_p(int(better[:, 0].sum()), int(worse[:, 0].sum())) < 0.05)
    assert np.mean(shown) < 0.05 + 3 * (0.05 / 200) ** 0.5
    assert np.mean(one) > 0.35  # of one training, 47%


# --- Tests over items -------------------------------------------------------------------------------------------------


def test_what_is_drawn_in_parts_is_what_is_drawn_at_once(monkeypatch):
    differences = np.random.default_rng(2).normal(0.1, size=63)

    def results():
        return statistics.mean_interval(differences), paired_permutation_p(differences)

    at_once = results()
    monkeypatch.setattr(statistics, "_MOST_DRAWN", 63 * 7)
    assert results() == at_once


def test_memory_does_not_grow_with_the_number_of_resamples():
    differences = np.random.default_rng(3).normal(size=2_000)
    tracemalloc.start()
    paired_permutation_p(differences)  # all signs at once: 160 MB
    statistics.mean_interval(differences, resamples=10_000)
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


@pytest.mark.parametrize(("n", "least"), [(1, 1), (5, 0.0625), (6, 0.03125), (500, 1 / 10_001)])
def test_few_pairs_have_no_small_p(n, least):
    assert statistics.least_paired_p(n) == least
    assert paired_permutation_p(np.ones(n)) == pytest.approx(least) or n == 1


def test_holm_multiplies_by_how_many_are_left():
    np.testing.assert_allclose(holm(np.array([0.03, 0.01, 0.02])), [0.04, 0.03, 0.04])
    np.testing.assert_allclose(holm(np.array([0.5, np.nan, 0.001])), [0.5, np.nan, 0.002])
    assert holm(np.array([0.9, 0.8])).tolist() == [1, 1]
