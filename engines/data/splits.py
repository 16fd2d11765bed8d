"""What all sources share: making an image set, holding out a test split, and the checks every pair of splits must pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engines.data.decode import Frame
from engines.data.images import EncodedReader, ImageSet, Indices, Reader, Shelf
from engines.data.names import shorten
from engines.errors import DataError
from engines.recipe import DataSection

MAX_NAME_CHARACTERS = 1 << 16  # of a class: its name stands in every file that is made of it
HOLD_OUT_SEED = 0  # the test split stays the same whatever long tail is cut out of the rest

Splits = tuple[ImageSet, ImageSet]


def image_set(data: DataSection, labels: Indices, names: Sequence[str], reader: Reader) -> ImageSet:
    """A set over all images of a reader. Encoded images are read once here if the recipe leaves out unreadable ones."""
    images = ImageSet(labels, names, Shelf(reader, Frame(data.image_size_px, data.image_channels)))
    skips = data.on_bad_image == "skip" and isinstance(reader, EncodedReader)
    return images.without_unreadable() if skips else images


def hold_out(images: ImageSet, per_class: int, remedy: str = "add images of it") -> Splits:
    """Split off `per_class` images a class as the test set: drawn at random, but the same ones at every call.

    Raises DataError where a class would keep no image; `remedy` says how its source can be given more.
    """
    rng = np.random.Generator(np.random.PCG64(HOLD_OUT_SEED))
    counts = np.bincount(images.labels, minlength=len(images.names))
    if counts.min() <= per_class:
        raise _too_few(images.names, counts, per_class, remedy)
    chosen = [np.sort(rng.permutation(members)[:per_class]) for members in by_class(images.labels, len(images.names))]
    test = np.concatenate(chosen)
    return images.subset(np.setdiff1d(np.arange(len(images)), test)), images.subset(test)


def by_class(labels: Indices, classes: int) -> list[Indices]:
    """(K) the places of each class's images, ascending; in one pass, for there may be a hundred thousand classes."""
    counts = np.bincount(labels, minlength=classes)
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])


def check(splits: Splits, path: Path | None) -> Splits:
    """The same pair, if both splits name the same two or more classes, as text that can be written, and each has a training image.

    Raises DataError otherwise.
    """
    train, test = splits
    assert train.names == test.names
    where = f"{path}" if path else "the data set"
    if len(train.names) < 2:
        raise DataError(f"{where} has {len(train.names)} class; a long tail needs at least two", "add images of another class")
    for name in train.names:
        if len(name) > MAX_NAME_CHARACTERS:
            problem = f"{where} has a class whose name takes {len(name):,} characters ({shorten(name)!r})"
            raise DataError(problem, f"give it one of {MAX_NAME_CHARACTERS:,} at most")
        if not _is_text(name):
            raise DataError(f"{where} has a class named {shorten(name)!r}, which is no text that a file can hold", "give it another name")
    twice = {name for name in train.names if train.names.count(name) > 1} if len(set(train.names)) < len(train.names) else set()
    if twice:
        raise DataError(f"{where} has two classes named {min(twice)!r}", "give every class a name of its own")
    counts = np.bincount(train.labels, minlength=len(train.names))
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        also = f" (nor have {len(empty) - 1} more classes)" if len(empty) > 1 else ""
        raise DataError(f"class {train.names[empty[0]]!r} of {where} has no training image{also}", "add images of it, or remove the class")
    return splits


def _is_text(name: str) -> bool:
    """Whether a name has a UTF-8: half of a surrogate pair, which JSON can spell, has none."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_few(names: Sequence[str], counts: Indices, per_class: int, remedy: str) -> DataError:
    smallest = int(counts.argmin())
    count = int(counts[smallest])
    others = int((counts <= per_class).sum()) - 1
    also = f" (and {others} more {'class has' if others == 1 else 'classes have'} {per_class} or fewer)" if others else ""
    held = f"{per_class} {'is' if per_class == 1 else 'are'} to be held out for testing and at least 1 must stay"
    fewer = f", or hold out fewer: --set data.test_per_class={max(1, count // 4)}" if count > 1 else ""
    return DataError(f"class {names[smallest]!r} has {count} image{'s' * (count != 1)}{also}; {held}", remedy + fewer)
