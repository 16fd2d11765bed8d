"""What a synthesis folder holds and lacks: the images on its shelf, their yield, the queue of those to be made, the guidance figures."""

from __future__ import annotations

import itertools
import math
import struct
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines import store
from engines.data.decode import Pixels, read_regular_file
from engines.data.names import slug
from engines.diffusion.sampler import StepLog
from engines.errors import ConflictError, DataError
from engines.recipe import Recipe
from engines.synthesis import select
from engines.synthesis.plan import GUIDANCE_FILE, MANIFEST_FILE, ImageId, Plan
from engines.synthesis.select import REASONS, UNMEASURED, Figures, Reason
from engines.synthesis.sheet import MAX_PNG_BYTES, REJECTED, Record, decode_png, scan_class

YIELD_FILE = "yield.json"


@dataclass(frozen=True)
class ClassYield:
    """What a folder holds of a class after a job, and how many images it took."""

    class_id: int
    name: str
    asked: int
    kept: int  # at least `asked`, unless the selection gave up
    made: int  # by this job, the dropped ones among them
    dropped: Mapping[str, int]  # images in all by reason, each of REASONS
    folder: Path

    @property
    def rejected(self) -> int:
        """Dropped images in all."""
        return sum(self.dropped.values())

    @property
    def share(self) -> float | None:
        """The share of the images made so far that the selection kept; None where none was made."""
        return self.kept / (self.kept + self.rejected) if self.kept + self.rejected else None

    @property
    def short(self) -> int:
        """Images that were asked for and are not there."""
        return max(0, self.asked - self.kept)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. `yield` is the share kept."""
        figures = {"kept": self.kept, "made": self.made, "rejected": self.rejected, "dropped": dict(self.dropped), "yield": self.share}
        return {"class": self.name, "asked": self.asked, **figures, "short": self.short, "folder": str(self.folder)}


class Records(MutableMapping[int, Record]):
    """The records of a class's images by index, in a third of the memory: what many of them share is kept once."""

    def __init__(self) -> None:
        self._rows: dict[int, bytes] = {}
        self._shared: list[Record] = []

    def __getitem__(self, index: int) -> Record:
        shared, dropped, start, sha256, *figures = _ROW.unpack(self._rows[index])
        told = Figures(*(None if math.isnan(figure) else figure for figure in figures))
        shared_record: Record = self._shared[shared]
        begun = None if start == _NO_START else start
        return replace(shared_record, index=index, pixels_sha256=sha256.hex(), figures=told, dropped=_REASONS[dropped], start=begun)

    def __setitem__(self, index: int, record: Record) -> None:
        assert record.index == index
        shared = replace(record, index=0, pixels_sha256="", figures=UNMEASURED, dropped="", start=None)
        if shared not in self._shared:  # another one where other versions made the images of before
            self._shared.append(shared)
        figures = (math.nan if figure is None else figure for figure in record.figures)
        sha256, dropped = bytes.fromhex(record.pixels_sha256), _REASONS.index(record.dropped)
        start = _NO_START if record.start is None else record.start
        self._rows[index] = _ROW.pack(self._shared.index(shared), dropped, start, sha256, *figures)

    def __delitem__(self, index: int) -> None:
        del self._rows[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, index: object) -> bool:
        return index in self._rows


_NO_START = -1
_ROW = struct.Struct(f"<HBq32s{len(Figures._fields)}d")
_REASONS: tuple[Reason, ...] = ("", *REASONS)


@dataclass
class Shelf:
    """The images that lie in a folder."""

    folder: Path
    plan: Plan
    images: dict[int, MutableMapping[int, Record]]  # class -> index; each asked class has an entry
    not_finite: int = 0
    made: dict[int, int] = field(default_factory=dict)
    unlisted: list[Record] = field(default_factory=list)  # committed, not yet in the manifest

    @classmethod
    def open(cls, folder: Path, plan: Plan, wanted: Iterable[int]) -> Shelf:
        """Scan a locked folder: trust what matches its hash, delete what does not."""
        shelf = cls(folder, plan, {})
        for k in range(len(plan.names)):
            place = folder / slug(plan.names[k], k)
            if k not in wanted and not place.exists():
                continue
            for path in (place, place / REJECTED):
                if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
                    raise ConflictError(f"{path} is a symbolic link", f"remove it; images are written inside {folder} only")
            found = shelf.images[k] = Records()
            for path, image in scan_class(folder, plan.names, k, plan.id):
                if image:
                    found[image.record.index] = image.record
                else:
                    path.unlink()
        shelf.write_manifest()
        return shelf

    def kept(self, class_id: int) -> int:
        """Images of a class that the selection kept."""
        return sum(record.kept for record in self.images[class_id].values())

    def put(self, record: Record, png: bytes) -> None:
        """Commit an image; `list_new` gives it its line of the manifest."""
        store.write_bytes(self.folder / record.path(), png)
        self.unlisted.append(record)
        self.images[record.class_id][record.index] = record
        self.made[record.class_id] = self.made.get(record.class_id, 0) + 1

    def list_new(self) -> None:
        """Add the lines of the images that were committed since the last call to the manifest: one write for all of a batch."""
        if self.unlisted:
            store.append_json_lines(self.folder / MANIFEST_FILE, (record.line() for record in self.unlisted))
            self.unlisted.clear()

    def write_manifest(self) -> None:
        """The manifest, from what the images say about themselves, by class and index."""
        lines = (self.images[k][i].line() for k in sorted(self.images) for i in sorted(self.images[k]))
        store.write_json_lines(self.folder / MANIFEST_FILE, lines)

    def kept_indices(self, class_id: int) -> list[int]:
        """The images of a class that the selection kept, in order."""
        return sorted(index for index, record in self.images[class_id].items() if record.kept)

    def records(self, class_id: int, indices: Iterable[int]) -> list[Record]:
        """The records of images of a class."""
        return [self.images[class_id][index] for index in indices]

    def read(self, records: Iterable[Record]) -> Pixels:
        """(n, H, W, C) uint8, read back. Raises DataError where a file was damaged meanwhile."""
        channels, height, width = self.plan.identity["image"]
        images = [self._read(record) for record in records]
        return np.stack(images) if images else np.empty((0, height, width, channels), dtype=np.uint8)

    def _read(self, record: Record) -> Pixels:
        path = self.folder / record.path()
        return decode_png(read_regular_file(path, MAX_PNG_BYTES), record.class_name, str(path))[0]

    def yield_of(self, class_id: int, asked: int) -> ClassYield:
        """What there is of a class now."""
        name = self.plan.names[class_id]
        reasons = Counter[str](record.dropped for record in self.images[class_id].values())
        dropped = {str(reason): reasons[reason] for reason in REASONS}
        return ClassYield(class_id, name, asked, reasons[""], self.made.get(class_id, 0), dropped, self.folder / slug(name, class_id))

    def write_yield(self, wanted: Mapping[int, int]) -> None:
        """The yield of every class of the folder, from what its images say, whatever jobs made them; `wanted` by this one."""
        rows = []
        for k in sorted(self.images):
            found = self.yield_of(k, wanted.get(k, 0))
            made = found.kept + found.rejected
            rows.append(found.to_json() | {"asked": wanted.get(k), "made": made, "folder": found.folder.name})
        store.write_json(self.folder / YIELD_FILE, rows)


