"""Selection: images too far from the real ones of their class are made again (METHOD section 5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engines.data.batches import to_tensor
from engines.data.images import ImageSet
from engines.networks.guide import Guide


class Band(NamedTuple):
    """Where the real images of a class lie in feature space."""

    mean: Tensor  # (D,)
    reach: float  # d_f, the largest distance between two of them; 0 for a class of one image, which has no band


@torch.no_grad()
def clean_features(guide: Guide, x: Tensor) -> Tensor:
    """(B, D) features of images without noise: x (B, C, H, W) in [-1, 1]."""
    return guide(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))  # type: ignore[no-any-return]


def class_band(features: Tensor) -> Band:
    """The band of a class's real images, features (N, D)."""
    return Band(features.mean(0), float(torch.cdist(features, features).max()))


def class_bands(guide: Guide, images: ImageSet, classes: Iterable[int], batch_size: int) -> dict[int, Band]:
    """The band of each of `classes`, from the training images."""
    bands = {}
    for k in classes:
        members = np.flatnonzero(images.labels == k)
        blocks = [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
        bands[k] = class_band(torch.cat([clean_features(guide, to_tensor(images.pixels(block))) for block in blocks]))
    return bands


def distance_to(band: Band, feature: Tensor) -> float:
    """d = ||feature - mean||, feature (D,)."""
    return float((feature - band.mean).norm())


def keeps(band: Band, distance: float, width: float) -> bool:
    """Whether d <= width * d_f; a class of one real image has no d_f and keeps everything."""
    return band.reach == 0 or distance <= width * band.reach
