"""Frechet distance against closed forms and scipy, its bias against the formula, hit rate, diversity, spread."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import pdist

from engines.evaluation import fidelity
from engines.evaluation.fidelity import (
    Gaussian,
    bootstrap,
    class_distances,
    class_weights,
    fit,
    floor_distance,
    frechet_distance,
    from_moments,
    hit_rate,
    intra_class_diversity,
    mean_pairwise_distance,
)


def normal(seed: int, images: int, dimensions: int) -> np.ndarray:
    """Correlated features of a mean of their own."""
    random = np.random.default_rng(seed)
    return random.standard_normal((images, dimensions)) @ random.standard_normal((dimensions, dimensions)) + random.standard_normal(
        dimensions
    )


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as it is printed, with a matrix root of the product."""
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


@pytest.mark.parametrize(("images", "dimensions"), [(40, 3), (300, 16), (500, 64)])
def test_the_frechet_distance_is_that_of_scipys_matrix_root(images: int, dimensions: int) -> None:
    a, b = normal(0, images, dimensions), normal(1, images + 7, dimensions)
    assert frechet_distance(fit(a), fit(b)) == pytest.approx(by_scipy(a, b), rel=1e-6)


def test_in_one_dimension_it_is_the_squared_gap_of_means_and_of_deviations() -> None:
    a, b = Gaussian(np.array([1.0]), np.array([[2.0]])), Gaussian(np.array([4.0]), np.array([[0.5]]))
    assert frechet_distance(a, b) == pytest.approx(3.0**2 + 1.5**2)


def test_of_covariances_that_commute_it_is_the_squared_gap_of_their_roots() -> None:
    rotation = np.linalg.qr(normal(0, 5, 5))[0]
    first, second = np.array([4.0, 1.0, 0.25, 0.0, 9.0]), np.array([1.0, 1.0, 0.0, 0.04, 16.0])
    a, b = (Gaussian(np.zeros(5), np.sqrt(values)[:, None] * rotation.T) for values in (first, second))
    assert frechet_distance(a, b) == pytest.approx(np.square(np.sqrt(first) - np.sqrt(second)).sum(), abs=1e-9)


def test_known_moments_give_what_their_features_give() -> None:
    a, b = normal(0, 50, 6), normal(1, 60, 6)
    known = from_moments(a.mean(0), np.cov(a, rowvar=False))
    assert frechet_distance(known, fit(b)) == pytest.approx(frechet_distance(fit(a), fit(b)), rel=1e-9)


def test_fewer_images_than_dimensions_are_as_good_as_any() -> None:
    a, b = normal(0, 30, 4), normal(1, 30, 4)
    into = np.linalg.qr(normal(2, 100, 4))[0].T  # (4, 100), rows orthonormal
    assert frechet_distance(fit(a @ into), fit(b @ into)) == pytest.approx(by_scipy(a, b), rel=1e-9)