class Queue:
    """Images still to be made: of each class the lowest free indices, as many as it lacks, one queue a row of the batch.

    They are named turn by turn over the classes when a row runs out, so that a long job needs no more memory than a short one.
    """

    def __init__(self, shelf: Shelf, wanted: Mapping[int, int], recipe: Recipe) -> None:
        self.batch_size = recipe.synth.batch_size
        tries = recipe.select.max_tries if select.is_on(recipe.select) else 1.0
        self._last = {k: round(tries * n) for k, n in wanted.items()}  # the index that is not tried any more
        self._there = shelf.images
        self._next = dict.fromkeys(wanted, 0)
        self._rows: list[deque[ImageId]] = [deque() for _ in range(self.batch_size)]
        self._unnamed = {k: lack for k, n in wanted.items() if (lack := n - shelf.kept(k)) > 0}
        self.total = sum(wanted.values())
        self.missing = sum(self._unnamed.values())

    def add(self, class_id: int, *, lost: bool = False) -> None:
        """Ask for one more image of a class; nothing where its tries are used up.

        Args:
            lost: in place of one that was not finite, which is no try: `synth.max_bad` bounds those.
        """
        self._last[class_id] += lost
        index = self._next[class_id]
        while index in self._there[class_id]:
            index += 1
        self._next[class_id] = index + 1
        if index < self._last[class_id]:
            image = ImageId(class_id, index)
            self._rows[image.row(self.batch_size)].append(image)

    def batch(self) -> list[ImageId]:
        """The next images, at most one a row; [] where none waits."""
        while self._unnamed and not all(self._rows):
            for k in list(self._unnamed):
                self.add(k)
                self._unnamed[k] -= 1
            self._unnamed = {k: lack for k, lack in self._unnamed.items() if lack}
        return [row.popleft() for row in self._rows if row]


class GuidanceLog:
    """The sampler's figures, averaged at each timestep over all batches of a folder: guidance.json.

    Written after each batch, before its images: a kill loses the figures of no image, and counts a batch that it cut short twice.
    """

    def __init__(self, sums: dict[int, list[float]], batches: int) -> None:
        self._sums = sums
        self._batches = batches

    @classmethod
    def open(cls, folder: Path) -> GuidanceLog:
        """Continue what an earlier job wrote."""
        if not (folder / GUIDANCE_FILE).exists():
            return cls({}, 0)
        columns = ("t", "guidance_to_noise", "scale", "log_prob")
        table = store.read_object(folder / GUIDANCE_FILE, batches=int, **dict.fromkeys(columns, list))
        n, values = table["batches"], [table[column] for column in columns]
        if len(set(map(len, values))) != 1 or not all(map(store.is_number, (n, *itertools.chain(*values)))):
            raise DataError(f"{folder / GUIDANCE_FILE} is damaged: it is no table of figures", "remove the file; it is kept anew")
        return cls({t: [n * figure for figure in figures] for t, *figures in zip(*values, strict=True)}, n)

    def add(self, steps: Sequence[StepLog]) -> None:
        """Count one batch, unless an image in it was not finite: it has no averages."""
        rows = torch.stack([torch.stack(step[1:]) for step in steps]).tolist()  # (steps, 3), read from the device at once
        if not np.isfinite(rows).all():
            return
        self._batches += 1
        for step, values in zip(steps, rows, strict=True):
            self._sums[step.t] = [total + value for total, value in zip(self._sums.get(step.t, (0.0,) * 3), values, strict=True)]

    def write(self, folder: Path) -> None:
        """Commit the averages; nothing where no batch was made."""
        if self._batches:
            order = sorted(self._sums, reverse=True)
            names = ("guidance_to_noise", "scale", "log_prob")
            columns = {name: [self._sums[t][i] / self._batches for t in order] for i, name in enumerate(names)}
            store.write_json(folder / GUIDANCE_FILE, {"batches": self._batches, "t": order, **columns})
