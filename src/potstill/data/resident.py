"""A whole set on the device as bytes: crop, flip and normalise a batch in a few kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.data.split import Chunk, ImageSet
from potstill.errors import DataError

PadMode = Literal["zero", "reflect"]


class Resident(ImageSet):
    """Images of one size, kept as uint8 on the device.

    A view is a crop of the padded image at one of (2p+1)^2 offsets, mirrored or not:
    code = (flip * (2p+1) + dy) * (2p+1) + dx. The clean view is the centre, not mirrored. Zero
    padding is black: pixel 0 before normalisation.
    """

    def __init__(
        self,
        pixels: Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        padding: int = 0,
        pad_mode: PadMode = "zero",
        flip: bool = False,
        views: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`pixels` is (N, H, W, C) uint8."""
        n, h, w, c = pixels.shape
        table = view_table(h, w, padding, pad_mode, flip)
        clean = padding * (2 * padding + 1) + padding
        super().__init__(n, (c, h, w), range(len(table)), clean, mean, std, views, device)
        # The pixel after the last is black: where the table points for zero padding.
        stored = torch.empty(n, h * w + 1, c, dtype=torch.uint8, device=self.device)
        stored[:, :-1] = pixels.reshape(n, h * w, c)
        stored[:, -1] = 0
        self._stored = stored
        self.padding, self.pad_mode, self.flip = padding, pad_mode, flip
        # int32 halves the index arithmetic, which costs more than the gather itself
        self._table = table.to(self.device, torch.int32)
        spread = torch.tensor(std, device=self.device)
        # repeated per pixel: broadcasting over C = 3 does not vectorise
        self._scale = (1 / (255 * spread)).repeat(h * w)
        self._shift = (-torch.tensor(mean, device=self.device) / spread).repeat(h * w)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The pixels, how views are made of them, and the normalisation."""
        pixels = hashlib.sha256(self._stored.cpu().numpy().data).hexdigest()
        views = {"padding": self.padding, "pad_mode": self.pad_mode, "flip": self.flip}
        scale = {"mean": list(self.mean), "std": list(self.std)}
        return {"pixels": pixels, "shape": list(self.input_shape), **views, **scale}

    def pixels(self) -> Tensor:
        """All images as they are stored, on the CPU. -> (N, H, W, C) uint8"""
        c, h, w = self.input_shape
        return self._stored[:, :-1].reshape(self.size, h, w, c).cpu()

    def load(self, chunks: Iterable[Chunk]) -> Iterator[Tensor]:
        """The images of each chunk. (B,), (B,) -> (B, C, H, W) float32, channels_last"""
        c, h, w = self.input_shape
        for indices, views in chunks:
            b = len(indices)
            # Images first: offsets within a batch fit int32, offsets within the set may not.
            pixels = self._stored.index_select(0, indices).view(-1, c)
            first = torch.arange(b, dtype=torch.int32, device=self.device) * (h * w + 1)
            sources = self._table.index_select(0, views) + first[:, None]
            crop = pixels.index_select(0, sources.view(-1)).view(b, h * w * c)
            image = torch.addcmul(self._shift, crop.float(), self._scale)
            yield image.view(b, h, w, c).permute(0, 3, 1, 2)


def view_table(h: int, w: int, padding: int, pad_mode: PadMode, flip: bool) -> Tensor:
    """Source pixel of every pixel of every view. -> (views, H*W) int64; H*W stands for black.

    Raises DataError for a padding that the mode cannot make.
    """
    if padding < 0:
        raise DataError(f"data.padding is {padding}; give 0 or more pixels")
    if pad_mode not in ("zero", "reflect"):
        raise DataError(f"data.pad_mode is '{pad_mode}'; allowed: zero, reflect")
    if pad_mode == "reflect" and padding >= min(h, w):
        raise DataError(
            f"data.padding is {padding}, and reflection of {h}x{w} images reaches "
            f"{min(h, w) - 1} pixels; lower it or set data.pad_mode=zero"
        )
    source = torch.arange(h * w).view(h, w)
    y, x = (torch.arange(-padding, size + padding) for size in (h, w))
    if pad_mode == "reflect":
        y, x = ((size - 1) - (at.abs() - (size - 1)).abs() for at, size in ((y, h), (x, w)))
    inside = ((y >= 0) & (y < h))[:, None] & ((x >= 0) & (x < w))
    padded = torch.where(inside, source[y.clamp(0, h - 1)][:, x.clamp(0, w - 1)], h * w)
    crops = padded.unfold(0, h, 1).unfold(1, w, 1).reshape(-1, h, w)
    if flip:
        crops = torch.cat([crops, crops.flip(2)])
    return crops.reshape(-1, h * w)
