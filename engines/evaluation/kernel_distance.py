"""Kernel distance (KID): the unbiased squared maximum mean discrepancy of two sets of features, with an interval.

Unlike the Frechet distance it is 0 in the mean for samples of one distribution, however few, and may fall below 0. In other features
than those of one known Inception network it is a number of its own, to be compared with itself alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

ROWS = 2048  # of a block of the kernel matrix, 32 MiB: the memory does not grow with the images
NORMAL_95 = 1.959964  # standard deviations on either side that hold 95 % of a normal distribution


@dataclass(frozen=True)
class KernelDistance:
    """An estimate of the squared distance and its standard error."""

    value: float
    error: float

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - NORMAL_95 * self.error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + NORMAL_95 * self.error


def kernel_distance(
    a: npt.NDArray[Any], b: npt.NDArray[Any], a_labels: Labels | None = None, b_labels: Labels | None = None
) -> KernelDistance:
    """The unbiased estimate of MMD^2 under the polynomial kernel (Gretton et al. 2012, Eq. 3; Binkowski et al. 2018: "KID").

        k(x, y) = (x.y / D + 1)^3
        MMD^2   = mean of k(a_i, a_j) over i != j  +  mean of k(b_i, b_j) over i != j  -  2 mean of k(a_i, b_j)

    With labels each mean is one over classes first: over all pairs of classes of the mean over the pairs of their images. So every
    class counts alike, a long-tailed set is comparable with a balanced one, and the estimate is unbiased for that.

    The standard error is that of the linear part, from the row means h_i = mean_j k(a_i, a_j) - mean_j k(a_i, b_j) (the
    infinitesimal jackknife): 4 / N times the variance of h within a class. Where both sets come from one distribution the linear
    part vanishes and what remains of it is noise of the right size, so the interval is somewhat wide there.

    The published figure is the mean over 100 random subsets of 1,000 images each. It estimates the same number; the spread that is
    printed with it is that of one subset.

    Args:
        a: (N, D) features, computed in float64; at least two of each class.
        b: (M, D) the same of the other set.
        a_labels, b_labels: (N,), (M,) classes, the same ones in both sets; None = all of one class.
    """
    a_classes = np.zeros(len(a), np.int64) if a_labels is None else a_labels
    b_classes = np.zeros(len(b), np.int64) if b_labels is None else b_labels
    assert np.array_equal(np.unique(a_classes), np.unique(b_classes)), "both sets hold the same classes"
    a_weights, b_weights = _shares(a_classes), _shares(b_classes)
    within_a, within_b = _within(a, a_classes, a_weights), _within(b, b_classes, b_weights)  # (N,), (M,)
    across_a, across_b = _across(a, b, a_weights, b_weights)  # (N,), (M,)
    value = a_weights @ within_a + b_weights @ within_b - a_weights @ across_a - b_weights @ across_b
    variance = 4 * (_variance(within_a - across_a, a_classes) + _variance(within_b - across_b, b_classes))
    return KernelDistance(float(value), float(np.sqrt(variance)))


def _shares(labels: Labels) -> Floats:
    """1 / (K N_k) for an image of class k, (N,), sum 1."""
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    assert counts.min() >= 2, "a class of one image has no pair"
    return np.asarray(1.0 / (len(counts) * counts[which]))


def _within(x: npt.NDArray[Any], labels: Labels, weights: Floats) -> Floats:
    """Of each image the mean kernel with every other of its set, each class alike: (N,)."""
    sums, own = np.zeros(len(x)), np.zeros(len(x))  # over all others, by weight; over the others of its class
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        for other in range(0, len(x), ROWS):
            columns = slice(other, other + ROWS)
            kernel = _kernel(x[rows], x[columns])
            if start == other:
                np.fill_diagonal(kernel, 0.0)
            sums[rows] += kernel @ weights[columns]
            own[rows] += np.where(labels[rows, None] == labels[columns], kernel, 0.0).sum(1)
    counts = 1 / (weights * len(np.unique(labels)))  # N_k
    return np.asarray(sums + own * weights / (counts - 1))  # among its own class an image has N_k - 1 others, not N_k


def _across(a: npt.NDArray[Any], b: npt.NDArray[Any], a_weights: Floats, b_weights: Floats) -> tuple[Floats, Floats]:
    """Of each image of one set the mean kernel with those of the other: (N,), (M,)."""
    of_a, of_b = np.zeros(len(a)), np.zeros(len(b))
    for start in range(0, len(a), ROWS):
        for other in range(0, len(b), ROWS):
            rows, columns = slice(start, start + ROWS), slice(other, other + ROWS)
            kernel = _kernel(a[rows], b[columns])
            of_a[rows] += kernel @ b_weights[columns]
            of_b[columns] += a_weights[rows] @ kernel
    return of_a, of_b


def _kernel(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Floats:
    """(N, D), (M, D) -> (N, M)."""
    base = x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1
    return np.asarray(base * base * base)  # five times as fast as the third power


def _variance(values: Floats, labels: Labels) -> float:
    """Variance of the mean over classes of the class means of `values` (N,)."""
    classes = np.unique(labels)
    return float(sum(values[labels == k].var(ddof=1) / (labels == k).sum() for k in classes) / len(classes) ** 2)
