"""Image sources: `load` turns a recipe's data section and a path into a train and a test split.

One file a kind of source: archives.py (CIFAR), tables.py (parquet), folders.py, lists.py; the digits are here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engines.data.decode import Frame
from engines.data.images import ArrayReader, ImageSet, Indices, Shelf
from engines.errors import DataError
from engines.recipe import DataSection

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HOLD_OUT_SEED = 0  # the test split stays the same whatever long tail is cut out of the rest

Splits = tuple[ImageSet, ImageSet]


def load(data: DataSection, path: Path | None) -> Splits:
    """Train and test images of a source, disjoint, with the same class names.

    Args:
        data: which source, and what each image becomes.
        path: the data set's folder, archive or list; without it `data.path` counts.

    Raises:
        DataError: a missing or unreadable data set, a wrong layout, a class without enough images.
    """
    if data.source == "digits":
        return _digits(data)
    raise NotImplementedError(data.source)


def hold_out(images: ImageSet, per_class: int, remedy: str) -> Splits:
    """Split off `per_class` images a class as a test set, at random but always the same ones.

    Raises DataError where a class would keep no image; its remedy is preceded by `remedy`.
    """
    rng = np.random.Generator(np.random.PCG64(HOLD_OUT_SEED))
    test: list[Indices] = []
    for label, name in enumerate(images.names):
        members = np.flatnonzero(images.labels == label)
        if len(members) <= per_class:
            raise _too_few(images, per_class, name, len(members), remedy)
        test.append(np.sort(rng.permutation(members)[:per_class]))
    chosen = np.concatenate(test)
    return images.subset(np.setdiff1d(np.arange(len(images)), chosen)), images.subset(chosen)


def _digits(data: DataSection) -> Splits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, values 0..16."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # half a second, and only this source needs it

    values, labels = load_digits(return_X_y=True)
    pixels = np.rint(values.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    shelf = Shelf(ArrayReader(pixels, "digits"), Frame(data.image_size_px, data.image_channels))
    images = ImageSet(labels.astype(np.int64), DIGITS, shelf)
    return hold_out(images, data.test_per_class, "hold out fewer")


def _too_few(images: ImageSet, per_class: int, name: str, count: int, remedy: str) -> DataError:
    counts = np.bincount(images.labels, minlength=len(images.names))
    others = int((counts <= per_class).sum()) - 1
    also = f" (and {others} more classes are as small)" if others else ""
    held = f"{per_class} {'is' if per_class == 1 else 'are'} to be held out for the test split and at least 1 must stay"
    fewer = f": --set data.test_per_class={int(counts.min()) - 1}" if counts.min() > 1 else ""
    return DataError(f"class {name!r} has {count} image{'s' * (count != 1)}{also}; {held}", remedy + fewer)
