"""Teachers: accuracy on the test images, order of their classes, normalisation of their images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill import data as datasets
from potstill import training
from potstill.doctor.finding import Finding
from potstill.net import Net, affine_between, own_statistics

NORMALIZATIONS: Mapping[str, tuple[float | Sequence[float], float | Sequence[float]]] = {
    "ImageNet's statistics": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 and 0.5": (0.5, 0.5),
    "no normalisation (0 and 1)": (0.0, 1.0),
}
"""What networks are commonly trained with: (mean, std), per channel or of every one."""
TEACHER_SECONDS = 30.0
"""What a teacher's accuracy may cost; a slower teacher is measured on fewer images. Each other
normalisation may cost an eighth of that."""
FEW, LEAST = 1000, 500
"""Images that are enough to see whether another normalisation is better, and if time is short."""
BETTER = 3.0
"""Points by which it must be."""


@dataclass(frozen=True)
class Judgement:
    """What a network makes of test images of its own classes."""

    confusion: Tensor
    """(K, K) images: row the label, column the prediction."""
    finite: bool
    """Whether every logit is a number."""

    @property
    def images(self) -> int:
        """How many there were."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Percent that are right."""
        return 100 * float(self.confusion.diagonal().sum()) / self.images

    def relabelled(self) -> tuple[float, list[int]]:
        """Percent right under the best one-to-one renaming of the outputs, and the label of each.

        The assignment problem on the confusion matrix.
        """
        from scipy.optimize import linear_sum_assignment

        outputs, labels = linear_sum_assignment(self.confusion.T.numpy(), maximize=True)
        right = float(self.confusion[labels, outputs].sum())
        return 100 * right / self.images, labels.tolist()


@torch.no_grad()
def judge(logits: Callable[[Tensor], Tensor], images: datasets.Split) -> Judgement:
    """Confusion of a network (image -> logits) on images of its own classes."""
    count = len(images.classes)
    confusion, finite = torch.zeros(count * count, dtype=torch.int64), True
    for batch in images.clean(training.evaluation_batch(images)):
        found = logits(batch.image)
        cells = batch.label * count + found.argmax(dim=1)
        confusion += torch.bincount(cells, minlength=count * count).cpu()
        finite = finite and bool(found.isfinite().all())
    return Judgement(confusion.view(count, count), finite)


def near_chance(top1: float, classes: int) -> bool:
    """Less than twice as good as guessing, or a fifth of the way up, where guessing is good."""
    chance = 100 / classes
    return top1 < min(2 * chance, chance + (100 - chance) / 5)


def in_other_order(top1: float, relabelled: float, classes: int) -> bool:
    """Whether a renaming of the outputs explains an accuracy.

    Also what an untrained network says goes with the classes a little: renamed, 10 classes reach
    about 25 %, and 100 classes 4 %. So a renaming must reach the cube root of chance.
    """
    return relabelled > top1 + 10 and relabelled > 100 * (1 / classes) ** (1 / 3)


def some(images: datasets.Split, count: int) -> datasets.Split:
    """At most `count` of the images, always the same ones, of all classes alike."""
    if count >= len(images):
        return images
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    at = drawn.sort().values.to(images.indices.device)
    return datasets.Split(images.images, images.indices[at], images.labels[at], images.classes)


@torch.no_grad()
def _affordable(net: Net, images: datasets.Split, seconds: float) -> int:
    """How many images a network can judge in that time, at least `LEAST`."""
    batch = next(images.clean(training.evaluation_batch(images))).image
    for _ in range(2):  # the first one is slower
        began = time.monotonic()
        float(net.logits(batch).sum())
    return max(LEAST, int(seconds * len(batch) / (time.monotonic() - began)))


