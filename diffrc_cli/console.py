"""What a person sees: tables, bar charts and progress on a terminal, plain lines in a pipe, JSON on request.

Results go to stdout, progress and errors to stderr, so that `diffrc ... > file` holds results alone. Rich is imported
inside the functions: `diffrc --help` does not pay for it. Text of users (class names, paths) is never read as markup.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from engines.progress import Report

MIN_WIDTH, MAX_WIDTH = 40, 120  # characters; a wider terminal makes lines that the eye loses
PLAIN_INTERVAL_SECONDS = 10.0  # between two progress lines of one job where there is no terminal
UNWRAPPED_CHARACTERS = 20  # columns of numbers, and of short text where there is room, are not wrapped
GROUP_STYLES = {"many": "blue", "medium": "yellow", "few": "red"}  # beside the group's name, never instead of it
ADDED_STYLE = "green"
NUMERIC = re.compile(r"-|[-+]?[\d.,]+(e[-+]?\d+)?\s?(%|(±|\+/-|\+).*)?")  # cells that read best right-aligned


class Bar(NamedTuple):
    """A row of a bar chart: `value`, and `added` on top of it (synthetic images, say), both >= 0."""

    label: str
    value: float
    group: str = ""  # "many" | "medium" | "few" | ""
    added: float = 0.0


def say(text: str = "") -> None:
    """One line on stdout, as it is: not wrapped, no markup, control characters made visible."""
    print(clean(text))


def prose(text: str) -> None:
    """A sentence on stdout: broken between words on a terminal, one line in a pipe."""
    if not _is_terminal(sys.stdout):
        say(text)
        return
    from rich.text import Text

    _console(sys.stdout).print(Text(clean(text)))


def note(text: str) -> None:
    """One line on stderr: what a command chose or does, beside its result."""
    print(clean(text), file=sys.stderr)


def error(problem: str, remedy: str) -> None:
    """The two lines of a failure on stderr: cause and remedy, each on one line."""
    console = _console(sys.stderr)
    for label, style, text in (("error:", "bold red", problem), ("try:  ", "bold", remedy)):
        console.print(_styled((label, style), (f" {clean(text)}", "")), soft_wrap=True)


def emit_json(value: Any) -> None:
    """One line of strict JSON on stdout.

    Paths become strings, arrays lists; a number that is not finite becomes null, JSON having no word for it.
    """
    print(json.dumps(_jsonable(value), ensure_ascii=True, allow_nan=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout. Columns of numbers are right-aligned; floats show four significant digits.

    On a terminal narrow columns fold; in a pipe the columns are padded with blanks, nothing is cut.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    assert all(len(row) == len(columns) for row in cells), "every row has one cell a column"
    numeric = [bool(cells) and all(NUMERIC.fullmatch(row[i]) for row in cells) for i in range(len(columns))]
    if not _is_terminal(sys.stdout):
        for line in _plain_table(title, columns, cells, numeric):
            print(line)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(clean(title)) if title else None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    widths = [max(map(len, (column, *(row[i] for row in cells)))) for i, column in enumerate(columns)]
    short = [right or width <= UNWRAPPED_CHARACTERS for right, width in zip(numeric, widths, strict=True)]
    fits = sum(width for width, whole in zip(widths, short, strict=True) if whole) + 3 * len(columns) + 12 <= _width(sys.stdout)
    for column, right, whole in zip(columns, numeric, short, strict=True):
        grid.add_column(Text(clean(column)), justify="right" if right else "left", overflow="fold", no_wrap=right or (whole and fits))
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    _console(sys.stdout).print(grid)


def bars(title: str, rows: Sequence[Bar], limit: int = 40) -> None:
    """A horizontal bar chart on stdout, one row a bar, linear from 0, colored by group.

    Args:
        title: a line above the chart; "" for none.
        rows: the bars, in the order to show.
        limit: with more rows than this, the middle is left out and a line says how many.
    """
    from rich.text import Text

    shown: list[Bar | None] = list(rows)
    if len(rows) > limit:
        shown = [*rows[: limit - limit // 2], None, *rows[len(rows) - limit // 2 :]]
    if not shown:
        return
    figures = {row: _figure(row) for row in rows}
    label_width = min(max(len(clean(row.label)) for row in shown if row), 24)
    figure_width = max(len(figures[row]) for row in shown if row)
    group_width = max(len(row.group) for row in shown if row)
    console = _console(sys.stdout)
    room = max(8, console.width - label_width - figure_width - group_width - 4)
    largest = max(row.value + row.added for row in rows) or 1.0
    if title:
        console.print(Text(clean(title), style="bold"), soft_wrap=True)
    for row in shown:
        if row is None:
            console.print(Text(f"... {len(rows) - limit} more ...", style="dim"), soft_wrap=True)
            continue
        line = _styled((f"{_shorten(clean(row.label), label_width):<{label_width}} ", ""))
        line.append(f"{figures[row]:>{figure_width}} ")
        line.append(f"{row.group:<{group_width}} " if group_width else "", style=GROUP_STYLES.get(row.group, ""))
        line.append(_blocks(row.value / largest * room, console.encoding), style=GROUP_STYLES.get(row.group, "cyan"))
        line.append(_shade(row.added / largest * room, console.encoding), style=ADDED_STYLE)
        line.rstrip()
        console.print(line, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Report]:
    """A report that shows every job it hears of on stderr: share done, it/s, time left and the job's latest figures.

    On a terminal a live bar a job; elsewhere a plain line at the start, at most every ten seconds, and at the end.
    """
    if not _is_terminal(sys.stderr):
        yield PlainProgress(sys.stderr)
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Pace(ProgressColumn):
        """it/s and time left."""

        def render(self, task: Task) -> Text:
            rate = task.finished_speed or task.speed
            left = task.time_remaining
            clock = f"took {duration(task.finished_time or 0.0)}" if task.finished else f"ETA {'-' if left is None else duration(left)}"
            words = clock if task.finished and not rate else f"{pace(rate)}  {clock}"  # what was there already has no pace
            return Text(words, style="cyan", no_wrap=True, overflow="ellipsis")

    console = _console(sys.stderr)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", style="green"),
        Pace(),
    ]
    roomy = console.width >= 60
    if roomy:  # the figures get what the others leave: without a ratio, rich cuts every column to make room for them
        columns.insert(1, BarColumn(bar_width=16))
        rest = Column(no_wrap=True, ratio=1)
        columns.append(TextColumn("{task.fields[figures]}", markup=False, style="dim", table_column=rest))
    # A piped stdout must keep what is printed to it: only a terminal's lines are drawn above the bars.
    live = Progress(*columns, console=console, redirect_stdout=_is_terminal(sys.stdout), speed_estimate_period=60.0, expand=roomy)
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if what not in tasks:
            tasks[what] = live.add_task(clean(what), total=total, completed=done, figures=figure_text(figures))
        live.update(tasks[what], completed=done, total=total, figures=figure_text(figures))

    with live:
        yield report


class PlainProgress:
    """A report that writes lines: for pipes, logs and CI."""

    def __init__(self, stream: IO[str], interval_seconds: float = PLAIN_INTERVAL_SECONDS) -> None:
        self.stream = stream
        self.interval_seconds = interval_seconds
        self._began: dict[str, tuple[float, int]] = {}  # when each job was first heard of, and how far it was
        self._told: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        since, first = self._began.setdefault(what, (now, done))
        if what in self._told and done < total and now - self._told[what] < self.interval_seconds:
            return
        self._told[what] = now
        rate = (done - first) / (now - since) if now > since and done > first else None
        clock = f"took {duration(now - since)}" if done >= total else f"ETA {duration((total - done) / rate) if rate else '-'}"
        speed = "" if done >= total and not rate else pace(rate)  # what was there already has no pace
        words = (clean(what), f"{done}/{total}", speed, clock, figure_text(figures))
        print("  ".join(word for word in words if word), file=self.stream, flush=True)


def pace(rate: float | None) -> str:
    """Iterations a second, or seconds an iteration when that reads better; "- it/s" when unknown."""
    if not rate:
        return "- it/s"
    if rate >= 1000:
        return f"{rate:,.0f} it/s"
    return f"{rate:.3g} it/s" if rate >= 1 else f"{1 / rate:.3g} s/it"


def duration(seconds: float) -> str:
    """3725.4 -> "1h02m", 125 -> "2m05s", 9.2 -> "9s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def figure_text(figures: Mapping[str, float]) -> str:
    """{"loss": 0.123456} -> "loss 0.1235"."""
    return "  ".join(f"{clean(name)} {value:.4g}" for name, value in figures.items())


