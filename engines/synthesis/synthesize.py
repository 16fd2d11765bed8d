"""Makes the images of a plan: batches side by side, files that survive a kill, resuming, signals.

An image is a function of (plan, class, index) alone: see `maker`. Each batch runs on one thread, several side by side, so that
the number of threads changes nothing either. While they draw, the main thread encodes and writes what is drawn.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines import store
from engines.backends.device import gpu_failures, one_thread_each
from engines.backends.export import onnx_path
from engines.data.decode import Pixels
from engines.data.images import ImageSet
from engines.data.longtail import LongTail
from engines.data.names import shorten
from engines.diffusion.sampler import StepLog
from engines.errors import NumericsError, UsageError
from engines.interrupt import StopRequest, catch_signals
from engines.networks.guide import Guide
from engines.progress import Report, silent
from engines.store import RunFolder
from engines.synthesis import plan as plans
from engines.synthesis.copies import Copies, find_copies
from engines.synthesis.maker import Drawn, GivenUp, Maker, open_maker
from engines.synthesis.plan import ImageId, Model
from engines.synthesis.real_start import require_same
from engines.synthesis.select import UNMEASURED, Band, Figures, Reason, class_bands, measure, needs_bands, reason_to_drop
from engines.synthesis.sheet import Record, SheetRow, contact_sheet, encode_png, pixels_sha256, versions_text
from engines.synthesis.shelf import ClassYield, GuidanceLog, Queue, Shelf
from engines.synthesis.stopwatch import Spent, Stopwatch

GRACE_SECONDS = 20.0  # after a signal, batches that would take longer are given up; the same images come again
REPORT_SECONDS = 0.5
SHEET_CLASSES = 20
SHEET_IMAGES = 10
BYTES_PER_VALUE = 2  # of a PNG, text and file system included; generous
BYTES_PER_IMAGE = 4096

# ------------------------------------------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class Synthesis:
    """The outcome of a job."""

    folder: Path
    plan: str
    model: Model
    engine: str
    precision: str
    classes: tuple[ClassYield, ...]
    not_finite: int
    seconds: float  # of making them
    sheet: Path
    spent: Spent  # what those seconds went into, over all threads
    copies: Copies | None = None  # None where nothing was compared with the training images
    copy_warnings: tuple[str, ...] = ()

    @property
    def made(self) -> int:
        """Images that this job made."""
        return sum(c.made for c in self.classes)

    @property
    def images_per_second(self) -> float:
        """0 where nothing was left to make."""
        return self.made / self.seconds if self.made else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user must not miss, a line each: classes with fewer images than asked for, classes of copies."""
        short = (
            f"{shorten(c.name)}: {c.kept} of {c.asked} images; the selection kept {c.kept} of {c.kept + c.rejected} made"
            for c in self.classes
            if c.short
        )
        return (*short, *self.copy_warnings)


def synthesize(
    run: RunFolder,
    wanted: Mapping[int, int],
    out: Path | None = None,
    originals: LongTail | None = None,
    workers: int = 0,
    report: Report = silent,
    make_room: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Synthesis]:
    """Make images until each class in `wanted` has as many as it says; what lies there already counts.

    Args:
        run: trained and, unless `synth.engine` is "torch", exported. Its recipe's [synth] and [select] say how.
        wanted: images by class id; see `plan.asked_classes` and `plan.fill_classes`.
        out: where to; default the run's own folder.
        originals: the run's data, for the contact sheet and the search for copies; bands and `synth.start` need them.
        workers: batches that run side by side; 0 = as many as the maker says.
        make_room: keep images of another plan in the run's `stale/`, rather than refuse to mix them with these.
        tell: hears which engine was chosen and why, where `synth.engine` and `synth.precision` leave a choice.

    Returns: one outcome for each network that took part.

    Raises:
        UsageError: a stage is not trained, or a head class is asked of a target model.
        EngineError: not exported, or exported from other weights.
        ConflictError: the folder is in use, not free, or holds images of another plan.
        NumericsError: more than `synth.max_bad` images are not finite.
        Interrupted: a signal came; what was finished is committed.
    """
    if originals is not None:
        require_same(run, originals)
    parts = plans.by_model(run, wanted, source_ready=is_ready(run, "source"))
    for model in parts:
        plans.check_folder(plans.folder_of(run, model, out))
    results = []
    for model, classes in parts.items():
        folder = plans.folder_of(run, model, out)
        maker = open_maker(run, model, plans.made_with(folder), tell, originals)
        if make_room:
            plans.make_room(run, folder, maker.plan)
        started = time.perf_counter()
        try:
            with catch_signals() as stop:
                guide = maker.guide or _trained_guide(run)
                results.append(make_folder(folder, maker, classes, originals, workers or maker.parallel, report, stop, guide))
        finally:
            run.add_cost("synth", time.perf_counter() - started)
    return results


