"""The balanced data set of a run, image by image: the real long tail, the kept synthetic images, and the real test images."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from engines import store
from engines.data.decode import Pixels, read_regular_file
from engines.data.images import ImageSet, Indices
from engines.data.longtail import LongTail
from engines.errors import ConflictError, DataError, UsageError
from engines.evaluation.synthetic import pixel_hashes, refuse_data_folder
from engines.store import RunFolder
from engines.synthesis.plan import PLAN_FILE, require_current
from engines.synthesis.sheet import MAX_PNG_BYTES, decode_png, image_path

SplitName = Literal["train", "test"]

BLOCK = 256  # images in memory at a time
NO_SEED, NO_PLAN = -1, ""  # of a real image; not null, which readers of JSON lines and CSV take for a column of another type


@dataclass(frozen=True, slots=True)
class Sample:
    """An image of the data set and what is told of it in every format."""

    id: str  # "train-synthetic-0012-000345": split, kind, label, index
    label: int
    class_name: str
    synthetic: bool
    group: str  # "many" | "medium" | "few"
    index: int  # of a real image: its place in the split; of a synthetic one: its number within plan and class
    seed: int  # that named a synthetic image's noise
    plan: str  # id of what fixed every pixel of a synthetic image
    weight: float  # loss weight, as `diffrc evaluate` trains with
    png: bytes

    @property
    def file(self) -> str:
        """`synthetic-000345.png`, unique within split and class."""
        return f"{'synthetic' if self.synthetic else 'real'}-{self.index:06d}.png"

    def row(self) -> dict[str, Any]:
        """All but the pixels, as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "png"}


@dataclass(frozen=True)
class Split:
    """One split before its images are read. Its own order: real images as the run has them, then synthetic ones by class and index."""

    name: SplitName
    labels: Indices  # (N,)
    synthetic: npt.NDArray[np.bool_]  # (N,)
    index: Indices  # (N,)
    png_bytes: Indices  # (N,) at most, each image's file

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self, classes: int, *, synthetic: bool) -> list[int]:
        """(K) images a class of one kind."""
        return [int(n) for n in np.bincount(self.labels[self.synthetic == synthetic], minlength=classes)]

    def id(self, row: int) -> str:
        """The name of an image that no other image of the data set has: split, kind, label, index."""
        kind = "synthetic" if self.synthetic[row] else "real"
        return f"{self.name}-{kind}-{self.labels[row]:04d}-{self.index[row]:06d}"

    def shuffled(self, seed: int) -> Indices:
        """(N,) an order of the split; a pure function of its length and the seed."""
        return np.random.default_rng([seed, len(self)]).permutation(len(self)).astype(np.int64)

    def by_class(self, rank: Indices) -> Indices:
        """(N,) the order of a listing: class k at place rank[k] of (K,), real before synthetic, then by index."""
        return np.lexsort((self.index, self.synthetic, rank[self.labels])).astype(np.int64)


