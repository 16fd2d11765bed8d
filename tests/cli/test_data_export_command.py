"""`diffrc data export`: a run's balanced data set, in a folder of its own, from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.fixture
def run(made_copy: Path, call_in_empty: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """run("--out", "x") in a folder whose latest run has synthetic images."""
    monkeypatch.setattr("os.sync", lambda: None)
    return lambda *words: call_in_empty("data", "export", *words)


def test_the_latest_run_is_exported_counted_and_told_how_to_be_read(run: Call, tmp_path: Path) -> None:
    code, out, err = run("--out", "balanced", "--format", "parquet")
    assert code == 0, err
    assert "102 real + 124 synthetic training images, 40 test:" in out
    assert "lies in: balanced (parquet)" in out
    assert "card: balanced/README.md; its license is yours to fill in" in out
    assert "load_dataset('balanced', split='train')" in out
    assert "run: runs/digits-lt" in err
    assert all(len(line) <= 80 for line in out.splitlines())
    assert (tmp_path / "balanced" / "data" / "train-00000-of-00001.parquet").exists()
    code, out, _ = run("--out", "balanced", "--format", "parquet")
    assert code == 0
    assert out.startswith("balanced is this very export already: nothing to do\n")


def test_without_a_format_it_is_a_folder_of_class_folders(run: Call, tmp_path: Path) -> None:
    assert run("--out", "balanced").code == 0
    assert len(list((tmp_path / "balanced" / "train" / "nine").glob("synthetic-*.png"))) == 21
    assert len(list((tmp_path / "balanced" / "test" / "nine").glob("real-*.png"))) == 4


def test_json_is_one_line_with_the_counts_of_each_class(run: Call) -> None:
    code, out, _ = run("--out", "balanced", "--format", "webdataset", "--no-test", "--json")
    facts = json.loads(out)
    assert (code, facts["written"], facts["format"], facts["folder"]) == (0, True, "webdataset", "balanced")
    assert facts["classes"][9] == {"class": "nine", "group": "few", "real": 3, "synthetic": 21, "test": 0}


def test_a_folder_of_other_things_exits_5_with_cause_and_remedy(run: Call) -> None:
    code, out, err = run("--out", "runs")
    assert (code, out) == (5, "")
    assert "error: runs is not empty and holds no export" in err
    assert "try:   --out DIR names a new folder" in err


def test_the_cost_of_cleanlab_is_told_before_it_is_spent(run: Call, tmp_path: Path) -> None:
    code, _, err = run("--out", "balanced", "--cleanlab", "--folds", "2")
    assert code == 0, err
    assert err.index("cleanlab: 2 recognizers of 4 steps") < err.index("recognizers  ")
    assert sorted(path.name for path in (tmp_path / "balanced" / "cleanlab").iterdir()) == [
        "features.npy",
        "ids.json",
        "labels.npy",
        "pred_probs.npy",
    ]


def test_a_run_that_made_no_images_says_what_to_do_first(run: Call, made_copy: Path) -> None:
    shutil.rmtree(made_copy / "synth")
    code, _, err = run("--out", "balanced")
    assert code == 2
    assert "has no synthesized images yet" in err
    assert "diffrc synth --fill" in err


def test_out_is_asked_for(run: Call) -> None:
    code, _, err = run()
    assert code == 2
    assert "--out" in err
