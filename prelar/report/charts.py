"""Charts with the table of their numbers, made from the tables that stages leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from prelar.report.figures import number, thin
from prelar.spread import evenly
from prelar.tables import read_tsv

TABLE_ROWS = 12
LOG_FROM = 30.0

Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Figure:
    """One chart: its SVG, caption, and the table behind it (headings, rows)."""

    svg: Markup
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def figure(chart: str, caption: str, x_name: str, curves: dict[str, Curve]) -> Figure:
    """A chart with a table of at most `TABLE_ROWS` rows, evenly spread; x of the first curve."""
    steps = next(iter(curves.values()))[0]
    columns = [y if x == steps else [float("nan")] * len(steps) for x, y in curves.values()]
    rows = tuple(
        (number(steps[i]), *(number(column[i]) for column in columns)) for i in evenly(len(steps), TABLE_ROWS)
    )
    return Figure(Markup(chart), caption, (x_name, *curves), rows)


def spreads(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis suits them: all positive, the largest over `LOG_FROM` times the least."""
    return min(values) > 0 and max(values) > LOG_FROM * min(values)


def read_curve(path: Path) -> Curve | None:
    """Steps and values of one DVCLive table, finite points only; None where there are none."""
    table = read_tsv(path)
    if "step" not in table or path.stem not in table:
        return None
    x, y = thin(table["step"], table[path.stem], limit=len(table["step"]) or 1)
    return (x.tolist(), y.tolist()) if len(x) else None


def trend(name: str, steps: list[float], values: list[float], unit: str) -> str:
    """A curve in a sentence, for those who cannot see it."""
    if len(values) == 1:
        return f"{name}: {number(values[0])} at {number(steps[0])} {unit}."
    first, last = f"{number(values[0])} at {number(steps[0])}", f"{number(values[-1])} at {number(steps[-1])}"
    return (
        f"{name}: from {first} to {last} {unit}; lowest {number(min(values))}, highest {number(max(values))}."
    )
