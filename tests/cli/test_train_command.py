"""`diffrc train`: which recipe and run folder it takes, what it records, and what it refuses.

A run trained from nothing is in test_run_command.py; what training does is in tests/training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from diffrc_cli.app import main
from engines import store


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Caller:
    """call("--json") is `diffrc train --json`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str) -> Outcome:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(("train", *words))
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, *self.capsys.readouterr())


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Caller:
    monkeypatch.chdir(tmp_path)
    return Caller(capsys)


@pytest.fixture
def settings(tiny_settings: tuple[str, ...]) -> list[str]:
    return [word for setting in tiny_settings for word in ("--set", setting)]


COMPLETE = ["source: complete already", "target: complete already", "guide: complete already"]


def test_a_local_recipe_is_taken_and_named(call: Caller, tiny_copy: Path) -> None:
    shutil.copy(tiny_copy / "recipe.toml", "diffrc.toml")
    done = call()
    assert done.code == 0, done.err
    assert done.err.splitlines()[0] == "recipe: diffrc.toml"
    assert done.out.splitlines() == [*COMPLETE, "run: runs/digits-lt", "next: diffrc export"]


def test_without_one_it_is_the_embedded_default_and_that_is_said(call: Caller, tiny_copy: Path, settings: list[str]) -> None:
    done = call(*settings)
    assert done.code == 0, done.err
    assert done.err.splitlines()[0] == "recipe: digits-lt (embedded; a ./diffrc.toml would be taken instead)"
    assert done.out.splitlines()[:4] == [*COMPLETE, "run: runs/digits-lt"]


def test_a_run_that_exists_needs_no_recipe_and_is_continued(call: Caller, tiny_copy: Path) -> None:
    tiny_copy.rename("elsewhere")
    shutil.rmtree("elsewhere/guide")
    done = call("--run", "elsewhere")
    assert done.code == 0, done.err
    assert "recipe:" not in done.err
    assert done.out.splitlines() == [*COMPLETE[:2], "guide: trained 4 steps", "run: elsewhere", "next: diffrc export --run elsewhere"]
    told = json.loads(call("--run", "elsewhere", "--json").out)
    assert told == {"run": "elsewhere", "trained_steps": {"source": 0, "target": 0, "guide": 0}}


def test_the_data_folder_is_recorded_as_an_absolute_path(call: Caller, tiny_copy: Path) -> None:
    done = call("--run", "runs/digits-lt", "--data", "photos")  # the digits need none, and read none
    assert done.code == 0, done.err
    assert store.open_run(tiny_copy).recipe.data.path == str(Path.cwd() / "photos")


def test_an_unknown_device_is_a_usage_error_and_a_missing_one_is_never_replaced(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = call("--device", "tpu")
    assert (unknown.code, "no device named 'tpu'" in unknown.err) == (2, True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    missing = call("--device", "cuda")
    assert (missing.code, "--device cpu" in missing.err.splitlines()[-1]) == (4, True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert call("--device", "cuda:7").code == 4
    assert not list(Path().iterdir())


def test_another_recipe_in_the_same_folder_is_refused_naming_the_key(call: Caller, tiny_copy: Path) -> None:
    before = (tiny_copy / "recipe.toml").read_bytes()
    done = call("--run", "runs/digits-lt", "--set", "guide.tau=0.7")
    assert done.code == 5
    assert "0.7 now" in done.err
    assert "guide.tau" in done.err
    assert (tiny_copy / "recipe.toml").read_bytes() == before
