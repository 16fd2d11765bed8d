"""Held-out images of the adaptation and their denoising loss: the judge that sees when the tail is being learned by heart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from engines.data.batches import generator, to_tensor
from engines.data.images import ImageSet, Indices
from engines.diffusion.losses import base_loss
from engines.diffusion.schedule import Schedule, q_sample

KEPT_IMAGES = 3  # of a class, at least: a row of Eq. 7 compares an image with two others, and a noised copy of itself is no other
DRAWS = 8  # noise levels of an image, one in each eighth of t
IMAGES_A_GROUP = 512  # at most, evenly spaced among the held-out ones: an evaluation costs some dozen training steps, not hundreds


def split(labels: Indices, classes: Indices, fraction: float, seed: int) -> Indices:
    """Held-out images: of each class round(fraction N_k), halves up, at least 1, but never one of the last 3.

    A class of three images or fewer gives none. Which ones depends on (seed, class) and on the class's own images alone.

    Args:
        labels: (N,) of the training set.
        classes: from which to hold out; those that the stage adapts.
        fraction: 0..1; 0 = hold out nothing.

    Returns: indices into `labels`, int64, ascending.
    """
    if not fraction:
        return np.zeros(0, dtype=np.int64)
    held = []
    for k in classes.tolist():
        members = np.flatnonzero(labels == k)
        wanted = max(1, math.floor(fraction * len(members) + 0.5))
        count = max(0, min(wanted, len(members) - KEPT_IMAGES))
        held.append(generator(seed, "held-out", k).permutation(members)[:count])
    return np.sort(np.concatenate(held)).astype(np.int64) if held else np.zeros(0, dtype=np.int64)


@torch.no_grad()
def held_out_loss(
    unet: nn.Module,
    images: ImageSet,
    indices: Indices,
    groups: Sequence[str],
    schedule: Schedule,
    seed: int,
    conditional: bool,
    batch_size: int = 64,
) -> dict[str, float]:
    """L_base, Eq. 3, of images that were not trained on, without augmentation; by group of classes.

    Every image comes at 8 noise levels, one drawn in each eighth of t. Levels and noise are pure functions of (seed, image):
    they are the same at every evaluation, so that two figures differ by the network alone, and by far less than two draws of
    the noise would. The caller chooses the autocast.

    Args:
        indices: of the held-out images in `images`.
        groups: (K) "many" | "medium" | "few" of each class.
        conditional: give the network each image's label.
        batch_size: noised images the network sees at once.

    Returns: "held_out", the mean over the tail groups that have held-out images, each counted once however few its images
        are (over all groups where the tail has none), and "held_out_<group>" of each. Empty where nothing is held out.
    """
    group_of = np.array(groups)[images.labels[indices]]
    chosen = {
        group: _spread(indices[group_of == group], IMAGES_A_GROUP) for group in ("many", "medium", "few") if (group_of == group).any()
    }
    was_training = unet.training
    unet.eval()
    losses = {group: float(_losses(unet, images, part, schedule, seed, conditional, batch_size).mean()) for group, part in chosen.items()}
    unet.train(was_training)
    judges = [value for group, value in losses.items() if group != "many"] or list(losses.values())
    if not judges:
        return {}
    return {"held_out": math.fsum(judges) / len(judges)} | {f"held_out_{group}": value for group, value in losses.items()}


def _losses(
    unet: nn.Module, images: ImageSet, indices: Indices, schedule: Schedule, seed: int, conditional: bool, batch_size: int
) -> Tensor:
    """(n,) float64: the mean of each image over its noise levels."""
    device = schedule.betas.device
    sums = []
    at_once = max(1, batch_size // DRAWS)
    for start in range(0, len(indices), at_once):
        part = indices[start : start + at_once]
        x0 = to_tensor(images.pixels(part)).repeat_interleave(DRAWS, dim=0).to(device)  # (b * DRAWS, C, H, W)
        drawn = [noise_levels(len(schedule), seed, image, tuple(x0.shape[1:])) for image in part.tolist()]
        j = torch.cat([levels for levels, _ in drawn]).to(device)
        noise = torch.cat([z for _, z in drawn]).to(device)
        x = q_sample(schedule, x0, j, noise)
        t = schedule.timesteps[j]
        if conditional:
            output = unet(x, t, torch.from_numpy(images.labels[part]).repeat_interleave(DRAWS).to(device))
        else:
            output = unet(x, t)
        sums.append(base_loss(noise, output[:, : x0.shape[1]]).double().view(-1, DRAWS).mean(1))
    return torch.cat(sums).cpu()


def noise_levels(steps: int, seed: int, image: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The noise levels at which an image is judged: positions (8,) int64, one in each eighth of 0..steps-1, and noise (8, C, H, W)."""
    rng = generator(seed, "held-out/noise", image)
    u = (np.arange(DRAWS) + rng.random(DRAWS)) / DRAWS  # stratified: [0, 1)
    noise = rng.standard_normal((DRAWS, *shape), dtype=np.float32)
    return torch.from_numpy(np.minimum((u * steps).astype(np.int64), steps - 1)), torch.from_numpy(noise)


def _spread(indices: Indices, most: int) -> Indices:
    """At most `most` of them, evenly spaced."""
    return indices if len(indices) <= most else indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]
