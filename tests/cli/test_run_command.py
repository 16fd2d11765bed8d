"""`diffrc run`: one command from a data set to a report; killed in the middle, the same command goes on to the same end.

The module's run is started once, as a process; SIGTERM meets it in training. It is continued in this process, beside an
engine that the same weights were exported to elsewhere: an export takes longer than all the rest, and has tests of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from diffrc_cli.app import main
from engines import store

ROOT = Path(__file__).parent.parent.parent
RUN = Path("runs/digits-lt")
STAGES = ("source", "target", "guide")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float  # of processor time
    files: dict[str, tuple[int, int]]  # below the run folder afterward: inode and time of change; a file written anew has others


class Story(NamedTuple):
    folder: Path
    killed: Outcome
    continued: Outcome
    again: Outcome


def here(*words: str) -> Outcome:
    """A call in this process."""
    out, err, began = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(words)
    assert isinstance(end.value.code, int)
    return Outcome(end.value.code, out.getvalue(), err.getvalue(), time.process_time() - began, files())


def killed(*words: str) -> Outcome:
    """A call in a process of its own, which gets SIGTERM when it says that it trains."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffrc_cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr and process.stdout
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("source"):
                process.send_signal(signal.SIGTERM)
                break
        out, err = process.communicate(timeout=60)
    return Outcome(process.returncode, out, "".join(seen) + err, 0.0, files())


def files() -> dict[str, tuple[int, int]]:
    found = ((path, path.stat()) for path in RUN.rglob("*") if path.is_file())
    return {path.relative_to(RUN).as_posix(): (status.st_ino, status.st_mtime_ns) for path, status in found}


@pytest.fixture(scope="module")
def story(exported_run: Path, tiny_settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The same command three times in an empty folder: killed in training, to the end, once more."""
    words = ("run", "digits-lt", *(word for setting in tiny_settings for word in ("--set", setting)))
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        first = killed(*words)
        shutil.copytree(exported_run / "engines", RUN / "engines")
        return Story(folder, first, here(*words), here(*words, "--json"))


def test_sigterm_ends_it_with_143_and_two_lines_that_say_how_to_go_on(story: Story) -> None:
    assert story.killed.code == 143, story.killed.err
    problem, remedy = story.killed.err.splitlines()[-2:]
    assert problem.startswith("error: ")
    assert remedy.startswith("try:   the same command")
    assert "Traceback" not in story.killed.err
    assert "report/index.html" not in story.killed.files


def test_the_same_command_goes_on_and_ends_with_the_weights_of_a_run_that_was_never_killed(story: Story, tiny_run: Path) -> None:
    assert story.continued.code == 0, story.continued.err
    for stage in STAGES:
        ema = f"{stage}/step-000000004/ema.safetensors"
        assert hashlib.sha256((story.folder / RUN / ema).read_bytes()).digest() == hashlib.sha256((tiny_run / ema).read_bytes()).digest()


def test_it_goes_through_all_stages_and_writes_a_report(story: Story) -> None:
    for file in ("engines/onnx/target.onnx", "synth/plan.json", "synth/sheet.png", "evaluation/accuracy.json", "report/index.html"):
        assert file in story.continued.files
    with contextlib.chdir(story.folder):
        table = store.open_run(None).classes()  # the run is the latest one
    largest = max(table["counts"])
    wanted = sum(largest - n for n, group in zip(table["counts"], table["groups"], strict=True) if group != "many")
    assert sum(name.endswith(".png") and name.count("/") == 2 for name in story.continued.files if name.startswith("synth/")) == wanted
    assert set(store.open_run(story.folder / RUN).cost()) >= {"train.source", "train.target", "train.guide", "synth", "evaluate"}


def test_it_prints_the_table_a_verdict_and_where_the_report_lies(story: Story) -> None:
    kept = store.read_json(story.folder / RUN / "evaluation/accuracy.json")
    assert "real + synthetic" in story.continued.out
    assert "purity" in story.continued.out
    assert story.continued.out.splitlines()[-2:] == [kept["verdict"], f"report: {RUN}/report/index.html"]


def test_a_second_call_makes_nothing_anew_and_ends_at_once(story: Story) -> None:
    assert story.again.code == 0, story.again.err
    remade = {name for name, mark in story.again.files.items() if story.continued.files.get(name) != mark}
    work = {name for name in remade if name.endswith((".safetensors", ".onnx")) or "/cells/" in name or "-000" in name}
    assert not work
    assert not any(stage in story.again.err for stage in STAGES), "no stage reports a step"
    assert story.again.seconds < 5


def test_json_is_one_line_that_holds_the_run_the_images_the_figures_and_the_report(story: Story) -> None:
    assert story.again.out.count("\n") == 1
    told = json.loads(story.again.out)
    assert (told["run"], told["report"]) == (str(RUN), f"{RUN}/report/index.html")
    assert told["synthesized"]["made"] == 0
    assert told["evaluation"]["verdict"]
