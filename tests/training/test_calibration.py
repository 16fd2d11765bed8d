"""How right and how sure the guide is: figures against scikit-learn and by hand, files, table and advice."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.calibration import calibration_curve
from torch import Tensor

from engines.data.decode import Frame
from engines.data.images import ArrayReader, ImageSet, Shelf
from engines.diffusion.schedule import make_schedule
from engines.training import calibration
from engines.training.calibration import BINS, COLUMNS, advice, by_noise, class_weights, is_written, reliability, rows, trusted_until, write
from engines.training.calibration_picture import calibration_png, diagram_levels

SCHEDULE = make_schedule("cosine", 1000)
COUNTS = (12, 6, 5, 3)


def images(counts: tuple[int, ...] = COUNTS) -> ImageSet:
    """Each class gray in its own way."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = (rng.integers(0, 20, (len(labels), 4, 4, 1)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    return ImageSet(labels, tuple("abcdefgh"[: len(counts)]), Shelf(ArrayReader(pixels, "test"), Frame(4, 1)))


class Says:
    """A guide that gives every image the same probabilities, or those of a function of (x, t)."""

    def __init__(self, probabilities: Any) -> None:
        self.probabilities = probabilities
        self.seen: list[Tensor] = []

    def eval(self) -> None: ...

    def log_probs(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x)
        p = self.probabilities(x, t) if callable(self.probabilities) else torch.tensor(self.probabilities).expand(len(x), -1)
        return torch.as_tensor(p).log()


def judged(probabilities: Any, counts: tuple[int, ...] = COUNTS, **options: Any) -> dict[str, Any]:
    return by_noise(Says(probabilities), images(counts), SCHEDULE, 0, **options)  # type: ignore[arg-type]


def sees_until_half(x: Tensor, t: Tensor) -> Tensor:
    """The true class with 0.7 at t < 500, then class 0 with 0.4."""
    x0 = x / SCHEDULE.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    grays = torch.tensor([10.0, 70.0, 130.0, 190.0]) / 127.5 - 1
    nearest = (x0.flatten(1).mean(1, keepdim=True) - grays).abs().argmin(1)
    sure = torch.full((len(x), 4), 0.1).scatter(1, nearest[:, None], 0.7)
    return torch.where((t < 500)[:, None], sure, torch.tensor([0.4, 0.2, 0.2, 0.2]))


# ------------------------------------------------------------------------------------------------------- calibration error


@pytest.mark.parametrize("seed", range(5))
def test_the_reliability_diagram_is_scikit_learns_and_the_error_is_computed_from_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.beta(4, 2, 400)
    confidence[:20] = np.round(confidence[:20] * BINS) / BINS  # on the edges
    right = (rng.random(400) < confidence**2).astype(np.float64)
    accuracy, mean_confidence = calibration_curve(right, confidence, n_bins=BINS)
    found = reliability(confidence, right, np.full(400, 1 / 400))
    np.testing.assert_allclose([b.accuracy for b in found.bins], accuracy, atol=1e-9)
    np.testing.assert_allclose([b.confidence for b in found.bins], mean_confidence, atol=1e-9)
    shares = np.histogram(confidence, np.nextafter(np.linspace(0, 1, BINS + 1), 2))[0] / 400  # (a, b]
    assert found.ece == pytest.approx(float(shares[shares > 0] @ np.abs(accuracy - mean_confidence)), abs=1e-6)


