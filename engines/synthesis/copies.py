"""Are generated images copies of training images? The nearest and second nearest real image of each, in pixels and in the guide's features.

    ratio = d1 / d2,   a copy: ratio <= select.copy_ratio

d1 and d2 are the distances to the nearest and the second nearest different real image of any class. The criterion, with 1/3 and in
pixels, is that of Yoon et al. 2023, "Diffusion Probabilistic Models Generalize when They Fail to Memorize".

A ratio has no unit, but it knows the dimension: among points spread evenly over m dimensions a share ratio^m passes for copies. In
pixels m is large and the share next to nothing. A guide, though, is trained to draw each class together: where it has left a
class hardly more than a curve (m = 1), a third of all honest images pass at 1/3. So the same is asked of real images, left out one
by one, and a warning is given only where generated images are copies more often than real ones are of each other.

What it does not see: a copy of an image whose near duplicate is in the data as well, for then d2 is small too. Exact duplicates,
mirrored ones included where the training flips, count as one image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines import store
from engines.data.batches import to_tensor
from engines.data.decode import Pixels
from engines.data.images import ImageSet, Indices
from engines.data.names import shorten
from engines.interrupt import StopRequest
from engines.networks.guide import Guide
from engines.progress import Report, silent
from engines.recipe import Recipe, SelectSection
from engines.synthesis.neighbors import Each, Neighbors, copy_ratios, nearest_two
from engines.synthesis.select import FEATURE_RESOLUTION, look
from engines.synthesis.sheet import PairsRow, PairTile, Record, pairs_sheet
from engines.synthesis.shelf import Shelf

SpaceName = Literal["pixel", "feature"]

COPIES_FILE, PAIRS_FILE = "copies.json", "copies.png"
COMPARED_PX = 32  # larger images are averaged down to this: a copy stays one, and the cost stays bounded
OTHERS_LEAST, OTHERS_MOST = 2_000, 20_000  # real images of classes that the folder does not hold, evenly spaced ones:
OTHERS_PER_IMAGE = 4  # so many for each generated image, for a look at five images should not take longer than making them
USUAL_IMAGES = 1_000  # real images, over all classes, that are left out one by one
USUAL_LEAST = 10  # of each class, if it has them
TOLD_BY_FEATURES = 3  # different real images that a class needs: of fewer, the second nearest is of another class, far off for every image
STANDARD_ERRORS: Mapping[SpaceName, float] = {"pixel": 0.0, "feature": 3.0}  # by which copies must be more frequent than among real images
PAIRS_LISTED = 10  # of a class, in copies.json
PAIRS_SHOWN = 3  # of a class and space, in copies.png
CLASSES_SHOWN = 20

READ_ROWS, COMPARED_ROWS, LOOK_ROWS = 2048, 512, 64  # bound the memory, each a multiple of the next; LOOK_ROWS also fixes the rounding

# -------------------------------------------------------------------------------------------------------------- findings


class Share(NamedTuple):
    """So many copies among so many images."""

    copies: int
    images: int

    @property
    def share(self) -> float:
        return self.copies / self.images if self.images else 0.0


@dataclass(frozen=True)
class Pair:
    """A generated image and its nearest real one."""

    generated: Record
    real: int  # index in the training set
    mirrored: bool
    distance: float  # L2 of [-1, 1] pixels at COMPARED_PX at most, or of unit features
    ratio: float


@dataclass(frozen=True)
class Finding:
    """The copies of one class in one space."""

    generated: Share
    real: Share  # of the class's real images, each left out in turn
    usual: Share  # of real images of all classes
    pairs: tuple[Pair, ...]  # the smallest ratios first
    warns: bool


@dataclass(frozen=True)
class ClassCopies:
    """The copies of one class."""

    class_id: int
    name: str
    findings: Mapping[SpaceName, Finding]  # "feature" is missing without a guide, and where the class has too few real images


@dataclass(frozen=True)
class Copies:
    """What a folder's images were found to be."""

    classes: tuple[ClassCopies, ...]
    usual: Mapping[SpaceName, Share]
    real_images: int  # different ones that were compared with
    duplicates: int
    mirrored: bool

    def total(self, space: SpaceName) -> Share:
        """Of all classes together."""
        found = [c.findings[space].generated for c in self.classes if space in c.findings]
        return Share(sum(f.copies for f in found), sum(f.images for f in found))

    def warnings(self, train: ImageSet) -> list[str]:
        """A line for each class and space with more copies than can be usual."""
        lines = []
        for c in self.classes:
            for space, finding in c.findings.items():
                if finding.warns:
                    found, usual, pair = finding.generated, _yardstick(finding.real, finding.usual), finding.pairs[0]
                    lines.append(
                        f"{shorten(c.name)}: {100 * found.share:.1f} % of {found.images} images are copies of training images by {space}s, "
                        f"of real ones {100 * usual.share:.1f} %; the closest: {pair.generated.path()} of {train.origin(pair.real)}"
                    )
        return lines

    def to_json(self, recipe: Recipe, train: ImageSet) -> dict[str, Any]:
        """Plain JSON values; the training images by their origin."""

        def pair_of(pair: Pair) -> dict[str, Any]:
            real = {"real": train.origin(pair.real), "real_class": train.names[train.labels[pair.real]], "mirrored": pair.mirrored}
            return {
                "file": pair.generated.path().as_posix(),
                **real,
                "distance": round(pair.distance, 4),
                "ratio": round(pair.ratio, 4),
            }

        def finding_of(finding: Finding) -> dict[str, Any]:
            return {
                **_share_of(finding.generated),
                "real": _share_of(finding.real),
                "warns": finding.warns,
                "closest": [pair_of(pair) for pair in finding.pairs],
            }

        classes = [{"class": c.name, **{space: finding_of(finding) for space, finding in c.findings.items()}} for c in self.classes]
        return {
            "copy_ratio": recipe.select.copy_ratio,
            "copy_share": recipe.select.copy_share,
            "compared_px": min(COMPARED_PX, recipe.data.image_size_px),
            "mirrored": self.mirrored,
            "real_images": self.real_images,
            "duplicates": self.duplicates,
            "generated": {space: _share_of(self.total(space)) for space in self.usual},
            "real": {space: _share_of(share) for space, share in self.usual.items()},
            "classes": classes,
            "warnings": self.warnings(train),
        }


