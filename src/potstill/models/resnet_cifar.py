"""ResNets for small images: He et al., CVPR 2016, arXiv:1512.03385, in RepDistiller's form.

A 3x3 stem, three stages of n basic blocks (depth 6n + 2), 1x1 convolution + BatchNorm on shortcuts
that change shape ("option B"), global average pooling, one linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. (B, C, H, W) -> (B, channels, H/stride, W/stride)"""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()  # not in place: its input is the tap "stage:pre"

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + shortcut)  # type: ignore[no-any-return]


class ResNetCifar(nn.Module):
    """CIFAR ResNet of depth 6 * blocks + 2. (B, in_channels, H, W) -> (B, num_classes)

    `widths` are the channels of the stem and of the three stages; any H and W will do.
    """

    def __init__(
        self,
        blocks: int,
        widths: Sequence[int] = (16, 16, 32, 64),
        num_classes: int = 100,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        stem, *stages = widths
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, stages[0], blocks, stride=1)
        self.layer2 = _stage(stages[0], stages[1], blocks, stride=2)
        self.layer3 = _stage(stages[1], stages[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(stages[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def taps(blocks: int) -> dict[str, str]:
    """Canonical taps: stage ends after their ReLU, `:pre` before it, `stem`, and `embed` pooled."""
    last = blocks - 1
    return {
        "stem": "relu",
        **{f"stage{i}": f"layer{i}" for i in (1, 2, 3)},
        **{f"stage{i}:pre": f"layer{i}.{last}.relu2:in" for i in (1, 2, 3)},
        "embed": "fc:in",
    }
