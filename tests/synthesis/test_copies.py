"""Copies: what is planted is found, what is usual gives no alarm, and neither order nor threads nor rounding change a finding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engines import store
from engines.data.decode import Frame, Pixels
from engines.data.images import ArrayReader, ImageSet, Shelf
from engines.errors import Interrupted
from engines.interrupt import StopRequest
from engines.recipe import Recipe, load
from engines.synthesis import copies as module
from engines.synthesis.copies import Copies, Finding, Share, exceeds, find_copies
from engines.synthesis.plan import Plan
from engines.synthesis.sheet import Record, encode_png, pixels_sha256
from engines.synthesis.shelf import Shelf as Folder

NAMES = ("cat", "dog")

# -------------------------------------------------------------------------------------------------------------- a folder


def noise(count: int, seed: int, size: int = 8) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def images_of(pixels: Pixels, labels: Sequence[int]) -> ImageSet:
    shelf = Shelf(ArrayReader(pixels, "the set"), Frame(pixels.shape[1], 3))
    return ImageSet(np.array(labels, dtype=np.int64), NAMES, shelf)


def recipe_of(*overrides: str) -> Recipe:
    size = ("data.image_size_px=8", "unet.channel_mult=[1]", "unet.attention_resolutions=[]", "guide.channel_mult=[1]")
    return load('name = "test"', (*size, "source.horizontal_flip=false", "target.horizontal_flip=false", *overrides))


def folder_of(path: Path, generated: dict[int, Pixels], rejected: Sequence[tuple[int, int]] = ()) -> Folder:
    size = next(iter(generated.values())).shape[1]
    folder = Folder(path, Plan({"classes": list(NAMES), "image": [3, size, size]}, {}), {})
    for k, pixels in generated.items():
        folder.images[k] = {}
        for i, image in enumerate(pixels):
            record = Record("p", k, NAMES[k], i, 0, pixels_sha256(image), "{}", dropped="confidence" if (k, i) in rejected else "")
            store.write_bytes(path / record.path(), encode_png(image, record))
            folder.images[k][i] = record
    return folder


def check(path: Path, generated: dict[int, Pixels], train: ImageSet, *overrides: str, guide: Any = None, **more: Any) -> Copies:
    found = find_copies(folder_of(path, generated, **more), train, guide, recipe_of(*overrides))
    assert found is not None
    return found


def pixel(found: Copies, row: int = 0) -> Finding:
    return found.classes[row].findings["pixel"]


REAL = images_of(noise(30, 1), [0] * 20 + [1] * 10)


def test_images_of_their_own_are_no_copies_and_give_no_warning(tmp_path: Path) -> None:
    found = check(tmp_path, {0: noise(10, 2), 1: noise(10, 3)}, REAL)
    assert [c.name for c in found.classes] == ["cat", "dog"]
    assert all(pixel(found, row).generated == Share(0, 10) for row in (0, 1))
    assert found.usual["pixel"] == Share(0, 30)
    assert found.warnings(REAL) == []
    assert min(pair.ratio for pair in pixel(found).pairs) > 0.5


def test_an_exact_copy_is_found_with_its_original_whatever_the_original_s_class(tmp_path: Path) -> None:
    generated = noise(10, 2)
    generated[4], generated[7] = REAL.pixels(np.array([13, 25]))
    finding = pixel(check(tmp_path, {0: generated}, REAL))
    assert finding.generated == Share(2, 10)
    assert [(pair.generated.index, pair.real, pair.distance, pair.ratio) for pair in finding.pairs[:2]] == [(4, 13, 0, 0), (7, 25, 0, 0)]
    assert finding.warns


def test_a_near_copy_is_found_at_its_distance(tmp_path: Path) -> None:
    generated = noise(10, 2)
    generated[4] = REAL.pixels(np.array([13]))[0]
    generated[4, 0, 0, 0] ^= 8  # eight gray levels of 255 in one value
    finding = pixel(check(tmp_path, {0: generated}, REAL))
    assert finding.generated.copies == 1
    assert (finding.pairs[0].real, finding.pairs[0].distance) == (13, pytest.approx(8 / 127.5))


@pytest.mark.parametrize("stage", ["source", "target"])
def test_a_mirrored_copy_is_one_where_the_training_flips(stage: str, tmp_path: Path) -> None:
    generated = noise(10, 2)
    generated[4] = REAL.pixels(np.array([13]))[0][:, ::-1]
    assert pixel(check(tmp_path / "a", {0: generated}, REAL)).generated.copies == 0
    finding = pixel(check(tmp_path / "b", {0: generated}, REAL, f"{stage}.horizontal_flip=true"))
    assert finding.generated.copies == 1
    assert (finding.pairs[0].real, finding.pairs[0].mirrored, finding.pairs[0].ratio) == (13, True, 0.0)


def test_dropped_images_take_no_part_and_a_ratio_of_zero_leaves_everything_out(tmp_path: Path) -> None:
    generated = noise(10, 2)
    generated[4] = REAL.pixels(np.array([13]))[0]
    assert pixel(check(tmp_path / "a", {0: generated}, REAL, rejected=[(0, 4)])).generated == Share(0, 9)
    assert find_copies(folder_of(tmp_path / "b", {0: generated}), REAL, None, recipe_of("select.copy_ratio=0.0")) is None
    assert not list((tmp_path / "b").glob("copies.*"))


@pytest.mark.parametrize("flips", [False, True])
def test_duplicates_of_the_data_count_as_one_image_and_hide_no_copy(flips: bool, tmp_path: Path) -> None:
    """A data set that holds each image three times, the third time mirrored."""
    pixels = REAL.pixels(np.arange(30))
    train = images_of(np.concatenate([pixels, pixels, pixels[:, :, ::-1]]), [0] * 20 + [1] * 10 + [0] * 20 + [1] * 10 + [0] * 20 + [1] * 10)
    generated = noise(10, 2)
    generated[4] = pixels[13]
    found = check(tmp_path, {0: generated}, train, f"source.horizontal_flip={str(flips).lower()}")
    assert pixel(found).generated.copies == 1
    assert (found.real_images, found.duplicates) == ((30, 60) if flips else (60, 30))
    assert found.usual["pixel"].copies == 0
    assert pixel(found).warns


def test_a_data_set_of_near_duplicates_is_as_usual_as_its_images(tmp_path: Path) -> None:
    """Frames of a film come in pairs that are nearly the same: generated images that are as near are no news."""
    pixels = noise(30, 1)
    twins = pixels.copy()
    twins[:, 0, 0, 0] ^= 4
    train = images_of(np.concatenate([pixels, twins]), ([0] * 20 + [1] * 10) * 2)
    found = check(tmp_path / "a", {0: twins[:5]}, images_of(pixels, [0] * 20 + [1] * 10))
    assert pixel(found).warns, "without their twins real images are no copies of each other"
    found = check(tmp_path / "b", {0: twins[:5]}, train)
    assert found.usual["pixel"] == Share(60, 60)
    assert not pixel(found).warns


def test_the_order_of_the_training_images_changes_no_finding(tmp_path: Path) -> None:
    generated = noise(10, 2)
    generated[4] = REAL.pixels(np.array([13]))[0]
    order = np.random.default_rng(0).permutation(30)
    mixed = images_of(REAL.pixels(order), REAL.labels[order].tolist())
    plain, permuted = (check(tmp_path / name, {0: generated}, train) for name, train in (("a", REAL), ("b", mixed)))
    assert pixel(plain).generated == pixel(permuted).generated
    assert [(p.generated.index, p.distance, p.ratio) for p in pixel(plain).pairs] == [
        (p.generated.index, p.distance, p.ratio) for p in pixel(permuted).pairs
    ]
    assert [order[p.real] for p in pixel(permuted).pairs] == [p.real for p in pixel(plain).pairs]


def test_the_check_is_recomputed_to_the_byte_and_says_what_it_compared(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {0: np.concatenate([noise(4, 2), REAL.pixels(np.array([13]))])})
    find_copies(folder, REAL, None, recipe_of(), workers=1)
    files = ("copies.json", "copies.png")
    before = [(tmp_path / name).read_bytes() for name in files]
    find_copies(folder, REAL, None, recipe_of(), workers=3)
    assert [(tmp_path / name).read_bytes() for name in files] == before
    table = store.read_json(tmp_path / "copies.json")
    assert (table["real_images"], table["duplicates"], table["compared_px"], table["mirrored"]) == (30, 0, 8, False)
    assert table["generated"] == {"pixel": {"images": 5, "copies": 1, "share": 0.2}}
    closest = table["classes"][0]["pixel"]["closest"][0]
    assert closest == {
        "file": "cat-0000/000004.png",
        "real": "the set (image 13)",
        "real_class": "cat",
        "mirrored": False,
        "distance": 0.0,
        "ratio": 0.0,
    }
    (warning,) = table["warnings"]
    assert "cat: 20.0 % of 5 images" in warning
    assert "cat-0000/000004.png of the set (image 13)" in warning


def test_large_images_are_compared_at_32_px_and_their_copies_found(tmp_path: Path) -> None:
    train = images_of(noise(12, 1, 80), [0] * 6 + [1] * 6)
    generated = noise(3, 2, 80)
    generated[1] = np.clip(train.pixels(np.array([2]))[0].astype(int) + np.random.default_rng(5).integers(-3, 4, (80, 80, 3)), 0, 255)
    finding = pixel(check(tmp_path, {0: generated}, train, "source.horizontal_flip=true"))
    assert [(pair.generated.index, pair.real) for pair in finding.pairs[:1]] == [(1, 2)]
    assert finding.generated.copies == 1


def test_images_of_other_classes_are_sampled_evenly_in_proportion_to_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OTHERS_LEAST", 4)
    monkeypatch.setattr(module, "OTHERS_MOST", 16)
    compared = [check(tmp_path / str(n), {1: noise(n, 2)}, REAL).real_images for n in (1, 3, 5)]
    assert compared == [10 + 4, 10 + 12, 10 + 16]


def test_a_stopped_check_says_that_the_images_are_there(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.signal_number = 15
    with pytest.raises(Interrupted, match="not yet compared"):
        find_copies(folder_of(tmp_path, {0: noise(2, 2)}), REAL, None, recipe_of(), stop=stop)


# -------------------------------------------------------------------------------------------------------------- features


class Angles(torch.nn.Module):
    """A guide that puts an image on a circle, at the angle `width` * its mark / 255, half a turn on for marks from 128."""

    tau, prototypes, log_prior = 1.0, torch.eye(2), torch.zeros(2)

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        whole, part = ((x[:, 0, 0, i] + 1) / 2 for i in (0, 1))
        angle = (whole + part / 255) * self.width + (whole > 0.5) * math.pi
        return torch.stack([angle.cos(), angle.sin()], 1)


def marked(marks: Sequence[float], seed: int) -> Pixels:
    """Images whose first two values hold a mark: its whole part, and its fraction in 255ths."""
    pixels = noise(len(marks), seed)
    pixels[:, 0, :2, 0] = [(int(mark), int(mark % 1 * 255)) for mark in marks]
    return pixels


def test_a_copy_by_features_need_not_be_one_by_pixels(tmp_path: Path) -> None:
    train = images_of(marked([0, 20, 40, 60, 80, 200, 220, 240], 1), [0] * 5 + [1] * 3)
    found = check(tmp_path, {0: marked([41, 50], 2)}, train, guide=Angles(1.0))
    finding = found.classes[0].findings["feature"]
    assert finding.generated == Share(1, 2)
    assert finding.pairs[0].real == 2
    assert finding.pairs[0].ratio == pytest.approx(1 / 19, rel=1e-2)
    assert pixel(found).generated.copies == 0


def test_a_class_that_is_compared_in_parts_is_found_the_same_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = images_of(marked(np.linspace(0, 250, 20).tolist(), 1), [0] * 20)
    folder = folder_of(tmp_path, {0: marked(np.linspace(3, 253, 150).tolist(), 2)})
    find_copies(folder, train, Angles(1.0), recipe_of())  # type: ignore[arg-type]
    files = [(tmp_path / name).read_bytes() for name in ("copies.json", "copies.png")]
    monkeypatch.setattr(module, "COMPARED_ROWS", module.LOOK_ROWS)
    find_copies(folder, train, Angles(1.0), recipe_of())  # type: ignore[arg-type]
    assert [(tmp_path / name).read_bytes() for name in ("copies.json", "copies.png")] == files


def test_features_say_nothing_of_a_class_of_fewer_than_three_real_images(tmp_path: Path) -> None:
    """Its second nearest real image is of another class, half a turn away: every image of the class would be a copy."""
    train = images_of(marked([0, 20, 40, 60, 80, 200, 240], 1), [0] * 5 + [1] * 2)
    found = check(tmp_path, {0: marked([50], 2), 1: marked([220, 230], 3)}, train, guide=Angles(1.0))
    assert list(found.classes[0].findings) == ["pixel", "feature"]
    assert list(found.classes[1].findings) == ["pixel"]
    assert found.usual["feature"].images == 5


def test_a_class_that_the_guide_put_on_one_point_holds_no_copies_by_features(tmp_path: Path) -> None:
    train = images_of(marked([0, 20, 40, 60, 80, 200, 220, 240], 1), [0] * 5 + [1] * 3)
    found = check(tmp_path, {0: marked([10, 30, 50], 2)}, train, guide=Angles(1e-6))
    assert found.classes[0].findings["feature"].generated == Share(0, 3)
    assert found.usual["feature"].copies == 0


def test_a_class_drawn_together_to_a_curve_gives_no_alarm(tmp_path: Path) -> None:
    """A third of honest images are copies by the letter, but no more than of real ones."""
    rng = np.random.default_rng(0)
    train = images_of(marked((127 * rng.random(60)).tolist(), 1), [0] * 60)
    found = check(tmp_path, {0: marked((127 * rng.random(60)).tolist(), 2)}, train, guide=Angles(0.5))
    finding = found.classes[0].findings["feature"]
    assert finding.generated.share > 0.2
    assert not finding.warns


# ---------------------------------------------------------------------------------------------------------- the warning


def test_a_warning_by_features_needs_more_copies_than_chance_explains() -> None:
    assert exceeds(Share(6, 200), Share(0, 1000), 3.0)
    assert not exceeds(Share(6, 200), Share(0, 5), 3.0), "five real images say too little"
    assert not exceeds(Share(6, 200), Share(30, 1000), 3.0)
    assert exceeds(Share(6, 200), Share(0, 5), 0.0)
    assert exceeds(Share(1, 10), Share(0, 0), 3.0)


@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 50), st.integers(0, 50), st.sampled_from([0.0, 3.0]))
def test_no_more_copies_than_is_usual_never_warn(copies: int, images: int, usual: int, real: int, errors: float) -> None:
    generated, real_ones = Share(min(copies, images), images), Share(min(usual, real), real)
    if generated.share <= real_ones.share:
        assert not exceeds(generated, real_ones, errors)


def test_a_few_copies_are_not_worth_a_warning(tmp_path: Path) -> None:
    generated = np.concatenate([noise(9, 2), REAL.pixels(np.array([13]))])
    assert pixel(check(tmp_path / "a", {0: generated}, REAL)).warns
    assert not pixel(check(tmp_path / "b", {0: generated}, REAL, "select.copy_share=0.1")).warns
