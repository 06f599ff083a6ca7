"""Line charts, and dots with intervals, as small SVG texts, each with its numbers as a table.

A chart takes its colours from the page's style sheet (classes `s0` … `s5`), so that it follows light and
dark; each line also has its own dash pattern and marker, so that it is read without colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from prelar.report.catalog import CurveSpec
from prelar.utils.tables import evenly_spaced_indices

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 34, 40
LEGEND_ROW = 18
ROW, ROW_LABELS = 30, 120
DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 3", "5 2 1 2 1 2")
MARKERS = (
    "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "m-2.7-2.7h5.4v5.4h-5.4z",
    "m0-3.8l3.4 6.4h-6.8z",
    "m0-4l4 4l-4 4l-4-4z",
    "m0 3.8l3.4-6.4h-6.8z",
    "m-1.2-4h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8v-2.4h2.8z",
)
MAX_POINTS = 200
MAX_MARKED = 40
TABLE_ROWS = 12


@dataclass(frozen=True)
class Series:
    """One line: equally many x and y, x ascending. Points that are not finite are left out.

    `low` and `high`, one for each point, bound a band around the line. `style` is that of the line, 0 to 5;
    by default lines of a chart are numbered.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: int | None = None


@dataclass(frozen=True)
class Figure:
    """One chart: its SVG, caption, and the table behind it (headings, rows)."""

    svg: Markup
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def figure(
    spec: CurveSpec,
    lines: Sequence[Series],
    *,
    identifier: str,
    behind: Sequence[Series] = (),
    columns: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """A `line_chart` with the table of its numbers.

    `columns` are those of the table, by heading; by default x and the lines' own values, in at most
    `TABLE_ROWS` rows evenly spread over the steps of the first line.
    """
    if columns is None:
        steps = list(lines[0].x)
        values = {line.label: line.y if list(line.x) == steps else [math.nan] * len(steps) for line in lines}
        kept = evenly_spaced_indices(len(steps), TABLE_ROWS)
        columns = {name: [column[i] for i in kept] for name, column in ({spec.x: steps} | values).items()}
    rows = tuple(tuple(map(number, row)) for row in zip(*columns.values(), strict=True))
    chart = Markup(line_chart(spec, lines, identifier=identifier, behind=behind))
    return Figure(chart, spec.caption, tuple(name[:1].upper() + name[1:] for name in columns), rows)


def interval_figure(
    title: str, unit: str, rows: Sequence[tuple[str, float, float, float]], *, identifier: str, caption: str
) -> Figure:
    """A row for each of one to six values: its name, the value as a dot, and a line from its low to its high.

    The axis, called `unit`, begins at 0 or below.
    """
    if not 1 <= len(rows) <= len(DASHES):
        raise ValueError(f"{len(rows)} rows; a chart shows 1 to {len(DASHES)}")
    ends = [value for _, *values in rows for value in values]
    x_axis = _Axis(*_y_limits(min(0.0, *ends), max(ends), log=False), ROW_LABELS, WIDTH - RIGHT)
    bottom = ROW * len(rows) + 8
    description = " ".join(
        f"{name}: {number(mean)}, from {number(low)} to {number(high)}." for name, mean, low, high in rows
    )
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img"'
        f' aria-labelledby="{identifier}-t {identifier}-d">',
        f'<title id="{identifier}-t">{escape(title)}</title>',
        f'<desc id="{identifier}-d">{escape(description)}</desc>',
        f'<path class="axis" d="M{ROW_LABELS} {bottom}H{WIDTH - RIGHT}"/>',
        _text(WIDTH - RIGHT, bottom + BOTTOM - 6, unit, "label", "end"),
    ]
    for tick, x in zip(x_axis.ticks, x_axis(x_axis.ticks), strict=True):
        parts.append(f'<path class="grid" d="M{x:g} 4V{bottom}"/>')
        parts.append(_text(x, bottom + 17, short(tick), "tick", "middle"))
    for style, (name, mean, low, high) in enumerate(rows):
        y = ROW * style + ROW / 2 + 4
        middle, first, last = x_axis([mean, low, high])
        parts.append(_text(ROW_LABELS - 10, y + 4, name, "label", "end"))
        parts.append(f'<path class="line s{style}" d="M{first:g} {y:g}H{last:g}M{first:g} {y - 5:g}v10"/>')
        parts.append(f'<path class="line s{style}" d="M{last:g} {y - 5:g}v10"/>')
        parts.append(f'<path class="mark s{style}" d="M{middle:g} {y:g}{MARKERS[style]}"/>')
    cells = tuple((name, *map(number, values)) for name, *values in rows)
    headings = ("Name", "Mean", "Lower end", "Upper end")
    return Figure(Markup("\n".join([*parts, "</svg>"])), caption, headings, cells)


