"""A study end to end: arms share what they do not change, seeds are compared whole, and the same command does nothing twice."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffrc_cli.recipe import resolve
from engines import store
from engines.errors import DataError
from engines.evaluation.accuracy import class_accuracy, group_accuracy
from engines.progress import silent
from engines.study import lanes, run
from engines.study.grid import Key, column_of, filled, images_tested, rows_of
from engines.study.plan import Arm, Study, load, resolve_arms
from engines.study.processes import Task

CPU = torch.device("cpu")
TEXT = """
name = "small"
title = "What a weight and a scale do"
recipe = "digits-lt"
seeds = 2
methods = ["cross_entropy"]
against = ["real", "replay"]
set = ["synth.engine=torch", "data.test_per_class=10", "synth.fill_to=8"]

[[arms]]
name = "real"
title = "real images"
images = "real"
paper = { few = 8.6, all = 45.5 }

[[arms]]
name = "replay"
title = "duplicates"
images = "replay"

[[arms]]
name = "half"
title = "half the weight"
set = ["recognizer.synthetic_weight=0.5"]

[[arms]]
name = "fewer"
title = "filled to less"
set = ["synth.fill_to=6"]

[[sweeps]]
name = "s"
title = "s"
key = "synth.guidance_scale"
values = [0.1, 0.2]
"""


def in_this_process(tasks: Sequence[Task], *_: Any) -> list[Any]:
    return [lanes.make_lane(*task.arguments, silent) for task in tasks]


@pytest.fixture(scope="module")
def study() -> Study:
    return load(TEXT)


@pytest.fixture(scope="module")
def arms(study: Study, tiny_settings: tuple[str, ...]) -> tuple[Arm, ...]:
    return resolve_arms(study, resolve, overrides=[item for item in tiny_settings if "test_per_class" not in item])


@pytest.fixture(scope="module")
def finished(study: Study, arms: tuple[Arm, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The study's folder, to be read only, and its document."""
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "run_tasks", in_this_process)
        return out, run.run_study(study, arms, out, CPU, command="diffrc study small.toml")


def arm_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(arm for arm in document["arms"] if arm["name"] == name)
    return found


def test_every_arm_has_a_row_with_the_spread_of_its_seeds_and_the_papers_figures(finished: tuple[Path, dict[str, Any]]) -> None:
    out, document = finished
    assert [arm["name"] for arm in document["arms"]] == ["real", "replay", "half", "fewer", "s-0.1", "s-0.2"]
    for arm in document["arms"]:
        (row,) = arm["rows"]
        assert row["method"] == "cross_entropy"
        assert {figure["n"] for figure in row["figures"].values()} == {2}
    assert arm_of(document, "real")["paper"] == {"few": 8.6, "all": 45.5}
    assert document["command"] == "diffrc study small.toml"
    assert json.loads((out / run.DOCUMENT).read_text()) == document


def test_the_arms_of_a_source_model_share_a_folder_and_equal_images_are_made_once(
    finished: tuple[Path, dict[str, Any]], arms: tuple[Arm, ...]
) -> None:
    out, _ = finished
    assert len(list((out / "lanes").iterdir())) == 2, "one a seed"
    by_name = {arm.name: arm for arm in arms}
    same = [lanes.images_digest(by_name[name].seeded(0)) for name in ("half", "half")]
    assert len(set(same)) == 1
    (lane,) = (out / "lanes").glob("seed0-*")
    assert len(list((lane / lanes.RECORDS).iterdir())) == 4, "half, fewer, and two scales"
    assert len(list((lane / "stale").glob("source-*"))) == 0


def test_an_arm_gets_the_first_images_of_each_class_up_to_its_own_fill(
    finished: tuple[Path, dict[str, Any]], study: Study, arms: tuple[Arm, ...]
) -> None:
    out, document = finished
    data = run.prepare_arms(arms)
    images = run.images_in(out, data)
    by_name = {arm.name: arm for arm in arms}
    half, fewer = (images(by_name[name], 0) for name in ("half", "fewer"))
    assert fewer.counts(10).tolist() == filled(by_name["fewer"], data["fewer"]).tolist()
    assert half.counts(10).tolist() == filled(by_name["half"], data["half"]).tolist()
    label = int(np.flatnonzero(fewer.counts(10))[-1])
    ours = half.pixels[half.labels == label][: int(fewer.counts(10)[label])]
    assert np.array_equal(fewer.pixels[fewer.labels == label], ours), "the same noise, the same images"
    assert arm_of(document, "fewer")["images"] == len(fewer)


