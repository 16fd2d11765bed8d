"""What the diffusion stages share: building the U-Net, drawing a noised batch, L_base with its variational term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engines.data.augment import drawn_flips, drawn_offsets, mirror, move
from engines.data.batches import ALL, Batch, channels_first, torch_generator
from engines.data.images import ImageSet, Indices
from engines.diffusion.losses import base_loss, variational_loss
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import sample
from engines.diffusion.schedule import Schedule, make_schedule, q_sample, respace
from engines.networks.unet import Architecture, UNet
from engines.recipe import GuideSection, Recipe, StageSection, UNetSection

PREVIEW_STEPS = 25  # of the DDIM sampler behind the sample grids
PREVIEW_IMAGES = 64
PREVIEW_AT_ONCE = 16  # of them: the grid needs no more memory than training, be the images 256 px


def architecture(recipe: Recipe, section: UNetSection | GuideSection) -> Architecture:
    """The network that a recipe section describes; `Recipe` has refused sections that describe none."""
    shape = Architecture(
        image_size_px=recipe.data.image_size_px,
        in_channels=recipe.data.image_channels,
        model_channels=section.model_channels,
        channel_mult=section.channel_mult,
        num_res_blocks=section.num_res_blocks,
        attention_resolutions=section.attention_resolutions,
        num_head_channels=section.num_head_channels,
        dropout=section.dropout,
    )
    if isinstance(section, GuideSection):
        return shape
    return replace(
        shape,
        resblock_updown=section.resblock_updown,
        use_scale_shift_norm=section.use_scale_shift_norm,
        use_new_attention_order=section.use_new_attention_order,
        num_heads=section.num_heads,
        conv_resample=section.conv_resample,
    )


def build_unet(recipe: Recipe, classes: int) -> UNet:
    """The recipe's U-Net for K classes; a conditional one has a null label, row K."""
    out_channels = recipe.data.image_channels * (2 if recipe.unet.learn_sigma else 1)
    return UNet(architecture(recipe, recipe.unet), out_channels, classes + 1 if recipe.unet.class_cond else 0)


def training_schedule(recipe: Recipe, device: torch.device) -> Schedule:
    """All T steps of the recipe's forward process."""
    return make_schedule(recipe.diffusion.noise_schedule, recipe.diffusion.steps).to(device)


@dataclass(frozen=True)
class NoisedBatch:
    """A batch at its noise levels: everything that a loss of METHOD's sections 1-3 needs, on one device."""

    x0: Tensor  # (B, C, H, W)
    y: Tensor  # (B,)
    j: Tensor  # (B,) positions of the training schedule, which are its timesteps
    noise: Tensor  # (B, C, H, W)
    x: Tensor  # (B, C, H, W) x_t, Eq. 2


def draw(
    images: ImageSet,
    indices: Indices,
    settings: StageSection,
    seed: int,
    stage: str,
    step: int,
    rows: slice = ALL,
    group_size: int = 1,
    label_dropout: float = 0.0,
    spread: Callable[[Tensor], Tensor] = lambda u: u,
) -> Batch:
    """Augment a batch and draw its noise; every draw is named by (seed, stage, step).

    Args:
        indices: (B,) of the whole global batch.
        rows: of it that are wanted; only their images are read, the draws are those of the whole batch.
        group_size: > 1: one u, and so one t, for each run of that many images.
        label_dropout: share of labels hidden from a conditional network (classifier-free guidance).
        spread: what a timestep sampler makes of the u of a whole batch.
    """
    generator, count = torch_generator(seed, f"{stage}/draw", step), len(indices)
    pixels = channels_first(images.pixels(indices[rows]))
    if settings.horizontal_flip:
        pixels = mirror(pixels, drawn_flips(count, generator)[rows])
    if settings.shift_px:
        pixels = move(pixels, drawn_offsets(count, settings.shift_px, generator)[:, rows])
    u = spread(torch.rand(count // group_size, generator=generator)).repeat_interleave(group_size)
    noise = torch.randn((count, *pixels.shape[1:]), generator=generator)
    unlabeled = torch.rand(count, generator=torch_generator(seed, f"{stage}/labels", step)).lt(label_dropout)
    y = torch.from_numpy(images.labels[indices[rows]])
    return Batch(pixels, y, u[rows], noise[rows], unlabeled[rows], parts=count // len(y))


def noised(schedule: Schedule, batch: Batch, t: Tensor) -> NoisedBatch:
    """A batch at timesteps t (B,), Eq. 2."""
    x0 = batch.x0
    return NoisedBatch(x0, batch.y, t, batch.noise, q_sample(schedule, x0, t, batch.noise))


def visible_labels(batch: Batch, null: int) -> Tensor:
    """(B,) labels, the hidden ones replaced by the null label."""
    return torch.where(batch.unlabeled, null, batch.y)


def diffusion_loss(
    schedule: Schedule, batch: NoisedBatch, output: Tensor, vlb_weight: float, weight: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_base + vlb_weight * L_vlb of a batch; L_vlb is estimated from one term each, so it counts T times (METHOD section 1).

    Args:
        weight: (B,) of a timestep sampler, 1 / (T p(t)): with it the mean is an estimate over all t, whatever t were drawn.

    Returns: a scalar; figures, among them "losses" (B,) without the weight and "t" (B,), from which a sampler learns.
    """
    channels = batch.x0.shape[1]
    eps = output[:, :channels].float()
    weight = torch.ones_like(batch.j, dtype=torch.float32) if weight is None else weight
    losses = base_loss(batch.noise, eps)  # (B,)
    figures = {"l_base": (weight * losses).mean().detach(), "t": batch.j}
    if output.shape[1] > channels:
        l_vlb = variational_loss(schedule, batch.x0, batch.x, batch.j, eps, output[:, channels:].float()) * len(schedule)
        losses = losses + vlb_weight * l_vlb
        figures["l_vlb"] = (weight * l_vlb).mean().detach()
    return (weight * losses).mean(), figures | {"losses": losses.detach()}


def preview(unet: UNet, schedule: Schedule, labels: Tensor | None, seed: int) -> Tensor:
    """(64, C, H, W) unguided DDIM samples for a grid, with the same noise every time, so that grids can be compared."""
    a = unet.architecture
    shape = (a.in_channels, a.image_size_px, a.image_size_px)
    device = schedule.betas.device
    noise = batch_noise([image_key(seed, -1, i) for i in range(PREVIEW_IMAGES)], 0, shape).to(device)
    y = labels.to(device).repeat(-(-PREVIEW_IMAGES // len(labels)))[:PREVIEW_IMAGES].sort().values if labels is not None else None
    spaced = respace(schedule, min(PREVIEW_STEPS, len(schedule)))

    def some(rows: slice) -> Tensor:
        labels_of_rows = None if y is None else y[rows]
        return sample(lambda x, t: unet(x, t, labels_of_rows), spaced, lambda _: noise[rows], sampler="ddim")

    with torch.no_grad():
        return torch.cat([some(slice(i, i + PREVIEW_AT_ONCE)) for i in range(0, PREVIEW_IMAGES, PREVIEW_AT_ONCE)])
