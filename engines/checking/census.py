"""All images of a source, also where the loader would stop: what is wrong with classes and folders is noted down instead."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from engines.data import folders, quarantine, sources
from engines.data.decode import SUFFIXES
from engines.data.images import ImageSet
from engines.data.splits import hold_out
from engines.errors import DataError
from engines.recipe import DataSection

MAX_FAULTS = 1000  # of one kind are told one by one

Level = Literal["error", "warning"]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Fault:
    """Something about classes, folders or settings. An error is what training would stop at."""

    level: Level
    what: str  # a short name for programs: "empty class", "no test images", ...
    problem: str
    remedy: str


@dataclass
class Census:
    """What a source holds, before anything is decoded.

    Attributes:
        pool: training images, with the test images in it where they are to be held out; None where the source cannot be used at all.
        test: the source's own test images.
        held_out: test images are to be held out of the pool.
        path: the data set's folder or file; None for the digits.
    """

    pool: ImageSet | None
    test: ImageSet | None
    path: Path | None
    faults: list[Fault] = field(default_factory=list)

    @property
    def held_out(self) -> bool:
        return self.pool is not None and self.test is None

    def fault(self, level: Level, what: str, problem: str, remedy: str) -> None:
        """Note something down."""
        self.faults.append(Fault(level, what, problem, remedy))


def take(data: DataSection, path: Path | None) -> Census:
    """Find all images of a source and what is wrong around them. Reads no image.

    Raises: DataError where it is not said where the data lie, or nothing is there.
    """
    path = path or (Path(data.path) if data.path else None)
    census = Census(None, None, None if data.source == "digits" else sources.found(data, path))
    whole = data.model_copy(update={"on_bad_image": "error", "quarantine": "", "test_per_class": 0})  # nothing decoded, held out, left out
    try:
        if data.source == "folder":
            _take_folder(whole, census)
        else:
            census.pool, test = sources.load(whole, census.path)
            census.test = test if len(test) else None
    except DataError as error:
        census.fault("error", "unusable", error.problem, error.remedy)
    return census


def split_of(census: Census, data: DataSection, bad: set[int]) -> tuple[Mask, Fault | None]:
    """(N,) which images of pool and test are for testing, as training would split them; where it could not, none of the pool, and why.

    Args:
        bad: images of the pool that cannot be read; under `on_bad_image = "skip"` they are gone before any is held out.
    """
    assert census.pool is not None
    for_test = np.zeros(len(census.pool) + (len(census.test) if census.test else 0), dtype=bool)
    for_test[len(census.pool) :] = True
    if not census.held_out or not data.test_per_class:
        return for_test, None
    there = [i for i in range(len(census.pool)) if i not in bad] if data.on_bad_image == "skip" and bad else range(len(census.pool))
    part = census.pool.subset(np.array(there, dtype=np.int64))
    try:
        _, test = hold_out(part, data.test_per_class, "add images of it")
    except DataError as error:
        return for_test, Fault("error", "too small to hold images out", error.problem, error.remedy)
    for_test[np.flatnonzero(np.isin(census.pool.rows, test.rows))] = True
    return for_test, None


def _take_folder(data: DataSection, census: Census) -> None:
    assert census.path is not None
    root, held = folders.roots(census.path)
    trained = _filled(folders.class_folders(root), census, root)
    if root == census.path and set(trained) & set(folders.TEST_FOLDERS) and set(trained) <= set(folders.TEST_FOLDERS):
        raise DataError(f"{root} has a folder {next(iter(trained))}/ but no train/", folders.REMEDY)
    if not trained:
        raise DataError(f"{root} holds no class folder with an image in it", folders.REMEDY)
    names = sorted(trained)
    if len(names) < 2:
        census.fault(
            "error", "one class", f"{root} has 1 class, {names[0]!r}; a long tail needs at least two", "add images of another class"
        )
    _alike(names, census)
    tested = _filled(folders.class_folders(held), census, held) if held else {}
    for name in sorted(set(tested) - set(names))[:MAX_FAULTS]:
        census.fault(
            "error", "unknown test class", f"class {name!r} of {held} is not in {root}", f"add {root / name} or remove {held}/{name}"
        )
    tested = {name: folder for name, folder in tested.items() if name in trained}
    if held and not tested:
        census.fault("error", "no test images", f"{held} holds no image of a class of {root}", "add images to it, or remove it")
    census.pool = folders.split(data, trained, names)
    census.test = folders.split(data, tested, names) if held else None
    _passed_over(census, (root, held) if held else (root,))


def _filled(classes: dict[str, Path], census: Census, root: Path) -> dict[str, Path]:
    """Those of the class folders that hold an image."""
    filled = {name: folder for name, folder in classes.items() if any(True for _ in folders.image_files(folder))}
    for name in sorted(set(classes) - set(filled))[:MAX_FAULTS]:
        census.fault("error", "empty class", f"class folder {classes[name]} holds no image", "add images to it or remove it")
    return filled


def _alike(names: Sequence[str], census: Census) -> None:
    """Class names that a person would take for one."""
    seen: dict[str, str] = {}
    for name in names:
        key = "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum()) or name
        if key in seen:
            problem = f"the classes {seen[key]!r} and {name!r} differ only in case, spaces or punctuation"
            census.fault("warning", "names alike", problem, "merge the two folders if they are one class")
        seen.setdefault(key, name)


def _passed_over(census: Census, roots: Sequence[Path]) -> None:
    """Files in class folders that are no images by their names, and images that lie in no class folder."""
    others: Counter[str] = Counter()
    loose = 0
    for root in roots:
        for path in root.iterdir():
            loose += path.is_file() and path.suffix.lower() in SUFFIXES
        for folder in folders.class_folders(root).values():
            for path in folder.iterdir():
                if path.is_file() and path.suffix.lower() not in SUFFIXES and not path.name.startswith("."):
                    others[path.suffix.lower() or "no suffix"] += 1
    if loose:
        problem = f"{loose:,} image{'s lie' if loose > 1 else ' lies'} beside the class folders and will not be used"
        census.fault("warning", "outside of classes", problem, "move them into class folders")
    if others:
        told = ", ".join(f"{count:,} {suffix[:16]}" for suffix, count in others.most_common(6))
        problem = f"{others.total():,} file{'s' * (others.total() > 1)} in class folders will not be used, being no images by name: {told}"
        census.fault(
            "warning", "not images by name", problem, f"images in other formats are to be converted; known: {' '.join(sorted(SUFFIXES))}"
        )


def quarantined(census: Census, data: DataSection) -> tuple[Mask, quarantine.Quarantine | None]:
    """(N,) which images the recipe's own list leaves out; and the list. Images that have changed since are bad from here on.

    Raises: DataError where the list cannot be read.
    """
    assert census.pool is not None
    sets = [images for images in (census.pool, census.test) if images is not None]
    if not data.quarantine:
        return np.zeros(sum(map(len, sets)), dtype=bool), None
    names = [name for images in sets for name in quarantine.image_names(images, census.path)]
    listed = quarantine.read(Path(data.quarantine))
    out = np.array([name in listed.left_out for name in names], dtype=bool)
    watched, start = [], 0
    for images in sets:
        known = {i: listed.digests[names[start + i]] for i in range(len(images)) if names[start + i] in listed.digests}
        watched.append(images.watched(known, quarantine.digest))
        start += len(images)
    census.pool = watched[0]
    census.test = watched[1] if len(watched) > 1 else None
    return out, listed
