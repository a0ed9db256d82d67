"""A user's own dataset objects as training data.

Bytes (uint8 tensors and arrays, PIL images) become a resident set with our augmentation. Float
tensors are taken as they are: their dataset augments and normalises itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.data.loader import fetched
from potstill.data.parquet import IMAGE_COLUMNS, LABEL_COLUMNS
from potstill.data.resident import PadMode, Resident
from potstill.data.split import Chunk, Data, ImageSet
from potstill.data.task import Labelled, assemble
from potstill.errors import DataError
from potstill.seeds import seed_of


class UserSet(ImageSet):
    """A dataset of float tensors that may augment itself, made replayable.

    Before item `index` is read, the generators of torch, numpy and random are seeded from (index,
    view); afterwards they are put back. View 0 is the clean one: it too is whatever the dataset
    draws, but always the same.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Tensor,
        input_shape: tuple[int, int, int],
        *,
        workers: int = 0,
        device: torch.device | str = "cpu",
        name: str = "dataset",
    ) -> None:
        c = input_shape[0]
        codes = range(1, 2**62)
        super().__init__(len(dataset), input_shape, codes, 0, (0.0,) * c, (1.0,) * c, None, device)
        self.dataset = dataset
        self.workers = workers
        self.name = name
        self._labels = labels.tolist()

    def load(self, chunks: Iterable[Chunk]) -> Iterator[Tensor]:
        """The images of each chunk. (B,), (B,) -> (B, C, H, W) float32, channels_last"""
        for images in fetched(self._fetch, chunks, self.workers, self.device.type == "cuda"):
            yield images.to(self.device, non_blocking=True, memory_format=torch.channels_last)

    def _fetch(self, indices: list[int], views: list[int]) -> Tensor:
        images = torch.empty(len(indices), *self.input_shape)
        with preserved_randomness():
            for row, (index, view) in enumerate(zip(indices, views, strict=True)):
                seed_item(index, view)
                image, label = pair(self.dataset, index, self.name)
                if not isinstance(image, Tensor) or image.shape != images.shape[1:]:
                    raise DataError(
                        f"{self.name}[{index}] is {describe(image)}; like item 0 it must be a "
                        f"float tensor of shape {self.input_shape}"
                    )
                if label != self._labels[index]:
                    raise DataError(
                        f"the label of {self.name}[{index}] was {self._labels[index]} and is "
                        f"{label} now; a label must not change between reads"
                    )
                images[row] = image
        return images


def from_dataset(
    train: Any,
    test: Any,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    padding: int = 0,
    pad_mode: PadMode = "zero",
    flip: bool = False,
    views: int | None = None,
    validation: float = 0.0,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Data:
    """Data from two map-style datasets of (image, label): len() and [index], lists too.

    Images of bytes, all of one size: uint8 tensors (C, H, W) or (H, W), uint8 arrays (H, W) or
    (H, W, C), PIL images in L or RGB; `mean` and `std`, in units of pixel / 255, are computed from
    the training images where not given. Or float tensors (C, H, W), taken as they are: augmentation
    and normalisation are theirs, read by `workers` processes. Labels are 0..K-1. Raises DataError.
    """
    for name, dataset in (("train", train), ("test", test)):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"{name} is a {type(dataset).__name__} without len() and [index]; pass a map-style "
                "dataset, or list(dataset) where it fits in memory"
            )
        if not len(dataset):
            raise DataError(f"{name} is empty; pass at least one image per class")
    with preserved_randomness():
        seed_item(0, 0)
        image, _ = pair(train, 0, "train")
        if isinstance(image, Tensor) and image.is_floating_point():
            given = {"mean": mean is not None, "std": std is not None, "padding": padding != 0}
            given |= {"pad_mode": pad_mode != "zero", "flip": flip, "views": views is not None}
            if wrong := [key for key, is_given in given.items() if is_given]:
                raise DataError(
                    f"{', '.join(wrong)} given for float tensors, which augment and normalise "
                    "themselves; remove them, or pass uint8 images"
                )
            if image.ndim != 3:
                raise DataError(f"train[0] is {describe(image)}; expected shape (C, H, W)")
            c, h, w = image.shape
            sets = {
                name: Labelled(
                    UserSet(each, labels, (c, h, w), workers=workers, device=device, name=name),
                    labels,
                )
                for name, each in (("train", train), ("test", test))
                for labels in [read_labels(each, name)]
            }
        else:
            pixels, labels = read_bytes(train, "train")
            test_pixels, test_labels = read_bytes(test, "test")
            if pixels.shape[1:] != test_pixels.shape[1:]:
                raise DataError(
                    f"training images are {tuple(pixels.shape[1:])} and test images "
                    f"{tuple(test_pixels.shape[1:])} (H, W, C); all must have one size"
                )
            own_mean, own_std = statistics(pixels)
            scale: Any = {
                "mean": own_mean if mean is None else tuple(mean),
                "std": own_std if std is None else tuple(std),
            }
            augmented: Any = {"padding": padding, "pad_mode": pad_mode, "flip": flip}
            images = Resident(pixels, **scale, **augmented, views=views, device=device)
            sets = {
                "train": Labelled(images, labels),
                "test": Labelled(Resident(test_pixels, **scale, device=device), test_labels),
            }
    return assemble("user", sets, _class_names(train, sets), validation=validation)


