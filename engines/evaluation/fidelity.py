"""How true generated images are, told from features: Frechet distance, class hit rate, intra-class diversity, and their spread.

Pure functions of features (N, D) and labels (N,); where features come from is `judge`'s affair. A Frechet distance is called FID
only in the features of one known Inception network: in others it is a number of its own, to be compared with itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

RESAMPLES = 200
SPLITS = 20
ROWS = 1024  # of a block of distances

# ---------------------------------------------------------------------------------------------------- Frechet distance


@dataclass(frozen=True)
class Gaussian:
    """A mean and a covariance of any rank, the latter by a root of it: covariance = root' root."""

    mean: Floats  # (D,)
    root: Floats  # (R, D), R <= D unless made by hand


def fit(features: npt.NDArray[Any], weights: Floats | None = None) -> Gaussian:
    """Mean and sample covariance of features (N, D), N >= 2; exact, without shrinkage, so of rank N - 1 at most.

        mean = sum of w_i x_i,   covariance = sum of w_i (x_i - mean)(x_i - mean)' / (1 - sum of w_i^2)

    which for equal weights is numpy's `cov`, the unbiased one.

    Args:
        weights: (N,) >= 0 in any unit, at least two above 0; None = equal. See `class_weights`.
    """
    x = np.asarray(features, dtype=np.float64)
    w = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()  # (N,)
    left = 1 - np.square(w).sum()
    assert len(x) >= 2 and left > 0, "the covariance of one image"
    mean = w @ x  # (D,)
    rows = np.sqrt(w / left)[:, None] * (x - mean)  # (N, D)
    if len(rows) > x.shape[1]:
        rows = np.asarray(np.linalg.qr(rows, mode="r"))  # (D, D): the same covariance from fewer rows
    return Gaussian(mean, rows)


def from_moments(mean: Floats, covariance: Floats) -> Gaussian:
    """A Gaussian whose moments are known: (D,) and (D, D), symmetric; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance)  # (D,), (D, D)
    assert values[0] >= -1e-6 * max(values[-1], 1e-300), "a covariance has no negative eigenvalue"
    return Gaussian(np.asarray(mean, dtype=np.float64), np.sqrt(values.clip(min=0))[:, None] * vectors.T)


def class_weights(labels: Labels) -> Floats:
    """1 / N_k for an image of class k, (N,): under these weights a long-tailed set counts every class alike, as a balanced one does."""
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.asarray(1.0 / counts[which])


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The Frechet (2-Wasserstein) distance of two Gaussians, squared, as FID is (Dowson & Landau 1982; Heusel et al. 2017):

        d^2 = |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)

    With S = R'R the eigenvalues of S_a S_b are the squared singular values of R_a R_b', so the last trace is their sum: no root
    of a matrix, none of a small eigenvalue, nothing complex, and any rank will do. It is 0 up to rounding for a = b, never below.

    Of estimates it is biased upward, the more so the fewer images and the more dimensions. Two independent samples of N and M images
    of one distribution of covariance v I are, to first order in 1/N and 1/M, apart by

        (1/N + 1/M) (D + 5)/4 tr S   where the truth is 0

    (means: 1/N + 1/M times tr S; covariances: (D + 1)/4 as much). Compare numbers of the same N, M and D only, and see `floor_distance`.
    """
    cross = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    squares = np.square(a.mean - b.mean).sum() + np.square(a.root).sum() + np.square(b.root).sum()
    return float(max(squares - 2 * cross, 0.0))


