"""Recognizer networks: the parameter counts that name them, shapes, and weights from a generator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from engines.networks.resnet import BasicBlock, ResNet, resnet8, resnet32


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_resnet32_is_the_classic_one_of_464154_parameters() -> None:
    assert parameter_count(resnet32(3, 10)) == 464_154


def test_resnet32_for_100_classes_differs_by_its_classifier_alone() -> None:
    assert parameter_count(resnet32(3, 100)) - parameter_count(resnet32(3, 10)) == 90 * (64 + 1)


def test_resnet8_for_gray_digits_has_75002_parameters() -> None:
    assert parameter_count(resnet8(1, 10)) == 75_002


def test_resnet32_has_31_convolutions_and_one_linear_layer() -> None:
    layers = list(resnet32(3, 10).modules())
    assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == 31
    assert sum(isinstance(layer, nn.Linear) for layer in layers) == 1


@pytest.mark.parametrize(("build", "size_px", "width"), [(resnet32, 32, 64), (resnet8, 8, 64)])
def test_logits_are_the_classifier_of_the_features(build: Callable[[int, int], ResNet], size_px: int, width: int) -> None:
    model = build(1, 7).eval()
    x = torch.randn(5, 1, size_px, size_px)
    features = model.features(x)
    assert features.shape == (5, width)
    assert (features >= 0).all()
    torch.testing.assert_close(model(x), model.classifier(features))


def test_each_later_stage_halves_the_image() -> None:
    model = resnet8(1, 10).eval()
    assert [block(torch.zeros(1, c, 8, 8)).shape[-1] for block, c in zip(model.blocks, (16, 16, 32), strict=True)] == [8, 4, 4]


def test_a_shortcut_subsamples_and_pads_with_zero_channels() -> None:
    block = BasicBlock(2, 6, stride=2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(3, 2, 4, 4)
    y = block(x)
    assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 4:].any()


def test_the_same_generator_seed_gives_the_same_weights_and_leaves_the_global_one_to_others() -> None:
    for build in (resnet32, resnet8):
        first = build(3, 10, torch.Generator().manual_seed(4)).state_dict()
        again = build(3, 10, torch.Generator().manual_seed(4)).state_dict()
        other = build(3, 10, torch.Generator().manual_seed(5)).state_dict()
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])
