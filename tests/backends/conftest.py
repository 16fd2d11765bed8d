"""A small conditional network with random weights, exported once for all tests of the engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from engines.backends.base import EngineCard
from engines.backends.export import export_onnx
from engines.diffusion.schedule import Schedule, make_schedule
from engines.networks.unet import Architecture, UNet
from engines.recipe import ExportSection

T = 50
CLASSES = 4  # three and the null label


class Exported(NamedTuple):
    unet: UNet
    schedule: Schedule
    settings: ExportSection
    path: Path
    card: EngineCard


MakeUNet = Callable[..., UNet]


@pytest.fixture(scope="session")
def make_unet() -> MakeUNet:
    """make_unet(classes) -> a network whose zero-initialized convolutions are random too: else parity would be trivial."""

    def make(classes: int = CLASSES, seed: int = 0) -> UNet:
        torch.manual_seed(seed)
        architecture = Architecture(8, 1, 16, (1,), 1, (), num_head_channels=16, dropout=0.1)
        unet = UNet(architecture, 2, classes)
        for module in unet.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                module.reset_parameters()
        return unet.eval()

    return make


@pytest.fixture(scope="session")
def exported(make_unet: MakeUNet, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The network on the disk as ONNX. To be read only."""
    unet, schedule, settings = make_unet(), make_schedule("cosine", T), ExportSection(max_batch=8)
    path = tmp_path_factory.mktemp("engine") / "target.onnx"
    return Exported(unet, schedule, settings, path, export_onnx(unet, schedule, path, settings, recipe_sha256="of the recipe"))
