"""--quiet, --verbose and --events: what goes to stderr, said once for all commands; stdout stays as it is."""

from __future__ import annotations

import io
import itertools
import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import typer

from diffrc_cli import app as application
from diffrc_cli import console
from engines.errors import DataError

Called = Callable[..., tuple[int, str, str]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Called:
    """called("work", "--quiet") -> exit code, stdout, stderr of a command that reports, notes, warns and fails if it is told to."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def work(fail: bool = False) -> None:
        with console.progress() as report:
            report("source", 0, 10, {})
            report("source", 5, 10, {"loss": float("nan")})
            report("source", 10, 10, {"loss": 0.5})
        console.note("engine: onnx fp32")
        console.note("warning: 3 copies")
        console.say("made 10 images")
        if fail:
            raise DataError("no such\nimage", "look again")

    app.command()(lambda: None)
    monkeypatch.setattr(application, "app", app)

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            application.main(words)
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, captured.err

    return call


def events(err: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in err.splitlines()]


@pytest.mark.parametrize("words", [("work", "-q"), ("--quiet", "work")])
def test_quiet_leaves_results_and_errors_alone(words: tuple[str, ...], called: Called) -> None:
    assert called(*words) == (0, "made 10 images\n", "")
    assert called(*words, "--fail") == (3, "made 10 images\n", "error: no such image\ntry:   look again\n")


def test_verbose_tells_versions_times_and_what_it_took(called: Called) -> None:
    code, out, err = called("work", "-v")
    assert (code, out) == (0, "made 10 images\n")
    first, *_, last = err.splitlines()
    assert "diffrc " in first and "torch " in first and first.endswith(": diffrc work")
    assert "] engine: onnx fp32" in err
    assert "exit code 0 after 0s" in last and "of memory at its peak" in last


@pytest.mark.parametrize("words", [("work", "--events"), ("--events", "work")])
def test_every_event_is_a_line_of_strict_json(words: tuple[str, ...], called: Called) -> None:
    code, out, err = called(*words, "--fail")
    assert (code, out) == (3, "made 10 images\n")
    found = events(err)
    assert [event["event"] for event in found] == ["start", "progress", "progress", "note", "warning", "error", "end"]
    start, begun, done, note, warning, error, end = found
    assert start["command"] == ["diffrc", "work", "--fail"]
    assert {"diffrc", "python", "torch"} <= set(start["versions"])
    assert (begun["job"], begun["done"], begun["total"], begun["seconds_left"]) == ("source", 0, 10, None)
    assert (done["done"], done["figures"]) == (10, {"loss": 0.5})
    assert (note["text"], warning["text"]) == ("engine: onnx fp32", "3 copies")
    assert (error["problem"], error["remedy"], error["exit_code"]) == ("no such\nimage", "look again", 3)
    assert end["exit_code"] == 3 and end["peak_memory_bytes"] > 2**20
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(found))


def test_a_wrong_call_is_an_event_too(called: Called) -> None:
    code, out, err = called("work", "--events", "--nonsense")
    assert (code, out) == (2, "")
    assert "no such option: --nonsense" in next(event for event in events(err) if event["event"] == "error")["problem"]


def test_what_a_package_warns_of_is_an_event(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with console.speak([], events=True), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("slow", UserWarning, "file.py", 1)
    assert [event["event"] for event in events(capsys.readouterr().err)] == ["start", "warning"]


def test_quiet_and_verbose_together_are_a_mistake(called: Called) -> None:
    code, _, err = called("work", "-q", "-v")
    assert code == 2
    assert "--quiet and --verbose" in err


def test_the_next_call_speaks_as_usual(called: Called) -> None:
    called("work", "--events")
    assert "source  10/10" in called("work")[2]


def test_a_word_after_two_dashes_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert application._split(["rm", "-q", "--", "-v", "--debug"]) == (["rm", "--", "-v", "--debug"], {"quiet"})


def test_no_command_has_an_option_of_these_names() -> None:
    def options(command: Any) -> set[str]:
        return {word for parameter in command.params for word in parameter.opts} | {
            word for sub in getattr(command, "commands", {}).values() for word in options(sub)
        }

    root = typer.main.get_command(application.app)
    below = set().union(*(options(command) for command in root.commands.values()))  # type: ignore[attr-defined]
    assert not below & set(application.EVERYWHERE)
    assert set(application.EVERYWHERE) <= {word for parameter in root.params for word in parameter.opts}


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "longest"), [(40, 46), (50, 50), (80, 80)])  # the text beside long options has ten characters at least
def test_help_shows_every_option_whole_on_a_terminal_of_any_width(columns: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(SystemExit) as end:
        application.main(["synth", "--help"])
    assert end.value.code == 0
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue())
    assert all(option in text for option in ("--guidance-scale", "--distance-band", "--dry-run", "--compile"))
    assert max(map(len, text.splitlines())) <= longest
    assert ("╭" in text) == (columns == 80)


def test_a_stream_without_a_character_gets_what_is_read_as_the_same() -> None:
    assert "83.5 ± 1.0 … −3 é".encode("ascii", "diffrc") == rb"83.5 +/- 1.0 ... -3 \xe9"
