"""Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from potstill.connectors import Connected
from potstill.errors import MethodError, by
from potstill.losses import meet
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net
from potstill.pairing import Role, Shape, map_shape, network, nothing_to_compare


class FitNet(Method):
    """Regress one feature map of the teacher, the hint (Romero et al., arXiv:1412.6550).

    loss = gamma * CE + alpha * KD + beta * mean((r(student map) - teacher map)^2)

    r is a convolution (see `regression`), BatchNorm and ReLU, trained with the student. The paper
    trains up to the hint first, then the rest with KD; the published benchmark figures come from
    this single stage. The ReLU, theirs too, cannot reach a hint that is negative, as of a WRN;
    `relu` False leaves it out. The hint is stage2 by default, the middle stage where there is none;
    SemCKD and SimKD take stage1 and alpha 1. A `tap` given alone is the teacher's too.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 100.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        relu: bool = True,
        tap: str | None = None,
        teacher_tap: str | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        self.tap = tap or self._middle_stage("student")
        self.teacher_tap = teacher_tap or tap or self._middle_stage("teacher")
        own = map_shape(self, "student", self.tap, "tap")
        other = map_shape(self, "teacher", self.teacher_tap, "teacher_tap")
        (_, h, w), (_, g, v) = own, other
        if (h - g) * (w - v) < 0:
            raise MethodError(
                f"FitNet regresses a map from one that is larger or smaller, but '{self.tap}' of "
                f"the student is {by(own)} and '{self.teacher_tap}' of the teacher "
                f"{by(other)}; choose others with tap=... and teacher_tap=..."
            )
        if alpha:
            require_same_classes(self)
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv=regression(own, other), bn=nn.BatchNorm2d(other[0])
        )
        if relu:
            parts["relu"] = nn.ReLU()
        self.regressor = nn.Sequential(parts)
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature

    def _middle_stage(self, role: Role) -> str:
        stages = network(self, role).stages()
        if not stages:
            argument = "tap" if role == "student" else "teacher_tap"
            raise nothing_to_compare(self, role, argument)
        return "stage2" if "stage2" in stages else stages[len(stages) // 2]

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs([self.teacher_tap], self.alpha)

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, and the regressor on the student's map."""
        student, teachers = self.student(batch.image), self.teach(batch)
        mapped = [self.regressor(student[self.tap])]
        return Connected(batch, progress, [student], teachers, mapped)

    def loss(self, out: Connected) -> Terms:
        """The weighted terms "ce" and "hint", and "kd" where alpha is not 0."""
        (teacher,), (mapped,) = out.teachers, out.mapped
        distance = F.mse_loss(*meet(mapped, teacher[self.teacher_tap].detach()))
        terms = supervision(out, self.gamma, self.alpha, self.temperature)
        return {**terms, "hint": self.beta * distance}


def regression(shape: Shape, target: Shape) -> nn.Conv2d | nn.ConvTranspose2d:
    """The convolution from a map's shape to the hint's. (B, C, H, W) -> (B, D, H', W')

    Twice as large: stride 2. Half as large: transposed, stride 2. Otherwise a kernel that shrinks
    the map to the hint's size, 1x1 where they are equal. A map that is smaller in another ratio
    keeps its size, and the hint is averaged down to it, as SimKD has it.
    """
    (c, *size), (d, *aim) = shape, target
    if size == [2 * a for a in aim]:
        return nn.Conv2d(c, d, 3, stride=2, padding=1)
    if aim == [2 * s for s in size]:
        return nn.ConvTranspose2d(c, d, 4, stride=2, padding=1)
    spans = [1 + s - a for s, a in zip(size, aim, strict=True)]
    if min(spans) >= 1:
        return nn.Conv2d(c, d, (spans[0], spans[1]))
    return nn.Conv2d(c, d, 3, padding=1)
