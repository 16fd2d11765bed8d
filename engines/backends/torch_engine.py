"""The reference engine: a U-Net evaluated by torch, eagerly, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.backends.base import EngineCard, check_input, package_versions, weights_sha256
from engines.networks.unet import UNet


class TorchEngine:
    """See `Engine`.

    Args:
        unet: in evaluation mode and float32, on any device.
        timesteps: T of its training.
        max_batch: the largest batch a caller may ask for.
    """

    def __init__(self, unet: UNet, timesteps: int, max_batch: int, recipe_sha256: str = "") -> None:
        assert not unet.training, "dropout would make the numbers random"
        self.unet = unet
        self._card = torch_card(unet, timesteps, max_batch, recipe_sha256)
        self._device = next(unet.parameters()).device

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self._card

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Engine.__call__`."""
        check_input(self._card, x, t, y)
        device = self._device
        out: Tensor = self.unet(x.to(device), t.to(device), None if y is None else y.to(device))
        return out.to(x.device)


def torch_card(unet: UNet, timesteps: int, max_batch: int, recipe_sha256: str = "") -> EngineCard:
    """The card of a network that needs no file: it is its own reference."""
    return EngineCard(
        kind="torch",
        precision="fp32",
        recipe_sha256=recipe_sha256,
        weights_sha256=weights_sha256(unet),
        file_sha256="",
        image_size_px=unet.architecture.image_size_px,
        image_channels=unet.architecture.in_channels,
        out_channels=out_channels(unet),
        classes=unet.classes,
        timesteps=timesteps,
        max_batch=max_batch,
        opset=0,
        versions=package_versions(("torch",)),
        tolerance=0.0,
        one_step_error=0.0,
        trajectory_psnr_db=0.0,
        self_test=(),
    )


def out_channels(unet: UNet) -> int:
    """C, or 2C with a learned variance."""
    last = unet.out[-1]
    assert isinstance(last, torch.nn.Conv2d)
    return last.out_channels
