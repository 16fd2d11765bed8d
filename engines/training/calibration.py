"""How right and how sure the guide is at every noise level: where on t its guidance can be trusted.

Every figure weighs classes alike, as the accuracy always did: of the training images a class has five or five hundred, and
plain means would say how well the head is seen. The images of an oracle (`LongTail.pool`) stay out of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines import store
from engines.data.batches import by_class, to_tensor, torch_generator
from engines.data.images import ImageSet
from engines.diffusion.schedule import Schedule, q_sample
from engines.networks.guide import Guide
from engines.training.calibration_picture import calibration_png

NOISE_LEVELS = 11  # at which the guide is judged
ACCURACY_IMAGES = 500  # for it, spread evenly over the classes
BINS = 15  # of confidence, of equal width
TABLE, PICTURE = "accuracy.json", "calibration.png"

Values = npt.NDArray[np.float64]


def write(folder: Path, guide: Guide, splits: Mapping[str, ImageSet], schedule: Schedule, seed: int) -> dict[str, dict[str, Any]]:
    """Judge the guide on each split that has images; `accuracy.json` and `calibration.png` in `folder`. Raises StorageError.

    Returns: `by_noise` of each split, as in the file.
    """
    tables = {name: by_noise(guide, images, schedule, seed) for name, images in splits.items() if len(images)}
    store.write_json(folder / TABLE, tables)
    store.write_bytes(folder / PICTURE, calibration_png(tables))
    return tables


def is_written(folder: Path) -> bool:
    """Whether `write` has finished in this folder, by a version that measured calibration: the picture comes last."""
    return (folder / TABLE).exists() and (folder / PICTURE).exists()


def forget(folder: Path) -> None:
    """Take back that `write` has finished here, before the guide is trained on: killed after its last step, it must be judged anew."""
    (folder / PICTURE).unlink(missing_ok=True)


@torch.no_grad()
def by_noise(guide: Guide, images: ImageSet, schedule: Schedule, seed: int, batch_size: int = 256) -> dict[str, Any]:
    """Accuracy and calibration of the guide on noised images.

    Of a large set the first images of each class are taken, about 500 in all: then even a perfectly calibrated guide of ten
    classes that is halfway sure shows an ECE of about 0.05, since a bin of few images is right too often or too rarely.

    Returns: at evenly spaced timesteps "t", of p~(k | x_t) as guidance uses it,
        "accuracy"    of the likeliest class, 0..1
        "confidence"  its probability, 0..1
        "ece"         expected calibration error, 0..1, see `reliability`
        "nll"         -log p~(y | x_t), nats
        "bins"        of the reliability diagram that are not empty, each [confidence, accuracy, share of the images]
        beside "images", "classes", "chance", and "trusted_until" (see there).
    """
    guide.eval()
    share = max(1, ACCURACY_IMAGES // len(images.names))
    images = images.subset(np.concatenate([members[:share] for members in by_class(images.labels, len(images.names))]))
    weights = class_weights(images.labels)
    levels = [round(i * (len(schedule) - 1) / (NOISE_LEVELS - 1)) for i in range(NOISE_LEVELS)]
    columns: dict[str, list[Any]] = {name: [] for name in ("accuracy", "confidence", "ece", "nll", "bins")}
    for t in levels:
        log_probs = _log_probs(guide, images, schedule, t, seed, batch_size)  # (N, K)
        best = log_probs.argmax(1)
        right = (best == images.labels).astype(np.float64)
        confidence = np.exp(log_probs[np.arange(len(best)), best])
        found = reliability(confidence, right, weights)
        columns["accuracy"].append(round(float(weights @ right), 4))
        columns["confidence"].append(round(float(weights @ confidence), 4))
        columns["ece"].append(round(found.ece, 4))
        columns["nll"].append(round(float(weights @ -log_probs[np.arange(len(best)), images.labels]), 4))
        columns["bins"].append([[round(value, 4) for value in entry] for entry in found.bins])
    chance = 1 / len(images.names)
    until = trusted_until(levels, columns["accuracy"], chance, len(images))
    facts = {"images": len(images), "classes": len(images.names), "chance": round(chance, 6), "trusted_until": until}
    return facts | {"t": levels} | columns


class Bin(NamedTuple):
    """Images about whose likeliest class the guide is about equally sure."""

    confidence: float  # their mean
    accuracy: float
    share: float  # of the whole weight


class Reliability(NamedTuple):
    """A reliability diagram, empty bins left out, and what it amounts to."""

    ece: float
    bins: list[Bin]


def reliability(confidence: Values, right: Values, weights: Values) -> Reliability:
    """Expected calibration error over 15 equal-width bins of confidence, ( i / 15, (i + 1) / 15 ] (Guo et al. 2017).

        ECE = sum over bins of  share_b |accuracy_b - confidence_b|

    Args:
        confidence: (N,) probability of the likeliest class.  right: (N,) 1 where that is the true one, else 0.
        weights: (N,) of the images, sum 1.
    """
    place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)  # an edge belongs to the bin below it
    bins = []
    for b in np.unique(place):
        w = weights * (place == b)
        share = float(w.sum())
        bins.append(Bin(float(w @ confidence) / share, float(w @ right) / share, share))
    return Reliability(math.fsum(b.share * abs(b.accuracy - b.confidence) for b in bins), bins)


def class_weights(labels: npt.NDArray[np.int64]) -> Values:
    """(N,) weights with which every class that occurs counts alike, sum 1."""
    counts = np.bincount(labels)
    return np.asarray(1 / (counts[labels] * np.count_nonzero(counts)), dtype=np.float64)


def trusted_until(levels: Sequence[int], accuracy: Sequence[float], chance: float, images: int) -> int | None:
    """The largest t at which the guide's accuracy is at least halfway from chance to its best: beyond, it mostly guesses.

    None where the best is no better than chance, by three standard errors of `images` guesses.
    """
    best = max(accuracy)
    if best <= chance + 3 * math.sqrt(chance * (1 - chance) / images):
        return None
    return max(t for t, a in zip(levels, accuracy, strict=True) if a >= (best + chance) / 2)


COLUMNS = ("t", "train", "test", "confidence", "ECE", "NLL")


def rows(tables: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The tables of `write` as cells under `COLUMNS`: accuracy on training and test images, and calibration on the test images.

    Percent, but for NLL in nats. A split that is missing has empty cells; without test images calibration is that of the
    training images.
    """
    judge = tables.get("test") or tables["train"]
    lines = []
    for i, t in enumerate(judge["t"]):
        accuracy = tuple(_percent(tables[name]["accuracy"][i]) if name in tables else "" for name in ("train", "test"))
        lines.append((str(t), *accuracy, _percent(judge["confidence"][i]), _percent(judge["ece"][i]), f"{judge['nll'][i]:.2f}"))
    return lines


