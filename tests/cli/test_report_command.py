"""`diffrc report`: the page is written anew, with real images where the run's data can be read and is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import store


@pytest.fixture
def page(tiny_copy: Path) -> Callable[[], str]:
    """The report of the tiny run, read."""
    return lambda: (tiny_copy / "report" / "index.html").read_text(encoding="utf-8")


def test_a_run_that_is_only_trained_has_a_report_that_says_what_is_missing(
    call_in_empty: Any, tiny_copy: Path, page: Callable[[], str]
) -> None:
    done = call_in_empty("report", "--json")
    assert json.loads(done.out) == {"report": "runs/digits-lt/report/index.html"}
    assert (done.code, done.err) == (0, "")
    assert "diffrc evaluate" in page()


def test_it_tells_in_what_the_runs_recipe_differs_from_the_embedded_one(
    call_in_empty: Any, tiny_copy: Path, page: Callable[[], str]
) -> None:
    call_in_empty("report")
    row = next(line for line in page().split("<tr>") if "source.<wbr>train_<wbr>steps" in line)
    assert "<td>1000</td><td><b>4</b></td>" in row


def test_data_that_has_changed_is_not_shown_and_that_is_said(call_in_empty: Any, tiny_copy: Path, page: Callable[[], str]) -> None:
    table = store.read_json(tiny_copy / "classes.json")
    store.write_json(tiny_copy / "classes.json", {**table, "kept_sha256": "0" * 64})
    done = call_in_empty("report")
    assert (done.code, done.err) == (0, "no real images in the report: the data has changed since the run was trained\n")
    assert page()


def test_data_that_is_gone_is_not_shown_and_that_is_said(call_in_empty: Any, tiny_copy: Path, page: Callable[[], str]) -> None:
    recipe = (tiny_copy / "recipe.toml").read_text(encoding="utf-8")
    moved = recipe.replace('source = "digits"', 'source = "folder"').replace('path = ""', 'path = "gone"')
    store.write_text(tiny_copy / "recipe.toml", moved)
    done = call_in_empty("report")
    assert done.code == 0
    assert done.err.startswith("no real images in the report: ")
    assert page()
