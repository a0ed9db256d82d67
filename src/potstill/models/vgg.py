"""VGG with BatchNorm for small images: Simonyan & Zisserman, ICLR 2015, in RepDistiller's form.

Five blocks of 3x3 convolutions, no hidden linear layers. Numbered as the literature does: the
first block is the stem, the other four are the stages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import nn

from potstill.models.architecture import Architecture, activated_stages, block_paths, he_fan_out_

CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Of each block, by depth."""
WIDTHS = (64, 128, 256, 512, 512)


def unit(in_channels: int, width: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU. (B, C, H, W) -> (B, width, H, W)"""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, width, 3, padding=1),
            bn=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
        )
    )


class VGG(nn.Sequential):
    """VGG of `convolutions` in each block. (B, C, H, W) -> (B, K)

    Max-pooling after the first three blocks, and after the fourth from 64 pixels on.
    """

    def __init__(
        self, num_classes: int, input_shape: Sequence[int], *, convolutions: Sequence[int]
    ) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        channels, pooled = input_shape[0], 4 if input_shape[1] >= 64 else 3
        for i, (n, width) in enumerate(zip(convolutions, WIDTHS, strict=True), start=1):
            units = [unit(channels if j == 0 else width, width) for j in range(n)]
            parts[f"layer{i}"] = nn.Sequential(*units)
            if i <= pooled:
                parts[f"pool{i}"] = nn.MaxPool2d(2)
            channels = width
        parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
        head = nn.Linear(channels, num_classes)
        parts["fc"] = head
        super().__init__(parts)
        he_fan_out_(self)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)


def vgg(depth: int) -> Architecture:
    """VGG-depth with BatchNorm."""
    convolutions = CONVOLUTIONS[depth]
    return Architecture(
        partial(VGG, convolutions=convolutions),
        activated_stages(convolutions[1:], "relu", "bn", stem="layer1", first=2),
        block_paths(convolutions),
        description=f"VGG-{depth} with BatchNorm for small images",
    )
