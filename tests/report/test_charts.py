"""Charts as SVG: scales, ticks, when y is logarithmic, and what is left out."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prelar.report.catalog import CurveSpec
from prelar.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    interval_figure,
    line_chart,
    linear_ticks,
    log_ticks,
    number,
    short,
    thin,
)

SPEC = CurveSpec("file", "column", "A < B", "x", "y", "caption")


def drawn(series: list[Series], spec: CurveSpec = SPEC, behind: list[Series] | None = None) -> str:
    return line_chart(spec, series, identifier="c", behind=behind or [])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3.0, "3"),
        (1234567.8, "1,234,568"),
        (412.25, "412"),
        (1 / 3, "0.333"),
        (0.00412, "0.00412"),
        (-0.5, "−0.500"),
        (0.0000123, "1.23e−5"),
        (math.nan, "nan"),
    ],
)
def test_numbers_as_a_reader_wants_them(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(1e-3, 1e9), st.sampled_from([1, -1]))
def test_numbers_are_close_and_in_plain_digits(size: float, sign: int) -> None:
    text = number(sign * size)
    assert "e" not in text
    assert float(text.replace(",", "").replace("−", "-")) == pytest.approx(sign * size, rel=0.006)


@example(999.7)
@given(st.floats(990, 1010))
def test_thousands_are_grouped(value: float) -> None:
    assert number(value) in ("1,000", f"{value:.0f}" if value < 999.5 else f"{value:,.0f}")


def test_ticks_are_short() -> None:
    assert [short(v) for v in (0, 0.25, 1500, 2e6, -20)] == ["0", "0.25", "1.5k", "2M", "−20"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_linear_ticks_lie_inside_and_are_even(low: float, span: float) -> None:
    high = low + span
    ticks = linear_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    if span > 1e-3 * abs(low):
        assert 2 <= len(ticks) <= 7
        assert np.allclose(np.diff(ticks, 2), 0, atol=slack)


def test_log_ticks() -> None:
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert log_ticks(2, 30) == [3, 10, 30]
    assert log_ticks(1, 6) == [1, 2, 5]


def test_thin_averages_equal_bins_and_drops_what_is_not_finite() -> None:
    x, y = thin([0, 1, 2, 3, 4], [1, math.nan, 3, 5, 7], limit=2)
    assert x.tolist() == [1, 3.5] and y.tolist() == [2, 6]
    with pytest.raises(ValueError, match="shape"):
        thin([1], [1, 2])


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=500))
def test_a_chart_is_xml_and_its_lines_stay_inside(values: list[float]) -> None:
    chart = drawn([Series("a", range(len(values)), values), Series("b", [0, 1], [0, 1])])
    root = ElementTree.fromstring(chart)
    for line in root.iter("polyline"):
        points = np.array([p.split(",") for p in line.attrib["points"].split()], float)
        assert points[:, 0].min() >= LEFT and points[:, 0].max() <= WIDTH - RIGHT
        assert points[:, 1].min() >= TOP and points[:, 1].max() <= HEIGHT - BOTTOM


def test_ends_of_the_data_meet_ends_of_the_axes() -> None:
    chart = drawn([Series("a", [0, 10], [0, 1])], replace(SPEC, limits=(0, 1)))
    points = re.search(r'points="([^"]+)"', chart)
    assert points and points[1] == f"{LEFT},{HEIGHT - BOTTOM} {WIDTH - RIGHT},{TOP}"


def ticks_of(chart: str, anchor: str) -> list[str]:
    found = ElementTree.fromstring(chart).iter("text")
    return [e.text or "" for e in found if e.get("class") == "tick" and e.get("text-anchor") == anchor]


def test_steps_are_counted_from_zero_and_ticks_are_round() -> None:
    chart = drawn([Series("a", [500, 1000, 1500], [313, 204, 197])])
    assert ticks_of(chart, "middle") == ["0", "500", "1k", "1.5k"]
    assert ticks_of(chart, "end") == ["150", "200", "250", "300", "350"]


def test_the_highest_value_lies_under_a_tick() -> None:
    chart = drawn([Series("a", [1, 11], [0.0142, 0.0138]), Series("b", [1, 11], [0.001, 0.005])])
    assert ticks_of(chart, "end") == ["0", "0.005", "0.01", "0.015"]


def test_lines_differ_in_more_than_colour() -> None:
    chart = drawn([Series(name, [0, 1], [0, k]) for k, name in enumerate("abcdef")])
    root = ElementTree.fromstring(chart)
    dashes = {e.get("stroke-dasharray") for e in root.iter("polyline")}
    assert len(dashes) == 6
    marks = [e for e in root.iter() if "mark" in e.get("class", "")]
    shapes = [part for e in marks for part in re.findall(r"M[^m]*(m[^M]*)", e.get("d", ""))]
    assert len(shapes) == 3 * 6 and len(set(shapes)) == 6
    assert [t.text for t in root.iter("title")] == ["A < B"]


def test_a_long_legend_stands_below_and_a_short_one_above() -> None:
    long = drawn([Series("a" * 40, [0, 1], [0, 1]), Series("b" * 40, [0, 1], [1, 0])])
    brief = drawn([Series("a", [0, 1], [0, 1]), Series("b", [0, 1], [1, 0])])
    heights = [float(ElementTree.fromstring(c).get("viewBox", "").split()[3]) for c in (long, brief)]
    assert heights[0] > heights[1] == HEIGHT
    rows = [
        float(t.get("y", "")) for t in ElementTree.fromstring(long).iter("text") if "aa" in (t.text or "")
    ]
    assert HEIGHT < rows[0] < heights[0]


def test_a_band_lies_around_its_line_and_sets_the_limits() -> None:
    chart = drawn([Series("a", [0, 1], [5, 5], low=[0, 1], high=[9, 10])])
    (band,) = [e for e in ElementTree.fromstring(chart).iter("polygon") if "band" in e.get("class", "")]
    heights = [float(point.split(",")[1]) for point in band.get("points", "").split()]
    assert min(heights) >= TOP and max(heights) <= HEIGHT - BOTTOM
    assert heights[1] < heights[2] and len(heights) == 4


def test_lines_of_other_origin_look_different() -> None:
    chart = drawn([Series("ours", [0, 1], [0, 1])], behind=[Series("theirs", [0, 1], [1, 0])])
    lines = list(ElementTree.fromstring(chart).iter("polyline"))
    assert [line.get("class") for line in lines] == ["line behind", "line s0"], "drawn behind ours"
    assert lines[0].get("stroke-dasharray") and "theirs" in chart


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="no finite point"):
        drawn([Series("a", [1], [math.nan])])
    with pytest.raises(ValueError, match="7 lines"):
        drawn([Series("a", [1], [1])] * 7)


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([1.0, 60.0], True),
        ([60.0, 5.0, 1.0], True),
        ([1.0, 30.0], False),
        ([0.0, 60.0], False),
        ([-1.0, 60.0], False),
    ],
)
def test_logarithmic_axis_is_for_positive_values_far_apart(values: list[float], logarithmic: bool) -> None:
    lines = [Series("a", range(len(values)), values)]
    assert ("y (log)" in drawn(lines, replace(SPEC, log_from=30))) is logarithmic
    assert "(log)" not in drawn(lines)


def test_a_dot_stands_where_its_value_is_and_its_line_from_low_to_high() -> None:
    rows = [("a < b", 412.0, 300.0, 500.0), ("c", 60.0, 55.0, 70.0)]
    found = interval_figure("A < B", "x", rows, identifier="i", caption="caption")
    root = ElementTree.fromstring(str(found.svg))
    paths = [path for path in root.iter("path") if path.get("class", "").startswith(("line", "mark"))]
    lines = [
        re.findall(r"M([\d.]+) ", path.get("d", "")) for path in paths if "line" in path.get("class", "")
    ]
    ends = [(float(first[0]), float(last[0])) for first, last in zip(lines[::2], lines[1::2], strict=True)]
    dots = [float(path.get("d", "")[1:].split()[0]) for path in paths if "mark" in path.get("class", "")]
    values = [value for _, mean, low, high in rows for value in (low, mean, high)]
    places = [place for (low, high), dot in zip(ends, dots, strict=True) for place in (low, dot, high)]
    assert np.polyfit(values, places, 1, full=True)[1] < 0.1, "one scale for all"
    assert places[0] < places[1] < places[2] < WIDTH and places[5] < places[0]
    assert found.rows == (("a < b", "412", "300", "500"), ("c", "60", "55", "70"))
    with pytest.raises(ValueError, match="0 rows"):
        interval_figure("A", "x", [], identifier="i", caption="")
