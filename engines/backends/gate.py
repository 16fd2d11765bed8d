"""The parity gate: how far an engine is from torch in one evaluation and after a trajectory, how fast it is, and what is allowed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from engines.backends.base import Engine, Precision, example_input, relative_error
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import sample
from engines.diffusion.schedule import Schedule, respace
from engines.recipe import ExportSection

TRAJECTORY_STEPS = 50
TRAJECTORY_IMAGES = 4
MAX_PSNR_DB = 200.0  # what equal images are given
TIMED_TURNS = 3


class Limits(NamedTuple):
    """How far an engine may be from torch."""

    one_step_tolerance: float  # relative L2 of one evaluation
    trajectory_psnr_db: float
    prefix: str = ""  # of the recipe's keys


def limits_of(settings: ExportSection, precision: Precision) -> Limits:
    """The recipe's limits for a precision."""
    if precision == "bf16":
        return Limits(settings.bf16_one_step_tolerance, settings.bf16_trajectory_psnr_db, "bf16_")
    assert precision == "fp32", precision
    return Limits(settings.one_step_tolerance, settings.trajectory_psnr_db)


def one_step_error(engine: Engine, reference: Engine, batch: int = 1) -> float:
    """The largest relative L2 error of an image, over small, middle and large t and batches of 1, 2, `batch` and the largest."""
    card, worst = engine.card, 0.0
    for size in sorted({1, min(2, card.max_batch), batch, card.max_batch}):
        for first_t in (0, card.timesteps // 2, card.timesteps - 1):
            x, t, y = example_input(card, size, first_t)
            for found, expected in zip(engine(x, t, y), reference(x, t, y), strict=True):
                error = relative_error(found, expected)
                worst = error if not error <= worst else worst  # keeps a NaN
                if worst != worst:
                    return worst
    return worst


def trajectory_psnr_db(engine: Engine, reference: Engine, schedule: Schedule) -> float:
    """PSNR of the worst image after 50 steps of DDIM from the same noise; images are in [-1, 1], so the peak is 2."""
    short = respace(schedule, trajectory_steps(schedule))
    noise = batch_noise([image_key(0, 1, i) for i in range(min(TRAJECTORY_IMAGES, engine.card.max_batch))], 0, engine.card.shape)
    _, _, y = example_input(engine.card, len(noise), 0)

    def images(runner: Engine) -> Tensor:
        return sample(lambda x, t: runner(x, t, y), short, lambda step: noise.clone(), sampler="ddim")

    error = (images(engine) - images(reference)).square().flatten(1).mean(1)  # (B,)
    worst = float((10 * (4 / error.clamp(min=1e-30)).log10()).min())
    return min(worst, MAX_PSNR_DB)


def ms_per_image(engines: Sequence[Engine], batch: int) -> list[float]:
    """Milliseconds of one evaluation divided by its images: medians, the engines taking turns after one that is not timed."""
    times: list[list[float]] = [[] for _ in engines]
    for turn in range(TIMED_TURNS + 1):
        for engine, spent in zip(engines, times, strict=True):
            x, t, y = example_input(engine.card, batch, engine.card.timesteps // 2)
            started = time.perf_counter()
            engine(x, t, y)
            spent += [time.perf_counter() - started] if turn else []
    return [1000 * statistics.median(spent) / batch for spent in times]


def trajectory_steps(schedule: Schedule) -> int:
    """Steps of the trajectory that engines are compared after: 50, or as many as there are."""
    return min(TRAJECTORY_STEPS, len(schedule))