@dataclass(frozen=True)
class Balanced:
    """A run's data set. Made by `open_balanced`."""

    run: RunFolder
    longtail: LongTail
    plan: Mapping[str, Any]  # synth/plan.json
    kept: tuple[Indices, ...]  # (K) indices of the kept synthetic images of each class, ascending

    @property
    def names(self) -> tuple[str, ...]:
        return self.longtail.names

    @cached_property
    def train(self) -> Split:
        """The training split: real and synthetic images."""
        real, classes = self.longtail.train, len(self.names)
        made = np.concatenate(self.kept)  # (M,)
        made_labels = np.repeat(np.arange(classes, dtype=np.int64), [len(indices) for indices in self.kept])
        sizes = [self.synthetic_path(int(k), int(i)).stat().st_size for k, i in zip(made_labels, made, strict=True)]
        return Split(
            "train",
            np.concatenate([real.labels, made_labels]),
            np.repeat([False, True], [len(real), len(made)]),
            np.concatenate([np.arange(len(real), dtype=np.int64), made]),
            np.concatenate([_png_bounds(real), np.array(sizes, dtype=np.int64)]),
        )

    @cached_property
    def test(self) -> Split:
        """The test split: real images alone."""
        images = self.longtail.test
        count = len(images)
        return Split("test", images.labels, np.zeros(count, dtype=bool), np.arange(count, dtype=np.int64), _png_bounds(images))

    def synthetic_path(self, label: int, index: int) -> Path:
        """The file of a kept synthetic image."""
        return self.run.synth / image_path(self.names[label], label, index)

    def samples(self, split: Split, order: Indices) -> Iterator[Sample]:
        """The images of a split, one after another, in the memory of a block.

        A synthetic image is passed on as the very bytes that `diffrc synth` wrote, after they were verified; a real one is encoded as
        the pixels that the run was trained on.

        Raises DataError for an image that is damaged, of another plan, or synthetic and a test image all the same.
        """
        for start in range(0, len(order), BLOCK):
            rows = order[start : start + BLOCK]
            real = rows[~split.synthetic[rows]]
            pixels = iter(self._images(split).pixels(split.index[real]))
            for row in rows:
                label, index = int(split.labels[row]), int(split.index[row])
                if split.synthetic[row]:
                    seed, plan, weight = self._seed, str(self.plan["plan"]), self.run.recipe.recognizer.synthetic_weight
                    png = self._synthetic_png(label, index)
                else:
                    seed, plan, weight, png = NO_SEED, NO_PLAN, 1.0, encode_real(next(pixels), label, index)
                yield Sample(
                    split.id(int(row)),
                    label,
                    self.names[label],
                    bool(split.synthetic[row]),
                    self.longtail.groups[label],
                    index,
                    seed,
                    plan,
                    float(weight),
                    png,
                )

    def pixels(self, split: Split, rows: Indices) -> Pixels:
        """(B, H, W, C) uint8 of some rows of a split. Raises DataError as `samples`."""
        found = np.empty((len(rows), *self._shape), dtype=np.uint8)
        real = ~split.synthetic[rows]
        found[real] = self._images(split).pixels(split.index[rows[real]])
        for place in np.flatnonzero(~real):
            label, index = int(split.labels[rows[place]]), int(split.index[rows[place]])
            found[place] = self._verified(label, index)[1]
        return found

    @property
    def _shape(self) -> tuple[int, int, int]:
        frame = self.longtail.train.frame
        return frame.size_px, frame.size_px, frame.channels

    @property
    def _seed(self) -> int:
        return int(self.plan["identity"]["synth.seed"])

    @cached_property
    def _tested(self) -> set[bytes]:
        """Digests of the test images' pixels."""
        test = self.longtail.test
        blocks = (np.arange(start, min(start + BLOCK, len(test)), dtype=np.int64) for start in range(0, len(test), BLOCK))
        return set().union(*(pixel_hashes(test.pixels(block)) for block in blocks))

    def _images(self, split: Split) -> ImageSet:
        return self.longtail.train if split.name == "train" else self.longtail.test

    def _synthetic_png(self, label: int, index: int) -> bytes:
        data, pixels = self._verified(label, index)
        if pixel_hashes(pixels[None]) & self._tested:
            raise DataError(
                f"{self.synthetic_path(label, index)} is an image of the test set: accuracy on it would mean nothing",
                "synthesize into a fresh run folder and keep the test set out of training",
            )
        return data

    def _verified(self, label: int, index: int) -> tuple[bytes, Pixels]:
        path = self.synthetic_path(label, index)
        data = read_regular_file(path, MAX_PNG_BYTES)
        pixels, record = decode_png(data, self.names[label], str(path))
        told = (record.plan, record.class_id, record.index, record.kept)
        if told != (self.plan["plan"], label, index, True) or pixels.shape != self._shape:
            raise DataError(f"{path} is not the image of that name in the plan", "the same diffrc synth command makes it again")
        return data, pixels


def open_balanced(run: RunFolder, longtail: LongTail) -> Balanced:
    """What a run has to share. Reads no image yet.

    Raises:
        UsageError: nothing was synthesized, or the images lie inside the data set.
        ConflictError: the run was trained on other data, or the images were made by other networks than it holds now.
        DataError: the plan is damaged, or no image was kept.
    """
    remedy = f"diffrc synth --fill --run {run.path}"
    if not (run.synth / PLAN_FILE).exists():
        raise UsageError(f"{run.path} has no synthesized images yet", remedy)
    table = run.classes()
    changed = [key for key, value in longtail.table().items() if key != "groups" and table[key] != value]
    if changed:
        raise ConflictError(
            f"{run.path} was trained on other data ({', '.join(changed)} differ)", "--data with the data set that it was trained on"
        )
    require_current(run)
    refuse_data_folder(run.synth, Path(run.recipe.data.path) if run.recipe.data.path else None)
    plan = store.read_json(run.synth / PLAN_FILE)
    if plan.get("identity", {}).get("classes") != list(longtail.names):
        raise DataError(f"{run.synth / PLAN_FILE} is damaged, or of a run with other classes", f"remove {run.synth}, then {remedy}")
    kept = tuple(_kept(run.synth, name, k) for k, name in enumerate(longtail.names))
    if not any(len(indices) for indices in kept):
        raise DataError(f"{run.synth} holds no synthesized images that were kept", remedy)
    return Balanced(run, longtail, plan, kept)


def encode_real(pixels: Pixels, label: int, index: int) -> bytes:
    """PNG of (H, W, C) uint8, C = 1 or 3, that says synthetic=false; equal arguments give equal bytes."""
    text = PngImagePlugin.PngInfo()
    for key, value in {"synthetic": "false", "class_id": label, "index": index}.items():
        text.add_text(key, str(value))
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


def _png_bounds(images: ImageSet) -> Indices:
    """(N,) bytes that no image's PNG exceeds: its values with a filter byte a row, stored as they are in the worst case."""
    values = images.frame.size_px * (images.frame.size_px * images.frame.channels + 1)
    return np.full(len(images), values + values // 1000 + 1024, dtype=np.int64)


def _kept(folder: Path, name: str, label: int) -> Indices:
    place = (folder / image_path(name, label, 0)).parent
    found = [path.stem for path in place.iterdir() if re.fullmatch(r"\d{6,9}\.png", path.name)] if place.is_dir() else []
    return np.sort(np.array(found, dtype=np.int64))