def number(value: float) -> str:
    """A figure as a reader wants it: about three significant digits, thousands grouped, a true minus."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 999.5 or value == int(value):
        text = f"{value:,.0f}"
    elif size >= 1:
        text = f"{value:.3g}"
    elif size >= 1e-3:
        text = f"{value:.{2 - math.floor(math.log10(size))}f}"
    else:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "\u2212")


def short(value: float) -> str:
    """A tick's figure, with k and M for thousands and millions."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}".replace("-", "\u2212")
    return f"{value:g}".replace("-", "\u2212")


def trend(line: Series, unit: str) -> str:
    """A line in a sentence, for those who cannot see it."""
    low, high = number(min(line.y)), number(max(line.y))
    first, last = (f"{number(line.y[i])} at {number(line.x[i])}" for i in (0, -1))
    if len(line.y) == 1:
        return f"{line.label}: {first} {unit}."
    return f"{line.label}: from {first} to {last} {unit}; lowest {low}, highest {high}."


def tick_step(low: float, high: float, count: int = 5) -> float:
    """The least of 1, 2 and 5 times powers of ten that cuts [low, high] into at most `count` parts."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of the round `tick_step` that lie in [low, high]."""
    if not high > low:
        return [low]
    step = tick_step(low, high, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; 2 and 5 times them too where fewer than three would be left."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
        inside = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) >= 3:
            return inside
    return inside


