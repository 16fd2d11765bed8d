"""diffrc_cli/recipe.py: ls, show, cp, validate, diff, cost, and which recipe a command takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffrc_cli import app as application
from diffrc_cli.recipe import DEFAULT_NAME, embedded, resolve
from engines.errors import UsageError
from engines.recipe import Recipe, load, read

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        application.main(["recipe", *words])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_ls_lists_every_embedded_recipe_and_what_it_costs(capsys: Captured) -> None:
    assert run("ls") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in embedded())
    assert "GPU hours" in out


def test_ls_as_json_marks_the_default(capsys: Captured) -> None:
    assert run("ls", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out) if row["default"]] == [DEFAULT_NAME]


def test_show_prints_every_key_as_a_recipe_that_loads_to_the_same(capsys: Captured) -> None:
    assert run("show", "cifar10-lt-100", "--set", "synth.steps=50") == 0
    assert load(capsys.readouterr().out) == resolve("cifar10-lt-100", ["synth.steps=50"])


def test_show_as_json_holds_every_section(capsys: Captured) -> None:
    assert run("show", "digits-lt", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == set(Recipe.model_fields)


def test_cp_copies_comments_and_all_and_keeps_what_is_there_unless_forced(tmp_path: Path, capsys: Captured) -> None:
    original = embedded()["folder"].read_text(encoding="utf-8")
    assert run("cp", "folder", "own.toml") == 0
    assert (tmp_path / "own.toml").read_text() == original
    (tmp_path / "own.toml").write_text("mine")
    assert run("cp", "folder", "own.toml") == 2
    assert "own.toml exists already" in capsys.readouterr().err
    assert (tmp_path / "own.toml").read_text() == "mine"
    assert run("cp", "folder", "own.toml", "--force") == 0
    assert (tmp_path / "own.toml").read_text() == original


def test_cp_into_a_folder_keeps_the_name(tmp_path: Path) -> None:
    assert run("cp", "folder", ".") == 0
    assert read(tmp_path / "folder.toml").name == "folder"


def test_cost_estimates_every_stage_and_halves_with_a_device_twice_as_fast(capsys: Captured) -> None:
    told = []
    for tflops in ("100", "200"):
        assert run("cost", "digits-lt", "--tflops", tflops, "--json") == 0
        told.append(json.loads(capsys.readouterr().out)["parts"])
    slow, fast = told
    assert list(slow) == ["source", "target", "guide", "1,000 images"]
    for part in slow:
        assert slow[part]["operations"] == fast[part]["operations"] > 0
        assert slow[part]["hours"] == pytest.approx([2 * h for h in fast[part]["hours"]])


def test_cost_says_on_what_device_and_that_it_is_an_estimate(capsys: Captured) -> None:
    assert run("cost", "digits-lt", "--set", "source.train_steps=2000") == 0
    out = capsys.readouterr().out
    assert "312 TFLOP/s (NVIDIA A100, dense bfloat16)" in out
    assert "Estimated for a device" in out
    assert run("cost", "digits-lt", "--tflops", "0") == 2


def test_validate_says_valid_or_tells_every_mistake(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "own.toml").write_text('name = "own"\n')
    assert run("validate", "own.toml") == 0
    assert capsys.readouterr().out.startswith("own.toml: valid, named own, sha256 ")
    (tmp_path / "own.toml").write_text('name = "own"\nfoo = 1\n[synth]\nsteps = 0\n')
    assert run("validate", "own.toml") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: 2 mistakes in own.toml: ")


def test_validate_as_json_gives_the_digest(capsys: Captured) -> None:
    assert run("validate", "digits-lt", "--json") == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["valid"]
    assert len(verdict["sha256"]) == 64


def test_diff_shows_exactly_the_keys_that_differ(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "own.toml").write_text('name = "own"\nseed = 3\n')
    (tmp_path / "other.toml").write_text('name = "own"\n[synth]\nsteps = 9\n')
    assert run("diff", "own.toml", "other.toml", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"key": "seed", "a": 3, "b": 0}, {"key": "synth.steps", "a": 250, "b": 9}]
    assert run("diff", "own.toml", "own.toml") == 0
    assert capsys.readouterr().out == "no differences\n"


@pytest.mark.parametrize("words", [("show",), ("validate",), ("diff", "digits-lt"), ("cp",)])
def test_an_unknown_name_is_answered_with_the_nearest(words: tuple[str, ...], capsys: Captured) -> None:
    arguments = [*words, "cifar-10-lt-100", *(["x.toml"] if words == ("cp",) else [])]
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert "there is no recipe named 'cifar-10-lt-100'" in err
    assert "cifar10-lt-100" in err.splitlines()[1]


def test_without_a_name_the_local_file_is_taken_else_the_default_and_it_is_said(tmp_path: Path, capsys: Captured) -> None:
    assert resolve(None).name == DEFAULT_NAME
    assert "digits-lt (embedded" in capsys.readouterr().err
    (tmp_path / "diffrc.toml").write_text('name = "mine"\n')
    assert resolve(None, ["seed=4"]).seed == 4
    assert resolve(None).name == "mine"
    captured = capsys.readouterr()
    assert captured.err == "recipe: diffrc.toml\n" * 2
    assert captured.out == ""


def test_an_embedded_name_wins_over_a_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "digits-lt").mkdir()
    assert resolve("digits-lt").name == "digits-lt"


@pytest.mark.parametrize("name", ["missing.toml", "some/where", ".", ""])
def test_a_file_that_is_not_there_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError):
        resolve(name)
