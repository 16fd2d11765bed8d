"""Sampling that begins from a real training image in the place of noise alone (SDEdit, Meng et al. 2022; "image to image").

    x_{t0} = sqrt(abar_{t0}) x + sqrt(1 - abar_{t0}) z,   t0 = the last visited timestep below `synth.strength` T

What the noise leaves of x (its pose, colors, background) is kept, the label and the guide draw the rest: variety from where images
are many, the class from the networks. At low strength the outcome is little more than x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engines.data.batches import to_tensor
from engines.data.images import ImageSet, Indices
from engines.data.longtail import LongTail
from engines.errors import ConflictError, UsageError
from engines.recipe import Recipe
from engines.store import RunFolder


@dataclass(frozen=True)
class RealStarts:
    """The training images from which a class's may begin."""

    images: ImageSet
    candidates: Mapping[int, Indices]  # by class id; positions in `images`

    def of(self, class_id: int, key: int) -> int:
        """The position in `images` of the one from which an image begins, by its Philox key: a function of its name alone."""
        members = self.candidates[class_id]
        return int(members[key % len(members)])

    def tensor(self, positions: list[int]) -> Tensor:
        """(B, C, H, W) in [-1, 1], on the CPU. Raises DataError naming an image that cannot be read."""
        return to_tensor(self.images.pixels(np.array(positions, dtype=np.int64)))


def real_starts(recipe: Recipe, data: LongTail) -> RealStarts | None:
    """What `synth.start` names: None for noise, else the images of the class itself, of the head classes, or all.

    Raises UsageError where there is no head class.
    """
    start, labels = recipe.synth.start, data.train.labels
    if start == "noise":
        return None
    classes = range(len(data.names))
    if start == "class":
        return RealStarts(data.train, {k: np.flatnonzero(labels == k) for k in classes})
    shared = np.flatnonzero(np.isin(labels, data.classes_of("many"))) if start == "head" else np.arange(len(labels))
    if not len(shared):
        raise UsageError('synth.start = "head" finds no head class', "--set synth.start=class or any; or other data.groups")
    return RealStarts(data.train, dict.fromkeys(classes, shared))


def require_same(run: RunFolder, data: LongTail) -> None:
    """Refuse other images than those that a run was trained on. Raises ConflictError."""
    if data.kept_sha256 != run.classes()["kept_sha256"]:
        raise ConflictError(f"{run.path} was trained on other images than these", "--data names the data set it was trained on")
