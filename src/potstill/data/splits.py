"""Which images of a labelled set a task takes: pure functions on labels.

None of them knows a run's seed, so all seeds share a split; and what is chosen within one class
does not depend on which other classes the task has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.errors import DataError
from potstill.seeds import seed_of


def window(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Positions of the images of these classes, ascending. (N,) -> (n,) int64"""
    wanted = torch.zeros(max(int(labels.max()), *classes) + 1, dtype=torch.bool)
    wanted[list(classes)] = True
    return wanted[labels].nonzero().flatten()


def overlapping(order: Sequence[int], overlap: float) -> list[int]:
    """The window on a sequence of class ids that shares a part of them with the first window.

    Both are half as long as the sequence, rounded down: n ids. 1.0 is the first window itself, for
    teachers; 0.0 has none of it. The window starts n (1 - overlap) ids later: Ye, Lu, Zhan, TPAMI
    2022, arXiv:2205.01915.

    >>> overlapping([7, 3, 5, 1], 0.5)
    [3, 5]

    Raises DataError outside [0, 1], and where that is no whole number of classes.
    """
    n = len(order) // 2
    if not n:
        raise DataError(f"data.overlap needs two classes or more, and there are {len(order)}")
    if not 0 <= overlap <= 1:
        raise DataError(f"data.overlap is {overlap:g}; give a share from 0 to 1")
    shared = round(overlap * n)
    if abs(shared - overlap * n) > 1e-6 * n:
        low = int(overlap * n)
        raise DataError(
            f"data.overlap is {overlap:g}, no whole number of the {n} classes of a task; the "
            f"nearest are {low / n:.6g} and {(low + 1) / n:.6g}"
        )
    return list(order[n - shared : 2 * n - shared])


def task_classes(
    classes: Sequence[int] | None, labels: Tensor, names: Sequence[str], test: Tensor
) -> list[int]:
    """The task's original ids, ascending; all of them for None. `labels` are the training set's.

    Raises DataError for an id that does not exist or is given twice, for no class, for a class
    without a training image, and where there is no test image or a test label without a name.
    """
    chosen = list(range(len(names))) if classes is None else sorted(classes)
    if not chosen:
        raise DataError("data.classes is empty; give class ids, or null for all")
    if unknown := [c for c in chosen if not 0 <= c < len(names)]:
        raise DataError(
            f"data.classes has {unknown}, the data set has ids 0 to {len(names) - 1}; remove them"
        )
    if twice := sorted({c for c in chosen if chosen.count(c) > 1}):
        raise DataError(f"data.classes has {twice} more than once; give each id once")
    count = torch.bincount(labels, minlength=len(names)).tolist()
    if absent := [c for c in chosen if not count[c]]:
        some = ", ".join(f"{c} ({names[c]})" for c in absent[:5])
        raise DataError(
            f"no training image of {len(absent)} of {len(chosen)} classes: {some}"
            f"{' ...' if len(absent) > 5 else ''}; leave them out with data.classes"
        )
    if int(test.max()) >= len(names):
        raise DataError(
            f"a test image has class id {int(test.max())}, the training set has ids 0 to "
            f"{len(names) - 1}; correct the test set"
        )
    if not len(window(test, chosen)):
        raise DataError(f"no test image of any class of data.classes {chosen}; add some")
    return chosen


def hold_out(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Positions kept and positions held out, ascending: `share` of each class, at least one image.

    (N,) -> (n,), (N - n,). Raises DataError for a share outside [0, 1), and for a class that would
    keep no image.
    """
    if not 0 <= share < 1:
        raise DataError(f"data.validation is {share}; give a share of 0 or more and below 1")
    held = torch.zeros(len(labels), dtype=torch.bool)
    for c, positions in _shuffled("validation", labels) if share else ():
        count = max(1, round(share * len(positions)))
        if count >= len(positions):
            raise DataError(
                f"data.validation is {share}, which takes all {len(positions)} training images of "
                f"class {c}; lower it"
            )
        held[positions[:count]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def subset(labels: Tensor, n: int) -> Tensor:
    """Positions of n images, as many of each class as can be, ascending. (N,) -> (n,) int64

    A larger subset holds every smaller one. Raises DataError where n is above N, or so small that
    a class has no image.
    """
    total = len(labels)
    by_class = _shuffled("subset", labels)
    if n > total:
        raise DataError(f"data.subset is {n}, and there are {total} training images; lower it")
    if n < len(by_class):
        raise DataError(
            f"data.subset is {n}, fewer than one image of each of {len(by_class)} classes; raise it"
        )
    turn = torch.empty(total, dtype=torch.int64)
    for _, positions in by_class:
        turn[positions] = torch.arange(len(positions))
    # everyone's first image, then everyone's second ...; within a turn, by class
    order = torch.argsort(turn * (int(labels.max()) + 1) + labels)
    return order[:n].sort().values


def _shuffled(purpose: str, labels: Tensor) -> list[tuple[int, Tensor]]:
    """Each class with its positions in an order that depends on the class alone."""
    found = []
    for c in torch.bincount(labels).nonzero().flatten().tolist():
        positions = (labels == c).nonzero().flatten()
        fixed = torch.Generator().manual_seed(seed_of(purpose, c))
        found.append((c, positions[torch.randperm(len(positions), generator=fixed)]))
    return found
