"""How one output of a teacher becomes bytes and is itself again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from potstill.errors import MethodError
from potstill.teacher_store.rows import Bytes


class Value(Protocol):
    """One output, of one image as of many."""

    @property
    def dtype(self) -> torch.dtype:
        """Of a number as it is kept."""

    @property
    def bytes(self) -> int:
        """Of one image."""

    @property
    def identity(self) -> dict[str, Any]:
        """What bytes mean: two that are equal read each other's."""

    def encode(self, x: Tensor) -> Bytes:
        """(n, ...) -> (n, bytes)"""

    def decode(self, rows: Bytes, device: torch.device) -> Tensor:
        """(n, bytes) -> (n, ...)"""


@dataclass(frozen=True)
class Whole:
    """Every number, in one type. A map is kept pixel by pixel where the network computes it so."""

    name: str
    """For messages."""
    shape: tuple[int, ...]
    """Of one image."""
    dtype: torch.dtype
    channels_last: bool

    @property
    def bytes(self) -> int:
        """Of one image."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def identity(self) -> dict[str, Any]:
        """What bytes mean: two that are equal read each other's."""
        layout = "channels_last" if self._last else "contiguous"
        return {"shape": list(self.shape), "type": _name(self.dtype), "layout": layout}

    @property
    def _last(self) -> bool:
        return self.channels_last and len(self.shape) == 3

    def encode(self, x: Tensor) -> Bytes:
        """(n, ...) -> (n, bytes). Raises MethodError for a number too large for the type."""
        small = _rounded(x, self.dtype, self.name)
        return _bytes(small.permute(0, 2, 3, 1) if self._last else small)

    def decode(self, rows: Bytes, device: torch.device) -> Tensor:
        """(n, bytes) -> (n, ...) in the type that is kept."""
        shape = (*self.shape[1:], self.shape[0]) if self._last else self.shape
        x = torch.from_numpy(rows).view(self.dtype).view(len(rows), *shape)
        return (x.permute(0, 3, 1, 2) if self._last else x).to(device, non_blocking=True)


@dataclass(frozen=True)
class TopK:
    """The k highest logits as they are; of all others the logarithm of their mean exponential.

    A softmax at temperature 1 then has the k highest probabilities and the remaining mass as they
    were, the mass spread evenly; at other temperatures it is close.
    """

    k: int
    classes: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one image."""
        return self.k * (self.dtype.itemsize + self._place.itemsize) + 4

    @property
    def identity(self) -> dict[str, Any]:
        """What bytes mean: two that are equal read each other's."""
        return {"classes": self.classes, "type": _name(self.dtype), "top_k": self.k}

    @property
    def _place(self) -> torch.dtype:
        return torch.int16 if self.classes <= 2**15 else torch.int32

    def encode(self, x: Tensor) -> Bytes:
        """(n, classes) -> (n, bytes). Raises MethodError for a number too large for the type."""
        top = x.float().topk(self.k, dim=1)
        rest = x.float().scatter(1, top.indices, -math.inf)
        level = rest.logsumexp(1, keepdim=True) - math.log(self.classes - self.k)
        parts = (_rounded(top.values, self.dtype, "logits"), top.indices.to(self._place), level)
        return _bytes(torch.cat([p.contiguous().view(torch.uint8) for p in parts], dim=1))

    def decode(self, rows: Bytes, device: torch.device) -> Tensor:
        """(n, bytes) -> (n, classes), float32"""
        sizes = [self.k * self.dtype.itemsize, self.k * self._place.itemsize, 4]
        # of one image a part is called contiguous although its row is as long as the whole
        parts = [
            p.clone(memory_format=torch.contiguous_format)
            for p in torch.split(torch.from_numpy(rows), sizes, dim=1)
        ]
        values, places, level = (
            p.view(t) for p, t in zip(parts, (self.dtype, self._place, torch.float32), strict=True)
        )
        logits: Tensor = level.repeat(1, self.classes).scatter(1, places.long(), values.float())
        return logits.to(device, non_blocking=True)


def kept_in(x: Tensor, bits: int, precision: str | None) -> torch.dtype:
    """The type that an output is kept in: its own where that has as few bits.

    What a network computed in bfloat16, the `precision` of its training, may have been made float32
    since, for the losses.
    """
    if bits == 32 or x.dtype in (torch.bfloat16, torch.float16):
        return x.dtype
    whole = precision == "bfloat16" and torch.equal(x, x.bfloat16().to(x.dtype))
    return torch.bfloat16 if whole else torch.float16


def _rounded(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """In that type. Raises MethodError for a number that float16 cannot hold."""
    small = x.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(small).all():
        if not torch.isfinite(x).all():
            raise MethodError(f"the teacher's '{name}' has numbers that are not finite")
        raise MethodError(
            f"the teacher's '{name}' has numbers up to {x.abs().max().item():.3g}, and "
            "the largest in 16 bits is 65504; set store.bits=32"
        )
    return small


def _bytes(x: Tensor) -> Bytes:
    return x.contiguous().view(len(x), -1).view(torch.uint8).cpu().numpy()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
