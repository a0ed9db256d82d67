"""Images and labels from parquet files in the layout of the Hugging Face hub."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.data.cache import Decoded
from potstill.errors import StorageError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label")


def read_parquet(files: Sequence[Path]) -> Decoded:
    """Images of one size and labels of one split, RGB.

    The image column is a struct with encoded `bytes`; class names come from the hub's metadata in
    the schema, or are the ids as text. Raises StorageError naming the file that is damaged.
    """
    pixels: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    labels: list[int] = []
    names: list[str] | None = None
    for path in files:
        images, given, names = _columns(path)
        for row, data in enumerate(images):
            pixels.append(_decode(data, path, row))
            if pixels[-1].shape != pixels[0].shape:
                h, w, _ = pixels[-1].shape
                raise StorageError(
                    f"'{path}', row {row}: the image is {h}x{w}, the first one is "
                    f"{pixels[0].shape[0]}x{pixels[0].shape[1]}; all must have one size"
                )
        labels += given
        top = max(given, default=-1)
        if min(given, default=0) < 0 or (names is not None and top >= len(names)):
            raise StorageError(
                f"'{path}': labels run from {min(given)} to {top}, and the file names "
                f"{'no classes' if names is None else f'{len(names)} classes'}"
            )
    if not pixels:
        raise StorageError(f"no image in {[str(p) for p in files]}")
    if names is None:
        names = [str(c) for c in range(max(labels) + 1)]
    return Decoded(torch.from_numpy(np.stack(pixels)), torch.tensor(labels), names)


def _columns(path: Path) -> tuple[list[bytes | None], list[int], list[str] | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        image = next((c for c in IMAGE_COLUMNS if c in schema.names), None)
        label = next((c for c in LABEL_COLUMNS if c in schema.names), None)
        if image is None or label is None:
            raise StorageError(
                f"'{path}' has columns {schema.names}; needed: one of {list(IMAGE_COLUMNS)} and "
                f"one of {list(LABEL_COLUMNS)}"
            )
        table = file.read([image, label])
        cells = table[image].combine_chunks()
        images = (cells.field("bytes") if pa.types.is_struct(cells.type) else cells).to_pylist()
        labels = table[label].to_pylist()
    except (OSError, pa.ArrowException, KeyError) as fault:
        raise StorageError(
            f"'{path}' is truncated or not parquet ({fault}); fetch it again"
        ) from fault
    if any(not isinstance(c, int) for c in labels):
        raise StorageError(f"'{path}': column '{label}' must hold a whole number in every row")
    hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = hub.get("info", {}).get("features", {}).get(label, {})
    names = feature.get("names")
    return images, labels, None if names is None else [str(n) for n in names]


def _decode(data: bytes | None, path: Path, row: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(data or b"")).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as fault:
        raise StorageError(f"'{path}', row {row}: the image cannot be decoded ({fault})") from fault
