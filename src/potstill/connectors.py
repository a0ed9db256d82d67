"""Layers that carry a student's feature map to the teacher's width."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from potstill.method import Outputs


@dataclass(frozen=True, eq=False)
class Connected(Outputs):
    """What a method's forward gives whose student features go through layers of its own."""

    mapped: Sequence[Tensor]
    """The student's features as those layers give them, float32."""


def connector(channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution without bias, then BatchNorm. (B, C, H, W) -> (B, D, H, W)

    The convolution is normal with std sqrt(2 / D), as in the published code of OFD, SRRL and SAKD.
    It is there for equal widths too. C * D + 2 D parameters.
    """
    conv = nn.Conv2d(channels, out_channels, 1, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / out_channels))
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))