def test_it_is_0_for_the_same_images_and_symmetric_and_a_shift_adds_its_square() -> None:
    a, b = normal(0, 40, 20), normal(1, 12, 20)
    assert frechet_distance(fit(a), fit(a)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(fit(a), fit(b)) == pytest.approx(frechet_distance(fit(b), fit(a)), rel=1e-12)
    assert frechet_distance(fit(a), fit(a + 0.5)) == pytest.approx(20 * 0.25)


def test_a_fit_has_the_unbiased_covariance_of_numpy() -> None:
    for images in (5, 50):  # both less and more than the dimensions
        x = normal(0, images, 8)
        assert np.allclose(fit(x).root.T @ fit(x).root, np.cov(x, rowvar=False))
        assert np.allclose(fit(x).mean, x.mean(0))


def test_weighted_by_class_a_long_tail_has_the_mean_and_covariance_of_a_balanced_set() -> None:
    rare, common = normal(0, 4, 3), normal(1, 4, 3) + 5
    tail = np.concatenate([rare, np.repeat(common, 10, axis=0)])
    weights = class_weights(np.repeat([0, 1], [4, 40]))
    both = np.concatenate([rare, common])
    assert np.allclose(fit(tail, weights).mean, both.mean(0))
    weighted = fit(tail, weights).root
    spread = np.cov(both, rowvar=False, bias=True)
    assert np.allclose(weighted.T @ weighted, spread / (1 - np.square(weights / weights.sum()).sum()))


def test_two_samples_of_one_distribution_are_as_far_apart_as_the_bias_says() -> None:
    random, dimensions, first, second = np.random.default_rng(0), 10, 400, 800
    found = [
        frechet_distance(fit(random.standard_normal((first, dimensions))), fit(random.standard_normal((second, dimensions))))
        for _ in range(60)
    ]
    assert np.mean(found) == pytest.approx((1 / first + 1 / second) * (dimensions + 5) / 4 * dimensions, rel=0.05)


def test_the_floor_is_what_unseen_images_of_the_same_distribution_score() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 101)
    centers = 3 * random.standard_normal((3, 8))
    reference = centers[labels] + random.standard_normal((len(labels), 8))
    drawn = [centers[np.repeat([0, 1, 2], 50)] + random.standard_normal((150, 8)) for _ in range(40)]
    scored = np.mean([frechet_distance(fit(images), fit(reference)) for images in drawn])
    floor, spread = floor_distance(reference, labels, images=150)
    assert floor == pytest.approx(scored, rel=0.25)
    assert 0 < spread < floor


def test_the_hit_rate_counts_each_class_alike() -> None:
    asked = np.array([0, 0, 0, 0, 2, 2])
    assert hit_rate(np.array([0, 0, 0, 1, 2, 0]), asked) == pytest.approx((75 + 50) / 2)
    assert hit_rate(asked, asked) == 100


def test_the_mean_pairwise_distance_is_that_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(0, 30, 7) + 100
    assert mean_pairwise_distance(x) == pytest.approx(pdist(x).mean(), rel=1e-9)
    assert mean_pairwise_distance(np.ones((4, 3))) == 0
    monkeypatch.setattr(fidelity, "ROWS", 7)
    assert mean_pairwise_distance(x) == pytest.approx(pdist(x).mean(), rel=1e-9)


def test_distances_of_classes_leave_out_those_of_one_image() -> None:
    labels = np.array([0, 3, 3, 3])
    x = normal(0, 4, 5)
    assert class_distances(x, labels) == {3: mean_pairwise_distance(x[1:])}


def test_diversity_is_the_mean_ratio_to_real_images_over_the_classes() -> None:
    real = {0: 2.0, 1: 5.0, 7: 1.0}
    assert intra_class_diversity({0: 2.0, 1: 5.0}, real) == pytest.approx(1)
    assert intra_class_diversity({0: 1.0, 1: 5.0}, real) == pytest.approx(0.75)


def test_the_deviation_of_a_mean_over_the_bootstrap_is_its_standard_error() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    found = bootstrap(lambda i: [values[i].mean(), 2 * values[i].mean()], np.zeros(400, np.int64), resamples=500)
    assert found.shape == (500, 2)
    assert found[:, 0].std() == pytest.approx(values.std() / 20, rel=0.1)
    assert np.allclose(found[:, 1], 2 * found[:, 0])


def test_pairs_are_drawn_together_so_that_what_they_share_cancels() -> None:
    values, labels = np.random.default_rng(0).standard_normal(100), np.zeros(100, np.int64)
    one, other = (bootstrap(lambda i, shift=shift: [(values[i] + shift).mean()], labels, resamples=50) for shift in (0, 0.5))
    assert np.allclose(other - one, 0.5)


def test_images_drawn_again_are_as_many_of_each_class() -> None:
    labels = np.array([0] * 3 + [4] * 7)
    assert np.all(bootstrap(lambda i: [(labels[i] == 4).sum()], labels, resamples=20) == 7)
