"""What a run has to share: every image once, marked, byte for byte what was made."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines import store
from engines.data.decode import Frame, decode
from engines.data.longtail import prepare
from engines.errors import ConflictError, DataError, UsageError
from engines.sharing.balanced import Balanced, encode_real, open_balanced
from engines.synthesis.sheet import Record, encode_png, image_path, pixels_sha256, read_images


def rows(balanced: Balanced) -> np.ndarray:
    return np.arange(len(balanced.train), dtype=np.int64)


def test_the_training_split_is_every_real_image_and_every_kept_one(digits: Balanced) -> None:
    samples = list(digits.samples(digits.train, rows(digits)))
    pixels, labels = read_images(digits.run.synth)
    real = len(digits.longtail.train)
    assert [sample.synthetic for sample in samples] == [False] * real + [True] * len(labels)
    assert [sample.label for sample in samples] == [*digits.longtail.train.labels, *labels]
    found = np.stack([decode(sample.png, Frame(8, 1), sample.id) for sample in samples])
    assert np.array_equal(found[:real], digits.longtail.train.pixels(np.arange(real)))
    assert np.array_equal(found[real:], pixels)
    assert np.array_equal(found, digits.pixels(digits.train, rows(digits)))
    assert len({sample.id for sample in samples}) == len(samples)


def test_a_synthetic_image_is_the_file_that_was_made_and_says_so_and_a_real_one_says_it_is_not(digits: Balanced) -> None:
    first, *_, last = digits.samples(digits.train, rows(digits))
    assert last.png == (digits.run.synth / image_path("nine", 9, last.index)).read_bytes()
    for sample, told in ((first, "false"), (last, "true")):
        assert Image.open(io.BytesIO(sample.png)).info["synthetic"] == told
        assert sample.file.startswith("synthetic-" if sample.synthetic else "real-")
    assert (last.seed, last.plan, last.group) == (7, digits.plan["plan"], "few")
    assert (first.seed, first.plan, first.weight) == (-1, "", 1.0)
    assert last.weight == digits.run.recipe.recognizer.synthetic_weight


def test_a_balanced_class_has_as_many_images_as_the_largest(digits: Balanced) -> None:
    real, made = (digits.train.counts(10, synthetic=kind) for kind in (False, True))
    assert [a + b for a, b in zip(real, made, strict=True)][3:] == [max(real)] * 7
    assert not digits.test.synthetic.any()


def test_no_image_is_larger_than_its_bound(digits: Balanced, hostile: Balanced) -> None:
    for balanced in (digits, hostile):
        for split in (balanced.train, balanced.test):
            order = np.arange(len(split), dtype=np.int64)
            assert all(len(s.png) <= bound for s, bound in zip(balanced.samples(split, order), split.png_bytes, strict=True))


def test_noise_that_no_png_can_shrink_stays_below_the_bound_of_its_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    values = 300 * (300 * 3 + 1)
    assert values < len(encode_real(pixels, 0, 0)) <= values + values // 1000 + 1024


def test_an_order_is_each_row_once_and_the_same_at_every_call(digits: Balanced) -> None:
    split = digits.train
    for order in (split.shuffled(0), split.by_class(np.arange(10))):
        assert sorted(order) == list(range(len(split)))
    assert np.array_equal(split.shuffled(0), split.shuffled(0))
    assert not np.array_equal(split.shuffled(0), split.shuffled(1))
    ranked = split.labels[split.by_class(np.arange(10)[::-1])]
    assert (np.diff(ranked) <= 0).all()


def test_a_damaged_image_and_one_of_another_plan_are_refused_by_name(made_copy: Path) -> None:
    run = store.open_run(made_copy)
    balanced = open_balanced(run, prepare(run.recipe.data, None))
    path = balanced.synthetic_path(9, 2)
    good = path.read_bytes()
    for bad in (good[:-20], balanced.synthetic_path(8, 2).read_bytes(), encode_real(np.zeros((8, 8, 1), np.uint8), 9, 2)):
        store.write_bytes(path, bad)
        with pytest.raises(DataError, match=r"nine-0009/000002\.png"):
            list(balanced.samples(balanced.train, rows(balanced)))


def test_a_synthetic_image_that_is_a_test_image_is_refused(made_copy: Path) -> None:
    run = store.open_run(made_copy)
    longtail = prepare(run.recipe.data, None)
    balanced = open_balanced(run, longtail)
    stolen = longtail.test.pixels(np.array([3]))[0]
    record = Record(balanced.plan["plan"], 9, "nine", 2, 7, pixels_sha256(stolen), "{}")
    store.write_bytes(balanced.synthetic_path(9, 2), encode_png(stolen, record))
    with pytest.raises(DataError, match="image of the test set"):
        list(balanced.samples(balanced.train, rows(balanced)))


def test_a_run_without_images_of_other_data_or_of_other_networks_shares_nothing(made_copy: Path) -> None:
    run = store.open_run(made_copy)
    longtail = prepare(run.recipe.data, None)
    other = prepare(run.recipe.data.model_copy(update={"profile_seed": 1}), None)
    with pytest.raises(ConflictError, match="kept_sha256 differ"):
        open_balanced(run, other)
    plan = store.read_json(run.synth / "plan.json")
    store.write_json(run.synth / "plan.json", plan | {"stages": {"target": "another@1"}})
    with pytest.raises(ConflictError, match="made by another target"):
        open_balanced(run, longtail)
    shutil.rmtree(run.synth)
    with pytest.raises(UsageError, match="no synthesized images yet"):
        open_balanced(run, longtail)