def test_the_calibration_error_of_a_hand_worked_case() -> None:
    confidence, right = np.array([0.95, 0.95, 0.5, 0.5]), np.array([1.0, 0.0, 1.0, 0.0])
    assert reliability(confidence, right, np.full(4, 0.25)).ece == pytest.approx(0.5 * 0.45)
    found = reliability(confidence, right, np.array([0.6, 0.2, 0.1, 0.1]))  # accuracy 0.75 in the upper bin
    assert found.ece == pytest.approx(0.8 * 0.2 + 0.2 * 0)
    assert [b.share for b in found.bins] == pytest.approx([0.2, 0.8])


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.integers(0, 3)), min_size=1, max_size=80))
def test_the_error_lies_between_the_gap_of_the_means_and_1_and_the_bins_hold_all_images(drawn: list[tuple[float, bool, int]]) -> None:
    confidence, right = np.array([d[0] for d in drawn]), np.array([float(d[1]) for d in drawn])
    weights = class_weights(np.array([d[2] for d in drawn]))
    found = reliability(confidence, right, weights)
    assert abs(float(weights @ (confidence - right))) - 1e-9 <= found.ece <= 1 + 1e-9
    assert sum(b.share for b in found.bins) == pytest.approx(1)
    assert sum(b.share * b.accuracy for b in found.bins) == pytest.approx(float(weights @ right))
    assert len(found.bins) <= BINS


def test_the_order_of_the_images_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    confidence, right, order = rng.random(50), rng.integers(0, 2, 50).astype(np.float64), rng.permutation(50)
    weights = class_weights(rng.integers(0, 4, 50))
    assert reliability(confidence[order], right[order], weights[order]).ece == pytest.approx(reliability(confidence, right, weights).ece)


def test_every_class_that_occurs_weighs_alike() -> None:
    np.testing.assert_allclose(class_weights(np.array([0, 0, 0, 2])), [1 / 6, 1 / 6, 1 / 6, 1 / 2])


# ---------------------------------------------------------------------------------------------------------- by noise level


def test_a_guide_that_always_says_one_class_is_right_in_one_class_of_four_and_wholly_miscalibrated() -> None:
    table = judged([1.0, 1e-9, 1e-9, 1e-9])
    assert table["t"] == [round(999 * i / 10) for i in range(11)]
    assert table["accuracy"] == [0.25] * 11
    assert table["confidence"] == [1.0] * 11
    assert table["ece"] == [0.75] * 11
    assert table["nll"] == pytest.approx([0.75 * 9 * np.log(10)] * 11, abs=1e-3)
    assert table["bins"] == [[[1.0, 0.25, 1.0]]] * 11
    assert (table["images"], table["classes"], table["chance"], table["trusted_until"]) == (sum(COUNTS), 4, 0.25, None)


def test_a_guide_that_knows_and_says_so_is_calibrated_and_one_that_is_too_modest_is_not() -> None:
    table = judged(sees_until_half)
    assert table["accuracy"][:2] == [1.0, 1.0]
    assert table["confidence"][:2] == [0.7, 0.7]
    assert table["ece"][:2] == pytest.approx([0.3, 0.3], abs=1e-4)
    assert table["nll"][0] == pytest.approx(-np.log(0.7), abs=1e-4)
    assert table["accuracy"][-1] == 0.25
    assert table["ece"][-1] == pytest.approx(0.15, abs=1e-4)


def test_of_a_large_set_a_bounded_number_of_images_is_taken_from_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    few = min(COUNTS) + 1
    monkeypatch.setattr(calibration, "ACCURACY_IMAGES", few * len(COUNTS))
    assert judged([0.25] * 4)["images"] == np.minimum(COUNTS, few).sum() < sum(COUNTS)


def test_the_guide_sees_noised_images_of_which_the_first_level_is_nearly_clean_and_the_last_all_noise() -> None:
    guide = Says([0.25] * 4)
    by_noise(guide, images(), SCHEDULE, 0)  # type: ignore[arg-type]
    assert float(guide.seen[0][-3:].mean()) > 0.3  # class 3 is light
    assert abs(float(guide.seen[-1].mean())) < 0.2
    assert float(guide.seen[-1].std()) == pytest.approx(1, abs=0.1)


# ------------------------------------------------------------------------------------------------------------- trusted until


