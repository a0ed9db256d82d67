"""ResNets: He et al., CVPR 2016, arXiv:1512.03385, for small images and for large ones.

The CIFAR form of depth 6n + 2 (three stages of n basic blocks) and the four-stage networks in
CIFAR form, as RepDistiller has them: 1x1 convolution + BatchNorm on shortcuts that change shape
("option B"). The `_imagenet` form is the standard one: 7x7 stem, max-pooling, and the stride of a
bottleneck on its 3x3 convolution.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from potstill.depth import ResidualBlock
from potstill.models.architecture import Architecture, activated_stages, block_paths, he_fan_out_


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut. (B, C, H, W) -> (B, width, H/stride, W/stride)"""

    expansion = 1
    end = 2
    """The block's last BatchNorm and ReLU are bn2 and relu2."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(in_channels, width, stride)
        self.relu2 = nn.ReLU()  # not in place: its input is the tap "stage:pre"

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu2(self.join(self.branch, x, shortcut))  # type: ignore[no-any-return]

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the shortcut."""
        return self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))  # type: ignore[no-any-return]


class Bottleneck(ResidualBlock):
    """1x1, 3x3, 1x1 and a shortcut. (B, C, H, W) -> (B, 4 width, H/stride, W/stride)"""

    expansion = 4
    end = 3

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _projection(in_channels, out, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu3(self.join(self.branch, x, shortcut))  # type: ignore[no-any-return]

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the shortcut."""
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(x)))))  # type: ignore[no-any-return]


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class ResNet(nn.Sequential):
    """Stem, stages of residual blocks, pooling, one linear layer. (B, C, H, W) -> (B, K)

    `stem` channels before the first stage; `blocks` and `widths` one entry a stage, the first
    stage with stride 1, the others with 2.
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        *,
        block: type[BasicBlock] | type[Bottleneck],
        stem: int,
        blocks: Sequence[int],
        widths: Sequence[int],
        large: bool = False,
    ) -> None:
        first = (
            nn.Conv2d(input_shape[0], stem, 7, stride=2, padding=3, bias=False)
            if large
            else nn.Conv2d(input_shape[0], stem, 3, padding=1, bias=False)
        )
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=first, bn1=nn.BatchNorm2d(stem), relu=nn.ReLU()
        )
        if large:
            parts["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
        channels = stem
        for i, (n, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for j in range(n):
                stage.append(block(channels, width, stride=2 if i > 0 and j == 0 else 1))
                channels = width * block.expansion
            parts[f"layer{i + 1}"] = nn.Sequential(*stage)
        parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
        parts["fc"] = nn.Linear(channels, num_classes)
        super().__init__(parts)
        he_fan_out_(self)


def cifar(depth: int, widths: Sequence[int] = (16, 16, 32, 64)) -> Architecture:
    """CIFAR ResNet of depth 6n + 2; `widths` of the stem and the three stages."""
    stem, *rest = widths
    text = f"ResNet-{depth}, widths {', '.join(map(str, widths))}"
    return stages(text, BasicBlock, stem, [(depth - 2) // 6] * 3, rest)


def four_stages(depth: int, large: bool = False) -> Architecture:
    """ResNet-18, 34 or 50; `large` is the standard form for 224x224 images."""
    block = Bottleneck if depth == 50 else BasicBlock
    blocks = [2, 2, 2, 2] if depth == 18 else [3, 4, 6, 3]
    text = (
        f"ResNet-{depth}, {'standard form for large' if large else 'CIFAR form for small'} images"
    )
    return stages(text, block, 64, blocks, [64, 128, 256, 512], large)


def stages(
    text: str,
    block: type[BasicBlock] | type[Bottleneck],
    stem: int,
    blocks: Sequence[int],
    widths: Sequence[int],
    large: bool = False,
) -> Architecture:
    """A ResNet with `blocks` and `widths` of each stage, and its anatomy."""
    return Architecture(
        partial(ResNet, block=block, stem=stem, blocks=blocks, widths=widths, large=large),
        activated_stages(blocks, f"relu{block.end}", f"bn{block.end}"),
        block_paths(blocks),
        (3, 224, 224) if large else (3, 32, 32),
        text,
    )
