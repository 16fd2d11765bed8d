"""A maker with a tiny random network: three classes, 8 px, a batch of five (odd, where torch rounds differently from row to row)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from engines.backends.torch_engine import TorchEngine
from engines.networks.guide import Guide
from engines.networks.unet import Architecture, UNet
from engines.recipe import load
from engines.synthesis.maker import Maker
from engines.synthesis.plan import make_plan

RECIPE = """
name = "test"
[data]
image_size_px = 8
image_channels = 1
[unet]
channel_mult = [1]
class_cond = true
attention_resolutions = [8]
[guide]
channel_mult = [1]
[diffusion]
steps = 20
[synth]
steps = 3
batch_size = 5
"""

MakeMaker = Callable[..., Maker]


@pytest.fixture(scope="session")
def make_maker() -> MakeMaker:
    """make_maker("synth.steps=4", names=[...]) -> a maker on the torch engine; equal arguments give equal pixels."""
    torch.manual_seed(0)
    architecture = Architecture(8, 1, 16, (1,), 1, (), num_head_channels=16)
    guide = Guide(architecture, torch.tensor([30, 10, 4]), embedding_dim=8).eval().requires_grad_(False)
    nn.init.orthogonal_(guide.prototypes)
    unet = UNet(architecture, 2, 4).eval()
    for module in (*unet.modules(), *guide.modules()):
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            module.reset_parameters()
    engine = TorchEngine(unet, 20, 8)

    def make(*overrides: str, names: Sequence[str] = ("zero", "one", "two")) -> Maker:
        recipe = load(RECIPE, overrides)
        table = {"names": list(names), "kept_sha256": "of the data"}
        plan = make_plan(recipe, table, "target", engine.card, "of the guide", {"torch": torch.__version__})
        return Maker(recipe, plan, "target", engine, guide)

    return make


@pytest.fixture(scope="session")
def torch_maker(make_maker: MakeMaker) -> Maker:
    return make_maker()