def test_the_guide_is_trusted_up_to_the_last_t_at_which_it_is_halfway_from_chance_to_its_best() -> None:
    levels, accuracy = [0, 100, 200, 300, 400], [0.9, 0.88, 0.6, 0.5, 0.1]
    assert trusted_until(levels, accuracy, 0.1, 500) == 300  # halfway is 0.5
    assert trusted_until(levels, accuracy, 0.2, 500) == 200  # 0.55
    assert trusted_until(levels, [0.9] * 5, 0.1, 500) == 400
    assert trusted_until(levels, [0.13] * 5, 0.1, 500) is None  # nothing but luck


def tables(until: int | None) -> dict[str, dict[str, Any]]:
    test, train = judged([0.4, 0.3, 0.2, 0.1]), judged(sees_until_half)
    return {"train": {**train, "trusted_until": until}, "test": test}


def test_the_advice_is_the_training_images_and_names_the_setting() -> None:
    assert "synth.guidance_interval=[0,400]" in advice(tables(400), (0, 10**9))
    assert "synth.guidance_interval=[300,400]" in advice(tables(400), (300, 1000))
    assert "alone" in advice(tables(400), (0, 400)) and "--set" not in advice(tables(400), (0, 400))
    assert "every noise level" in advice(tables(999), (0, 400))
    assert "longer" in advice(tables(None), (0, 400))


def test_the_rows_hold_accuracy_of_both_splits_and_calibration_of_the_test_images() -> None:
    lines = rows(tables(400))
    assert len(lines) == 11
    assert lines[0] == ("0", "100.0", "25.0", "40.0", "15.0", "1.51")
    assert all(len(line) == len(COLUMNS) for line in lines)
    without_test = rows({"train": tables(400)["train"]})
    assert without_test[0] == ("0", "100.0", "", "70.0", "30.0", "0.36")


# ------------------------------------------------------------------------------------------------------- file and picture


def test_the_file_and_the_picture_are_written_of_the_splits_that_have_images(tmp_path: Path) -> None:
    empty = images().subset(np.zeros(0, dtype=np.int64))
    assert not is_written(tmp_path)
    found = write(tmp_path, Says(sees_until_half), {"train": images(), "test": empty}, SCHEDULE, 0)  # type: ignore[arg-type]
    assert is_written(tmp_path)
    assert set(found) == {"train"}
    assert json.loads((tmp_path / "accuracy.json").read_text()) == found
    with Image.open(tmp_path / "calibration.png") as picture:
        picture.load()
        assert picture.width == 1000


def test_the_picture_has_the_curves_where_the_figures_are() -> None:
    """A guide that is always right and always sure: no red above the bottom, blue at the top."""
    perfect = judged([1.0], counts=(5,))
    assert perfect["accuracy"] == [1.0] * 11
    with Image.open(io.BytesIO(calibration_png({"train": perfect}))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red = (pixels[:, :, 0] > 150) & (pixels[:, :, 1] < 90) & (pixels[:, :, 2] < 90)
    amber = (pixels[:, :, 0] > 150) & (abs(pixels[:, :, 1] - 122) < 30) & (pixels[:, :, 2] < 60)
    plot = slice(62, 340)
    assert np.flatnonzero(red[plot].sum(1) > 400).min() > np.flatnonzero(amber[plot].sum(1) > 400).max() + 200


def test_a_table_of_before_calibration_was_measured_does_not_count_as_written(tmp_path: Path) -> None:
    (tmp_path / calibration.TABLE).write_text('{"test": {"t": [0], "accuracy": [1.0]}}')
    assert not is_written(tmp_path)


@pytest.mark.parametrize("levels", [[0, 999], [0], list(range(0, 1000, 100)), [round(999 * i / 10) for i in range(11)]])
def test_diagrams_are_of_different_levels_from_the_first_on(levels: list[int]) -> None:
    shown = diagram_levels(levels)
    assert shown[0] == 0
    assert shown == sorted(set(shown))
    assert len(shown) <= 5
