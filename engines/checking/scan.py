"""Every image of a set looked at once: encoded ones in processes of their own where there are many, in bounded memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process

import numpy as np
import numpy.typing as npt

from engines.checking.fingerprints import LOOK, Seen, examine, examine_pixels
from engines.data.decode import BadImage
from engines.data.images import EncodedReader, ImageSet, Indices
from engines.errors import DataError
from engines.progress import Report, silent

BATCH_IMAGES, BATCH_BYTES = 64, 1 << 22  # handed to a process at a time: whichever is reached first
ALONE_SECONDS = 1.0  # what takes longer is worth the start of other processes


@dataclass(frozen=True)
class Bad:
    """An image that the loader refuses, and why."""

    kind: str
    reason: str


@dataclass
class Scan:
    """What was seen of N images; the rows of bad ones are 0."""

    digests: npt.NDArray[np.void]  # (N,) 16 bytes of sha256 of each file; of a file that could not be read, 0
    looks: npt.NDArray[np.uint64]  # (N,)
    sizes: npt.NDArray[np.int32]  # (N, 2) width and height in px, as stored
    forms: Indices  # (N,) place in `form_names`
    form_names: list[tuple[str, str]] = field(default_factory=list)  # (format, mode)
    bad: dict[int, Bad] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)  # decode to their last pixel, and end before the end mark of their format

    @classmethod
    def empty(cls, count: int) -> Scan:
        """Room for so many images."""
        return cls(np.zeros(count, "V16"), np.zeros(count, np.uint64), np.zeros((count, 2), np.int32), np.zeros(count, np.int64))

    def note(self, index: int, seen: Seen) -> None:
        """Write down what was seen of an image."""
        if seen.digest:
            self.digests[index] = np.void(seen.digest)
        if seen.facts is None:
            self.bad[index] = Bad(seen.kind, seen.reason)
            return
        self.looks[index] = seen.looks
        self.sizes[index] = seen.facts.width, seen.facts.height
        form = (seen.facts.format, seen.facts.mode)
        if form not in self.form_names:
            self.form_names.append(form)
        self.forms[index] = self.form_names.index(form)
        if seen.cut:
            self.cut.append(index)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scan(images: ImageSet, wanted: Indices, workers: int = 1, report: Report = silent) -> Scan:
    """Look at some images of a set.

    Args:
        wanted: indices; the result has a row for every image of the set all the same.
        workers: processes that decode; they are started once this one alone has been busy for a second. From a script of your own,
            more than 1 needs `if __name__ == "__main__":` around the call, as any use of multiprocessing does.

    Raises: DataError where a process dies, as one does that the system ends for want of memory.
    """
    found = Scan.empty(len(images))
    done = 0
    for indices, seen in _encoded(images, wanted, workers) if isinstance(images.reader, EncodedReader) else _pixels(images, wanted):
        for index, one in zip(indices, seen, strict=True):
            found.note(index, one)
        done += len(indices)
        report("check", done, len(wanted), {"bad": float(len(found.bad))})
    return found


def _pixels(images: ImageSet, wanted: Indices) -> Iterator[tuple[list[int], list[Seen]]]:
    rows = images.rows
    for start in range(0, len(wanted), 1024):
        block = wanted[start : start + 1024]
        (size, _), *_ = images.reader.sizes(rows[block[:1]]).items()
        yield block.tolist(), examine_pixels(images.reader.read(rows[block], LOOK), size)


def _encoded(images: ImageSet, wanted: Indices, workers: int) -> Iterator[tuple[list[int], list[Seen]]]:
    began = time.monotonic()
    pool: ProcessPoolExecutor | None = None
    waiting: deque[tuple[list[int], Future[list[Seen]]]] = deque()
    try:
        for indices, batch, unread in _batches(images, wanted):
            yield list(unread), list(unread.values())
            if pool is None and workers > 1 and time.monotonic() - began > ALONE_SECONDS:
                pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)
            if pool is None:
                yield indices, examine(batch)
                continue
            waiting.append((indices, pool.submit(examine, batch)))
            while len(waiting) > 2 * workers:
                yield _result(waiting)
        while waiting:
            yield _result(waiting)
    except BrokenProcessPool:
        raise DataError(
            "a process that decodes images was ended, as the system does for want of memory", "free some memory, or --workers 1"
        ) from None
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def _result(waiting: deque[tuple[list[int], Future[list[Seen]]]]) -> tuple[list[int], list[Seen]]:
    indices, future = waiting.popleft()
    return indices, future.result()


def _batches(images: ImageSet, wanted: Indices) -> Iterator[tuple[list[int], list[tuple[bytes, str]], dict[int, Seen]]]:
    """Encoded images, read one after another: their indices, (bytes, name) of each, and those that could not be read."""
    reader, rows = images.reader, images.rows
    assert isinstance(reader, EncodedReader)
    indices: list[int] = []
    batch: list[tuple[bytes, str]] = []
    unread: dict[int, Seen] = {}
    held = 0
    for index in wanted.tolist():
        row = int(rows[index])
        try:
            data = reader.fetch(row)
            indices.append(index)
            batch.append((data, reader.origin(row)))
            held += len(data)
        except DataError as error:  # of a table, a whole part may be damaged
            unread[index] = Seen(b"", kind=error.kind if isinstance(error, BadImage) else "damaged", reason=error.problem)
        if len(batch) + len(unread) >= BATCH_IMAGES or held >= BATCH_BYTES:
            yield indices, batch, unread
            indices, batch, unread, held = [], [], {}, 0
    yield indices, batch, unread


def _end_with_parent() -> None:
    """A process of the pool leaves Ctrl-C to the one that waits for it, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def together(scans: Sequence[Scan]) -> Scan:
    """Several sets' images, one after another."""
    names = list(dict.fromkeys(name for scan in scans for name in scan.form_names))
    starts = np.cumsum([0, *(len(scan.looks) for scan in scans)]).tolist()
    forms = [np.array([names.index(name) for name in scan.form_names] or [0], dtype=np.int64)[scan.forms] for scan in scans]
    return Scan(
        np.concatenate([scan.digests for scan in scans]),
        np.concatenate([scan.looks for scan in scans]),
        np.concatenate([scan.sizes for scan in scans]),
        np.concatenate(forms),
        names,
        {start + index: bad for start, scan in zip(starts, scans, strict=False) for index, bad in scan.bad.items()},
        [start + index for start, scan in zip(starts, scans, strict=False) for index in scan.cut],
    )
