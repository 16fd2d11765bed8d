"""Recognizers of large images: ResNet-50 (He et al. 2016) and ResNeXt-50 32x4d (Xie et al. 2017), weights named as torchvision's.

The stride of a halving block stands on its 3x3 convolution, as in every published set of weights since 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_PX = 64  # five halvings: at 32 px the last stage would convolve single pixels


class BottleneckResNet(nn.Module):
    """A residual network of bottlenecks with projection shortcuts, for images of 64 px and more.

    Its state dict has torchvision's names but for `fc`, which is `classifier` in every recognizer here.

    Args:
        image_channels: C of the images.
        classes: K, the number of logits.
        blocks: residual blocks of each of the four stages.
        groups, group_width: of the 3x3 convolutions: groups, and channels of a group in the first stage, doubled by each later one.
        zero_last: each block starts as its shortcut (Goyal et al. 2017): its last norm scales by 0, so that a large learning rate
            needs no warm-up.
        generator: where the weights come from; None is torch's global one.
    """

    def __init__(
        self,
        image_channels: int,
        classes: int,
        blocks: Sequence[int] = (3, 4, 6, 3),
        groups: int = 1,
        group_width: int = 64,
        zero_last: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(image_channels, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        width = groups * group_width
        self.layer1 = _stage(64, width, 256, groups, blocks[0], stride=1)
        self.layer2 = _stage(256, 2 * width, 512, groups, blocks[1], stride=2)
        self.layer3 = _stage(512, 4 * width, 1024, groups, blocks[2], stride=2)
        self.layer4 = _stage(1024, 8 * width, 2048, groups, blocks[3], stride=2)
        self.classifier = nn.Linear(2048, classes)
        self._initialize(zero_last, generator)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features: images (B, C, H, W), float32 in [-1, 1], H and W from 64 -> (B, D), D = 2048, all >= 0."""
        assert min(x.shape[2:]) >= SMALLEST_PX, f"images of {tuple(x.shape[2:])} px"  # recipes are refused before this
        h = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)  # (B, 64, H / 4, W / 4)
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))  # (B, 2048, H / 32, W / 32)
        pooled: Tensor = h.mean(dim=(2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        """Logits: images (B, C, H, W), float32 in [-1, 1] -> (B, K)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits

    def _initialize(self, zero_last: bool, generator: torch.Generator | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)
            elif isinstance(module, Bottleneck) and zero_last:
                nn.init.zeros_(module.bn3.weight)
        nn.init.normal_(self.classifier.weight, std=0.01, generator=generator)  # Goyal et al. 2017
        nn.init.zeros_(self.classifier.bias)


class Bottleneck(nn.Module):
    """1x1, 3x3 in groups, 1x1 beside a shortcut, projected where the shape changes.

    (B, before, H, W) -> (B, after, H / stride, W / stride); `middle` channels in between.
    """

    def __init__(self, before: int, middle: int, after: int, groups: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, after, 1, bias=False), nn.BatchNorm2d(after)
        changes = stride > 1 or before != after
        self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


def resnet50(image_channels: int, classes: int, generator: torch.Generator | None = None) -> BottleneckResNet:
    """ResNet-50: 25,557,032 parameters for RGB and 1,000 classes."""
    return BottleneckResNet(image_channels, classes, generator=generator)


def resnext50(image_channels: int, classes: int, generator: torch.Generator | None = None) -> BottleneckResNet:
    """ResNeXt-50 32x4d, the network of most ImageNet-LT tables: 25,028,904 parameters for RGB and 1,000 classes."""
    return BottleneckResNet(image_channels, classes, groups=32, group_width=4, generator=generator)


def _stage(before: int, middle: int, after: int, groups: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(before, middle, after, groups, stride)
    return nn.Sequential(first, *(Bottleneck(after, middle, after, groups) for _ in range(blocks - 1)))
