"""The check of a data set: what it finds in trees made for it, and that its list of images to leave out is obeyed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines import store
from engines.checking import likeness, scan
from engines.checking.check import Checked, check
from engines.checking.page import render
from engines.data.longtail import prepare
from engines.data.sources import load as load_images
from engines.errors import DataError
from engines.recipe import Recipe, load

Encoded = Callable[..., bytes]
BASE = ("data.source=folder", "data.image_size_px=32", "data.profile=as-is", "data.groups=ranks", "data.group_sizes=[1,1,1]")


def recipe(*settings: str) -> Recipe:
    return load('name = "x"', (*BASE, *settings))


def faults(found: Checked) -> dict[str, str]:
    return {fault.what: fault.level for fault in found.faults}


def pairs(found: Checked) -> set[tuple[str, str, str]]:
    return {(pair["relation"], *sorted(pair["images"])) for pair in found.to_json()["pairs"]}


def test_a_sound_data_set_has_no_finding(photos: Path) -> None:
    found = check(recipe(), photos)
    assert (found.faults, found.scan.bad, found.scan.cut, len(found.pairs)) == ((), {}, [], 0)
    assert found.problems(strict=True) == []
    first = found.classes[0]
    assert (first.name, first.train, first.test, first.kept, first.group) == ("ant", 6, 2, 6, "many")
    assert found.sizes() == {(48, 48): 24}
    assert found.forms() == {("PNG", "RGB"): 24}
    json.dumps(found.to_json(), allow_nan=False)


def spoil(photos: Path, encoded: Encoded) -> set[str]:
    """Bad files of every kind; their names in lists."""
    train = photos / "train" / "ant"
    whole = encoded(1, "PNG")
    (train / "cut.png").write_bytes(whole[: len(whole) // 2])
    (train / "half.jpg").write_bytes(encoded(1, "JPEG")[:300])
    (train / "empty.png").write_bytes(b"")
    (train / "page.jpg").write_text("<html></html>")
    (train / "figure.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (train / "dangling.png").symlink_to(photos / "nowhere")
    (train / "loop.png").symlink_to(train / "loop.png")
    (train / "folder.png").mkdir()
    os.mkfifo(train / "pipe.png")
    (photos / "test" / "ant" / f"{'n' * 200}.png").write_bytes(whole[:20])
    Path(os.fsdecode(os.fsencode(train) + b"/\xff.png")).write_bytes(whole[:99])
    names = ["cut.png", "half.jpg", "empty.png", "page.jpg", "figure.png", "dangling.png", "loop.png", "pipe.png", "\\udcff.png"]
    return {f"train/ant/{name}" for name in names} | {f"test/ant/{'n' * 200}.png"}


@pytest.mark.timeout(60)
def test_every_bad_file_is_found_and_none_stops_the_check(photos: Path, encoded: Encoded) -> None:
    expected = spoil(photos, encoded)
    found = check(recipe(), photos)
    table = found.to_json()
    assert {row["image"] for row in table["unreadable_images"]} == expected
    assert {row["kind"] for row in table["unreadable_images"]} == {"damaged", "empty", "not an image", "not a file"}
    assert (table["classes"][0]["train"], table["classes"][0]["bad"]) == (6, 10)
    assert "cannot be read" in found.problems()[0][0]


def test_bad_images_that_the_recipe_skips_stop_only_a_strict_check(photos: Path, encoded: Encoded) -> None:
    spoil(photos, encoded)
    found = check(recipe("data.on_bad_image=skip"), photos)
    assert found.problems() == []
    assert len(found.problems(strict=True)) == 1


def copies(photos: Path, encoded: Encoded) -> set[tuple[str, str, str]]:
    """A leak and a repeat saved again as JPEG, a conflict of the same bytes: as `pairs` tells them."""
    (photos / "test" / "ant" / "again.jpg").write_bytes(encoded(1, "JPEG", quality=70))
    (photos / "train" / "ant" / "again.jpg").write_bytes(encoded(2, "JPEG", quality=70))
    shutil.copy(photos / "train" / "bee" / "3.png", photos / "train" / "cat" / "copy.png")
    return {
        ("leak", "test/ant/again.jpg", "train/ant/1.png"),
        ("repeat", "train/ant/2.png", "train/ant/again.jpg"),
        ("conflict", "train/bee/3.png", "train/cat/copy.png"),
    }


def test_copies_are_found_within_a_class_across_classes_and_across_splits_and_nothing_else(photos: Path, encoded: Encoded) -> None:
    expected = copies(photos, encoded)
    found = check(recipe(), photos)
    assert pairs(found) == expected
    assert found.problems() == []
    assert len(found.problems(strict=True)) == 3
    same = {pair["relation"] for pair in found.to_json()["pairs"] if pair["same_bytes"]}
    assert same == {"conflict"}
    assert {pair[0] for pair in pairs(check(recipe(), photos, near=False))} == {"conflict"}


def test_what_is_left_out_makes_a_strict_check_pass_and_moves_no_other_image(photos: Path, encoded: Encoded, tmp_path: Path) -> None:
    copies(photos, encoded)
    spoil(photos, encoded)
    shutil.copy(photos / "train" / "ant" / "1.png", photos / "train" / "ant" / "one_more.png")  # leaks as its twin does
    found = check(recipe(), photos)
    before = sorted(path for path in photos.rglob("*") if not path.is_dir())
    listed = found.quarantine(("unreadable", "leaks", "conflicts", "repeats"))
    store.write_json(tmp_path / "out.json", listed.to_json())
    assert {name for name, why in listed.left_out.items() if not why.startswith("unreadable")} == {
        "train/ant/1.png",
        "train/ant/one_more.png",
        "train/ant/again.jpg",
        "train/bee/3.png",
        "train/cat/copy.png",
    }
    clean = recipe(f"data.quarantine={tmp_path / 'out.json'}")
    again = check(clean, photos)
    assert again.problems(strict=True) == []
    assert int(again.left_out.sum()) == len(listed.left_out)
    train, test = load_images(clean.data, photos)
    assert (len(train), len(test)) == (16, 7)
    assert train.pixels(np.arange(len(train))).shape == (16, 32, 32, 3)
    assert sorted(path for path in photos.rglob("*") if not path.is_dir()) == before


def test_a_list_changes_what_a_run_knows_its_data_by(photos: Path, encoded: Encoded, tmp_path: Path) -> None:
    copies(photos, encoded)
    store.write_json(tmp_path / "out.json", check(recipe(), photos).quarantine(("leaks",)).to_json())
    plain = prepare(recipe().data, photos)
    clean = prepare(recipe(f"data.quarantine={tmp_path / 'out.json'}").data, photos)
    assert plain.kept_sha256 != clean.kept_sha256
    assert (plain.summary()["quarantined_images"], clean.summary()["quarantined_images"]) == (0, 1)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_file_that_changed_since_the_check_is_told_and_the_policy_obeyed(
    photos: Path, encoded: Encoded, tmp_path: Path, policy: str
) -> None:
    store.write_json(tmp_path / "out.json", check(recipe(), photos).quarantine(()).to_json())
    (photos / "train" / "bee" / "2.png").write_bytes(encoded(999))
    settings = recipe(f"data.quarantine={tmp_path / 'out.json'}", f"data.on_bad_image={policy}")
    found = check(settings, photos)
    assert [(found.names[i], bad.kind) for i, bad in found.scan.bad.items()] == [("train/bee/2.png", "changed")]
    train, _ = load_images(settings.data, photos)
    if policy == "error":
        with pytest.raises(DataError, match=r"train/bee/2\.png has changed since it was checked"):
            train.pixels(np.array([0]))
    else:
        assert (len(train), train.skipped) == (17, 1)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "x"}', '{"format": "diffrc-quarantine-1", "leave_out": {"a": 1}, "sha256": {}}']
)
def test_what_is_no_list_is_refused_with_the_command_that_writes_one(photos: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "out.json").write_text(content)
    with pytest.raises(DataError) as error:
        load_images(recipe(f"data.quarantine={tmp_path / 'out.json'}").data, photos)
    assert "diffrc data check --quarantine" in error.value.remedy


def test_copies_leak_across_a_held_out_split_too(photos: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(photos / "train", whole)
    for i in range(6):
        shutil.copy(whole / "ant" / f"{i}.png", whole / "ant" / f"copy{i}.png")
    settings = recipe("data.test_per_class=3")
    found = check(settings, whole)
    train, test = load_images(settings.data, whole)
    assert [int(found.for_test.sum()), len(found.for_test)] == [len(test), len(train) + len(test)]
    held = {Path(test.origin(i)).name for i in range(len(test)) if "/ant/" in test.origin(i)}
    expected = {i for i in range(6) if (f"{i}.png" in held) != (f"copy{i}.png" in held)}
    assert expected
    assert {Path(name).name for kind, name, _ in pairs(found) if kind == "leak"} <= {f"{i}.png" for i in range(6)}
    assert found.count("leak") == len(expected)
    assert found.count("repeat") == 6 - len(expected)


def test_the_held_out_split_is_the_loaders_with_images_skipped_and_left_out(photos: Path, encoded: Encoded, tmp_path: Path) -> None:
    whole = photos / "train"
    for name in ("0", "55", "7"):
        (whole / "ant" / f"{name}bad.png").write_bytes(b"x")
    plain = recipe("data.test_per_class=3", "data.on_bad_image=skip")
    for settings in (plain, recipe("data.test_per_class=3", "data.on_bad_image=skip", f"data.quarantine={tmp_path / 'out.json'}")):
        found = check(settings, whole)
        train, test = load_images(settings.data, whole)
        used = [i for i in np.flatnonzero(~found.left_out).tolist() if i not in found.scan.bad]
        assert {found.names[i] for i in used if found.for_test[i]} == {test.origin(i).removeprefix(f"{whole}/") for i in range(len(test))}
        assert sum(not found.for_test[i] for i in used) == len(train)
        store.write_json(tmp_path / "out.json", found.quarantine(("unreadable",)).to_json())


def test_trees_that_training_would_refuse_are_told_all_at_once(photos: Path) -> None:
    (photos / "train" / "dog").mkdir()
    shutil.copytree(photos / "train" / "ant", photos / "test" / "elk")
    shutil.rmtree(photos / "test" / "bee")
    (photos / "train" / "cat" / "notes.heic").write_bytes(b"x")
    (photos / "train" / "lost.png").write_bytes(b"x")
    for i in range(1, 6):
        (photos / "train" / "bee" / f"{i}.png").unlink()
    found = check(recipe(), photos)
    assert faults(found) == {
        "empty class": "error",
        "unknown test class": "error",
        "no test image": "warning",
        "one training image": "warning",
        "not images by name": "warning",
        "outside of classes": "warning",
    }
    assert [c.name for c in found.classes] == ["ant", "bee", "cat"]
    assert [c.test for c in found.classes] == [2, 0, 2]


def test_one_class_and_classes_named_alike_are_told(photos: Path) -> None:
    for split in ("train", "test"):
        for name in ("bee", "cat"):
            shutil.rmtree(photos / split / name)
    assert faults(check(recipe(), photos))["one class"] == "error"
    shutil.copytree(photos / "train" / "ant", photos / "train" / "Ant_")
    assert faults(check(recipe(), photos))["names alike"] == "warning"


def test_a_data_set_of_nothing_but_bad_images_is_told(photos: Path) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(b"no image")
    found = check(recipe(), photos)
    assert (len(found.scan.bad), len(found.pairs), found.sizes(), found.smaller()) == (24, 0, {}, 0)
    assert faults(found)["no training image"] == "error"
    assert "Images that cannot be read" in render(found)
    json.dumps(found.to_json(), allow_nan=False)


def test_a_class_too_small_to_hold_images_out_of_is_told_and_looked_at(photos: Path) -> None:
    found = check(recipe("data.test_per_class=6"), photos / "train")
    assert faults(found)["too small to hold images out"] == "error"
    assert found.looked_at == 18


def test_a_place_that_holds_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no class folder"):
        check(recipe(), tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        check(recipe(), tmp_path / "nowhere")


def test_lists_and_tables_are_checked_alike(photos: Path, encoded: Encoded, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    copies(photos, encoded)
    for split in ("train", "test"):
        files = sorted((photos / split).rglob("*.*"))
        lines = [f"{file.relative_to(photos)} {('ant', 'bee', 'cat').index(file.parent.name)}" for file in files]
        (photos / f"{split}.txt").write_text("\n".join(lines))
        columns = {"image": [file.read_bytes() for file in files], "label": [file.parent.name for file in files]}
        pq.write_table(pa.table(columns), tmp_path / f"{split}-00000-of-00001.parquet")
    of_list, of_table = (check(recipe(f"data.source={kind}"), path) for kind, path in (("list", photos), ("parquet", tmp_path)))
    assert {kind: of_list.count(kind) for kind in ("leak", "conflict", "repeat")} == {"leak": 1, "conflict": 1, "repeat": 1}
    assert np.array_equal(of_list.relations, of_table.relations)
    assert of_list.names[0] == "train/ant/0.png"
    assert of_table.names[0] == "row 0 of train-00000-of-00001.parquet"


def test_the_same_light_and_shade_over_different_details_is_no_copy(photos: Path, picture: Callable[..., Image.Image]) -> None:
    shade = np.where(np.arange(48)[:, None, None] < 24, 200.0, 50.0)
    for k, number in enumerate((900, 901)):
        pixels = shade + (np.asarray(picture(number)).astype(np.float64) - 128) * 0.2
        for form in ("png", "jpg"):
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(photos / "train" / "ant" / f"shade{k}.{form}")
    assert pairs(check(recipe(), photos)) == {("repeat", f"train/ant/shade{k}.jpg", f"train/ant/shade{k}.png") for k in (0, 1)}


def test_digits_of_eight_pixels_are_not_taken_for_copies_of_one_another() -> None:
    """Of 1.6 million pairs of handwritten digits one is near: two ones that differ by at most 3 of 16 gray levels anywhere."""
    found = check(load('name = "x"', ("data.head_count=20", "data.imbalance=2.0")), None)
    assert (found.looked_at, len(found.classes)) == (1797, 10)
    assert [pair["images"] for pair in found.to_json()["pairs"]] == [["the digits (image 1585)", "the digits (image 1648)"]]


def test_several_processes_find_what_one_finds(photos: Path, encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    copies(photos, encoded)
    spoil(photos, encoded)
    alone = check(recipe(), photos).to_json()
    monkeypatch.setattr(scan, "ALONE_SECONDS", -1.0)
    monkeypatch.setattr(scan, "BATCH_IMAGES", 8)
    together = check(recipe(), photos, workers=2).to_json()
    for table in (alone, together):
        del table["seconds"], table["workers"]
    assert together == alone


def test_of_too_many_candidates_those_with_the_nearest_hashes_are_compared_and_the_rest_is_told(
    photos: Path, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies(photos, encoded)
    for quality in (30, 90, 95):
        (photos / "train" / "ant" / f"q{quality}.jpg").write_bytes(encoded(2, "JPEG", quality=quality))
    monkeypatch.setattr(likeness, "MAX_CANDIDATES", 3)
    found = check(recipe(), photos).pairs
    assert found.compared == 3
    assert found.left_out == 1 + 5 * 4 // 2 - 3
