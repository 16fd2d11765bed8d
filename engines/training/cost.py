"""What a recipe costs before it is run: floating-point operations, counted on shapes alone, and the hours that they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from engines.recipe import Recipe, digest
from engines.training.diffusion import build_unet
from engines.training.guide import build_guide

A100_PEAK = 312e12  # NVIDIA A100, dense bfloat16, operations a second as published
SHARE_OF_PEAK = (0.14, 0.32)  # of a matrix product's speed: a training step in bfloat16, 6 M and 38 M parameters, two CPU cores with AMX
CLASSES = 10  # labels and prototypes cost next to nothing, so any number does

_known: dict[str, tuple[float, float, float, float]] = {}  # what `_counted` found, by digest: counting takes seconds


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a recipe; a multiply-add is two. Normalizations and activations are not counted."""

    source: float  # the whole stage
    target: float
    guide: float
    image: float  # one synthesized image

    def total(self, images: int = 0) -> float:
        """Training, and the synthesis of so many images."""
        return self.source + self.target + self.guide + images * self.image


def cost_of(recipe: Recipe) -> Cost:
    """Count a training step of each stage and the synthesis of an image, with tensors that have a shape and no memory.

    The recognizers of `diffrc evaluate` are left out: eighteen of them add a percent or two on CIFAR, four at 256 px.
    """
    evaluation, step, guide_step, gradient = _counted(recipe)
    source, target, synth = recipe.source, recipe.target, recipe.synth
    timesteps = recipe.sampling_timesteps()
    first, last = synth.guidance_interval
    guided = sum(first <= t <= last for t in timesteps) if synth.guidance_scale else 0
    return Cost(
        source.train_steps * source.batch_size * step,
        target.train_steps * target.batch_size * (step + (evaluation if target.lambda_pair else 0)),
        recipe.guide.train_steps * recipe.guide.batch_size * guide_step,
        len(timesteps) * evaluation * (2 if synth.classifier_free_scale else 1) + guided * gradient,
    )


def hours(operations: float, peak: float = A100_PEAK) -> tuple[float, float]:
    """From and to how many hours the operations take on a device of that peak, in operations a second.

    The assumption is that it reaches the share of its peak that a CPU reached of its own, small networks the lower one
    (`tests/bench_training.py` measures it).
    """
    low, high = SHARE_OF_PEAK
    return operations / (high * peak) / 3600, operations / (low * peak) / 3600


def _counted(recipe: Recipe) -> tuple[float, float, float, float]:
    """Operations of an evaluation of the U-Net, of its training step, of the guide's, of its gradient, an image; once a network."""
    table = recipe.model_dump(mode="json")
    pixels = [table["data"][key] for key in ("image_size_px", "image_channels")]
    key = digest({"pixels": pixels, **{name: table[name] for name in ("unet", "guide", "diffusion")}})
    if key in _known:
        return _known[key]
    with FakeTensorMode():  # not the meta device, which autocast refuses
        unet = build_unet(recipe, CLASSES)
        x = torch.empty(1, recipe.data.image_channels, recipe.data.image_size_px, recipe.data.image_size_px)
        t = torch.zeros(1, dtype=torch.int64)
        y = t if unet.classes else None
        evaluation = _operations(lambda: unet(x, t, y), backward=False)
        step = _operations(lambda: unet(x, t, y), backward=True)
        guide = build_guide(recipe, np.ones(CLASSES, dtype=np.int64))
        guide_step = _operations(lambda: guide(x, t), backward=True)
        guide.requires_grad_(requires_grad=False)
        gradient = _operations(lambda: guide.log_probs(x.requires_grad_(), t), backward=True)
    _known[key] = (evaluation, step, guide_step, gradient)
    return _known[key]


def _operations(forward: Callable[[], Tensor], *, backward: bool) -> float:
    with FlopCounterMode(display=False) as counter:
        if backward:
            forward().sum().backward()  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                forward()
    return float(counter.get_total_flops())
