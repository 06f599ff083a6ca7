"""Does pre-training help: the fine-tuning world model, fitted to fixed episodes from either start."""

from __future__ import annotations

from markupsafe import Markup

from prelar.report.charts import Figure, trend
from prelar.report.figures import Series, line_chart, number
from prelar.report.results import Results, Section
from prelar.tables import read_tsv

STARTS = {"pretrained": "pre-trained", "scratch": "from scratch"}
ERRORS = {"error": "Prediction error", "reward_error": "Reward error"}


def section(results: Results) -> Section:
    """The section on what the checkpoint is worth, without any policy."""
    paths = {label: results.folder / f"offline_{start}.tsv" for start, label in STARTS.items()}
    tables = {label: read_tsv(path) for label, path in paths.items() if path.exists()}
    charts = [_chart(name, title, tables) for name, title in ERRORS.items()] if tables else []
    values = {"charts": charts, "fits": results.summary.get("offline")}
    return Section("offline", "Does pre-training help?", values)


def _chart(name: str, title: str, tables: dict[str, dict[str, list[float]]]) -> Figure:
    """One error against updates, a line for each start; the table tells the spread over seeds."""
    steps = next(iter(tables.values()))["step"]
    chart = line_chart(
        [Series(label, steps, table[name]) for label, table in tables.items()],
        identifier=f"offline-{name.replace('_', '-')}",
        title=f"{title} of the world model on held-out episodes",
        description=" ".join(trend(label, steps, table[name], "updates") for label, table in tables.items()),
        x_label="updates",
        y_label=f"{title.lower()}, mean squared",
        log=all(value > 0 for table in tables.values() for value in table[name]),
    )
    kinds = {"mean": name, "lowest": f"{name}_min", "highest": f"{name}_max"}
    columns = [table[key] for table in tables.values() for key in kinds.values()]
    headings = ("Updates", *(f"{label}, {kind}" for label in tables for kind in kinds))
    rows = tuple(tuple(number(value) for value in row) for row in zip(steps, *columns, strict=True))
    return Figure(Markup(chart), f"{title}.", headings, rows)
