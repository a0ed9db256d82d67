"""Stochastic depth: residual blocks of which only some are run, other ones in every batch.

Huang, Sun, Liu, Sedra, Weinberger, Deep Networks with Stochastic Depth, ECCV 2016,
arXiv:1603.09382. What a network needs to be drawn from; `potstill.stochastic` makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill import distributed
from potstill.batchnorm import batch_statistics

Draw = Literal["batch", "image", "never"]


def linear_decay(blocks: int, p_end: float) -> list[float]:
    """Survival probability of block l = 1..L: p_l = 1 - l / L * (1 - p_end).

    Huang et al., arXiv:1603.09382, eq. (4); l counts through the whole network.

    >>> [round(p, 4) for p in linear_decay(3, 0.5)]
    [0.8333, 0.6667, 0.5]
    """
    return [1 - block / blocks * (1 - p_end) for block in range(1, blocks + 1)]


class Depth:
    """Which blocks of one network are alive; the blocks share it.

    Within `sampling` those that were drawn, each at its full strength. At all other times every
    block is, its branch times its survival probability: the expected depth, at which a network is
    evaluated.
    """

    def __init__(
        self,
        survival: Sequence[float],
        draw: Draw = "batch",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.survival = tuple(survival)
        """p_l of every block of the network, 1 for those that are always there."""
        self.draw = draw
        self.settings = dict(settings or {})
        """The arguments that `potstill.stochastic` made the network with."""
        self._seed: int | None = None
        self._fates: Sequence[float | Tensor] | None = None

    def seed(self, seed: int | None) -> None:
        """Where the next draws come from, the same one every time; None for torch's generator."""
        self._seed = seed

    def drawn(self, images: int) -> Tensor:
        """Who is alive for a batch. (L,) bool, or (images, L) where each image has its own draw."""
        generator = None if self._seed is None else torch.Generator().manual_seed(self._seed)
        size = (images, len(self.survival)) if self.draw == "image" else (len(self.survival),)
        survival = torch.tensor(self.survival, device="cpu")
        return torch.rand(size, generator=generator, device="cpu") < survival

    def sampling(self, images: int, device: torch.device) -> AbstractContextManager[None]:
        """Within, the network is a sub-network, drawn for this rank's `images`."""
        alive = self.drawn(images * distributed.world_size())
        if self.draw != "image":
            return self._decided([float(a) for a in alive.tolist()])
        alive = distributed.local(alive)
        counts = alive.sum(0).tolist()
        rows = alive.T.nonzero()[:, 1].to(device)  # at once: a copy to a GPU waits for it
        parts = zip(counts, torch.split(rows, counts), strict=True)
        return self._decided([part if 0 < n < images else float(n > 0) for n, part in parts])

    def without(self) -> AbstractContextManager[None]:
        """Within, every block is skipped that ever is."""
        return self._decided([float(p == 1) for p in self.survival])

    @contextmanager
    def _decided(self, fates: Sequence[float | Tensor]) -> Iterator[None]:
        self._fates = fates
        try:
            yield
        finally:
            self._fates = None

    def fate(self, block: int) -> float | Tensor:
        """What a branch is multiplied by, or the rows of the batch it is for. () or (n,) int64"""
        return self.survival[block] if self._fates is None else self._fates[block]


class ResidualBlock(nn.Module):
    """A block whose branch a stochastic depth may skip: base of every block with a shortcut.

    A subclass writes `self.join(self.branch, x, shortcut)` for `self.branch(x) + shortcut`, and
    whatever follows on the sum after it.
    """

    depth: Depth | None = None
    number: int = 0
    """Which of the network's blocks this is, from 0 on."""

    def join(
        self,
        branch: Callable[[Tensor], Tensor],
        x: Tensor,
        shortcut: Tensor,
        opening: Sequence[nn.Module] = (),
    ) -> Tensor:
        """branch(x) + shortcut, as far as the branch is alive.

        A branch that is not is not run, and moves no BatchNorm average. `opening` are the layers it
        begins with, where these activate what comes in: their taps are seen all the same.
        """
        fate = 1.0 if self.depth is None else self.depth.fate(self.number)
        if isinstance(fate, Tensor):
            self._show(x, opening)  # first: taps keep the first of two calls
            rows = branch(x[fate])
            dtype = torch.promote_types(rows.dtype, shortcut.dtype)
            total = shortcut.to(dtype, copy=True)  # written into, so that it stays channels_last
            total[fate] = total[fate] + rows
            return total
        if fate == 1:
            return branch(x) + shortcut
        if fate == 0:
            self._show(x, opening)
            return shortcut
        return branch(x) * fate + shortcut

    def _show(self, x: Tensor, opening: Sequence[nn.Module]) -> None:
        """Run the opening layers for the taps on them, if there are any; changes no average."""
        if not any(layer._forward_hooks or layer._forward_pre_hooks for layer in opening):
            return
        with batch_statistics(self) if self.training else nullcontext():
            for layer in opening:
                x = layer(x)

    @property
    def survival(self) -> float:
        """Probability that the branch is alive."""
        return 1.0 if self.depth is None else self.depth.survival[self.number]

    def extra_repr(self) -> str:
        return "" if self.depth is None else f"survival={self.survival:.4g}"


def settings_of(module: nn.Module) -> Mapping[str, Any] | None:
    """The arguments that `potstill.stochastic` made a module with; None for a plain one."""
    blocks = (m for m in module.modules() if isinstance(m, ResidualBlock))
    return next((block.depth.settings for block in blocks if block.depth is not None), None)
