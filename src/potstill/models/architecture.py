"""What is known of a family of networks beside its layers: taps, norms, blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

Kind = Literal["raw", "pre", "post"]


class Tap(NamedTuple):
    """A named place in a network."""

    place: str
    """As `Net` reads it: "layer3", "layer3.2.relu2:in"."""
    kind: Kind
    """"post": after a ReLU, never negative. "pre": what a ReLU is about to see. "raw": neither, a
    sum or a normalised convolution that goes on without one."""
    norm: str | None = None
    """Path of the BatchNorm right before the ReLU that follows, where one is right there."""


@dataclass(frozen=True)
class Architecture:
    """How a network is built, and its anatomy.

    `build(num_classes, (channels, height, width))` gives a new module with its published
    initialisation. Canonical taps, in forward order: `stem`; `stage1`.. where the literature reads
    them; `stage1:pre` and `stage1:post` before and after the activation, where these exist beside
    it; `last`, the map that becomes the vector; `embed`, the vector that the classifier reads.
    """

    build: Callable[[int, Sequence[int]], nn.Module]
    taps: Mapping[str, Tap]
    blocks: tuple[str, ...]
    """Paths of the blocks that a stochastic depth may skip, in forward order."""
    input_shape: tuple[int, int, int] = (3, 32, 32)
    description: str = ""

    @property
    def places(self) -> dict[str, str]:
        """Taps as `Net` takes them."""
        return {name: tap.place for name, tap in self.taps.items()}

    @property
    def norms(self) -> dict[str, str]:
        """By tap, the BatchNorm right before the ReLU that follows."""
        return {name: tap.norm for name, tap in self.taps.items() if tap.norm is not None}


def he_fan_out_(network: nn.Module) -> None:
    """Convolutions normal with std sqrt(2 / (k k C_out)): He et al., ICCV 2015, eq. (14)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
