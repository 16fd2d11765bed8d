"""The check of a data set before any training: what cannot be read, what is there twice or leaks into the test set, how the tail is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engines.checking.census import Census, Fault, Mask, quarantined, split_of, take
from engines.checking.likeness import Album, Pairs, likenesses
from engines.checking.scan import Scan, scan, together
from engines.data.images import ImageSet, Indices
from engines.data.longtail import check_groups, class_groups, profile_counts
from engines.data.quarantine import Quarantine, image_names
from engines.errors import DataError, DiffRCError
from engines.progress import Report, silent
from engines.recipe import Recipe

LISTED = 10_000  # images, or pairs, of one kind in the JSON document; all are counted

Relation = Literal["leak", "conflict", "repeat"]
RELATIONS: tuple[Relation, ...] = ("leak", "conflict", "repeat")
MEANINGS: dict[Relation, str] = {
    "leak": "one for training, one for testing",
    "conflict": "in two classes",
    "repeat": "both in one class",
}
Remove = Literal["unreadable", "leaks", "conflicts", "repeats"]


@dataclass(frozen=True)
class ClassRow:
    """One class as the check found it."""

    name: str
    train: int  # readable training images
    test: int
    bad: int  # of both
    kept: int | None  # N_k: what the recipe's profile keeps of `train`; None where it cannot be cut
    group: str  # "many" | "medium" | "few" | ""


@dataclass(frozen=True)
class Checked:
    """What was found; images are numbered through the pool and the source's own test images.

    Attributes:
        names: (N) of the images, as lists name them.
        labels: (N,)
        for_test: (N,) which are for testing.
        left_out: (N,) which the recipe's own list left out beforehand; nothing else counts them.
        relations: (P,) places in RELATIONS, of the pairs.
    """

    recipe: Recipe
    path: Path | None
    census: Census
    faults: tuple[Fault, ...]
    names: Sequence[str]
    labels: Indices
    for_test: Mask
    left_out: Mask
    listed: Quarantine | None
    classes: tuple[ClassRow, ...]
    scan: Scan
    pairs: Pairs
    relations: npt.NDArray[np.int8]
    album: Album
    seconds: float  # of looking at the images, without finding and comparing pairs
    workers: int

    @property
    def looked_at(self) -> int:
        """Images that were read."""
        return len(self.names) - int(self.left_out.sum())

    @property
    def bad_stops(self) -> bool:
        """Whether training would stop at an image that cannot be read."""
        return bool(self.scan.bad) and self.recipe.data.on_bad_image == "error"

    def count(self, relation: Relation) -> int:
        """Pairs of a relation."""
        return int((self.relations == RELATIONS.index(relation)).sum())

    def members(self, relation: Relation) -> set[int]:
        """The images in pairs of a relation. Of the same bytes there may be more: pairs are told with the first of them alone."""
        return set(self.pairs.members[self.relations == RELATIONS.index(relation)].ravel().tolist())

    def leaking(self) -> tuple[set[int], set[int]]:
        """All training images that are alike with a test image, and those test images; of the same bytes, every one."""
        train: set[int] = set()
        test: set[int] = set()
        same = self._same()
        linked = [(a, b) for a, b in self.pairs.members[~self.pairs.exact].tolist()] + [(a, a) for a in same]
        for a, b in linked:
            several = [same.get(a, [a]), same.get(b, [b])]
            for one, other in (several, several[::-1]):
                if here := [i for i in one if self.for_test[i]]:
                    there = [i for i in other if not self.for_test[i]]
                    train.update(there)
                    test.update(here if there else ())
        return train, test

    def sizes(self) -> Counter[tuple[int, int]]:
        """Readable images by (width, height) in px."""
        values, counts = np.unique(self.scan.sizes[self._good()], axis=0, return_counts=True)
        return Counter({(int(w), int(h)): int(n) for (w, h), n in zip(values, counts, strict=True)})

    def forms(self) -> Counter[tuple[str, str]]:
        """Readable images by (format, mode)."""
        counts = np.bincount(self.scan.forms[self._good()], minlength=len(self.scan.form_names)).tolist()
        return Counter({form: n for form, n in zip(self.scan.form_names, counts, strict=False) if n})

    def smaller(self) -> int:
        """Readable images whose shorter side is less than the recipe's image_size_px: they will be enlarged."""
        return int((self.scan.sizes[self._good()].min(axis=1) < self.recipe.data.image_size_px).sum())

    def problems(self, strict: bool = False) -> list[tuple[str, str]]:
        """(problem, remedy) of what training would stop at; with `strict` also of images that are there twice, or are skipped."""
        found = [(fault.problem, fault.remedy) for fault in self.faults if fault.level == "error"]
        if self.scan.bad and (strict or self.bad_stops):
            first = min(self.scan.bad)
            many = f"{len(self.scan.bad):,} images cannot be read, the first" if len(self.scan.bad) > 1 else "an image cannot be read"
            found.append((f"{many}: {self.scan.bad[first].reason}", self._way_out("")))
        for relation in RELATIONS if strict else ():
            if count := self.count(relation):
                many = "1 pair" if count == 1 else f"{count:,} pairs"
                found.append((f"{many} of equal or nearly equal images: {MEANINGS[relation]}", self._way_out(f" --leave-out {relation}s")))
        return found

    def to_leave_out(self, what: Iterable[Remove]) -> dict[str, str]:
        """Names of images to leave out, and why.

        "unreadable": what cannot be read. "leaks": of a training and a test image that are alike, the training one, so that the
        test set stays comparable with others' results. "conflicts": both images, since nothing says which label is right.
        "repeats": all but the first.
        """
        wanted = set(what)
        out: dict[int, str] = {}
        if "unreadable" in wanted:
            out |= {i: f"unreadable: {bad.kind}" for i, bad in self.scan.bad.items()}
        if "leaks" in wanted:
            out |= dict.fromkeys(self.leaking()[0], "leak")
        if "conflicts" in wanted:
            same = self._same()
            out |= {i: "conflict" for rep in self.members("conflict") for i in same.get(rep, [rep]) if i not in out}
        if "repeats" in wanted:
            chosen = self.relations == RELATIONS.index("repeat")
            for first, second in sorted(self.pairs.members[chosen].tolist()):
                if first not in out:
                    out.setdefault(second, f"repeat: {self.names[first]}")
        return {self.names[i]: reason for i, reason in sorted(out.items())}

    def quarantine(self, what: Iterable[Remove]) -> Quarantine:
        """The list to write: what the recipe's own list left out already, what is to be left out now, and what every file was."""
        before = dict(self.listed.left_out) if self.listed else {}
        none = np.void(bytes(16))
        known = {name: bytes(digest).hex() for name, digest in zip(self.names, self.scan.digests, strict=True) if digest != none}
        return Quarantine(before | self.to_leave_out(what), (dict(self.listed.digests) if self.listed else {}) | known)

    def told(self, most: int, relation: Relation | None = None) -> Iterator[tuple[tuple[int, int], int, bool, float]]:
        """The first pairs, of one relation or of all: (images, place of the relation, same bytes, distance)."""
        chosen = np.flatnonzero(np.ones(len(self.pairs), bool) if relation is None else self.relations == RELATIONS.index(relation))[:most]
        for i in chosen.tolist():
            first, second = self.pairs.members[i].tolist()
            yield (first, second), int(self.relations[i]), bool(self.pairs.exact[i]), float(self.pairs.distances[i])

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values; of a kind of finding at most LISTED are listed, all are counted."""
        bad = sorted(self.scan.bad.items())
        pairs = [
            {
                "relation": RELATIONS[relation],
                "images": [self.names[i] for i in pair],
                "classes": [self.classes[int(self.labels[i])].name for i in pair],
                "same_bytes": exact,
                "distance": round(distance, 4),
            }
            for pair, relation, exact, distance in self.told(LISTED)
        ]
        leaks = [len(images) for images in self.leaking()]
        return {
            "recipe": self.recipe.name,
            "data": str(self.path) if self.path else None,
            "on_bad_image": self.recipe.data.on_bad_image,
            "images": {
                "looked_at": self.looked_at,
                "train": int((~self.for_test & ~self.left_out).sum()),
                "test": int((self.for_test & ~self.left_out).sum()),
                "test_held_out": self.census.held_out,
                "quarantined": int(self.left_out.sum()),
            },
            "faults": [vars(fault) for fault in self.faults],
            "unreadable": len(bad),
            "unreadable_images": [self._told(i) | {"kind": b.kind, "reason": b.reason} for i, b in bad[:LISTED]],
            "cut": len(self.scan.cut),
            "cut_images": [self._told(i) for i in sorted(self.scan.cut)[:LISTED]],
            "classes": [vars(row) for row in self.classes],
            "sizes": {f"{w}x{h}": n for (w, h), n in self.sizes().most_common(LISTED)},
            "smaller_than_image_size_px": self.smaller(),
            "formats": {f"{form} {mode}": n for (form, mode), n in self.forms().most_common()},
            "alike": {relation: {"pairs": self.count(relation), "images": len(self.members(relation))} for relation in RELATIONS},
            "leaking": {"train": leaks[0], "test": leaks[1]},
            "pairs": pairs,
            "near": {
                "limit": round(self.pairs.limit, 4),
                "usual": round(self.pairs.usual, 4) or None,
                "compared": self.pairs.compared,
                "not_compared": self.pairs.left_out,
            },
            "problems": [{"problem": problem, "remedy": remedy} for problem, remedy in self.problems()],
            "seconds": round(self.seconds, 3),
            "workers": self.workers,
        }

    def _told(self, index: int) -> dict[str, str]:
        split = "test" if self.for_test[index] else "train"
        return {"image": self.names[index], "class": self.classes[int(self.labels[index])].name, "split": split}

    def _good(self) -> Indices:
        good = ~self.left_out
        good[list(self.scan.bad)] = False
        return np.flatnonzero(good)

    def _same(self) -> dict[int, list[int]]:
        """The images of the same bytes, by the first of them."""
        groups: dict[int, list[int]] = {}
        for first, other in self.pairs.members[self.pairs.exact].tolist():
            groups.setdefault(first, [first]).append(other)
        return groups

    def _way_out(self, option: str) -> str:
        file = "quarantine.json"
        return f"mend or remove them, or: diffrc data check --quarantine {file}{option}, then --set data.quarantine={file}"


def check(recipe: Recipe, path: Path | None, workers: int = 1, near: bool = True, report: Report = silent) -> Checked:
    """Check a recipe's data set.

    Args:
        path: where it lies; without it `data.path` counts.
        workers: processes that decode; see `engines.checking.scan.scan`.
        near: look for images that are nearly alike too, not only for the same bytes.

    Raises: DataError where there is nothing to check: no data set, or one that its source cannot make sense of at all.
    """
    data = recipe.data
    census = take(data, path)
    if census.pool is None:
        raise DataError(census.faults[-1].problem, census.faults[-1].remedy)
    left_out, listed = quarantined(census, data)
    sets: list[ImageSet] = [images for images in (census.pool, census.test) if images is not None]
    began = time.monotonic()
    everything = data.on_bad_image == "skip" and census.held_out  # what is left out was among those of which test images are drawn
    scans, start = [], 0
    for images, what in zip(sets, ("check", "check test"), strict=False):
        wanted = np.flatnonzero(~left_out[start : start + len(images)] | everything)
        scans.append(scan(images, wanted, workers, lambda _, *done, what=what: report(what, *done)))
        start += len(images)
    found = together(scans)
    seconds = time.monotonic() - began
    for_test, fault = split_of(census, data, {i for i, bad in found.bad.items() if bad.kind != "changed"})
    found.bad = {i: bad for i, bad in found.bad.items() if not left_out[i]}
    found.cut = [i for i in found.cut if not left_out[i]]
    labels = np.concatenate([images.labels for images in sets])
    classes, more = _classes(recipe, census, labels, for_test, left_out, found)
    album = Album(sets)
    good = ~left_out
    good[list(found.bad)] = False
    pairs = likenesses(album, np.flatnonzero(good), found.digests, found.looks, near, report)
    return Checked(
        recipe,
        census.path,
        census,
        (*census.faults, *([fault] if fault else ()), *more),
        [name for images in sets for name in image_names(images, census.path)],
        labels,
        for_test,
        left_out,
        listed,
        tuple(classes),
        found,
        pairs,
        _relations(pairs, labels, for_test),
        album,
        seconds,
        workers,
    )


def _relations(pairs: Pairs, labels: Indices, for_test: Mask) -> npt.NDArray[np.int8]:
    first, second = pairs.members.T
    across = for_test[first] != for_test[second]
    places = [RELATIONS.index("leak"), RELATIONS.index("conflict")]
    return np.select([across, labels[first] != labels[second]], places, RELATIONS.index("repeat")).astype(np.int8)


def _classes(
    recipe: Recipe,
    census: Census,
    labels: Indices,
    for_test: Mask,
    left_out: Mask,
    found: Scan,
) -> tuple[list[ClassRow], list[Fault]]:
    """The class table, and what is wrong with classes by their counts."""
    assert census.pool is not None
    names = census.pool.names
    bad = np.zeros(len(labels), dtype=bool)
    bad[list(found.bad)] = True

    def counted(which: Mask) -> Indices:
        return np.bincount(labels[which], minlength=len(names))

    train, test = counted(~for_test & ~bad & ~left_out), counted(for_test & ~bad & ~left_out)
    faults: list[Fault] = []

    def fault(level: Literal["error", "warning"], what: str, problem: str, remedy: str) -> None:
        faults.append(Fault(level, what, problem, remedy))

    empty, single, untested = (np.flatnonzero(x) for x in (train == 0, train == 1, test == 0))
    if len(empty):
        fault("error", "no training image", f"{_named(names, empty)} no readable training image", "add images, or remove the class")
    if len(single):
        fault("warning", "one training image", f"{_named(names, single)} a single training image", "add images: one shows no variety")
    if len(untested) == len(names):
        fault("warning", "no test images", "there are no test images", "accuracy cannot be measured; see data.test_per_class")
    elif len(untested):
        fault("warning", "no test image", f"{_named(names, untested)} no test image", "its accuracy cannot be measured; add some")
    kept: list[int] | list[None] = [None] * len(names)
    groups: Sequence[str] = [""] * len(names)
    if not len(empty):
        try:
            counts = profile_counts(recipe.data, train, names)
            kept = counts.tolist()
            members = class_groups(recipe.data, counts)
            groups = members
            check_groups(members, counts)
        except DiffRCError as error:
            fault("error", "long tail", error.problem, error.remedy)
    rows = zip(names, train.tolist(), test.tolist(), counted(bad).tolist(), kept, groups, strict=True)
    return [ClassRow(*row) for row in rows], faults


def _named(names: Sequence[str], which: Indices) -> str:
    """ "class 'cat' has", or "the classes 'cat', 'dog' and 3 more have"."""
    if len(which) == 1:
        return f"class {names[int(which[0])]!r} has"
    told = ", ".join(repr(names[k]) for k in which[:3].tolist())
    return f"the classes {told}{f' and {len(which) - 3:,} more' if len(which) > 3 else ''} have"
