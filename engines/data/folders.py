"""Image folders: one folder a class, under train/ and test/ or with the test images held out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from engines.data.decode import SUFFIXES, read_regular_file
from engines.data.images import EncodedReader, ImageSet
from engines.data.splits import Splits, hold_out, image_set
from engines.errors import DataError
from engines.recipe import DataSection

TEST_FOLDERS = ("test", "val", "validation")
REMEDY = "expected: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, or DIR/CLASS/*.jpg"


def load(data: DataSection, path: Path) -> Splits:
    """Train and test images; a class is a folder, whatever lies below it.

    Labels are the places of the class names in sorted order (by code point). Files are told by suffix, hidden ones are
    left out, links are followed but not in circles.

    Args:
        path: holds train/CLASS/ and test/CLASS/ (or val/, validation/), or CLASS/ with `test_per_class` held out.

    Raises:
        DataError: no classes, an empty class, a test class that training lacks, a class too small to hold images out.
    """
    root, held = roots(path)
    classes = class_folders(root)
    if root == path and classes and set(classes) <= set(TEST_FOLDERS):
        raise DataError(f"{path} has a folder {next(iter(classes))}/ but no train/", REMEDY)
    if not classes:
        raise DataError(f"{root} holds no class folders", REMEDY)
    names = sorted(classes)
    train = split(data, classes, names)
    if held is None:
        remedy = "add images of it" if root == path else f"add images of it, or a folder {path / 'test'}"
        return hold_out(
            train, data.test_per_class, f"{remedy}" if root != path else f"{remedy}, or give {path} a train/ and a test/ folder"
        )
    tested = class_folders(held)
    unknown = sorted(set(tested) - set(names))
    if unknown:
        raise DataError(f"class {unknown[0]!r} of {held} is not in {root}", "every class to test needs a training folder of that name")
    return train, split(data, tested, names)


def roots(path: Path) -> tuple[Path, Path | None]:
    """The folders that hold the training classes and the test classes; None where test images are to be held out. Raises DataError."""
    if not path.is_dir():
        raise DataError(f"{path} is a file, not a folder of images", REMEDY)
    root = path / "train" if (path / "train").is_dir() else path
    held = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None) if root != path else None
    return root, held


def split(data: DataSection, classes: dict[str, Path], names: Sequence[str]) -> ImageSet:
    """The images of one split: those of the class folders that there are, label k for names[k]. Raises DataError for an empty one."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        members = sorted(image_files(classes[name])) if name in classes else []
        if name in classes and not members:
            raise DataError(f"class folder {classes[name]} holds no image", "add images to it or remove it")
        paths += members
        labels += [label] * len(members)
    reader = EncodedReader(len(paths), lambda row: read_regular_file(paths[row]), lambda row: str(paths[row]))
    return image_set(data, np.array(labels, dtype=np.int64), names, reader)


def class_folders(root: Path) -> dict[str, Path]:
    """Class folders by NFC name: two file systems may spell an accent in two ways. Raises DataError for names that cannot be used."""
    classes: dict[str, Path] = {}
    for folder in sorted(_listed(root)):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        if not folder.name.isprintable():
            raise DataError(f"the class folder name {folder.name!r} is not printable UTF-8 text", "rename the folder")
        name = unicodedata.normalize("NFC", folder.name)
        if name in classes:
            raise DataError(f"{root} has two class folders named {name!r}, spelled differently in Unicode", "rename one of them")
        classes[name] = folder
    return classes


def image_files(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Candidates below a folder; `above` are the folders it lies in, by device and inode.

    A pipe or a dangling link counts: it is refused (or skipped) when read.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder above itself
        return
    for path in _listed(folder):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from image_files(path, (*above, here))
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}", "check the folder's permissions") from None
