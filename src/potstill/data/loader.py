"""Batches made on demand, by worker processes or in this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from potstill.data.split import Chunk
from potstill.errors import PotstillError

Fetch = Callable[[list[int], list[int]], Tensor]
"""(indices, views) of one batch -> its images."""


def fetched(fetch: Fetch, chunks: Iterable[Chunk], workers: int, pin: bool) -> Iterator[Tensor]:
    """What `fetch` makes of each chunk, in order, made ahead by `workers` processes."""
    from torch.utils.data import DataLoader

    batches: Any = ((i.tolist(), v.tolist()) for i, v in chunks)
    loader: Any = DataLoader(
        _OnDemand(fetch),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        generator=torch.Generator(),  # else each epoch takes a number from the global generator
    )
    for made in loader:
        if isinstance(made, PotstillError):
            raise made
        yield made


class _OnDemand(torch.utils.data.Dataset[Any]):
    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch

    def __getitems__(self, chunk: tuple[list[int], list[int]]) -> Tensor | PotstillError:
        try:
            return self.fetch(*chunk)
        except PotstillError as fault:
            return fault  # raised in a worker it would arrive wrapped in a traceback


def _as_is(made: Any) -> Any:
    return made
