"""One task's data from whole stored sets: its classes, its validation split, its subset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from potstill.data import splits
from potstill.data.split import Data, ImageSet, Split
from potstill.errors import DataError


class Labelled(NamedTuple):
    """A whole stored set with the original class ids of its images."""

    images: ImageSet
    labels: Tensor
    """(N,) int64, on the CPU."""


def assemble(
    name: str,
    sets: Mapping[str, Labelled],
    names: Sequence[str],
    *,
    validation: float = 0.0,
    subset: int | None = None,
    classes: Sequence[int] | None = None,
) -> Data:
    """Data of one task from stored sets "train", "test" and perhaps "validation".

    In this order: the task's classes, the validation split, the subset of what is left.
    """
    train = sets["train"].labels
    chosen = splits.task_classes(classes, train, names, sets["test"].labels)

    def split(part: Labelled, at: Tensor) -> Split:
        """Images of any classes; a label is the original id."""
        device = part.images.device
        every = list(range(len(names)))
        return Split(part.images, at.to(device), part.labels[at].to(device), every)

    def whole(part: Labelled) -> Split:
        return split(part, torch.arange(len(part.labels)))

    at = splits.window(train, chosen)
    kept, held = splits.hold_out(train[at], validation)
    at, held = at[kept], at[held]
    if subset is not None:
        at = at[splits.subset(train[at], subset)]
    held_out = split(sets["train"], held).window(chosen) if len(held) else None
    if "validation" in sets:
        if held_out is not None:
            raise DataError(
                f"data.validation is {validation} and there is a folder of validation images; "
                "set it to 0 to use the folder"
            )
        held_out = whole(sets["validation"]).window(chosen)
    test = whole(sets["test"])
    return Data(
        split(sets["train"], at).window(chosen),
        test.window(chosen),
        held_out,
        [names[c] for c in chosen],
        name,
        test,
        list(names),
    )
