"""Recognizers: the networks that say whether synthesis helps, trained in eleven ways of the long-tailed literature (METHOD section 5).

Every way trains the same network on the same batches: what is random is a pure function of (seed, step). A first stage sees epochs over
the union of real and extra images, as over one concatenated folder; some ways mend the classifier in a second one. The formulas
are in `rebalance`, `mixing` and `second_stage`, the loop in `descent`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engines.data.batches import drawn_ahead
from engines.data.policies import augment_batch, through_pillow
from engines.networks.resnet import ARCHITECTURES, NormalizedLinear, Recognizer
from engines.progress import Report, silent
from engines.recipe import METHODS as METHODS
from engines.recipe import Method as Method
from engines.recipe import RecognizerSection
from engines.training import holdout
from engines.training.descent import Batches, Stage, descend
from engines.training.mixing import draw_mixture, remix_shares
from engines.training.rebalance import (
    Rebalancing,
    class_counts,
    margin_offsets,
    rebalancing,
    smoothed_targets,
    soft_cross_entropy,
    weighted_cross_entropy,
)
from engines.training.second_stage import ScaledLinear, balanced_indices, best_tau, fresh_classifier, tau_normalized

MIXED: tuple[Method, ...] = ("mixup", "remix", "mislas")  # first stage on pairs of images
TWO_STAGES: tuple[Method, ...] = ("crt", "lws", "mislas")  # a second one on a frozen backbone
PREDICTION_BATCH = 512
_ORDER, _MIXING, _BALANCED = 0, 2, 3  # streams of random numbers under a seed; augmentation has its own


@dataclass(frozen=True)
class TrainingImages:
    """What a recognizer is trained on, in memory. Make one with `real_images`, then `add` to it."""

    pixels: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    weights: Tensor  # (N,) float32, loss weight of each image
    is_extra: Tensor  # (N,) bool: synthetic, or a control in a synthetic image's place; not counted in pi_real

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> TrainingImages:
        """Some of them: index (M,) below N."""
        at = torch.from_numpy(index)
        return TrainingImages(self.pixels[at], self.labels[at], self.weights[at], self.is_extra[at])

    def class_counts(self, classes: int) -> tuple[Tensor, Tensor]:
        """Images a class, each counted by its weight, (K,) float32 each: the real ones, and all together."""
        real = torch.where(self.is_extra, 0.0, self.weights)
        return class_counts(self.labels, real, classes), class_counts(self.labels, self.weights, classes)

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
    method: Method,
    seed: int,
    device: torch.device | None = None,
    report: Report = silent,
    checkpoint: Path | None = None,
) -> Recognizer:
    """Train one recognizer from scratch; the same arguments give the same weights on the same machine.

    What a method does with extra images is said at `rebalancing` (its tables), `draw_mixture` (pairs), `second_stage` (draws).
    Tau-normalization holds out real images alone to choose tau, and trains on the rest and on all extra ones.

    Args:
        images: at least one image of weight above 0 that is not extra.
        classes: K.
        seed: of the weights, the order of the images and their augmentation; one number for all methods and image sets, so
            that two recognizers can be compared pair by pair.
        report: hears "recognizer" after every step, with the loss every 50.
        checkpoint: a file of `descend`, of the same arguments: training goes on from there, and on a CPU ends bit-equal. It is
            left when the training is done; `section.save_every_steps` = 0 writes none.

    Returns: the network, in evaluation mode; its `classifier` gives the logits that the method trained (LDAM's are scaled cosines).
    Raises: NumericsError where the loss is no longer finite, DataError for a checkpoint that does not fit, StorageError.
    """
    assert bool(images.is_extra.logical_not().any()), "a recognizer needs real images"
    device = device or torch.device("cpu")
    held = _held_out(images, classes, section, seed) if method == "tau_norm" else np.zeros(0, np.int64)
    trained = images.subset(np.setdiff1d(np.arange(len(images)), held)) if len(held) else images

    model = ARCHITECTURES[section.architecture](images.pixels.shape[1], classes, torch.Generator().manual_seed(seed))
    if method == "ldam_drw":
        model.classifier = NormalizedLinear(model.classifier, section.ldam_scale)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stages = [first_stage(model, trained, classes, section, method, seed, device)]
    if method in TWO_STAGES:
        stages.append(second_stage(model, trained, classes, section, method, seed, device))
    descend(model, stages, section, checkpoint, report)

    model.eval()
    if isinstance(model.classifier, ScaledLinear):
        model.classifier = model.classifier.folded()
    if method == "tau_norm":
        model.classifier = tau_normalized(model.classifier, _chosen_tau(model, images.subset(held)))
    return model


def unread_keys(section: RecognizerSection, method: Method, with_extra: bool) -> set[str]:
    """Keys of [recognizer] that change no weight of this training: those of other methods, of what is switched off, of speed."""
    unread = {"seeds", "methods", "workers", "save_every_steps"}
    read_by: dict[str, tuple[Method, ...]] = {"mixup": MIXED, "second_stage": TWO_STAGES}
    for name in ("logit_adjustment", "class_balanced", "ldam", "mixup", "remix", "second_stage", "tau_norm", "mislas"):
        if not (method in read_by[name] if name in read_by else method.startswith(name)):
            unread |= {key for key in RecognizerSection.model_fields if key.startswith(f"{name}_")}
    if not with_extra:
        unread |= {"synthetic_prior", "real_only_fraction"}
    elif method in ("cross_entropy", "mixup", "crt", "lws", "tau_norm"):
        unread |= {"synthetic_prior"}
    off: dict[str, tuple[object, tuple[str, ...]]] = {  # by key: its value that does nothing, and what is read only with another
        "crop": ("pad", ("crop_min_area",)),
        "color_jitter": (0.0, ()),
        "policy": ("none", ()),
        "cutout_px": (0, ("cutout_holes",)),
    }
    for key, (value, others) in off.items():
        if getattr(section, key) == value:
            unread |= {key, *others}
    return unread if section.policy == "randaugment" else unread | {"randaugment_ops", "randaugment_magnitude"}


def first_stage(
    model: Recognizer, images: TrainingImages, classes: int, section: RecognizerSection, method: Method, seed: int, device: torch.device
) -> Stage:
    """All weights, on epochs over all images and at last on real ones alone, with the method's priors, weights, margins or pairs."""
    real = images.is_extra.logical_not().nonzero().flatten().numpy()  # (N_real,)
    everything = np.arange(len(images))
    real_only_from = round(section.train_steps * (1.0 - section.real_only_fraction))
    late_from = round(section.train_steps * section.ldam_drw_from)
    labels, weights, is_extra = images.labels.to(device), images.weights.to(device), images.is_extra.to(device)

    @functools.cache
    def tables(on_real: bool, late: bool) -> Rebalancing:
        own_law = on_real or section.synthetic_prior
        return rebalancing(*images.class_counts(classes), section, method, own_law, late).to(device)

    def begin() -> dict[str, float]:
        model.train()
        return dict.fromkeys(dict(model.named_parameters()), 1.0)

    def indices(step: int) -> np.ndarray:
        return batch_indices(real if step >= real_only_from else everything, section.batch_size, seed, step)

    def loss(step: int, index: Tensor, pixels: Tensor) -> Tensor:
        table = tables(step >= real_only_from, step >= late_from)
        x, y, w, source = to_model(pixels), labels[index], weights[index], is_extra[index].long()
        if method in MIXED:
            mixture = draw_mixture(is_extra[index], section.mixup_alpha, np.random.default_rng([seed, _MIXING, step]))
            j = mixture.partner
            counts = table.counts[source, y]  # (B,); a partner is of the same source
            kappa = section.remix_kappa if method == "remix" else np.inf
            share = remix_shares(mixture.share, counts, counts[j], kappa, section.remix_tau)
            z = _logits(model, mixture.images(x).contiguous(memory_format=torch.channels_last), section)
            shared = torch.cat([share * w, (1.0 - share) * w[j]])  # (2 B,): each mixed image once under either label
            return weighted_cross_entropy(torch.cat([z, z]), torch.cat([y, y[j]]), shared, z.new_zeros(()))
        prior = table.log_prior[source]  # (B, K)
        if method == "ldam_drw":
            prior = prior + margin_offsets(y, table.margin[source, y], section.ldam_scale, classes)
        return weighted_cross_entropy(_logits(model, x, section), y, w * table.class_weight[source, y], prior)

    def batches(first: int) -> Batches:
        return augmented_batches(images.pixels, indices, section, seed, (first, section.train_steps), device)

    return Stage(section.train_steps, begin, functools.partial(learning_rate, section), batches, loss)


def second_stage(
    model: Recognizer, images: TrainingImages, classes: int, section: RecognizerSection, method: Method, seed: int, device: torch.device
) -> Stage:
    """The classifier alone, on class-balanced draws: a fresh one (cRT), scales of the old one (LWS), or old one and scales (MiSLAS).

    The backbone stays bit-equal, as in evaluation, but for the running means and variances that MiSLAS may shift. Extra images fill
    up their classes: one is drawn as often as its weight says, beside 1 of a real image. Where the first stage ends on real images
    alone (`real_only_fraction` above 0), the second, which comes after that, sees no others.
    """
    steps, after = max(1, round(section.second_stage_fraction * section.train_steps)), section.train_steps
    members = np.arange(len(images)) if not section.real_only_fraction else images.is_extra.logical_not().nonzero().flatten().numpy()
    drawn_labels, drawn_weights = images.labels.numpy()[members], images.weights.numpy()[members]
    labels, source = images.labels.to(device), images.is_extra.to(device).long()
    smoothing = rebalancing(*images.class_counts(classes), section, method, section.synthetic_prior, True).smoothing.to(device)  # (2, K)
    shifts = method == "mislas" and section.mislas_shift_batch_norm

    def begin() -> dict[str, float]:
        model.eval()
        for module in model.modules():
            module.training = shifts and isinstance(module, nn.BatchNorm2d)
        if method == "crt":
            model.classifier = fresh_classifier(model.classifier, torch.Generator().manual_seed(seed)).to(device)
            return {"classifier.weight": 1.0, "classifier.bias": 1.0}
        model.classifier = ScaledLinear(model.classifier).to(device)
        slower = {"classifier.weight": section.mislas_classifier_lr, "classifier.bias": section.mislas_classifier_lr}
        return {"classifier.scale": 1.0, **(slower if method == "mislas" else {})}

    def indices(step: int) -> np.ndarray:
        random = np.random.default_rng([seed, _BALANCED, step])
        return members[balanced_indices(drawn_labels, drawn_weights, section.batch_size, random)]

    def loss(step: int, index: Tensor, pixels: Tensor) -> Tensor:
        with torch.no_grad(), _precision(section, pixels.device):
            f = model.features(to_model(pixels))
        z, y = model.classifier(f.float()), labels[index]
        return soft_cross_entropy(z, smoothed_targets(y, smoothing[source[index], y], classes))

    def batches(first: int) -> Batches:
        return augmented_batches(images.pixels, indices, section, seed, (after + first, after + steps), device)

    def rate(step: int) -> float:
        return float(section.lr * 0.5 * (1.0 + np.cos(np.pi * step / steps)))

    return Stage(steps, begin, rate, batches, loss)


def _held_out(images: TrainingImages, classes: int, section: RecognizerSection, seed: int) -> np.ndarray:
    """Real training images that choose tau: `tau_norm_holdout` of each class, but never one of a class's last three, nor extra ones."""
    real = images.is_extra.logical_not().nonzero().flatten().numpy()
    held: np.ndarray = real[holdout.split(images.labels.numpy()[real], np.arange(classes), section.tau_norm_holdout, seed)]
    return held


def _chosen_tau(model: Recognizer, held: TrainingImages) -> float:
    device = model.classifier.weight.device
    f = torch.from_numpy(features(model, held.pixels.permute(0, 2, 3, 1).numpy()))
    return best_tau(model.classifier, f.to(device), held.labels.to(device))


def _logits(model: Recognizer, x: Tensor, section: RecognizerSection) -> Tensor:
    with _precision(section, x.device):
        logits: Tensor = model(x)
    return logits.float()


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