def floor_distance(features: npt.NDArray[Any], labels: Labels, images: int, seed: int = 0, splits: int = SPLITS) -> tuple[float, float]:
    """What a perfect generator would score: real images against real ones of the same classes, with its standard deviation.

    A reference of M real images is split in half, class by class, `splits` times; the halves' distance, all of it bias, falls as
    1/N + 1/M does, so it is scaled from M/2 and M/2 images to `images` and M.

    Args:
        features: (M, D), at least two images of each class.
        images: N, of the generator that is compared with all M.
    """
    random = np.random.default_rng(seed)
    found, scale = [], []
    for _ in range(splits):
        first = np.zeros(len(labels), dtype=bool)
        for k in np.unique(labels):
            members = random.permutation(np.flatnonzero(labels == k))
            odd = len(members) % 2 and random.random() < 0.5  # so that no half is the larger one class after class
            first[members[: len(members) // 2 + bool(odd)]] = True
        halves = [fit(features[half], class_weights(labels[half])) for half in (first, ~first)]
        found.append(frechet_distance(*halves))
        scale.append((1 / images + 1 / len(labels)) / (1 / first.sum() + 1 / (~first).sum()))
    scaled = np.array(found) * scale
    return float(scaled.mean()), float(scaled.std(ddof=1)) if splits > 1 else 0.0


# -------------------------------------------------------------------------------------------------- hit rate, diversity


def hit_rate(predicted: Labels, asked: Labels) -> float:
    """Percent of the images that a recognizer takes for the class that was asked, the mean over the classes: (N,), (N,)."""
    return 100.0 * float(np.mean([(predicted[asked == k] == k).mean() for k in np.unique(asked)]))


def mean_pairwise_distance(features: npt.NDArray[Any]) -> float:
    """Mean Euclidean distance between two different images: (N, D), N >= 2. Unbiased: it does not grow with N."""
    x = np.asarray(features, dtype=np.float64)
    x = x - x.mean(0)  # for the rounding of what follows
    squares, total = np.square(x).sum(1), 0.0
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        distances = np.sqrt((squares[rows, None] + squares - 2 * x[rows] @ x.T).clip(min=0))  # (B, N)
        np.fill_diagonal(distances[:, start:], 0.0)
        total += float(distances.sum())
    return total / (len(x) * (len(x) - 1))


def class_distances(features: npt.NDArray[Any], labels: Labels) -> dict[int, float]:
    """Mean pairwise distance within each class of at least two images: (N, D), (N,) -> by class id."""
    several = [int(k) for k, count in zip(*np.unique(labels, return_counts=True), strict=True) if count > 1]
    return {k: mean_pairwise_distance(features[labels == k]) for k in several}


def intra_class_diversity(generated: Mapping[int, float], real: Mapping[int, float]) -> float:
    """How varied the images of a class are, beside real ones: 1 = as varied; the mean over the classes of `generated`.

        mean over k of  d(generated of k) / d(real of k),   d = mean pairwise distance, of `class_distances`

    The mean pairwise distance within a class is the usual measure for few images (Ojha et al. 2021, there in LPIPS). The Vendi
    score (Friedman & Dieng 2023) counts different images and so grows with N: a class of 5 and one of 50 could not be compared.

    Args:
        real: of at least these classes, above 0.
    """
    return float(np.mean([distance / real[k] for k, distance in generated.items()]))


# -------------------------------------------------------------------------------------------------------------- spread


def bootstrap(figures: Callable[[Labels], Sequence[float]], labels: Labels, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Figures over images drawn again with replacement, as many of each class as there are: (R, F).

    Their standard deviation says how far another draw of as many images might lie; their mean does not tell the bias, since repeated
    images change a figure. Equal labels and seeds draw the same positions: for images that were made from the same noise, the
    deviation of a difference, row by row, is that of pairs.

    Args:
        figures: F figures of the images at these positions, (N,) int64.
        labels: (N,) the class of each image.
    """
    return np.array([figures(chosen) for chosen in _resampled(labels, resamples, seed)], dtype=np.float64)


def _resampled(labels: Labels, resamples: int, seed: int) -> Iterator[Labels]:
    random = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    for _ in range(resamples):
        yield np.concatenate([random.choice(of_class, len(of_class)) for of_class in members])
