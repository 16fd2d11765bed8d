"""Charts as inline SVG: bars, intervals, dumbbells and lines that keep their text size from 320 px to print.

Positions are percentages and sizes are px, so that a chart is as wide as its place and its text stays legible; colors are
the style sheet's variables, so that light, dark and print agree. Marks carry a `<title>` for pointers and screen readers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LINE_HEIGHT_PX = 150
MAX_POINTS = 400  # a curve has no more points than a screen shows


@dataclass(frozen=True)
class Part:
    """One piece of a stacked bar."""

    value: float
    style: str  # a class of the style sheet: "many", "few added", ...
    title: str


@dataclass(frozen=True)
class Series:
    """One curve: its name in the legend, style class, and points (x, y) in rising x."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    smooth: bool = False  # draw a running mean over a faint raw line


def stacked_bar(parts: Sequence[Part], largest: float, height_px: int = 16) -> str:
    """A horizontal bar from 0 to `largest`; parts side by side."""
    marks, left = [], 0.0
    for part in parts:
        width = 100 * part.value / largest if largest > 0 else 0.0
        if width > 0:
            marks.append(
                f'<rect class="{_text(part.style)}" x="{left:.3f}%" y="0" width="{max(width, 0.3):.3f}%" height="{height_px}" rx="2">'
                f"<title>{_text(part.title)}</title></rect>"
            )
        left += width
    return _svg("bar", height_px, "".join(marks))


def columns(stacks: Sequence[Sequence[Part]], height_px: int = 180) -> str:
    """Vertical stacked columns without labels, for many classes."""
    largest = max((sum(part.value for part in stack) for stack in stacks), default=0.0) or 1.0
    width, marks = 100 / max(len(stacks), 1), []
    for i, stack in enumerate(stacks):
        top = float(height_px)
        for part in stack:
            tall = height_px * part.value / largest
            top -= tall
            if tall > 0:
                place = f'x="{i * width:.3f}%" y="{top:.2f}" width="{width * 0.86:.3f}%" height="{max(tall, 0.6):.2f}"'
                marks.append(f'<rect class="{_text(part.style)}" {place}><title>{_text(part.title)}</title></rect>')
    ticks = [value for value in nice_ticks(0, largest, 4) if value <= largest]
    grid = "".join(_across(height_px * (1 - value / largest), _number(value)) for value in ticks)
    return f'<div class="plot">{_svg("columns", height_px, grid + "".join(marks))}</div>'


def interval_mark(low: float, middle: float, high: float, bounds: tuple[float, float], style: str) -> str:
    """A dot with its interval on a scale that shows 0."""
    at = _scale(*bounds)
    return _svg(
        "interval",
        22,
        f'<line class="zero" x1="{at(0):.3f}%" x2="{at(0):.3f}%" y1="-6" y2="28"/>'
        f'<line class="whisker {_text(style)}" x1="{at(low):.3f}%" x2="{at(high):.3f}%" y1="11" y2="11"/>'
        f'<circle class="{_text(style)}" cx="{at(middle):.3f}%" cy="11" r="5"/>',
    )


def dumbbell(before: float, after: float, bounds: tuple[float, float], style: str) -> str:
    """A hollow dot before, a filled one after, and the way between."""
    at = _scale(*bounds)
    return _svg(
        "dumbbell",
        20,
        f'<line class="track" x1="0" x2="100%" y1="10" y2="10"/>'
        f'<line class="way {_text(style)}" x1="{at(before):.3f}%" x2="{at(after):.3f}%" y1="10" y2="10"/>'
        f'<circle class="before {_text(style)}" cx="{at(before):.3f}%" cy="10" r="4.5"/>'
        f'<circle class="{_text(style)}" cx="{at(after):.3f}%" cy="10" r="4.5"/>',
    )


def axis(bounds: tuple[float, float], unit: str = "") -> str:
    """The ticks below a column of `interval_mark` or `dumbbell`."""
    at = _scale(*bounds)
    marks = "".join(f'<text x="{at(v):.3f}%" y="12" text-anchor="middle">{_number(v)}{_text(unit)}</text>' for v in nice_ticks(*bounds, 4))
    return _svg("axis", 16, marks)


