"""Images of one split: square, 8 bit, decoded on first use from files, tables or arrays, kept in memory while they fit."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from engines.data.decode import BadImage, Frame, Pixels, decode, fit, header_size
from engines.errors import DataError
from engines.progress import Report, silent

Indices = npt.NDArray[np.int64]
T = TypeVar("T")

MEMORY_BYTES = 2 << 30  # a set whose pixels take more than this is decoded anew at every use
SIZES_COUNTED = 20_000  # original sizes are counted over at most this many images


class Reader(Protocol):
    """A store of images, read by row number, from any thread."""

    def __len__(self) -> int: ...

    def read(self, rows: Indices, frame: Frame) -> Pixels:
        """(B, S, S, C) uint8. Raises DataError naming the first image that cannot be decoded."""
        ...

    def sizes(self, rows: Indices) -> Counter[tuple[int, int]]:
        """How many images have which original (width, height) in px, from headers alone."""
        ...

    def origin(self, row: int) -> str:
        """Where an image comes from, for messages."""
        ...


class ImageSet:
    """Labeled images of one split; indices count from 0 within the set.

    Attributes:
        labels: (N,) int64, 0..K-1.
        names: K class names; label k is `names[k]`.
        skipped: unreadable images that were left out (`on_bad_image = "skip"`).
        left_out: names of the images that a quarantine list left out.
    """

    left_out: tuple[str, ...] = ()

    def __init__(self, labels: Indices, names: Sequence[str], shelf: Shelf, slots: Indices | None = None, skipped: int = 0) -> None:
        self.labels = np.ascontiguousarray(labels, dtype=np.int64)
        self.names = tuple(names)
        self.skipped = skipped
        self._shelf = shelf
        self._slots = np.arange(len(shelf.rows), dtype=np.int64) if slots is None else slots
        self._filled = False
        assert self.labels.shape == self._slots.shape

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def frame(self) -> Frame:
        """Size in px and channels of what `pixels` returns."""
        return self._shelf.frame

    @property
    def reader(self) -> Reader:
        """Where the images lie; it may hold others too."""
        return self._shelf.reader

    @property
    def rows(self) -> Indices:
        """(N,) the images' rows in `reader`."""
        return self._shelf.rows[self._slots]

    def pixels(self, indices: Indices) -> Pixels:
        """(B, H, W, C) uint8 in the order of `indices` (B,), H = W = image_size_px, C = image_channels; a copy.

        The first call decodes the whole set when that fits into memory: a broken image is met before the first step and
        not in the middle of a long run. Raises DataError naming the image.
        """
        self.preload()
        return self._shelf.take(self._slots[np.asarray(indices, dtype=np.int64)])

    def preload(self, report: Report = silent) -> None:
        """Decode the whole set now if it fits into memory; `pixels` does so otherwise. Raises DataError naming an image."""
        if self._shelf.keeps and not self._filled:
            self._shelf.fill(self._slots, report)
            self._filled = True

    def subset(self, indices: Indices) -> ImageSet:
        """The images at `indices`, in that order. Decoded pixels are shared with this set."""
        at = np.asarray(indices, dtype=np.int64)
        shelf, slots = self._shelf, self._slots[at]
        if not shelf.keeps:  # the part may fit where the whole did not
            shelf, slots = Shelf(shelf.reader, shelf.frame, shelf.rows[slots]), np.arange(len(at), dtype=np.int64)
        part = ImageSet(self.labels[at], self.names, shelf, slots, self.skipped)
        part.left_out = self.left_out
        return part

    def watched(self, digests: Mapping[int, str], digest: Callable[[bytes], str]) -> ImageSet:
        """The same set, in which an encoded image is bad whose bytes have another digest than it had; by index.

        What has been decoded already is decoded again. Images that were never encoded are as they are.
        """
        reader = self.reader
        if not digests or not isinstance(reader, EncodedReader):
            return self
        rows = self.rows
        watched = reader.watched({int(rows[i]): known for i, known in digests.items()}, digest)
        same = ImageSet(self.labels, self.names, Shelf(watched, self.frame, rows), skipped=self.skipped)
        same.left_out = self.left_out
        return same

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """Images by original (width, height) in px; beyond SIZES_COUNTED images, of that many evenly spaced ones at most."""
        step = -(-len(self) // SIZES_COUNTED) or 1
        return self._shelf.reader.sizes(self._shelf.rows[self._slots[::step]])

    def origin(self, index: int) -> str:
        """The file, table row or archive entry that an image comes from."""
        return self._shelf.reader.origin(int(self._shelf.rows[self._slots[index]]))

    def without_unreadable(self) -> ImageSet:
        """The set without the images that cannot be decoded, counted in `skipped`. Decodes every image once."""
        readable = self._shelf.readable(self._slots)
        kept = self.subset(np.flatnonzero(readable))
        kept.skipped = self.skipped + int((~readable).sum())
        return kept


class Shelf:
    """Decoded pixels, one slot for each of some rows of a reader; shared by a set and its subsets."""

    BLOCK = 1024  # slots decoded at a time: bounds what is held beside the pixels

    def __init__(self, reader: Reader, frame: Frame, rows: Indices | None = None) -> None:
        self.reader = reader
        self.frame = frame
        self.rows = np.arange(len(reader), dtype=np.int64) if rows is None else rows
        self.keeps = len(self.rows) * frame.size_px**2 * frame.channels <= MEMORY_BYTES
        self._ready = np.zeros(len(self.rows), dtype=bool)
        shape = (len(self.rows) if self.keeps else 0, frame.size_px, frame.size_px, frame.channels)
        self._pixels = np.empty(shape, dtype=np.uint8)  # pages that are never written cost no memory
        self._lock = threading.Lock()

    def take(self, slots: Indices) -> Pixels:
        """(B, S, S, C) uint8."""
        if not self.keeps:
            return self.reader.read(self.rows[slots], self.frame)
        self.fill(slots)
        return self._pixels[slots]

    def fill(self, slots: Indices, report: Report = silent) -> None:
        """Decode what is missing of `slots`."""
        with self._lock:
            missing = np.unique(slots[~self._ready[slots]])
            for number, block in enumerate(_blocks(missing, self.BLOCK)):
                self._pixels[block] = self.reader.read(self.rows[block], self.frame)
                self._ready[block] = True
                report("decode", number * self.BLOCK + len(block), len(missing), {})

    def readable(self, slots: Indices) -> npt.NDArray[np.bool_]:
        """(B,) whether each slot decodes. What decodes is kept where it fits."""
        touch: Callable[[Indices], object] = self.fill if self.keeps else self.take
        verdicts: list[bool] = []
        for block in _blocks(slots, self.BLOCK):
            if _succeeds(touch, block):
                verdicts += [True] * len(block)
            else:
                verdicts += [_succeeds(touch, block[i : i + 1]) for i in range(len(block))]
        return np.array(verdicts, dtype=bool)


class ArrayReader:
    """Images that are pixels already: (N, h, w, C) uint8, C = 1 or 3."""

    def __init__(self, pixels: Pixels, origin: str) -> None:
        assert pixels.dtype == np.uint8
        assert pixels.shape[3] in (1, 3)
        self._pixels = pixels
        self._origin = origin

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, rows: Indices, frame: Frame) -> Pixels:
        chosen = self._pixels[rows]
        if chosen.shape[1:] == (frame.size_px, frame.size_px, frame.channels):
            return chosen
        return _stack([fit(Image.fromarray(p[:, :, 0] if p.shape[2] == 1 else p), frame) for p in chosen], frame)

    def sizes(self, rows: Indices) -> Counter[tuple[int, int]]:
        return Counter({(self._pixels.shape[2], self._pixels.shape[1]): len(rows)})

    def origin(self, row: int) -> str:
        return f"{self._origin} (image {row})"


