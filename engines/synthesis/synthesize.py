"""Makes the images of a plan: batches side by side, files that survive a kill, resuming, signals.

An image is a function of (plan, class, index) alone: see `maker`. Each batch runs on one thread, several side by side, so that
the number of threads changes nothing either.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines import store
from engines.backends.export import onnx_path
from engines.data.decode import Pixels
from engines.data.images import ImageSet
from engines.data.longtail import LongTail
from engines.data.names import shorten
from engines.diffusion.sampler import StepLog
from engines.errors import ConflictError, NumericsError, UsageError
from engines.interrupt import StopRequest, catch_signals
from engines.networks.guide import Guide
from engines.progress import Report, silent
from engines.store import RunFolder
from engines.synthesis import plan as plans
from engines.synthesis.copies import Copies, find_copies
from engines.synthesis.maker import Drawn, GivenUp, Maker, open_maker
from engines.synthesis.plan import ImageId, Model
from engines.synthesis.select import UNMEASURED, Band, class_bands, measure, reason_to_drop
from engines.synthesis.sheet import Record, SheetRow, contact_sheet, encode_png, pixels_sha256, versions_text
from engines.synthesis.shelf import ClassYield, GuidanceLog, Queue, Shelf

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
        originals: the run's data, for the contact sheet and the search for copies; a distance band needs them.
        workers: batches that run side by side; 0 = one a processor.
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
    if originals is not None and originals.kept_sha256 != run.classes()["kept_sha256"]:
        raise ConflictError(f"{run.path} was trained on other images than these", "--data names the data set it was trained on")
    parts = plans.by_model(run, wanted, source_ready=_is_ready(run, "source"))
    for model in parts:
        plans.check_folder(plans.folder_of(run, model, out))
    results = []
    for model, classes in parts.items():
        folder = plans.folder_of(run, model, out)
        maker = open_maker(run, model, plans.made_with(folder), tell)
        if make_room:
            plans.make_room(run, folder, maker.plan)
        started = time.perf_counter()
        try:
            with catch_signals() as stop:
                guide = maker.guide or _trained_guide(run)
                results.append(make_folder(folder, maker, classes, originals, workers or _processors(), report, stop, guide))
        finally:
            run.add_cost("synth", time.perf_counter() - started)
    return results


def fill_run(run: RunFolder, originals: LongTail, report: Report = silent, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Fill every medium and few class of a run, as plain JSON values: see `synthesize`. Images of other settings are kept aside."""
    wanted = plans.fill_classes(run)
    return summary(synthesize(run, wanted, originals=originals, report=report, make_room=True, tell=tell))


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
    with store.locked(folder), _one_thread_each():
        plans.keep_plan(folder, maker.plan)
        shelf = Shelf.open(folder, maker.plan, wanted)
        queue = Queue(shelf, wanted, maker.recipe)
        store.require_space(folder, queue.missing * (int(np.prod(maker.engine.card.shape)) * BYTES_PER_VALUE + BYTES_PER_IMAGE))
        bands = _bands(maker, originals, wanted)
        _work(maker, bands, shelf, queue, GuidanceLog.open(folder), workers, report, stop)
        shelf.write_manifest()
        shelf.write_yield(wanted)
        sheet = folder / "sheet.png"
        store.write_bytes(sheet, contact_sheet(list(_sheet_rows(shelf, wanted, originals))))
        seconds = time.perf_counter() - started
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
        copies,
        tuple(copies.warnings(originals.train)) if copies and originals else (),
    )


# ------------------------------------------------------------------------------------------------------------ the work


class _Batch:
    """A batch on its way: how far it is, and whether it is to be given up."""

    def __init__(self, images: Sequence[ImageId], steps: int) -> None:
        self.images = images
        self.steps = steps
        self.log: list[StepLog] = []
        self.started = time.perf_counter()
        self.given_up = threading.Event()

    def step(self, figures: StepLog) -> None:
        self.log.append(figures)
        if self.given_up.is_set():
            raise GivenUp

    @property
    def share(self) -> float:
        return len(self.log) / (self.steps + 1)  # all of it only when its files are written

    @property
    def seconds_left(self) -> float:
        return (time.perf_counter() - self.started) * (1 - self.share) / self.share if self.log else float("inf")


