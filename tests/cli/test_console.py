"""diffrc_cli/console.py: plain text in a pipe, nothing cut, nothing of a user's text obeyed."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffrc_cli import console
from diffrc_cli.console import Bar, PlainProgress, bars, clean, duration, emit_json, pace, table

Captured = pytest.CaptureFixture[str]


def test_columns_line_up_and_numbers_stand_right(capsys: Captured) -> None:
    table("Accuracy", ("arm", "few", "all"), [("real", 0.91239, None), ("real + synthetic", 12.5, 3)])
    assert capsys.readouterr().out.splitlines() == [
        "Accuracy",
        "arm                  few  all",
        "real              0.9124    -",
        "real + synthetic    12.5    3",
    ]


def test_a_mean_with_a_spread_counts_as_a_number(capsys: Captured) -> None:
    table("", ("arm", "few"), [("real", "9.1 ± 1.0"), ("synthetic", "89.2 ± 0.5")])
    assert capsys.readouterr().out.splitlines()[1:] == ["real        9.1 ± 1.0", "synthetic  89.2 ± 0.5"]


def test_an_empty_table_is_its_header(capsys: Captured) -> None:
    table("", ("a", "b"), [])
    assert capsys.readouterr().out == "a  b\n"


def lengths(text: str) -> list[float]:
    """Lengths of the bars in characters, eighths counted."""
    return [
        sum(1.0 if c in "█▒" else (ord("▏") - ord(c)) / 8 + 0.125 for c in re.sub(r"[^█▒▉▊▋▌▍▎▏]", "", line)) for line in text.splitlines()
    ]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_bars_are_in_proportion_and_fit_the_width(columns: int, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    bars("", [Bar("zero", 100, "many"), Bar("five", 50, "medium"), Bar("nine", 5, "few")])
    out = capsys.readouterr().out
    whole, half, twentieth = lengths(out)
    assert half == pytest.approx(whole / 2, abs=0.07)
    assert twentieth == pytest.approx(whole / 20, abs=0.07)
    assert max(map(len, out.splitlines())) <= columns


def test_what_was_added_is_told_apart_without_color(capsys: Captured) -> None:
    bars("", [Bar("nine", 10, "few", added=10)])
    line = capsys.readouterr().out
    assert "10 +10 few" in line
    assert line.count("█") == pytest.approx(line.count("▒"), abs=1)


def test_a_class_with_one_image_of_a_million_still_has_a_bar(capsys: Captured) -> None:
    bars("", [Bar("a", 1_000_000), Bar("b", 1), Bar("c", 0)])
    _, one, none = lengths(capsys.readouterr().out)
    assert one > 0
    assert none == 0


def test_of_many_classes_the_first_and_last_are_shown_and_the_rest_counted(capsys: Captured) -> None:
    bars("", [Bar(f"class {i}", 1000 - i) for i in range(1000)], limit=10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[5] == "... 990 more ..."
    assert lines[0].startswith("class 0 ")
    assert lines[-1].startswith("class 999 ")


def test_a_stream_without_unicode_gets_ascii_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    bars("counts", [Bar("a", 2, "many", added=2)])
    console.sys.stdout.flush()
    assert set(raw.getvalue().decode("ascii").split()[-1]) == {"#", "+"}


def test_json_is_strict(capsys: Captured) -> None:
    emit_json({"nan": float("nan"), "array": np.arange(3), "scalar": np.float32(0.5), "path": Path("/x"), "tuple": (1, np.inf), "é": True})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"nan": None, "array": [0, 1, 2], "scalar": 0.5, "path": "/x", "tuple": [1, None], "é": True}


@given(st.text())
def test_cleaned_text_is_one_printable_line_and_printable_text_is_left_alone(text: str) -> None:
    assert clean(text).isprintable()
    if text.isprintable():
        assert clean(text) == text


def test_markup_of_a_users_text_is_shown_not_obeyed(capsys: Captured) -> None:
    table("[bold]t[/bold]", ("[red]c",), [("[/nonsense] \x1b[2J",)])
    bars("", [Bar("[link=x]a", 1)])
    console.error("[red]p", "[/]r")
    captured = capsys.readouterr()
    assert "[/nonsense] \\x1b[2J" in captured.out
    assert "[link=x]a" in captured.out
    assert captured.err == "error: [red]p\ntry:   [/]r\n"


def test_plain_progress_writes_the_first_line_the_last_and_one_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("diffrc_cli.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    report = PlainProgress(stream, interval_seconds=10.0)
    for step in range(101):
        now[0] = step * 0.5  # two steps a second
        report("source", step, 100, {"loss": 1 / (step + 1)})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "source  0/100  - it/s  ETA -  loss 1"
    assert lines[1] == "source  20/100  2 it/s  ETA 40s  loss 0.04762"
    assert lines[-1] == "source  100/100  2 it/s  took 50s  loss 0.009901"
    assert len(lines) == 6


def test_a_resumed_job_is_not_credited_with_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("diffrc_cli.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    report = PlainProgress(stream)
    report("target", 900, 1000, {})
    now[0] = 100.0
    report("target", 950, 1000, {})
    assert stream.getvalue().splitlines()[1] == "target  950/1000  2 s/it  ETA 1m40s"


def test_progress_outside_a_terminal_writes_to_stderr_alone(capsys: Captured) -> None:
    with console.progress() as report:
        report("guide", 1, 1, {})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("guide  1/1")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (9.4, "9s"), (59.6, "1m00s"), (125, "2m05s"), (3725, "1h02m"), (90000, "25h00m")])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(None, "- it/s"), (0.0, "- it/s"), (12.34, "12.3 it/s"), (5.6e6, "5,600,000 it/s"), (0.5, "2 s/it")]
)
def test_a_slow_pace_is_told_in_seconds_and_a_fast_one_without_exponent(rate: float | None, text: str) -> None:
    assert pace(rate) == text


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What was drawn, without control codes."""
        return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", self.getvalue()).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_on_a_terminal_of_any_width_a_job_shows_its_name_its_count_and_its_pace(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with console.progress() as report:
        report("decode", 250, 250, {})
        report("source", 1500, 1500, {"loss": 1.0387, "l_base": 1.0071, "l_vlb": 31.752, "grad_norm": 2.8183, "images_per_second": 1004.2})
    last = next(line for line in reversed(screen.lines()) if "source" in line)
    assert "1500/1500" in last
    assert "took" in last
    assert max(map(len, screen.lines())) <= columns
    assert ("loss 1.039" in last) == (columns >= 60)


