"""The task: learning curves, videos and a table of the evaluation episodes."""

from __future__ import annotations

from pathlib import Path

from prelar.report.charts import Figure, figure, read_curve, trend
from prelar.report.figures import Series, line_chart
from prelar.report.results import Results, Section
from prelar.tables import read_tsv

CURVES = Path("reports/finetune/plots/metrics/eval")


def section(results: Results) -> Section:
    """The section on the task."""
    values = {
        "learning": learning_curves(results.root / CURVES),
        "episodes": episodes(results.folder / "episodes.tsv"),
    }
    return Section("task", "The task", values)


def learning_curves(folder: Path) -> list[Figure]:
    """Success and return of the evaluations during fine-tuning, against environment steps.

    `folder` holds `success.tsv` and `return.tsv`, the names under which fine-tuning logs them.
    """
    figures = []
    for name, title, unit, limits in (
        ("success", "Success rate", "share of the evaluation episodes", (0.0, 1.0)),
        ("return", "Return", "mean of the evaluation episodes", None),
    ):
        path = folder / f"{name}.tsv"
        curve = read_curve(path) if path.exists() else None
        if curve:
            steps, values = curve
            chart = line_chart(
                [Series(title, steps, values)],
                identifier=f"learning-{name}",
                title=f"{title} during fine-tuning",
                description=trend(title, steps, values, "environment steps"),
                x_label="environment steps",
                y_label=f"{title.lower()}, {unit}",
                y_range=limits,
            )
            figures.append(figure(chart, f"{title}, {unit}.", "Environment steps", {title: curve}))
    return figures


def episodes(path: Path) -> list[dict[str, float]]:
    """The rows of the evaluation episodes' table; none where there is no table."""
    if not path.exists():
        return []
    table = read_tsv(path)
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
