"""Replay, and the guards between synthetic images and the test set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.data.decode import Frame
from engines.data.images import ArrayReader, ImageSet, Shelf
from engines.errors import DataError, UsageError
from engines.evaluation.synthetic import ExtraImages, refuse_data_folder, refuse_test_images, replay


def images(labels: np.ndarray) -> ImageSet:
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    return ImageSet(labels, ("a", "b", "c"), Shelf(ArrayReader(pixels, "toy"), Frame(4, 1)))


def test_replay_makes_as_many_duplicates_as_asked_and_uses_every_image_equally_often() -> None:
    train = images(np.array([0, 0, 0, 1, 1, 1, 2]))
    extra = replay(train, np.array([0, 7, 3]), seed=0)
    assert extra.counts(3).tolist() == [0, 7, 3]
    used = np.bincount(extra.pixels[:, 0, 0, 0], minlength=7)
    assert sorted(used[3:6]) == [2, 2, 3]
    assert used[6] == 3
    assert (train.labels[extra.pixels[:, 0, 0, 0]] == extra.labels).all()


def test_replay_of_another_seed_duplicates_other_images_first() -> None:
    train = images(np.zeros(50, np.int64))
    first, second = (replay(train, np.array([5, 0, 0]), seed).pixels for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_a_class_without_real_images_cannot_be_replayed() -> None:
    with pytest.raises(DataError, match="'c' has synthetic images but no real one"):
        replay(images(np.array([0, 1])), np.array([0, 0, 4]), seed=0)


def test_a_synthetic_folder_inside_the_data_set_is_refused_and_one_beside_it_is_not(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "test").mkdir(parents=True)
    with pytest.raises(UsageError, match="lies inside the data set"):
        refuse_data_folder(data / "test" / "synth", data)
    (tmp_path / "link").symlink_to(data / "test")
    with pytest.raises(UsageError):
        refuse_data_folder(tmp_path / "link" / "synth", data)
    refuse_data_folder(tmp_path / "runs" / "synth", data)
    refuse_data_folder(tmp_path / "runs" / "synth", None)


def test_a_synthetic_image_that_is_a_test_image_is_refused() -> None:
    test = images(np.array([0, 1, 2]))
    refuse_test_images(ExtraImages(np.full((2, 4, 4, 1), 9, np.uint8), np.array([0, 1])), test)
    with pytest.raises(DataError, match="1 synthetic images"):
        refuse_test_images(ExtraImages(np.full((2, 4, 4, 1), 2, np.uint8), np.array([0, 1])), test)
