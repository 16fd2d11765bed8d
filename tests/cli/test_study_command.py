"""`diffrc study`: what is embedded, what would be done, mistakes; and, slow, a whole one in processes of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]

OWN = """
name = "mine"
title = "Is half the weight enough?"
recipe = "digits-lt"
seeds = 1
methods = ["cross_entropy"]
against = ["real"]

[[arms]]
name = "real"
title = "real images alone"
images = "real"

[[arms]]
name = "half"
title = "half the weight"
set = ["recognizer.synthetic_weight=0.5", "synth.engine=torch", "synth.fill_to=6"]
"""


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dry run measures, which takes seconds; tests/cli/test_dry_runs.py is about it."""
    monkeypatch.setattr("engines.study.forecast.seconds_per_operation", lambda *_: 1e-9)
    monkeypatch.setattr("engines.evaluation.forecast.measure", lambda *_: (0.01, 2**28))
    monkeypatch.setattr("engines.training.cost._counted", lambda _: (1e6, 3e6, 2e6, 1e6))


def test_the_list_names_every_embedded_study_with_its_arms_and_seeds(call_in_empty: Call) -> None:
    found = json.loads(call_in_empty("study", "--list", "--json").out)
    assert [(s["name"], s["arms"], s["seeds"]) for s in found] == [
        ("controls", 6, 5),
        ("fig3", 11, 3),
        ("table1", 12, 3),
        ("table2", 4, 3),
        ("table3", 4, 3),
    ]
    printed = call_in_empty("study", "--list").out
    assert all(s["title"] in printed for s in found)


def test_a_plan_says_what_would_be_trained_and_writes_nothing(call_in_empty: Call, tmp_path: Path) -> None:
    planned = json.loads(call_in_empty("study", "table3", "--recipe", "digits-lt", "--seeds", "2", "--dry-run", "--json").out)
    assert (planned["sources"], planned["targets"], planned["recognizers"]) == (2, 4, 8)
    assert {arm["recipe"] for arm in planned["arms"]} == {"digits-lt"}
    text = call_in_empty("study", "digits-lt", "--dry-run").out
    assert "runs/study-controls-digits-lt" in text
    assert "in all: about" in text
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_in_a_studys_place_gets_the_controls(call_in_empty: Call) -> None:
    of_recipe, of_controls = (
        json.loads(call_in_empty("study", *words, "--dry-run", "--json").out) for words in (("digits-lt",), ("controls",))
    )
    now = {"free_bytes", "memory_bytes"}  # of the machine at that moment
    assert {k: v for k, v in of_recipe.items() if k not in now} == {k: v for k, v in of_controls.items() if k not in now}


def test_a_file_of_ones_own_may_be_a_study_or_a_recipe(call_in_empty: Call, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(OWN)
    assert [a["name"] for a in json.loads(call_in_empty("study", "study.toml", "--dry-run", "--json").out)["arms"]] == ["real", "half"]
    assert call_in_empty("recipe", "cp", "digits-lt", "mine.toml").code == 0
    planned = json.loads(call_in_empty("study", "mine.toml", "--dry-run", "--json").out)
    assert planned["name"] == "controls"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("tabel3",), "no study or recipe named 'tabel3'"),
        (("digits-lt", "--recipe", "folder"), "are two recipes"),
        (("table1", "--recipe", "digits-lt"), "recipes of their own"),
        (("controls", "--set", "synth.stepz=3"), "synth.stepz"),
    ],
    ids=["name", "two-recipes", "own-recipes", "key"],
)
def test_a_mistake_is_told_in_two_lines_and_exits_2(words: tuple[str, ...], told: str, call_in_empty: Call, tmp_path: Path) -> None:
    outcome = call_in_empty("study", *words, "--dry-run")
    assert outcome.code == 2
    assert told in outcome.err
    assert len(outcome.err.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_study_of_ones_own_runs_in_processes_of_its_own_and_the_same_command_is_done_at_once(
    diffrc: Callable[..., Any], tiny_settings: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "study.toml").write_text(OWN)
    words = ["study", "study.toml", "--json", *(word for item in tiny_settings for word in ("--set", item))]
    first = diffrc(*words)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert Path(tmp_path, found["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    again = json.loads(diffrc(*words).stdout)["study"]
    assert again["arms"] == found["study"]["arms"]
