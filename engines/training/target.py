"""Stage 2: the target model, Eqs. 7-10: the source model adapted to the tail with the pair-wise diversity loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engines.data.batches import by_class, class_probabilities, group_batch
from engines.data.longtail import LongTail
from engines.diffusion.losses import pair_diversity_loss
from engines.diffusion.schedule import predict_x0
from engines.networks.unet import UNet
from engines.recipe import Recipe
from engines.training.diffusion import diffusion_loss, draw, dropped_labels, preview, training_schedule
from engines.training.loop import Figures, Stage
from engines.training.source import masked_counts


def target_stage(recipe: Recipe, data: LongTail, source: UNet, unet: UNet, device: torch.device) -> Stage:
    """L_base + lambda L_pair, Eq. 10.

    Args:
        source: the frozen source model; `unet` starts as its copy and is trained.
    """
    settings, schedule = recipe.target, training_schedule(recipe, device)
    m, channels = settings.group_size, recipe.data.image_channels
    classes = data.classes_of("medium", "few") if settings.adapt_on == "medium+few" else data.classes_of("many", "medium", "few")
    members = by_class(data.train.labels, len(data.counts))
    probabilities = class_probabilities(masked_counts(data, classes), settings.class_sampling)
    counts = torch.from_numpy(data.counts).to(device)
    is_tail = torch.tensor([group != "many" for group in data.groups], device=device)
    source_knows = torch.tensor([recipe.source.train_on == "all" or group == "many" for group in data.groups], device=device)
    source.to(device).eval().requires_grad_(requires_grad=False)

    def loss(step: int) -> tuple[Tensor, Figures]:
        indices = group_batch(members, probabilities, settings.batch_size // m, m, recipe.seed, step, "target")
        batch = draw(data.train, indices, settings, schedule, recipe.seed, "target", step, m if settings.shared_timestep else 1)
        y = y_source = None
        if unet.classes:
            null = unet.classes - 1
            y = dropped_labels(batch.y, settings.label_dropout, null, recipe.seed, "target", step)
            y_source = torch.where(source_knows[batch.y], y, torch.full_like(y, null))  # a label it never saw means nothing to it
        output = unet(batch.x, batch.j, y)
        total, figures = diffusion_loss(schedule, batch, output, recipe.diffusion.vlb_weight)
        if settings.lambda_pair:
            with torch.no_grad():
                eps_source = source(batch.x, batch.j, y_source)[:, :channels]
            l_pair, pair_figures = _pair_loss(batch.x, batch.j, eps_source, output[:, :channels], batch.y[::m])
            total, figures = total + settings.lambda_pair * l_pair, figures | pair_figures
        return total, figures

    def _pair_loss(x: Tensor, j: Tensor, eps_source: Tensor, eps_target: Tensor, group_class: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        groups = (-1, m, *x.shape[1:])
        kl, entropy_source, entropy_target = pair_diversity_loss(
            predict_x0(schedule, x, j, eps_source).view(groups),  # (G, M, C, H, W)
            predict_x0(schedule, x, j, eps_target).view(groups),
            counts[group_class],
            settings.gamma,
            settings.pair_direction,
            settings.pair_temperature,
        )
        tail = is_tail[group_class].float()  # Eq. 9: k is not a head class
        total = (kl * tail).sum() / (len(x) if settings.pair_reduction == "batch_mean" else 1)
        figures = {"l_pair": total.detach(), "entropy_source": entropy_source.mean(), "entropy_target": entropy_target.mean()}
        return total, figures

    def samples(_model: nn.Module, _step: int) -> Tensor:
        return preview(unet, schedule, torch.from_numpy(classes) if unet.classes else None, recipe.seed)

    return Stage("target", settings, unet, loss, sample=samples)
