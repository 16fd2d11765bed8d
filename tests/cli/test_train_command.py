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
from diffrc_cli.train import estimating
from engines import store
from engines.progress import silent
from engines.training import forecast


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
    told = done.out.splitlines()
    assert told[:3] + told[-2:] == [*COMPLETE, "run: runs/digits-lt", "next: diffrc export"]


def test_without_one_it_is_the_embedded_default_and_that_is_said(call: Caller, tiny_copy: Path, settings: list[str]) -> None:
    done = call(*settings)
    assert done.code == 0, done.err
    assert done.err.splitlines()[0] == "recipe: digits-lt (embedded; a ./diffrc.toml would be taken instead)"
    assert done.out.splitlines()[:4] == [*COMPLETE, "The guide by noise level, %"]


def test_a_run_that_exists_needs_no_recipe_and_is_continued(call: Caller, tiny_copy: Path) -> None:
    tiny_copy.rename("elsewhere")
    shutil.rmtree("elsewhere/guide")
    done = call("--run", "elsewhere")
    assert done.code == 0, done.err
    assert "recipe:" not in done.err
    told = done.out.splitlines()
    assert told[:3] + told[-2:] == [*COMPLETE[:2], "guide: trained 4 steps", "run: elsewhere", "next: diffrc export --run elsewhere"]
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


def test_other_data_in_the_same_folder_are_refused_naming_the_key(call: Caller, tiny_copy: Path) -> None:
    before = (tiny_copy / "recipe.toml").read_bytes()
    done = call("--run", "runs/digits-lt", "--set", "data.profile_seed=7")
    assert done.code == 5
    assert "data.profile_seed = 0 there, 7 now" in done.err
    assert (tiny_copy / "recipe.toml").read_bytes() == before


def test_other_settings_train_what_depends_on_them_and_say_so_first(call: Caller, tiny_copy: Path, settings: list[str]) -> None:
    done = call("--run", "runs/digits-lt", "--set", "guide.tau=0.7")
    assert done.code == 0, done.err
    told = [line for line in done.err.splitlines() if line.startswith("guide")]
    kept = next((tiny_copy / "stale").iterdir()).name
    assert told[0] == f"guide: guide.tau = 0.07 -> 0.7; trains again (the old one is kept in stale/{kept})"
    assert done.out.splitlines()[:3] == [*COMPLETE[:2], "guide: trained 4 steps"]
    back = call("digits-lt", *settings)
    assert f"guide: guide.tau = 0.7 -> 0.07; comes back from stale/{kept} (the old one is kept in stale/guide-" in back.err
    assert back.out.splitlines()[:3] == COMPLETE


def test_where_the_data_lie_is_remembered(call: Caller, tiny_copy: Path) -> None:
    assert call("--run", "runs/digits-lt", "--data", "photos").code == 0
    shutil.copy(tiny_copy / "recipe.toml", "mine.toml")
    text = Path("mine.toml").read_text(encoding="utf-8")
    Path("mine.toml").write_text(text.replace(str(Path.cwd() / "photos"), ""), encoding="utf-8")
    assert call("mine.toml", "--run", "runs/digits-lt").code == 0
    assert store.open_run(tiny_copy).recipe.data.path == str(Path.cwd() / "photos")


def test_a_long_stage_says_once_how_long_it_takes_when_its_first_steps_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    report = estimating(silent)
    for done in range(300_001):
        report("source", done, 300_000, {"images_per_second": 130.4, "seconds_left": 147_600.0} if done in (1, 50, 100) else {})
    report("guide", 5, 100, {"images_per_second": 1300.0, "seconds_left": 30.0})
    report("guide", 50, 100, {"images_per_second": 1300.0, "seconds_left": 30.0})
    assert capsys.readouterr().err == "source: 300,000 steps, about 41h00m at 130 images/s\n"


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_dry_run_is_a_table_of_what_is_left_and_writes_nothing(
    command: str, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny_copy.parent.parent)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(forecast, "measure", lambda *_: 4.0)
    before = {path: path.stat().st_mtime_ns for path in tiny_copy.rglob("*")}
    words = (command, "--run", "runs/digits-lt", "--dry-run", "--set", "guide.tau=0.7", "--set", "target.train_steps=300000")
    with pytest.raises(SystemExit) as end:
        main((*words, "--set", "target.save_every_steps=5000"))
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines[2:]) <= 80
    kept = lines[1].removesuffix(")").rpartition(" ")[2]
    assert lines[1] == f"guide: guide.tau = 0.07 -> 0.7; trains again (the old one is kept in {kept})"
    table = [line.split() for line in lines[2:6]]
    assert table[0][:3] == ["stage", "state", "steps"]
    assert table[1][:3] == ["source", "complete", "0"]
    assert table[2][:5] == ["target", "stale", "300,000", "2", "333h20m"]
    assert table[3][:5] == ["guide", "stale", "4", "2", "16s"]
    assert lines[6].startswith("in all: 333h20m on this cpu; ")
    with pytest.raises(SystemExit):
        main((*words, "--json"))
    told = json.loads(capsys.readouterr().out)
    assert [(s["stage"], s["state"], s["steps_left"]) for s in told["stages"]][2] == ("guide", "stale", 4)
    assert told["seconds_left"] == 1_200_016
    assert {path: path.stat().st_mtime_ns for path in tiny_copy.rglob("*")} == before


def test_a_log_is_written_beside_the_metrics_and_an_unknown_one_refused(call: Caller, tiny_copy: Path) -> None:
    pytest.importorskip("tensorboard")
    assert call("--log", "fax").code == 2
    done = call("--run", "runs/digits-lt", "--set", "guide.tau=0.7", "--log", "tensorboard")
    assert done.code == 0, done.err
    assert [path.parent.name for path in (tiny_copy / "tensorboard").rglob("events*")] == ["guide"]
