"""Accuracy by group, paired intervals and the grid of controls."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from engines.data.decode import Frame
from engines.data.images import ArrayReader, ImageSet, Shelf
from engines.data.longtail import LongTail
from engines.errors import DataError, Interrupted, NumericsError
from engines.evaluation import accuracy
from engines.evaluation.accuracy import (
    COLUMNS,
    VARIANTS,
    Interval,
    Row,
    Table,
    calibration_error,
    class_accuracy,
    class_differences,
    class_purity,
    evaluate,
    group_accuracy,
    paired_difference,
    summarize,
    verdict,
)
from engines.evaluation.synthetic import ExtraImages
from engines.recipe import RecognizerSection
from engines.training import recognizer

SECTION = RecognizerSection(
    architecture="resnet8",
    train_steps=8,
    batch_size=8,
    warmup_steps=2,
    schedule="cosine",
    horizontal_flip=False,
    crop_padding_px=1,
    seeds=2,
)


def rows_of_light(labels: np.ndarray, seed: int) -> np.ndarray:
    """Images whose bright row tells the class: (N, 8, 8, 1) uint8."""
    pixels = np.random.default_rng(seed).integers(0, 60, (len(labels), 8, 8, 1), dtype=np.uint8)
    pixels[np.arange(len(labels)), 1 + 2 * labels] += 180
    return pixels


def image_set(pixels: np.ndarray, labels: np.ndarray) -> ImageSet:
    return ImageSet(labels, ("one", "two", "three"), Shelf(ArrayReader(pixels, "toy"), Frame(8, 1)))


@pytest.fixture
def longtail() -> LongTail:
    pool_labels = np.repeat([0, 1, 2], 12)
    pool = image_set(rows_of_light(pool_labels, 0), pool_labels)
    counts = np.array([12, 6, 3])
    train = pool.subset(np.concatenate([np.flatnonzero(pool_labels == k)[:n] for k, n in enumerate(counts)]))
    test_labels = np.repeat([0, 1, 2], 5)
    return LongTail(train, image_set(rows_of_light(test_labels, 1), test_labels), pool, counts, ("many", "medium", "few"), "0" * 64)


@pytest.fixture
def synthetic() -> ExtraImages:
    labels = np.repeat([1, 2], [6, 9])
    return ExtraImages(rows_of_light(labels, 2), labels)


def test_accuracy_of_a_class_is_its_share_of_right_test_images() -> None:
    labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0])
    np.testing.assert_allclose(class_accuracy(predicted, labels, 3), [75.0, 50.0, np.nan])


def test_groups_average_their_classes_and_all_averages_every_class() -> None:
    figures = group_accuracy(np.array([90.0, 80.0, 60.0, 20.0, 40.0]), ["many", "many", "medium", "few", "few"])
    assert figures == pytest.approx({"many": 85.0, "medium": 60.0, "few": 30.0, "all": 58.0, "std": np.std([85.0, 60.0, 30.0])})


@pytest.mark.parametrize(("many", "medium", "few", "std"), [(66.5, 39.0, 8.6, 23.6), (65.2, 49.3, 26.9, 15.7), (63.7, 51.3, 31.1, 13.4)])
def test_std_is_the_population_deviation_that_the_paper_s_table_3_prints(many: float, medium: float, few: float, std: float) -> None:
    assert group_accuracy(np.array([many, medium, few]), ["many", "medium", "few"])["std"] == pytest.approx(std, abs=0.06)


def test_a_group_without_tested_classes_is_left_out() -> None:
    figures = group_accuracy(np.array([90.0, np.nan, 70.0]), ["many", "medium", "few"])
    assert figures == pytest.approx({"many": 90.0, "few": 70.0, "all": 80.0, "std": 10.0})


def test_a_spread_is_the_sample_deviation_and_zero_for_one_seed() -> None:
    assert summarize([1.0, 2.0, 3.0]) == accuracy.Summary(2.0, 1.0, 3)
    assert summarize([4.0]) == accuracy.Summary(4.0, 0.0, 1)


def test_a_difference_is_the_mean_over_classes_of_the_paired_differences() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1])
    a = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1]])
    b = np.array([[1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1]])
    assert paired_difference(a, b, labels).difference == pytest.approx(100 * (3 / 8 + 1 / 4) / 2)


def test_equal_recognizers_differ_by_nothing() -> None:
    a = np.random.default_rng(0).integers(0, 2, (3, 40))
    assert paired_difference(a, a, np.repeat([0, 1], 20)) == Interval(0.0, 0.0, 0.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Seeds shift both classes' accuracy, images differ in difficulty; the truth is a gain of 5 points."""
    random, labels, covered = np.random.default_rng(0), np.repeat([0, 1], 60), 0
    for trial in range(200):
        difficulty, luck = random.uniform(0.3, 0.9, 120), random.normal(0, 0.02, (2, 5, 1))
        a, b = (random.random((5, 120)) < difficulty + shift for shift in (luck[0] + 0.05, luck[1]))
        interval = paired_difference(a.astype(float), b.astype(float), labels, resamples=400, seed=trial)
        covered += interval.low <= 5.0 <= interval.high
    assert 0.9 <= covered / 200 <= 1.0