def exceeds(generated: Share, real: Share, standard_errors: float) -> bool:
    """Whether copies are more frequent among generated than among real images, by so many standard errors of the difference.

    In pixels chance makes next to no copies, and each more than usual counts. In features it makes some, and the usual share is
    itself measured on few images.
    """
    if not generated.copies or not real.images:
        return generated.copies > 0
    together = (generated.copies + real.copies) / (generated.images + real.images)
    error = math.sqrt(together * (1 - together) * (1 / generated.images + 1 / real.images))
    return generated.share - real.share > standard_errors * error


def _yardstick(own: Share, usual: Share) -> Share:
    """Five real images of a class say little of it, so all classes have a say; a class may hold more near duplicates than others."""
    return own if own.share > usual.share else usual


def _share_of(share: Share) -> dict[str, Any]:
    return {"images": share.images, "copies": share.copies, "share": round(share.share, 6)}


# --------------------------------------------------------------------------------------------------------------- the job


def find_copies(
    shelf: Shelf,
    train: ImageSet,
    guide: Guide | None,
    recipe: Recipe,
    workers: int = 1,
    report: Report = silent,
    stop: StopRequest | None = None,
) -> Copies | None:
    """Compare every kept image of a synthesis folder with the training images; writes copies.json and copies.png.

    A function of the files and the networks alone, so that a killed check is simply done again. Memory: the real images at
    COMPARED_PX at most, and COMPARED_ROWS generated ones.

    Args:
        guide: whose features are compared; None = pixels only.

    Returns: None where `select.copy_ratio` is 0 or nothing is there to compare. Raises Interrupted when asked to stop.
    """
    images = {k: kept for k in sorted(shelf.images) if (kept := shelf.kept_indices(k))}
    if not recipe.select.copy_ratio or not images or not len(train):
        return None
    mirrored = recipe.source.horizontal_flip or recipe.target.horizontal_flip
    count = sum(map(len, images.values()))
    chosen = _compared_with(train.labels, list(images), min(max(OTHERS_PER_IMAGE * count, OTHERS_LEAST), OTHERS_MOST))
    steps = _Steps(len(chosen) + count, shelf.folder, report, stop or StopRequest())
    with _pool(workers) as each:
        real = _RealImages.read(train, chosen, guide, mirrored, each, steps)
        usual = real.left_out_one_by_one(recipe.select.copy_ratio, each)
        classes = []
        for k, kept in images.items():
            told: list[SpaceName] = [space for space in usual if k in usual[space] or space == "pixel"]
            compared: dict[SpaceName, list[tuple[Neighbors, Tensor]]] = {space: [] for space in told}
            for start in range(0, len(kept), COMPARED_ROWS):
                block = shelf.records(k, kept[start : start + COMPARED_ROWS])
                views = _views(shelf.read(block), guide, mirrored, each)
                for space in told:
                    compared[space].append(real.compare(space, views[space], None, each))
                steps.add(len(block))
            findings = {
                space: _finding(shelf.images[k], kept, real, space, compared[space], usual[space], k, recipe.select) for space in told
            }
            classes.append(ClassCopies(k, shelf.plan.names[k], findings))
    totals = {space: own[ALL] for space, own in usual.items()}
    copies = Copies(tuple(classes), totals, len(real.indices), len(chosen) - len(real.indices), mirrored)
    store.write_json(shelf.folder / COPIES_FILE, copies.to_json(recipe, train))
    store.write_bytes(shelf.folder / PAIRS_FILE, pairs_sheet(list(_pairs_rows(copies, shelf, train)), recipe.select.copy_ratio))
    return copies


