"""docs/commands: a page for each command, written from the command itself. `make docs` writes them; tests/test_docs.py compares them."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from diffrc_cli.app import EVERYWHERE, app
from engines import store

FOLDER = Path(__file__).parent.parent / "docs" / "commands"
REMADE_BY = "make docs"
PIPE = "\\|"  # in a cell of a table
LATER = "*This page is written from the code by `make docs`.*"


def pages() -> dict[str, str]:
    """Every page by its file name, the index among them."""
    found = {file_name(path): page(path, command) for path, command in commands()}
    return {"README.md": index(), **found}


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words, in the order of the help: ("synth",), ("bench",), ("bench", "quality"), ..."""
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        below = getattr(command, "commands", {})
        if not below or command.invoke_without_command:
            yield (name,), command
        for other, nested in below.items():
            yield (name, other), nested


def file_name(path: tuple[str, ...]) -> str:
    """("bench", "quality") -> "bench-quality.md"."""
    return "-".join(path) + ".md"


def index() -> str:
    """The list of all pages, with what each command does and the options of all."""
    root: Any = typer.main.get_command(app)
    rows = [f"| [diffrc {' '.join(path)}]({file_name(path)}) | {summary(command)} |" for path, command in commands()]
    everywhere = [p for p in root.params if set(p.opts) & (set(EVERYWHERE) | {"--version"})]
    return "\n".join(
        [
            "# Commands",
            "",
            "| command | what it does |",
            "|---|---|",
            *rows,
            "",
            "## Options of every command, at any place of the line",
            "",
            "| option | what it does |",
            "|---|---|",
            *(option_row(p, {}) for p in everywhere),
            "",
            "Results go to stdout, everything else to stderr. Exit codes: [troubleshooting](../troubleshooting.md).",
            "",
            LATER,
            "",
        ]
    )


def page(path: tuple[str, ...], command: Any) -> str:
    """One command: what it says of itself, its examples, its arguments and options."""
    paragraphs, examples = texts(command)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    hints = typing.get_type_hints(command.callback)
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden and "--help" not in p.opts]
    usage = " ".join(["diffrc", *path, *(p.metavar or p.name.upper() for p in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"# diffrc {' '.join(path)}", "", *(line for p in paragraphs for line in (p, "")), "```sh", *examples, "```", ""]
    lines += ["Usage: `" + usage + "`", ""]
    if arguments:
        lines += ["| argument | what it is |", "|---|---|", *(f"| `{p.metavar or p.name.upper()}` | {told(p)} |" for p in arguments), ""]
    if options:
        lines += ["| option | what it does |", "|---|---|", *(option_row(p, hints) for p in options), ""]
    return "\n".join([*lines, "[All commands](README.md), and the options that each of them takes.", "", LATER, ""])


def texts(command: Any) -> tuple[list[str], list[str]]:
    """The paragraphs of a command's help, and the lines to be typed in it."""
    paragraphs, examples = [], []
    for paragraph in inspect.cleandoc(command.help).split("\n\n"):
        lines = paragraph.splitlines()
        typed = [found[2] for line in lines if (found := re.match(r"(Example|On two GPUs): (.*)", line))]
        examples += typed
        if not typed:
            paragraphs.append(" ".join(lines))
    return paragraphs, examples


def summary(command: Any) -> str:
    """The first paragraph of a command's help, for a table."""
    return texts(command)[0][0].replace("|", PIPE)


def option_row(parameter: Any, hints: dict[str, Any]) -> str:
    """A line of a table of options; `hints` are the types of the command's parameters, by name."""
    names = ", ".join(sorted(parameter.opts, key=len, reverse=True)) + "".join(f" / {name}" for name in parameter.secondary_opts)
    value = "" if parameter.is_flag else f" {parameter.metavar or placeholder(hints[parameter.name])}"
    return f"| `{(names + value).replace('|', PIPE)}` | {told(parameter)} |"


def told(parameter: Any) -> str:
    """What a parameter's help says, and its default where that is shown."""
    shown = parameter.show_default and parameter.default not in (None, ()) and not getattr(parameter, "is_flag", False)
    default = f" Default: {getattr(parameter.default, 'value', parameter.default)}." if shown else ""
    needed = " Required." if parameter.required else ""
    return ((parameter.help or "").rstrip() + needed + default).replace("|", PIPE)


def placeholder(hint: Any) -> str:
    """What stands for a value: the words of a Literal or an enumeration, or N, X, PATH, TEXT by type; a hint may be optional or a list."""
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(typing.get_args(hint))
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return "|".join(member.value for member in hint)
    inner = [part for part in typing.get_args(hint) if part is not type(None)]
    return placeholder(inner[0]) if inner else {int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT")


def main() -> None:
    """Write every page, and remove those of commands that are no more."""
    wanted = pages()
    for name, text in wanted.items():
        store.write_text(FOLDER / name, text)
    for file in FOLDER.glob("*.md"):
        if file.name not in wanted:
            file.unlink()


if __name__ == "__main__":
    main()
