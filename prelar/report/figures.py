"""Line charts as small SVG texts.

A chart takes its colours from the page's style sheet (classes `s0` … `s5`), so that it follows light and
dark; each line also has its own dash pattern and marker, so that it is read without colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 34, 40
LEGEND_ROW = 18
DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 3", "5 2 1 2 1 2")
OTHERS = "1 3"
SHAPES = (
    (),
    ((-2.7, -2.7), (2.7, -2.7), (2.7, 2.7), (-2.7, 2.7)),
    ((0, -3.8), (3.4, 2.6), (-3.4, 2.6)),
    ((0, -4), (4, 0), (0, 4), (-4, 0)),
    ((0, 3.8), (3.4, -2.6), (-3.4, -2.6)),
    (
        (-1.2, -4),
        (1.2, -4),
        (1.2, -1.2),
        (4, -1.2),
        (4, 1.2),
        (1.2, 1.2),
        (1.2, 4),
        (-1.2, 4),
        (-1.2, 1.2),
        (-4, 1.2),
        (-4, -1.2),
        (-1.2, -1.2),
    ),
)
MAX_POINTS = 200
MAX_MARKED = 40


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


def number(value: float) -> str:
    """A figure as a reader wants it: about three significant digits, thousands grouped, a true minus."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000 or value == int(value):
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
    series: Sequence[Series],
    *,
    identifier: str,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    behind: Sequence[Series] = (),
) -> str:
    """One chart as an `<svg>` element. A legend that does not fit into one row stands below the chart.

    Args:
        series: one to six lines.
        identifier: unique in the page; the labels that assistive technology reads hang on it.
        title, description: what the chart shows, and what a reader who cannot see it should know.
        x_label, y_label: names of the axes with their units.
        y_range: fixed limits of y; otherwise round ones around the data. x begins at 0.
        log: logarithmic y; all values are to be positive.
        behind: at most six lines of other origin, drawn behind in grey, thin and dotted, with hollow marks.

    Raises:
        ValueError: no finite point, more than six lines, or a logarithm of what is not positive.
    """
    if not 1 <= len(series) <= len(DASHES) or len(behind) > len(SHAPES):
        raise ValueError(f"{len(series)} lines; a chart shows 1 to {len(DASHES)}")
    styles = [index if s.style is None else s.style for index, s in enumerate(series)]
    lines = [(style, False, thin(s.x, s.y)) for style, s in zip(styles, series, strict=True)]
    lines += [(style, True, thin(s.x, s.y)) for style, s in enumerate(behind)]
    if not any(len(x) for _, _, (x, _) in lines):
        raise ValueError(f"{title}: no finite point")
    all_x = np.concatenate([x for _, _, (x, _) in lines])
    all_y = np.concatenate([*(y for _, _, (_, y) in lines), *_bounds(series)])
    if log and (all_y <= 0).any():
        raise ValueError(f"{title}: logarithm of a value that is not positive")
    x_scale = _Scale(*_x_limits(all_x), LEFT, WIDTH - RIGHT)
    y_limits = y_range or (_log_limits(all_y) if log else _y_limits(all_y))
    y_scale = _Scale(*y_limits, HEIGHT - BOTTOM, TOP, log=log)
    entries = [(s.label, style, False) for style, s in zip(styles, series, strict=True)]
    entries += [(s.label, style, True) for style, s in enumerate(behind)]
    legend, height = _legend(entries) if len(entries) > 1 else ([], HEIGHT)
    body = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{identifier}-t {identifier}-d">',
        f'<title id="{identifier}-t">{escape(title)}</title>',
        f'<desc id="{identifier}-d">{escape(description)}</desc>',
        *_axes(x_scale, y_scale, x_label, y_label + (" (log)" if log else "")),
    ]
    body += [_band(s, x_scale, y_scale, style) for style, s in zip(styles, series, strict=True)]
    for style, other, (x, y) in reversed(lines):
        body += _line(x, y, x_scale, y_scale, style, other)
    return "\n".join([*filter(None, body), *legend, "</svg>"])


def _bounds(series: Sequence[Series]) -> list[np.ndarray]:
    """The finite bounds of the bands."""
    bounds = [np.asarray(b, dtype=np.float64) for s in series for b in (s.low, s.high) if b is not None]
    return [bound[np.isfinite(bound)] for bound in bounds]


