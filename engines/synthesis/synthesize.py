"""Makes the images of a plan: guided sampling in fixed batches, files that survive a kill, resuming, signals.

An image is a function of (plan, class, index) alone. Its noise is named by them; its row in the compute batch is fixed by
them, since kernels may round differently from row to row; and each batch runs on one thread, several side by side, so that
the number of threads changes nothing either.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engines import store
from engines.backends.base import Engine, package_versions, weights_sha256
from engines.backends.export import onnx_path
from engines.backends.ort_engine import OrtEngine
from engines.backends.torch_engine import TorchEngine
from engines.data.batches import to_pixels
from engines.data.decode import Pixels
from engines.data.images import ImageSet
from engines.data.longtail import LongTail
from engines.data.names import shorten, slug
from engines.diffusion.guidance import prototype_guidance
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import Denoiser, StepLog, sample
from engines.diffusion.schedule import Schedule, make_schedule, respace
from engines.errors import ConflictError, EngineError, NumericsError
from engines.interrupt import StopRequest, catch_signals
from engines.networks.guide import Guide
from engines.progress import Report, silent
from engines.recipe import Recipe
from engines.store import RunFolder
from engines.synthesis import plan as plans
from engines.synthesis.plan import Model, Plan
from engines.synthesis.select import Band, class_bands, clean_features, distance_to, keeps
from engines.synthesis.sheet import (
    REJECTED,
    Record,
    SheetRow,
    contact_sheet,
    decode_png,
    encode_png,
    pixels_sha256,
    scan_class,
    versions_text,
)

GRACE_SECONDS = 20.0  # after a signal, batches that would take longer are given up; the same images come again
REPORT_SECONDS = 0.5
SHEET_CLASSES = 20
SHEET_IMAGES = 10
BYTES_PER_VALUE = 2  # of a PNG, text and file system included; generous
BYTES_PER_IMAGE = 4096
_GOLDEN = 40503  # / 2^16, the golden ratio's fraction: spreads the classes' first rows evenly over a batch

# ------------------------------------------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class ClassYield:
    """What a folder holds of a class that was asked for, after the job."""

    class_id: int
    name: str
    asked: int
    kept: int  # at least `asked`, unless the selection gave up
    made: int  # by this job, the dropped ones among them
    rejected: int  # in all
    folder: Path


@dataclass(frozen=True)
class Synthesis:
    """The outcome of a job."""

    folder: Path
    plan: str
    model: Model
    engine: str
    classes: tuple[ClassYield, ...]
    not_finite: int
    seconds: float
    sheet: Path

    @property
    def made(self) -> int:
        """Images that this job made."""
        return sum(c.made for c in self.classes)

    @property
    def images_per_second(self) -> float:
        """0 where nothing was left to make."""
        return self.made / self.seconds if self.made else 0.0


def synthesize(
    run: RunFolder,
    wanted: Mapping[int, int],
    out: Path | None = None,
    originals: LongTail | None = None,
    workers: int = 0,
    report: Report = silent,
) -> list[Synthesis]:
    """Make images until each class in `wanted` has as many as it says; what lies there already counts.

    Args:
        run: trained and, unless `synth.engine` is "torch", exported. Its recipe's [synth] and [select] say how.
        wanted: images by class id; see `plan.asked_classes` and `plan.fill_classes`.
        out: where to; default the run's own folder.
        originals: the run's data, for the contact sheet; the selection needs them.
        workers: batches that run side by side; 0 = one a processor.

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
        maker = open_maker(run, model)
        folder = plans.folder_of(run, model, out)
        started = time.perf_counter()
        try:
            with catch_signals() as stop:
                results.append(make_folder(folder, maker, classes, originals, workers or _processors(), report, stop))
        finally:
            run.add_cost("synth", time.perf_counter() - started)
    return results


def fill_run(run: RunFolder, originals: LongTail, report: Report = silent) -> dict[str, Any]:
    """Fill every medium and few class of a run, as plain JSON values: see `synthesize`."""
    wanted = plans.fill_classes(run)
    return summary(synthesize(run, wanted, originals=originals, report=report))


def summary(parts: Sequence[Synthesis]) -> dict[str, Any]:
    """The outcome of a job as plain JSON values."""
    return {
        "folders": [str(part.folder) for part in parts],
        "sheets": [str(part.sheet) for part in parts],
        "plans": [part.plan for part in parts],
        "engine": parts[0].engine,
        "made": sum(part.made for part in parts),
        "not_finite": sum(part.not_finite for part in parts),
        "seconds": sum(part.seconds for part in parts),
        "images_per_second": sum(part.made for part in parts) / max(sum(part.seconds for part in parts), 1e-9),
        "classes": [
            {"class": c.name, "asked": c.asked, "kept": c.kept, "made": c.made, "rejected": c.rejected, "folder": str(c.folder)}
            for part in parts
            for c in part.classes
        ],
    }