def advice(tables: Mapping[str, Mapping[str, Any]], interval: tuple[int, int]) -> str:
    """One sentence on where to guide. From training images alone: test images choose nothing, not even a hint.

    Args:
        interval: timesteps in which the recipe guides, synth.guidance_interval.
    """
    until = tables["train"]["trusted_until"]
    if until is None:
        return "the guide does no better than chance on its training images: train it longer before guiding with it"
    if until == tables["train"]["t"][-1]:
        return "the guide sees the class at every noise level"
    seen = f"the guide sees the class up to about t = {until}"
    if interval[1] <= until:
        return f"{seen}, and the recipe guides there alone"
    return f"{seen}: --set 'synth.guidance_interval=[{min(interval[0], until)},{until}]' guides there alone"


def _log_probs(guide: Guide, images: ImageSet, schedule: Schedule, t: int, seed: int, batch_size: int) -> Values:
    """(N, K) of every image at one noise level."""
    device = schedule.betas.device
    parts: list[Tensor] = []
    for start in range(0, len(images), batch_size):
        x0 = to_tensor(images.pixels(np.arange(start, min(start + batch_size, len(images)))))
        noise = torch.randn(x0.shape, generator=torch_generator(seed, "guide/accuracy", t, start))
        j = torch.full((len(x0),), t, device=device)
        parts.append(guide.log_probs(q_sample(schedule, x0.to(device), j, noise.to(device)), j))
    return np.asarray(torch.cat(parts).double().cpu().numpy(), dtype=np.float64)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
