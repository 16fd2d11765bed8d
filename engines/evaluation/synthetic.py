"""Synthetic images as the recognizer takes them, their controls, and the guards that keep them out of the test set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engines.data.images import ImageSet
from engines.errors import DataError, UsageError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExtraImages:
    """Images that join the real ones in training: synthetic ones or duplicates."""

    pixels: Pixels  # (M, H, W, C) uint8
    labels: Labels  # (M,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self, classes: int) -> Labels:
        """(K,) images a class."""
        return np.bincount(self.labels, minlength=classes).astype(np.int64)


def replay(train: ImageSet, counts: Labels, seed: int) -> ExtraImages:
    """The control: as many duplicates of a class's real images as `counts` (K,) asks, all of them used equally often.

    Raises DataError where a class to duplicate has no real image.
    """
    chosen: list[Labels] = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(train.labels == label)
        if count and not len(members):
            raise DataError(f"class {train.names[label]!r} has synthetic images but no real one to replay", "synthesize other classes")
        order = np.random.default_rng([seed, label]).permutation(members)
        chosen.append(np.resize(order, int(count)))  # in rounds over the shuffled class
    indices = np.concatenate(chosen)
    return ExtraImages(train.pixels(indices), train.labels[indices])


def all_pixels(images: ImageSet) -> Pixels:
    """Every image of a set: (N, H, W, C) uint8."""
    return images.pixels(np.arange(len(images), dtype=np.int64))


def refuse_data_folder(synthetic: Path, data: Path | None) -> None:
    """Refuse synthetic images that lie inside the data set, where the next run would read them as real ones, the test's too.

    Raises UsageError.
    """
    if data is not None and data.is_dir() and synthetic.resolve().is_relative_to(data.resolve()):
        raise UsageError(
            f"{synthetic} lies inside the data set {data}: its images would be read as real ones", "choose another folder with --run"
        )


def refuse_test_images(extra: ExtraImages, test: ImageSet) -> None:
    """Refuse synthetic images that are test images, pixel by pixel. Raises DataError."""
    shared = pixel_hashes(extra.pixels) & pixel_hashes(all_pixels(test))
    if shared:
        raise DataError(
            f"{len(shared)} synthetic images are images of the test set: accuracy on it would mean nothing",
            "synthesize into a fresh run folder and keep the test set out of training",
        )


def pixel_hashes(pixels: Pixels) -> set[bytes]:
    """A digest of each image: (N, H, W, C) uint8 -> at most N digests."""
    return {hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest() for image in pixels}
