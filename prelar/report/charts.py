"""Charts with the table of their numbers, made from the tables that stages leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from prelar.report.catalog import Curve, Kind
from prelar.report.figures import DASHES, Series, line_chart, number, thin
from prelar.report.statistics import Estimate
from prelar.report.variants import Variant, aggregate
from prelar.utils.tables import evenly_spaced_indices, read_tsv

TABLE_ROWS = 12
LOG_FROM = 30.0


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
        (number(steps[i]), *(number(column[i]) for column in columns))
        for i in evenly_spaced_indices(len(steps), TABLE_ROWS)
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


def trend(name: str, steps: Sequence[float], values: Sequence[float], unit: str) -> str:
    """A curve in a sentence, for those who cannot see it."""
    if len(values) == 1:
        return f"{name}: {number(values[0])} at {number(steps[0])} {unit}."
    first, last = f"{number(values[0])} at {number(steps[0])}", f"{number(values[-1])} at {number(steps[-1])}"
    return (
        f"{name}: from {first} to {last} {unit}; lowest {number(min(values))}, highest {number(max(values))}."
    )


def charts(variants: Sequence[Variant], kind: Kind, behind: Sequence[Series] = ()) -> list[Figure]:
    """Charts of a curve, so many that each has lines that can be told apart; none where no run has it.

    A setting has the same line in the charts of every kind. `behind` is drawn behind in grey.
    """
    figures = []
    for part, begin in enumerate(range(0, len(variants), len(DASHES))):
        chosen = variants[begin : begin + len(DASHES)]
        found = [(style, variant, *aggregate(variant, kind.name)) for style, variant in enumerate(chosen)]
        drawn = [item for item in found if item[2]]
        if not drawn:
            continue
        lines, others = [_series(*item) for item in drawn], [*behind, *_others(chosen, kind)]
        values = [value for line in (*lines, *others) for value in line.y]
        chart = line_chart(
            lines,
            identifier=f"{kind.name.replace('_', '-')}-{part}",
            title=kind.title,
            description=" ".join(trend(line.label, list(line.x), list(line.y), kind.x) for line in lines),
            x_label=kind.x,
            y_label=kind.y,
            y_range=kind.limits,
            log=kind.log and spreads(values),
            behind=others,
        )
        rows = [row for _, variant, steps, estimates in drawn for row in _rows(variant, steps, estimates)]
        headings = ("Setting", kind.x.capitalize(), "IQM", "95%", "Mean")
        figures.append(Figure(Markup(chart), kind.caption, headings, tuple(rows)))
    return figures


def interval(estimate: Estimate, scale: float = 1) -> str:
    """The interval's ends, an en dash between them; a dash where there is none."""
    if estimate.low is None or estimate.high is None:
        return "–"
    return f"{number(scale * estimate.low)} – {number(scale * estimate.high)}"


def _series(style: int, variant: Variant, steps: list[float], estimates: list[Estimate]) -> Series:
    low = [e.low for e in estimates if e.low is not None]
    high = [e.high for e in estimates if e.high is not None]
    middle = [e.iqm for e in estimates]
    if len(low) < len(steps):
        return Series(variant.label, steps, middle, style=style)
    return Series(variant.label, steps, middle, low, high, style)


def _others(variants: Sequence[Variant], kind: Kind) -> list[Series]:
    """The curves behind those of some settings; settings that share one have it once."""
    if kind.behind is None:
        return []
    name, called = kind.behind
    shared: dict[Curve, list[str]] = {}
    for variant in variants:
        steps, estimates = aggregate(variant, name)
        if steps:
            shared.setdefault((tuple(steps), tuple(e.iqm for e in estimates)), []).append(variant.label)
    if len(shared) == 1:
        return [Series(called, steps, values) for steps, values in shared]
    return [Series(f"{'; '.join(who)}, {called}", curve[0], curve[1]) for curve, who in shared.items()]


def _rows(variant: Variant, steps: list[float], estimates: list[Estimate]) -> list[tuple[str, ...]]:
    return [
        (variant.label, number(steps[i]), number(e.iqm), interval(e), number(e.mean))
        for i in evenly_spaced_indices(len(steps), TABLE_ROWS)
        for e in [estimates[i]]
    ]
