"""The data sets that have a name, and how one of them becomes Data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from potstill.data import splits
from potstill.data.cache import Decoded
from potstill.data.cifar100 import FEW_SHOT_ORDER, cifar100
from potstill.data.cub200 import cub200
from potstill.data.digits import MEAN, STD, digits
from potstill.data.folder import FolderSet, Listing, common_size, decoded, listings
from potstill.data.resident import PadMode, Resident
from potstill.data.split import Data
from potstill.data.task import Labelled, assemble
from potstill.data.tiny_imagenet import tiny_imagenet
from potstill.errors import DataError, did_you_mean


@dataclass(frozen=True)
class DatasetInfo:
    """One line of the registry; what `load` is not told, it takes from here."""

    description: str
    classes: int | None
    """None: as many as the files have."""
    input_shape: tuple[int, int, int] | None
    """(C, H, W); None: as the folder's images are."""
    mean: tuple[float, ...]
    """Per channel, in units of pixel / 255; likewise std."""
    std: tuple[float, ...]
    padding: int
    """Pixels on each side; only where the set is resident."""
    pad_mode: PadMode
    flip: bool
    order: Sequence[int] | None = None
    """Of the class ids, for `data.overlap`; None: ascending."""
    any_size: bool = False
    """Whether images can be read at any `data.image_size`."""


DATASETS = {
    "cifar100": DatasetInfo(
        "CIFAR-100: 50,000 training and 10,000 test images, 32x32, 100 classes",
        100,
        (3, 32, 32),
        (125.3 / 255, 123.0 / 255, 113.9 / 255),
        (63.0 / 255, 62.1 / 255, 66.7 / 255),
        padding=4,
        pad_mode="zero",
        flip=True,
        order=FEW_SHOT_ORDER,
    ),
    "tiny-imagenet": DatasetInfo(
        "Tiny-ImageNet: 100,000 training and 10,000 test images (its validation set), 64x64, "
        "200 classes, or as many as the files have",
        None,
        (3, 64, 64),
        (0.4802, 0.4481, 0.3975),
        (0.2770, 0.2691, 0.2821),
        padding=8,
        pad_mode="zero",
        flip=True,
    ),
    "cub200": DatasetInfo(
        "CUB-200-2011: 5,994 training and 5,794 test images of birds, read at 224x224, 200 classes",
        None,
        (3, 224, 224),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        padding=0,
        pad_mode="zero",
        flip=True,
        any_size=True,
    ),
    "digits": DatasetInfo(
        "scikit-learn's handwritten digits: 1,797 images, 8x8, grey, 10 classes; no download",
        10,
        (1, 8, 8),
        MEAN,
        STD,
        padding=1,
        pad_mode="zero",
        flip=False,
    ),
    "folder": DatasetInfo(
        "own images: ROOT/train/<class>/ and ROOT/test/<class>/ (or val/)",
        None,
        None,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        padding=4,
        pad_mode="zero",
        flip=True,
        any_size=True,
    ),
}


def load(
    name: str,
    *,
    root: str | Path | None = None,
    validation: float = 0.0,
    subset: int | None = None,
    classes: Sequence[int] | None = None,
    overlap: float | None = None,
    views: int | None = None,
    padding: int | None = None,
    pad_mode: PadMode | None = None,
    flip: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    workers: int | None = None,
    device: torch.device | str = "cpu",
) -> Data:
    """A named data set; None takes the set's own default (see `DATASETS`).

    `classes` are original ids and make a task of their own; or `overlap` does, half of the classes,
    of which that share is in the half that 1.0 stands for (`splits.overlapping`). `validation` is
    the share of the training images of each class that is held out, `subset` how many of the rest
    are trained on.
    `views` gives each image a pool of that many augmentations. `image_size` and `workers` are for
    images that are decoded as they are needed. Raises DataError for settings that do not fit, and
    StorageError for files that are missing or damaged.
    """
    if name not in DATASETS:
        raise DataError(
            f"no data set '{name}'; allowed: {', '.join(DATASETS)}{did_you_mean(name, DATASETS)}"
        )
    info = DATASETS[name]
    scale = {
        "mean": info.mean if mean is None else tuple(mean),
        "std": info.std if std is None else tuple(std),
    }
    augmented = {
        "padding": info.padding if padding is None else padding,
        "pad_mode": info.pad_mode if pad_mode is None else pad_mode,
        "flip": info.flip if flip is None else flip,
        "views": views,
    }
    place = None if root is None else Path(root).expanduser()

    def resident(found: Decoded, train: bool) -> Labelled:
        size = tuple(found.pixels.shape[1:3])
        if image_size is not None and size != (image_size, image_size):
            raise DataError(
                f"data.image_size is {image_size}, the images of '{name}' are "
                f"{size[0]}x{size[1]}; leave it out"
            )
        settings: Any = scale | (augmented if train else {})
        return Labelled(Resident(found.pixels, device=device, **settings), found.labels)

    def on_demand(found: Listing, train: bool) -> Labelled:
        if padding is not None or pad_mode is not None:
            raise DataError(
                "data.padding and data.pad_mode are for small images of one size; these are "
                "cropped and resized at random, so leave them out"
            )
        images = FolderSet(
            found.paths,
            image_size=224 if image_size is None else image_size,
            flip=info.flip if flip is None else flip,
            views=views if train else None,
            workers=workers,
            device=device,
            **scale,
        )
        return Labelled(images, torch.tensor(found.labels))

    sets: dict[str, Labelled]
    if name == "cub200":
        found = cub200(place)
        names = found["train"].names
        sets = {part: on_demand(of, part == "train") for part, of in found.items()}
    elif name == "folder":
        if place is None:
            raise DataError("data.root is needed with data.name=folder; set it to the folder")
        found = listings(place)
        names = found["train"].names
        size = common_size([p for part in found.values() for p in part.paths], image_size)
        sets = {
            part: on_demand(of, part == "train")
            if size is None
            else resident(decoded(of, place), part == "train")
            for part, of in found.items()
        }
    else:
        if name == "digits" and place is not None:
            raise DataError("data.root is given and digits come with scikit-learn; leave it out")
        if name == "digits":
            train, test = digits()
        else:
            train, test = (cifar100 if name == "cifar100" else tiny_imagenet)(place)
        names = train.names
        sets = {"train": resident(train, True), "test": resident(test, False)}
    if overlap is not None:
        if classes is not None:
            raise DataError("data.classes and data.overlap both choose the classes; give one")
        classes = splits.overlapping(info.order or range(len(names)), overlap)
    data = assemble(name, sets, names, validation=validation, subset=subset, classes=classes)
    return replace(data, overlap=overlap)
