"""What `diffrc evaluate` would take: which recognizers are kept already, and seconds from a few steps of one; nothing is written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from engines.backends.device import one_thread_each, processors
from engines.data.longtail import LongTail
from engines.evaluation.accuracy import VARIANTS, cells_of, require_images, training_device
from engines.evaluation.synthetic import ExtraImages, all_pixels, refuse_test_images, replay
from engines.progress import peak_memory_bytes
from engines.recipe import Method, Recipe, RecognizerSection
from engines.store import RunFolder
from engines.synthesis.plan import fill_counts
from engines.synthesis.sheet import read_images
from engines.training.recognizer import TWO_STAGES, TrainingImages, real_images, train_recognizer

LEAST_STEPS, MOST_SECONDS = 3, 2.0  # that are measured, after one that is not
CELL_BYTES_PER_IMAGE = 24  # of a kept recognizer's answers: a class and a confidence, as JSON


@dataclass(frozen=True)
class EvaluationForecast:
    """The recognizers of an evaluation.

    Attributes:
        recognizers: in all, the oracle among them.
        kept: trained already, with the same images and settings.
        steps: of those that are left, together.
        seconds_per_step: as measured; 0 where nothing is left.
        parallel: recognizers that are trained side by side.
        memory_bytes: at most; of the GPU where they are trained on one, else of the process.
    """

    recognizers: int
    kept: int
    steps: int
    seconds_per_step: float
    parallel: int
    device: str
    disk_bytes: int
    memory_bytes: int

    @property
    def seconds_left(self) -> float:
        return self.steps * self.seconds_per_step / self.parallel


def forecast(run: RunFolder, longtail: LongTail) -> EvaluationForecast:
    """What `evaluate_run` would train; the measures of trust are not counted. Raises as it does before it trains anything."""
    require_images(run, longtail)
    synthetic, device = ExtraImages(*read_images(run.synth)), training_device()
    refuse_test_images(synthetic, longtail.test)
    cells = cells_of(longtail, synthetic, run.recipe.recognizer, run.evaluation, device)
    left = [key.method for key, cell in cells.items() if cell.stored() is None]
    return _forecast(run.recipe.recognizer, longtail, synthetic, len(cells), left, device)


def forecast_unmade(recipe: Recipe, longtail: LongTail) -> EvaluationForecast:
    """The same for a run whose images are still to be made; duplicates of real images stand for them."""
    section, device = recipe.recognizer, training_device()
    synthetic = replay(longtail.train, fill_counts(recipe, longtail.counts, longtail.groups), 0)
    left: list[Method] = [method for method in section.methods for _ in VARIANTS for _ in range(section.seeds)]
    return _forecast(section, longtail, synthetic, len(left) + 1, [*left, "cross_entropy"], device)


def _forecast(
    section: RecognizerSection, longtail: LongTail, synthetic: ExtraImages, recognizers: int, left: list[Method], device: torch.device
) -> EvaluationForecast:
    steps = sum(steps_of(section, method) for method in left)
    parallel = min(1 if device.type == "cuda" else processors(), max(1, len(left)))
    seconds, memory_bytes = 0.0, 0
    if left:
        real = real_images(all_pixels(longtail.train), longtail.train.labels)
        images = real.add(synthetic.pixels, synthetic.labels, section.synthetic_weight)
        seconds, memory_bytes = measure(images, len(longtail.names), section, left[0], device, parallel)
    disk_bytes = len(left) * CELL_BYTES_PER_IMAGE * (len(longtail.test) + len(synthetic))
    return EvaluationForecast(recognizers, recognizers - len(left), steps, seconds, parallel, device.type, disk_bytes, memory_bytes)


def steps_of(section: RecognizerSection, method: Method) -> int:
    """Steps of one training, the second stage of those that have one counted like the first."""
    return section.train_steps + (max(1, round(section.second_stage_fraction * section.train_steps)) if method in TWO_STAGES else 0)


def measure(
    images: TrainingImages, classes: int, section: RecognizerSection, method: Method, device: torch.device, parallel: int = 1
) -> tuple[float, int]:
    """Seconds of a training step on one thread, and bytes of memory that `parallel` trainings take."""
    ended: list[float] = []

    def hear(_what: str, _done: int, _total: int, _figures: Mapping[str, float]) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended.append(time.perf_counter())
        if len(ended) > LEAST_STEPS and ended[-1] - ended[0] > MOST_SECONDS:
            raise _Enough

    def train() -> None:
        try:
            train_recognizer(images, classes, section, method, 0, device, hear)
        except _Enough:
            return

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_memory_bytes()
    with one_thread_each(), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pool.submit(train).result()
    after = peak_memory_bytes()
    memory_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else after + (parallel - 1) * (after - before)
    return (ended[-1] - ended[0]) / (len(ended) - 1) if len(ended) > 1 else math.nan, memory_bytes


class _Enough(Exception):
    """Ends a training whose pace is known."""
