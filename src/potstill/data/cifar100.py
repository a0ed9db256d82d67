"""CIFAR-100, found in any of its usual forms or fetched from the Hugging Face hub.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.data.cache import Decoded, cached, key_of
from potstill.data.folder import ENDINGS, common_size, decoded, listings
from potstill.data.parquet import read_parquet
from potstill.data.places import Pair, find
from potstill.errors import StorageError

HUB = "uoft-cs/cifar100"
SIZE = 32
"""Pixels on each side."""
FEW_SHOT_ORDER = (
    # meta-training
    *(0, 1, 3, 6, 9, 10, 11, 12, 13, 16, 17, 18, 20, 22, 23, 24, 25, 28, 29, 30, 31, 33, 35, 36),
    *(37, 38, 39, 41, 43, 44, 45, 49, 50, 51, 52, 53, 54, 56, 57, 59, 61, 63, 64, 65, 66, 67, 68),
    *(72, 74, 75, 76, 78, 79, 80, 81, 82, 85, 88, 90, 91, 92, 93, 96, 97),
    # validation
    *(4, 7, 14, 15, 19, 26, 27, 32, 40, 47, 48, 55, 71, 73, 87, 89),
    # test
    *(2, 5, 8, 21, 34, 42, 46, 58, 60, 62, 69, 70, 77, 83, 84, 86, 94, 95, 98, 99),
)
"""Class ids by the parts of CIFAR-FS (Bertinetto et al., ICLR 2019, arXiv:1805.08136), ascending in
each: the order in which Ye, Lu, Zhan, TPAMI 2022, arXiv:2205.01915, cut their tasks."""
LOOKED_FOR = (
    "cifar100/train-*.parquet and test-*.parquet, cifar-100-python/{train,test,meta}, or folders "
    "train/<class>/ and test/<class>/ of images"
)


def cifar100(root: Path | None) -> Pair:
    """Training and test set from `root`, else POTSTILL_DATA, else the hub.

    Raises StorageError, naming every place that was looked at, where none of them holds it.
    """
    return find("CIFAR-100", root, _reader, looked_for=LOOKED_FOR, repo=HUB, files="cifar100/*")


def _reader(root: Path) -> Callable[[], Pair] | None:
    """How to read what `root` holds; None where that is not CIFAR-100."""
    for folder in (root / "cifar100", root):
        train, test = (sorted(folder.glob(f"{part}-*.parquet")) for part in ("train", "test"))
        if train and test:
            return lambda: (_parquet(train), _parquet(test))
    for folder in (root / "cifar-100-python", root):
        if all((folder / part).is_file() for part in ("train", "test", "meta")):
            return lambda: _pickles(folder)
    images = (p for p in (root / "train").glob("*/*") if p.suffix.lower() in ENDINGS)
    first = list(itertools.islice(images, 1))
    # POTSTILL_DATA may hold other images: only 32x32 ones are CIFAR's
    if first and common_size(first, SIZE) is not None:
        return lambda: _folders(root)
    return None


def _folders(root: Path) -> Pair:
    found = listings(root)
    return decoded(found["train"], root), decoded(found["test"], root)


def _parquet(files: list[Path]) -> Decoded:
    found = cached(f"cifar100-{key_of(files)}", lambda: read_parquet(files))
    if found.pixels.shape[1:3] != (SIZE, SIZE):
        h, w = found.pixels.shape[1:3]
        raise StorageError(f"'{files[0]}' holds {h}x{w} images, CIFAR-100 has {SIZE}x{SIZE}")
    return found


def _pickles(folder: Path) -> Pair:
    meta = _unpickle(folder / "meta")
    names = [_text(n) for n in _entry(meta, "fine_label_names", list, folder / "meta")]
    train, test = (_pickled_split(folder / part, names) for part in ("train", "test"))
    return train, test


def _pickled_split(path: Path, names: list[str]) -> Decoded:
    content = _unpickle(path)
    rows = _entry(content, "data", np.ndarray, path)
    labels = _entry(content, "fine_labels", list, path)
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3 * SIZE * SIZE:
        raise StorageError(
            f"'{path}': 'data' is {rows.dtype} {rows.shape}, expected uint8 (N, 3072)"
        )
    if len(labels) != len(rows):
        raise StorageError(f"'{path}': {len(labels)} labels for {len(rows)} images")
    if any(not isinstance(c, int) or not 0 <= c < len(names) for c in labels):
        raise StorageError(f"'{path}': labels must be whole numbers from 0 to {len(names) - 1}")
    pixels = torch.from_numpy(rows.copy()).view(-1, 3, SIZE, SIZE).permute(0, 2, 3, 1).contiguous()
    return Decoded(pixels, torch.tensor(labels), names)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _entry(content: Any, key: str, kind: type, path: Path) -> Any:
    """An entry of a pickled dict, whose keys Python 2 and 3 write as bytes or text."""
    found = None
    if isinstance(content, dict):
        found = content.get(key, content.get(key.encode()))
    if not isinstance(found, kind):
        raise StorageError(f"'{path}' has no {kind.__name__} '{key}': not a file of CIFAR-100")
    return found


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="bytes").load()
    except _Refused as fault:
        raise StorageError(
            f"'{path}' was refused: it asks for '{fault}', which would run code, and CIFAR-100 "
            "needs no more than arrays; fetch it from its authors"
        ) from None
    except Exception as fault:  # a damaged pickle can raise anything
        raise StorageError(f"'{path}' is truncated or damaged ({fault}); fetch it again") from fault


class _Refused(Exception):
    """A pickle names something other than an array."""


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds arrays and plain Python values, and looks up nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        multiarray = module in ("numpy.core.multiarray", "numpy._core.multiarray")
        if multiarray and name == "_reconstruct":
            return _empty_array
        if module == "numpy" and name == "ndarray":
            return np.ndarray
        if module == "numpy" and name == "dtype":
            return _dtype
        if module == "_codecs" and name == "encode":  # how Python 3 writes bytes at protocol 2
            return _latin1
        raise _Refused(f"{module}.{name}")


def _empty_array(subtype: type, shape: tuple[int, ...], kind: bytes) -> Any:
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _dtype(spec: str | bytes, align: int = 0, copy: int = 0) -> np.dtype[Any]:
    # old files say align=0, for which numpy 2.4 may want False
    return np.dtype(_text(spec), bool(align), bool(copy))


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")
