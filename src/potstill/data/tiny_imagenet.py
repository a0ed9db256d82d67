"""Tiny-ImageNet, found in any of its usual forms or fetched from the Hugging Face hub.

Y. Le and X. Yang, Tiny ImageNet Visual Recognition Challenge, Stanford CS 231N, 2015. Its test
images have no labels, so the validation images are the test set, as in the literature.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from potstill.data.cache import Decoded, cached, key_of
from potstill.data.folder import (
    ANNOTATIONS,
    ENDINGS,
    Listing,
    annotated,
    common_size,
    decoded,
    has_annotations,
    listing,
    same_classes,
    tab_rows,
)
from potstill.data.parquet import read_parquet
from potstill.data.places import Pair, find
from potstill.errors import DataError, StorageError

HUB = "zh-plus/tiny-imagenet"
ORIGINAL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
SIZE = 64
"""Pixels on each side."""
PARTS = ("valid", "validation", "val")
"""What the hub's copies call the validation images."""
LOOKED_FOR = (
    "wnids.txt, train/ and val/ (tiny-imagenet-200, unzipped), train-*.parquet and "
    "valid-*.parquet, or folders train/<class>/ and val/<class>/ of images, all of them also in "
    "folders tiny-imagenet*"
)


def tiny_imagenet(root: Path | None) -> Pair:
    """Training and validation images from `root`, else POTSTILL_DATA, else the hub.

    Class ids follow the sorted WordNet ids, which are also the names; there are as many as the
    files have. Raises StorageError, naming every place that was looked at, where none of them holds
    it or what they hold is damaged, and DataError where their classes do not agree.
    """
    return find(
        "Tiny-ImageNet",
        root,
        _reader,
        looked_for=LOOKED_FOR,
        repo=HUB,
        files="data/*",
        such_as=f", such as the unzipped {ORIGINAL}",
    )


def _reader(root: Path) -> Callable[[], Pair] | None:
    """How to read what `root` holds; None where that is not Tiny-ImageNet.

    A part of its classes, such as tiny-imagenet-50, is read where there is no whole one.
    """
    for folder in (root / "tiny-imagenet", root / "tiny-imagenet-200"):
        if (read := _form(folder)) is not None:
            return read
    parts = {f: read for f in sorted(root.glob("tiny-imagenet-*")) if (read := _form(f))}
    if len(parts) > 1:
        raise StorageError(
            f"'{root}' holds {', '.join(f.name for f in parts)}; set data.root to one of them"
        )
    return next(iter(parts.values()), None) or _form(root)


def _form(root: Path) -> Callable[[], Pair] | None:
    """How to read the set that is in this very folder, if there is one."""
    for folder in (root, root / "data"):
        train, *held = (sorted(folder.glob(f"{part}-*.parquet")) for part in ("train", *PARTS))
        test = next(filter(None, held), None)
        if train and test:
            return lambda: _parquet(train, test)
    if (root / "wnids.txt").is_file():
        return lambda: _folders(root)
    if not (root / "val").is_dir():
        return None
    levels = (root / "train").glob("*/*"), (root / "train").glob("*/images/*")
    images = (p for p in itertools.chain(*levels) if p.suffix.lower() in ENDINGS)
    first = list(itertools.islice(images, 1))
    # POTSTILL_DATA may hold other images: only 64x64 ones are Tiny-ImageNet's
    if first and common_size(first, SIZE) is not None:
        return lambda: _folders(root)
    return None


def _parquet(train: list[Path], test: list[Path]) -> Pair:
    found = _parquet_split(train), _parquet_split(test)
    names, others = (split.names for split in found)
    if names[: len(others)] != others:  # without names in the files, the last class may lack images
        raise DataError(
            f"'{train[0]}' and '{test[0]}' must name the same classes in the same order; they have "
            f"{len(names)} and {len(others)}. Take both from one copy"
        )
    return found


def _parquet_split(files: list[Path]) -> Decoded:
    return _sized(cached(f"tiny-imagenet-{key_of(files)}", lambda: read_parquet(files)), files[0])


def _folders(root: Path) -> Pair:
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise StorageError(f"no folder '{root / part}'; unzip the data again")
    train, held = listing(root / "train"), root / "val"
    _check_classes(root, train.names)
    _check_boxes(root, train)
    test = _listed(held, train.names) if has_annotations(held) else listing(held)
    same_classes(root / "train", train.names, held, test.names)
    return _sized(decoded(train, root), root), _sized(decoded(test, root), root)


def _check_classes(root: Path, names: list[str]) -> None:
    """The class folders are those that `wnids.txt`, where it is there, has a line for."""
    path = root / "wnids.txt"
    if not path.is_file():
        return
    lines = {fields[0]: number for number, fields in tab_rows(path)}
    if unknown := [name for name in names if name not in lines]:
        raise DataError(
            f"class folder '{root / 'train' / unknown[0]}' has no line in '{path}', which lists "
            f"{len(lines)} classes; move it away or add its line"
        )
    for name, number in lines.items():
        if name not in names:
            raise StorageError(
                f"'{path}', line {number}: class '{name}' has no folder '{root / 'train' / name}'; "
                "unzip the data again, or remove the line"
            )


def _check_boxes(root: Path, train: Listing) -> None:
    """No image is missing of those for which a class folder has a box, as after half an unzip."""
    there = {(label, path.name) for path, label in zip(train.paths, train.labels, strict=True)}
    for label, name in enumerate(train.names):
        path = root / "train" / name / f"{name}_boxes.txt"
        for number, (file, *_) in tab_rows(path) if path.is_file() else ():
            if (label, file) not in there:
                raise StorageError(
                    f"'{path}', line {number}: no image '{file}' in '{path.parent}'; unzip the "
                    "data again, or remove the line"
                )


def _listed(held: Path, names: list[str]) -> Listing:
    """The validation images of the official layout: every one has a line."""
    found = annotated(held, names)
    images = {p.name for p in (held / "images").iterdir() if p.suffix.lower() in ENDINGS}
    if unlisted := sorted(images - {p.name for p in found.paths}):
        raise DataError(
            f"'{held / ANNOTATIONS}' has no line for {unlisted[:5]}"
            f"{' ...' if len(unlisted) > 5 else ''} in '{held / 'images'}'; unzip the data again"
        )
    return found


def _sized(found: Decoded, source: Path) -> Decoded:
    h, w = found.pixels.shape[1:3]
    if (h, w) != (SIZE, SIZE):
        raise StorageError(f"'{source}' holds {h}x{w} images, Tiny-ImageNet has {SIZE}x{SIZE}")
    return found
