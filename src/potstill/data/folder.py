"""Folders of images, one folder a class: small ones resident, others decoded as they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from potstill.data.cache import Decoded, cached, key_of, stacked
from potstill.data.loader import fetched
from potstill.data.split import Chunk, ImageSet
from potstill.errors import DataError, StorageError

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SMALL = 96
"""Pixels: images of one size up to this, on both sides, are kept resident."""
ROOM = 10**9
"""Bytes: a larger set is never kept resident."""
AREA = (0.08, 1.0)
"""Share of the image that a training view shows."""
RATIO = (3 / 4, 4 / 3)
"""Width / height of that part."""
ANNOTATIONS = "val_annotations.txt"
"""Where Tiny-ImageNet's validation folder says the classes of its images."""


@dataclass(frozen=True)
class Listing:
    """The image files of one split."""

    paths: list[Path]
    labels: list[int]
    names: list[str]


class FolderSet(ImageSet):
    """Image files, decoded batch by batch.

    A view is a seed of its own: of a random resized crop and a mirroring. View 0 is the clean one:
    the shorter side at image_size * 256 / 224, then the centre.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        flip: bool = True,
        views: int | None = None,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if image_size < 1:
            raise DataError(f"data.image_size is {image_size}; give 1 or more pixels")
        if workers is not None and workers < 0:
            raise DataError(f"data.workers is {workers}; give 0 or more processes")
        shape = (3, image_size, image_size)
        super().__init__(len(paths), shape, range(1, 2**62), 0, mean, std, views, device)
        self.paths = list(paths)
        self.flip = flip
        self.workers = min(4, _cores()) if workers is None else workers
        spread = torch.tensor(std, device=self.device)
        self._scale = 1 / (255 * spread)
        self._shift = -torch.tensor(mean, device=self.device) / spread

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The files by name, size and time of change, how views are made, and normalisation.

        Raises StorageError for a file that is not there any more.
        """
        import PIL

        total = hashlib.sha256()
        for path in self.paths:
            try:
                known = path.stat()
            except OSError as fault:
                raise StorageError(f"cannot read '{path}': {fault.strerror}") from fault
            name = "/".join(path.parts[-2:])  # class and file: a folder that is moved is the same
            total.update(f"{name}\x1f{known.st_size}\x1f{known.st_mtime_ns}\x1f".encode())
        views = {"size": self.input_shape[1], "flip": self.flip}
        scale = {"mean": list(self.mean), "std": list(self.std)}
        # which decode and resize, and draw the crops
        by = {"pillow": PIL.__version__, "numpy": np.__version__}
        return {"files": total.hexdigest(), **views, **scale, **by}

    def load(self, chunks: Iterable[Chunk]) -> Iterator[Tensor]:
        """The images of each chunk. (B,), (B,) -> (B, 3, S, S) float32, channels_last"""
        pin = self.device.type == "cuda"
        for pixels in fetched(self._fetch, chunks, self.workers, pin):
            on_device = pixels.to(self.device, non_blocking=True).float()
            yield torch.addcmul(self._shift, on_device, self._scale).permute(0, 3, 1, 2)

    def _fetch(self, indices: list[int], views: list[int]) -> Tensor:
        size = self.input_shape[1]
        pixels = np.empty((len(indices), size, size, 3), np.uint8)
        for row, (index, view) in enumerate(zip(indices, views, strict=True)):
            pixels[row] = shown(read_rgb(self.paths[index]), view, size, self.flip)
        return torch.from_numpy(pixels)


def shown(image: Image.Image, view: int, size: int, flip: bool) -> np.ndarray[Any, Any]:
    """What a view shows of an image. -> (size, size, 3) uint8"""
    from PIL import Image as pil

    w, h = image.size
    if view == 0:
        scale = size * 256 / 224 / min(w, h)
        side = size / scale
        x, y, mirrored = (w - side) / 2, (h - side) / 2, False
        wide = high = side
    else:
        rng = np.random.Generator(np.random.Philox(key=view))
        x, y, wide, high = _crop(w, h, rng)
        mirrored = flip and bool(rng.integers(2))
    part = image.resize((size, size), pil.Resampling.BILINEAR, box=(x, y, x + wide, y + high))
    pixels = np.asarray(part)
    return pixels[:, ::-1] if mirrored else pixels


def _crop(w: int, h: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, width and height of a random part of the image, as torchvision draws it."""
    for _ in range(10):
        area = w * h * rng.uniform(*AREA)
        ratio = np.exp(rng.uniform(*np.log(RATIO)))
        wide, high = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < wide <= w and 0 < high <= h:
            return (int(rng.integers(w - wide + 1)), int(rng.integers(h - high + 1)), wide, high)
    # a very long image: its centre, as near to square as the ratios allow
    wide, high = min(w, round(h * RATIO[1])), min(h, round(w / RATIO[0]))
    return (w - wide) // 2, (h - high) // 2, wide, high


def read_rgb(path: Path) -> Image.Image:
    """A decoded image in RGB; StorageError naming the file where that fails."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise StorageError(
                    f"'{path}' has more than 8 bits a channel (mode {image.mode}); "
                    "convert it to 8 bits"
                )
            if "transparency" in image.info:  # Pillow warns about palettes with it, else
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise StorageError(f"'{path}' cannot be read as an image ({fault})") from fault


