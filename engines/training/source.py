"""Stage 1: the source model, Eq. 5: the diffusion model of the rich classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from engines.data.batches import ALL, Batch, by_class, class_batch, class_probabilities
from engines.data.images import Indices
from engines.data.longtail import LongTail
from engines.diffusion.timesteps import TimestepSampler
from engines.networks.unet import UNet
from engines.recipe import Recipe
from engines.training.diffusion import diffusion_loss, draw, noised, preview, training_schedule, visible_labels
from engines.training.loop import Figures, Forward, Stage


def source_stage(recipe: Recipe, data: LongTail, unet: UNet, device: torch.device) -> Stage:
    """L_base (+ 0.001 L_vlb) over the head classes, or over all where the recipe says so."""
    settings, schedule = recipe.source, training_schedule(recipe, device)
    classes = data.classes_of("many") if settings.train_on == "head" else data.classes_of("many", "medium", "few")
    members = by_class(data.train.labels, len(data.counts))
    probabilities = class_probabilities(masked_counts(data, classes), settings.class_sampling)

    sampler = TimestepSampler(recipe.diffusion.timestep_sampler, recipe.diffusion.steps)

    def batch(step: int, rows: slice = ALL) -> Batch:
        indices = class_batch(members, probabilities, settings.batch_size, recipe.seed, step, "source")
        dropout = settings.label_dropout if unet.classes else 0.0
        return draw(data.train, indices, settings, recipe.seed, "source", step, rows, label_dropout=dropout, spread=sampler.spread)

    def loss(forward: Forward, batch: Batch) -> tuple[Tensor, Figures]:
        t, weight = sampler(batch.u)
        at = noised(schedule, batch, t)
        y = visible_labels(batch, unet.classes - 1) if unet.classes else None
        return diffusion_loss(schedule, at, forward(at.x, at.j, y), recipe.diffusion.vlb_weight, weight)

    def remember(rows: Mapping[str, Tensor], _step: int) -> None:
        sampler.update(rows["t"], rows["losses"])

    def samples(_model: nn.Module, _step: int) -> Tensor:
        return preview(unet, schedule, torch.from_numpy(classes) if unet.classes else None, recipe.seed)

    return Stage(
        "source",
        settings,
        unet,
        batch,
        loss,
        after_step=remember if sampler.kind == "loss-second-moment" else None,
        sample=samples,
        sample_every_steps=settings.sample_every_steps,
        state=sampler,
    )


def masked_counts(data: LongTail, classes: Indices) -> Indices:
    """N_k of the given classes, 0 of the others: (K,)."""
    kept = np.zeros_like(data.counts)
    kept[classes] = data.counts[classes]
    return kept
