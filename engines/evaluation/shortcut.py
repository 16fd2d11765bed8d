"""How visible is it that an image was made? A linear classifier of features that tells real from generated images of the same classes.

Where only rare classes hold generated images, "looks made, so it is rare" is a shortcut that a recognizer may learn instead of the
class. What a linear classifier sees in features, a network that is trained on the images sees at least as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]

FOLDS = 5
LEAST = 20  # images of either kind: of fewer the answer would be chance


@dataclass(frozen=True)
class Shortcut:
    """How often unseen images are told real from generated."""

    accuracy: float  # balanced, percent; 50 = by chance alone
    images: int  # of either kind

    @property
    def error(self) -> float:
        """Standard error of the accuracy in points, the images taken as independent; not 0 where all were right."""
        right = (self.accuracy / 100 * 2 * self.images + 1) / (2 * self.images + 2)
        return float(100 * np.sqrt(right * (1 - right) / (2 * self.images)))


def real_or_generated(
    real: npt.NDArray[Any], generated: npt.NDArray[Any], real_labels: Labels, generated_labels: Labels, seed: int = 0
) -> Shortcut | None:
    """Linear discriminant analysis with the Ledoit-Wolf covariance, cross-validated, on as many real as generated images of each class.

    Otherwise the share of a class among either kind would tell them apart. Features count from their class's middle, which both
    kinds have a half of.

    Args:
        real: (M, D) features of images that the extractor was not trained on.  generated: (N, D).
        real_labels, generated_labels: (M,), (N,).
        seed: of the images that are taken where there are more, and of the folds.

    Returns: None where the classes share fewer than LEAST images of either kind.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    random = np.random.default_rng(seed)
    chosen: list[tuple[Labels, Labels]] = []
    for k in np.intersect1d(real_labels, generated_labels):
        of_real, of_generated = (random.permutation(np.flatnonzero(labels == k)) for labels in (real_labels, generated_labels))
        count = min(len(of_real), len(of_generated))
        chosen.append((of_real[:count], of_generated[:count]))
    images = sum(len(of_real) for of_real, _ in chosen)
    if images < LEAST:
        return None
    first, second = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
    features = np.concatenate([real[first], generated[second]]).astype(np.float64)  # (2 * images, D)
    labels = np.concatenate([real_labels[first], generated_labels[second]])
    for k in np.unique(labels):  # the gaps between classes would hide that between the kinds
        features[labels == k] -= features[labels == k].mean(0)
    is_real = np.repeat([True, False], images)
    told = cross_val_predict(
        LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
        features,
        is_real,
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=seed),
    )
    return Shortcut(100.0 * float((told == is_real).mean()), images)