def listing(folder: Path) -> Listing:
    """Every image below each class folder, by sorted name; class ids by sorted folder name.

    Also reads Tiny-ImageNet's validation folder, see `annotated`. Raises DataError for a folder
    without classes and a class without images.
    """
    if has_annotations(folder):
        return annotated(folder)
    paths, labels = [], []
    classes = _subfolders(folder)
    for label, within in enumerate(classes):
        found = sorted(p for p in within.rglob("*") if p.suffix.lower() in ENDINGS)
        if not found:
            raise DataError(
                f"class folder '{within}' holds no image ({', '.join(ENDINGS)}); fill or remove it"
            )
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataError(f"'{folder}' has no class folders; expected '{folder}/<class>/<image>'")
    return Listing(paths, labels, [c.name for c in classes])


def has_annotations(folder: Path) -> bool:
    """Whether Tiny-ImageNet's annotations say the classes of the images in `images/`.

    They do not where those were moved into class folders, which leaves the file behind.
    """
    if not (folder / ANNOTATIONS).is_file():
        return False
    filled = [f.name for f in _subfolders(folder) if any(f.iterdir())]
    return "images" in filled or not filled


def annotated(folder: Path, known: Collection[str] | None = None) -> Listing:
    """The images that Tiny-ImageNet's `val_annotations.txt` lists, by sorted file name.

    Raises, naming the line, StorageError where it is malformed or its image is not there, and
    DataError where its class is not among the `known` ones, if given.
    """
    path, images = folder / ANNOTATIONS, folder / "images"
    there = {p.name for p in images.iterdir()} if images.is_dir() else set()
    rows: dict[str, str] = {}
    for number, fields in tab_rows(path):
        if len(fields) < 2 or not all(fields[:2]):
            raise StorageError(
                f"'{path}', line {number}: expected an image's file, its class and its box, "
                f"between tabs; found '{' '.join(fields)[:60]}'. Unzip the data again"
            )
        file, name = fields[:2]
        if file in rows:
            raise StorageError(
                f"'{path}', line {number}: '{file}' has a class already; remove one of its lines"
            )
        if file not in there:
            raise StorageError(
                f"'{path}', line {number}: no image '{images / file}'; unzip the data again, or "
                "remove the line"
            )
        if known is not None and name not in known:
            raise DataError(
                f"'{path}', line {number}: '{name}' is none of the {len(known)} training classes; "
                "correct it, or unzip the data again"
            )
        rows[file] = name
    if not rows:
        raise StorageError(f"'{path}' lists no image; unzip the data again")
    names = sorted(set(rows.values()))
    rank = {name: label for label, name in enumerate(names)}
    return Listing(
        [images / file for file in sorted(rows)], [rank[rows[f]] for f in sorted(rows)], names
    )


def tab_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number, from 1, and the fields of every line of a text file that is not blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise StorageError(f"cannot read '{path}' as text ({fault})") from fault
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, [field.strip() for field in line.split("\t")]


def listings(root: Path) -> dict[str, Listing]:
    """The splits below a root: "train", "test", and "validation" where both kinds exist.

    The test set is in `test`, `val` or `validation`. Raises StorageError for a folder that is not
    there and DataError where test and training classes differ.
    """
    if not (root / "train").is_dir():
        raise StorageError(f"no folder '{root / 'train'}'; expected train/<class>/<image> there")
    held = [root / n for n in ("test", "val", "validation") if _labelled(root / n)]
    if not held:
        raise StorageError(
            f"no folder of test images below '{root}'; expected test/, val/ or validation/ with "
            "<class>/<image> in it"
        )
    found = dict(zip(("train", "test", "validation"), (root / "train", *held), strict=False))
    splits = {part: listing(folder) for part, folder in found.items()}
    for part, folder in found.items():
        same_classes(found["train"], splits["train"].names, folder, splits[part].names)
    return splits


def same_classes(train: Path, names: Sequence[str], held: Path, others: Sequence[str]) -> None:
    """DataError where the classes of a folder of test images are not those of the training one."""
    if differing := sorted({*names} ^ {*others}):
        raise DataError(
            f"'{train}' and '{held}' must have the same class folders; only one of them has "
            f"{differing[:5]}{' ...' if len(differing) > 5 else ''}"
        )


def common_size(paths: Sequence[Path], image_size: int | None = None) -> tuple[int, int] | None:
    """(height, width) of all images where they are of one small size, else None.

    Also None where `image_size` is given and is not that size.
    """
    from PIL import Image

    first: tuple[int, int] | None = None
    for path in paths:
        try:
            with Image.open(path) as image:
                w, h = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
            raise StorageError(f"'{path}' cannot be read as an image ({fault})") from fault
        first = first or (h, w)
        wanted = first if image_size is None else (image_size, image_size)
        if (h, w) != wanted or max(h, w) > SMALL or 3 * h * w * len(paths) > ROOM:
            return None
    return first


def decoded(split: Listing, root: Path) -> Decoded:
    """All images of a split, of one size, from the cache or decoded now."""

    def decode() -> Decoded:
        images = ((f"'{path}'", np.asarray(read_rgb(path))) for path in split.paths)
        pixels = stacked(images, len(split.paths))
        return Decoded(pixels, torch.tensor(split.labels), split.names)

    files = [p.relative_to(root).as_posix() for p in split.paths]
    # annotations can be corrected without a change of any image or its path
    classes = [split.names[c] for c in split.labels]
    return cached(f"folder-{key_of(split.paths, *files, *classes)}", decode)


def _labelled(folder: Path) -> bool:
    """Whether a folder has class folders; Tiny-ImageNet's test/images are not labelled."""
    if not folder.is_dir():
        return False
    return (folder / ANNOTATIONS).is_file() or (
        [f.name for f in _subfolders(folder)] not in ([], ["images"])
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
