"""Precision, recall, density and coverage against scikit-learn's neighbors, and the truths that define them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from engines.evaluation import coverage as module
from engines.evaluation.coverage import support


def cloud(seed: int, images: int, dimensions: int = 6, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((images, dimensions)) + shift


def radii(x: np.ndarray, k: int) -> np.ndarray:
    """Distance to the k-th nearest other point; scikit-learn leaves the point itself out."""
    return np.asarray(NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(x).kneighbors()[0][:, -1])


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_the_four_measures_are_those_of_scikit_learns_neighbors(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 64)  # several blocks
    generated, real = cloud(0, 150, shift=shift) + 100, cloud(1, 210) + 100
    found = support(generated, real)
    apart = pairwise_distances(generated, real)  # (N, M)
    precise, recalled = (apart <= radii(real, 3)).any(1), (apart <= radii(generated, 3)[:, None]).any(0)
    balls = apart <= radii(real, 5)
    assert np.array_equal(found.precise, precise)
    assert np.array_equal(found.recalled, recalled)
    assert float(found.dense.mean()) == pytest.approx(float(balls.sum() / (5 * len(generated))), abs=1e-6)
    assert float(found.covered.mean()) == pytest.approx(float(balls.any(0).mean()), abs=1e-6)
    assert 0.2 < found.precise.mean() <= 1


def test_images_among_the_real_ones_are_all_precise_and_all_real_ones_are_all_covered() -> None:
    real = cloud(0, 80)
    assert support(real[::4], real).precise.all()
    whole = support(real, real)
    assert whole.precise.all()
    assert whole.recalled.all()
    assert whole.covered.all()


def test_images_far_from_real_ones_are_none_of_it() -> None:
    found = support(cloud(0, 30, shift=50), cloud(1, 40))
    assert not found.precise.any()
    assert not found.covered.any()
    assert found.dense.sum() == 0


def test_more_images_cover_more() -> None:
    real, generated = cloud(0, 100), cloud(1, 400)
    covered = [support(generated[:n], real).covered for n in (10, 50, 400)]
    assert (covered[0] <= covered[1]).all()
    assert (covered[1] <= covered[2]).all()
    assert covered[0].mean() < covered[1].mean() < covered[2].mean()


def test_one_outlier_buys_recall_and_no_coverage() -> None:
    """What density and coverage were proposed for: the ball of a lone generated image holds everything."""
    real = cloud(0, 60)
    corner = cloud(1, 20, shift=40.0) * 0.01 + 40.0
    outlier = np.vstack([corner, np.full((1, 6), -40.0)])
    found = support(outlier, real)
    assert found.recalled.all()
    assert not found.covered.any()


def test_samples_of_one_distribution_have_density_1_and_the_coverage_that_the_paper_derives() -> None:
    """Of N generated and N real images: coverage 1 - (N-1)...(N-k) / ((2N-1)...(2N-k)) (Naeem et al. 2020, Lemma 2), here k = 5."""
    images = 400
    found = [support(cloud(seed, images, 3), cloud(seed + 100, images, 3)) for seed in range(6)]
    missed = np.prod([(images - i) / (2 * images - i) for i in range(1, 6)])
    assert float(np.mean([f.dense.mean() for f in found])) == pytest.approx(1, abs=0.06)
    assert float(np.mean([f.covered.mean() for f in found])) == pytest.approx(float(1 - missed), abs=0.01)


def test_as_many_images_as_neighbors_are_too_few() -> None:
    with pytest.raises(AssertionError, match="neighbors"):
        support(cloud(0, 3), cloud(1, 20))