def fill_run(run: RunFolder, originals: LongTail, report: Report = silent, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Fill every medium and few class of a run, as plain JSON values: see `synthesize`. Images of other settings are kept aside."""
    wanted = plans.fill_classes(run)
    return summary(synthesize(run, wanted, originals=originals, report=report, make_room=True, tell=tell))


def is_ready(run: RunFolder, model: Model) -> bool:
    """Whether a network of a run is at hand for synthesis: trained, and exported where that is needed."""
    return run.stage(model).exists() if run.recipe.synth.engine == "torch" else onnx_path(run, model).exists()


def summary(parts: Sequence[Synthesis]) -> dict[str, Any]:
    """The outcome of a job as plain JSON values."""
    return {
        "folders": [str(part.folder) for part in parts],
        "sheets": [str(part.sheet) for part in parts],
        "plans": [part.plan for part in parts],
        "engine": parts[0].engine,
        "precision": parts[0].precision,
        "made": sum(part.made for part in parts),
        "not_finite": sum(part.not_finite for part in parts),
        "seconds": sum(part.seconds for part in parts),
        "images_per_second": sum(part.made for part in parts) / max(sum(part.seconds for part in parts), 1e-9),
        "outside_network": sum((part.spent for part in parts), Spent()).outside_network,
        "short": sum(c.short for part in parts for c in part.classes),
        "classes": [c.to_json() for part in parts for c in part.classes],
        "copies": {str(part.folder): _copies_of(part.copies) for part in parts if part.copies},
        "warnings": [line for part in parts for line in part.warnings],
    }


def _copies_of(copies: Copies) -> dict[str, Any]:
    return {space: copies.total(space)._asdict() | {"share": copies.total(space).share} for space in copies.usual}


def make_folder(
    folder: Path,
    maker: Maker,
    wanted: Mapping[int, int],
    originals: LongTail | None = None,
    workers: int = 1,
    report: Report = silent,
    stop: StopRequest | None = None,
    guide: Guide | None = None,
) -> Synthesis:
    """`synthesize` for one network and one folder; `guide` is whose features tell copies, besides pixels."""
    stop = stop or StopRequest()
    plans.check_folder(folder)
    maker.check_classes(wanted)
    started = time.perf_counter()
    with store.locked(folder), one_thread_each():
        plans.keep_plan(folder, maker.plan)
        shelf = Shelf.open(folder, maker.plan, wanted)
        queue = Queue(shelf, wanted, maker.recipe)
        store.require_space(folder, queue.missing * (int(np.prod(maker.engine.card.shape)) * BYTES_PER_VALUE + BYTES_PER_IMAGE))
        bands = _bands(maker, originals, wanted)
        work = _Work(maker, bands, shelf, queue, GuidanceLog.open(folder), workers, report, stop)
        work.run()
        ended = time.perf_counter()
        shelf.write_manifest()
        shelf.write_yield(wanted)
        sheet = folder / "sheet.png"
        store.write_bytes(sheet, contact_sheet(list(_sheet_rows(shelf, wanted, originals))))
        seconds = time.perf_counter() - started
        spent = work.spent + Spent(worker=time.perf_counter() - ended)
        copies = find_copies(shelf, originals.train, guide, maker.recipe, workers, report, stop) if originals else None
    return Synthesis(
        folder,
        maker.plan.id,
        maker.model,
        maker.engine.card.kind,
        maker.engine.card.precision,
        tuple(shelf.yield_of(k, n) for k, n in wanted.items()),
        shelf.not_finite,
        seconds,
        sheet,
        spent,
        copies,
        tuple(copies.warnings(originals.train)) if copies and originals else (),
    )


# ------------------------------------------------------------------------------------------------------------ the work


class _Batch:
    """A batch on its way: how far it is, and whether it is to be given up."""

    def __init__(self, images: Sequence[ImageId], steps: int, free_since: float) -> None:
        self.images = images
        self.steps = steps
        self.log: list[StepLog] = []
        self.networks = Stopwatch()
        self.free_since = free_since  # a worker waited for it since then
        self.started = self.ended = time.perf_counter()
        self.given_up = threading.Event()

    def draw(self, maker: Maker) -> list[Drawn]:
        """In a thread of its own. Raises GivenUp, EngineError, and whatever else an engine may."""
        try:
            with gpu_failures():
                return maker.draw(self.images, self._step, self.networks)
        finally:
            self.ended = time.perf_counter()

    def _step(self, figures: StepLog) -> None:
        if self.log and figures.t >= self.log[-1].t:  # the maker tries it again
            self.log.clear()
        self.log.append(figures)
        if self.given_up.is_set():
            raise GivenUp

    @property
    def share(self) -> float:
        return len(self.log) / (self.steps + 1)  # all of it only when it is handed over

    @property
    def seconds_left(self) -> float:
        return (time.perf_counter() - self.started) * (1 - self.share) / self.share if self.log else float("inf")

    @property
    def spent(self) -> Spent:
        return Spent(self.networks.seconds, self.ended - self.free_since)


class _Work:
    """Making what a queue lacks: batches side by side in threads; in the thread of `run` the files of those that are drawn.

    A free thread gets its next batch before the files of its last one are written, unless as many images wait to be written as
    all threads draw at once: so the threads wait for the disk only where it is slower than they are, and memory is bounded.
    """

    def __init__(
        self,
        maker: Maker,
        bands: Mapping[int, Band],
        shelf: Shelf,
        queue: Queue,
        log: GuidanceLog,
        workers: int,
        report: Report,
        stop: StopRequest,
    ) -> None:
        self.maker, self.bands, self.shelf, self.queue, self.log = maker, bands, shelf, queue, log
        self.workers, self.report, self.stop = workers, report, stop
        self.running: dict[Future[list[Drawn]], _Batch] = {}
        self.writes: deque[Callable[[], None]] = deque()
        self.most_writes = workers * maker.recipe.synth.batch_size
        self.free = deque([time.perf_counter()] * workers)  # since when each thread without a batch has had none
        self.versions = versions_text(maker.plan.versions)
        self.kept = self.dropped = 0
        self.spent = Spent()

    def run(self) -> None:
        """Until nothing is left to make. Raises NumericsError, EngineError, StorageError, and Interrupted where it was asked to stop."""
        self._tell()
        with ThreadPoolExecutor(self.workers, "synth", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                while self._start(pool) or self.running or self.writes:
                    self._give_up()
                    self._collect()
                    self._write(1)
            finally:
                for batch in self.running.values():
                    batch.given_up.set()
        if self.stop.requested and self.kept < self.queue.missing:
            done = self.queue.total - self.queue.missing + self.kept
            raise self.stop.error(f"{done} of {self.queue.total} images are in {self.shelf.folder}")

    def _start(self, pool: ThreadPoolExecutor) -> bool:
        """Give each free thread a batch. Whether any got one."""
        started = False
        while self.free and len(self.writes) < self.most_writes and not self.stop.requested and (images := self.queue.batch()):
            batch = _Batch(images, len(self.maker.schedule), self.free.popleft())
            self.running[pool.submit(batch.draw, self.maker)] = batch
            started = True
        return started

    def _give_up(self) -> None:
        if self.stop.requested:
            for batch in self.running.values():
                if batch.seconds_left > GRACE_SECONDS:
                    batch.given_up.set()

    def _collect(self) -> None:
        """Take over what is drawn; waits for it where nothing else is to be done. What failed is raised when all else is written."""
        failures = []
        done = wait(self.running, 0 if self.writes else REPORT_SECONDS, FIRST_COMPLETED).done
        for future in done:
            batch = self.running.pop(future)
            self.spent += batch.spent
            self.free.append(batch.ended)
            try:
                self._take(batch, future.result())
            except GivenUp:
                continue
            except Exception as failure:
                failures.append(failure)
        if done or not self.writes:
            self._tell()
        if failures:
            self._write(len(self.writes))
            self.shelf.list_new()  # what failed may be a batch half of whose images were taken
            raise failures[0]

    def _take(self, batch: _Batch, drawn: Sequence[Drawn]) -> None:
        """Judge the images of a batch, ask for others in the place of those that do not count, and queue what is to be written."""
        self.writes.append(partial(self._write_log, batch.log))
        for image in drawn:
            k, pixels = image.image.class_id, image.pixels
            if pixels is None:
                self._count_not_finite(k)
                self.queue.add(k, lost=True)
                continue
            figures = measure(*image.seen, k, self.bands.get(k)) if image.seen else UNMEASURED
            dropped = reason_to_drop(figures, self.maker.recipe.select)
            self.writes.append(partial(self._write_image, image.image, pixels, figures, dropped))
            self.kept += not dropped
            if dropped:
                self.dropped += 1
                self.queue.add(k)
        self.writes.append(self.shelf.list_new)

    def _count_not_finite(self, class_id: int) -> None:
        self.shelf.not_finite += 1
        if self.shelf.not_finite > self.maker.recipe.synth.max_bad:
            name = shorten(self.maker.plan.names[class_id])
            raise NumericsError(
                f"{self.shelf.not_finite} images were not finite and not written, the last of class {name!r}",
                "--engine torch tells whether the engine or the network is at fault",
            )

    def _write(self, count: int) -> None:
        """Write so many files of those that wait."""
        began = time.perf_counter()
        for _ in range(min(count, len(self.writes))):
            self.writes.popleft()()
        self.spent += Spent(worker=time.perf_counter() - began)

    def _write_log(self, steps: Sequence[StepLog]) -> None:
        self.log.add(steps)
        self.log.write(self.shelf.folder)

    def _write_image(self, image: ImageId, pixels: Pixels, figures: Figures, dropped: Reason) -> None:
        plan = self.maker.plan
        record = Record(
            plan=plan.id,
            class_id=image.class_id,
            class_name=plan.names[image.class_id],
            index=image.index,
            seed=self.maker.recipe.synth.seed,
            pixels_sha256=pixels_sha256(pixels),
            versions=self.versions,
            figures=figures,
            dropped=dropped,
            start=self.maker.start_of(image),
        )
        self.shelf.put(record, encode_png(pixels, record))

    def _tell(self) -> None:
        total = self.queue.total
        done = total - self.queue.missing + self.kept
        under_way = sum(int(batch.share * len(batch.images)) for batch in self.running.values())
        figures = {name: float(n) for name, n in (("dropped", self.dropped), ("not finite", self.shelf.not_finite)) if n}
        self.report("synth", min(done + under_way, total), total, figures)


def _bands(maker: Maker, originals: LongTail | None, wanted: Iterable[int]) -> dict[int, Band]:
    if not needs_bands(maker.recipe.select):
        return {}
    assert maker.guide is not None and originals is not None, "the selection measures distances to real images"
    return class_bands(maker.guide, originals.train, wanted, maker.recipe.synth.batch_size)


def _sheet_rows(shelf: Shelf, wanted: Mapping[int, int], originals: LongTail | None) -> Iterator[SheetRow]:
    shape = tuple(shelf.plan.identity["image"])
    empty = np.empty((0, shape[1], shape[2], shape[0]), dtype=np.uint8)
    for k in list(wanted)[:SHEET_CLASSES]:
        generated = shelf.read(shelf.records(k, shelf.kept_indices(k)[:SHEET_IMAGES]))
        yield SheetRow(shelf.plan.names[k], _first_of(originals.train, k) if originals else empty, generated)


def _first_of(images: ImageSet, class_id: int) -> Pixels:
    return images.pixels(np.flatnonzero(images.labels == class_id)[:SHEET_IMAGES])


def _trained_guide(run: RunFolder) -> Guide | None:
    from engines.training.stages import load_guide

    try:
        return load_guide(run).requires_grad_(False)
    except UsageError:  # not trained: nothing but the comparison of features would have needed it
        return None
