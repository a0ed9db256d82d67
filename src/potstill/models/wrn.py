"""Wide ResNets: Zagoruyko & Komodakis, BMVC 2016, arXiv:1605.07146.

Depth 6n + 4: a bare 3x3 convolution to 16 channels, three groups of n pre-activation blocks of
width 16k, 32k and 64k, BatchNorm, ReLU, pooling, one linear layer. A group ends in a raw sum; its
activation is the first thing in the next group, and `stage1:pre` and `stage1:post` are read there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from potstill.depth import ResidualBlock
from potstill.models.architecture import Architecture, Tap, block_paths, he_fan_out_


class Block(ResidualBlock):
    """BN-ReLU-conv-BN-ReLU-conv plus a shortcut. (B, C, H, W) -> (B, width, H/stride, W/stride)

    A change of width or size has a 1x1 convolution on its shortcut, which takes the input after
    BN-ReLU.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Conv2d(in_channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return self.join(self.branch, x, x, opening=(self.bn1, self.relu1))
        active = self.relu1(self.bn1(x))
        return self.join(self.convolved, active, self.shortcut(active))

    def branch(self, x: Tensor) -> Tensor:
        """What is added to a shortcut that takes the input as it is."""
        return self.convolved(self.relu1(self.bn1(x)))

    def convolved(self, active: Tensor) -> Tensor:
        """The branch from the first activation on."""
        return self.conv2(self.relu2(self.bn2(self.conv1(active))))  # type: ignore[no-any-return]


class BiasedBlock(ResidualBlock):
    """The block of the GKD and ReFilled code. (B, C, H, W) -> (B, width, H/stride, W/stride)

    Biased convolutions, the stride on the second, dropout before it, the shortcut on the raw input.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(0.3)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Conv2d(in_channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.join(self.branch, x, shortcut, opening=(self.bn1, self.relu1))

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the shortcut."""
        x = self.conv1(self.relu1(self.bn1(x)))
        return self.conv2(self.dropout(self.relu2(self.bn2(x))))  # type: ignore[no-any-return]


class WideResNet(nn.Sequential):
    """WRN of depth 6 * blocks + 4 and width factor `k`. (B, C, H, W) -> (B, K)

    `biased` is the variant of the GKD code, with the framework's own initialisation and a last
    BatchNorm whose running statistics are nine tenths the newest batch's. `halve_large` gives the
    stem stride 2 for images of 64 pixels and more (MHGD's Tiny-ImageNet form).
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        *,
        blocks: int,
        k: int,
        biased: bool = False,
        halve_large: bool = False,
    ) -> None:
        stride = 2 if halve_large and input_shape[1] >= 64 else 1
        stem = nn.Conv2d(input_shape[0], 16, 3, stride, padding=1, bias=biased)
        parts: OrderedDict[str, nn.Module] = OrderedDict(conv1=stem)
        block, channels = BiasedBlock if biased else Block, 16
        for i in (1, 2, 3):
            group = []
            for j in range(blocks):
                width = 16 * k * 2 ** (i - 1)
                group.append(block(channels, width, stride=2 if i > 1 and j == 0 else 1))
                channels = width
            parts[f"layer{i}"] = nn.Sequential(*group)
        parts["bn1"] = nn.BatchNorm2d(channels, momentum=0.9 if biased else 0.1)
        parts["relu"] = nn.ReLU()
        parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
        head = nn.Linear(channels, num_classes)
        parts["fc"] = head
        super().__init__(parts)
        if not biased:
            he_fan_out_(self)
            nn.init.zeros_(head.bias)


def wrn(depth: int, k: int, biased: bool = False, halve_large: bool = False) -> Architecture:
    """WRN-depth-k, in the standard variant or with biased convolutions (GKD's code)."""
    blocks = (depth - 4) // 6
    before = {1: "layer2.0.bn1", 2: "layer3.0.bn1", 3: "bn1"}
    after = {1: "layer2.0.relu1", 2: "layer3.0.relu1", 3: "relu"}
    taps = {"stem": Tap("conv1", "raw", "layer1.0.bn1")}
    for i in (1, 2, 3):
        taps[f"stage{i}"] = Tap(f"layer{i}", "raw", before[i])
        taps[f"stage{i}:pre"] = Tap(before[i], "pre", before[i])
        taps[f"stage{i}:post"] = Tap(after[i], "post")
    taps["last"] = Tap("avgpool:in", "post")
    taps["embed"] = Tap("fc:in", "post")
    units = block_paths([blocks] * 3)
    variant = "biased convolutions (GKD)" if biased else ""
    variant = "halves images from 64 pixels on" if halve_large else variant
    return Architecture(
        partial(WideResNet, blocks=blocks, k=k, biased=biased, halve_large=halve_large),
        taps,
        units,
        description=f"WRN-{depth}-{k}" + (f", {variant}" if variant else ""),
        block_ends=(*(f"{unit}.relu1" for unit in units[1:]), "relu"),
    )
