"""Stage 3: the prototype guide, Eqs. 11-12."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engines.data.batches import ALL, Batch, by_class, class_batch, class_probabilities
from engines.data.images import Indices
from engines.data.longtail import LongTail
from engines.diffusion.losses import prototype_contrastive_loss, update_prototypes
from engines.diffusion.timesteps import TimestepSampler
from engines.networks.guide import Guide
from engines.networks.unet import UNet
from engines.recipe import Recipe
from engines.training.diffusion import architecture, draw, noised, training_schedule
from engines.training.loop import Figures, Forward, Stage

WARM_START_IMAGES = 64  # a class, for the prototype's first mean


def build_guide(recipe: Recipe, class_counts: Indices) -> Guide:
    """The recipe's guide with unit prototypes that mean nothing yet."""
    s = recipe.guide
    return Guide(architecture(recipe, s), torch.from_numpy(class_counts), s.embedding_dim, s.tau, s.class_prior)


def take_encoder(guide: Guide, unet: UNet) -> int:
    """Start a guide with a U-Net's weights, where a tensor of its encoder half has equal name and shape there.

    Returns: how many tensors were taken; what is left of the encoder, its head, keeps its own start.
    """
    halves = ("time_embed.", "input_blocks.", "middle_block.")
    theirs = {name: value for name, value in unet.state_dict().items() if name.startswith(halves)}
    ours = guide.encoder.state_dict()
    taken = {name: theirs[name] for name, value in ours.items() if name in theirs and theirs[name].shape == value.shape}
    guide.encoder.load_state_dict(taken, strict=False)
    return len(taken)


def guide_stage(recipe: Recipe, data: LongTail, guide: Guide, device: torch.device) -> Stage:
    """L_PC on noised images at every t. Logits use the prototypes of before the update, detached; then Eq. 11 moves them."""
    settings, schedule = recipe.guide, training_schedule(recipe, device)
    members = by_class(data.train.labels, len(data.counts))
    probabilities = class_probabilities(data.counts, settings.class_sampling)
    uniform = TimestepSampler("uniform", recipe.diffusion.steps)

    def batch(step: int, rows: slice = ALL) -> Batch:
        indices = class_batch(members, probabilities, settings.batch_size, recipe.seed, step, "guide")
        return draw(data.train, indices, settings, recipe.seed, "guide", step, rows)

    def loss(forward: Forward, batch: Batch) -> tuple[Tensor, Figures]:
        at = noised(schedule, batch, uniform(batch.u)[0])
        features = forward(at.x, at.j)
        l_pc = prototype_contrastive_loss(features, at.y, guide.prototypes, guide.log_prior, guide.tau).mean()
        return l_pc, {"l_pc": l_pc.detach(), "features": features.detach(), "y": at.y}

    def move_prototypes(rows: Mapping[str, Tensor], step: int) -> None:
        momentum = early_momentum(settings.prototype_momentum, step)
        guide.prototypes.copy_(update_prototypes(guide.prototypes, rows["features"], rows["y"], momentum))

    return Stage("guide", settings, guide, batch, loss, after_step=move_prototypes)


def early_momentum(momentum: float, step: int) -> float:
    """m of Eq. 11, smaller in the first steps: min(m, (1 + n) / (10 + n)).

    The features of an untrained encoder are nearly alike, and so are their class means; at m = 0.999 prototypes would keep
    that start for thousands of steps while the encoder learns to fit it. Averaging over the steps so far lets them follow.
    """
    return min(momentum, (1 + step) / (10 + step))


@torch.no_grad()
def warm_start(guide: Guide, recipe: Recipe, data: LongTail, device: torch.device) -> None:
    """Set every prototype to its class's mean feature: at m = 0.999 a class of five images would move it 0.5 % an epoch."""
    schedule, uniform = training_schedule(recipe, device), TimestepSampler("uniform", recipe.diffusion.steps)
    guide.to(device).eval()
    for k, members in enumerate(by_class(data.train.labels, len(data.counts))):
        batch = draw(data.train, members[:WARM_START_IMAGES], recipe.guide, recipe.seed, "guide/warm-start", k).to(device)
        at = noised(schedule, batch, uniform(batch.u)[0])
        mean = guide(at.x, at.j).mean(0, keepdim=True)
        guide.prototypes[k] = mean[0] / mean.norm()
