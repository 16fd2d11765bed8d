"""Charts: positions on the scale, ticks, and escaped text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from engines.evaluation.charts import Part, Series, columns, dumbbell, interval_mark, line_chart, nice_ticks, reliability, stacked_bar


def attributes(svg: str, tag: str, name: str) -> list[float]:
    return [float(e.attrib[name].rstrip("%")) for e in ElementTree.fromstring(svg).iter(tag)]


def test_parts_of_a_bar_lie_side_by_side_in_proportion() -> None:
    bar = stacked_bar([Part(20, "few", "real"), Part(60, "few added", "synthetic")], largest=100)
    assert attributes(bar, "rect", "x") == [0, 20]
    assert attributes(bar, "rect", "width") == [20, 60]


def test_an_interval_has_its_dot_between_its_ends_and_zero_where_zero_is() -> None:
    mark = interval_mark(-1, 2, 5, (-10, 10), "ties")
    assert attributes(mark, "circle", "cx") == [60]
    assert attributes(mark, "line", "x1") == [50, 45]
    assert attributes(mark, "line", "x2") == [50, 75]


def test_a_dumbbell_goes_from_before_to_after() -> None:
    assert attributes(dumbbell(60, 90, (50, 100), "few"), "circle", "cx") == [20, 80]


def test_columns_stand_on_the_ground_and_stack_upward() -> None:
    chart = columns([[Part(30, "few", "a"), Part(70, "few added", "b")], [Part(100, "many", "c")]], height_px=100)
    assert attributes(chart, "rect", "y") == [70, 0, 0]
    assert attributes(chart, "rect", "height") == [30, 70, 100]


def test_a_curve_runs_from_edge_to_edge_with_high_values_on_top() -> None:
    chart = line_chart([Series("loss", "c0", [(0, 0.0), (50, 50.0), (100, 100.0)])], "step", bounds=(0, 100))
    polyline = re.search(r'points="([^"]+)"', chart)
    assert polyline is not None
    assert polyline[1] == "0.00,100.00 50.00,50.00 100.00,0.00"


def test_a_curve_of_one_point_says_that_it_is_too_short() -> None:
    assert "Too short" in line_chart([Series("loss", "c0", [(1, 1.0)])], "step")


def test_constant_curves_and_empty_bars_are_drawn_and_not_divided_by_zero() -> None:
    ElementTree.fromstring(line_chart([Series("loss", "c0", [(0, 0.0), (1, 0.0)])], "step"))
    ElementTree.fromstring(stacked_bar([Part(0, "few", "none")], largest=0))
    ElementTree.fromstring(columns([[Part(0, "few", "none")]]))


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 100, [0, 20, 40, 60, 80, 100]), (-10, 10, [-10, -5, 0, 5, 10]), (0, 0.3, [0, 0.1, 0.2, 0.3])]
)
def test_ticks_are_round_numbers_inside_the_bounds(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high, 4) == pytest.approx(expected)


def test_titles_are_escaped() -> None:
    bar = stacked_bar([Part(1, 'a"b', "<script>&")], largest=1)
    assert "<script>" not in bar
    assert next(e.text for e in ElementTree.fromstring(bar).iter("title")) == "<script>&"


def test_a_calibrated_bin_lies_on_the_diagonal_and_a_vain_one_below_it() -> None:
    chart = reliability([(0.5, 0.5, 0.25), (1.0, 0.25, 0.75)], height_px=100)
    assert attributes(chart, "circle", "cx") == [50, 100]
    assert attributes(chart, "circle", "cy") == [50, 75]
    ways = [e for e in ElementTree.fromstring(chart).iter("line") if "way" in e.attrib["class"]]
    assert [(float(e.attrib["y1"]), float(e.attrib["y2"])) for e in ways] == [(50, 50), (0, 75)]
    small, large = (radius - 2.5 for radius in attributes(chart, "circle", "r"))
    assert (large / small) ** 2 == pytest.approx(3, abs=0.02)
