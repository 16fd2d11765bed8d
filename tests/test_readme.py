"""The README keeps its word: every command in it runs, its outputs are the real ones, its table holds every exit code."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from diffrc_cli.app import main
from engines import errors
from engines.errors import DiffRCError

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = (  # a run of seconds: every stage, every file, no quality
    "data.image_size_px=8",
    "unet.model_channels=32",  # what diffusers can hold
    "unet.channel_mult=[1, 2]",
    "unet.num_res_blocks=1",
    "unet.attention_resolutions=[4]",
    "unet.num_head_channels=32",
    "guide.model_channels=16",
    "guide.channel_mult=[1, 2]",
    "guide.attention_resolutions=[4]",
    "guide.num_head_channels=16",
    *(f"{stage}.{key}" for stage in ("source", "target", "guide") for key in ("train_steps=2", "batch_size=8", "precision=fp32")),
    *(f"{stage}.{key}" for stage in ("source", "target", "guide") for key in ("save_every_steps=1", "log_every_steps=1")),
    *(f"{stage}.sample_every_steps=0" for stage in ("source", "target")),
    "synth.steps=2",
    "synth.fill_to=12",
    "synth.fused=false",  # exporting the guide takes half a minute: tests of their own do it
    "recognizer.architecture=resnet8",
    "recognizer.train_steps=2",
    "recognizer.seeds=1",
)


class Command(NamedTuple):
    line: str
    output: str | None  # what the README says it prints, stdout and stderr; None: it does not say


def blocks() -> Iterator[list[Command]]:
    """The commands of each sh or console block, in order."""
    for language, body in re.findall(r"^```(sh|console)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        if language == "sh":
            yield [Command(line, None) for line in body.splitlines() if line and not line.startswith("#")]
        else:
            parts = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", body, re.MULTILINE)
            yield [Command(line, output) for line, output in parts]


COMMANDS = [command for block in blocks() for command in block]


def run(words: list[str], folder: Path, seconds: float = 240.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all diffrc commands of the README, in its order, with photographs of three classes in it.

    `diffrc run digits-lt` therefore finds the run that train, export, synth and evaluate left, and only adds the report;
    `diffrc run --data photos` does the whole job.
    """
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for name, count in (("oak", 24), ("elm", 18), ("yew", 14)):
        for i in range(count):
            file = folder / "photos" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(file)
    return folder


def cut_down(words: list[str]) -> list[str]:
    """A command that trains, with a network of a few thousand weights and a few steps; one that measures, with little to measure."""
    if words[1] == "bench":
        return [*words, *(("--n", "14") if "quality" in words else ("--turns", "1", "--engine", "onnx", "--batch", "2"))]
    if words[1] == "study":
        return [*words, "--seeds", "1", *(word for item in TINY for word in ("--set", item))]
    settings = [*TINY, "data.groups=ranks", "data.group_sizes=[1, 1, 1]"] if "photos" in words else list(TINY)
    reads_images = words[1] in ("train", "run") or words[1:3] == ["data", "check"]
    return [*words, *(word for item in settings for word in ("--set", item) if reads_images)]


OF_DIFFRC = [command for command in COMMANDS if command.line.startswith("diffrc ")]
MEASURING = "diffrc bench"  # these take as long as all others together


@pytest.mark.parametrize(
    "command", [pytest.param(c, id=c.line, marks=[pytest.mark.slow] * c.line.startswith(MEASURING)) for c in OF_DIFFRC]
)
def test_a_command_of_the_readme_works(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, as the console script calls it: importing torch anew for every line would take half of the time."""
    words = shlex.split(command.line)
    if command.output is not None:
        assert run([sys.executable, "-m", "diffrc_cli", *cut_down(words)[1:]], folder).stdout == command.output
        return
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        main(cut_down(words)[1:])
    told = capfd.readouterr()
    assert end.value.code == 0, told.err
    assert "Traceback" not in told.out + told.err


@pytest.mark.parametrize("command", [c for c in COMMANDS if "pip" in c.line or "venv " in c.line], ids=lambda c: c.line)
def test_an_install_command_of_the_readme_works(command: Command, tmp_path: Path) -> None:
    # Without the dependencies, which are those that this very test runs with, and into a scratch folder.
    words = shlex.split(command.line)
    if words[1:3] == ["-m", "venv"]:
        assert run([sys.executable, "-m", "venv", "--without-pip", words[3]], tmp_path).returncode == 0
        return
    assert words[0] in ("pipx", ".venv/bin/pip")
    assert words[1] == "install"
    extra = re.fullmatch(r"\.\[(\w+)\]", words[2])
    assert extra
    assert f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(tmp_path / "site")]
    done = run([*pip, str(ROOT)], tmp_path)
    assert done.returncode == 0, done.stdout
    assert sorted(p.name for p in (tmp_path / "site").iterdir() if p.suffix != ".dist-info" and p.name != "bin") == [
        "diffrc_cli",
        "engines",
    ]


def test_the_rest_are_make_targets_which_ci_runs_or_time_does_not_allow() -> None:
    rest = [c.line for c in COMMANDS if not c.line.startswith("diffrc ") and "pip" not in c.line and "venv " not in c.line]
    targets = re.findall(r"^(\w+): \.venv", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert rest == ["make demo", "make test"]
    assert {line.removeprefix("make ") for line in rest} <= set(targets)


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in [command.line for command in COMMANDS]


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    told = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", TEXT, re.MULTILINE) for code in cell.split(",")}
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, DiffRCError)]
    assert told == {0, 138, 143} | {kind.exit_code for kind in kinds}


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", TEXT))
def test_a_link_of_the_readme_leads_somewhere(path: str) -> None:
    assert (ROOT / path).exists()
