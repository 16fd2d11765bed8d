"""What making images would take: what is there, what is missing, and seconds from a few measured steps; nothing is written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engines import store
from engines.backends.device import one_thread_each
from engines.backends.torch_engine import TorchEngine
from engines.data.longtail import LongTail
from engines.data.names import slug
from engines.diffusion.sampler import StepLog
from engines.progress import Report, peak_memory_bytes, silent
from engines.recipe import Recipe
from engines.store import RunFolder
from engines.synthesis import plan as plans
from engines.synthesis import select
from engines.synthesis.maker import GivenUp, Maker, open_maker
from engines.synthesis.plan import PLAN_FILE, ImageId, Model, Plan
from engines.synthesis.real_start import real_starts
from engines.synthesis.sheet import scan_class
from engines.synthesis.synthesize import BYTES_PER_IMAGE, BYTES_PER_VALUE, is_ready

LEAST_STEPS, MOST_SECONDS = 3, 3.0  # that are measured, after one that is not


@dataclass(frozen=True)
class ClassLeft:
    """A class: images asked for, kept ones that are there, and those that are missing."""

    name: str
    asked: int
    there: int

    @property
    def missing(self) -> int:
        return max(0, self.asked - self.there)


@dataclass(frozen=True)
class PartForecast:
    """What one network has left to make.

    Attributes:
        tries: images drawn for one that the selection keeps, by those that are there; 1 where it kept all or nothing is there.
        aside: images of other settings lie in the folder and would be kept aside.
        batches: drawn in all, `parallel` of them side by side.
        seconds_per_batch: as measured; 0 where nothing is missing.
        disk_bytes: of the images.
        memory_bytes: at most; of the GPU where the images are drawn on one, else of the process.
    """

    model: Model
    folder: Path
    engine: str
    device: str
    classes: tuple[ClassLeft, ...]
    tries: float
    aside: bool
    parallel: int
    batches: int
    seconds_per_batch: float
    disk_bytes: int
    memory_bytes: int

    @property
    def missing(self) -> int:
        """Images of all classes."""
        return sum(c.missing for c in self.classes)

    @property
    def seconds_left(self) -> float:
        return math.ceil(self.batches / self.parallel) * self.seconds_per_batch


def forecast(
    run: RunFolder,
    wanted: Mapping[int, int],
    out: Path | None = None,
    report: Report = silent,
    make_room: bool = False,
    data: LongTail | None = None,
) -> list[PartForecast]:
    """What `synthesize` would do with the same arguments. The search for copies is not counted.

    Args:
        data: the run's, which `synth.start` may need.

    Raises as it does before it makes anything: UsageError, EngineError, ConflictError.
    """
    parts = plans.by_model(run, wanted, source_ready=is_ready(run, "source"))
    found = []
    for done, (model, classes) in enumerate(parts.items()):
        report("measure", done, len(parts), {})
        folder = plans.folder_of(run, model, out)
        plans.check_folder(folder)
        maker = open_maker(run, model, plans.made_with(folder), data=data)
        maker.check_classes(classes)
        here: Path | None = folder
        aside = False
        if not make_room:
            plans.check_plan(folder, maker.plan)
        elif (folder / PLAN_FILE).exists() and _plan_of(folder) != maker.plan.id:
            here, aside = _kept_aside(run, folder, maker.plan), True
        found.append(forecast_part(maker, folder, here, classes, aside))
    report("measure", len(parts), len(parts), {})
    return found


def forecast_untrained(recipe: Recipe, data: LongTail, device: torch.device, folder: Path) -> PartForecast:
    """What filling the tail would take in a run that is not trained yet, with PyTorch's network, which no engine is slower than."""
    from engines.training.stages import new_guide, new_unet

    unet = new_unet(recipe, len(data.counts)).eval().to(device)
    engine = TorchEngine(unet, recipe.diffusion.steps, recipe.synth.batch_size)
    guided = bool(recipe.synth.guidance_scale) or select.is_on(recipe.select)
    guide = new_guide(recipe, data.counts).eval().requires_grad_(False).to(device) if guided else None
    plan = Plan({"classes": list(data.names), "image": list(engine.card.shape)}, {})
    maker = Maker(recipe, plan, recipe.synth.model, engine, guide, device, starts=real_starts(recipe, data))
    counts = plans.fill_counts(recipe, data.counts, data.groups)
    return forecast_part(maker, folder, None, {int(k): int(counts[k]) for k in np.flatnonzero(counts)})


