"""ShuffleNets for small images, in RepDistiller's form.

V1: Zhang et al., CVPR 2018, arXiv:1707.01083, three groups. V2: Ma et al., ECCV 2018,
arXiv:1807.11164, width 1. Both have a 1x1 stem and the framework's own initialisation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from potstill.models.architecture import Architecture, activated_stages, block_paths

UNITS = (4, 8, 4)
"""Of each stage, in both."""
STEM = 24
V1_WIDTHS = (240, 480, 960)
V2_WIDTHS = (116, 232, 464)


class V1Unit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1. (B, C, H, W) -> (B, out, H/s, W/s)

    With stride 2 the pooled input is appended, and the branch gives the channels that are missing.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int = 3) -> None:
        super().__init__()
        branch = out_channels - in_channels if stride == 2 else out_channels
        hidden = branch // 4
        first = 1 if in_channels == STEM else groups
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=first, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(first)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden, branch, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        joined = y + x if self.pool is None else torch.cat([y, self.pool(x)], 1)
        return self.relu3(joined)  # type: ignore[no-any-return]


class V2Unit(nn.Module):
    """Half of the channels pass, half are convolved; then shuffled. (B, C, H, W) -> the same

    The ReLU is applied to both halves together, where `stage:pre` is read: the passing half comes
    out of a ReLU already, which leaves it as it is.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        passing, y = x.chunk(2, 1)
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(y)))))
        y = self.bn3(self.conv3(y))
        return self.shuffle(self.relu3(torch.cat([passing, y], 1)))  # type: ignore[no-any-return]


class V2DownUnit(nn.Module):
    """Two convolved branches of half the new channels each. (B, C, H, W) -> (B, out, H/2, W/2)"""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.relu3(self.bn3(self.conv3(x)))))
        right = self.relu5(self.bn5(self.conv5(right)))
        return self.shuffle(torch.cat([left, right], 1))  # type: ignore[no-any-return]


class ShuffleNetV1(nn.Sequential):
    """ShuffleNetV1 of three groups. (B, C, H, W) -> (B, K)"""

    def __init__(self, num_classes: int, input_shape: Sequence[int]) -> None:
        parts, channels = _stem(input_shape[0]), STEM
        for i, (n, width) in enumerate(zip(UNITS, V1_WIDTHS, strict=True), start=1):
            down, rest = V1Unit(channels, width, 2), [V1Unit(width, width, 1) for _ in range(n - 1)]
            parts[f"layer{i}"] = nn.Sequential(down, *rest)
            channels = width
        super().__init__(parts | _head(channels, num_classes))


class ShuffleNetV2(nn.Sequential):
    """ShuffleNetV2 of width 1. (B, C, H, W) -> (B, K)"""

    def __init__(self, num_classes: int, input_shape: Sequence[int]) -> None:
        parts, channels = _stem(input_shape[0]), STEM
        for i, (n, width) in enumerate(zip(UNITS, V2_WIDTHS, strict=True), start=1):
            down, rest = V2DownUnit(channels, width), [V2Unit(width) for _ in range(n - 1)]
            parts[f"layer{i}"] = nn.Sequential(down, *rest)
            channels = width
        parts["conv2"] = nn.Conv2d(channels, 1024, 1, bias=False)
        parts["bn2"] = nn.BatchNorm2d(1024)
        parts["relu2"] = nn.ReLU()
        super().__init__(parts | _head(1024, num_classes))


def _stem(in_channels: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        conv1=nn.Conv2d(in_channels, STEM, 1, bias=False), bn1=nn.BatchNorm2d(STEM), relu=nn.ReLU()
    )


def _head(channels: int, num_classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, num_classes)
    )


def v1() -> Architecture:
    """ShuffleNetV1, three groups, for small images."""
    taps = activated_stages(UNITS, "relu3", "bn3")
    return Architecture(
        ShuffleNetV1, taps, block_paths(UNITS), description="ShuffleNetV1, 3 groups"
    )


def v2() -> Architecture:
    """ShuffleNetV2, width 1, for small images."""
    taps = activated_stages(UNITS, "relu3", None)  # bn3 normalises one half only
    return Architecture(ShuffleNetV2, taps, block_paths(UNITS), description="ShuffleNetV2, width 1")
