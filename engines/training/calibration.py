"""How right and how sure the guide is at every noise level: where on t its guidance can be trusted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engines.data.batches import by_class, to_tensor, torch_generator
from engines.data.images import ImageSet
from engines.diffusion.schedule import Schedule, q_sample
from engines.networks.guide import Guide

NOISE_LEVELS = 11  # at which accuracy is reported
ACCURACY_IMAGES = 500  # for it, spread evenly over the classes


@torch.no_grad()
def by_noise(guide: Guide, images: ImageSet, schedule: Schedule, seed: int, batch_size: int = 256) -> dict[str, Any]:
    """Class-balanced accuracy of the guide on noised images: where on t its guidance can be trusted.

    Of a large set the first images of each class are taken, about 500 in all.

    Returns: {"t": [...], "accuracy": [...], "confidence": [...]} at evenly spaced timesteps; values in 0..1.
    """
    guide.eval()
    device = schedule.betas.device
    share = max(1, ACCURACY_IMAGES // len(images.names))
    images = images.subset(np.concatenate([members[:share] for members in by_class(images.labels, len(images.names))]))
    levels = [round(i * (len(schedule) - 1) / (NOISE_LEVELS - 1)) for i in range(NOISE_LEVELS)]
    table: dict[str, Any] = {"images": len(images), "t": levels, "accuracy": [], "confidence": []}
    for t in levels:
        right, confidence = [], []
        for start in range(0, len(images), batch_size):
            rows = np.arange(start, min(start + batch_size, len(images)))
            x0 = to_tensor(images.pixels(rows))
            noise = torch.randn(x0.shape, generator=torch_generator(seed, "guide/accuracy", t, start))
            j = torch.full((len(rows),), t, device=device)
            log_probs = guide.log_probs(q_sample(schedule, x0.to(device), j, noise.to(device)), j)
            right.append((log_probs.argmax(1).cpu().numpy() == images.labels[rows]).astype(np.float64))
            confidence.append(log_probs.exp().amax(1).cpu().numpy().astype(np.float64))
        by_image = np.concatenate(right)
        table["accuracy"].append(round(float(np.mean([by_image[images.labels == k].mean() for k in np.unique(images.labels)])), 4))
        table["confidence"].append(round(float(np.concatenate(confidence).mean()), 4))
    return table
