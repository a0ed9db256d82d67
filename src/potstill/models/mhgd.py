"""The networks of the graph-distillation paper: Lee & Song, BMVC 2019, arXiv:1907.02226.

Their stages are the paper's sensing points: in each pair, teacher and student have the same
channels there. What the paper leaves open (kernels of shortcuts, BatchNorm, dropout) is as the
authors' other code has it. Convolutions have He's initialisation. The wide ResNets of the paper
are `wrn.wrn(22 or 10, 4, halve_large=True)`, sensed at `stage1:post`, `stage2:post` and so on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import nn

from potstill.models import mobilenet, resnet, vgg
from potstill.models.architecture import Architecture, activated_stages, block_paths, he_fan_out_


class PlainVGG(nn.Sequential):
    """VGG without BatchNorm and with hidden linear layers. (B, C, H, W) -> (B, K)

    Every block ends in 2x2 max-pooling; the fourth only from 64 pixels on. Dropout 0.5 after each
    of `hidden` linear layers of 1024.
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        *,
        convolutions: Sequence[int],
        hidden: int,
    ) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        channels, height, width = input_shape
        for i, (n, out) in enumerate(zip(convolutions, vgg.WIDTHS, strict=True), start=1):
            block: list[nn.Module] = []
            for j in range(n):
                convolution = nn.Conv2d(channels if j == 0 else out, out, 3, padding=1)
                block.append(nn.Sequential(OrderedDict(conv=convolution, relu=nn.ReLU())))
            if i != 4 or input_shape[1] >= 64:
                block.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            parts[f"layer{i}"] = nn.Sequential(*block)
            channels = out
        parts["flatten"] = nn.Flatten()
        features = channels * height * width
        for i in range(1, hidden + 1):
            parts[f"fc{i}"] = nn.Linear(features, 1024)
            parts[f"relu{i}"] = nn.ReLU()
            parts[f"dropout{i}"] = nn.Dropout(0.5)
            features = 1024
        parts["fc"] = nn.Linear(features, num_classes)
        super().__init__(parts)
        he_fan_out_(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)


class ThreeStages(nn.Sequential):
    """A stem of 16 channels, then stages of 64, 128 and 256. (B, C, H, W) -> (B, K)

    `block(in_channels, out_channels, stride)` makes one block; `blocks` of them in each stage.
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        *,
        block: Callable[[int, int, int], nn.Module],
        blocks: Sequence[int],
    ) -> None:
        stem = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=stem, bn1=nn.BatchNorm2d(16), relu=nn.ReLU()
        )
        channels = 16
        for i, (n, width) in enumerate(zip(blocks, (64, 128, 256), strict=True), start=1):
            stage = []
            for j in range(n):
                stage.append(block(channels, width, 2 if i > 1 and j == 0 else 1))
                channels = width
            parts[f"layer{i}"] = nn.Sequential(*stage)
        parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
        parts["fc"] = nn.Linear(channels, num_classes)
        super().__init__(parts)
        he_fan_out_(self)


def unit(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU. (B, C, H, W) -> (B, out, H/s, W/s)"""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            bn=nn.BatchNorm2d(out_channels),
            relu=nn.ReLU(),
        )
    )


def plain_vgg(role: Literal["teacher", "student"]) -> Architecture:
    """The VGG pair of Tables 1, 2 and 4; a stage is a block with its pooling."""
    convolutions, hidden = ((2, 2, 3, 3, 3), 2) if role == "teacher" else ((1, 1, 1, 1, 1), 1)
    return Architecture(
        partial(PlainVGG, convolutions=convolutions, hidden=hidden),
        activated_stages(convolutions, "relu", None, stem=None, last="layer5"),
        block_paths(convolutions),
        description=f"VGG {role} of MHGD, without BatchNorm",
    )


def small_resnet() -> Architecture:
    """The ResNet student of Table 3: one basic block in each of three stages."""
    text = "ResNet student of MHGD"
    return resnet.stages(text, resnet.BasicBlock, 16, [1, 1, 1], [64, 128, 256])


def small_mobilenet() -> Architecture:
    """The MobileNet student of Table 3: five separable blocks."""
    text = "MobileNet student of MHGD"
    return _three_stages(text, mobilenet.separable, (1, 2, 2), ("bn2", "relu2"))


def small_vgg() -> Architecture:
    """The modified VGG student of Table 3: strided convolutions in place of pooling."""
    return _three_stages("VGG student of MHGD, with BatchNorm", unit, (2, 2, 2), ("bn", "relu"))


def _three_stages(
    text: str,
    block: Callable[[int, int, int], nn.Module],
    blocks: Sequence[int],
    ends: tuple[str, str],
) -> Architecture:
    """`ends` are the names of a block's last BatchNorm and ReLU."""
    norm, relu = ends
    return Architecture(
        partial(ThreeStages, block=block, blocks=blocks),
        activated_stages(blocks, relu, norm),
        block_paths(blocks),
        description=text,
    )
