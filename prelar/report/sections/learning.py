"""Does the agent learn: the curves of `make bench-learning`, several seeds against random actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from prelar.report.charts import Figure, trend
from prelar.report.figures import Series, line_chart, number
from prelar.report.results import METHODS, Results, Section, read_json
from prelar.tables import read_tsv

FOLDER = Path("reports/learning")


def section(results: Results) -> Section | None:
    """The section on the learning bench; None where it was not run."""
    summary = read_json(results.root / FOLDER / "summary.json")
    if summary is None:
        return None
    table = read_tsv(results.root / FOLDER / "curves.tsv")
    values = {"bench": summary, "name": METHODS[summary["method"]][0], "curve": _chart(table, summary)}
    return Section("learning", "Does the agent learn?", values)


def _chart(table: dict[str, list[float]], summary: dict[str, Any]) -> Figure:
    """Return against environment steps: mean over seeds, band from lowest to highest, chance behind."""
    steps = table["step"]
    seeds = [column for name, column in table.items() if name.startswith("return_")]
    points = list(zip(*seeds, strict=True))
    mean = [sum(point) / len(point) for point in points]
    chance = [summary["chance"]] * 2
    chart = line_chart(
        [Series("mean of the seeds", steps, mean, [min(p) for p in points], [max(p) for p in points])],
        identifier="learning-bench",
        title=f"Return on {summary['task']} against random actions",
        description=f"{trend('Return', steps, mean, 'environment steps')} "
        f"Random actions: {number(summary['chance'])}.",
        x_label="environment steps",
        y_label="return",
        behind=[Series("random actions", [0.0, steps[-1]], chance)],
    )
    headings = ("Environment steps", "Mean", *(f"Seed {seed}" for seed in range(len(seeds))))
    rows = tuple(tuple(number(value) for value in row) for row in zip(steps, mean, *seeds, strict=True))
    return Figure(Markup(chart), "", headings, rows)
