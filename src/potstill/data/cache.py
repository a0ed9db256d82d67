"""Decoded sets, kept on disk by the hash of what they were decoded from.

A damaged entry is rebuilt without a word; a folder that cannot be written costs a warning, once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.errors import StorageError

DECODER = "1"
"""Part of every entry's name: raise it when decoding changes what it gives."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_warned = False


@dataclass(frozen=True)
class Decoded:
    """A set of images of one size, decoded."""

    pixels: Tensor
    """(N, H, W, C) uint8."""
    labels: Tensor
    """(N,) int64, original class ids."""
    names: list[str]
    """Name of each class id."""


def stacked(images: Iterable[tuple[str, Pixels]], count: int) -> Tensor:
    """Decoded images in one tensor, filled as they come. -> (N, H, W, C) uint8

    Each comes with what an error calls it; StorageError where its size is not the first one's.
    """
    pixels: Pixels | None = None
    for row, (source, image) in zip(range(count), images, strict=True):
        if pixels is None:
            # no list and stack: that holds everything twice, 2.5 GB for Tiny-ImageNet
            pixels = np.empty((count, *image.shape), np.uint8)
        if image.shape != pixels.shape[1:]:
            (h, w, _), (first_h, first_w, _) = image.shape, pixels.shape[1:]
            raise StorageError(
                f"{source}: the image is {h}x{w}, the first one is {first_h}x{first_w}; all must "
                "have one size"
            )
        pixels[row] = image
    if pixels is None:
        raise StorageError("there is no image to decode")
    return torch.from_numpy(pixels)


def cached(key: str, decode: Callable[[], Decoded]) -> Decoded:
    """The set stored under `key`, or else decoded now and stored."""
    entry = cache_folder() / f"{key}.safetensors"
    found = _read(entry)
    if found is None:
        found = decode()
        try:
            _write(entry, found)
        except OSError as fault:
            _warn_once(entry.parent, fault)
    return found


def cache_folder() -> Path:
    """Where decoded sets are kept: POTSTILL_CACHE, by default ~/.cache/potstill."""
    return Path(os.environ.get("POTSTILL_CACHE") or "~/.cache/potstill").expanduser()


def key_of(files: Iterable[Path], *more: str) -> str:
    """SHA-256, in hex, of the files' contents in order and of what else decides the result."""
    total = hashlib.sha256("\x1f".join((DECODER, *more)).encode())
    for path in files:
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as fault:
            raise StorageError(f"cannot read '{path}': {fault.strerror}") from fault
    return total.hexdigest()


def _checksum(found: Decoded) -> str:
    total = hashlib.sha256(json.dumps([found.names, list(found.pixels.shape)]).encode())
    total.update(found.pixels.numpy().data)
    total.update(found.labels.numpy().data)
    return total.hexdigest()


def _read(entry: Path) -> Decoded | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(entry, framework="pt") as file:
            stored = file.metadata() or {}
            found = Decoded(
                file.get_tensor("pixels"), file.get_tensor("labels"), json.loads(stored["names"])
            )
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return found if stored.get("sha256") == _checksum(found) else None


def _write(entry: Path, found: Decoded) -> None:
    from safetensors.torch import save_file

    entry.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=entry.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(
            {"pixels": found.pixels, "labels": found.labels},
            temporary,
            {"names": json.dumps(found.names), "sha256": _checksum(found)},
        )
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, entry)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _warn_once(folder: Path, fault: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"decoded images cannot be kept in '{folder}' ({fault}), so each run decodes them "
            "again; set POTSTILL_CACHE to a folder that can be written",
            stacklevel=2,
        )
