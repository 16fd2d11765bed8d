"""Recognizers of large images: the published parameter and operation counts, names, strides, and weights from a generator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engines.errors import UsageError
from engines.networks.bottleneck import BottleneckResNet, resnet50, resnext50
from engines.networks.resnet import ARCHITECTURES
from engines.recipe import RecognizerSection, load

Build = Callable[[int, int], BottleneckResNet]
FIGURES = [(resnet50, 25_557_032, 4.09e9), (resnext50, 25_028_904, 4.23e9)]  # parameters, multiply-adds at 224 px, as published


def tiny(seed: int = 0, *, zero_last: bool = True) -> BottleneckResNet:
    return BottleneckResNet(3, 7, (1, 1, 1, 1), groups=2, group_width=4, zero_last=zero_last, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("build", "parameters", "multiply_adds"), FIGURES, ids=["resnet50", "resnext50"])
def test_parameters_and_operations_are_the_published_ones(build: Build, parameters: int, multiply_adds: float) -> None:
    total = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * int(np.prod(output.shape[2:]))  # each weight once a pixel, in groups too; a linear layer's once

    model = build(3, 1000).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert total == pytest.approx(multiply_adds, rel=0.002)


def test_weights_have_the_published_names_and_shapes_but_for_the_classifiers() -> None:
    state = resnext50(3, 1000).state_dict()
    assert len(state) == 320  # 53 convolutions, 53 norms of five, a linear layer of two
    assert {key.split(".")[0] for key in state} == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "classifier"}
    assert [len({key.split(".")[1] for key in state if key.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)] == [3, 4, 6, 3]
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer1.0.conv2.weight"].shape == (128, 4, 3, 3)  # 32 groups of 4
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer4.0.downsample.1.running_var"].shape == (2048,)
    assert state["layer4.2.bn3.weight"].shape == (2048,)
    assert sum(".downsample." in key for key in state) == 4 * 6


def test_the_second_convolution_of_a_stages_first_block_is_what_halves_the_image() -> None:
    model = tiny()
    strides = {name: layer.stride[0] for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and layer.stride[0] > 1}
    halving = {f"layer{i}.0.{name}": 2 for i in (2, 3, 4) for name in ("conv2", "downsample.0")}
    assert strides == {"conv1": 2} | halving


def test_logits_of_64_px_images_are_the_classifier_of_the_features() -> None:
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    features = model.features(x)
    assert features.shape == (2, 2048)
    assert (features >= 0).all()
    torch.testing.assert_close(model(x), model.classifier(features))


@pytest.mark.parametrize("zero_last", [True, False])
def test_a_block_starts_as_its_shortcut_exactly_where_its_last_norm_is_0(zero_last: bool) -> None:
    block = tiny(zero_last=zero_last).eval().layer1[0]
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(block(x), block.downsample(x).relu()) == zero_last


def test_every_weight_learns_from_the_second_step_on() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_same_generator_seed_gives_the_same_weights_of_a_deep_recognizer() -> None:
    first, again, other = (tiny(seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("architecture", ["resnet50", "resnext50"])
def test_a_recipe_of_images_below_64_px_is_refused_a_network_that_halves_them_five_times(architecture: str) -> None:
    with pytest.raises(UsageError, match=r"needs data.image_size_px 64 or more, not 32.*resnet32"):
        load('name = "x"', [f"recognizer.architecture={architecture}"])
    settings = ["data.image_size_px=64", "guide.channel_mult=[1, 2, 2, 2]"]
    load('name = "x"', [f"recognizer.architecture={architecture}", *settings])


def test_the_table_of_networks_and_the_recipes_key_name_the_same_ones() -> None:
    assert set(ARCHITECTURES) == set(RecognizerSection.model_fields["architecture"].annotation.__args__)
