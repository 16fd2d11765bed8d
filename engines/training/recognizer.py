"""The recognizer that says whether synthesis helps: cross-entropy and balanced softmax over real and extra images (METHOD section 5).

A batch is a pure function of (seed, step): epochs over the union of real and extra images, as over one concatenated folder.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.data.batches import drawn_ahead
from engines.data.policies import augment_batch, through_pillow
from engines.errors import NumericsError
from engines.networks.resnet import ARCHITECTURES, Recognizer
from engines.progress import Report, silent
from engines.recipe import RecognizerSection

Loss = Literal["cross_entropy", "balanced_softmax"]
LOSSES: tuple[Loss, ...] = ("cross_entropy", "balanced_softmax")

PREDICTION_BATCH = 512
_CHECK_EVERY_STEPS = 50
_ORDER = 0  # a stream of random numbers under a seed; augmentation has its own


@dataclass(frozen=True)
class TrainingImages:
    """What a recognizer is trained on, in memory. Make one with `real_images`, then `add` to it."""

    pixels: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    weights: Tensor  # (N,) float32, loss weight of each image
    is_extra: Tensor  # (N,) bool: synthetic, or a control in a synthetic image's place; not counted in pi_real

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, pixels: np.ndarray, labels: np.ndarray, weight: float = 1.0, is_extra: bool = True) -> TrainingImages:
        """These images and more: pixels (M, H, W, C) uint8, labels (M,), one loss weight for all. Weight 0 adds nothing."""
        if weight == 0.0:
            return self
        more = real_images(pixels, labels)
        return TrainingImages(
            torch.cat([self.pixels, more.pixels]),
            torch.cat([self.labels, more.labels]),
            torch.cat([self.weights, torch.full_like(more.weights, weight)]),
            torch.cat([self.is_extra, torch.full_like(more.is_extra, is_extra)]),
        )


def real_images(pixels: np.ndarray, labels: np.ndarray) -> TrainingImages:
    """Real images, each of weight 1: pixels (N, H, W, C) uint8, labels (N,)."""
    count = len(labels)
    return TrainingImages(
        torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
        torch.from_numpy(np.asarray(labels, dtype=np.int64)),
        torch.ones(count),
        torch.zeros(count, dtype=torch.bool),
    )


def train_recognizer(
    images: TrainingImages,
    classes: int,
    section: RecognizerSection,
    loss: Loss,
    seed: int,
    device: torch.device | None = None,
    report: Report = silent,
) -> Recognizer:
    """Train one recognizer from scratch; the same arguments give the same weights on the same machine.

    Args:
        images: at least one image of weight above 0 that is not extra.
        classes: K.
        seed: of the weights, the order of the images and their augmentation; one number for all losses and image sets, so
            that two recognizers can be compared pair by pair.
        report: hears "recognizer" after every step, with the loss every 50.

    Returns: the network, in evaluation mode.
    Raises: NumericsError where the loss is no longer finite.
    """
    device = device or torch.device("cpu")
    real = images.is_extra.logical_not().nonzero().flatten().numpy()  # (N_real,)
    assert len(real), "a recognizer needs real images"
    everything = np.arange(len(images))
    labels, weights, is_extra = images.labels.to(device), images.weights.to(device), images.is_extra.to(device)
    union_priors = log_priors(images, classes, loss, section.synthetic_prior).to(device)  # (2, K)
    real_priors = log_priors(images, classes, loss, True).to(device)

    model = ARCHITECTURES[section.architecture](images.pixels.shape[1], classes, torch.Generator().manual_seed(seed))
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay)
    real_only_from = round(section.train_steps * (1.0 - section.real_only_fraction))

    def indices(step: int) -> np.ndarray:
        return batch_indices(real if step >= real_only_from else everything, section.batch_size, seed, step)

    with augmented_batches(images.pixels, indices, section, seed, (0, section.train_steps), device) as batches:
        for step, (index, augmented) in enumerate(batches):
            x = to_model(augmented)
            on_real = step >= real_only_from
            prior = (real_priors if on_real else union_priors)[is_extra[index].long()]  # (B, K)
            optimizer.param_groups[0]["lr"] = learning_rate(section, step)
            optimizer.zero_grad(set_to_none=True)
            with _precision(section, device):
                logits = model(x)
            value = weighted_cross_entropy(logits.float(), labels[index], weights[index], prior)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            figures = {}
            if step % _CHECK_EVERY_STEPS == 0 or step == section.train_steps - 1:
                figures["loss"] = float(value.detach())
                if not np.isfinite(figures["loss"]):
                    raise NumericsError(f"the recognizer's loss is {figures['loss']} at step {step}", "use a smaller recognizer.lr")
            report("recognizer", step + 1, section.train_steps, figures)
    model.eval()
    return model


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, log_prior: Tensor) -> Tensor:
    """Cross-entropy under a prior, one weight an image.

        L = sum over i of  w_i * -log softmax(z_i + log_prior_i)[y_i]  /  sum over i of w_i

    With log_prior = 0 this is cross-entropy. With log_prior = log pi it is balanced softmax (Ren et al. 2020),

        -log( N_y exp z_y / sum_k N_k exp z_k ),

    whose prior is part of the loss and not of the network: z alone predicts as if the classes were balanced.

    Args:
        logits: z, (B, K) float32.
        labels: y, (B,) int64.
        weights: w, (B,), not all 0.
        log_prior: (B, K) or (K,); -inf where a class cannot occur.

    Returns: scalar, nats.
    """
    losses = F.cross_entropy(logits + log_prior, labels, reduction="none")  # (B,)
    return (weights * losses).sum() / weights.sum()


def log_priors(images: TrainingImages, classes: int, loss: Loss, real_only: bool) -> Tensor:
    """What is added to the logits of a real image (row 0) and of an extra image (row 1): (2, K).

    cross_entropy: nothing.
    balanced_softmax, real_only: log pi of the real counts for real images and nothing for extra ones. Each source keeps its
        own law: extra images fill what is rare, so they must not undo the prior of the real ones.
    balanced_softmax, not real_only: log pi of all images for all images, an extra image counted by its loss weight.
    """
    priors = torch.zeros(2, classes)
    if loss == "balanced_softmax":
        counted = torch.where(images.is_extra, 0.0, images.weights) if real_only else images.weights
        counts = torch.zeros(classes).index_add(0, images.labels, counted)  # (K,)
        priors[: 1 if real_only else 2] = (counts / counts.sum()).log()
    return priors


def learning_rate(section: RecognizerSection, step: int) -> float:
    """Linear warm-up to `lr`, then cosine to 0 at `train_steps` or a factor `decay` at each milestone; `step` from 0."""
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    if section.schedule == "cosine":
        progress = (step - section.warmup_steps) / max(1, section.train_steps - section.warmup_steps)
        return float(section.lr * 0.5 * (1.0 + np.cos(np.pi * progress)))
    passed = sum(step >= fraction * section.train_steps for fraction in section.milestones)
    return float(section.lr * section.decay**passed)


def batch_indices(members: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The batch of a step: `members` shuffled anew each epoch, epochs laid end to end, `batch_size` of them cut out.

    Returns: (batch_size,) of `members`; a pure function of the arguments.
    """
    first = step * batch_size
    positions = np.arange(first, first + batch_size)
    epochs, places = np.divmod(positions, len(members))
    orders = {epoch: _order(len(members), seed, epoch) for epoch in range(epochs[0], epochs[-1] + 1)}
    chosen: np.ndarray = members[[orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)]]
    return chosen