@dataclass(frozen=True)
class _Scale:
    """From values low … high to pixels first … last."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.first + min(max(share, 0.0), 1.0) * (self.last - self.first), 1)


def _x_limits(values: np.ndarray) -> tuple[float, float]:
    """From 0, or the lowest value below it, to the highest value."""
    low, high = min(float(values.min()), 0.0), float(values.max())
    return low, high if high > low else low + 1


def _y_limits(values: np.ndarray) -> tuple[float, float]:
    """Round limits around the values, from 0 where that leaves them most of the height."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        size = max(abs(low) * 0.5, 1e-6 if low else 1.0)
        return low - size, high + size
    if 0 <= low < 0.35 * high:
        low = 0.0
    step = tick_step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _log_limits(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    factor = max((high / low) ** 0.05, 1.05)
    return low / factor, high * factor


def _axes(x_scale: _Scale, y_scale: _Scale, x_label: str, y_label: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    ticks = (log_ticks if y_scale.log else linear_ticks)(y_scale.low, y_scale.high)
    parts = []
    for tick in ticks:
        y = y_scale(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{short(tick)}</text>')
    for tick in linear_ticks(x_scale.low, x_scale.high):
        x = x_scale(tick)
        parts.append(f'<line class="axis" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 4}"/>')
        parts.append(
            f'<text class="tick" x="{x}" y="{bottom + 17}" text-anchor="middle">{short(tick)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(
        f'<text class="label" x="{right}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>'
    )
    parts.append(f'<text class="label" x="4" y="13">{escape(y_label)}</text>')
    return parts


def _line(
    x: np.ndarray, y: np.ndarray, x_scale: _Scale, y_scale: _Scale, style: int, other: bool
) -> list[str]:
    pixels = [(x_scale(a), y_scale(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    path = " ".join(f"{a:g},{b:g}" for a, b in pixels)
    parts = [f'<polyline {_stroke(style, other)} points="{path}"/>'] if len(pixels) > 1 else []
    if len(pixels) <= MAX_MARKED:
        parts += [_marker(a, b, style, other) for a, b in pixels]
    return parts


def _stroke(style: int, other: bool) -> str:
    """The attributes of a line."""
    dash = OTHERS if other else DASHES[style]
    return f'class="line {_kind(style, other)}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _kind(style: int, other: bool) -> str:
    return "theirs" if other else f"s{style}"


def _band(series: Series, x_scale: _Scale, y_scale: _Scale, style: int) -> str:
    """The area between the bounds of a line, where it has any."""
    if series.low is None or series.high is None or len(series.x) < 2:
        return ""
    upper = [(x_scale(a), y_scale(b)) for a, b in zip(series.x, series.high, strict=True)]
    lower = [(x_scale(a), y_scale(b)) for a, b in zip(series.x, series.low, strict=True)]
    points = " ".join(f"{a:g},{b:g}" for a, b in [*upper, *reversed(lower)])
    return f'<polygon class="band s{style}" points="{points}"/>'


def _marker(x: float, y: float, style: int, other: bool = False) -> str:
    kind = f'class="mark {_kind(style, other)}"'
    if style == 0:
        return f'<circle {kind} cx="{x:g}" cy="{y:g}" r="3"/>'
    points = " ".join(f"{x + a:g},{y + b:g}" for a, b in SHAPES[style])
    return f'<polygon {kind} points="{points}"/>'


def _legend(entries: Sequence[tuple[str, int, bool]]) -> tuple[list[str], int]:
    """Samples of the lines (label, style, of other origin), and the height of the whole chart.

    They stand in a row above the plot, right-aligned by an estimate of the width of the text, or below it.
    """
    widths = [34 + 6.2 * len(label) for label, _, _ in entries]
    parts: list[str] = []
    if sum(widths) <= WIDTH - LEFT - RIGHT - 6:
        x = WIDTH - RIGHT - sum(widths) + 6
        for (label, style, other), width in zip(entries, widths, strict=True):
            parts += _sample(x, 25, label, style, other)
            x += width
        return parts, HEIGHT
    for row, (label, style, other) in enumerate(entries):
        parts += _sample(LEFT, HEIGHT + LEGEND_ROW * row + 8, label, style, other)
    return parts, HEIGHT + LEGEND_ROW * len(entries) + 4


def _sample(x: float, y: float, label: str, style: int, other: bool) -> list[str]:
    return [
        f'<line {_stroke(style, other)} x1="{x:.1f}" y1="{y}" x2="{x + 20:.1f}" y2="{y}"/>',
        _marker(round(x + 10, 1), y, style, other),
        f'<text class="label" x="{x + 24:.1f}" y="{y + 4}">{escape(label)}</text>',
    ]
