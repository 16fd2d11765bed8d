"""Charts: positions on the scale, ticks, and escaped text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from engines.evaluation.charts import (
    MAX_COLUMNS,
    Measured,
    Part,
    Series,
    columns,
    dumbbell,
    error_curve,
    gains,
    interval_mark,
    line_chart,
    nice_ticks,
    reliability,
    stacked_bar,
    text,
)


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


def test_the_interval_of_a_dumbbell_is_a_band_that_stays_on_the_scale() -> None:
    chart = dumbbell(60, 90, (50, 100), "few", (80, 120), "<cat>")
    band = next(e for e in ElementTree.fromstring(chart).iter("line") if e.attrib["class"].startswith("band"))
    assert (float(band.attrib["x1"].rstrip("%")), float(band.attrib["x2"].rstrip("%"))) == (60, 100)
    assert next(e.text for e in ElementTree.fromstring(chart).iter("title")) == "<cat>"


def test_gains_stand_on_zero_and_losses_hang_from_it() -> None:
    chart = gains([Part(30, "few", "a"), Part(-10, "few", "b"), Part(0, "few", "c")], height_px=100)
    assert attributes(chart, "rect", "y") == [0, 75, 75]
    assert attributes(chart, "rect", "height") == [75, 25, 0.6]


def test_of_many_classes_neighbors_share_a_column_with_their_mean() -> None:
    chart = columns([[Part(k % 3, "few", f"class {k}")] for k in range(3 * MAX_COLUMNS)], height_px=100)
    assert attributes(chart, "rect", "height") == [100] * MAX_COLUMNS
    assert next(e.text for e in ElementTree.fromstring(chart).iter("title")) == "class 0; with 2 more, whose mean is shown"


def test_measurements_have_their_bars_and_lie_to_scale_where_there_is_room() -> None:
    chart = error_curve([Measured("ours", "c0", [(0, 10, 5), (5, 20, 0), (10, 30, 5)])], "lambda")
    assert attributes(chart, "circle", "cx") == [4, 50, 96]
    bars = [e for e in ElementTree.fromstring(chart).iter("line") if e.attrib["class"].startswith("whisker")]
    middle = attributes(chart, "circle", "cy")
    assert [(float(b.attrib["y1"]) + float(b.attrib["y2"])) / 2 for b in bars] == pytest.approx([middle[0], middle[2]], abs=0.01)
    assert middle == sorted(middle, reverse=True)


def test_measurements_too_close_for_their_scale_are_evenly_spaced() -> None:
    chart = error_curve([Measured("ours", "c0", [(x, 1, 0) for x in (0, 0.01, 1)])], "lambda")
    assert attributes(chart, "circle", "cx") == [4, 50, 96]


def test_one_measurement_and_none_are_drawn_too() -> None:
    assert attributes(error_curve([Measured("ours", "c0", [(3, 1, 0)])], "s"), "circle", "cx") == [4]
    assert "Nothing was measured" in error_curve([], "s")


def test_text_is_escaped_and_loses_what_would_turn_or_break_it() -> None:
    assert text('<a b="c">\u202e\x00\ud800\n') == "&lt;a b=&quot;c&quot;&gt;" + 3 * "\N{REPLACEMENT CHARACTER}" + "\n"


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