def open_maker(run: RunFolder, model: Model) -> Maker:
    """The networks of a run, ready to draw. Raises UsageError where a stage is not trained, EngineError for a missing or stale engine."""
    from engines.training.stages import load_guide, load_unet  # reads checkpoints, and brings the training with it

    recipe = run.recipe
    unet = load_unet(run, model)
    engine: Engine
    if recipe.synth.engine == "torch":
        engine = TorchEngine(unet, recipe.diffusion.steps, recipe.synth.batch_size)
    else:
        path = onnx_path(run, model)
        if not path.exists():
            raise EngineError(f"the {model} model of {run.path} is not exported", f"{_export_command(run, model)}; or --engine torch")
        engine = OrtEngine.load(path, threads=1)
        if engine.card.weights_sha256 != weights_sha256(unet):
            raise EngineError(f"{path} was exported from other weights than the run's", _export_command(run, model))
        if engine.card.max_batch < recipe.synth.batch_size:
            raise EngineError(
                f"{path} was checked up to batch {engine.card.max_batch}, synth.batch_size is {recipe.synth.batch_size}",
                f"{_export_command(run, model)} --set export.max_batch={recipe.synth.batch_size}",
            )
    guide = load_guide(run) if recipe.synth.guidance_scale or recipe.select.distance_band else None
    packages = ("diffrc", "numpy", "pillow", "torch", *(() if engine.card.kind == "torch" else ("onnxruntime", "onnxruntime-gpu")))
    guide_sha256 = weights_sha256(guide) if guide else ""
    plan = plans.make_plan(recipe, run.classes(), model, engine.card, guide_sha256, package_versions(packages))
    return Maker(recipe, plan, model, engine, guide.eval().requires_grad_(False) if guide else None)


def make_folder(
    folder: Path,
    maker: Maker,
    wanted: Mapping[int, int],
    originals: LongTail | None = None,
    workers: int = 1,
    report: Report = silent,
    stop: StopRequest | None = None,
) -> Synthesis:
    """`synthesize` for one network and one folder."""
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
        log = GuidanceLog.open(folder)
        try:
            _work(maker, bands, shelf, queue, log, workers, report, stop)
        finally:
            log.write(folder)
        shelf.write_manifest()
        sheet = folder / "sheet.png"
        store.write_bytes(sheet, contact_sheet(list(_sheet_rows(shelf, wanted, originals))))
    yields = tuple(shelf.yield_of(k, n) for k, n in wanted.items())
    seconds = time.perf_counter() - started
    return Synthesis(folder, maker.plan.id, maker.model, maker.engine.card.kind, yields, shelf.not_finite, seconds, sheet)


# ---------------------------------------------------------------------------------------------------------- one batch


@dataclass(frozen=True, order=True)
class ImageId:
    """An image's name within a plan."""

    class_id: int
    index: int

    def row(self, batch_size: int) -> int:
        """Its row in every compute batch, part of what fixes its pixels."""
        return (self.index + (self.class_id * _GOLDEN * batch_size >> 16)) % batch_size


class Drawn(NamedTuple):
    """One image of a batch."""

    image: ImageId
    pixels: Pixels | None  # (H, W, C) uint8; None where a value is not finite
    feature: Tensor | None  # (D,) of the clean image, where there is a selection


class GivenUp(Exception):
    """A batch that was told to stop between two steps."""


@dataclass(frozen=True)
class Maker:
    """What turns the name of an image into pixels."""

    recipe: Recipe
    plan: Plan
    model: Model
    engine: Engine
    guide: Guide | None

    def check_classes(self, wanted: Iterable[int]) -> None:
        """Hold the engine to the class table."""
        rows = self.engine.card.classes
        assert rows in (0, len(self.plan.names) + 1), "the label embedding has a row for each class and the null label"
        assert all(0 <= k < len(self.plan.names) for k in wanted)

    def draw(self, images: Sequence[ImageId], log: Callable[[StepLog], None]) -> list[Drawn]:
        """Sample a batch of images whose rows differ; free rows are filled with copies, so that the batch is always full.

        Args:
            log: called after each step; may raise to give the batch up.
        """
        synth, batch_size = self.recipe.synth, self.recipe.synth.batch_size
        at = {image.row(batch_size): image for image in images}
        assert len(at) == len(images), "two images in one row"
        spare = itertools.cycle(images)
        rows = [at.get(row) or next(spare) for row in range(batch_size)]
        y = torch.tensor([image.class_id for image in rows])
        keys = [image_key(synth.seed, image.class_id, image.index) for image in rows]
        with torch.no_grad():
            x = sample(
                denoiser(self.engine, y, synth.classifier_free_scale),
                self._schedule(),
                lambda step: batch_noise(keys, step, self.engine.card.shape),
                self._guidance(y),
                synth.sampler,
                synth.eta,
                synth.step_unit,
                synth.clip_denoised,
                log,
            )  # (B, C, H, W)
            features = clean_features(self.guide, x) if self.guide and self.recipe.select.distance_band else None
        finite = torch.isfinite(x).flatten(1).all(1).tolist()
        pixels = to_pixels(torch.where(torch.isfinite(x), x, 0.0))
        return [
            Drawn(image, pixels[row] if finite[row] else None, None if features is None else features[row])
            for row, image in sorted(at.items())
        ]

    def _schedule(self) -> Schedule:
        diffusion = self.recipe.diffusion
        return respace(make_schedule(diffusion.noise_schedule, diffusion.steps), self.recipe.synth.steps)

    def _guidance(self, y: Tensor) -> Any:
        synth = self.recipe.synth
        if self.guide is None or not synth.guidance_scale:
            return None
        return prototype_guidance(
            self.guide.log_probs,
            y,
            synth.guidance_scale,
            synth.guidance_scale_max,
            synth.scale_rule,
            synth.gradient_norm,
            synth.direction,
            synth.guidance_interval,
        )


