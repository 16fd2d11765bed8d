"""What the diffusion stages share: building the U-Net, drawing a noised batch, L_base with its variational term."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engines.data.augment import flip, shift
from engines.data.batches import to_tensor, torch_generator
from engines.data.images import ImageSet, Indices
from engines.diffusion.losses import base_loss, variational_loss
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import sample
from engines.diffusion.schedule import Schedule, make_schedule, q_sample, respace
from engines.networks.unet import Architecture, UNet
from engines.recipe import GuideSection, Recipe, StageSection, UNetSection

PREVIEW_STEPS = 25  # of the DDIM sampler behind the sample grids
PREVIEW_IMAGES = 64


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
    """A batch at its noise levels: everything that a loss of METHOD's sections 1-3 needs."""

    x0: Tensor  # (B, C, H, W)
    y: Tensor  # (B,)
    j: Tensor  # (B,) positions of the training schedule, which are its timesteps
    noise: Tensor  # (B, C, H, W)
    x: Tensor  # (B, C, H, W) x_t, Eq. 2


def draw(
    images: ImageSet, indices: Indices, settings: StageSection, schedule: Schedule, seed: int, stage: str, step: int, group_size: int = 1
) -> NoisedBatch:
    """Augment and noise a batch; every draw is named by (seed, stage, step). group_size > 1: one t for each run of that many."""
    generator = torch_generator(seed, f"{stage}/draw", step)
    x0 = to_tensor(images.pixels(indices))
    if settings.horizontal_flip:
        x0 = flip(x0, generator)
    if settings.shift_px:
        x0 = shift(x0, settings.shift_px, generator)
    j = torch.randint(len(schedule), (len(x0) // group_size,), generator=generator).repeat_interleave(group_size)
    noise = torch.randn(x0.shape, generator=generator)
    device = schedule.betas.device
    x0, j, noise = x0.to(device), j.to(device), noise.to(device)
    y = torch.from_numpy(images.labels[indices]).to(device)
    return NoisedBatch(x0, y, j, noise, q_sample(schedule, x0, j, noise))


def dropped_labels(y: Tensor, share: float, null: int, seed: int, stage: str, step: int) -> Tensor:
    """Labels with each one replaced by the null label with probability `share` (classifier-free guidance)."""
    drop = torch.rand(len(y), generator=torch_generator(seed, f"{stage}/labels", step)).lt(share).to(y.device)
    return torch.where(drop, torch.full_like(y, null), y)


def diffusion_loss(schedule: Schedule, batch: NoisedBatch, output: Tensor, vlb_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """L_base + vlb_weight * L_vlb of a batch; L_vlb is estimated from one term each, so it counts T times (METHOD section 1)."""
    channels = batch.x0.shape[1]
    eps = output[:, :channels].float()
    l_base = base_loss(batch.noise, eps).mean()
    if output.shape[1] == channels:
        return l_base, {"l_base": l_base.detach()}
    l_vlb = variational_loss(schedule, batch.x0, batch.x, batch.j, eps, output[:, channels:].float()).mean() * len(schedule)
    return l_base + vlb_weight * l_vlb, {"l_base": l_base.detach(), "l_vlb": l_vlb.detach()}


def preview(unet: UNet, schedule: Schedule, labels: Tensor | None, seed: int) -> Tensor:
    """(64, C, H, W) unguided DDIM samples for a grid, with the same noise every time, so that grids can be compared."""
    a = unet.architecture
    shape = (a.in_channels, a.image_size_px, a.image_size_px)
    device = schedule.betas.device
    noise = batch_noise([image_key(seed, -1, i) for i in range(PREVIEW_IMAGES)], 0, shape).to(device)
    y = labels.to(device).repeat(-(-PREVIEW_IMAGES // len(labels)))[:PREVIEW_IMAGES].sort().values if labels is not None else None
    with torch.no_grad():
        return sample(lambda x, t: unet(x, t, y), respace(schedule, min(PREVIEW_STEPS, len(schedule))), lambda _: noise, sampler="ddim")