def _finding(
    records: Mapping[int, Record],
    kept: Sequence[int],
    real: _RealImages,
    space: SpaceName,
    compared: Sequence[tuple[Neighbors, Tensor]],
    usual: Mapping[int, Share],
    class_id: int,
    select: SelectSection,
) -> Finding:
    found = Neighbors(*map(torch.cat, zip(*(neighbors for neighbors, _ in compared), strict=True)))
    ratios = torch.cat([ratios for _, ratios in compared])
    pairs = tuple(
        Pair(records[kept[i]], int(real.indices[found.nearest[i]]), bool(found.mirrored[i]), float(found.first[i]), float(ratios[i]))
        for i in ratios.argsort(stable=True)[:PAIRS_LISTED].tolist()
    )
    generated, own = Share(int((ratios <= select.copy_ratio).sum()), len(kept)), usual.get(class_id, Share(0, 0))
    warns = generated.share > select.copy_share and exceeds(generated, _yardstick(own, usual[ALL]), STANDARD_ERRORS[space])
    return Finding(generated, own, usual[ALL], pairs, warns)


ALL = -1  # in a table by class id: all classes together
Views = Mapping[SpaceName, Sequence[Tensor]]  # the images, and where it counts their mirror images


@dataclass(frozen=True)
class _RealImages:
    """The training images that are compared with, each different from all others."""

    indices: Indices  # (R,) in the training set
    labels: Indices  # (R,)
    spaces: Mapping[SpaceName, Tensor]  # (R, D)
    left_out: Indices  # (L,) places among the R, those that are left out one by one
    left_out_views: Views

    @classmethod
    def read(cls, train: ImageSet, chosen: Indices, guide: Guide | None, mirrored: bool, each: Each, steps: _Steps) -> _RealImages:
        """The first of each set of duplicates among the `chosen` training images."""
        parts: dict[SpaceName, list[Tensor]] = {}
        seen: set[bytes] = set()
        kept: list[int] = []
        for start in range(0, len(chosen), READ_ROWS):
            block = chosen[start : start + READ_ROWS]
            pixels = train.pixels(block)
            first: dict[bytes, int] = {}
            for i, key in enumerate(_keys(_averaged(pixels), mirrored)):
                first.setdefault(key, i)
            new = [i for key, i in first.items() if key not in seen]
            seen.update(first)
            kept += block[new].tolist()
            for space, (values, *_) in _views(pixels[new], guide, False, each).items():
                parts.setdefault(space, []).append(values)
            steps.add(len(block))
        indices = np.array(kept, dtype=np.int64)
        labels = train.labels[indices]
        left_out = _evenly_of_each(labels, len(train.names))
        views = _views(train.pixels(indices[left_out]), guide, mirrored, each)
        return cls(indices, labels, {space: torch.cat(values) for space, values in parts.items()}, left_out, views)

    def compare(self, space: SpaceName, views: Sequence[Tensor], leave_out: Tensor | None, each: Each) -> tuple[Neighbors, Tensor]:
        """Neighbors, their distances in the units of `Pair`, and ratios (Q,)."""
        unit, resolution = (127.5, 0.0) if space == "pixel" else (1.0, FEATURE_RESOLUTION)
        found = nearest_two(views, self.spaces[space], leave_out, each)
        found = found._replace(first=found.first / unit, second=found.second / unit)
        return found, copy_ratios(found, resolution)

    def left_out_one_by_one(self, copy_ratio: float, each: Each) -> dict[SpaceName, dict[int, Share]]:
        """The copies among real images by space and class id, and of ALL; a class too small for a space has no entry."""
        counts = np.bincount(self.labels)
        shares: dict[SpaceName, dict[int, Share]] = {}
        for space, views in self.left_out_views.items():
            _, ratios = self.compare(space, views, torch.from_numpy(self.left_out), each)
            copies, owners = (ratios <= copy_ratio).numpy(), self.labels[self.left_out]
            told = [k for k in np.unique(owners).tolist() if space == "pixel" or counts[k] >= TOLD_BY_FEATURES]
            own = {k: Share(int(copies[owners == k].sum()), int((owners == k).sum())) for k in told}
            shares[space] = own | {ALL: Share(sum(s.copies for s in own.values()), sum(s.images for s in own.values()))}
        return shares


