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
    """Paths of the blocks that a stochastic depth counts, in forward order."""
    input_shape: tuple[int, int, int] = (3, 32, 32)
    description: str = ""
    block_ends: tuple[str, ...] | None = None
    """Where each block's output is seen after its ReLU; None where that is the block's output."""

    @property
    def places(self) -> dict[str, str]:
        """Taps as `Net` takes them."""
        return {name: tap.place for name, tap in self.taps.items()}

    @property
    def norms(self) -> dict[str, str]:
        """By tap, the BatchNorm right before the ReLU that follows."""
        return {name: tap.norm for name, tap in self.taps.items() if tap.norm is not None}


def block_paths(blocks: Sequence[int]) -> tuple[str, ...]:
    """Paths of all blocks, so many in each stage: layer1.0, layer1.1, ..., layer2.0, ..."""
    return tuple(f"layer{i}.{j}" for i, n in enumerate(blocks, start=1) for j in range(n))


def activated_stages(
    blocks: Sequence[int],
    relu: str,
    norm: str | None,
    stem: str | None = "relu",
    last: str = "avgpool:in",
    first: int = 1,
) -> dict[str, Tap]:
    """Taps of stages whose last block ends in a ReLU: `layer{first}` is `stage1`, and so on.

    `relu` and `norm` are the names, in that block, of the ReLU and the BatchNorm right before it.
    """
    taps = {} if stem is None else {"stem": Tap(stem, "post")}
    for i, n in enumerate(blocks):
        layer, stage = f"layer{first + i}", f"stage{i + 1}"
        block = f"{layer}.{n - 1}"
        before = None if norm is None else f"{block}.{norm}"
        taps[f"{stage}:pre"] = Tap(f"{block}.{relu}:in", "pre", before)
        taps[stage] = Tap(layer, "post")
    return taps | {"last": Tap(last, "post"), "embed": Tap("fc:in", "post")}


def he_fan_out_(network: nn.Module) -> None:
    """Convolutions normal with std sqrt(2 / (k k C_out)): He et al., ICCV 2015, eq. (14)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
