"""Interquartile mean and stratified bootstrap, against values worked out by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, trim_mean

from prelar.report.statistics import (
    bootstrap_interval,
    estimate,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)

SCORES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([7], 7),
        ([0, 10], 5),
        ([0, 1, 2, 9], 1.5),
        ([5, 0, 1, 100, 2, 3, 4, -50], 2.5),
        ([0, 0, 0, 1, 1], 1 / 3),
    ],
)
def test_the_middle_half_by_hand(scores: list[float], expected: float) -> None:
    assert interquartile_mean(scores) == pytest.approx(expected)


@given(SCORES)
def test_it_is_the_trimmed_mean(scores: list[float]) -> None:
    assert interquartile_mean(scores) == pytest.approx(trim_mean(scores, 0.25), abs=1e-9)


@given(SCORES, st.randoms(use_true_random=False), st.floats(-10, 10), st.floats(0.1, 10))
def test_order_does_not_count_and_units_go_through(
    scores: list[float], random: np.random.Generator, shift: float, factor: float
) -> None:
    shuffled = list(scores)
    random.shuffle(shuffled)  # type: ignore[arg-type]
    moved = factor * np.array(shuffled) + shift
    assert interquartile_mean(moved) == pytest.approx(
        factor * interquartile_mean(scores) + shift, rel=1e-6, abs=1e-6
    )
    assert min(scores) - 1e-9 <= interquartile_mean(scores) <= max(scores) + 1e-9


def test_one_column_per_score() -> None:
    assert interquartile_mean([[0, 1], [1, 1], [2, 1], [9, 5]]).tolist() == [1.5, 1]


def test_no_scores_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no scores"):
        interquartile_mean([])


@pytest.mark.parametrize("tasks", [[], [[[1.0]]], [[[0.0], [1.0]], [[1.0]]]])
def test_one_seed_has_no_interval(tasks: list[list[list[float]]]) -> None:
    assert bootstrap_interval(tasks) is None


def test_two_seeds_by_hand() -> None:
    """Of seeds 0 and 1 the mean is 0 or 1 a quarter of the time each, 1/2 else: the interval is [0, 1]."""
    low, high = bootstrap_interval([[[0.0], [1.0]]]) or pytest.fail("no interval")
    assert (low.tolist(), high.tolist()) == ([0], [1])
    low, high = bootstrap_interval([[[0.0], [1.0]]], level=0.4, resamples=4000) or pytest.fail("no interval")
    assert (low.tolist(), high.tolist()) == ([0.5], [0.5])


def test_seeds_are_drawn_within_their_task() -> None:
    """Tasks far apart whose seeds agree have no spread, which a draw over all runs would show."""
    low, high = bootstrap_interval([[[0.0]] * 3, [[1.0]] * 3]) or pytest.fail("no interval")
    assert low == high == pytest.approx(0.5)


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=6), min_size=1, max_size=4),
    st.integers(0, 2**31),
)
def test_an_interval_lies_within_the_scores_and_repeats(tasks: list[list[float]], seed: int) -> None:
    scores = [np.array(task)[:, None] for task in tasks]
    first = bootstrap_interval(scores, resamples=200, seed=seed)
    again = bootstrap_interval(scores, resamples=200, seed=seed)
    assert first is not None and again is not None
    (low,), (high,) = first
    pooled = [score for task in tasks for score in task]
    assert min(pooled) - 1e-12 <= low <= high <= max(pooled) + 1e-12
    assert again[0] == low and again[1] == high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """About 95 in 100 intervals of 30 normal scores hold the true mean; a bootstrap misses a few more."""
    random = np.random.default_rng(0)
    scores = [random.standard_normal((10, 300)) for _ in range(3)]
    low, high = bootstrap_interval(scores, resamples=500) or pytest.fail("no interval")
    assert 0.87 <= np.mean((low <= 0) & (high >= 0)) <= 0.99


def test_estimates_state_n() -> None:
    (found,) = estimate([[[0.0], [1.0]], [[1.0], [1.0]]])
    assert (found.n, found.iqm, found.mean) == (4, 1.0, 0.75)
    assert found.low is not None and found.high == 1
    (alone,) = estimate([[[0.25]]])
    assert (alone.n, alone.iqm, alone.low, alone.high) == (1, 0.25, None, None)


def test_the_probability_of_improvement_by_hand_and_by_mann_whitney() -> None:
    assert probability_of_improvement([[1.0, 3.0]], [[2.0, 2.0]])[0] == 0.5
    assert probability_of_improvement([[3.0, 3.0], [0.0, 1.0]], [[2.0, 2.0], [1.0, 1.0]])[0] == (1 + 0.25) / 2
    random = np.random.default_rng(0)
    x, y = random.normal(0.5, 1, 12), random.normal(0, 1, 9)
    value, low, high = probability_of_improvement([x], [y])
    assert value == pytest.approx(mannwhitneyu(x, y).statistic / (12 * 9)) and low < value < high
    back = probability_of_improvement([y], [x])[0]
    assert value + back == pytest.approx(1)


def test_a_performance_profile_falls_from_all_runs_to_none() -> None:
    scores = [[0.0, 0.5, 1.0], [0.25, 0.25]]
    share, low, high = performance_profile(scores, [-1, 0, 0.25, 0.5, 1])
    assert share.tolist() == [1, 0.8, 0.4, 0.2, 0]
    assert (low <= share).all() and (share <= high).all() and low[0] == high[0] == 1
    assert (np.diff(low) <= 0).all() and (np.diff(high) <= 0).all()