def _work(
    maker: Maker, bands: Mapping[int, Band], shelf: Shelf, queue: Queue, log: GuidanceLog, workers: int, report: Report, stop: StopRequest
) -> None:
    def tell() -> None:
        done = queue.total - queue.missing + made
        under_way = sum(int(batch.share * len(batch.images)) for batch in running.values())
        figures = {name: float(n) for name, n in (("dropped", dropped), ("not finite", shelf.not_finite)) if n}
        report("synth", min(done + under_way, queue.total), queue.total, figures)

    running: dict[Future[list[Drawn]], _Batch] = {}
    made = dropped = 0
    tell()
    with ThreadPoolExecutor(workers, "synth", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            while True:
                while len(running) < workers and not stop.requested and (images := queue.batch()):
                    batch = _Batch(images, len(maker.schedule))
                    running[pool.submit(maker.draw, images, batch.step)] = batch
                if not running:
                    break
                if stop.requested:
                    for batch in running.values():
                        if batch.seconds_left > GRACE_SECONDS:
                            batch.given_up.set()
                for future in wait(running, REPORT_SECONDS, FIRST_COMPLETED).done:
                    batch = running.pop(future)
                    try:
                        drawn = future.result()
                    except GivenUp:
                        continue
                    log.add(batch.log)
                    log.write(shelf.folder)
                    for image in drawn:
                        kept = _commit(maker, bands, shelf, image)
                        made += kept
                        dropped += image.pixels is not None and not kept
                        if not kept:
                            queue.add(image.image.class_id, lost=image.pixels is None)
                tell()
        finally:
            for batch in running.values():
                batch.given_up.set()
    if stop.requested and made < queue.missing:
        raise stop.error(f"{queue.total - queue.missing + made} of {queue.total} images are in {shelf.folder}")


def _commit(maker: Maker, bands: Mapping[int, Band], shelf: Shelf, drawn: Drawn) -> bool:
    """Write an image; whether it counts. Raises NumericsError when too many are not finite."""
    k, pixels = drawn.image.class_id, drawn.pixels
    if pixels is None:
        shelf.not_finite += 1
        if shelf.not_finite > maker.recipe.synth.max_bad:
            raise NumericsError(
                f"{shelf.not_finite} images were not finite and not written, the last of class {shorten(maker.plan.names[k])!r}",
                "--engine torch tells whether the engine or the network is at fault",
            )
        return False
    figures = measure(*drawn.seen, k, bands.get(k)) if drawn.seen else UNMEASURED
    record = Record(
        plan=maker.plan.id,
        class_id=k,
        class_name=maker.plan.names[k],
        index=drawn.image.index,
        seed=maker.recipe.synth.seed,
        pixels_sha256=pixels_sha256(pixels),
        versions=versions_text(maker.plan.versions),
        figures=figures,
        dropped=reason_to_drop(figures, maker.recipe.select),
    )
    shelf.put(record, encode_png(pixels, record))
    return record.kept


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Torch on one thread while batches run side by side: their speed adds up, and no sum depends on a thread count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bands(maker: Maker, originals: LongTail | None, wanted: Iterable[int]) -> dict[int, Band]:
    if not maker.recipe.select.distance_band:
        return {}
    assert maker.guide is not None and originals is not None, "the selection measures distances to real images"
    return class_bands(maker.guide, originals.train, wanted, maker.recipe.synth.batch_size)


def _sheet_rows(shelf: Shelf, wanted: Mapping[int, int], originals: LongTail | None) -> Iterator[SheetRow]:
    shape = tuple(shelf.plan.identity["image"])
    empty = np.empty((0, shape[1], shape[2], shape[0]), dtype=np.uint8)
    for k in list(wanted)[:SHEET_CLASSES]:
        generated = shelf.read(shelf.kept_records(k)[:SHEET_IMAGES])
        yield SheetRow(shelf.plan.names[k], _first_of(originals.train, k) if originals else empty, generated)


def _first_of(images: ImageSet, class_id: int) -> Pixels:
    return images.pixels(np.flatnonzero(images.labels == class_id)[:SHEET_IMAGES])


def _is_ready(run: RunFolder, model: Model) -> bool:
    return run.stage(model).exists() if run.recipe.synth.engine == "torch" else onnx_path(run, model).exists()


def _trained_guide(run: RunFolder) -> Guide | None:
    from engines.training.stages import load_guide

    try:
        return load_guide(run).requires_grad_(False)
    except UsageError:  # not trained: nothing but the comparison of features would have needed it
        return None


def _processors() -> int:
    return len(os.sched_getaffinity(0))
