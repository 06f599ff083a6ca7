"""Curves made ready to be drawn: when an axis is logarithmic, what a table of DVCLive's holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from prelar.report.charts import LOG_FROM, read_curve, spreads


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([1.0, 2 * LOG_FROM], True),
        ([2 * LOG_FROM, 5.0, 1.0], True),
        ([1.0, LOG_FROM], False),
        ([0.0, 2 * LOG_FROM], False),
        ([-1.0, 2 * LOG_FROM], False),
    ],
)
def test_logarithmic_axis_is_for_positive_values_far_apart(values: list[float], logarithmic: bool) -> None:
    assert spreads(values) is logarithmic


def test_curve_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    table = tmp_path / "loss.tsv"
    table.write_text("step\tloss\n1\t3.5\n2\tnan\n3\t\n4\t2.5\n")
    assert read_curve(table) == ([1.0, 4.0], [3.5, 2.5])
    table.write_text("step\tloss\n1\tnan\n")
    assert read_curve(table) is None
    table.write_text("epoch\tloss\n1\t2\n")
    assert read_curve(table) is None
