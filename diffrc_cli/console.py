"""What a person sees: tables, bar charts and progress on a terminal, plain lines in a pipe, JSON on request.

Results go to stdout, progress and errors to stderr, so that `diffrc ... > file` holds results alone. How much goes to stderr,
and whether as text or as a line of JSON each, `main` says once with `speak`: no command has to know. Rich is imported
inside the functions: `diffrc --help` does not pay for it. Text of users (class names, paths) is never read as markup.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from engines.progress import peak_memory_bytes, silent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from engines.progress import Report

MIN_FRAME_WIDTH = 60  # characters; help has no frames below
MIN_WIDTH, MAX_WIDTH = 40, 120  # characters; a wider terminal makes lines that the eye loses
PLAIN_INTERVAL_SECONDS = 10.0  # between two progress lines of one job where there is no terminal
EVENT_INTERVAL_SECONDS = 1.0  # the same with --events and --verbose
LONGEST_WORD, LONGEST_NAME = 16, 24  # characters; a longer one may be broken where a table is narrow; of the first column
UNWRAPPED_CHARACTERS = 20  # columns of numbers, and of short text where there is room, are not wrapped
GROUP_STYLES = {"many": "blue", "medium": "yellow", "few": "red"}  # beside the group's name, never instead of it
ADDED_STYLE = "green"
PLAIN = {"±": "+/-", "−": "-", "×": "x", "…": "...", "→": "->", "≥": ">=", "≤": "<="}  # for a stream without them
COMMANDS = ("diffrc ", "pip ", "python")  # a remedy that begins so is to be copied
NUMERIC = re.compile(r"-|[-+]?[\d.,]+(e[-+]?\d+)?\s?(%|(±|\+/-|\+).*)?")  # cells that read best right-aligned


class Bar(NamedTuple):
    """A row of a bar chart: `value`, and `added` on top of it (synthetic images, say), both >= 0."""

    label: str
    value: float
    group: str = ""  # "many" | "medium" | "few" | ""
    added: float = 0.0


class Manner(NamedTuple):
    """What goes to stderr: everything but results."""

    quiet: bool = False  # errors alone
    verbose: bool = False  # each message with the seconds since the start, progress as lines, versions and what it took
    events: bool = False  # a line of JSON each
    began: float = 0.0  # time.monotonic()


_manner = Manner()


@contextmanager
def speak(words: Sequence[str], quiet: bool = False, verbose: bool = False, events: bool = False) -> Iterator[None]:
    """Say everything in the block in this manner; `words` are the command's, for those who log them.

    Events are objects with "event" (start, progress, note, warning, error, end) and "seconds" since the start; more keys may come.
    What packages warn of is a warning too.
    """
    global _manner
    _manner = Manner(quiet, verbose, events, time.monotonic())
    try:
        with warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore")
            if events:
                warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
                _event("start", command=["diffrc", *words], versions=_versions())
            elif verbose:
                note(f"{', '.join(f'{name} {version}' for name, version in _versions().items())}: diffrc {' '.join(words)}")
            yield
    finally:
        _manner = Manner()


def told(exit_code: int) -> None:
    """The last thing that a command says: its exit code and what it took, to those who asked to be told."""
    memory = peak_memory_bytes() if _manner.events or _manner.verbose else 0
    if _manner.events:
        _event("end", exit_code=exit_code, peak_memory_bytes=memory)
    elif _manner.verbose:
        peak = f", {size(memory)} of memory at its peak" if memory else ""
        note(f"exit code {exit_code} after {duration(time.monotonic() - _manner.began)}{peak}")


def plainly(failure: UnicodeError) -> tuple[str | bytes, int]:
    """What an encoding without a character gets in its place: `PLAIN`, or its number; see `codecs.register_error`."""
    assert isinstance(failure, UnicodeEncodeError)
    missing = failure.object[failure.start : failure.end]
    words = (PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode("ascii") for character in missing)
    return "".join(words), failure.end


codecs.register_error("diffrc", plainly)


def narrow_width() -> int:
    """The width of a terminal on stdout that is too narrow for frames; 0 where it is wide, or none."""
    width = _width(sys.stdout) if _is_terminal(sys.stdout) else 0
    return width if width < MIN_FRAME_WIDTH else 0


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
    """A sentence on stderr: what a command chose or does, beside its result. One that begins with "warning: " is one."""
    if _manner.quiet:
        return
    if _manner.events:
        kind, _, said = ("warning", "", text.removeprefix("warning: ")) if text.startswith("warning: ") else ("note", "", text)
        _event(kind, text=said)
        return
    line = f"[{time.monotonic() - _manner.began:7.1f} s] {clean(text)}" if _manner.verbose else clean(text)
    if not _is_terminal(sys.stderr) or hasattr(sys.stderr, "rich_proxied_file"):  # bars are there, and print what is printed above them
        print(line, file=sys.stderr)
        return
    from rich.text import Text

    _console(sys.stderr).print(Text(line))


def error(problem: str, remedy: str, exit_code: int = 1) -> None:
    """The two lines of a failure on stderr, cause and remedy. On a terminal long ones break between words, commands excepted."""
    if _manner.events:
        _event("error", problem=problem, remedy=remedy, exit_code=exit_code)
        return
    console = _console(sys.stderr)
    for label, style, text in (("error:", "bold red", clean(problem)), ("try:  ", "bold", clean(remedy))):
        line = _styled((label, style), (f" {text}", ""))
        if not _is_terminal(sys.stderr) or len(line) <= console.width or text.startswith(COMMANDS):
            console.print(line, soft_wrap=True)  # what is to be copied is one line, wherever the terminal breaks it
            continue
        from rich.table import Table

        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_row(_styled((label, style)), _styled((text, "")))
        console.print(grid)


def emit_json(value: Any) -> None:
    """One line of strict JSON on stdout.

    Paths become strings, arrays lists; a number that is not finite becomes null, JSON having no word for it.
    """
    print(json.dumps(_jsonable(value), ensure_ascii=True, allow_nan=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout. Columns of numbers are right-aligned; floats show four significant digits.

    On a terminal long text is broken, and where the columns do not fit each row becomes a list; in a pipe the columns are padded with
    blanks, nothing is cut.
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

    if _least_width(columns, cells, numeric) > _width(sys.stdout):
        _console(sys.stdout).print(*_lists(title, columns, cells), sep="\n")
        return
    grid = Table(title=Text(clean(title)) if title else None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    widths = [max(map(len, (column, *(row[i] for row in cells)))) for i, column in enumerate(columns)]
    short = [right or width <= UNWRAPPED_CHARACTERS for right, width in zip(numeric, widths, strict=True)]
    fits = sum(width for width, whole in zip(widths, short, strict=True) if whole) + 3 * len(columns) + 12 <= _width(sys.stdout)
    for i, (column, right, whole) in enumerate(zip(columns, numeric, short, strict=True)):
        unbroken = right or (whole and fits) or (i == 0 and widths[0] <= LONGEST_NAME)
        grid.add_column(Text(clean(column)), justify="right" if right else "left", overflow="fold", no_wrap=unbroken)
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
    figure_width = max(len(figures[row]) for row in shown if row)
    group_width = max(len(row.group) for row in shown if row)
    console = _console(sys.stdout)
    most = min(24, max(8, console.width - figure_width - group_width - 12))
    label_width = min(max(len(clean(row.label)) for row in shown if row), most)
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
    if _manner.quiet or _manner.events:
        yield silent if _manner.quiet else EventProgress()
        return
    if _manner.verbose or not _is_terminal(sys.stderr) or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):  # cannot go back a line
        yield PlainProgress(sys.stderr, EVENT_INTERVAL_SECONDS if _manner.verbose else PLAIN_INTERVAL_SECONDS)
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


class Clock:
    """When each job was first heard of, how far it was then, and when it was last told of."""

    def __init__(self, interval_seconds: float) -> None:
        self.interval_seconds = interval_seconds
        self._began: dict[str, tuple[float, int]] = {}
        self._told: dict[str, float] = {}

    def tick(self, what: str, done: int, total: int) -> tuple[float, float | None] | None:
        """Seconds since the job began and its rate; None where it is too early to tell of it again."""
        now = time.monotonic()
        since, first = self._began.setdefault(what, (now, done))
        if what in self._told and done < total and now - self._told[what] < self.interval_seconds:
            return None
        self._told[what] = now
        return now - since, (done - first) / (now - since) if now > since and done > first else None


class PlainProgress:
    """A report that writes lines: for pipes, logs and CI."""

    def __init__(self, stream: IO[str], interval_seconds: float = PLAIN_INTERVAL_SECONDS) -> None:
        self.stream = stream
        self._clock = Clock(interval_seconds)

    def __call__(self, what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if (found := self._clock.tick(what, done, total)) is None:
            return
        seconds, rate = found
        clock = f"took {duration(seconds)}" if done >= total else f"ETA {duration((total - done) / rate) if rate else '-'}"
        speed = "" if done >= total and not rate else pace(rate)  # what was there already has no pace
        words = (clean(what), f"{done}/{total}", speed, clock, figure_text(figures))
        print("  ".join(word for word in words if word), file=self.stream, flush=True)


class EventProgress:
    """A report that writes events: for programs that show how far a job is."""

    def __init__(self) -> None:
        self._clock = Clock(EVENT_INTERVAL_SECONDS)

    def __call__(self, what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if (found := self._clock.tick(what, done, total)) is not None:
            _, rate = found
            left = (total - done) / rate if rate else 0.0 if done >= total else None
            _event("progress", job=what, done=done, total=total, rate=rate, seconds_left=left, figures=figures)


def _event(kind: str, **values: Any) -> None:
    """One line of JSON on stderr."""
    event = {"event": kind, "seconds": round(time.monotonic() - _manner.began, 3), **values}
    print(json.dumps(_jsonable(event), ensure_ascii=True, allow_nan=False), file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    """Of what is installed, by name; nothing is imported for it."""
    from importlib import metadata
    from platform import python_version

    from diffrc_cli import __version__

    found = {"diffrc": __version__, "python": python_version()}
    for name in ("torch", "onnxruntime", "onnxruntime-gpu", "openvino"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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


def size(count_bytes: float) -> str:
    """1610612736 -> "1.5 GiB", 4096 -> "4 KiB"."""
    power, unit = next(((power, unit) for power, unit in ((30, "GiB"), (20, "MiB")) if count_bytes >= 2**power), (10, "KiB"))
    return f"{count_bytes / 2**power:.3g} {unit}"


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


def _least_width(columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]) -> int:
    """Characters that a table takes when no number and no word of usual length is broken."""
    least = 3 * (len(columns) - 1)
    for i, column in enumerate(columns):
        texts = (clean(column), *(row[i] for row in cells))
        words = [word[:LONGEST_WORD] for text in texts for word in text.split()]
        name = i == 0 and max(map(len, texts)) <= LONGEST_NAME
        least += max(map(len, texts if numeric[i] or name else words), default=0)
    return least


def _lists(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> Iterator[Any]:
    """What a terminal too narrow for a table gets: each row as a heading, its other cells below, a line each."""
    from rich.padding import Padding
    from rich.table import Table

    if title:
        yield _styled((clean(title), "bold"))
    for heading, *row in cells:
        yield _styled((f"{clean(columns[0])} {heading}", "bold"))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for column, cell in zip(columns[1:], row, strict=True):
            grid.add_row(_styled((clean(column), "")), _styled((cell, "")))
        yield Padding(grid, (0, 0, 0, 2))


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
