"""An export is whole or not there, never in the place of anything else, and the same one is not made twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from engines import store
from engines.data.longtail import LongTail, prepare
from engines.errors import ConflictError, DiffRCError, Interrupted, StorageError, UsageError
from engines.sharing import share as sharing
from engines.sharing.layouts import Format
from engines.sharing.share import share
from engines.store import RunFolder

Opened = tuple[RunFolder, LongTail]


@pytest.fixture
def opened(made_copy: Path) -> Opened:
    run = store.open_run(made_copy)
    return run, prepare(run.recipe.data, None)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_the_same_export_again_is_nothing_to_do_even_with_a_card_that_was_edited(layout: Format, opened: Opened, tmp_path: Path) -> None:
    first = share(*opened, tmp_path / "out", layout)
    assert first.written
    assert (sum(first.real), sum(first.synthetic), sum(first.test)) == (102, 124, 40)
    first.card.write_text("mine", encoding="utf-8")
    before = tree(tmp_path / "out")
    second = share(*opened, tmp_path / "out", layout)
    assert not second.written
    assert second.to_json() | {"written": True} == first.to_json()
    assert tree(tmp_path / "out") == before


def test_two_exports_of_one_run_are_equal_byte_by_byte(opened: Opened, tmp_path: Path) -> None:
    for name in ("a", "b"):
        share(*opened, tmp_path / name, "parquet")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert set(tree(tmp_path / "a")) == {
        "README.md",
        "export.json",
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    }


def test_no_test_leaves_the_test_images_out(opened: Opened, tmp_path: Path) -> None:
    shared = share(*opened, tmp_path / "out", "folder", test=False)
    assert sum(shared.test) == 0
    assert not (tmp_path / "out" / "test").exists()
    assert "| test |" not in shared.card.read_text(encoding="utf-8")


def refused(error: type[DiffRCError], opened: Opened, out: Path, layout: Format = "parquet", force: bool = False) -> DiffRCError:
    before = tree(out) if out.is_dir() else None
    with pytest.raises(error) as told:
        share(*opened, out, layout, force=force)
    assert (tree(out) if out.is_dir() else None) == before
    assert not list(out.parent.glob(".*.partial"))
    return told.value


def test_a_folder_of_other_things_a_file_and_a_link_are_refused(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years", encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for force in (False, True):
        assert "'thesis.tex' lies there" in refused(ConflictError, opened, tmp_path / "mine", force=force).problem
        assert "is a file" in refused(ConflictError, opened, tmp_path / "file", force=force).problem
        assert "is a symbolic link" in refused(ConflictError, opened, tmp_path / "link", force=force).problem
    assert share(*opened, tmp_path / "empty", "parquet").written


def test_an_export_that_differs_is_replaced_by_force_alone_and_never_with_other_things_in_it(opened: Opened, tmp_path: Path) -> None:
    out = tmp_path / "out"
    share(*opened, out, "folder")
    told = refused(ConflictError, opened, out, "parquet")
    assert "not the same: the format" in told.problem
    assert "--force" in told.remedy
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    assert "'notes.txt' lies there" in refused(ConflictError, opened, out, "parquet", force=True).problem
    (out / "notes.txt").unlink()
    assert share(*opened, out, "parquet", force=True).written
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "data", "export.json"]


def test_an_export_from_which_images_were_taken_is_no_whole_one(opened: Opened, tmp_path: Path) -> None:
    out = tmp_path / "out"
    share(*opened, out, "folder")
    next((out / "train" / "nine").iterdir()).unlink()
    assert "changed, added or removed" in refused(ConflictError, opened, out, "folder").problem
    assert share(*opened, out, "folder", force=True).written


def test_another_number_of_synthetic_images_is_another_export(opened: Opened, tmp_path: Path) -> None:
    run, longtail = opened
    share(run, longtail, tmp_path / "out", "parquet")
    (run.synth / "nine-0009" / "000000.png").unlink()
    assert "not the same: the synthetic images" in refused(ConflictError, opened, tmp_path / "out").problem


def test_an_export_that_fails_half_way_leaves_nothing_or_what_was_there(opened: Opened, tmp_path: Path) -> None:
    run, longtail = opened
    share(run, longtail, tmp_path / "old", "parquet")
    (run.synth / "nine-0009" / "000005.png").write_bytes(b"damaged")
    for out in (tmp_path / "new", tmp_path / "old"):
        refused(DiffRCError, opened, out, "folder", force=True)
    assert not (tmp_path / "new").exists()


def test_a_signal_ends_an_export_without_a_trace(opened: Opened, tmp_path: Path) -> None:
    def hear(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if done == 10:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="10 of 266 images were written, and removed again"):
        share(*opened, tmp_path / "out", "folder", report=hear)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_what_a_killed_export_left_is_no_hindrance(opened: Opened, tmp_path: Path) -> None:
    store.write_bytes(tmp_path / ".out.partial" / "new" / "train" / "half.png", b"x")
    assert share(*opened, tmp_path / "out", "folder").written
    assert not (tmp_path / ".out.partial").exists()
    assert not list((tmp_path / "out").rglob("half.png"))


def test_a_disk_that_cannot_hold_it_is_told_before_anything_is_written(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "free_bytes", lambda folder: 1000)
    refused(StorageError, opened, tmp_path / "out")


def test_synthetic_images_are_not_put_into_the_data_set_that_they_were_made_from(opened: Opened, tmp_path: Path) -> None:
    run, longtail = opened
    (tmp_path / "data").mkdir()
    recipe = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"path": str(tmp_path / "data")})})
    with pytest.raises(UsageError, match="lies inside the data set"):
        share(RunFolder(run.path, recipe), longtail, tmp_path / "data" / "balanced", "folder")


def test_images_that_are_being_made_are_not_exported_meanwhile(opened: Opened, tmp_path: Path) -> None:
    with store.locked(opened[0].synth):
        assert "in use by another" in refused(ConflictError, opened, tmp_path / "out").problem


def test_cleanlab_files_lie_beside_the_images_and_their_cost_is_told_first(opened: Opened, tmp_path: Path) -> None:
    told: list[str] = []
    shared = share(*opened, tmp_path / "out", "webdataset", cleanlab_folds=2, tell=told.append)
    assert told[0].startswith("cleanlab: 2 recognizers of 4 steps, each on 50 % of the 102 real images")
    ids = json.loads((tmp_path / "out" / "cleanlab" / "ids.json").read_text(encoding="utf-8"))
    assert len(ids["ids"]) == sum(shared.real) + sum(shared.synthetic)
    assert "2 recognizers were each trained" in shared.card.read_text(encoding="utf-8")
    assert not share(*opened, tmp_path / "out", "webdataset", cleanlab_folds=2, tell=told.append).written
    assert len(told) == 1


def test_the_marker_is_the_last_file_and_names_what_fixes_the_bytes(opened: Opened, tmp_path: Path) -> None:
    share(*opened, tmp_path / "out", "webdataset", shard_bytes=50_000)
    marker = store.read_json(tmp_path / "out" / sharing.MARKER_FILE)
    assert marker["format"] == "webdataset"
    assert marker["shard_bytes"] == 50_000
    assert marker["plan"] == store.read_json(opened[0].synth / "plan.json")["plan"]
