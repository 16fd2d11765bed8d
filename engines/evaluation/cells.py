"""Cells: trainings whose results are kept as JSON with the digest of all they depend on, so that the same command resumes.

Each runs on one thread, as many at a time as there are processors (on a GPU one at a time); a signal, or a failure of one, ends the others.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engines import store
from engines.backends.device import one_thread_each, processors
from engines.interrupt import StopRequest, catch_signals
from engines.progress import Report
from engines.recipe import Method, RecognizerSection
from engines.training.recognizer import TrainingImages, unread_keys

CELL_VERSION = 2  # raise it when a change of the code changes what a cell would hold


@dataclass(frozen=True)
class Cell:
    """One training whose result is kept: where, the digest of all it depends on, and how to make it."""

    path: Path
    digest: str
    make: Callable[[Report], dict[str, Any]]

    @property
    def checkpoint(self) -> Path:
        """Where its training may keep what it has got to; removed when the cell is kept."""
        return checkpoint_of(self.path, self.digest)

    def stored(self) -> dict[str, Any] | None:
        """The kept result, or None where there is none, or one of other inputs."""
        if not self.path.exists():
            return None
        kept: dict[str, Any] = store.read_json(self.path)
        return kept if kept.get("digest") == self.digest else None


def run_cells(cells: Sequence[Cell], device: torch.device, report: Report) -> list[dict[str, Any]]:
    """Results of all cells, in order; those that are not kept are made and committed one by one.

    Args:
        report: hears "evaluate" in hundredths of a cell.

    Raises: Interrupted by a signal, and what making a cell raises; what was made before is kept.
    """
    results = [cell.stored() for cell in cells]
    todo = [i for i, result in enumerate(results) if result is None]
    workers = 1 if device.type == "cuda" else processors()
    with catch_signals() as stop, one_thread_each(), concurrent.futures.ThreadPoolExecutor(workers) as pool:
        listener = _Listener(len(cells), len(cells) - len(todo), report, stop)
        listener.tell()
        jobs = {pool.submit(_one_threaded, cells[i].make, listener.of(i)): i for i in todo}
        try:
            for job in concurrent.futures.as_completed(jobs):
                i = jobs[job]
                result = {"digest": cells[i].digest, **job.result()}
                store.write_json(cells[i].path, result)
                cells[i].checkpoint.unlink(missing_ok=True)
                results[i] = result
        except _Stopped:
            made = sum(result is not None for result in results)
            raise stop.error(f"{made} of {len(cells)} recognizers are trained and kept") from None
        finally:
            listener.abandoned.set()
            for job in jobs:
                job.cancel()
    return [result for result in results if result is not None]


def checkpoint_of(path: Path, digest: str) -> Path:
    """The checkpoint of the training whose result will be kept at `path`; with other inputs it is another file."""
    return path.with_name(f"{path.stem}.{digest[:16]}.safetensors")


def cell_digest(images: TrainingImages, section: RecognizerSection, method: Method, seed: int, asked: npt.NDArray[np.uint8]) -> str:
    """sha256 of what a cell's result depends on; keys that cannot matter are left out, so that changing them keeps the cell."""
    exclude = {"seeds", "synthetic_weight", *unread_keys(section, method, bool(images.is_extra.any()))}  # the weights are hashed themselves
    settings = {
        "cell": CELL_VERSION,
        "torch": torch.__version__,
        "loss": method,
        "seed": seed,
        **section.model_dump(mode="json", exclude=exclude),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in (images.pixels, images.labels, images.weights, images.is_extra):
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    digest.update(np.ascontiguousarray(asked).data)
    return digest.hexdigest()


class _Stopped(Exception):
    """Ends a cell's training when the command is being stopped or another cell has failed."""


class _Listener:
    """Hears every cell from its own thread: adds up the progress, and ends the cells when they are not wanted any more."""

    def __init__(self, cells: int, kept: int, report: Report, stop: StopRequest) -> None:
        self.cells, self.report, self.stop = cells, report, stop
        self.abandoned = threading.Event()
        self._lock = threading.Lock()
        self._kept = kept
        self._shares: dict[int, float] = {}  # of each cell's training, by cell

    def of(self, cell: int) -> Report:
        """What the training of one cell reports to. Raises _Stopped there."""

        def hear(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            if self.stop.requested or self.abandoned.is_set():
                raise _Stopped
            if figures:
                with self._lock:
                    self._shares[cell] = done / total
                    self.tell()

        return hear

    def tell(self) -> None:
        """Report hundredths of cells, since one may take hours."""
        done = self._kept + sum(self._shares.values())
        self.report("evaluate", round(100 * done), 100 * self.cells, {"recognizers": float(int(done))})


def _one_threaded(make: Callable[[Report], dict[str, Any]], hear: Report) -> dict[str, Any]:
    hear("cell", 0, 1, {})
    torch.set_num_threads(1)  # OpenMP keeps this number per calling thread
    return make(hear)
