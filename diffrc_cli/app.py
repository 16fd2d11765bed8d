"""The `diffrc` command: registers the commands in the order of the work, and turns failures into two lines and an exit code."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from diffrc_cli import (
    __version__,
    bench,
    console,
    data,
    doctor,
    engine,
    evaluate,
    export,
    import_,
    recipe,
    report,
    run,
    status,
    study,
    synth,
    train,
    verify,
)
from engines.errors import DiffRCError, Interrupted, StorageError, UsageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

EVERYWHERE = {
    "--quiet": "quiet",
    "-q": "quiet",
    "--verbose": "verbose",
    "-v": "verbose",
    "--events": "events",
    "--debug": "debug",
}
INTERNAL_ERROR, USAGE_ERROR, INTERRUPTED = 1, 2, 130
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SIGINT raises KeyboardInterrupt by itself

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # `main` says what failed; a traceback only with --debug
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 internal error, 2 usage or recipe, 3 data, 4 engine or device, 5 folder in use or another run in it, "
    "6 numbers disagree, 7 not finite, 8 disk, 9 fewer images than asked, 130/138/143 interrupted (the same command continues).",
)
FRAMES = app.rich_markup_mode


def _print_version(wanted: bool) -> None:
    if wanted:
        console.say(f"diffrc {__version__}")
        raise typer.Exit


@app.callback()
def diffrc(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr: no progress, no notes.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="More on stderr: versions, times, a line of progress a second, what it took.")
    ] = False,
    events: Annotated[bool, typer.Option("--events", help="Progress, notes and errors as lines of JSON on stderr, for programs.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
) -> None:
    """Long-tailed recognition by guided diffusion: train, export, synthesize the tail, and see whether a recognizer got better.

    These options work at any place of the line. Results go to stdout, everything else to stderr.

    Example: diffrc run digits-lt
    """
    if context.invoked_subcommand != "train" and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        if os.environ["RANK"] != "0":
            raise typer.Exit(USAGE_ERROR)
        raise UsageError(f"diffrc {context.invoked_subcommand} runs in one process", "torchrun is for diffrc train; leave it out here")


for command in (
    run.run,
    train.train,
    export.export,
    synth.synth,
    verify.verify,
    evaluate.evaluate,
    study.study,
    report.report,
    status.status,
    doctor.doctor,
):  # in the order of the work
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(recipe.app, name="recipe")
app.add_typer(engine.app, name="engine")
app.add_typer(import_.app, name="import")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Exits with the documented code; see `engines.errors`."""
    _keep_streams_alive()
    words, manner = _split(list(sys.argv[1:] if arguments is None else arguments))
    with console.speak(words, "quiet" in manner, "verbose" in manner, "events" in manner):
        code = _run(words, manner)
        console.told(code)
    sys.exit(code)


def _split(words: list[str]) -> tuple[list[str], set[str]]:
    """A command's words, and the names of the options that any command takes at any place before a bare `--`."""
    end = words.index("--") if "--" in words else len(words)
    manner = {EVERYWHERE[word] for word in words[:end] if word in EVERYWHERE}
    return [word for i, word in enumerate(words) if i >= end or word not in EVERYWHERE], manner


def _run(words: list[str], manner: set[str]) -> int:
    """The exit code of a command, its failure told."""
    _fit_help(console.narrow_width())
    try:
        if {"quiet", "verbose"} <= manner:
            raise UsageError("--quiet and --verbose are opposites", "one of them")
        with _signals_unwind():
            code = app(args=words, prog_name="diffrc", standalone_mode=False)
    except _Terminated as end:
        code = 128 + end.signal_number
    except Exception as failure:
        if "debug" in manner:
            traceback.print_exc()
        return _tell(failure)
    if code in (INTERRUPTED, *(128 + number for number in ENDING_SIGNALS)):
        console.error("interrupted", "the same command again; training and synthesis continue where they were", code)
    return code if isinstance(code, int) else 0


def _fit_help(narrow_width: int) -> None:
    """Help without frames on a narrow terminal, where frames leave options no room; 0 = it is wide."""
    app.rich_markup_mode = None if narrow_width else FRAMES
    app.info.context_settings = {**(app.info.context_settings or {}), "terminal_width": narrow_width or None}


class _Terminated(BaseException):
    """A signal between the jobs that commit before they stop. No `except Exception` on its way swallows it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Let a signal end the command as an exception does, so that temporary files go; by default the process just dies."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _frame: object) -> NoReturn:
        raise _Terminated(number)

    ours = [number for number in ENDING_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _tell(failure: Exception) -> int:
    """Two lines on stderr, and the exit code that goes with them."""
    if isinstance(failure, DiffRCError):
        code = 128 + failure.signal_number if isinstance(failure, Interrupted) else failure.exit_code
        return _failed(failure.problem, failure.remedy, code)
    if isinstance(failure, TyperException):
        message = failure.format_message().replace(": Value error, ", ": ")  # pydantic's words for what follows anyway
        if not message:  # the help that a bare group prints has been shown already
            return USAGE_ERROR
        context = getattr(failure, "ctx", None)
        command = context.command_path if context else "diffrc"
        return _failed(message[:1].lower() + message[1:].rstrip("."), f"{command} --help", USAGE_ERROR)
    if isinstance(failure, typer.Abort):
        return _failed("aborted", "the same command again", INTERRUPTED)
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        return _failed(f"cannot write: {failure.strerror}", "free some space, then the same command again", StorageError.exit_code)
    problem = f"internal error: {type(failure).__name__}: {failure}"
    return _failed(problem, "the same command with --debug shows where; please report it", INTERNAL_ERROR)


def _failed(problem: str, remedy: str, code: int) -> int:
    console.error(problem, remedy, code)
    return code


class _Outlet(io.FileIO):
    """A standard stream whose reader may leave (`| head`): the work goes on, and the exit code stays that of the work.

    Any other failure (`> file` on a full disk) is raised once; what is still buffered then is dropped.
    """

    broken = False

    def write(self, data: Buffer, /) -> int:
        try:
            return len(memoryview(data)) if self.broken else super().write(data)
        except OSError as failure:
            self.broken = True
            if not isinstance(failure, BrokenPipeError):
                raise
            return len(memoryview(data))


def _keep_streams_alive() -> None:
    """Streams that survive a closed pipe, a closed descriptor and an encoding without the character at hand."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        try:
            ours = stream is None or stream.fileno() == descriptor
        except (OSError, ValueError):  # a test's or an embedder's stream: theirs to keep
            ours = False
        if ours:
            target = os.open(os.devnull, os.O_WRONLY) if stream is None else descriptor
            raw = io.BufferedWriter(_Outlet(target, "w", closefd=False))
            encoding = stream.encoding if stream else "utf-8"
            setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, errors="diffrc", line_buffering=True))
