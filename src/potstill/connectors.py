"""Layers that carry a student's feature map to the teacher's width, and batches they can take."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from potstill import distributed
from potstill.errors import MethodError
from potstill.method import Batch, Method, Outputs, Phase, Progress, Terms, Turn, Update
from potstill.pairing import Pair


@dataclass(frozen=True, eq=False)
class Connected(Outputs):
    """What a method's forward gives whose student features go through layers of its own."""

    mapped: Sequence[Tensor]
    """The student's features as those layers give them, float32."""


def connect(
    method: Method,
    batch: Batch,
    progress: Progress,
    connectors: Iterable[nn.Module],
    pairs: Iterable[Pair],
) -> Connected:
    """Run a method's two networks, and a connector on the student's map of each pair."""
    student, teachers = method.student(batch.image), method.teach(batch)
    layers = zip(connectors, pairs, strict=True)
    mapped = [layer(student[pair.student]) for layer, pair in layers]
    return Connected(batch, progress, [student], teachers, mapped)


def connector(channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution without bias, then BatchNorm. (B, C, H, W) -> (B, D, H, W)

    The convolution is normal with std sqrt(2 / D), as in the published code of OFD, SRRL and SAKD.
    It is there for equal widths too. C * D + 2 D parameters.
    """
    conv = nn.Conv2d(channels, out_channels, 1, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / out_channels))
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


def transfer(channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution without bias, BatchNorm, ReLU. (B, C, H, W) -> (B, D, H, W)

    For a map that meets one after its ReLU; PyTorch's default initialisation.
    """
    conv = nn.Conv2d(channels, out_channels, 1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU()))


def connectors_between(pairs: Sequence[Pair], always: Container[str] = ()) -> nn.ModuleList:
    """One a pair: a `connector` to the teacher's width, nothing where the widths are equal.

    `always` are taps of the student that have one at equal widths too.
    """
    return nn.ModuleList(
        nn.Identity()
        if pair.shape[0] == pair.teacher_shape[0] and pair.student not in always
        else connector(pair.shape[0], pair.teacher_shape[0])
        for pair in pairs
    )


def init_then_distill(
    method: Method,
    forward: Callable[[Batch, Progress, Outputs | None], Connected],
    loss: Callable[[Connected], Terms],
    connectors: nn.Module,
    pairs: Iterable[Pair],
) -> list[Phase]:
    """Phases of a method that begins with the teacher's features, then trains the student alone.

    "init", with the forward and the loss given, moves what the student's taps depend on, and the
    connectors; nothing predicts yet. "distill" is the method's own forward and loss.
    """
    backbone = method.student.parameters_before(*(pair.student for pair in pairs))
    first = Update("init", loss, [*backbone, *connectors.parameters()])
    student = [p for p in method.student.parameters() if p.requires_grad]
    second = Update("student", method.loss, student)
    init, distill = method.lengths["init"], method.lengths["distill"]
    return [
        Phase("init", [Turn(forward, [first])], init, predictors=dict),
        Phase("distill", [Turn(method.__call__, [second])], distill),
    ]


def require_whole_batches(method: Method, what: str) -> None:
    """Raise MethodError where the last batch of an epoch is kept and has fewer images.

    `what` of the method is of the batch's size: "layers are as wide as".
    """
    data = method.data
    if data.rest:
        raise MethodError(
            f"{type(method).__name__}'s {what} data.batch_size, {data.batch_size}, but the last "
            f"batch of an epoch of {len(data.indices)} images has {data.rest}; set "
            "data.drop_last=true"
        )


def require_two_images(method: Method) -> None:
    """Raise MethodError where a rank would be alone with one image, whose vector has no variance.

    For methods that normalise vectors, or maps of one pixel, over the images of a batch.
    """
    data, ranks = method.data, distributed.world_size()
    for images, which, change in (
        (data.batch_size, "a batch", "make data.batch_size larger"),
        (
            data.rest,
            "the last batch of an epoch",
            "set data.drop_last=true or another data.batch_size",
        ),
    ):
        if images == ranks:
            raise MethodError(
                f"{type(method).__name__} normalises over the images of a rank, but {which} gives "
                f"each of {ranks} rank{'s' if ranks > 1 else ''} only one; {change}"
            )
