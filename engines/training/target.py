"""Stage 2: the target model, Eqs. 7-10: the source model adapted to the tail with the pair-wise diversity loss."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from engines.data.batches import ALL, Batch, by_class, class_probabilities, group_batch
from engines.data.longtail import LongTail
from engines.diffusion.losses import pair_diversity_loss
from engines.diffusion.schedule import predict_x0
from engines.diffusion.timesteps import TimestepSampler
from engines.networks.unet import UNet
from engines.recipe import Recipe
from engines.training.diffusion import diffusion_loss, draw, noised, preview, training_schedule, visible_labels
from engines.training.holdout import held_out_loss, split
from engines.training.loop import Figures, Forward, Stage
from engines.training.source import masked_counts


def target_stage(recipe: Recipe, data: LongTail, source: UNet, unet: UNet, device: torch.device) -> Stage:
    """L_base + lambda L_pair, Eq. 10.

    Args:
        source: the frozen source model; `unet` starts as its copy and is trained.
    """
    settings, schedule = recipe.target, training_schedule(recipe, device)
    m, channels = settings.group_size, recipe.data.image_channels
    classes = data.classes_of("medium", "few") if settings.adapt_on == "medium+few" else data.classes_of("many", "medium", "few")
    held = split(data.train.labels, classes, settings.holdout_fraction, recipe.seed)
    members = [np.setdiff1d(of_class, held) for of_class in by_class(data.train.labels, len(data.counts))]
    probabilities = class_probabilities(masked_counts(data, classes), settings.class_sampling)
    counts = torch.from_numpy(data.counts).to(device)
    is_tail = torch.tensor([group != "many" for group in data.groups], device=device)
    source_knows = torch.tensor([recipe.source.train_on == "all" or group == "many" for group in data.groups], device=device)
    sampler = TimestepSampler(recipe.diffusion.timestep_sampler, recipe.diffusion.steps)
    source.to(device).eval().requires_grad_(requires_grad=False)

    def batch(step: int, rows: slice = ALL) -> Batch:
        indices = group_batch(members, probabilities, settings.batch_size // m, m, recipe.seed, step, "target")
        dropout = settings.label_dropout if unet.classes else 0.0
        group_size = m if settings.shared_timestep else 1
        return draw(data.train, indices, settings, recipe.seed, "target", step, rows, group_size, dropout, sampler.spread)

    def loss(forward: Forward, batch: Batch) -> tuple[Tensor, Figures]:
        t, weight = sampler(batch.u)
        at = noised(schedule, batch, t)
        y = y_source = None
        if unet.classes:
            null = unet.classes - 1
            y = visible_labels(batch, null)
            y_source = torch.where(source_knows[batch.y], y, null)  # a label it never saw means nothing to it
        output = forward(at.x, at.j, y)
        total, figures = diffusion_loss(schedule, at, output, recipe.diffusion.vlb_weight, weight)
        if settings.lambda_pair:
            with torch.no_grad():
                eps_source = source(at.x, at.j, y_source)[:, :channels]
            l_pair, pair_figures = _pair_loss(at.x, at.j, eps_source, output[:, :channels], batch.y[::m], batch.parts)
            total, figures = total + settings.lambda_pair * l_pair, figures | pair_figures
        return total, figures

    def _pair_loss(
        x: Tensor, j: Tensor, eps_source: Tensor, eps_target: Tensor, group_class: Tensor, parts: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        groups = (-1, m, *x.shape[1:])  # of whatever t was drawn: a row of Eq. 7 has no timestep of its own to be weighted by
        kl, entropy_source, entropy_target = pair_diversity_loss(
            predict_x0(schedule, x, j, eps_source).view(groups),  # (G, M, C, H, W)
            predict_x0(schedule, x, j, eps_target).view(groups),
            counts[group_class],
            settings.gamma,
            settings.pair_direction,
            settings.pair_temperature,
        )
        tail = is_tail[group_class].float()  # Eq. 9: k is not a head class
        total = (kl * tail).sum()
        # The step's loss is the mean over the parts of its batch: a part's sum counts as often as there are parts.
        total = total / len(x) if settings.pair_reduction == "batch_mean" else total * parts
        figures = {"l_pair": total.detach(), "entropy_source": entropy_source.mean(), "entropy_target": entropy_target.mean()}
        return total, figures

    def remember(rows: Mapping[str, Tensor], _step: int) -> None:
        sampler.update(rows["t"], rows["losses"])

    def samples(_model: nn.Module, _step: int) -> Tensor:
        return preview(unet, schedule, torch.from_numpy(classes) if unet.classes else None, recipe.seed)

    def held_out(model: nn.Module) -> Mapping[str, float]:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            return held_out_loss(model, data.train, held, data.groups, schedule, recipe.seed, conditional=bool(unet.classes))

    return Stage(
        "target",
        settings,
        unet,
        batch,
        loss,
        after_step=remember if sampler.kind == "loss-second-moment" else None,
        sample=samples,
        sample_every_steps=settings.sample_every_steps,
        held_out=held_out if len(held) else None,
        held_out_every_steps=settings.holdout_every_steps,
        patience=settings.patience,
        state=sampler,
    )
