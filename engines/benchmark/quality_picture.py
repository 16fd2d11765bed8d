"""The chart of `diffrc bench quality`: a panel a measure over the number of network evaluations, a curve a sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from engines.evaluation.charts import nice_ticks
from engines.training.calibration_picture import INK, LINE, MUTED, Canvas

WIDTH, PANEL_WIDTH, PANEL_HEIGHT = 1000, 410, 220  # px
LEFT, TOP, BETWEEN, BELOW = 66, 96, 94, 78
COLORS = ("#2f6db3", "#c2413b", "#b97a10", "#2e8b57", "#7a4fa3", "#5a6472")
ASIDE_PX = 3  # whiskers of several curves stand side by side


class Panel(NamedTuple):
    """One measure: its key in a row, words above, and the level that real images have, if any."""

    key: str
    title: str
    level: float | None = None
    level_title: str = ""
    logarithmic: bool = False


def panels(quality: Mapping[str, Any]) -> list[Panel]:
    """The four measures of a `Quality` as JSON values."""
    real = quality["real"]
    return [
        Panel("frechet", "Frechet distance to test images: less is better", real["frechet"]["value"], "real images"),
        Panel("hit_rate", "Class hit rate, %", real["hit_rate"], "test images"),
        Panel("diversity", "Diversity within a class", 1.0, "test images"),
        Panel("seconds_per_image", "Seconds an image", logarithmic=True),
    ]


def curves(quality: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows by sampler (and guidance scale, where there are several), each by rising evaluations."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(quality["rows"], key=lambda row: row["evaluations"]):
        found.setdefault(row["sampler"] + (f", s = {row['scale']:g}" if quality["scales"] else ""), []).append(row)
    return dict(sorted(found.items()))


def quality_png(quality: Mapping[str, Any]) -> bytes:
    """PNG of `Quality.to_json`. Whiskers are one standard deviation of each side."""
    shown = panels(quality)
    rows = -(-len(shown) // 2)
    canvas = Canvas(WIDTH, TOP + rows * (PANEL_HEIGHT + BELOW))
    canvas.text(LEFT, 16, f"{quality['images']:,} images of {len(quality['classes'])} classes a point", INK, 20)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(curves(quality))}
    _legend(canvas, colors)
    for i, panel in enumerate(shown):
        left, top = LEFT + i % 2 * (PANEL_WIDTH + BETWEEN), TOP + i // 2 * (PANEL_HEIGHT + BELOW)
        _panel(canvas, left, top, panel, quality, colors)
    return canvas.png()


def _legend(canvas: Canvas, colors: Mapping[str, str]) -> None:
    at = float(LEFT)
    for name, color in colors.items():
        canvas.line([(at, 56), (at + 20, 56)], color, 3)
        at = canvas.text(at + 27, 56, name, INK, 13, "lm") + 26
    if at < WIDTH - 260:
        canvas.text(at, 56, "whiskers: ± 1 standard deviation", MUTED, 13, "lm")


def _panel(canvas: Canvas, left: float, top: float, panel: Panel, quality: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    drawn = {name: _points(rows, panel.key) for name, rows in curves(quality).items()}
    canvas.text(left, top - 18, panel.title, INK, 15, "lm")
    values = [v for points in drawn.values() for _, low, _, high in points for v in (low, high)]
    if not values:
        canvas.text(left, top + PANEL_HEIGHT / 2, "not measured", MUTED, 13, "lm")
        return
    to_x, ticks_x = _across(sorted({row["evaluations"] for row in quality["rows"]}), left)
    to_y, ticks_y = _up([*values, *(() if panel.level is None else (panel.level,))], top, panel.logarithmic)
    for value in ticks_y:
        canvas.line([(left, to_y(value)), (left + PANEL_WIDTH, to_y(value))], LINE, 1)
        canvas.text(left - 8, to_y(value), f"{value:.4g}", MUTED, 13, "rm")
    for value in ticks_x:
        canvas.line([(to_x(value), top + PANEL_HEIGHT), (to_x(value), top + PANEL_HEIGHT + 4)], MUTED, 1)
        canvas.text(to_x(value), top + PANEL_HEIGHT + 14, f"{value:g}", MUTED, 13, "mm")
    canvas.text(left + PANEL_WIDTH / 2, top + PANEL_HEIGHT + 33, "network evaluations an image", MUTED, 13, "mm")
    if panel.level is not None:
        canvas.dashes(left, left + PANEL_WIDTH, to_y(panel.level), MUTED)
        above = to_y(panel.level) - top > 22
        canvas.text(left + PANEL_WIDTH, to_y(panel.level) + (-9 if above else 10), panel.level_title, MUTED, 12, "rm")
    for i, (name, points) in enumerate(drawn.items()):
        aside = ASIDE_PX * (i - (len(drawn) - 1) / 2)
        for x, low, _, high in points:
            canvas.line([(to_x(x) + aside, to_y(low)), (to_x(x) + aside, to_y(high))], colors[name], 1.5)
        canvas.curve([(to_x(x) + aside, to_y(value)) for x, _, value, _ in points], colors[name])


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float, float, float]]:
    """(evaluations, value - spread, value, value + spread); rows without the measure are left out."""
    found = []
    for row in rows:
        if (figure := row[key]) is None:
            continue
        value, spread = (figure["value"], figure["spread"]) if isinstance(figure, Mapping) else (figure, 0.0)
        found.append((float(row["evaluations"]), value - spread, value, value + spread))
    return found


def _across(evaluations: Sequence[int], left: float) -> tuple[Callable[[float], float], list[int]]:
    """Logarithmic from the fewest evaluations to the most, with room at both ends; ticks are those that occur, as far as there is room."""
    low, span, room = math.log(evaluations[0]), math.log(evaluations[-1] / evaluations[0]) or 1.0, 24

    def to_x(value: float) -> float:
        return left + room + (PANEL_WIDTH - 2 * room) * (math.log(value) - low) / span

    ticks: list[int] = []
    for value in evaluations:
        if not ticks or to_x(value) - to_x(ticks[-1]) >= 34:
            ticks.append(value)
    return to_x, ticks


def _up(values: Sequence[float], top: float, logarithmic: bool) -> tuple[Callable[[float], float], list[float]]:
    """The vertical scale that holds all values, and its round ticks."""
    if logarithmic:
        low, high = math.log10(min(values)), math.log10(max(values))
        first, last = math.floor(low), math.ceil(high)
        ticks = [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
        room = 0.06 * (high - low) or 0.2
        low, high = low - room, high + room
        return lambda value: top + PANEL_HEIGHT * (high - math.log10(value)) / (high - low), [
            t for t in ticks if low <= math.log10(t) <= high
        ]
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = (0.0 if 0 <= low < 0.3 * high else low - room), high + room
    return lambda value: top + PANEL_HEIGHT * (high - value) / (high - low), [t for t in nice_ticks(low, high, 4) if low <= t <= high]