def test_a_sentence_breaks_between_words_on_a_terminal_and_nowhere_in_a_pipe(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "an oracle takes nine of ten [bold]synthetic[/bold] images for the class that they were made for"
    console.prose(sentence)
    assert capsys.readouterr().out == sentence + "\n"
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    console.prose(sentence)
    assert " ".join(" ".join(screen.lines()).split()) == sentence
    assert max(map(len, screen.lines())) <= 40


def narrow(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """stdout and stderr as one terminal of 40 columns; in the test itself, for pytest sets its own streams after the fixtures."""
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_a_table_that_does_not_fit_is_a_list_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = narrow(monkeypatch)
    columns = ("stage", "state", "steps left", "images/s", "takes", "parameters", "disk")
    table("Plan", columns, [("source", "to train", "1,000", "182", "5m51s", "0.828 M", "37.9 MiB")])
    lines = [line.rstrip() for line in screen.lines()]
    assert lines == [
        "Plan",
        "stage source",
        "  state       to train",
        "  steps left  1,000",
        "  images/s    182",
        "  takes       5m51s",
        "  parameters  0.828 M",
        "  disk        37.9 MiB",
    ]


def test_a_table_that_fits_stays_one_and_breaks_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = narrow(monkeypatch)
    table("", ("recipe", "px", "cost"), [("cifar10-lt-100-strong", 32, "3 to 6 GPU hours, weeks on a CPU")])
    assert "cifar10-lt-100-strong" in screen.getvalue()
    assert max(map(len, screen.lines())) <= 40


def test_bars_with_long_names_and_groups_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = narrow(monkeypatch)
    bars("", [Bar("a class with a very long name", 1250, "medium", added=300)])
    assert max(map(len, screen.lines())) <= 40


def test_notes_and_causes_break_between_words_and_commands_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = narrow(monkeypatch)
    sentence = "the images there were made with an engine that is not exported here any more"
    console.note(sentence)
    assert " ".join(" ".join(screen.lines()).split()) == sentence
    assert max(map(len, screen.lines())) <= 40
    told = len(screen.lines())
    console.error(sentence, "diffrc export --run /home/somebody/with/a/long/path")
    *cause, remedy = screen.lines()[told:]
    assert all(len(line) <= 40 for line in cause)
    assert cause[1].startswith("       "), "under the words, not under the label"
    assert remedy == "try:   diffrc export --run /home/somebody/with/a/long/path"


def test_a_terminal_that_cannot_go_back_a_line_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = narrow(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with console.progress() as report:
        report("source", 10, 10, {})
    assert screen.getvalue() == "source  10/10  took 0s\n"


@pytest.mark.parametrize(("count", "text"), [(0, "0 KiB"), (4096, "4 KiB"), (3 * 2**20, "3 MiB"), (1610612736, "1.5 GiB")])
def test_a_size_has_a_unit_that_fits(count: int, text: str) -> None:
    assert console.size(count) == text