def denoiser(engine: Engine, y: Tensor, classifier_free_scale: float = 0.0) -> Denoiser:
    """An engine with its labels bound, as a sampler calls it.

    With a scale w > 0 and a conditional network, classifier-free guidance (Ho & Salimans 2022):

        eps <- (1 + w) eps(x_t, t, y) - w eps(x_t, t, null)

    The variance values stay those of the labels.
    """
    card = engine.card
    if not card.classes:
        return lambda x, t: engine(x, t)
    if not classifier_free_scale:
        return lambda x, t: engine(x, t, y)
    null = torch.full_like(y, card.classes - 1)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with_label, without = engine(x, t, y), engine(x, t, null)
        channels = card.image_channels
        eps = (1 + classifier_free_scale) * with_label[:, :channels] - classifier_free_scale * without[:, :channels]
        return torch.cat([eps, with_label[:, channels:]], 1)

    return guided


# ---------------------------------------------------------------------------------------------------------- the folder


@dataclass
class Shelf:
    """The images that lie in a folder."""

    folder: Path
    plan: Plan
    images: dict[int, dict[int, Record]]  # class -> index; each asked class has an entry
    not_finite: int = 0
    made: dict[int, int] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, plan: Plan, wanted: Iterable[int]) -> Shelf:
        """Scan a locked folder: trust what matches its hash, delete what does not and what killed writers left behind."""
        store.remove_temporaries(folder)
        shelf = cls(folder, plan, {})
        for k in range(len(plan.names)):
            place = folder / slug(plan.names[k], k)
            if k not in wanted and not place.exists():
                continue
            for path in (place, place / REJECTED):
                if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
                    raise ConflictError(f"{path} is a symbolic link", f"remove it; images are written inside {folder} only")
                store.remove_temporaries(path)
            good, bad = scan_class(folder, plan.names, k, plan.id)
            for path in bad:
                path.unlink()
            shelf.images[k] = {index: image.record for index, image in good.items()}
        shelf.write_manifest()
        return shelf

    def kept(self, class_id: int) -> int:
        """Images of a class that the selection kept."""
        return sum(record.kept for record in self.images[class_id].values())

    def put(self, record: Record, png: bytes) -> None:
        """Commit an image, then its line of the manifest."""
        store.write_bytes(self.folder / record.path(), png)
        store.append_json(self.folder / "manifest.jsonl", record.line())
        self.images[record.class_id][record.index] = record
        self.made[record.class_id] = self.made.get(record.class_id, 0) + 1

    def write_manifest(self) -> None:
        """The manifest, from what the images say about themselves, by class and index."""
        lines = [self.images[k][i].line() for k in sorted(self.images) for i in sorted(self.images[k])]
        store.write_text(self.folder / "manifest.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def first(self, class_id: int, count: int) -> list[Pixels]:
        """The first kept images of a class, read back."""
        records = [r for _, r in sorted(self.images[class_id].items()) if r.kept][:count]
        paths = [self.folder / record.path() for record in records]
        return [decode_png(path.read_bytes(), self.plan.names[class_id], str(path))[0] for path in paths]

    def yield_of(self, class_id: int, asked: int) -> ClassYield:
        """What there is of a class now."""
        name, kept = self.plan.names[class_id], self.kept(class_id)
        rejected = len(self.images[class_id]) - kept
        folder = self.folder / slug(name, class_id)
        return ClassYield(class_id, name, asked, kept, self.made.get(class_id, 0), rejected, folder)


class Queue:
    """Images still to be made: of each class the lowest free indices, as many as it lacks, one queue a row of the batch."""

    def __init__(self, shelf: Shelf, wanted: Mapping[int, int], recipe: Recipe) -> None:
        self.batch_size = recipe.synth.batch_size
        tries = recipe.select.max_tries if recipe.select.distance_band else 1.0
        self._last = {k: round(tries * n) + recipe.synth.max_bad for k, n in wanted.items()}
        self._taken = {k: set(shelf.images[k]) for k in wanted}
        self._next = dict.fromkeys(wanted, 0)
        self._rows: list[deque[ImageId]] = [deque() for _ in range(self.batch_size)]
        lacking = {k: n - shelf.kept(k) for k, n in wanted.items()}
        self.total = sum(wanted.values())
        self.missing = sum(max(0, n) for n in lacking.values())
        for turn in range(max(lacking.values(), default=0)):
            for k, lack in lacking.items():
                if turn < lack:
                    self.add(k)

    def add(self, class_id: int) -> None:
        """Ask for one more image of a class; nothing where its tries are used up."""
        taken = self._taken[class_id]
        index = self._next[class_id]
        while index in taken:
            index += 1
        self._next[class_id] = index + 1
        if index < self._last[class_id]:
            taken.add(index)
            image = ImageId(class_id, index)
            self._rows[image.row(self.batch_size)].append(image)

    def batch(self) -> list[ImageId]:
        """The next images, at most one a row; [] where none waits."""
        return [row.popleft() for row in self._rows if row]


class GuidanceLog:
    """The sampler's figures, averaged at each timestep over all batches of a folder: guidance.json."""

    def __init__(self, sums: dict[int, list[float]], batches: int) -> None:
        self._sums = sums
        self._batches = batches

    @classmethod
    def open(cls, folder: Path) -> GuidanceLog:
        """Continue what an earlier job wrote."""
        if not (folder / "guidance.json").exists():
            return cls({}, 0)
        table = store.read_json(folder / "guidance.json")
        n = table["batches"]
        figures = zip(table["t"], table["guidance_to_noise"], table["scale"], table["log_prob"], strict=True)
        return cls({t: [n * value for value in values] for t, *values in figures}, n)

    def add(self, steps: Sequence[StepLog]) -> None:
        """Count one batch, unless an image in it was not finite: it has no averages."""
        rows = [(step.t, (step.guidance_to_noise, step.scale, step.log_prob)) for step in steps]
        if not np.isfinite([values for _, values in rows]).all():
            return
        self._batches += 1
        for t, values in rows:
            self._sums[t] = [total + value for total, value in zip(self._sums.get(t, (0.0, 0.0, 0.0)), values, strict=True)]

    def write(self, folder: Path) -> None:
        """Commit the averages; nothing where no batch was made."""
        if self._batches:
            order = sorted(self._sums, reverse=True)
            names = ("guidance_to_noise", "scale", "log_prob")
            columns = {name: [self._sums[t][i] / self._batches for t in order] for i, name in enumerate(names)}
            store.write_json(folder / "guidance.json", {"batches": self._batches, "t": order, **columns})


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
                    batch = _Batch(images, maker.recipe.synth.steps)
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
                    for image in drawn:
                        kept = _commit(maker, bands, shelf, image)
                        made += kept
                        dropped += image.pixels is not None and not kept
                        if not kept:
                            queue.add(image.image.class_id)
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
    distance = distance_to(bands[k], drawn.feature) if drawn.feature is not None else None
    kept = distance is None or keeps(bands[k], distance, maker.recipe.select.distance_band)
    record = Record(
        plan=maker.plan.id,
        class_id=k,
        class_name=maker.plan.names[k],
        index=drawn.image.index,
        seed=maker.recipe.synth.seed,
        kept=kept,
        distance=distance,
        pixels_sha256=pixels_sha256(pixels),
        versions=versions_text(maker.plan.versions),
    )
    shelf.put(record, encode_png(pixels, record))
    return kept


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
        generated = shelf.first(k, SHEET_IMAGES)
        yield SheetRow(
            shelf.plan.names[k],
            _first_of(originals.train, k) if originals else empty,
            np.stack(generated) if generated else empty,
        )


def _first_of(images: ImageSet, class_id: int) -> Pixels:
    return images.pixels(np.flatnonzero(images.labels == class_id)[:SHEET_IMAGES])


def _is_ready(run: RunFolder, model: Model) -> bool:
    return run.stage(model).exists() if run.recipe.synth.engine == "torch" else onnx_path(run, model).exists()


def _export_command(run: RunFolder, model: Model) -> str:
    return "diffrc export" + (" --model source" if model == "source" else "") + f" --run {run.path}"


def _processors() -> int:
    return len(os.sched_getaffinity(0))
