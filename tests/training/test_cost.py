"""engines/training/cost.py: the count is the hand calculation's, scales as it must, and the recipes' Cost lines keep to it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engines.data.longtail import class_groups, profile_counts
from engines.networks.unet import UNet
from engines.recipe import Recipe, load
from engines.training.cost import SHARE_OF_PEAK, Cost, cost_of, hours
from engines.training.diffusion import build_unet

RECIPES = Path(__file__).parent.parent.parent / "recipes"
COUNTED_LAST = sorted({path.stem for path in RECIPES.glob("*.toml")} - {"digits-lt", "cifar10-lt-100", "cifar10-lt-100-fast"})
LARGEST_CLASS = {"cifar10": 5000, "cifar100": 500, "list": 1280}
TINY = """
name = "tiny"
[data]
image_size_px = 16
[unet]
model_channels = 32
channel_mult = [1, 2]
num_res_blocks = 1
attention_resolutions = [8]
num_head_channels = 32
[guide]
channel_mult = [1, 2]
"""


def text_of(name: str) -> str:
    return (RECIPES / f"{name}.toml").read_text(encoding="utf-8")


@functools.cache
def cost_of_name(name: str) -> Cost:
    return cost_of(load(text_of(name)))


def conv_and_linear_operations(unet: UNet, recipe: Recipe) -> float:
    """Multiply-adds, twice, of every 2-d convolution and linear layer, by hand from the shapes that pass through a real forward pass."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear):
            total += 2 * layer.in_features * output.numel()
        elif isinstance(layer, nn.Conv2d):
            weights_each = layer.in_channels * int(np.prod(layer.kernel_size))
            total += 2 * weights_each * output.numel()

    for layer in unet.modules():
        layer.register_forward_hook(count)
    shape = (1, recipe.data.image_channels, recipe.data.image_size_px, recipe.data.image_size_px)
    unet(torch.zeros(shape), torch.zeros(1, dtype=torch.int64))
    return float(total)


def attention_operations(recipe: Recipe) -> float:
    """Of every attention block, from the recipe alone: T pixels of C channels make q, k, v (3 C x C), q.k and weights.v (T x T), C x C."""
    unet = recipe.unet
    levels = len(unet.channel_mult)
    total = 0
    for level, mult in enumerate(unet.channel_mult):
        size, width = recipe.data.image_size_px // 2**level, mult * unet.model_channels
        blocks = 2 * unet.num_res_blocks + 1 if size in unet.attention_resolutions else 0
        blocks += level == levels - 1  # the middle block
        total += blocks * 2 * (4 * width * width * size**2 + 2 * width * size**4)
    return float(total)


def test_an_evaluation_costs_its_convolutions_linear_layers_and_attention() -> None:
    recipe = load(TINY, ("synth.guidance_scale=0.0", "synth.steps=1"))
    by_hand = conv_and_linear_operations(build_unet(recipe, 10).eval(), recipe) + attention_operations(recipe)
    assert cost_of(recipe).image == pytest.approx(by_hand, rel=0.01)


def test_a_training_step_costs_three_evaluations_but_for_the_gradient_of_the_image() -> None:
    recipe = load(TINY, ("synth.guidance_scale=0.0", "synth.steps=1", "source.train_steps=7", "source.batch_size=8"))
    counted = cost_of(recipe)
    assert 2.8 < counted.source / (7 * 8) / counted.image < 3.0  # forward, gradient of inputs, gradient of weights


def test_the_pair_loss_costs_one_more_evaluation_a_step() -> None:
    settings = ("synth.guidance_scale=0.0", "synth.steps=1", "target.train_steps=5", "target.batch_size=8")
    with_pairs, without = (cost_of(load(TINY, (*settings, f"target.lambda_pair={weight}"))) for weight in (0.5, 0.0))
    assert with_pairs.target - without.target == pytest.approx(5 * 8 * without.image)


def test_an_image_costs_its_steps_and_guidance_only_where_it_acts() -> None:
    plain = cost_of(load(TINY, ("synth.guidance_scale=0.0", "synth.steps=100")))
    guided = cost_of(load(TINY, ("synth.steps=100",)))
    half = cost_of(load(TINY, ("synth.steps=100", "synth.guidance_interval=[0, 499]")))
    assert plain.image < half.image < guided.image
    assert half.image - plain.image == pytest.approx((guided.image - plain.image) / 2, rel=0.03)
    assert cost_of(load(TINY, ("synth.guidance_scale=0.0", "synth.steps=50"))).image == pytest.approx(plain.image / 2)


def test_hours_are_the_operations_at_the_share_of_the_peak() -> None:
    low, high = SHARE_OF_PEAK
    assert hours(3600.0 * 1e12, peak=1e12) == pytest.approx((1 / high, 1 / low))


def images_to_make(recipe: Recipe) -> int:
    """How many the profile leaves to be filled; the lists of ImageNet-LT are nearly the Pareto profile."""
    data, largest = recipe.data, LARGEST_CLASS[recipe.data.source]
    classes = {"cifar10": 10, "cifar100": 100, "list": 1000}[data.source]
    if data.source == "list":
        data = data.model_copy(update={"profile": "pareto", "imbalance": 256.0})
    counts = profile_counts(data, np.full(classes, largest), [str(k) for k in range(classes)])
    tail = counts[[group != "many" for group in class_groups(data, counts)]]
    return int(((recipe.synth.fill_to or largest) - tail).clip(min=0).sum())


@pytest.mark.parametrize(
    "name",
    [
        "cifar10-lt-100",
        "cifar10-lt-100-fast",
        *(pytest.param(name, marks=pytest.mark.slow) for name in COUNTED_LAST),
    ],
)
def test_a_recipes_cost_line_is_the_estimate_within_a_quarter(name: str) -> None:
    text, recipe = text_of(name), load(text_of(name))
    of_cifar = name.startswith("cifar") and not name.endswith("-fast")
    counted = cost_of_name("cifar10-lt-100" if of_cifar else name)  # these differ in data and recognizer alone, below
    images = images_to_make(recipe) if recipe.data.source in LARGEST_CLASS else 0
    told = re.search(r"^# Cost: (\d+) to (\d+) GPU hours \(one A100, estimated\)", text, re.MULTILINE)
    assert told, "the Cost line says from how many GPU hours to how many"
    assert (float(told[1]), float(told[2])) == pytest.approx(hours(counted.total(images)), rel=0.25)
    for section in ("unet", "diffusion", "source", "target", "guide", "synth"):
        assert not of_cifar or getattr(recipe, section) == getattr(load(text_of("cifar10-lt-100")), section)
    operations = re.search(r"Training takes about (\S+) floating-point operations, the synthesis of (.+?) images? (\S+) \(counted:", text)
    assert operations
    assert float(operations[1]) == pytest.approx(counted.total(), rel=0.35)  # one digit
    made = 1 if operations[2] == "an" else int(re.sub(r"\D", "", operations[2]))
    assert made == pytest.approx(images or 1, rel=0.01)
    assert float(operations[3]) == pytest.approx(made * counted.image, rel=0.35)