def line_chart(
    series: Sequence[Series],
    x_label: str,
    bounds: tuple[float, float] | None = None,
    level: float | None = None,
    unit: str = "",
    describe: str = "",
) -> str:
    """Curves over a common x. `bounds` fixes y, else it holds all curves; `level` is a dashed line across."""
    drawn = [Series(s.name, s.style, _thinned(s.points), s.smooth) for s in series if len(s.points) > 1]
    if not drawn:
        return '<p class="none">Too short to draw.</p>'
    x_low, x_high = (f(x for s in drawn for x, _ in s.points) for f in (min, max))
    y_low, y_high = bounds or _y_bounds(drawn)
    to_x, to_y = _scale(x_low, x_high), _scale(y_high, y_low)

    def path(points: Sequence[tuple[float, float]], style: str) -> str:
        steps = " ".join(f"{to_x(x):.2f},{min(max(to_y(y), -2), 102):.2f}" for x, y in points)
        return f'<polyline class="{_text(style)}" points="{steps}"/>'

    curves = "".join(
        (path(s.points, f"raw {s.style}") + path(_running_mean(s.points), s.style)) if s.smooth else path(s.points, s.style) for s in drawn
    )
    height = LINE_HEIGHT_PX
    grid = "".join(_across(height * to_y(v) / 100, _number(v) + unit) for v in nice_ticks(y_low, y_high, 4) if y_low <= v <= y_high)
    if level is not None:
        grid += f'<line class="level" x1="0" x2="100%" y1="{height * to_y(level) / 100:.2f}" y2="{height * to_y(level) / 100:.2f}"/>'
    ends = "".join(
        f'<text x="{at}%" y="{height + 16}" text-anchor="{anchor}">{_text(words)}</text>'
        for at, anchor, words in ((0, "start", f"{x_low:,.0f}"), (50, "middle", x_label), (100, "end", f"{x_high:,.0f}"))
    )
    plot = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="{height}">{curves}</svg>'
    return f'<div class="plot lines">{_svg("line", height, grid + plot + ends, describe)}</div>'


def reliability(bins: Sequence[tuple[float, float, float]], describe: str = "", height_px: int = 120) -> str:
    """Dots at (confidence, accuracy), both 0..1, with their way to the diagonal, where a calibrated model has them.

    Args:
        bins: confidence, accuracy and share of the images, which is the dot's area.
    """
    marks = f'<line class="grid" x1="0" x2="100%" y1="{height_px}" y2="{height_px}"/><line class="grid" x1="0" x2="100%" y1="0" y2="0"/>'
    marks += f'<line class="zero" x1="0" x2="100%" y1="{height_px}" y2="0"/>'
    for confidence, accuracy, share in bins:
        x, y, ideal = f"{100 * confidence:.2f}%", f"{height_px * (1 - accuracy):.2f}", f"{height_px * (1 - confidence):.2f}"
        title = f"{100 * share:.0f} % of the images: {100 * confidence:.0f} % sure, {100 * accuracy:.0f} % right"
        marks += f'<line class="way c1" x1="{x}" x2="{x}" y1="{ideal}" y2="{y}"/>'
        marks += f'<circle class="c0" cx="{x}" cy="{y}" r="{2.5 + 7 * math.sqrt(share):.2f}"><title>{title}</title></circle>'
    return _svg("reliability", height_px, marks, describe)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values from `low` to `high`, both finite, low < high: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.75)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _y_bounds(series: Sequence[Series]) -> tuple[float, float]:
    """What the curves need once their first steps are over: those are far above and would flatten the rest."""
    settled = [y for s in series for _, y in s.points[len(s.points) // 20 :]]
    low, high = min(settled), max(settled)
    low = min(low, 0.0) if low < 0.5 * high else low
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - (room if low != 0 else 0), high + room


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a window of about a tenth of the curve, centered, shorter at the ends."""
    half = max(1, len(points) // 20)
    windows = (points[max(0, i - half) : i + half + 1] for i in range(len(points)))
    return [(x, math.fsum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = -(-len(points) // MAX_POINTS) or 1
    return [*points[:-1:step], points[-1]] if points else []


def _scale(low: float, high: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: 100 * (value - low) / span + 0.0  # no -0


def _across(y: float, label: str) -> str:
    """A grid line with its label left of the plot."""
    line = f'<line class="grid" x1="0" x2="100%" y1="{y:.2f}" y2="{y:.2f}"/>'
    return f'{line}<text x="-6" y="{y + 4:.2f}" text-anchor="end">{_text(label)}</text>'


def _svg(style: str, height_px: int, content: str, describe: str = "") -> str:
    role = f'role="img" aria-label="{_text(describe)}"' if describe else 'aria-hidden="true"'
    return f'<svg class="chart {style}" width="100%" height="{height_px}" {role}>{content}</svg>'


def _number(value: float) -> str:
    return f"{value:,.4g}".replace("-", "\N{MINUS SIGN}") if abs(value) < 1e4 else f"{value:,.0f}"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