def thin(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points: means over consecutive equal bins, after dropping what is not finite."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if xs.shape != ys.shape:
        raise ValueError(f"x has shape {xs.shape}, y {ys.shape}")
    finite = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[finite], ys[finite]
    if len(xs) <= limit:
        return xs, ys
    bins = np.array_split(np.arange(len(xs)), limit)
    return np.array([xs[b].mean() for b in bins]), np.array([ys[b].mean() for b in bins])


def line_chart(
    spec: CurveSpec, series: Sequence[Series], *, identifier: str, behind: Sequence[Series] = ()
) -> str:
    """One chart as an `<svg>` element. x begins at 0; a legend that does not fit into one row stands below.

    Args:
        spec: texts of the chart, and limits of y where they are fixed; else they are round ones.
        series: one to six lines.
        identifier: unique in the page; the labels that assistive technology reads hang on it.
        behind: at most six lines of other origin, drawn behind in grey, thin and dotted, with hollow marks.

    Raises:
        ValueError: no finite point, or more than six lines.
    """
    if not 1 <= len(series) <= len(DASHES) or len(behind) > len(MARKERS):
        raise ValueError(f"{len(series)} lines; a chart shows 1 to {len(DASHES)}")
    lines = [_Line(s, index if s.style is None else s.style) for index, s in enumerate(series)]
    lines += [_Line(s, index, behind=True) for index, s in enumerate(behind)]
    points = [thin(line.series.x, line.series.y) for line in lines]
    x = np.concatenate([x for x, _ in points])
    bounds = [np.asarray(b, dtype=np.float64) for s in series for b in (s.low, s.high) if b is not None]
    y = np.concatenate([*(y for _, y in points), *bounds])
    y = y[np.isfinite(y)]
    if not len(x):
        raise ValueError(f"{spec.title}: no finite point")
    log = spec.log_from is not None and y.min() > 0 and y.max() > spec.log_from * y.min()
    left, right = min(float(x.min()), 0.0), float(x.max())
    x_axis = _Axis(left, right if right > left else left + 1, LEFT, WIDTH - RIGHT)
    y_limits = spec.limits or _y_limits(float(y.min()), float(y.max()), log)
    y_axis = _Axis(*y_limits, HEIGHT - BOTTOM, TOP, log)
    pixels = [(line, x_axis(x), y_axis(y)) for line, (x, y) in zip(lines, points, strict=True)]
    legend, height = _legend(lines)
    label = f"{identifier}-t {identifier}-d"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{label}">',
        f'<title id="{identifier}-t">{escape(spec.title)}</title>',
        f'<desc id="{identifier}-d">{escape(" ".join(trend(line.series, spec.x) for line in lines))}</desc>',
        *_grid(x_axis, y_axis),
        _text(WIDTH - RIGHT, HEIGHT - 6, spec.x, "label", "end"),
        _text(4, 13, spec.y + (" (log)" if log else ""), "label"),
        *(line.band(x_axis, y_axis) for line in lines),
        *(
            f'<polyline {line.stroke} points="{_points(x, y)}"/>{line.marks(x, y)}'
            for line, x, y in reversed(pixels)
            if len(x)
        ),
        *legend,
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class _Axis:
    """From values low … high to pixels first … last."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The pixels of values, to a tenth; those outside of the axis at its ends."""
        found, low, high = np.asarray(values, dtype=np.float64), self.low, self.high
        if self.log:
            found, low, high = np.log(found), math.log(low), math.log(high)
        share = ((found - low) / (high - low)).clip(0, 1)
        return (self.first + share * (self.last - self.first)).round(1)

    @property
    def ticks(self) -> list[float]:
        """Where its figures stand."""
        return (log_ticks if self.log else linear_ticks)(self.low, self.high)


@dataclass(frozen=True)
class _Line:
    """A line of a chart with its look: one of the six styles, or grey and dotted behind them."""

    series: Series
    style: int
    behind: bool = False

    @property
    def look(self) -> str:
        return "behind" if self.behind else f"s{self.style}"

    @property
    def stroke(self) -> str:
        """The attributes of the line."""
        dash = "1 3" if self.behind else DASHES[self.style]
        return f'class="line {self.look}"' + (f' stroke-dasharray="{dash}"' if dash else "")

    def marks(self, x: npt.ArrayLike, y: npt.ArrayLike) -> str:
        """Its marks at pixels, none where they would cover the line."""
        places = [f"M{point.replace(',', ' ')}{MARKERS[self.style]}" for point in _points(x, y).split()]
        return f'<path class="mark {self.look}" d="{"".join(places)}"/>' if len(places) <= MAX_MARKED else ""

    def band(self, x_axis: _Axis, y_axis: _Axis) -> str:
        """The area between the bounds of the line, where it has any."""
        x, low, high = self.series.x, self.series.low, self.series.high
        if low is None or high is None or len(x) < 2:
            return ""
        points = _points(x_axis([*x, *reversed(x)]), y_axis([*high, *reversed(low)]))
        return f'<polygon class="band {self.look}" points="{points}"/>'


def _y_limits(low: float, high: float, log: bool) -> tuple[float, float]:
    """Round limits around the values, from 0 where that leaves them most of the height."""
    if log:
        factor = max((high / low) ** 0.05, 1.05)
        return low / factor, high * factor
    if low == high:
        size = max(abs(low) * 0.5, 1e-6 if low else 1.0)
        return low - size, high + size
    if 0 <= low < 0.35 * high:
        low = 0.0
    step = tick_step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    """Grid, ticks and their figures."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    grid, parts = [], [f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>']
    for tick, y in zip(y_axis.ticks, y_axis(y_axis.ticks), strict=True):
        grid.append(f'<path class="grid" d="M{LEFT} {y:g}H{right}"/>')
        parts.append(_text(LEFT - 6, y + 4, short(tick), "tick", "end"))
    for tick, x in zip(x_axis.ticks, x_axis(x_axis.ticks), strict=True):
        parts.append(f'<path class="axis" d="M{x:g} {bottom}v4"/>')
        parts.append(_text(x, bottom + 17, short(tick), "tick", "middle"))
    return grid + parts


def _legend(lines: Sequence[_Line]) -> tuple[list[str], int]:
    """Samples of the lines where there are several, and the height of the whole chart.

    They stand in a row above the plot, right-aligned by an estimate of the width of the text, or below it.
    """
    if len(lines) == 1:
        return [], HEIGHT
    widths = [34 + 6.2 * len(line.series.label) for line in lines]
    begin = WIDTH - RIGHT + 6 - sum(widths)
    in_row = begin >= LEFT + 12
    parts = []
    for row, line in enumerate(lines):
        x = begin + sum(widths[:row]) if in_row else LEFT
        y = 25 if in_row else HEIGHT + LEGEND_ROW * row + 8
        parts.append(f'<path {line.stroke} d="M{x:g} {y}h20"/>{line.marks([x + 10], [y])}')
        parts.append(_text(x + 24, y + 4, line.series.label, "label"))
    return parts, HEIGHT if in_row else HEIGHT + LEGEND_ROW * len(lines) + 4


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _points(x: npt.ArrayLike, y: npt.ArrayLike) -> str:
    return " ".join(f"{a:g},{b:g}" for a, b in zip(np.asarray(x), np.asarray(y), strict=True))
