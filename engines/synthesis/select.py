"""Selection: images that lie badly among the real ones of their class, or that the guide does not take for it, are made again.

    distance     d <= distance_band d_f: from the mean of the real images, in their largest distance from each other (METHOD section 5)
    novelty      a <= n / n_f <= b: from the nearest real image, in the median of theirs to their nearest; nearer is known already,
                 farther is doubtful
    confidence   p~(y | x_0) of the guide

The guide looks once at each image as it will be written, at t = 0: its features give the distances, its prototypes p~(y | x_0).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engines.data.batches import to_tensor
from engines.data.images import ImageSet
from engines.diffusion.losses import prototype_log_probs
from engines.networks.guide import Guide
from engines.recipe import SelectSection

Reason = Literal["", "distance", "confidence", "both", "novelty"]
REASONS: tuple[Reason, ...] = ("distance", "confidence", "both", "novelty")  # why an image is dropped; "" = it is kept
FEATURE_RESOLUTION = 1e-5  # unit vectors of float32 networks closer than this are one: rounding differs with the place in a batch
PAIRS_ROWS = 1024  # bounds the memory of all distances within a class


class Band(NamedTuple):
    """Where the real images of a class lie in feature space."""

    mean: Tensor  # (D,)
    reach: float  # d_f, the largest distance between two of them; 0 for a class of one image, which has no band
    features: Tensor  # (N, D)
    gap: float  # n_f, the median distance of one of them to the nearest other; 0 as `reach`


class Figures(NamedTuple):
    """What the selection measured of an image; None where nothing asked for it."""

    distance: float | None = None  # d, to the class's real mean in feature space
    reach: float | None = None  # d_f of the class; None also where it has no band
    confidence: float | None = None  # p~(y | x_0), Eq. 12
    novelty: float | None = None  # n / n_f, to the nearest real image of the class; None also where it has no band

    def told(self) -> dict[str, float | None]:
        """What a file says of them: the novelty only where it was measured, as versions that knew none would."""
        return {name: figure for name, figure in self._asdict().items() if name != "novelty" or figure is not None}


UNMEASURED = Figures()


class Look(NamedTuple):
    """What the guide sees in images without noise."""

    features: Tensor  # (B, D) unit vectors
    log_probs: Tensor  # (B, K) log p~(k | x_0), Eq. 12


def is_on(select: SelectSection) -> bool:
    """Whether any image may be dropped, and the guide has to look at all of them."""
    return bool(needs_bands(select) or select.confidence)


def needs_bands(select: SelectSection) -> bool:
    """Whether the real images are looked at too."""
    return bool(select.distance_band or any(select.novelty_band))


@torch.no_grad()
def look(guide: Guide, x: Tensor) -> Look:
    """One pass of the guide at t = 0: x (B, C, H, W) in [-1, 1], on any device. What it saw is on the CPU."""
    x = x.to(guide.prototypes.device)
    features = guide(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))  # (B, D)
    return Look(features.cpu(), prototype_log_probs(features, guide.prototypes, guide.log_prior, guide.tau).cpu())


def class_band(features: Tensor) -> Band:
    """The band of a class's real images, features (N, D)."""
    reach, nearest = 0.0, [features.new_zeros(0)]
    for first in range(0, len(features), PAIRS_ROWS):
        # Differences, not products: these cancel where a guide has drawn a class together.
        distances = torch.cdist(features[first : first + PAIRS_ROWS], features, compute_mode="donot_use_mm_for_euclid_dist")
        reach = max(reach, float(distances.max()))
        distances[:, first:].fill_diagonal_(torch.inf)  # to itself
        nearest.append(distances.min(1).values)
    gap = float(torch.cat(nearest).median())
    whole = reach > FEATURE_RESOLUTION  # else one image, or one many times
    return Band(features.mean(0), reach if whole else 0.0, features, max(gap, FEATURE_RESOLUTION) if whole else 0.0)


def class_bands(guide: Guide, images: ImageSet, classes: Iterable[int], batch_size: int) -> dict[int, Band]:
    """The band of each of `classes`, from the training images."""
    bands = {}
    for k in classes:
        members = np.flatnonzero(images.labels == k)
        blocks = [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
        bands[k] = class_band(torch.cat([look(guide, to_tensor(images.pixels(block))).features for block in blocks]))
    return bands


def measure(feature: Tensor, log_probs: Tensor, class_id: int, band: Band | None) -> Figures:
    """The figures of one image of a class: feature (D,), log_probs (K,)."""
    confidence = float(log_probs[class_id].exp())
    if band is None:
        return Figures(confidence=confidence)
    novelty = float((band.features - feature).norm(dim=1).min()) / band.gap if band.gap else None
    return Figures(float((feature - band.mean).norm()), band.reach or None, confidence, novelty)


def reason_to_drop(figures: Figures, select: SelectSection) -> Reason:
    """Why an image is not kept, "" where it is: d > distance_band * d_f, or p~(y | x_0) < confidence, or both; else n outside its band.

    A class of one real image has no d_f and no n_f: no distance is too large for it, none too small.
    """
    far = bool(select.distance_band) and figures.reach is not None and _known(figures.distance) > select.distance_band * figures.reach
    unsure = bool(select.confidence) and _known(figures.confidence) < select.confidence
    if far and unsure:
        return "both"
    if far or unsure:
        return "distance" if far else "confidence"
    least, most = select.novelty_band
    return "novelty" if most and figures.novelty is not None and not least <= figures.novelty <= most else ""


def _known(figure: float | None) -> float:
    assert figure is not None, "a filter that is on has measured its figure"
    return figure