def test_the_same_command_makes_and_trains_nothing(
    finished: tuple[Path, dict[str, Any]], study: Study, arms: tuple[Arm, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, document = finished

    def nothing(tasks: Sequence[Task], *_: Any) -> list[Any]:
        assert not tasks
        return []

    monkeypatch.setattr(run, "run_tasks", nothing)
    monkeypatch.setattr("engines.study.grid.train_recognizer", lambda *_: pytest.fail("a recognizer was trained again"))
    again = run.run_study(study, arms, out, CPU, command="diffrc study small.toml")
    assert again | {"seconds": 0} == document | {"seconds": 0}


def test_a_study_that_runs_out_of_its_budget_says_so_and_keeps_what_it_has(
    finished: tuple[Path, dict[str, Any]], study: Study, arms: tuple[Arm, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    monkeypatch.setattr(run, "run_tasks", lambda *_: pytest.fail("something was begun"))
    told: list[str] = []
    more = study.model_copy(update={"seeds": 3})
    document = run.run_study(more, arms, out, CPU, budget_hours=-1, tell=told.append)
    assert document["seeds"] == 2
    assert "2 of 3 seeds" in told[0]


def test_a_plan_counts_what_is_to_be_trained_and_what_is_there(
    finished: tuple[Path, dict[str, Any]], study: Study, arms: tuple[Arm, ...], tmp_path: Path
) -> None:
    planned = run.plan(study, arms, tmp_path / "nothing")
    assert (planned["sources"], planned["targets"], planned["parts"], planned["ready"]) == (2, 2, 8, 0)
    assert planned["recognizers"] == 2 * 6
    assert not (tmp_path / "nothing").exists()
    assert run.plan(study, arms, finished[0])["ready"] == 8


def test_settings_are_chosen_on_training_images_that_the_long_tail_leaves_out(study: Study, arms: tuple[Arm, ...]) -> None:
    data = run.prepare_arms(arms)["real"]
    held_out = images_tested(study.model_copy(update={"split": "held-out"}), data)
    assert data.left_out is held_out
    assert len(held_out) + len(data.train) == len(data.pool)
    rows = {image.tobytes() for image in data.train.pixels(np.arange(len(data.train)))}
    assert not any(image.tobytes() in rows for image in held_out.pixels(np.arange(len(held_out))))
    with pytest.raises(DataError, match="none to choose settings on"):
        images_tested(study.model_copy(update={"split": "held-out"}), replace(data, left_out=None))


def test_arms_are_compared_pair_by_pair_on_the_seeds_and_data_that_both_have(study: Study, arms: tuple[Arm, ...]) -> None:
    data = run.prepare_arms(arms)
    labels, groups = data["real"].test.labels, data["real"].groups
    right, wrong = labels.copy(), (labels + 1) % 10
    predicted = {Key("real", "cross_entropy", s): wrong for s in (0, 1, 2)}
    predicted |= {Key("half", "cross_entropy", s): right for s in (0, 1)}
    rows = rows_of(study, [arm for arm in arms if arm.name in ("real", "half")], data, predicted)
    (real,), (half,) = rows["real"], rows["half"]
    assert real["against"] == {}, "not with itself, nor with an arm that is not there"
    difference = half["against"]["real"]
    assert [difference[key] for key in ("difference", "low", "high")] == pytest.approx([100.0] * 3)
    assert (difference["outcome"], difference["seeds"]) == ("helps", 2)
    assert half["figures"]["few"] == {"mean": 100.0, "spread": 0.0, "n": 2}
    assert group_accuracy(class_accuracy(wrong, labels, 10), groups)["all"] == real["figures"]["all"]["mean"] == 0.0
    assert column_of(study, data["real"]) == "few"
    elsewhere = {**data, "real": replace(data["real"], kept_sha256="of other images")}
    assert rows_of(study, [arm for arm in arms if arm.name in ("real", "half")], elsewhere, predicted)["half"][0]["against"] == {}


def test_a_sweep_is_a_curve_of_all_classes(finished: tuple[Path, dict[str, Any]]) -> None:
    (curve,) = finished[1]["curves"]
    assert [point["x"] for point in curve["points"]] == [0.1, 0.2]
    for point in curve["points"]:
        assert math.isclose(point["mean"], arm_of(finished[1], f"s-{point['x']:g}")["rows"][0]["figures"]["all"]["mean"])


def test_the_page_shows_every_arm_and_a_sheet_of_what_was_made(finished: tuple[Path, dict[str, Any]]) -> None:
    out, document = finished
    page = (out / run.PAGE).read_text(encoding="utf-8")
    assert all(arm["title"] in page for arm in document["arms"])
    assert arm_of(document, "half")["sheet_png"]
    assert arm_of(document, "real")["sheet_png"] is None


def test_a_lane_that_was_cut_short_goes_on(
    study: Study, arms: tuple[Arm, ...], tmp_path: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    (lane,) = (finished[0] / "lanes").glob("seed0-*")
    copy = tmp_path / lane.name
    shutil.copytree(lane, copy)
    arm = next(arm for arm in arms if arm.name == "half").seeded(0)
    record = copy / lanes.RECORDS / f"{lanes.images_digest(arm)}.json"
    before = store.read_json(record)
    record.unlink()
    assert lanes.made(copy, arm) is None
    lanes.make_lane(copy, [arm], "cpu", silent)
    again = lanes.made(copy, arm)
    assert again is not None
    assert (again.plan, list(again.counts)) == (before["plan"], before["counts"])


def test_a_lane_is_as_far_as_its_operations_are_and_what_arms_share_counts_once(arms: tuple[Arm, ...]) -> None:
    by_name, data = {arm.name: arm for arm in arms}, run.prepare_arms(arms)["half"]
    half, other = (by_name[name].seeded(0) for name in ("half", "s-0.2"))
    parts, images = lanes.parts_of(half, data), lanes.parts_of(other, data)["synth"][1]
    source, target, guide, synth = (parts[name][1] for name in ("source", "target", "guide", "synth"))
    whole = source + target + guide + synth + images
    assert lanes.operations((half, other), data) == pytest.approx(whole), "the networks are the same"

    heard: list[float] = []
    share = lanes.Share((half, other), data, lambda what, done, total, _: heard.append(done / total))
    first, second = share.of(half), share.of(other)
    first("source", 2, 4, {})
    first("export", 1, 1, {})  # takes no operations
    first("synth", 0, 8, {})
    second("source", 4, 4, {})
    second("synth", 8, 8, {})
    trained = source + target + guide
    expected = [source / 2 / whole, trained / whole, trained / whole, (trained + images) / whole]
    assert heard == pytest.approx(expected, abs=0.0006)
