"""The embedded digits, and the way to every other source."""

import importlib.util

import numpy as np
import pytest
from sklearn.datasets import load_digits

from engines.data.sources import load
from engines.errors import DataError
from engines.recipe import DataSection

DIGITS = DataSection(image_size_px=8, image_channels=1)


@pytest.mark.parametrize("by", ["the file", "the loader"])
def test_the_digits_are_all_there_once_by_their_file_and_by_scikit_learns_loader(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "the loader":
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    train, test = load(DIGITS, None)
    pixels = np.concatenate([s.pixels(np.arange(len(s))) for s in (train, test)]).reshape(1797, -1)
    original = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, original))
    assert train.names[0] == "zero"
    assert pixels.max() == 255


def test_the_held_out_digits_are_the_same_at_every_call_and_for_every_tail() -> None:
    first, second = load(DIGITS, None)[1], load(DIGITS.model_copy(update={"profile_seed": 5, "imbalance": 3.0}), None)[1]
    assert (first.pixels(np.arange(500)) == second.pixels(np.arange(500))).all()


def test_digits_can_be_larger_and_in_color() -> None:
    train, _ = load(DataSection(image_size_px=32, image_channels=3), None)
    pixels = train.pixels(np.arange(3))
    assert pixels.shape == (3, 32, 32, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_holding_out_more_digits_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match="class 'eight' has 174 images") as error:
        load(DIGITS.model_copy(update={"test_per_class": 180}), None)
    assert "data.test_per_class=43" in error.value.remedy
