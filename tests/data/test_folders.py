"""Image folders: layouts, names, and trees that cannot be learned from."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.data.sources import load
from engines.errors import DataError
from engines.recipe import DataSection

DATA = DataSection(source="folder", image_size_px=4, image_channels=1, test_per_class=1)


def fill(folder: Path, count: int, first: int = 0, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        Image.new("L", (4, 4), i).save(folder / f"{i}{suffix}", "PNG")


def test_classes_are_sorted_by_name_and_test_images_stay_apart(tmp_path: Path) -> None:
    for number, name in enumerate(["zebra", "ant", "Bee", "10", "2"]):
        fill(tmp_path / "train" / name, 3, 10 * number)
        fill(tmp_path / "test" / name, 2, 100 + 10 * number)
    train, test = load(DATA, tmp_path)
    assert train.names == ("10", "2", "Bee", "ant", "zebra")
    assert train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert train.pixels(np.array([0, 3, 12]))[:, 0, 0, 0].tolist() == [30, 40, 0]
    assert test.pixels(np.array([0, 9]))[:, 0, 0, 0].tolist() == [130, 101]


@pytest.mark.parametrize("held", ["val", "validation"])
def test_a_class_without_test_images_shifts_no_label(tmp_path: Path, held: str) -> None:
    for number, name in enumerate("abc"):
        fill(tmp_path / "train" / name, 2, number)
    fill(tmp_path / held / "c", 2, 50)
    assert load(DATA, tmp_path)[1].labels.tolist() == [2, 2]


@pytest.mark.parametrize("root", ["", "train"])
def test_without_a_test_folder_images_of_each_class_are_held_out(tmp_path: Path, root: str) -> None:
    fill(tmp_path / root / "a", 5)
    fill(tmp_path / root / "b", 3, 100)
    train, test = load(DATA, tmp_path)
    assert (np.bincount(train.labels).tolist(), np.bincount(test.labels).tolist()) == ([4, 2], [1, 1])
    values = [int(v) for s in (train, test) for v in s.pixels(np.arange(len(s)))[:, 0, 0, 0]]
    assert sorted(values) == [0, 1, 2, 3, 4, 100, 101, 102]
    again = load(DATA, tmp_path)[1]
    assert (again.pixels(np.arange(2)) == test.pixels(np.arange(2))).all()


def test_images_may_be_nested_and_have_any_suffix(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "x" / "y", 2, suffix=".JPEG")  # told by content, not by suffix
    fill(tmp_path / "a", 1, 7)
    fill(tmp_path / "b", 3)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._1.png").write_bytes(b"left by another system")
    (tmp_path / ".cache").mkdir()
    train, test = load(DATA, tmp_path)
    assert np.bincount(np.concatenate([train.labels, test.labels])).tolist() == [3, 3]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", 3)
    fill(tmp_path / "data" / "b", 3)
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "elsewhere")
    train, test = load(DATA, tmp_path / "data")
    assert train.names == ("a", "b")
    assert len(train) + len(test) == 6


def test_a_class_of_one_image_is_refused_with_its_name_and_a_remedy(tmp_path: Path) -> None:
    """One photograph a class in class folders: there is nothing left to train on once a test image is held out."""
    for name in ("black_swan", "cheetah", "ringlet"):
        fill(tmp_path / name, 1)
    with pytest.raises(
        DataError, match=r"class 'black_swan' has 1 image \(and 2 more classes have 1 or fewer\); 1 is to be held out"
    ) as error:
        load(DATA, tmp_path)
    assert "add images of it" in error.value.remedy
    assert sorted(p.name for p in tmp_path.iterdir()) == ["black_swan", "cheetah", "ringlet"]


def test_a_small_class_is_refused_with_the_number_that_fits(tmp_path: Path) -> None:
    fill(tmp_path / "a", 9)
    fill(tmp_path / "b", 4)
    with pytest.raises(DataError, match="class 'b' has 4 images; 5 are to be held out") as error:
        load(DATA.model_copy(update={"test_per_class": 5}), tmp_path)
    assert "--set data.test_per_class=1" in error.value.remedy


def test_nothing_held_out_is_an_empty_test_set(tmp_path: Path) -> None:
    fill(tmp_path / "a", 1)
    fill(tmp_path / "b", 1)
    train, test = load(DATA.model_copy(update={"test_per_class": 0}), tmp_path)
    assert (len(train), len(test)) == (2, 0)


def test_trees_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no class folders"):
        load(DATA, tmp_path)
    fill(tmp_path / "test" / "a", 2)
    with pytest.raises(DataError, match="but no train/"):
        load(DATA, tmp_path)
    fill(tmp_path / "train" / "b", 2)
    with pytest.raises(DataError, match=r"class 'a' of .*test is not in"):
        load(DATA, tmp_path)
    (tmp_path / "train" / "a").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        load(DATA, tmp_path)
    (tmp_path / "train" / "a").rmdir()
    fill(tmp_path / "test" / "b", 1)
    for path in (tmp_path / "test" / "a").iterdir():
        path.unlink()
    (tmp_path / "test" / "a").rmdir()
    with pytest.raises(DataError, match="has 1 class; a long tail needs at least two"):
        load(DATA, tmp_path)


def test_a_missing_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(DATA, tmp_path / "nowhere")
    with pytest.raises(DataError, match="needs to know where the images lie"):
        load(DATA, None)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="is a file, not a folder"):
        load(DATA, tmp_path / "file")


@pytest.mark.timeout(20)
def test_odd_files_are_named_or_left_out_and_nothing_hangs(tmp_path: Path) -> None:
    fill(tmp_path / "train" / "a", 3)
    fill(tmp_path / "train" / "b", 3, 10)
    fill(tmp_path / "test" / "a", 1)
    odd = tmp_path / "train" / "a"
    os.mkfifo(odd / "pipe.png")
    (odd / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (odd / "empty.png").write_bytes(b"")
    (odd / "cut.png").write_bytes((odd / "1.png").read_bytes()[:40])
    (odd / "page.jpg").write_text("<html></html>")
    (odd / "folder.png").mkdir()
    train, _ = load(DATA, tmp_path)
    with pytest.raises(DataError, match=r"train/a/\w+\.(png|jpg)"):
        train.pixels(np.array([0]))
    train, _ = load(DATA.model_copy(update={"on_bad_image": "skip"}), tmp_path)
    assert (train.skipped, np.bincount(train.labels).tolist()) == (5, [3, 3])


def test_a_class_with_no_readable_image_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train" / "a", 2)
    fill(tmp_path / "test" / "a", 1)
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "train" / "b" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"class 'b' .* has no training image"):
        load(DATA.model_copy(update={"on_bad_image": "skip"}), tmp_path)


def test_accents_are_one_name_however_a_file_system_spells_them(tmp_path: Path) -> None:
    fill(tmp_path / "train" / unicodedata.normalize("NFD", "café"), 2)
    fill(tmp_path / "train" / "tea", 2)
    fill(tmp_path / "test" / unicodedata.normalize("NFC", "café"), 1)
    train, test = load(DATA, tmp_path)
    assert train.names == (unicodedata.normalize("NFC", "café"), "tea")
    assert test.labels.tolist() == [0]


def test_a_folder_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "a", 2)
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")  # noqa: PTH102 - bytes
    with pytest.raises(DataError, match="not printable UTF-8"):
        load(DATA, tmp_path)


IMAGENET = Path(os.environ.get("DIFFRC_TEST_DATA", "../shared/data")) / "imagenet"


@pytest.mark.skipif(not IMAGENET.is_dir(), reason="needs one photograph a class in $DIFFRC_TEST_DATA/imagenet")
def test_photographs_of_many_sizes_become_squares() -> None:
    data = DataSection(source="folder", image_size_px=64, test_per_class=0)
    train, _ = load(data, IMAGENET)
    assert train.pixels(np.arange(len(train))).shape == (25, 64, 64, 3)
    assert "japanese_spaniel" in train.names
    with pytest.raises(DataError, match="has 1 image"):
        load(data.model_copy(update={"test_per_class": 10}), IMAGENET)