@contextlib.contextmanager
def augmented_batches(
    pixels: Tensor,
    indices: Callable[[int], np.ndarray],
    section: RecognizerSection,
    seed: int,
    steps: tuple[int, int],
    device: torch.device,
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Which images each step from steps[0] to before steps[1] sees, (B,) int64, and these augmented, (B, C, H, W) uint8, on the device.

    Args:
        pixels: (N, C, H, W) uint8; they stay on the CPU, and threads augment the coming batches, where Pillow has a part in it.
        indices: the images of a step, (B,) below N; a pure function of the step.
    """
    ahead = through_pillow(section)
    pixels = pixels if ahead else pixels.to(device)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(indices(step))  # (B,)
        return index, augment_batch(pixels[index.to(pixels.device)], section, seed, step)

    with drawn_ahead(draw, *steps, section.workers if ahead else 0) as drawn:
        yield ((index.to(device), augmented.to(device)) for index, augmented in drawn)


def to_model(pixels: Tensor) -> Tensor:
    """Images as the network takes them: (B, C, H, W) uint8 -> float32 in [-1, 1]."""
    return (pixels.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model: Recognizer, pixels: np.ndarray) -> np.ndarray:
    """Predicted class of each image: (N, H, W, C) uint8 -> (N,) int64."""
    return np.concatenate([model(x).argmax(1).cpu().numpy() for x in _batches(model, pixels)] or [np.zeros(0, np.int64)])


@torch.inference_mode()
def predict_probabilities(model: Recognizer, pixels: np.ndarray) -> np.ndarray:
    """Softmax of the logits, as `predict` decides: (N, H, W, C) uint8 -> (N, K) float32."""
    classes = model.classifier.out_features
    return np.concatenate([model(x).softmax(1).cpu().numpy() for x in _batches(model, pixels)] or [np.zeros((0, classes), np.float32)])


@torch.inference_mode()
def features(model: Recognizer, pixels: np.ndarray) -> np.ndarray:
    """Penultimate features of each image: (N, H, W, C) uint8 -> (N, D) float32."""
    width = model.classifier.in_features
    return np.concatenate([model.features(x).cpu().numpy() for x in _batches(model, pixels)] or [np.zeros((0, width), np.float32)])


def _batches(model: Recognizer, pixels: np.ndarray) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for first in range(0, len(pixels), PREDICTION_BATCH):
        part = np.ascontiguousarray(pixels[first : first + PREDICTION_BATCH].transpose(0, 3, 1, 2))
        yield to_model(torch.from_numpy(part).to(device))


@functools.lru_cache(maxsize=64)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(count)


def _precision(section: RecognizerSection, device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if section.precision == "bf16" else contextlib.nullcontext()
