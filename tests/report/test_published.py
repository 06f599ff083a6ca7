"""When published results are shown, and that their means are those of the published table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prelar.report.published import TASKS, comparable, published_results

REAL = {"scale": "paper", "finetune.time_limit": 500}


def test_means_over_the_six_tasks_are_the_published_ones() -> None:
    found = {p.label: p.at for p in published_results(TASKS)}
    assert found["DreamerV2"] == pytest.approx((0.280, 0.578), abs=6e-4)
    assert found["APV on RLBench"] == pytest.approx((0.582, 0.797), abs=1.2e-3), (
        "up to the rounding of its rows"
    )
    assert found["PreLAR"] == (0.499, 0.966)


def test_one_task_has_its_own_figures_and_no_headline() -> None:
    found = {p.label: p.at for p in published_results(["reach", "reach"])}
    assert found.keys() == {"DreamerV2", "APV on RLBench"}
    assert found["DreamerV2"] == pytest.approx((0.381, 0.663), abs=6e-4)
    assert found["APV on RLBench"] == pytest.approx((0.700, 0.875), abs=6e-4)


def test_curves_lie_within_their_intervals_and_of_some_tasks_are_means() -> None:
    for tasks in (["reach"], TASKS, ["dmc/hopper-hop"]):
        for found in published_results(tasks):
            if found.low is not None and found.high is not None:
                assert np.all(np.array(found.low) <= found.values) and np.all(
                    found.values <= np.array(found.high)
                )
                assert list(found.steps) == sorted(found.steps)
    both = published_results(["dmc/quadruped-walk", "dmc/hopper-hop"])
    assert [p.label for p in both] == [
        "APV on locomotion",
        "APV on manipulation",
        "DreamerV2",
        "DreamerV2, its authors’ runs",
    ]
    parts = [published_results([task]) for task in ("dmc/quadruped-walk", "dmc/hopper-hop")]
    for whole, one, other in zip(both, *parts, strict=True):
        assert whole.low is None and whole.at == pytest.approx(np.mean([one.at, other.at], axis=0))
    assert [p.label for p in published_results(["dmc/cartpole-balance"])] == ["DreamerV2, its authors’ runs"]


@pytest.mark.parametrize(
    ("changed", "tasks", "last", "expected"),
    [
        ({}, ["reach"], 250_000, None),
        ({"scale": "lite"}, ["reach"], 100_000, None),
        ({"scale": "smoke"}, ["reach"], 250_000, "smoke"),
        ({"finetune.time_limit": 250}, ["reach"], 250_000, "500 steps"),
        ({"finetune.action_repeat": 1}, ["reach"], 250_000, None),
        ({"finetune.action_repeat": 2}, ["reach"], 250_000, "an action at every step"),
        ({}, ["reach", "push"], 250_000, "nothing is published for push"),
        ({}, ["reach"], 4_000, "begin at 5,000 steps, and the runs end at 4,000"),
        ({"distract": "camera"}, ["reach"], 250_000, "nothing distracted their agents"),
        ({}, ["dmc/hopper-hop"], 250_000, "episodes end after 1,000 steps"),
        ({}, ["dmc/hopper-hop", "reach"], 250_000, "two suites"),
    ],
)
def test_they_are_shown_where_they_compare(
    changed: dict[str, Any], tasks: list[str], last: float, expected: str | None
) -> None:
    reason = comparable([REAL, REAL | changed], tasks, last)
    assert (reason is None) == (expected is None) and (expected or "") in (reason or "")
