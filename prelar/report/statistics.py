"""Aggregates over tasks and seeds: interquartile mean, probability of improvement, performance profile.

Each with its stratified-bootstrap interval, as in Agarwal et al., Deep Reinforcement Learning at the Edge of
the Statistical Precipice, NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Aggregates of n runs: interquartile mean, mean, and the interval of the former, where there is one."""

    iqm: float
    mean: float
    low: float | None
    high: float | None
    n: int


def interquartile_mean(scores: npt.ArrayLike, axis: int = 0) -> Scores:
    """The mean of the middle half along an axis: a quarter of the scores, rounded down, is cut off each end.

    Raises:
        ValueError: there is no score.
    """
    ordered = np.sort(np.moveaxis(np.asarray(scores, dtype=np.float64), axis, 0), axis=0)
    count = len(ordered)
    if count == 0:
        raise ValueError("no scores to take the mean of")
    cut = count // 4
    middle: Scores = ordered[cut : count - cut].mean(axis=0)
    return middle


def bootstrap_interval(
    scores: Sequence[npt.ArrayLike], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[Scores, Scores] | None:
    """Percentile interval of the interquartile mean, runs drawn anew with replacement within each task.

    Args:
        scores: for each task an array (seeds, K), K scores of each run, such as the points of its curve. The
            tasks may differ in their numbers of seeds.
        resamples: how often the runs are drawn anew; the same draw serves all K scores.
        level: share of the resampled means that the interval holds.
        seed: of the draws.

    Returns:
        Low and high end, (K,) each; None where some task has one seed only, whose spread is unknown.
    """
    tasks = [np.asarray(task, dtype=np.float64) for task in scores]
    if not tasks or any(len(task) < 2 for task in tasks):
        return None
    random = np.random.default_rng(seed)
    picks, begin = [], 0
    for task in tasks:
        picks.append(begin + random.integers(0, len(task), (resamples, len(task))))
        begin += len(task)
    drawn, pooled = np.concatenate(picks, axis=1), np.concatenate(tasks)
    means = np.stack([interquartile_mean(column[drawn], axis=1) for column in pooled.T])
    return _ends(means, axis=1, level=level)


def seed_interval(
    scores: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Scores, Scores]:
    """Percentile interval of the interquartile mean over seeds and tasks, whole seeds drawn anew.

    Scores (seeds, tasks, K), K scores of each run. The runs of a seed share what was pre-trained with it, so
    that they are drawn together: the interval holds the spread of pre-training and of fine-tuning. Returns
    low and high end, (K,) each.
    """
    values = np.asarray(scores, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    drawn = values[picks].reshape(resamples, -1, values.shape[-1])
    return _ends(interquartile_mean(drawn, axis=1))


def estimate(scores: Sequence[npt.ArrayLike], *, resamples: int = RESAMPLES) -> list[Estimate]:
    """Aggregates of each of K scores of runs, given for each task as an array (seeds, K)."""
    pooled = np.concatenate([np.asarray(task, dtype=np.float64) for task in scores])
    interval = bootstrap_interval(scores, resamples=resamples)
    middles, means = interquartile_mean(pooled), pooled.mean(axis=0)
    found = []
    for k, (middle, mean) in enumerate(zip(middles.tolist(), means.tolist(), strict=True)):
        low, high = (None, None) if interval is None else (float(interval[0][k]), float(interval[1][k]))
        found.append(Estimate(middle, mean, low, high, len(pooled)))
    return found


def probability_of_improvement(
    ours: Sequence[npt.ArrayLike],
    theirs: Sequence[npt.ArrayLike],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How probably a run of ours beats a run of theirs on a task drawn at random, ties counted half.

    Scores (seeds,) for each of the same tasks on either side. Returns it with the ends of its interval, runs
    drawn anew within each task.
    """

    def beats(x: Scores, y: Scores) -> Scores:
        return ((x[:, :, None] > y[:, None]) + 0.5 * (x[:, :, None] == y[:, None])).mean(axis=(1, 2))

    random = np.random.default_rng(seed)
    value, drawn = np.zeros(1), np.zeros(resamples)
    for mine, other in zip(ours, theirs, strict=True):
        x, y = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        value = value + beats(x[None], y[None]) / len(ours)
        picks = [random.integers(0, len(scores), (resamples, len(scores))) for scores in (x, y)]
        drawn = drawn + beats(x[picks[0]], y[picks[1]]) / len(ours)
    low, high = _ends(drawn)
    return float(value[0]), float(low), float(high)


def performance_profile(
    scores: Sequence[npt.ArrayLike], thresholds: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Scores, Scores, Scores]:
    """The share of runs that score more than each threshold (K,), and the ends of its interval, (K,) each.

    Scores (seeds,) for each task; runs are drawn anew within each task.
    """
    limits = np.asarray(thresholds, np.float64)
    tasks = [np.asarray(task, np.float64) for task in scores]
    random, above = np.random.default_rng(seed), np.zeros((resamples, len(limits)))
    for task in tasks:
        picked = task[random.integers(0, len(task), (resamples, len(task)))]
        above += (picked[:, :, None] > limits).sum(axis=1)
    count = sum(map(len, tasks))
    low, high = _ends(above / count)
    share: Scores = (np.concatenate(tasks)[:, None] > limits).mean(axis=0)
    return share, low, high


def _ends(drawn: Scores, *, axis: int = 0, level: float = LEVEL) -> tuple[Scores, Scores]:
    """Low and high end of the percentile interval that holds the share `level` of values drawn anew."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=axis)
    return low, high
