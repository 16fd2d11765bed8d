"""A measurement as a picture: how many evaluations a second every engine makes, by batch size, and whole guided steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engines.benchmark.report import MODE_TITLES, modes_of
from engines.training.calibration_picture import AMBER, BLUE, INK, LINE, MUTED, PALE, WIDTH, Canvas

LEFT, RIGHT, SPACE, TOP = 196, 30, 26, 108  # px
ROW, BAR = 25, 13
FIGURES = 118  # px beside the longest bar, for its figures
HEAD = 66  # px above the bars of a panel
PALE_AMBER, GREEN = "#e3c58a", "#3d8b5f"
COLORS = {"fp32": (BLUE, PALE), "bf16": (AMBER, PALE_AMBER), "fp16": (GREEN, "#a9cfb8")}  # engines; torch's and diffusers' own
LIBRARIES = ("torch", "autocast", "diffusers")
MAX_PANELS = 3  # batch sizes side by side


class Bar(NamedTuple):
    """One engine at one batch size."""

    name: str
    color: str
    speed: float  # images a second, of one evaluation or of whole trajectories
    low: float  # of the turns
    high: float
    figures: str


def speed_png(document: Mapping[str, Any]) -> bytes:
    """PNG of a document of `report.document`."""
    blocks = [(MODE_TITLES[mode], _evaluations(document, mode)) for mode in modes_of(document)]
    if document["guided"]:
        blocks.append((f"whole guided steps: seconds an image at {document['network']['steps']} steps", _guided(document)))
    heights = [HEAD + ROW * max(len(bars) for _, bars in panels) for _, panels in blocks]
    canvas = Canvas(WIDTH, TOP + sum(heights) + 16)
    _heading(canvas, document)
    top = float(TOP)
    for (title, panels), height in zip(blocks, heights, strict=True):
        _block(canvas, top, title, panels)
        top += height
    return canvas.png()


def panels_of(batches: Sequence[int]) -> list[int]:
    """At most three batch sizes: the smallest, one between, the largest."""
    found = sorted(set(batches))
    return found if len(found) <= MAX_PANELS else [found[0], found[len(found) // 2], found[-1]]


def _heading(canvas: Canvas, document: Mapping[str, Any]) -> None:
    network, machine, settings = document["network"], document["machine"], document["settings"]
    size = f"{network['parameters'] / 1e6:.3g} M parameters, {network['operations_per_image'] / 1e9:.3g} GFLOP an image and evaluation"
    canvas.text(24, 16, f"{network['name']}: {size}", INK, 20)
    device = (
        machine["gpu"]["name"] if machine["gpu"] else f"{settings['threads'] or machine['processors']} processors, {machine['processor']}"
    )
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in machine["flags"]]
    names = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "diffusers": "diffusers"}
    versions = ", ".join(f"{name} {document['versions'][key]}" for key, name in names.items() if key in document["versions"])
    canvas.text(24, 46, f"{', '.join([device, *flags[:1]])}; {versions}; {document['began'][:10]}; n = {settings['turns']}", MUTED, 13)
    at = 24.0
    words = {"fp32": "fp32", "bf16": "bf16: less precision", "fp16": "fp16: less precision"}
    for precision in sorted({row["precision"] for row in (*document["rows"], *document["guided"])}, key=list(COLORS).index):
        strong, pale = COLORS[precision]
        canvas.line([(at, 78), (at + 14, 78)], strong, BAR)
        canvas.line([(at + 16, 78), (at + 30, 78)], pale, BAR)
        at = canvas.text(at + 38, 78, words[precision], INK, 13, "lm") + 24
    canvas.text(at, 78, "pale: torch and diffusers themselves; x is beside torch fp32 in the same turns; longer is faster", MUTED, 13, "lm")


def _block(canvas: Canvas, top: float, title: str, panels: Sequence[tuple[int, Sequence[Bar]]]) -> None:
    canvas.text(24, top, title, INK, 15)
    names = list(dict.fromkeys(bar.name for _, bars in panels for bar in bars))
    first = top + HEAD - 8
    for i, name in enumerate(names):
        canvas.text(LEFT - 10, first + i * ROW, name, INK, 13, "rm")
    width = (WIDTH - LEFT - RIGHT - (len(panels) - 1) * SPACE) / len(panels)
    room = width - FIGURES
    for place, (batch, bars) in enumerate(panels):
        left = LEFT + place * (width + SPACE)
        canvas.text(left, top + 34, f"batch {batch}", MUTED, 13, "lm")
        canvas.line([(left, first - ROW / 2), (left, first + (len(names) - 0.5) * ROW)], LINE, 1)
        longest = max(bar.high for bar in bars)
        for bar in bars:
            y, end = first + names.index(bar.name) * ROW, left + room * bar.speed / longest
            canvas.line([(left, y), (end, y)], bar.color, BAR)
            canvas.line([(left + room * bar.low / longest, y), (left + room * bar.high / longest, y)], INK, 1)
            canvas.text(left + room * bar.high / longest + 6, y, bar.figures, MUTED, 12, "lm")


def _evaluations(document: Mapping[str, Any], mode: str) -> list[tuple[int, list[Bar]]]:
    rows = [row for row in document["rows"] if row["mode"] == mode]
    return [
        (batch, [_bar(row, row["ms_per_image"]["p50"], "ms", 1.0, row["over_torch"]) for row in rows if row["batch"] == batch])
        for batch in panels_of([row["batch"] for row in rows])
    ]


def _guided(document: Mapping[str, Any]) -> list[tuple[int, list[Bar]]]:
    rows, steps = document["guided"], document["network"]["steps"]
    return [
        (batch, [_bar(row, row["seconds_per_image"], "s", steps / 1000, row["over_plain_fp32"]) for row in rows if row["batch"] == batch])
        for batch in panels_of([row["batch"] for row in rows])
    ]


def _bar(row: Mapping[str, Any], value: float, unit: str, factor: float, over: Mapping[str, Any] | None) -> Bar:
    """A bar of 1 / value; `factor` turns the samples' milliseconds into the value's unit."""
    turns = [factor * statistics.median(turn) for turn in row["samples_ms"]]
    ratio = f"  {over['median']:.2f}x" if over else ""
    low, high = min(1 / max(turns), 1 / value), max(1 / min(turns), 1 / value)
    color = COLORS[row["precision"]][row["runtime"] in LIBRARIES]
    return Bar(row["engine"], color, 1 / value, low, high, f"{value:.3g} {unit}{ratio}")
