"""The parity gate: how far an engine is from torch in one evaluation and after a trajectory, how fast it is, and what is allowed.

Fail-closed: `hold` gives the figures for a card, or raises with all of them; who calls it has published nothing yet.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from engines.backends.base import Engine, Precision, example_input, relative_error
from engines.data.batches import to_pixels, to_tensor
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import sample
from engines.diffusion.schedule import Schedule, respace
from engines.errors import ParityError
from engines.networks.guide import Guide
from engines.networks.resnet import Recognizer
from engines.recipe import ExportSection

TRAJECTORY_STEPS = 50
TRAJECTORY_IMAGES = 64  # as many as TRAJECTORY_SECONDS allow, by the speeds measured just before, but
LEAST_TRAJECTORY_IMAGES = 4
TRAJECTORY_SECONDS = 30.0
MAX_PSNR_DB = 200.0  # what equal images are given
TIMED_TURNS = 3


class Limits(NamedTuple):
    """How far an engine may be from torch, and the recipe's keys that say so, in the same order."""

    one_step_tolerance: float  # relative L2 of one evaluation
    trajectory_psnr_db: float  # of the worst image
    label_agreement: float  # share of the images
    keys: tuple[str, str, str]


class Labeler(NamedTuple):
    """What says which class an image is of."""

    by: Literal["recognizer", "guide"]
    scores: Callable[[Tensor], Tensor]  # (B, C, H, W) in [-1, 1] -> (B, K), the largest names the class


class Parity(NamedTuple):
    """What was measured; each is a field of a card."""

    one_step_error: float  # the worst image
    trajectory_psnr_db: float  # the worst image
    trajectory_median_psnr_db: float
    trajectory_images: int
    label_agreement: float  # share of those images that keep their label; 0 where `labels_by` is ""
    labels_by: Literal["", "recognizer", "guide"]
    measured_batch: int
    ms_per_image: float
    torch_ms_per_image: float


def limits_of(settings: ExportSection, precision: Precision, on_gpu: bool = False) -> Limits:
    """The recipe's limits for a precision, on the CPU or on a GPU."""
    half = "" if precision == "fp32" else f"{precision}_"
    once = "gpu_" if on_gpu and not half else half
    keys = (f"{once}one_step_tolerance", f"{half}trajectory_psnr_db", f"{'bf16_' if half else ''}label_agreement")
    tolerance, psnr, agreement = (float(getattr(settings, key)) for key in keys)
    return Limits(tolerance, psnr, agreement, keys)


def hold(
    engine: Engine, reference: Engine, schedule: Schedule, limits: Limits, batch: int, name: str, labeler: Labeler | None = None
) -> Parity:
    """Hold an engine to torch's numbers, and measure its speed.

    Args:
        reference: the same network in torch.
        schedule: of training.
        batch: the batch size of synthesis.
        name: what the engine is called in messages.
        labeler: says which class the images after a trajectory are of; None where nothing can.

    Raises: ParityError, exit code 6, with every number, where one lies outside its limit or is not a number.
    """
    parity = measure(engine, reference, schedule, batch, labeler)
    inside = (
        parity.one_step_error <= limits.one_step_tolerance,
        parity.trajectory_psnr_db >= limits.trajectory_psnr_db,
        not parity.labels_by or changed_labels(parity) <= allowed_changes(limits, parity.trajectory_images),
    )
    if all(inside):
        return parity
    labels = f"; {changed_labels(parity)} of {parity.trajectory_images} labels changed (by {parity.labels_by}), "
    labels += f"{allowed_changes(limits, parity.trajectory_images)} allowed"
    outside = " or ".join(f"export.{key}" for key, good in zip(limits.keys, inside, strict=True) if not good)
    raise ParityError(
        f"{name} disagrees with torch: relative error {parity.one_step_error:.2g} of one evaluation, "
        f"{limits.one_step_tolerance:.2g} allowed; {parity.trajectory_psnr_db:.1f} dB after {trajectory_steps(schedule)} steps of DDIM "
        f"(the worst of {parity.trajectory_images} images; the median {parity.trajectory_median_psnr_db:.1f} dB), "
        f"at least {limits.trajectory_psnr_db:.1f} dB asked for{labels if parity.labels_by else ''}; nothing was written",
        f"report it, or loosen {outside}",
    )