class EncodedReader:
    """Images as encoded files: `fetch(row)` gives the bytes, `origin(row)` says where they lie. Decodes in threads."""

    CHUNK = 64  # images a thread takes at a time

    def __init__(self, count: int, fetch: Callable[[int], bytes], origin: Callable[[int], str]) -> None:
        self._count = count
        self._fetch = fetch
        self._origin = origin

    def __len__(self) -> int:
        return self._count

    def read(self, rows: Indices, frame: Frame) -> Pixels:
        return _stack(self._each(rows, lambda data, origin: decode(data, frame, origin)), frame)

    def sizes(self, rows: Indices) -> Counter[tuple[int, int]]:
        return Counter(self._each(rows, header_size))

    def origin(self, row: int) -> str:
        return self._origin(row)

    def fetch(self, row: int) -> bytes:
        """The encoded image of a row. Raises BadImage."""
        return self._fetch(row)

    def watched(self, digests: Mapping[int, str], digest: Callable[[bytes], str]) -> EncodedReader:
        """The same images; `fetch` and `read` raise BadImage for a row whose bytes have another digest than the one given."""

        def fetch(row: int) -> bytes:
            data = self._fetch(row)
            if row in digests and digest(data) != digests[row]:
                raise BadImage("changed", f"{self.origin(row)} has changed since it was checked", "diffrc data check again")
            return data

        return EncodedReader(self._count, fetch, self._origin)

    def _each(self, rows: Indices, work: Callable[[bytes, str], T]) -> list[T]:
        def chunk(part: Indices) -> list[T]:
            return [work(self._fetch(int(row)), self._origin(int(row))) for row in part]

        order = np.argsort(rows, kind="stable")  # a table is read front to back
        results = [result for part in _threads().map(chunk, _blocks(rows[order], self.CHUNK)) for result in part]
        return [results[place] for place in np.argsort(order, kind="stable")]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="decode")


def _blocks(values: Indices, length: int) -> list[Indices]:
    return [values[start : start + length] for start in range(0, len(values), length)]


def _succeeds(touch: Callable[[Indices], object], slots: Indices) -> bool:
    try:
        touch(slots)
    except DataError:
        return False
    return True


def _stack(images: Sequence[Pixels], frame: Frame) -> Pixels:
    return np.stack(images) if images else np.empty((0, frame.size_px, frame.size_px, frame.channels), dtype=np.uint8)
