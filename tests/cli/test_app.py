"""diffrc_cli/app.py: help at once, failures in two lines with a documented code, streams that may close."""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

from diffrc_cli import __version__
from diffrc_cli import app as application
from engines import errors
from engines.errors import DiffRCError, Interrupted

ROOT = Path(__file__).parent.parent.parent
FAILURES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, DiffRCError)]
Diffrc = Callable[..., subprocess.CompletedProcess[str]]


def command_paths() -> list[tuple[str, ...]]:
    """Every command, groups' ones too: ("train",), ("recipe", "ls"), ..."""
    single = [(command.callback.__name__,) for command in application.app.registered_commands if command.callback]
    for group in application.app.registered_groups:
        assert group.typer_instance
        single += [(str(group.name), str(c.name or c.callback.__name__)) for c in group.typer_instance.registered_commands if c.callback]
    return single


def exit_of(failure: BaseException, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """main()'s exit code where the command raises `failure`."""
    app = typer.Typer(pretty_exceptions_enable=False)

    def command() -> NoReturn:
        raise failure

    app.command("fail")(command)
    app.command("other")(lambda: None)
    monkeypatch.setattr(application, "app", app)
    with pytest.raises(SystemExit) as stop:
        application.main(["fail", *words])
    return stop.value.code


def called(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of a call in this process."""
    with pytest.raises(SystemExit) as stop:
        application.main(list(words))
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_help_takes_less_than_the_promised_four_tenths_of_a_second(diffrc: Diffrc) -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert diffrc("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.4  # of processor time: the wall clock of a busy machine says nothing of ours


def test_no_help_page_imports_what_computes() -> None:
    # One process for all pages: -X importtime would slow each, sys.modules tells the same.
    heavy = ("torch", "numpy", "sklearn", "onnx", "onnxruntime", "PIL", "pyarrow", "safetensors")
    script = (
        "import contextlib, io, sys\n"
        "from diffrc_cli.app import app\n"
        f"for path in {[[], *map(list, command_paths())]!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        assert not app(args=[*path, '--help'], prog_name='diffrc', standalone_mode=False), path\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", command_paths(), ids=" ".join)
def test_every_help_page_shows_an_example_of_its_command(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called([*path, "--help"], capsys)
    assert code == 0
    assert f"Example: diffrc {' '.join(path)}" in " ".join(out.split())


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(["--version"], capsys) == (0, f"diffrc {__version__}\n", "")


@pytest.mark.parametrize("words", [(), ("recipe",), ("data",)], ids=["diffrc", "recipe", "data"])
def test_a_bare_group_prints_its_help_and_nothing_else(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(words, capsys)
    assert (code, err) == (2, "")
    assert "Usage: diffrc" in out


@pytest.mark.parametrize(
    ("words", "problem", "remedy"),
    [
        (("recip",), "no such command 'recip'. Did you mean 'recipe'?", "diffrc --help"),
        (("recipe", "show"), "missing argument 'RECIPE'", "diffrc recipe show --help"),
        (("recipe", "show", "digits-lt", "--jsn"), "no such option: --jsn (Possible options: --json, --set)", "diffrc recipe show --help"),
        (("recipe", "ls", "x"), "got unexpected extra argument(s) 'x'", "diffrc recipe ls --help"),
        (("--nonsense",), "no such option: --nonsense", "diffrc --help"),
    ],
)
def test_a_wrong_call_is_two_lines_and_exit_2(
    words: tuple[str, ...], problem: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = called(words, capsys)
    assert (code, out) == (2, "")
    assert err.replace("(x)", "'x'") == f"error: {problem}\ntry:   {remedy}\n"


@pytest.mark.parametrize("kind", FAILURES, ids=lambda kind: kind.__name__)
def test_a_typed_failure_is_two_lines_and_its_own_exit_code(
    kind: type[DiffRCError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(kind("what [red]is[/]\nwrong \x1b[31m", "what to type"), monkeypatch) == kind.exit_code
    assert capsys.readouterr().err == "error: what [red]is[/] wrong \\x1b[31m\ntry:   what to type\n"


def test_every_kind_of_failure_has_an_exit_code_of_its_own() -> None:
    assert sorted({kind.exit_code for kind in FAILURES}) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 130]
    assert len(FAILURES) == 10


def test_an_interrupt_is_128_plus_its_signal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(Interrupted("stopped", "again", signal.SIGTERM), monkeypatch) == 143
    assert exit_of(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err.count("error:") == 2


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_between_jobs_unwinds_to_two_lines_and_its_code(
    number: signal.Signals, exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    cleaned = []

    def command() -> None:
        try:
            signal.raise_signal(number)
        except Exception as failure:  # as an exporter does, that wraps whatever failed
            raise ValueError from failure
        finally:
            cleaned.append(True)

    app.command("fail")(command)
    app.command("other")(lambda: None)
    monkeypatch.setattr(application, "app", app)
    code, _, err = called(["fail"], capsys)
    assert (code, cleaned) == (exit_code, [True])
    assert err.startswith("error: interrupted\ntry:   the same command again")
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_unforeseen_failure_is_one_line_and_a_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(ValueError("two\nlines"), monkeypatch) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: internal error: ValueError: two lines\ntry:   ")
    assert err.count("\n") == 2
    assert exit_of(ValueError("x"), monkeypatch, "--debug") == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "error: internal error: ValueError: x" in err


def test_a_reader_that_leaves_changes_neither_the_exit_code_nor_stderr(tmp_path: Path) -> None:
    command = f"{sys.executable} -m diffrc_cli recipe show digits-lt | head -1; echo ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == 'name = "digits-lt"\n0\n'
    assert done.stderr == ""


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "</dev/null >/dev/full"])
def test_a_closed_stream_is_no_failure_of_the_work(closing: str, tmp_path: Path) -> None:
    if "full" in closing and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m diffrc_cli recipe ls {closing}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == (8 if "full" in closing else 0), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "environment",
    [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"COLUMNS": "20"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}],
    ids=["pipe", "NO_COLOR", "dumb", "narrow", "ascii"],
)
def test_a_pipe_gets_plain_text_whatever_the_terminal(environment: dict[str, str], diffrc: Diffrc) -> None:
    done = diffrc("recipe", "ls", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "digits-lt" in done.stdout


def test_json_is_one_line_that_parses(diffrc: Diffrc) -> None:
    done = diffrc("recipe", "ls", "--json")
    assert done.stdout.count("\n") == 1
    assert {"name", "cost", "measured"} <= set(json.loads(done.stdout)[0])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_completion_script_for_every_common_shell(shell: str, diffrc: Diffrc) -> None:
    done = diffrc(_DIFFRC_COMPLETE=f"source_{shell}", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "_DIFFRC_COMPLETE" in done.stdout
