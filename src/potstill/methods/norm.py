"""Liu, Li, Li, Yao, NORM: Knowledge Distillation via N-to-One Representation Matching,
ICLR 2023.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.errors import MethodError, TapError, by
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.models.architecture import he_fan_out_
from potstill.net import Captured, Net, in_full
from potstill.pairing import Role, Shape, last_map, map_shape, network

RAMP = ((10, 0.1), (20, 0.5), (180, 1.0), (210, 0.5), (math.inf, 0.1))
"""Until which of 241 epochs, counted from 0, the matching term has which weight."""


class NORM(Method):
    """Match each of N segments of a widened map to the teacher's map (Liu et al., ICLR 2023).

    loss = gamma * CE + alpha * KD + s(epoch) * beta * sum_k mean((u_k - teacher's map)^2), k = 1..N

    A feature transform goes into the student after its last stage: x becomes x + BN(conv1x1(u))
    with u = BN(conv1x1(x)), N times as wide as the teacher's map; u_k is its k-th segment. Without
    `residual` x is not added. One segment means no transform: x itself is matched. Being linear,
    the transform can `merge` when all is trained: into the classifier where x is what is pooled (a
    ResNet), else into one convolution.

    The code that gave the published figures also scales both logits for CE and KD (`standardize`)
    and weights the matching by s, in steps over its 241 epochs (`ramp`). Its flags r, a and b are
    gamma, alpha and beta; what they were for each pair is not public.

    A larger map of the teacher's is max-pooled by a whole ratio, and by default its deepest stage
    is taken for which there is one. Where the last stage is the linear end of a bottleneck, as in
    MobileNetV2, the map that is pooled stands for it.
    """

    lengths: ClassVar = {"distill": 241}

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        segments: int = 8,
        gamma: float = 0.125,
        alpha: float = 0.0,
        beta: float = 1.0,
        temperature: float = 4.0,
        standardize: bool = True,
        ramp: bool = True,
        residual: bool = True,
        merge: bool = False,
        tap: str | None = None,
        teacher_tap: str | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        if segments < 1:
            raise MethodError(f"NORM: segments is {segments}; choose 1 or more, 8 as published")
        if alpha:
            require_same_classes(self)
        self.tap = last_stage(self, "student", "tap") if tap is None else tap
        width, *size = shape = map_shape(self, "student", self.tap, "tap")
        teacher = self.teachers[0]
        places = [] if teacher_tap is None else [teacher_tap]
        places = places or [last_stage(self, "teacher", "teacher_tap"), *teacher.stages()[::-1]]
        shapes = {place: map_shape(self, "teacher", place, "teacher_tap") for place in places}
        fitting = [place for place in places if whole_ratio(shapes[place], size)]
        self.teacher_tap = (fitting or places)[0]
        other = shapes[self.teacher_tap]
        maps = (
            f"'{self.tap}' of the student is {by(shape)} and '{self.teacher_tap}' "
            f"of the teacher {by(other)}"
        )
        ratio = whole_ratio(other, size)
        if ratio is None:
            raise MethodError(
                "NORM needs a teacher's map as high and wide as the student's, or a whole multiple "
                f"of it, but {maps}; choose others with tap=... and teacher_tap=..."
            )
        if segments == 1 and width != other[0]:
            raise MethodError(
                f"NORM with segments=1 compares the maps themselves, but {maps}; choose more "
                "segments, or taps of equal widths"
            )
        self.ratio = ratio
        self.transform: FeatureTransform | None = None
        self.into_classifier = False
        if segments > 1:
            if merge and self.student.pools(self.tap):  # as it is before the transform is there
                self.into_classifier = self.student.classifier.bias is not None
            self.transform = FeatureTransform(width, segments * other[0], residual)
            try:
                self.student.insert(self.tap, self.transform)
            except TapError as error:
                raise TapError(f"the student: {error}; choose tap=...") from None
        self.segments, self.merge = segments, merge
        self.gamma, self.alpha, self.beta, self.temperature = gamma, alpha, beta, temperature
        self.standardize, self.ramp = standardize, ramp

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs([self.teacher_tap], self.alpha)

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks; the transform runs within the student, in the student's precision."""
        teachers = self.teach(batch)
        if self.transform is None:
            student = self.student(batch.image)
            return Connected(batch, progress, [student], teachers, [student[self.tap]])
        tape: list[Tensor] = []
        self.transform.tape = tape
        try:
            student = self.student(batch.image)
        finally:
            self.transform.tape = None
        return Connected(batch, progress, [student], teachers, tape)

    def loss(self, out: Connected) -> Terms:
        """The weighted terms "ce" and "norm", and "kd" where alpha is not 0."""
        (student,), (teacher,), (u,) = out.students, out.teachers, out.mapped
        target = teacher[self.teacher_tap].detach()
        if self.ratio != (1, 1):
            target = F.max_pool2d(target, self.ratio)
        segments = u.unflatten(1, (self.segments, -1))  # type: ignore[no-untyped-call]
        distance = self.segments * (segments - target[:, None]).square().mean()
        weight = self.beta * (ramp(out.progress.published_epoch) if self.ramp else 1.0)
        judged: Outputs = out
        if self.standardize:
            own, other = (Captured(standardized(c.logits), {}) for c in (student, teacher))
            judged = replace(out, students=[own], teachers=[other])
        terms = supervision(judged, self.gamma, self.alpha, self.temperature)
        return {**terms, "norm": weight * distance}

    def predictors(self) -> Mapping[str, nn.Module]:
        """The student with its transform; with `merge` a copy in which it has become one layer."""
        if self.transform is None:
            return super().predictors()
        if not self.merge:
            return {"student": Transformed(self.student, self.transform)}
        student = copy.deepcopy(self.student)
        student.close()  # the transform is a hook
        matrix, shift = self.transform.merged()
        if self.into_classifier:
            merge_into(student.classifier, matrix, shift)
            return {"student": student.predictor()}
        layer = nn.Conv2d(len(shift), len(shift), 1).to(self.transform.conv1.weight)
        with torch.no_grad():
            layer.weight.copy_(matrix[:, :, None, None])
            layer.bias.copy_(shift)  # type: ignore[union-attr]
        student.insert(self.tap, layer)
        return {"student": Transformed(student, layer)}


class FeatureTransform(nn.Module):
    """Widen by a 1x1 convolution with BatchNorm, and come back by another. (B, C, H, W) -> the same

    While `tape` is a list, the wide map is appended to it, at least float32.
    """

    def __init__(self, channels: int, width: int, residual: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        he_fan_out_(self)
        self.residual = residual
        self.tape: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        u = self.bn1(self.conv1(x))
        if self.tape is not None:
            self.tape.append(in_full(u))
        v: Tensor = self.bn2(self.conv2(u))
        return x + v if self.residual else v

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor]:
        """Matrix and shift of what this is in eval mode, float64. -> (C, C), (C,)"""
        (wide, shift), (narrow, own) = _linear(self.conv1, self.bn1), _linear(self.conv2, self.bn2)
        matrix = narrow @ wide
        if self.residual:
            matrix += torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return matrix, narrow @ shift + own


class Transformed(nn.Module):
    """A student and the layer that is inserted in it, as one module. (B, C, H, W) -> (B, K)"""

    def __init__(self, student: Net, transform: nn.Module) -> None:
        super().__init__()
        self.student, self.transform = student, transform

    def forward(self, image: Tensor) -> Tensor:
        return self.student.logits(image)


@torch.no_grad()
def merge_into(classifier: nn.Linear, matrix: Tensor, shift: Tensor) -> None:
    """Let a classifier see its input x as matrix x + shift, in place."""
    weight = classifier.weight.double()
    classifier.bias.copy_(classifier.bias + weight @ shift)
    classifier.weight.copy_(weight @ matrix)


def _linear(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution with its BatchNorm in eval mode as matrix and shift, float64."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = norm.weight.double() * (variance.double() + norm.eps).rsqrt()
    return scale[:, None] * conv.weight.flatten(1).double(), norm.bias - scale * mean.double()


def ramp(epoch: float) -> float:
    """Weight of the matching term after so many epochs of 241: it comes and goes in steps."""
    return next(weight for end, weight in RAMP if epoch < end)


def standardized(logits: Tensor) -> Tensor:
    """Each image's logits with mean 0 and deviation 2.5 over the classes. (B, K) -> (B, K)"""
    return 2.5 * F.layer_norm(logits, logits.shape[1:], eps=1e-7)


def last_stage(method: Method, role: Role, argument: str) -> str:
    """The last stage's tap; or the map that is pooled, if that stage has no activation."""
    net = network(method, role)
    stage = next(iter(net.stages()[::-1]), None)
    if stage is None or not {f"{stage}:pre", f"{stage}:post"} & net.shapes.keys():
        stage, _ = last_map(method, role, None, argument)
    return stage


def whole_ratio(larger: Shape, size: Sequence[int]) -> tuple[int, int] | None:
    """How many times as high and wide a map is as a size, None if these are not whole numbers."""
    (_, height, width), (h, w) = larger, size
    return None if height % h or width % w else (height // h, width // w)
