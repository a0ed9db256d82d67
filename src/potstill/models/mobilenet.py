"""MobileNets: V1, Howard et al., arXiv:1704.04861, and V2, Sandler et al., CVPR 2018.

V1 for small images (stem of stride 1) and, with a width factor, for large ones. V2 is
RepDistiller's half-width network for small images. Both have plain ReLUs, not ReLU6.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from potstill.models.architecture import (
    Architecture,
    Tap,
    activated_stages,
    block_paths,
    he_fan_out_,
)

V1 = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))
"""Stages: (channels, blocks); every stage but the first begins with stride 2."""
V2 = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
      (6, 320, 1, 1))  # fmt: skip
"""Groups: (expansion, channels before the width factor, blocks, stride)."""


def separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Depthwise 3x3 and 1x1 convolution, each with BN-ReLU. (B, C, H, W) -> (B, out, H/s, W/s)"""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(
                in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False
            ),
            bn1=nn.BatchNorm2d(in_channels),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            bn2=nn.BatchNorm2d(out_channels),
            relu2=nn.ReLU(),
        )
    )


class MobileNetV1(nn.Sequential):
    """Stem and thirteen separable blocks in five stages. (B, C, H, W) -> (B, K)

    `width` multiplies every channel count, rounding down; `large` gives the stem stride 2.
    """

    def __init__(
        self, num_classes: int, input_shape: Sequence[int], *, width: float = 1.0, large: bool
    ) -> None:
        channels = int(32 * width)
        stem = nn.Conv2d(input_shape[0], channels, 3, 2 if large else 1, padding=1, bias=False)
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=stem, bn1=nn.BatchNorm2d(channels), relu=nn.ReLU()
        )
        for i, (base, n) in enumerate(V1, start=1):
            stage = []
            for j in range(n):
                stage.append(separable(channels, int(base * width), 2 if i > 1 and j == 0 else 1))
                channels = int(base * width)
            parts[f"layer{i}"] = nn.Sequential(*stage)
        parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
        parts["fc"] = nn.Linear(channels, num_classes)
        super().__init__(parts)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, without an activation at the end. (B, C, H, W) -> (B, out, ..)

    The input is added where shape and channels stay as they are.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return x + y if self.residual else y  # type: ignore[no-any-return]


class MobileNetV2(nn.Sequential):
    """Stem of stride 2, seven groups of inverted residuals, 1280 channels. (B, C, H, W) -> (B, K)

    `width` multiplies the channel counts of stem and groups, rounding down.
    """

    def __init__(self, num_classes: int, input_shape: Sequence[int], *, width: float) -> None:
        channels = int(32 * width)
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(input_shape[0], channels, 3, stride=2, padding=1, bias=False),
            bn1=nn.BatchNorm2d(channels),
            relu1=nn.ReLU(),
        )
        for i, (expansion, base, n, stride) in enumerate(V2, start=1):
            group = []
            for j in range(n):
                out = int(base * width)
                group.append(InvertedResidual(channels, out, stride if j == 0 else 1, expansion))
                channels = out
            parts[f"layer{i}"] = nn.Sequential(*group)
        parts["conv2"] = nn.Conv2d(channels, 1280, 1, bias=False)
        parts["bn2"] = nn.BatchNorm2d(1280)
        parts["relu2"] = nn.ReLU()
        parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
        head = nn.Linear(1280, num_classes)
        parts["fc"] = head
        super().__init__(parts)
        he_fan_out_(self)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)


def v1(width: float = 1.0, large: bool = False) -> Architecture:
    """MobileNetV1 of a width, with a stem of stride 2 for large images."""
    blocks = [n for _, n in V1]
    return Architecture(
        partial(MobileNetV1, width=width, large=large),
        activated_stages(blocks, "relu2", "bn2"),
        block_paths(blocks),
        (3, 224, 224) if large else (3, 32, 32),
        f"MobileNetV1, width {width:g}, for {'large' if large else 'small'} images",
    )


def v2_half() -> Architecture:
    """MobileNetV2 of width 0.5 and expansion 6 for small images."""
    ends = (2, 3, 5, 7)  # the last group of each spatial resolution
    return Architecture(
        partial(MobileNetV2, width=0.5),
        {
            "stem": Tap("relu1", "post"),
            **{f"stage{i}": Tap(f"layer{end}", "raw") for i, end in enumerate(ends, start=1)},
            "last": Tap("avgpool:in", "post"),
            "embed": Tap("fc:in", "post"),
        },
        block_paths([n for _, _, n, _ in V2]),
        description="MobileNetV2, width 0.5, for small images",
    )
