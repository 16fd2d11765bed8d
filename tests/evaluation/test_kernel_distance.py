"""The kernel distance against torchmetrics, scikit-learn and its own expectation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from torchmetrics.image.kid import poly_mmd

from engines.evaluation import kernel_distance as module
from engines.evaluation.kernel_distance import kernel_distance


def normal(seed: int, images: int, dimensions: int = 16) -> np.ndarray:
    """Correlated features of a mean of their own."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((dimensions, dimensions)) / np.sqrt(dimensions)
    return random.standard_normal((images, dimensions)) @ mix + random.standard_normal(dimensions)


def test_it_is_the_kid_of_torchmetrics() -> None:
    for seed, images in ((0, 50), (1, 300)):
        a, b = normal(seed, images), normal(seed + 10, images)
        assert kernel_distance(a, b).value == pytest.approx(float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b))), rel=1e-6)


def test_it_is_the_formula_with_scikit_learns_kernel() -> None:
    a, b = normal(0, 60), normal(1, 90)
    aa, bb, ab = (polynomial_kernel(x, y, degree=3, coef0=1) for x, y in ((a, a), (b, b), (a, b)))  # gamma = 1 / D
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb)]
    assert kernel_distance(a, b).value == pytest.approx(sum(within) - 2 * ab.mean(), rel=1e-6)


def test_with_labels_it_is_the_mean_over_pairs_of_classes() -> None:
    a_labels, b_labels = np.repeat([2, 0, 5], [4, 30, 2]), np.repeat([0, 2, 5], [7, 9, 3])
    a, b = normal(0, len(a_labels)), normal(1, len(b_labels))

    def mean(x: np.ndarray, y: np.ndarray, x_labels: np.ndarray, y_labels: np.ndarray) -> float:
        total = 0.0
        for k in (0, 2, 5):
            for j in (0, 2, 5):
                kernel = polynomial_kernel(x[x_labels == k], y[y_labels == j], degree=3, coef0=1)
                if x is y and k == j:
                    kernel = kernel[~np.eye(len(kernel), dtype=bool)]
                total += kernel.mean() / 9
        return total

    expected = mean(a, a, a_labels, a_labels) + mean(b, b, b_labels, b_labels) - 2 * mean(a, b, a_labels, b_labels)
    assert kernel_distance(a, b, a_labels, b_labels).value == pytest.approx(expected, rel=1e-6)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat([0, 1], [30, 41])
    a, b = normal(0, 71), normal(1, 71)
    whole = kernel_distance(a, b, labels, labels[::-1])
    monkeypatch.setattr(module, "ROWS", 13)
    blocks = kernel_distance(a, b, labels, labels[::-1])
    assert (blocks.value, blocks.error) == pytest.approx((whole.value, whole.error), rel=1e-9)


def test_of_one_distribution_it_is_0_in_the_mean_however_few_the_images() -> None:
    random = np.random.default_rng(0)
    found = np.array([kernel_distance(random.standard_normal((12, 4)), random.standard_normal((20, 4))).value for _ in range(400)])
    assert abs(found.mean()) < 3 * found.std() / 20
    assert (found < 0).mean() > 0.3


def test_its_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Of two normal distributions with a shift the truth is the mean over many samples; of one it is 0."""
    random = np.random.default_rng(0)
    for shift in (0.0, 0.3):
        found = [
            kernel_distance(random.standard_normal((100, 4)) + shift, random.standard_normal((150, 4)), labels, other)
            for labels, other in [(np.arange(100) % 2, np.arange(150) % 2)] * 200
        ]
        truth = np.mean([f.value for f in found])
        covered = np.mean([f.low <= truth <= f.high for f in found])
        assert 0.9 <= covered <= 1.0


def test_a_class_of_one_image_has_no_pair() -> None:
    with pytest.raises(AssertionError, match="one image"):
        kernel_distance(normal(0, 3), normal(1, 4), np.array([0, 0, 1]), np.array([0, 0, 1, 1]))
