"""The JSON files of a run, each value of each replaced by what it never is: a reader takes it or tells of damage, and never stumbles."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import store
from engines.errors import DataError, DiffRCError
from engines.networks import pretrained
from engines.recipe import load
from engines.store import Checkpoint, RunFolder
from engines.synthesis.plan import Plan, check_folder, keep_plan, made_with, make_room, read_plan, require_current
from engines.synthesis.sheet import read_images
from engines.synthesis.shelf import GuidanceLog

JUNK: tuple[Any, ...] = (None, True, -1, 1.5, "x", "../../x", [], [None], {}, {"x": None}, 10**400, [[[]]] * 3)
PLAN = Plan(
    {"classes": ["cat", "dog"], "engine.kind": "onnx", "engine.precision": "fp32", "image": [1, 4, 4]}, {"torch": "2"}, {"target": ""}
)
TABLE = {"names": ["cat", "dog"], "counts": [9, 2], "groups": ["many", "few"], "kept_sha256": "0" * 64}
GUIDANCE = {"batches": 2, "t": [5, 0], "guidance_to_noise": [0.1, 0.2], "scale": [1.0, 1.0], "log_prob": [-1.0, -0.5]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run with a document of each kind."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.chdir(tmp_path)
    made = store.create_run(tmp_path / "runs" / "x", load('name = "x"'))
    made.keep_classes(TABLE)
    made.add_cost("source", 1.0)
    keep_plan(made.synth, PLAN)
    store.write_json(made.synth / "guidance.json", GUIDANCE)
    return made


def spoiled(value: Any) -> Iterator[Any]:
    """A document with one of its values, at any depth, left out or replaced."""
    yield from JUNK
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            without = copy.copy(value)
            del without[key]
            yield without
            for other in spoiled(value[key]):
                changed = copy.copy(value)
                changed[key] = other
                yield changed


READERS: Mapping[str, tuple[Callable[[RunFolder], object], ...]] = {
    "runs/latest.json": (lambda run: store.open_run(None),),
    "runs/x/classes.json": (RunFolder.classes, lambda run: run.keep_classes(TABLE)),
    "runs/x/cost.jsonl": (RunFolder.cost,),
    "runs/x/synth/plan.json": (
        lambda run: read_plan(run.synth),
        lambda run: keep_plan(run.synth, PLAN),
        lambda run: made_with(run.synth),
        require_current,
        lambda run: read_images(run.synth),
        lambda run: check_folder(run.synth),
    ),
    "runs/x/synth/guidance.json": (lambda run: GuidanceLog.open(run.synth),),
}


@pytest.mark.parametrize("file", READERS)
def test_no_value_of_a_document_makes_a_reader_stumble(file: str, run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / file
    good = path.read_bytes()
    for read in READERS[file]:
        if read is not READERS["runs/x/synth/plan.json"][4]:  # there are no images
            read(run)
    path.write_bytes(good)
    seen = refused = 0
    for document in spoiled(json.loads(good)):
        text = json.dumps(document)
        for read in READERS[file]:
            path.write_text(text + "\n", encoding="utf-8")
            seen += 1
            try:
                read(run)
            except DiffRCError as error:
                refused += 1
                assert error.problem and error.remedy
    assert seen > 20
    assert refused > seen // 4


def test_images_of_a_damaged_plan_are_not_set_aside_as_if_they_were_anothers(run: RunFolder) -> None:
    (run.synth / "plan.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"plan\.json is damaged"):
        make_room(run, run.synth, PLAN)
    assert (run.synth / "guidance.json").exists()


def test_the_latest_run_is_beside_the_file_that_names_it(run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "elsewhere")
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), "..", "x/../../elsewhere"):
        (tmp_path / "runs" / "latest.json").write_text(json.dumps({"run": name}), encoding="utf-8")
        with pytest.raises(DiffRCError):
            store.open_run(None)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["/dev/zero", "../../secret", "..", "", "a/b", "missing", "pipe"])
def test_a_manifest_names_files_of_its_own_folder_alone(name: str, tmp_path: Path) -> None:
    path = store.save_checkpoint(tmp_path / "stage", Checkpoint(1, {"model": {"w": torch.ones(2)}}, {}))
    (tmp_path / "secret").write_bytes(b"x")
    os.mkfifo(path / "pipe")
    manifest = store.read_json(path / "MANIFEST.json")
    store.write_json(path / "MANIFEST.json", manifest | {name: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(DataError, match=r"every checkpoint .* is damaged"):
        store.load_checkpoint(tmp_path / "stage")


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_weights_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    for read in (store.read_tensors, pretrained.describe):
        with pytest.raises(DataError, match="not a file"):
            read(tmp_path / "w.safetensors")