def of_teacher(job: training.Assembled, i: int) -> Iterator[Finding]:
    """Accuracy of teacher `i`, the order of its classes, the normalisation of its images."""
    teacher, classes = job.method.teachers[i], job.method.data.teacher_classes[i]
    name, key, of = f"teacher {i}", f"teachers.{i}", job.teacher_names[i]
    test = training.test_images(job.data, classes)
    if classes is None or test is None:
        why = (
            f"which classes its {teacher.num_classes} outputs are is not known"
            if classes is None
            else "there is no test image of its classes"
        )
        yield Finding(
            name,
            "warn",
            f"{of}: {why}, so its accuracy is not measured",
            f"{key}.classes=[...] with their ids, if the data set has these classes",
        )
        return
    affordable = _affordable(teacher, test, TEACHER_SECONDS)
    images, few = some(test, affordable), some(test, min(FEW, max(LEAST, affordable // 8)))
    found = judge(teacher.logits, images)
    yield _accuracy(found, name, key, of)
    if teacher.samples:
        drawn = judge(lambda image: teacher(image).logits, few)
        yield Finding(
            name,
            "ok",
            f"{of} as drawn, as it teaches: {drawn.top1:.2f} % top-1 on {drawn.images:,} test "
            "images; the figure above is at its expected depth",
        )
    yield _labels(job, i, found, classes)
    yield from _normalization(job, i, few)


def _accuracy(found: Judgement, name: str, key: str, of: str) -> Finding:
    count = len(found.confusion)
    said = f"{of}: {found.top1:.2f} % top-1 on {found.images:,} test images"
    if not found.finite:
        return Finding(
            name,
            "fail",
            f"{said}; some of its logits are not finite",
            f"{key}.weights=PATH of other weights",
        )
    if near_chance(found.top1, count):
        return Finding(
            name,
            "fail",
            f"{said}, near chance ({100 / count:.3g} %): untrained, of other classes, or "
            "trained on images that are normalised otherwise",
            f"check {key}.weights, {key}.normalize and {key}.classes",
        )
    return Finding(name, "ok", said)


def _labels(job: training.Assembled, i: int, found: Judgement, classes: Sequence[int]) -> Finding:
    """Whether its outputs mean what they are taken for, and the student's the same."""
    own, name, key = list(job.data.train.classes), f"teacher {i} classes", f"teachers.{i}"
    relabelled, labels = found.relabelled()
    if in_other_order(found.top1, relabelled, len(classes)):
        ids = ",".join(str(classes[label]) for label in labels)
        logits = "logits" in job.method.reads
        then = (
            "; but the method compares logits one by one, so put the rows of its last layer in "
            "order, or choose a method that reads features"
            if logits
            else ""
        )
        return Finding(
            name,
            "fail",
            f"its classes are in another order: renamed one by one, {relabelled:.2f} % of the "
            f"{found.images:,} test images are right, not {found.top1:.2f} %",
            f"{key}.classes=[{ids}]{then}",
        )
    if list(classes) == own:
        unsure = ", as far as is known" if near_chance(found.top1, len(own)) else ""
        return Finding(name, "ok", f"the student's {len(own)}, in the same order{unsure}")
    shared = len({*classes} & {*own})
    order = ", in another order" if shared == len(own) == len(classes) else ""
    return Finding(
        name, "ok", f"{len(classes)} of its own; {shared} of the student's {len(own)}{order}"
    )


def _normalization(job: training.Assembled, i: int, few: datasets.Split) -> Iterator[Finding]:
    """Whether the teacher does better on images that are normalised in another usual way."""
    teacher, name = job.method.teachers[i], f"teacher {i} normalize"
    if isinstance(few.images, datasets.UserSet):
        yield Finding(name, "ok", "the data set normalises its own images; nothing else was tried")
        return
    data = (few.mean, few.std)
    own = own_statistics(teacher, *data)
    given = judge(teacher.logits, few).top1
    tried = {}
    for what, (mean, std) in alternatives(*data).items():
        if not all(map(_equal, own, (mean, std))):
            change = instead(data, own, (mean, std))
            found = judge(lambda x, change=change: teacher.logits(change(x)), few)  # type: ignore[misc]
            tried[what] = found.top1, mean, std
    what, (top1, mean, std) = max(tried.items(), key=lambda item: item[1][0])
    said = f"mean {numbers(own[0])}, std {numbers(own[1])}"
    if top1 > given + BETTER:
        keys = f"teachers.{i}.normalize"
        yield Finding(
            name,
            "warn",
            f"{said}: {given:.2f} % of {len(few):,} test images are right, and {top1:.2f} % with "
            f"{what}",
            f"{keys}.mean={numbers(mean)} {keys}.std={numbers(std)}",
        )
    else:
        yield Finding(name, "ok", f"{said}; none of {len(tried)} other usual ones is better")


def alternatives(
    mean: Sequence[float], std: Sequence[float]
) -> dict[str, tuple[list[float], list[float]]]:
    """The data's own statistics and `NORMALIZATIONS`, for images of as many channels.

    >>> [*alternatives([0.3], [0.2])]
    ["the data's statistics", '0.5 and 0.5', 'no normalisation (0 and 1)']
    """
    found = {"the data's statistics": (list(mean), list(std))}
    for name, (m, s) in NORMALIZATIONS.items():
        means = [m] * len(mean) if isinstance(m, float) else list(m)
        stds = [s] * len(mean) if isinstance(s, float) else list(s)
        if len(means) == len(mean):
            found[name] = means, stds
    return found


_Statistics = tuple[Sequence[float], Sequence[float]]


def instead(data: _Statistics, own: _Statistics, other: _Statistics) -> Callable[[Tensor], Tensor]:
    """What makes images of the data such that a network that expects `own` is given `other`."""
    steps = [affine_between(*data, *other), affine_between(*own, *data)]

    def change(image: Tensor) -> Tensor:
        for step in steps:
            if step is not None:
                scale, shift = (image.new_tensor(x).view(1, -1, 1, 1) for x in step)
                image = image * scale + shift
        return image

    return change


def _equal(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-5) for x, y in zip(a, b, strict=True))


def numbers(values: Sequence[float], digits: int = 4) -> str:
    """As an override has them: "[0.5,0.5,0.5]"."""
    return f"[{','.join(f'{round(x, 6) + 0.0:.{digits}g}' for x in values)}]"