def measure(engine: Engine, reference: Engine, schedule: Schedule, batch: int, labeler: Labeler | None = None) -> Parity:
    """All figures of an engine beside torch. The arguments are those of `hold`."""
    error = one_step_error(engine, reference, batch)
    ms, torch_ms = ms_per_image((engine, reference), batch)
    count = trajectory_images((ms + torch_ms) / 1000, trajectory_steps(schedule))
    found, expected = (trajectory(runner, schedule, count) for runner in (engine, reference))
    psnr = psnr_db(found, expected)
    agreement = label_agreement(found, expected, labeler) if labeler else 0.0
    worst, median = float(psnr.min()), float(psnr.quantile(0.5))
    return Parity(error, worst, median, count, agreement, labeler.by if labeler else "", batch, ms, torch_ms)


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


def trajectory(engine: Engine, schedule: Schedule, images: int) -> Tensor:
    """(N, C, H, W) images after 50 steps of DDIM from noise that is always the same, labels in turn."""
    short = respace(schedule, trajectory_steps(schedule))
    noise = batch_noise([image_key(0, 1, i) for i in range(images)], 0, engine.card.shape)
    y = torch.arange(images) % engine.card.classes if engine.card.classes else None

    def drawn(part: slice) -> Tensor:
        labels = None if y is None else y[part]
        return sample(lambda x, t: engine(x, t, labels), short, lambda step: noise[part].clone(), sampler="ddim")

    largest = engine.card.max_batch
    return torch.cat([drawn(slice(start, start + largest)) for start in range(0, images, largest)])


def trajectory_images(seconds_per_image: float, steps: int) -> int:
    """How many images to compare: 64, or as many as half a minute allows, and at least 4.

    Args:
        seconds_per_image: of one evaluation by the engine and one by torch.
    """
    affordable = int(TRAJECTORY_SECONDS / max(1e-9, seconds_per_image * steps))
    return max(LEAST_TRAJECTORY_IMAGES, min(TRAJECTORY_IMAGES, affordable))


def psnr_db(found: Tensor, expected: Tensor) -> Tensor:
    """PSNR of each image, (B,) dB; images are in [-1, 1], so the peak is 2."""
    error = (found - expected).double().square().flatten(1).mean(1)  # (B,)
    return (10 * (4 / error.clamp(min=1e-30)).log10()).clamp(max=MAX_PSNR_DB)  # a NaN stays one


def label_agreement(found: Tensor, expected: Tensor, labeler: Labeler) -> float:
    """Share of the images that are of the same class; both (B, C, H, W), seen as they would be written."""
    labels, should_be = (labeler.scores(to_tensor(to_pixels(images.nan_to_num(0.0)))).argmax(1) for images in (found, expected))
    return float((labels == should_be).double().mean())


def recognizer_labeler(recognizer: Recognizer) -> Labeler:
    """A trained recognizer, in evaluation mode."""
    return Labeler("recognizer", torch.no_grad()(recognizer))


def guide_labeler(guide: Guide) -> Labeler:
    """The guide's prototypes as a classifier of images without noise: the largest log p~(k | x_0) at t = 0."""

    @torch.no_grad()
    def scores(x: Tensor) -> Tensor:
        return guide.log_probs(x, torch.zeros(len(x), dtype=torch.int64))

    return Labeler("guide", scores)


def changed_labels(parity: Parity) -> int:
    """Images whose label is not torch's."""
    return round((1 - parity.label_agreement) * parity.trajectory_images)


def allowed_changes(limits: Limits, images: int) -> int:
    """Labels that may change: the share that the recipe leaves, in whole images, rounded up; so one of 64 at 0.99, and two at 0.97.

    One image between two classes is no evidence against an engine, however few there are.
    """
    return math.ceil((1 - limits.label_agreement) * images - 1e-9)


def ms_per_image(engines: Sequence[Engine], batch: int) -> list[float]:
    """Milliseconds of one evaluation divided by its images."""
    jobs = [partial(engine, *example_input(engine.card, batch, engine.card.timesteps // 2)) for engine in engines]
    return [1000 * seconds / batch for seconds in seconds_in_turn(jobs, TIMED_TURNS)]


def seconds_in_turn(jobs: Sequence[Callable[[], object]], turns: int, least: int = 0, limit: float = math.inf) -> list[float]:
    """Median seconds of each job; they take turns, after one turn that is not timed.

    Args:
        turns: that are timed; fewer, but `least` of them, where they take more than `limit` seconds.
    """
    times: list[list[float]] = [[] for _ in jobs]
    first = time.perf_counter()
    for turn in range(turns + 1):
        if turn > max(1, least) and time.perf_counter() - first > limit:
            break
        for job, spent in zip(jobs, times, strict=True):
            started = time.perf_counter()
            job()
            spent += [time.perf_counter() - started] if turn else []
    return [statistics.median(spent) for spent in times]


def trajectory_steps(schedule: Schedule) -> int:
    """Steps of the trajectory that engines are compared after: 50, or as many as there are."""
    return min(TRAJECTORY_STEPS, len(schedule))