def clean(text: str) -> str:
    """One line, safe to print: line breaks become blanks, other control characters are spelled out (an ESC is \\x1b)."""
    if text.isprintable():
        return text
    flat = text.replace("\r\n", " ").replace("\n", " ").replace("\t", " ")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in flat)


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _console(stream: IO[str]) -> Console:
    from rich.console import Console

    return Console(
        file=stream, width=_width(stream), highlight=False, markup=False, emoji=False, no_color=None if _is_terminal(stream) else True
    )


def _width(stream: IO[str]) -> int:
    """Of the stream's own terminal (stdout may be a pipe where stderr is none); COLUMNS wins, 80 in a pipe."""
    try:
        columns = int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # not a terminal, or COLUMNS is no number
        columns = 0
    return min(max(columns or 80, MIN_WIDTH), MAX_WIDTH)


def _styled(*parts: tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble(*parts)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and their scalars, without importing NumPy
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else clean(str(value))


def _plain_table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]) -> Iterator[str]:
    if title:
        yield clean(title)
    lines = [[clean(column) for column in columns], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        yield "  ".join(f"{cell:{'>' if right else '<'}{width}}" for cell, width, right in zip(line, widths, numeric, strict=True)).rstrip()


def _figure(row: Bar) -> str:
    return f"{_number(row.value)} +{_number(row.added)}" if row.added else _number(row.value)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"


def _blocks(length: float, encoding: str) -> str:
    """A bar `length` characters long: whole blocks and a last eighth, or `#` where the stream has no Unicode."""
    if not length:
        return ""
    if not encoding.lower().startswith("utf"):
        return "#" * max(1, round(length))
    eighths = max(1, round(length * 8))  # never nothing for something
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _shade(length: float, encoding: str) -> str:
    """The added part of a bar, told from the rest without color."""
    return ("▒" if encoding.lower().startswith("utf") else "+") * max(1, round(length)) if length else ""