def forecast_part(
    maker: Maker, folder: Path, here: Path | None, wanted: Mapping[int, int], aside: bool = False, most_seconds: float = MOST_SECONDS
) -> PartForecast:
    """What making images in a folder would take.

    Args:
        here: where images of the maker's plan lie, if anywhere; `aside` as in `PartForecast`.
        most_seconds: of measuring.
    """
    kept, dropped = dict.fromkeys(wanted, 0), 0
    for k in wanted:
        if here and (here / slug(maker.plan.names[k], k)).exists():
            records = [image.record for _, image in scan_class(here, maker.plan.names, k, maker.plan.id) if image]
            kept[k] = sum(record.kept for record in records)
            dropped += len(records) - kept[k]
    classes = tuple(ClassLeft(maker.plan.names[k], n, kept[k]) for k, n in wanted.items())
    tries = 1 + dropped / sum(kept.values()) if any(kept.values()) else 1.0
    missing = sum(c.missing for c in classes)
    batches = math.ceil(missing * tries / maker.recipe.synth.batch_size)
    parallel = min(maker.parallel, max(1, batches))
    seconds, memory_bytes = measure(maker, parallel, most_seconds) if missing else (0.0, 0)
    card = maker.engine.card
    image_bytes = int(np.prod(card.shape)) * BYTES_PER_VALUE + BYTES_PER_IMAGE
    return PartForecast(
        maker.model,
        folder,
        f"{card.kind} {card.precision}",
        maker.device.type,
        classes,
        tries,
        aside,
        parallel,
        batches,
        seconds,
        round(missing * tries * image_bytes),
        memory_bytes,
    )


def measure(maker: Maker, parallel: int = 1, most_seconds: float = MOST_SECONDS) -> tuple[float, int]:
    """Seconds that a full batch takes, and bytes of memory that `parallel` of them do, from some steps of one that is given up.

    Steps with guidance and without it count apart; of a kind that was not met, the other's time is taken.
    """
    ended: list[float] = []
    seen: list[int] = []

    def log(step: StepLog) -> None:
        ended.append(time.perf_counter())
        seen.append(step.t)
        if len(ended) > LEAST_STEPS and ended[-1] - ended[0] > most_seconds:
            raise GivenUp

    def draw() -> None:
        try:
            maker.draw([_in_row(row, maker) for row in range(maker.recipe.synth.batch_size)], log)
        except GivenUp:
            return

    on_gpu = maker.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(maker.device)
    before = peak_memory_bytes()
    began = time.perf_counter()
    with one_thread_each(), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pool.submit(draw).result()
    whole = time.perf_counter() - began
    memory_bytes = torch.cuda.max_memory_allocated(maker.device) if on_gpu else _memory_of(before, peak_memory_bytes(), parallel)
    timesteps = [int(t) for t in maker.schedule.timesteps.tolist()]
    return (whole if len(seen) == len(timesteps) else extrapolated(maker, timesteps, seen, ended)), memory_bytes


def extrapolated(maker: Maker, timesteps: list[int], seen: list[int], ended: list[float]) -> float:
    """Seconds of all `timesteps`, from those of the steps that were `seen` and when each `ended`; the first one warms up."""
    first, last = maker.recipe.synth.guidance_interval
    spent: dict[bool, list[float]] = {True: [], False: []}
    for t, start, end in zip(seen[1:], ended, ended[1:], strict=False):
        spent[first <= t <= last].append(end - start)
    every = spent[True] + spent[False]
    return float(sum(np.median(spent[first <= t <= last] or every) for t in timesteps))


def _memory_of(before: int, after: int, parallel: int) -> int:
    return after + (parallel - 1) * (after - before)


def _in_row(row: int, maker: Maker) -> ImageId:
    """An image of the first class that stands in this row of a batch."""
    size = maker.recipe.synth.batch_size
    return next(image for image in (ImageId(0, index) for index in range(size)) if image.row(size) == row)


def _kept_aside(run: RunFolder, folder: Path, plan: Plan) -> Path | None:
    return next((place for place in sorted(run.stale.glob(f"{folder.name}-*")) if _plan_of(place) == plan.id), None)


def _plan_of(folder: Path) -> str:
    return str(store.read_json(folder / PLAN_FILE).get("plan", "")) if (folder / PLAN_FILE).exists() else ""
