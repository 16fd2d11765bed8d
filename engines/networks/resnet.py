"""Recognizers of small images, the classic CIFAR ResNet-32 (He et al. 2016, section 4.2) and a ResNet-8 for 8 px, and the table of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.networks.bottleneck import BottleneckResNet, resnet50, resnext50

Architecture = Literal["resnet32", "resnet8", "resnet50", "resnext50"]


class ResNet(nn.Module):
    """A residual network of 3x3 convolutions without bottlenecks, for small images.

    Every stage but the first halves the image. A shortcut that changes shape subsamples and pads with zero channels
    (option A of He et al.): it holds no parameters, which is why the classic ResNet-32 counts 464,154 of them.

    Args:
        image_channels: C of the images.
        classes: K, the number of logits.
        widths: channels of each stage; the stem has those of the first.
        blocks: residual blocks a stage.
        generator: where the weights come from; None is torch's global one.
    """

    def __init__(
        self, image_channels: int, classes: int, widths: Sequence[int], blocks: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(image_channels, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
        stages, channels = [], widths[0]
        for number, width in enumerate(widths):
            for block in range(blocks):
                stages.append(BasicBlock(channels, width, stride=2 if number and not block else 1))
                channels = width
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, classes)
        self._initialize(generator)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features: images (B, C, H, W), float32 in [-1, 1] -> (B, D), D the last stage's width, all >= 0."""
        pooled: Tensor = self.blocks(self.stem(x)).mean(dim=(2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        """Logits: images (B, C, H, W), float32 in [-1, 1] -> (B, K)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits

    def _initialize(self, generator: torch.Generator | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, generator=generator)
        nn.init.zeros_(self.classifier.bias)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a parameter-free shortcut: (B, C, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width), nn.BatchNorm2d(width)
        self.stride, self.new_channels = stride, width - channels

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        before = self.new_channels // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(h + shortcut)


class NormalizedLinear(nn.Linear):
    """Logits scale * cos(w_k, f), without a bias: the classifier of LDAM (Cao et al. 2019): (B, D) -> (B, K) float32.

    In float32 also under autocast: bf16 would round a logit near 30 to eighths.

    Args:
        linear: whose weights it starts from.
        scale: s, so that the logits lie in [-s, s].
    """

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = scale
        with torch.no_grad():
            self.weight.copy_(linear.weight)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return self.scale * F.linear(F.normalize(features.float()), F.normalize(self.weight))


def resnet32(image_channels: int, classes: int, generator: torch.Generator | None = None) -> ResNet:
    """The classic one, 16/32/64 wide, 31 convolutions: 464,154 parameters for RGB and 10 classes."""
    return ResNet(image_channels, classes, widths=(16, 32, 64), blocks=5, generator=generator)


def resnet8(image_channels: int, classes: int, generator: torch.Generator | None = None) -> ResNet:
    """One block a stage, 16/32/64 wide, 8 px -> 4 -> 2: 75,002 parameters for gray images and 10 classes.

    Twice as wide it was no better on held-out digits and took twice as long.
    """
    return ResNet(image_channels, classes, widths=(16, 32, 64), blocks=1, generator=generator)


Recognizer: TypeAlias = ResNet | BottleneckResNet
ARCHITECTURES: dict[Architecture, Callable[[int, int, torch.Generator | None], Recognizer]] = {
    "resnet32": resnet32,
    "resnet8": resnet8,
    "resnet50": resnet50,
    "resnext50": resnext50,
}


def _conv(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