def test_differences_of_classes_are_those_of_their_images_alone_and_missing_where_nothing_is_tested() -> None:
    random, labels = np.random.default_rng(0), np.repeat([0, 2], [30, 50])
    a, b = (random.integers(0, 2, (3, 80)) for _ in range(2))
    found = class_differences(a, b, labels, 3)
    assert found[1] is None
    assert found[2] == paired_difference(a[:, 30:], b[:, 30:], np.full(50, 2))


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 60)
    logits = 3 * random.standard_normal((300, 5)) + 2 * np.eye(5)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    theirs = multiclass_calibration_error(torch.from_numpy(probabilities), torch.from_numpy(labels), num_classes=5, n_bins=15)
    ours = calibration_error(probabilities.argmax(1), probabilities.max(1), labels)
    assert ours / 100 == pytest.approx(float(theirs), abs=1e-6)
    assert ours > 1


def test_a_kept_confidence_is_precise_enough_for_the_error() -> None:
    random, labels = np.random.default_rng(0), np.repeat([0, 1], 500)
    confidence, predicted = random.uniform(0.5, 1, 1000), random.integers(0, 2, 1000)
    kept = np.round(confidence, accuracy.CONFIDENCE_DIGITS)
    assert calibration_error(predicted, kept, labels) == pytest.approx(calibration_error(predicted, confidence, labels), abs=0.01)


def test_an_interval_that_ends_at_zero_is_a_tie_however_its_sums_are_rounded() -> None:
    """Of these draws the lower end is 0, and the sums of its weights 1.4e-15."""
    random = np.random.default_rng(33)
    a, b = ((random.random((5, 30)) < share).astype(np.int64) for share in (0.9, 0.8))
    labels = np.repeat([0, 1, 2], 10)
    found = paired_difference(a, b, labels)
    assert (found.difference, found.low, found.outcome) == (pytest.approx(12.0), 0.0, "ties")
    assert paired_difference(b, a, labels).outcome == "ties"


@pytest.mark.parametrize(("low", "high", "outcome"), [(0.1, 4.0, "helps"), (-1.0, 2.0, "ties"), (-5.0, -0.1, "hurts")])
def test_an_interval_helps_or_hurts_only_where_it_leaves_zero_out(low: float, high: float, outcome: str) -> None:
    assert Interval((low + high) / 2, low, high).outcome == outcome


def test_the_grid_holds_every_variant_and_loss_and_compares_pair_by_pair(
    longtail: LongTail, synthetic: ExtraImages, tmp_path: Path
) -> None:
    table = evaluate(longtail, synthetic, SECTION, tmp_path)
    assert [(row.variant, row.method) for row in table.rows] == [
        (v, method) for method in ("cross_entropy", "balanced_softmax") for v in VARIANTS
    ]
    assert all(tuple(row.figures) == (*COLUMNS, "ece") and row.figures["few"].n == 2 for row in table.rows)
    assert (table.column, table.counts, table.synthetic_counts) == ("few", (12, 6, 3), (0, 6, 9))
    few = [table.row(v, "cross_entropy").figures["few"].mean for v in ("synthetic", "replay")]
    assert table.comparison("replay", "cross_entropy").interval.difference == pytest.approx(few[0] - few[1])
    gains = table.comparison("real", "balanced_softmax").per_class
    means = [np.array(table.row(v, "balanced_softmax").per_class, dtype=float) for v in ("synthetic", "real")]
    assert [g.difference for g in gains if g] == pytest.approx(means[0] - means[1])
    document = json.loads(json.dumps(table.to_json(), allow_nan=False))
    assert document["verdict"] == verdict(table)
    assert {c["outcome"] for c in document["comparisons"]} <= {"helps", "ties", "hurts"}


