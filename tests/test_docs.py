"""docs/ keeps its word: command pages are what the code writes, commands and links are real, messages are the code's."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import signal
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from diffrc_cli.app import EVERYWHERE, app, main
from engines import errors
from engines.errors import DiffRCError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("command_pages", ROOT / "tests" / "command_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


command_pages = loaded()
PAGES = command_pages.pages()
FILES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "results")
NAMES = [path.relative_to(DOCS).as_posix() for path in FILES]


@cache
def commands() -> dict[tuple[str, ...], Any]:
    return dict(command_pages.commands())


def lines_of(text: str) -> list[str]:
    """What is to be typed: the lines of sh blocks, those after a $ in console blocks."""
    blocks = re.findall(r"^```(sh|console)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for kind, body in blocks for line in (body.splitlines() if kind == "sh" else re.findall(r"^\$ (.*)$", body, re.MULTILINE))]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_command_page_is_what_the_code_writes(name: str) -> None:
    path = command_pages.FOLDER / name
    assert path.exists() and path.read_text(encoding="utf-8") == PAGES[name], f"write it anew: {command_pages.REMADE_BY}"


def test_there_is_no_page_of_a_command_that_is_no_more() -> None:
    assert {path.name for path in command_pages.FOLDER.iterdir()} == set(PAGES), f"write them anew: {command_pages.REMADE_BY}"


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_the_commands_of_a_document_and_their_options_exist(file: Path) -> None:
    """tests/test_readme.py and tests/cli run them; here every option is held to be one that its command knows."""
    typed = [line for line in lines_of(file.read_text(encoding="utf-8")) if not line.startswith("torchrun ")]
    for line in typed:
        program, *words = shlex.split(line)
        assert program == "diffrc", line
        path = next((tuple(words[:n]) for n in (2, 1) if tuple(words[:n]) in commands()), None)
        if path is None:
            assert "console" in file.read_text(encoding="utf-8"), f"{line}: there is no such command"
            continue
        known = {option for p in commands()[path].params for option in (*p.opts, *p.secondary_opts)} | set(EVERYWHERE) | {"--help"}
        unknown = [word for word in words if word.startswith("-") and word.partition("=")[0] not in known and not word[1:].isdigit()]
        assert not unknown or unknown == ["--jsn"], f"{line}: {unknown}"


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_link_of_a_document_leads_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), target


def test_the_index_names_every_document() -> None:
    listed = set(re.findall(r"\]\(([^)]+\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    there = {path.relative_to(DOCS).as_posix() for path in (*DOCS.glob("*.md"), *DOCS.glob("results/*.md"))}
    assert listed == (there - {"README.md"}) | {"commands/README.md"}


TROUBLES = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


def test_every_exit_code_has_its_section() -> None:
    told = {int(code) for heading in re.findall(r"^## ([\d, ]+):", TROUBLES, re.MULTILINE) for code in heading.split(",")}
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, DiffRCError)]
    assert told == {0} | {kind.exit_code for kind in kinds} | {128 + number for number in (signal.SIGTERM, signal.SIGUSR1)}


SHOWN = re.findall(r"^\$ diffrc (.*)\n((?:error|try).*\n(?:try.*\n)?)", TROUBLES, re.MULTILINE)


@pytest.mark.parametrize(("line", "output"), SHOWN, ids=[line for line, _ in SHOWN])
def test_an_example_of_troubleshooting_says_what_is_shown(
    line: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(shlex.split(line))
    section = TROUBLES[: TROUBLES.index(f"$ diffrc {line}")].rpartition("\n## ")[2]
    assert section.startswith(f"{end.value.code}:")
    assert capfd.readouterr().err == output


@cache
def source() -> str:
    """All code as one line of words, so that a message is found wherever it is broken."""
    files = (path.read_text(encoding="utf-8") for package in ("engines", "diffrc_cli") for path in (ROOT / package).rglob("*.py"))
    return " ".join(re.sub(r'"\s*f?"', "", " ".join(files)).split())


@pytest.mark.parametrize("message", re.findall(r"^```text\n(.*?)^```", TROUBLES, re.MULTILINE | re.DOTALL), ids=lambda text: text[:30])
def test_a_message_of_troubleshooting_is_one_of_the_code(message: str) -> None:
    for line in message.splitlines():
        words = line.partition(":")[2].split()
        window = 3 if len(words) > 4 else 2
        assert any(" ".join(words[i : i + window]) in source() for i in range(len(words) - window + 1)), line


def test_the_shells_that_are_named_are_those_that_have_a_script() -> None:
    assert "(bash, zsh, fish)" in TROUBLES
    root: Any = typer.main.get_command(app)
    assert {"--install-completion", "--show-completion"} <= {option for p in root.params for option in p.opts}
