"""Image sources: `load` turns a recipe's data section and a path into a train and a test split.

A file for each kind: archives.py (CIFAR's own), tables.py (parquet), folders.py, lists.py (CSV and text); the digits are
here.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engines.data import archives, folders, lists, quarantine, tables
from engines.data.images import ArrayReader
from engines.data.splits import Splits, check, hold_out, image_set
from engines.errors import DataError
from engines.recipe import DataSection

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load(data: DataSection, path: Path | None) -> Splits:
    """Train and test images of a source: disjoint, with the same class names, every class with a training image.

    Args:
        data: which source, and what each image becomes.
        path: the data set's folder, archive or list; without it `data.path` counts. The digits need none.

    Raises:
        DataError: a missing or unreadable data set, a wrong layout, a class without enough images.
    """
    path = path or (Path(data.path) if data.path else None)
    if data.source == "digits":
        return check(_obeyed(data, _digits(data), None), None)
    path = found(data, path)
    return check(_obeyed(data, _at(data, path), path), path)


def found(data: DataSection, path: Path | None) -> Path:
    """Where the images of a source other than the digits lie. Raises DataError where that is not said, or nothing is there."""
    if path is None:
        raise DataError(f"the recipe's data source {data.source!r} needs to know where the images lie", "--data DIR")
    path = path.expanduser()
    if not path.exists():
        raise DataError(f"the data set {path} does not exist", "--data DIR with the folder or archive that holds the images")
    return path


def _obeyed(data: DataSection, splits: Splits, path: Path | None) -> Splits:
    """Without what the recipe's quarantine list leaves out."""
    if not data.quarantine:
        return splits
    listed = quarantine.read(Path(data.quarantine))
    train, test = (quarantine.obey(images, listed, path) for images in splits)
    if data.on_bad_image == "skip":  # one that has changed since it was checked is bad, too
        return train.without_unreadable(), test.without_unreadable()
    return train, test


def _at(data: DataSection, path: Path) -> Splits:
    match data.source:
        case "cifar10" | "cifar100":
            return tables.load(data, path) if tables.holds_parquet(path) else archives.load(data, path)
        case "parquet":
            return tables.load(data, path)
        case "folder":
            return folders.load(data, path)
        case "list":
            return lists.load(data, path)
        case _:
            raise AssertionError(data.source)


def _digits(data: DataSection) -> Splits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 px with values 0..16; the test split is held out."""
    values, labels = _digits_table()
    pixels = np.rint(values.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    images = image_set(data, labels.astype(np.int64), DIGITS, ArrayReader(pixels, "the digits"))
    return hold_out(images, data.test_per_class, "the digits have 174 to 183 images a class")


def _digits_table() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Values (1797, 64) and labels (1797,). The package's own loader brings SciPy along, which takes as long to import as torch."""
    package = importlib.util.find_spec("sklearn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz" if package and package.origin else None
    if file is None or not file.is_file():  # a version that keeps it elsewhere
        from sklearn.datasets import load_digits

        table = load_digits()
        return table.data, table.target
    with gzip.open(file, "rt", encoding="ascii") as lines:
        rows = np.loadtxt(lines, delimiter=",")
    return rows[:, :-1], rows[:, -1]
