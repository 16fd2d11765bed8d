"""diffrc status: one page for a person, one line of JSON for a program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import store

Call = Callable[..., Any]  # (code, out, err)
RUN = Path("runs/digits-lt")


@pytest.fixture
def run(made_copy: Path) -> Path:
    """A run of filled classes that was never trained, the latest of the folder in which commands are called."""
    return made_copy


def test_a_page_says_stage_by_stage_what_is_there_and_what_is_next(run: Path, call_in_empty: Call) -> None:
    done = call_in_empty("status")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith("runs/digits-lt (digits-lt): 10 classes, ")
    assert [line.split() for line in lines[1:5]] == [
        ["stage", "step", "of", "state"],
        *[[name, "0", "4", "to", "train"] for name in ("source", "target", "guide")],
    ]
    for line in ("engines: none yet", "evaluation: none yet", "report: none yet", "next: diffrc train --run runs/digits-lt"):
        assert line in lines
    assert any(line.startswith("images in synth: ") and line.endswith("the last job did not end") for line in lines)
    assert lines[-1] == "      the source is not trained"
    named = call_in_empty("status", "--run", "runs/digits-lt")
    assert named.out == done.out


def test_json_is_one_line_that_holds_every_class(run: Path, call_in_empty: Call) -> None:
    done = call_in_empty("status", "--json")
    [line] = done.out.splitlines()
    told = json.loads(line)
    assert (told["run"], told["next"]) == ("runs/digits-lt", "diffrc train --run runs/digits-lt")
    assert [row["synthetic"] for row in told["images"][0]["classes"]] == [row["asked"] for row in told["images"][0]["classes"]]
    assert told["locks"] == []
    with store.locked(RUN):
        assert json.loads(call_in_empty("status", "--json").out)["locks"][0]["folder"] == ""
        assert "in use: runs/digits-lt by process " in call_in_empty("status").out


def test_without_a_run_it_says_how_to_begin(call_in_empty: Call) -> None:
    done = call_in_empty("status")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == ["error: there is no run in ./runs", "try:   diffrc train"]


def test_a_class_with_a_hostile_name_is_one_harmless_line(run: Path, call_in_empty: Call) -> None:
    table = store.read_json(run / "classes.json")
    names = ["\x1b[2J\nevil " * 20 if name == "nine" else name for name in table["names"]]
    store.write_json(run / "classes.json", table | {"names": names})
    store.write_json(run / "synth/yield.json", [{"class": names[9], "asked": 3}])
    done = call_in_empty("status")
    assert "\x1b" not in done.out
    [line] = [line for line in done.out.splitlines() if "evil" in line]
    assert len(line) < 120 + 5 * 20  # shortened, with its control characters spelled out
