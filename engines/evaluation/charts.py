"""Charts as inline SVG: bars, intervals, dumbbells and lines that keep their text size from 320 px to print.

Positions are percentages and sizes are px, so that a chart is as wide as its place and its text stays legible; colors are
the style sheet's variables, so that light, dark and print agree. Marks carry a `<title>` for pointers and screen readers.
"""

from __future__ import annotations

import html
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LINE_HEIGHT_PX = 150
MAX_POINTS = 400  # a curve has no more points than a screen shows
MAX_COLUMNS = 240  # of more, neighbors are drawn as one
ROOM_PX = 12  # between two ticks that are not drawn on one another, at the width of a phone
PHONE_PX = 260  # of a chart there
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def text(value: object) -> str:
    """HTML of any text: escaped, and without characters that would reorder, hide or break what is around it.

    Class names come from folders and tables of strangers. Control characters, overrides of the writing direction, and halves of
    surrogate pairs, which no file can hold, become the replacement character.
    """
    return html.escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True)


@dataclass(frozen=True)
class Part:
    """One piece of a stacked bar."""

    value: float
    style: str  # a class of the style sheet: "many", "few added", ...
    title: str


@dataclass(frozen=True)
class Measured:
    """Measurements along an axis: points (x, y, half the error bar) in rising x, joined by straight lines."""

    name: str
    style: str
    points: Sequence[tuple[float, float, float]]


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
                f'<rect class="{text(part.style)}" x="{left:.3f}%" y="0" width="{max(width, 0.3):.3f}%" height="{height_px}" rx="2">'
                f"<title>{text(part.title)}</title></rect>"
            )
        left += width
    return _svg("bar", height_px, "".join(marks))


def columns(stacks: Sequence[Sequence[Part]], height_px: int = 180, describe: str = "") -> str:
    """Vertical stacked columns without labels, for many classes; of more than MAX_COLUMNS, neighbors share a column with their mean."""
    stacks = _joined(stacks)
    largest = max((sum(part.value for part in stack) for stack in stacks), default=0.0) or 1.0
    width, marks = 100 / max(len(stacks), 1), []
    for i, stack in enumerate(stacks):
        top = float(height_px)
        for part in stack:
            tall = height_px * part.value / largest
            top -= tall
            if tall > 0:
                place = f'x="{i * width:.3f}%" y="{top:.2f}" width="{width * 0.86:.3f}%" height="{max(tall, 0.6):.2f}"'
                marks.append(f'<rect class="{text(part.style)}" {place}><title>{text(part.title)}</title></rect>')
    ticks = [value for value in nice_ticks(0, largest, 4) if value <= largest]
    grid = "".join(_across(height_px * (1 - value / largest), _number(value)) for value in ticks)
    return f'<div class="plot">{_svg("columns", height_px, grid + "".join(marks), describe)}</div>'


def gains(parts: Sequence[Part], height_px: int = 150, describe: str = "") -> str:
    """Columns up and down from 0, for many classes; of more than MAX_COLUMNS, neighbors share a column with their mean."""
    drawn = [part for (part,) in _joined([(part,) for part in parts])]
    low, high = min([0.0, *(part.value for part in drawn)]), max([0.0, *(part.value for part in drawn)])
    high = high if high > low else 1.0
    to_y, width = _scale(high, low), 100 / max(len(drawn), 1)
    at = [height_px * to_y(value) / 100 for value in (0.0, *(part.value for part in drawn))]
    marks = "".join(
        f'<rect class="{text(part.style)}" x="{i * width:.3f}%" y="{min(y, at[0]):.2f}" width="{width * 0.86:.3f}%" '
        f'height="{max(abs(y - at[0]), 0.6):.2f}"><title>{text(part.title)}</title></rect>'
        for i, (part, y) in enumerate(zip(drawn, at[1:], strict=True))
    )
    grid = "".join(_across(height_px * to_y(v) / 100, _signed(v)) for v in nice_ticks(low, high, 4) if low <= v <= high)
    zero = f'<line class="zero" x1="0" x2="100%" y1="{at[0]:.2f}" y2="{at[0]:.2f}"/>'
    return f'<div class="plot">{_svg("columns", height_px, grid + marks + zero, describe)}</div>'


