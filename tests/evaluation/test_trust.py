"""Likeness to real images: good ones are told from bad ones, classes count alike, and what cannot be measured is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from engines.data.decode import Frame
from engines.data.images import ArrayReader, ImageSet, Shelf
from engines.data.longtail import LongTail
from engines.evaluation import trust as module
from engines.evaluation.fidelity import fit, frechet_distance
from engines.evaluation.judge import Judge
from engines.evaluation.kernel_distance import kernel_distance
from engines.evaluation.synthetic import ExtraImages
from engines.evaluation.trust import Trust, judge_images

NAMES = ("one", "two", "three")


def images(labels: np.ndarray, seed: int, middle: float = 0.0) -> np.ndarray:
    """(N, 2, 2, 1) uint8, of each class around a gray of its own; `middle` moves them."""
    random = np.random.default_rng(seed)
    values = 60 + 50 * labels[:, None, None, None] + middle + 12 * random.standard_normal((len(labels), 2, 2, 1))
    return values.clip(0, 255).round().astype(np.uint8)


def image_set(labels: np.ndarray, seed: int) -> ImageSet:
    return ImageSet(labels, NAMES, Shelf(ArrayReader(images(labels, seed), "toy"), Frame(2, 1)))


@pytest.fixture
def longtail() -> LongTail:
    train, test = image_set(np.repeat([0, 1, 2], [40, 12, 5]), 0), image_set(np.repeat([0, 1, 2], 40), 1)
    return LongTail(train, test, train, np.array([40, 12, 5]), ("many", "medium", "few"), "0" * 64)


def gray(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A judge's look: pixels as features, the nearest gray as the class."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float64)
    return flat, np.clip(np.round((flat.mean(1) - 60) / 50), 0, 2).astype(np.int64)


JUDGE = Judge("gray", "d", gray)
Judged = Callable[..., Trust]


@pytest.fixture
def judged(longtail: LongTail) -> Judged:
    """judged(classes, counts, seed, middle): the trust in images like the real ones, or moved."""

    def found(classes: list[int], counts: list[int], seed: int = 2, middle: float = 0.0) -> Trust:
        labels = np.repeat(classes, counts)
        return judge_images(JUDGE, longtail, ExtraImages(images(labels, seed, middle), labels))

    return found


def test_images_like_the_real_ones_score_what_real_ones_do(judged: Judged) -> None:
    found = judged([1, 2], [40, 40])
    assert (found.images, found.reference, found.reference_set, found.classes) == (80, 80, "test", 2)
    assert found.frechet is not None
    assert abs(found.frechet.value - found.frechet.floor) < 4 * found.frechet.floor_spread
    assert found.kid is not None
    assert found.kid.low < 0 < found.kid.high
    assert found.hit_rate > 95
    assert found.diversity == pytest.approx(1, abs=0.15)
    assert found.coverage is not None
    assert found.coverage > 0.85
    assert found.real_or_synthetic is not None
    assert found.real_or_synthetic.low < 50 < found.real_or_synthetic.high


def test_images_moved_off_the_real_ones_are_seen_by_every_measure(judged: Judged) -> None:
    good, bad = judged([1, 2], [40, 40]), judged([1, 2], [40, 40], middle=25)
    assert bad.frechet is not None
    assert good.frechet is not None
    assert bad.frechet.low > good.frechet.high
    assert bad.kid is not None
    assert bad.kid.low > 0
    for share in ("precision", "density", "coverage", "hit_rate"):
        assert getattr(bad, share) < getattr(good, share)
    assert bad.real_or_synthetic is not None
    assert bad.real_or_synthetic.low > 80


def test_every_class_counts_alike_however_many_images_it_has(judged: Judged, longtail: LongTail) -> None:
    found = judged([0, 1], [90, 6])
    labels = np.repeat([0, 1], [90, 6])
    seen, real = gray(images(labels, 2))[0], gray(longtail.test.pixels(np.arange(80)))[0]
    weights = np.repeat([1 / 90, 1 / 6], [90, 6])
    assert found.frechet is not None
    assert found.frechet.value == pytest.approx(frechet_distance(fit(seen, weights), fit(real)))
    assert found.kid is not None
    assert found.kid.value == pytest.approx(kernel_distance(seen, real, labels, np.repeat([0, 1], 40)).value)
    assert found.coverage == pytest.approx(np.mean([entry.coverage for entry in found.per_class]))


def test_a_class_of_one_image_is_judged_by_its_label_alone(judged: Judged) -> None:
    found = judged([1, 2], [30, 1])
    assert found.classes == 1
    lone = found.per_class[1]
    assert (lone.images, lone.diversity, lone.coverage) == (1, None, None)
    assert lone.hit_rate in (0.0, 100.0)
    nothing = judged([2], [1])
    assert (nothing.classes, nothing.frechet, nothing.kid, nothing.precision, nothing.real_or_synthetic) == (0, None, None, None, None)


def test_without_test_images_of_a_class_the_training_images_stand_in(longtail: LongTail) -> None:
    labels = np.repeat([1, 2], 20)
    without = replace(longtail, test=longtail.test.subset(np.arange(80)))  # of classes 0 and 1
    found = judge_images(JUDGE, without, ExtraImages(images(labels, 2), labels))
    assert (found.reference, found.reference_set) == (17, "train")
    assert found.real_or_synthetic is None, "a judge has learned its own training images"


def test_the_document_is_plain_json_and_names_its_features(judged: Judged) -> None:
    found = json.loads(json.dumps(judged([1, 2], [9, 9]).to_json(), allow_nan=False))
    assert found["extractor"] == {"name": "gray", "digest": "d", "is_fid": False}
    assert set(found["frechet"]) == {"value", "low", "high", "floor", "floor_spread"}
    assert set(found["kid"]) == {"value", "low", "high"}
    assert [entry["name"] for entry in found["per_class"]] == ["two", "three"]
    assert found["neighbors"] == {"precision": 3, "recall": 3, "density": 5, "coverage": 5}


def test_only_the_published_features_give_a_distance_the_name_of_fid(judged: Judged) -> None:
    found = judged([1], [9])
    assert found.distance == "Frechet distance in the features of gray"
    assert replace(found, judge=replace(JUDGE, is_fid=True)).distance == "FID"


def test_copies_that_were_found_before_are_taken_over(longtail: LongTail) -> None:
    labels = np.repeat([1, 2], 5)
    copies = {"classes": [{"class": "three", "pixel": {"images": 5, "copies": 2}}]}
    found = judge_images(JUDGE, longtail, ExtraImages(images(labels, 2), labels), copies)
    assert [entry.copies for entry in found.per_class] == [None, 2]


def test_of_very_many_images_as_many_of_each_class_are_judged(longtail: LongTail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IMAGES", 30)
    labels = np.repeat([1, 2], [200, 12])
    found = judge_images(JUDGE, longtail, ExtraImages(images(labels, 2), labels))
    assert (found.images, found.reference) == (15 + 12, 30)
    assert [entry.images for entry in found.per_class] == [200, 12], "of all that were made"
