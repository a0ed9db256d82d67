"""Images and labels from parquet files in the layout of the Hugging Face hub."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from potstill.data.cache import Decoded, Pixels, stacked
from potstill.errors import StorageError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label")
ROWS = 1024
"""Encoded images that are in memory at once."""


class _File(NamedTuple):
    path: Path
    content: Any
    """pyarrow's ParquetFile."""
    images: str
    """Name of the column."""
    labels: list[int]
    names: list[str] | None


def read_parquet(files: Sequence[Path]) -> Decoded:
    """Images of one size and labels of one split, RGB.

    The image column is a struct with encoded `bytes`; class names come from the hub's metadata in
    the schema, or are the ids as text. Raises StorageError naming the file that is damaged.
    """
    opened = [_open(path) for path in files]
    labels = [label for file in opened for label in file.labels]
    if not labels:
        raise StorageError(f"no image in {[str(p) for p in files]}")
    names = opened[-1].names
    if names is None:
        names = [str(c) for c in range(max(labels) + 1)]
    images = (image for file in opened for image in _images(file))
    return Decoded(stacked(images, len(labels)), torch.tensor(labels), names)


def _open(path: Path) -> _File:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = pq.ParquetFile(path)
        schema = content.schema_arrow
        image = next((c for c in IMAGE_COLUMNS if c in schema.names), None)
        label = next((c for c in LABEL_COLUMNS if c in schema.names), None)
        if image is None or label is None:
            raise StorageError(
                f"'{path}' has columns {schema.names}; needed: one of {list(IMAGE_COLUMNS)} and "
                f"one of {list(LABEL_COLUMNS)}"
            )
        labels = content.read([label])[label].to_pylist()
    except (OSError, pa.ArrowException) as fault:
        raise _unreadable(path, fault) from fault
    if any(not isinstance(c, int) for c in labels):
        raise StorageError(f"'{path}': column '{label}' must hold a whole number in every row")
    hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = hub.get("info", {}).get("features", {}).get(label, {})
    names = feature.get("names")
    top = max(labels, default=-1)
    if min(labels, default=0) < 0 or (names is not None and top >= len(names)):
        raise StorageError(
            f"'{path}': labels run from {min(labels)} to {top}, and the file names "
            f"{'no classes' if names is None else f'{len(names)} classes'}"
        )
    return _File(path, content, image, labels, None if names is None else [str(n) for n in names])


def _images(file: _File) -> Iterator[tuple[str, Pixels]]:
    """Every row's name in an error, and its image."""
    import pyarrow as pa

    row = 0
    batches = file.content.iter_batches(ROWS, columns=[file.images])
    while True:
        try:
            if (batch := next(batches, None)) is None:
                return
            cells = batch.column(0)
            encoded = (
                cells.field("bytes") if pa.types.is_struct(cells.type) else cells
            ).to_pylist()
        except (OSError, pa.ArrowException, KeyError) as fault:
            raise _unreadable(file.path, fault) from fault
        for data in encoded:
            yield f"'{file.path}', row {row}", _decode(data, file.path, row)
            row += 1


def _unreadable(path: Path, fault: Exception) -> StorageError:
    return StorageError(f"'{path}' is truncated or not parquet ({fault}); fetch it again")


def _decode(data: bytes | None, path: Path, row: int) -> Pixels:
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(data or b"")).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise StorageError(f"'{path}', row {row}: the image cannot be decoded ({fault})") from fault
