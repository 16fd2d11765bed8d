"""Stage 1: the source model, Eq. 5: the diffusion model of the rich classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from engines.data.batches import by_class, class_batch, class_probabilities
from engines.data.images import Indices
from engines.data.longtail import LongTail
from engines.networks.unet import UNet
from engines.recipe import Recipe
from engines.training.diffusion import diffusion_loss, draw, dropped_labels, preview, training_schedule
from engines.training.loop import Figures, Stage


def source_stage(recipe: Recipe, data: LongTail, unet: UNet, device: torch.device) -> Stage:
    """L_base (+ 0.001 L_vlb) over the head classes, or over all where the recipe says so."""
    settings, schedule = recipe.source, training_schedule(recipe, device)
    classes = data.classes_of("many") if settings.train_on == "head" else data.classes_of("many", "medium", "few")
    members = by_class(data.train.labels, len(data.counts))
    probabilities = class_probabilities(masked_counts(data, classes), settings.class_sampling)

    def loss(step: int) -> tuple[Tensor, Figures]:
        indices = class_batch(members, probabilities, settings.batch_size, recipe.seed, step, "source")
        batch = draw(data.train, indices, settings, schedule, recipe.seed, "source", step)
        y = dropped_labels(batch.y, settings.label_dropout, unet.classes - 1, recipe.seed, "source", step) if unet.classes else None
        return diffusion_loss(schedule, batch, unet(batch.x, batch.j, y), recipe.diffusion.vlb_weight)

    def samples(_model: nn.Module, _step: int) -> Tensor:
        return preview(unet, schedule, torch.from_numpy(classes) if unet.classes else None, recipe.seed)

    return Stage("source", settings, unet, loss, sample=samples)


def masked_counts(data: LongTail, classes: Indices) -> Indices:
    """N_k of the given classes, 0 of the others: (K,)."""
    kept = np.zeros_like(data.counts)
    kept[classes] = data.counts[classes]
    return kept
