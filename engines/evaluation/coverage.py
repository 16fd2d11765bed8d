"""Do generated images lie where real ones do, and everywhere there? Improved precision and recall, density and coverage.

All four are told from balls: around each image one that reaches to its k-th nearest neighbor of the same set. Pure functions of
features (N, D), the memory bounded whatever N is. The names are shared by numbers of other features and other k: compare none of those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

PRECISION_NEIGHBORS = 3  # k of Kynkaanniemi et al. 2019
COVERAGE_NEIGHBORS = 5  # k of Naeem et al. 2020
ROWS = 2048  # of a block of distances, 32 MiB


@dataclass(frozen=True)
class Support:
    """Which images of two sets lie within balls of the other set; the four measures are means of these.

        precision  share of generated images within a ball of any real image         1 = every image looks real
        recall     share of real images within a ball of any generated image         1 = everything real can come up
        density    real balls that a generated image lies in, over k, its mean       1 in the mean for real images; can exceed it
        coverage   share of real images whose ball holds a generated image           1 = nothing real is left out

    Density and coverage have balls around real images alone, so that a few generated outliers, whose balls are huge, do not count as
    recall. Coverage depends on the number of generated images; equal sets of one distribution give 1 - 2^-k, 0.97 at k = 5.
    """

    precise: Flags  # (N,) of each generated image
    dense: Floats  # (N,) of each generated image
    recalled: Flags  # (M,) of each real image
    covered: Flags  # (M,) of each real image


def support(
    generated: npt.NDArray[Any],
    real: npt.NDArray[Any],
    precision_neighbors: int = PRECISION_NEIGHBORS,
    coverage_neighbors: int = COVERAGE_NEIGHBORS,
) -> Support:
    """Precision and recall image by image (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A ball holds its border. Duplicates within a set are neighbors at distance 0, as in both papers.

    Args:
        generated: (N, D), N > precision_neighbors.  real: (M, D), M > both numbers of neighbors.
    """
    middle = real.mean(0, dtype=np.float64)  # (D,) subtracted for the sake of the rounding
    precise_to, covered_to = _reaches(real, (precision_neighbors, coverage_neighbors), middle)  # (M,) squares
    (recalled_to,) = _reaches(generated, (precision_neighbors,), middle)  # (N,)
    precise, recalled = np.zeros(len(generated), bool), np.zeros(len(real), bool)
    balls, covered = np.zeros(len(generated)), np.zeros(len(real), bool)
    for start in range(0, len(generated), ROWS):
        for other in range(0, len(real), ROWS):
            rows, columns = slice(start, start + ROWS), slice(other, other + ROWS)
            squares = _squares(generated[rows] - middle, real[columns] - middle)
            precise[rows] |= (squares <= precise_to[columns]).any(1)
            recalled[columns] |= (squares <= recalled_to[rows, None]).any(0)
            within = squares <= covered_to[columns]
            balls[rows] += within.sum(1)
            covered[columns] |= within.any(0)
    return Support(precise, balls / coverage_neighbors, recalled, covered)


def _reaches(x: npt.NDArray[Any], neighbors: tuple[int, ...], middle: Floats) -> list[Floats]:
    """Squared distance of each image to its k-th nearest other one, for each k of `neighbors`: (N,) each."""
    most = max(neighbors)
    assert len(x) > most, f"{len(x)} images have no {most} neighbors each"
    nearest = np.full((len(x), most), np.inf)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        for other in range(0, len(x), ROWS):
            squares = _squares(x[rows] - middle, x[other : other + ROWS] - middle)
            if start == other:
                np.fill_diagonal(squares, np.inf)  # an image is no neighbor of itself
            together = np.concatenate([nearest[rows], squares], axis=1)
            nearest[rows] = np.partition(together, most - 1, axis=1)[:, :most]
    nearest.sort(axis=1)
    return [nearest[:, k - 1] for k in neighbors]


def _squares(x: Floats, y: Floats) -> Floats:
    """Squared Euclidean distances: (N, D), (M, D) -> (N, M)."""
    return np.asarray((np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * (x @ y.T)).clip(min=0))
