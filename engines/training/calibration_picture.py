"""The guide's calibration as a picture: its figures over t, and reliability diagrams at a few noise levels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SMOOTH = 3  # drawn so much larger and scaled down: Pillow's lines are jagged
WIDTH, PLOT, SPACE = 1000, 250, 26  # px
LEFT, TOP = 70, 74
INK, MUTED, LINE, PAPER = "#1b2330", "#5a6472", "#e4e2dc", "#ffffff"
BLUE, AMBER, RED, PALE = "#2f6db3", "#b97a10", "#c2413b", "#9fbfe2"
DIAGRAMS = 5  # noise levels that are shown in full

Point = tuple[float, float]


def calibration_png(tables: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG of `calibration.by_noise` of some splits; curves of confidence, ECE and diagrams are the test images' where there are any."""
    judge = tables.get("test") or tables["train"]
    shown = diagram_levels(judge["t"])
    side = (WIDTH - LEFT - 40 - (len(shown) - 1) * SPACE) / DIAGRAMS
    top = TOP + PLOT + 110
    canvas = Canvas(WIDTH, round(top + side + 40))
    canvas.text(LEFT, 18, "The guide by noise level", INK, 20)
    _curves(canvas, tables, judge)
    images = "test" if "test" in tables else "training"
    canvas.text(LEFT, top - 44, f"Reliability on {judge['images']:,} {images} images: accuracy against confidence", INK, 15)
    for place, i in enumerate(shown):
        _diagram(canvas, LEFT + place * (side + SPACE), top, side, judge, i, labeled=place == 0)
    return canvas.png()


def diagram_levels(levels: Sequence[int]) -> list[int]:
    """Places of at most five noise levels, evenly spaced, the last left out: there is nothing left to see."""
    last = max(len(levels) - 2, 0)
    count = min(DIAGRAMS, last + 1)
    return [round(i * last / max(count - 1, 1)) for i in range(count)]


def _curves(canvas: Canvas, tables: Mapping[str, Mapping[str, Any]], judge: Mapping[str, Any]) -> None:
    right = WIDTH - 40
    levels: Sequence[int] = judge["t"]
    for percent in (0, 25, 50, 75, 100):
        y = TOP + PLOT * (1 - percent / 100)
        canvas.line([(LEFT, y), (right, y)], LINE, 1)
        canvas.text(LEFT - 8, y, f"{percent} %", MUTED, 13, "rm")
    span = max(levels[-1] - levels[0], 1)

    def x(t: float) -> float:
        return LEFT + (right - LEFT) * (t - levels[0]) / span

    chance = TOP + PLOT * (1 - judge["chance"])
    canvas.dashes(LEFT, right, chance, MUTED)
    trusted = tables["train"]["trusted_until"]  # as `advice` says it
    if trusted is not None:
        at = x(trusted)
        canvas.line([(at, TOP), (at, TOP + PLOT)], MUTED, 1)
        beyond = at > (LEFT + right) / 2
        place, anchor = (at - 6, "rm") if beyond else (at + 6, "lm")
        canvas.text(place, TOP + 10, f"halfway to chance on training images: t = {trusted}", MUTED, 12, anchor)
    for t in levels[:: max(1, len(levels) // 5)]:
        canvas.text(x(t), TOP + PLOT + 14, f"{t}", MUTED, 13, "mm")
    canvas.text((LEFT + right) / 2, TOP + PLOT + 34, "timestep t: more noise to the right", MUTED, 13, "mm")
    curves = [("accuracy, training images", "accuracy", tables["train"], PALE)] if {"train", "test"} <= set(tables) else []
    curves += [("accuracy", "accuracy", judge, BLUE), ("confidence", "confidence", judge, AMBER), ("ECE", "ece", judge, RED)]
    if curves[0][2] is not judge:
        curves[1] = ("accuracy, test images", *curves[1][1:])
    at = float(LEFT)
    for name, key, table, color in curves:
        canvas.curve([(x(t), TOP + PLOT * (1 - v)) for t, v in zip(table["t"], table[key], strict=True)], color)
        canvas.line([(at, 56), (at + 20, 56)], color, 3)
        at = canvas.text(at + 27, 56, name, INK, 13, "lm") + 26
    canvas.line([(at, 56), (at + 4, 56)], MUTED, 1)
    canvas.line([(at + 8, 56), (at + 12, 56)], MUTED, 1)
    canvas.line([(at + 16, 56), (at + 20, 56)], MUTED, 1)
    canvas.text(at + 27, 56, "chance", INK, 13, "lm")


def _diagram(canvas: Canvas, left: float, top: float, side: float, table: Mapping[str, Any], i: int, labeled: bool) -> None:
    """Dots at (confidence, accuracy), their area the share of the images; a calibrated guide has them on the diagonal."""
    low = top + side
    canvas.box(left, top, left + side, low, LINE)
    canvas.line([(left, low), (left + side, top)], MUTED, 1)
    for confidence, accuracy, share in table["bins"][i]:
        x, y = left + side * confidence, low - side * accuracy
        canvas.line([(x, low - side * confidence), (x, y)], RED, 2)
        canvas.dot(x, y, 3 + 10 * share**0.5, BLUE)
    canvas.text(left + side / 2, top - 14, f"t = {table['t'][i]}   ECE {100 * table['ece'][i]:.1f} %", INK, 13, "mm")
    canvas.text(left, low + 14, "0", MUTED, 12, "lm")
    canvas.text(left + side, low + 14, "100 %", MUTED, 12, "rm")
    canvas.text(left + side / 2, low + 14, "confidence", MUTED, 12, "mm")
    if labeled:
        for percent in (0, 50, 100):
            canvas.text(left - 8, low - side * percent / 100, f"{percent} %", MUTED, 12, "rm")


class Canvas:
    """A white picture with smooth lines; all measures in px of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._image = Image.new("RGB", (width * SMOOTH, height * SMOOTH), PAPER)
        self._draw = ImageDraw.Draw(self._image, "RGBA")

    def line(self, points: Sequence[Point], color: str, width: float) -> None:
        self._draw.line([(x * SMOOTH, y * SMOOTH) for x, y in points], fill=color, width=round(width * SMOOTH), joint="curve")

    def curve(self, points: Sequence[Point], color: str) -> None:
        """A line with a dot at each of its points."""
        self.line(points, color, 2.5)
        for x, y in points:
            self.dot(x, y, 3.5, color)

    def dashes(self, left: float, right: float, y: float, color: str) -> None:
        x = left
        while x < right:
            self.line([(x, y), (min(x + 4, right), y)], color, 1)
            x += 8

    def dot(self, x: float, y: float, radius: float, color: str) -> None:
        self._draw.ellipse([(v * SMOOTH) for v in (x - radius, y - radius, x + radius, y + radius)], fill=color)

    def box(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        self._draw.rectangle([v * SMOOTH for v in (left, top, right, bottom)], outline=color, width=SMOOTH)

    def text(self, x: float, y: float, words: str, color: str, size: int, anchor: str = "la") -> float:
        """Write, and return the x at which the words end."""
        font = ImageFont.load_default(size=size * SMOOTH)
        self._draw.text((x * SMOOTH, y * SMOOTH), words, fill=color, font=font, anchor=anchor)
        return x + font.getlength(words) / SMOOTH

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self._image.resize(self._size, Image.Resampling.LANCZOS).save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()
