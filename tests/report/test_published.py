"""When published results are shown, and that their means are those of the published table."""

from __future__ import annotations

from typing import Any

import pytest

from prelar.report.published import TASKS, comparable, published_results

REAL = {"scale": "paper", "finetune.time_limit": 500}


def test_means_over_the_six_tasks_are_the_published_ones() -> None:
    found = {p.label: p.success for p in published_results(TASKS)}
    assert found["DreamerV2"] == pytest.approx((0.280, 0.578), abs=6e-4)
    assert found["APV on RLBench"] == pytest.approx((0.582, 0.797), abs=1.2e-3), (
        "up to the rounding of its rows"
    )
    assert found["PreLAR"] == (0.499, 0.966)


def test_one_task_has_its_own_figures_and_no_headline() -> None:
    found = {p.label: p.success for p in published_results(["reach", "reach"])}
    assert found == {"DreamerV2": (0.381, 0.663), "APV on RLBench": (0.700, 0.875)}


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
        ({}, ["reach"], 90_000, "end at 90,000"),
    ],
)
def test_they_are_shown_where_they_compare(
    changed: dict[str, Any], tasks: list[str], last: float, expected: str | None
) -> None:
    reason = comparable([REAL, REAL | changed], tasks, last)
    assert (reason is None) == (expected is None) and (expected or "") in (reason or "")