def _class_names(train: Any, sets: Mapping[str, Labelled]) -> list[str]:
    """The dataset's own `classes` where they fit, else the ids as text."""
    count = int(torch.cat([part.labels for part in sets.values()]).max()) + 1
    present = torch.bincount(sets["train"].labels, minlength=count)
    if absent := (present == 0).nonzero().flatten().tolist():
        raise DataError(
            f"labels run from 0 to {count - 1} and train has no image of {absent[:10]}; number the "
            "classes 0..K-1 without a gap, each with a training image"
        )
    own = getattr(train, "classes", None)
    if isinstance(own, Sequence) and len(own) == count:
        return [str(name) for name in own]
    return [str(c) for c in range(count)]


def pair(dataset: Any, index: int, name: str) -> tuple[Any, int]:
    """Image and label of an item: a pair, or a mapping with the hub's column names."""
    item = dataset[index]
    if isinstance(item, Mapping):
        item = tuple(
            next((item[c] for c in columns if c in item), None)
            for columns in (IMAGE_COLUMNS, LABEL_COLUMNS)
        )
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"{name}[{index}] is {describe(item)}; expected (image, label)")
    image, label = item
    if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise DataError(
            f"the label of {name}[{index}] is {describe(label)}; expected a whole number, 0..K-1"
        )
    return image, label


def read_labels(dataset: Any, name: str) -> Tensor:
    """All labels, from the dataset's own `targets` where it has them, else by reading every item.

    -> (N,) int64. Items are checked against them as they are read.
    """
    targets = getattr(dataset, "targets", None)
    if (
        isinstance(targets, Sequence | Tensor | np.ndarray)
        and len(targets) == len(dataset)
        and getattr(dataset, "target_transform", None) is None
    ):
        found = torch.as_tensor(targets)
        if found.ndim == 1 and not found.is_floating_point() and int(found.min()) >= 0:
            return found.to(torch.int64)
    return torch.tensor([pair(dataset, i, name)[1] for i in range(len(dataset))])


def read_bytes(dataset: Any, name: str) -> tuple[Tensor, Tensor]:
    """All images and labels. -> (N, H, W, C) uint8, (N,) int64"""
    images: list[Tensor] = []
    labels = []
    for index in range(len(dataset)):
        image, label = pair(dataset, index, name)
        pixels = as_pixels(image, f"{name}[{index}]")
        if images and pixels.shape != images[0].shape:
            raise DataError(
                f"{name}[{index}] is {tuple(pixels.shape)} and {name}[0] "
                f"{tuple(images[0].shape)} (H, W, C); resize all images to one size"
            )
        images.append(pixels)
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def as_pixels(image: Any, name: str) -> Tensor:
    """An image of bytes. -> (H, W, C) uint8"""
    from PIL import Image

    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim in (2, 3):
        return image[..., None] if image.ndim == 2 else image.permute(1, 2, 0)
    if isinstance(image, Image.Image) and image.mode in ("L", "RGB"):
        image = np.array(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        return pixels[..., None] if image.ndim == 2 else pixels
    raise DataError(
        f"{name} is {describe(image)}; expected a uint8 tensor (C, H, W), a uint8 array (H, W) or "
        "(H, W, C), a PIL image in mode L or RGB; or float tensors throughout"
    )


def statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, pixel / 255. A constant channel has deviation 1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in pixels.unbind(-1):
        share = torch.bincount(channel.reshape(-1), minlength=256) / channel.numel()
        mean.append(float((share * values).sum()))
        deviation = float((share * (values - mean[-1]) ** 2).sum().sqrt())
        std.append(deviation or 1.0)
    return tuple(mean), tuple(std)


def describe(given: Any) -> str:
    """What was given instead, in words: type, and shape or value."""
    kind = type(given).__name__
    if isinstance(given, Tensor | np.ndarray):
        return f"a {kind} of {given.dtype} {tuple(given.shape)}"
    if hasattr(given, "mode") and hasattr(given, "size"):
        return f"a PIL image in mode {given.mode}"
    return f"a {kind}: {given!r:.60}"


def seed_item(index: int, view: int) -> None:
    """Seed what a dataset may draw from: torch on the CPU, numpy, random."""
    seed = seed_of("item", index, view)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Put the global generators back to where they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