def _joined(stacks: Sequence[Sequence[Part]]) -> Sequence[Sequence[Part]]:
    """At most MAX_COLUMNS stacks: neighbors as one, with their mean; it has the first one's style and says how many there are."""
    share = -(-len(stacks) // MAX_COLUMNS) or 1
    blocks = [stacks[i : i + share] for i in range(0, len(stacks), share)]
    return [
        [
            Part(math.fsum(part.value for part in parts) / len(parts), parts[0].style, _joined_title(parts))
            for parts in zip(*block, strict=True)
        ]
        for block in blocks
    ]


def _joined_title(parts: Sequence[Part]) -> str:
    return parts[0].title if len(parts) == 1 else f"{parts[0].title}; with {len(parts) - 1} more, whose mean is shown"


def interval_mark(low: float, middle: float, high: float, bounds: tuple[float, float], style: str, title: str = "") -> str:
    """A dot with its interval on a scale that shows 0."""
    at = _scale(*bounds)
    return _svg(
        "interval",
        22,
        (f"<title>{text(title)}</title>" if title else "") + f'<line class="zero" x1="{at(0):.3f}%" x2="{at(0):.3f}%" y1="-6" y2="28"/>'
        f'<line class="whisker {text(style)}" x1="{at(low):.3f}%" x2="{at(high):.3f}%" y1="11" y2="11"/>'
        f'<circle class="{text(style)}" cx="{at(middle):.3f}%" cy="11" r="5"/>',
    )


def dumbbell(
    before: float, after: float, bounds: tuple[float, float], style: str, interval: tuple[float, float] | None = None, title: str = ""
) -> str:
    """A hollow dot before, a filled one after, and the way between; `interval` is a faint band, of `after`."""
    at = _scale(*bounds)
    band = ""
    if interval:
        low, high = (at(min(max(value, bounds[0]), bounds[1])) for value in interval)
        band = f'<line class="band {text(style)}" x1="{low:.3f}%" x2="{high:.3f}%" y1="10" y2="10"/>'
    told = f"<title>{text(title)}</title>" if title else ""
    return _svg(
        "dumbbell",
        20,
        f'{told}<line class="track" x1="0" x2="100%" y1="10" y2="10"/>{band}'
        f'<line class="way {text(style)}" x1="{at(before):.3f}%" x2="{at(after):.3f}%" y1="10" y2="10"/>'
        f'<circle class="before {text(style)}" cx="{at(before):.3f}%" cy="10" r="4.5"/>'
        f'<circle class="{text(style)}" cx="{at(after):.3f}%" cy="10" r="4.5"/>',
    )


def axis(bounds: tuple[float, float], unit: str = "") -> str:
    """The ticks below a column of `interval_mark` or `dumbbell`."""
    at = _scale(*bounds)
    marks = "".join(f'<text x="{at(v):.3f}%" y="12" text-anchor="middle">{_number(v)}{text(unit)}</text>' for v in nice_ticks(*bounds, 4))
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
        return f'<polyline class="{text(style)}" points="{steps}"/>'

    curves = "".join(
        (path(s.points, f"raw {s.style}") + path(_running_mean(s.points), s.style)) if s.smooth else path(s.points, s.style) for s in drawn
    )
    height = LINE_HEIGHT_PX
    grid = "".join(_across(height * to_y(v) / 100, _number(v) + unit) for v in nice_ticks(y_low, y_high, 4) if y_low <= v <= y_high)
    if level is not None:
        grid += f'<line class="level" x1="0" x2="100%" y1="{height * to_y(level) / 100:.2f}" y2="{height * to_y(level) / 100:.2f}"/>'
    ends = "".join(
        f'<text x="{at}%" y="{height + 16}" text-anchor="{anchor}">{text(words)}</text>'
        for at, anchor, words in ((0, "start", f"{x_low:,.0f}"), (50, "middle", x_label), (100, "end", f"{x_high:,.0f}"))
    )
    plot = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="{height}">{curves}</svg>'
    return f'<div class="plot lines">{_svg("line", height, grid + plot + ends, describe)}</div>'


def error_curve(series: Sequence[Measured], x_label: str, unit: str = "", describe: str = "") -> str:
    """Measurements with their error bars over an axis that names every x; where these lie too close together, they are evenly spaced."""
    drawn = [s for s in series if s.points]
    if not drawn:
        return '<p class="none">Nothing was measured.</p>'
    values = sorted({x for s in drawn for x, _, _ in s.points})
    place = _places(values)
    ends = [end for s in drawn for _, y, error in s.points for end in (y - error, y + error)]
    room = (max(ends) - min(ends)) * 0.08 or abs(max(ends)) * 0.1 or 1.0
    y_low, y_high = min(ends) - room, max(ends) + room
    height, down = LINE_HEIGHT_PX, _scale(y_high, y_low)
    marks = "".join(_across(height * down(v) / 100, _number(v) + unit) for v in nice_ticks(y_low, y_high, 4) if y_low <= v <= y_high)
    for s in drawn:
        at = [(place[x], height * down(y) / 100, height * error / (y_high - y_low)) for x, y, error in s.points]
        for (x1, y1, _), (x2, y2, _) in itertools.pairwise(at):
            marks += f'<line class="join {text(s.style)}" x1="{x1:.3f}%" x2="{x2:.3f}%" y1="{y1:.2f}" y2="{y2:.2f}"/>'
        for (x, y, reach), (value, mean, error) in zip(at, s.points, strict=True):
            if error > 0:
                marks += f'<line class="whisker {text(s.style)}" x1="{x:.3f}%" x2="{x:.3f}%" y1="{y - reach:.2f}" y2="{y + reach:.2f}"/>'
            title = f"{s.name}: {mean:.4g}{unit}" + (f" \N{PLUS-MINUS SIGN} {error:.2g}" if error > 0 else "") + f" at {_number(value)}"
            marks += f'<circle class="{text(s.style)}" cx="{x:.3f}%" cy="{y:.2f}" r="4"><title>{text(title)}</title></circle>'
    for x in _told(values, place):
        marks += f'<text x="{place[x]:.3f}%" y="{height + 16}" text-anchor="middle">{_number(x)}</text>'
    marks += f'<text x="50%" y="{height + 33}" text-anchor="middle">{text(x_label)}</text>'
    return f'<div class="plot measured">{_svg("line", height, marks, describe)}</div>'


def _places(values: Sequence[float]) -> dict[float, float]:
    """Where each x lies in percent: to scale, or evenly spaced where two would touch. A margin leaves room for the dots."""
    span = values[-1] - values[0]
    touching = any(b - a < span / 12 for a, b in itertools.pairwise(values))
    at = _scale(0, max(1, len(values) - 1)) if touching or not span else _scale(values[0], values[-1])
    return {x: 4 + 0.92 * (at(i) if touching or not span else at(x)) for i, x in enumerate(values)}


def _told(values: Sequence[float], place: Mapping[float, float]) -> list[float]:
    """The values whose labels have room on a phone, from the left."""
    told: list[float] = []
    end = -math.inf
    for x in values:
        at = PHONE_PX * place[x] / 100
        half = 3.5 * len(_number(x))
        if at - half >= end:
            told.append(x)
            end = at + half + ROOM_PX / 2
    return told


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
    return f'{line}<text x="-6" y="{y + 4:.2f}" text-anchor="end">{text(label)}</text>'


def _svg(style: str, height_px: int, content: str, describe: str = "") -> str:
    role = f'role="img" aria-label="{text(describe)}"' if describe else 'aria-hidden="true"'
    return f'<svg class="chart {style}" width="100%" height="{height_px}" {role}>{content}</svg>'


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + _number(value)


def _number(value: float) -> str:
    return f"{value:,.4g}".replace("-", "\N{MINUS SIGN}") if abs(value) < 1e4 else f"{value:,.0f}"