def _views(pixels: Pixels, guide: Guide | None, mirrored: bool, each: Each) -> dict[SpaceName, list[Tensor]]:
    """Images (B, H, W, C) as points: pixels (B, D) uint8, features (B, F) float64."""
    both = [pixels, pixels[:, :, ::-1]] if mirrored else [pixels]
    views: dict[SpaceName, list[Tensor]] = {"pixel": [torch.from_numpy(_averaged(view).reshape(len(view), -1)) for view in both]}
    if guide is not None:

        def features(block: Pixels) -> Tensor:
            return look(guide, to_tensor(block)).features.double()

        blocks = [[view[i : i + LOOK_ROWS] for i in range(0, len(view), LOOK_ROWS)] for view in both]
        views["feature"] = [torch.cat(list(each(features, parts))) if parts else torch.empty(0, 0, dtype=torch.float64) for parts in blocks]
    return views


def _averaged(pixels: Pixels) -> Pixels:
    """(B, H, W, C) uint8 at COMPARED_PX at most, means rounded."""
    if pixels.shape[1] <= COMPARED_PX:
        return np.ascontiguousarray(pixels)
    means = F.adaptive_avg_pool2d(torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)), COMPARED_PX)
    return np.ascontiguousarray(means.round().to(torch.uint8).numpy().transpose(0, 2, 3, 1))


def _keys(pixels: Pixels, mirrored: bool) -> list[bytes]:
    """Equal for equal images, and where it counts for mirrored ones."""
    forms = [pixels, pixels[:, :, ::-1]] if mirrored else [pixels]
    return [min(hashlib.blake2b(form[i].tobytes(), digest_size=16).digest() for form in forms) for i in range(len(pixels))]


def _compared_with(labels: Indices, classes: Sequence[int], others: int) -> Indices:
    """All training images of these classes, and so many of all others, evenly spaced."""
    own = np.isin(labels, classes)
    return np.sort(np.concatenate([np.flatnonzero(own), _evenly(np.flatnonzero(~own), others)]))


def _evenly_of_each(labels: Indices, classes: int) -> Indices:
    """Places of evenly spaced images of each class, USUAL_IMAGES of all classes together where every class has at least USUAL_LEAST."""
    each = max(USUAL_LEAST, USUAL_IMAGES // classes)
    return np.concatenate([_evenly(np.flatnonzero(labels == k), each) for k in range(classes)])


def _evenly(values: Indices, count: int) -> Indices:
    return values if len(values) <= count else values[np.arange(count) * len(values) // count]


def _pairs_rows(copies: Copies, shelf: Shelf, train: ImageSet) -> Iterator[PairsRow]:
    """The classes with the smallest ratios, in the order of their ids."""
    worst = sorted(copies.classes, key=lambda c: (min(f.pairs[0].ratio for f in c.findings.values()), c.class_id))[:CLASSES_SHOWN]
    for c in sorted(worst, key=lambda c: c.class_id):
        blocks = {}
        for space, finding in c.findings.items():
            pairs = finding.pairs[:PAIRS_SHOWN]
            generated = shelf.read(pair.generated for pair in pairs)
            real = train.pixels(np.array([pair.real for pair in pairs], dtype=np.int64))
            blocks[space] = [
                PairTile(generated[i], real[i][:, ::-1] if pair.mirrored else real[i], pair.distance, pair.ratio)
                for i, pair in enumerate(pairs)
            ]
        yield PairsRow(c.name, blocks.get("pixel", []), blocks.get("feature", []))


class _Steps:
    """How far the check is, and whether it is to end."""

    def __init__(self, total: int, folder: Path, report: Report, stop: StopRequest) -> None:
        self.total, self.folder, self.report, self.stop = total, folder, report, stop
        self.done = 0
        self.add(0)

    def add(self, images: int) -> None:
        """Images that are compared. Raises Interrupted."""
        self.done += images
        self.report("copies", self.done, self.total, {})
        if self.stop.requested and self.done < self.total:
            raise self.stop.error(f"all images are in {self.folder}, not yet compared with the training images")


@contextmanager
def _pool(workers: int) -> Iterator[Each]:
    """`map` over threads that compute on one thread each, so that no sum depends on how many there are."""
    with ThreadPoolExecutor(max(1, workers), "copies", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool.map