def test_a_second_evaluation_trains_nothing_and_says_the_same(
    longtail: LongTail, synthetic: ExtraImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(longtail, synthetic, SECTION, tmp_path)
    monkeypatch.setattr(accuracy, "train_recognizer", None)
    assert evaluate(longtail, synthetic, SECTION, tmp_path) == first


def test_another_synthetic_weight_trains_only_what_it_changes(
    longtail: LongTail, synthetic: ExtraImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(longtail, synthetic, SECTION, tmp_path)
    trained: list[bool] = []
    train = recognizer.train_recognizer

    def counted(images: Any, *rest: Any) -> Any:
        trained.append(bool(images.is_extra.any()))
        return train(images, *rest)

    monkeypatch.setattr(accuracy, "train_recognizer", counted)
    evaluate(longtail, synthetic, SECTION.model_copy(update={"synthetic_weight": 0.7}), tmp_path)
    assert trained == [True] * 8  # two variants, two losses, two seeds; not the real ones, replay, or the oracle


def test_test_images_among_the_synthetic_ones_are_refused(longtail: LongTail, synthetic: ExtraImages, tmp_path: Path) -> None:
    leaked = ExtraImages(np.concatenate([synthetic.pixels, longtail.test.pixels(np.array([3]))]), np.append(synthetic.labels, 0))
    with pytest.raises(DataError, match="1 synthetic images are images of the test set"):
        evaluate(longtail, leaked, SECTION, tmp_path)


def test_an_oracle_tells_images_of_the_class_from_others(longtail: LongTail, tmp_path: Path) -> None:
    made_for = np.repeat([1, 2], 4)
    shows = np.array([1, 1, 1, 0, 2, 2, 2, 2])  # one of class 1 shows class 0
    section = SECTION.model_copy(update={"train_steps": 60})
    purity = class_purity(longtail, ExtraImages(rows_of_light(shows, 7), made_for), section, tmp_path)
    assert purity.oracle_accuracy == 100.0
    assert purity.per_class == (None, 75.0, 100.0)
    assert purity.overall == 87.5


def table_with(plain: tuple[float, float, float], differences: dict[Any, Interval]) -> Table:
    """Real, replay and synthetic of every method score `plain`; each method differs from both controls as given."""
    rows = [
        Row(variant, method, {"few": summarize([few])}, ())
        for method in differences
        for variant, few in zip(("real", "replay", "synthetic"), plain, strict=True)
    ]
    comparisons = [
        accuracy.Comparison(method, "synthetic", against, interval)
        for method, interval in differences.items()
        for against in ("real", "replay")
    ]
    return Table((), (), (), (), 0, 0, 3, "few", tuple(rows), tuple(comparisons), None)


HELPS, TIES, HURTS = Interval(5.0, 2.0, 8.0), Interval(0.5, -1.0, 2.0), Interval(-3.0, -5.0, -1.0)


def test_the_verdict_measures_against_the_stronger_control_and_admits_a_tie() -> None:
    helps, ties, hurts = ({"cross_entropy": first, "balanced_softmax": TIES} for first in (HELPS, TIES, HURTS))
    assert verdict(table_with((70, 75, 80), helps)).startswith(
        "Synthesis helps: on the few classes real + synthetic is +5.0 points [+2.0, +8.0] against replay"
    )
    assert "with balanced softmax it ties, +0.5 points" in verdict(table_with((70, 75, 80), helps))
    assert "against plain cross-entropy" in verdict(table_with((75, 70, 75), ties))
    assert verdict(table_with((75, 70, 75), ties)).startswith("A tie within the uncertainty")
    assert verdict(table_with((75, 70, 60), hurts)).startswith("Synthesis hurts")


@pytest.mark.parametrize("method", ["cross_entropy", "balanced_softmax", "crt"])
def test_of_one_method_the_verdict_speaks_of_that_alone(method: Any) -> None:
    told = verdict(table_with((75, 70, 80), {method: HELPS}))
    assert told.startswith("Synthesis helps")
    assert told.count("points") == 1
    assert told.count(accuracy.TITLES.get(method, method)) == 2


def test_of_several_methods_the_verdict_adds_the_one_that_is_best_without_synthetic_images() -> None:
    table = table_with((70, 60, 80), {"balanced_softmax": TIES, "cross_entropy": HELPS, "crt": HURTS})
    best = [Row(row.variant, row.method, {"few": summarize([99.0])}, ()) if row.method == "crt" else row for row in table.rows]
    told = verdict(replace(table, rows=tuple(best)))
    assert "with cRT it hurts" in told or "with crt it hurts" in told


def test_a_signal_keeps_the_trained_recognizers_and_the_next_call_goes_on(
    longtail: LongTail, synthetic: ExtraImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    heard: list[float] = []
    sent: list[bool] = []

    def interrupting(what: str, done: int, total: int, figures: Any) -> None:
        heard.append(figures["recognizers"])
        if figures["recognizers"] >= 3 and not sent:  # a second one would end the job at once, and the test's process with it
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)  # the main thread takes it

    with pytest.raises(Interrupted, match="recognizers are trained and kept"):
        evaluate(longtail, synthetic, SECTION, tmp_path, interrupting)
    kept = len(list((tmp_path / "cells").glob("*.json")))
    assert 3 <= kept < 17
    assert len(evaluate(longtail, synthetic, SECTION, tmp_path).rows) == 8


def test_a_failed_recognizer_ends_the_others_and_is_told(
    longtail: LongTail, synthetic: ExtraImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise NumericsError("the recognizer's loss is nan", "use a smaller recognizer.lr")

    monkeypatch.setattr(accuracy, "train_recognizer", failing)
    with pytest.raises(NumericsError):
        evaluate(longtail, synthetic, SECTION, tmp_path)
    assert not list(tmp_path.rglob("*.json"))
