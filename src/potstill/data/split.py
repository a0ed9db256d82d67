"""A stored set of images, a window on it, and the batches that a training reads from it.

An image set turns (index, view) into pixels, always the same ones. A split chooses which images of
the set one task trains or tests on, and yields batches in any order, from any step, for any rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.distributed import rank, world_size
from potstill.errors import DataError
from potstill.method import Batch
from potstill.seeds import seed_of

Chunk = tuple[Tensor, Tensor]
"""(indices, views), both (B,) int64: what one batch is made of."""


class ImageSet(ABC):
    """A whole stored set: (index, view) determines the pixels.

    `views` limits each image to a pool of that many view codes. The pool belongs to the position in
    the whole set, so neither the run's seed nor a subset changes it; None draws from all codes.
    """

    def __init__(
        self,
        size: int,
        input_shape: tuple[int, int, int],
        codes: range,
        clean_view: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        views: int | None,
        device: torch.device | str,
    ) -> None:
        if views is not None and views < 1:
            raise DataError(f"data.views is {views}; give 1 or more, or null for fresh views")
        channels = input_shape[0]
        for key, given in (("mean", mean), ("std", std)):
            if len(given) != channels:
                raise DataError(
                    f"data.{key} has {len(given)} values, the images have {channels} channels; "
                    "give one per channel, in units of pixel / 255"
                )
        if min(std) <= 0:
            raise DataError(f"data.std is {list(std)}; every value must be above 0")
        self.size = size
        self.input_shape = input_shape
        self.codes = codes
        self.clean_view = clean_view
        self.mean = mean
        self.std = std
        self.device = torch.device(device)
        self.pool: Tensor | None = None
        if views is not None:
            self.pool = pool_of(size, codes, views).to(self.device)

    def __len__(self) -> int:
        return self.size

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """What determines the pixels of (index, view); equal ones have equal pixels.

        None where that cannot be known.
        """
        return None

    def draw(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """One view code for each image. (n,) -> (n,) int64, uniform over the codes or the pool."""
        low, high = (self.codes.start, self.codes.stop)
        if self.pool is not None:
            low, high = 0, self.pool.shape[1]
        drawn = torch.randint(
            low, high, (len(indices),), generator=generator, device=generator.device
        ).to(self.device)
        return drawn if self.pool is None else self.pool[indices, drawn]

    @abstractmethod
    def load(self, chunks: Iterable[Chunk]) -> Iterator[Tensor]:
        """The images of each chunk, normalised.

        (B,), (B,) -> (B, C, H, W) float32, channels_last
        """


def pool_of(size: int, codes: range, views: int) -> Tensor:
    """The view codes of each image where it has so many of them, on the CPU. -> (size, views)"""
    fixed = torch.Generator().manual_seed(seed_of("views", size, codes.start, codes.stop))
    return torch.randint(codes.start, codes.stop, (size, views), generator=fixed)


@dataclass(frozen=True)
class Split:
    """The images that one task trains or tests on: a window on a stored set."""

    images: ImageSet
    """The whole stored set."""
    indices: Tensor
    """(n,) int64, ascending positions in the whole stored set."""
    labels: Tensor
    """(n,) int64, index in the task: the rank of the original class id among the task's ids."""
    classes: list[int]
    """Original class ids, in label order."""

    def __len__(self) -> int:
        return len(self.indices)

    def window(self, classes: Sequence[int]) -> Split:
        """The images of some of its classes, original ids, labelled in the order they are given.

        Raises DataError for a class that it does not have.
        """
        place = {c: i for i, c in enumerate(self.classes)}
        if unknown := [c for c in classes if c not in place]:
            raise DataError(f"there is no class {unknown[0]} among the {len(place)} here")
        label = torch.full((len(place),), -1)
        label[[place[c] for c in classes]] = torch.arange(len(classes))
        labels = label.to(self.labels.device)[self.labels]
        kept = labels >= 0
        return Split(self.images, self.indices[kept], labels[kept], list(classes))

    def first(self, n: int) -> Split:
        """The first n images, or all where there are fewer."""
        return Split(self.images, self.indices[:n], self.labels[:n], self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.images.input_shape

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, in units of pixel / 255."""
        return self.images.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, in units of pixel / 255."""
        return self.images.std

    def batches(
        self,
        positions: Tensor,
        generator: torch.Generator,
        batch_size: int,
        start: int = 0,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """This rank's share of batches `start`, `start` + 1, ... of one epoch.

        `positions`, (m,) int64, index this split in training order. Views of all its images are
        drawn from `generator` at once, before this returns, so an image's view depends on the
        generator's seed and not on the order, and step k can be re-entered. `batch_size` is
        summed over ranks.
        """
        views = self.images.draw(self.indices, generator)
        spans = shares(len(positions), batch_size, start, drop_last, rank(), world_size())
        return self._read(positions.to(self.images.device), views, spans)

    def clean(self, batch_size: int, sharded: bool = False) -> Iterator[Batch]:
        """Every image once, in index order, in its centre view; `sharded`: this rank's share."""
        views = torch.full_like(self.indices, self.images.clean_view)
        r, world = (rank(), world_size()) if sharded else (0, 1)
        positions = torch.arange(len(self), device=self.images.device)
        return self._read(positions, views, shares(len(self), batch_size, 0, False, r, world))

    def _read(self, positions: Tensor, views: Tensor, spans: list[slice]) -> Iterator[Batch]:
        parts = [positions[span] for span in spans]
        chunks = ((self.indices[at], views[at]) for at in parts)
        for at, image in zip(parts, self.images.load(chunks), strict=True):
            yield Batch(image, self.labels[at], self.indices[at], views[at])


@dataclass(frozen=True)
class Data:
    """A data set ready to train and test on."""

    train: Split
    test: Split
    validation: Split | None
    class_names: list[str]
    """Names of the task's classes, in label order."""
    name: str
    whole_test: Split
    """The test images of every class of the set; a label is the original id."""
    every_name: list[str]
    """Names of all those classes, by original id."""
    overlap: float | None = None
    """Share of the classes that the first task has, where the task was chosen by it."""


def steps(m: int, batch_size: int, drop_last: bool = False) -> int:
    """Batches in an epoch of `m` images; DataError where there would be none."""
    if batch_size < 1:
        raise DataError(f"data.batch_size is {batch_size}; give 1 or more")
    count = m // batch_size if drop_last else -(-m // batch_size)
    if not count:
        raise DataError(
            f"data.batch_size is {batch_size} and an epoch has {m} images, so not one whole batch; "
            "lower it or set data.drop_last=false"
        )
    return count


def shares(
    m: int, batch_size: int, start: int, drop_last: bool, rank: int, world: int
) -> list[slice]:
    """Rank `rank`'s contiguous share of each global batch, from batch `start` on."""
    spans = []
    for step in range(start, steps(m, batch_size, drop_last)):
        low = step * batch_size
        b = min(batch_size, m - low)
        spans.append(slice(low + rank * b // world, low + (rank + 1) * b // world))
    return spans
