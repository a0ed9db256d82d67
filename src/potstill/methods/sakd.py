"""Self-attention-guided feature distillation (SAKD), from its public code; the paper is not named.

Not Spot-adaptive knowledge distillation (TIP 2022), which has the same acronym.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import Connected, connect, connector
from potstill.errors import MethodError, by
from potstill.losses import meet
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net
from potstill.pairing import Pair, stage_pairs


class SAKD(Method):
    """Match energy maps weighted by their rows' self-affinity (SAKD, built on OFD, ICCV 2019).

    loss = gamma * CE + alpha * KD + beta * sum_i 2^(i - n) * mean((p_i - q_i)^2), i = 1..n

    p and q are `self_attended_energy` of student and teacher at stage i, scaled to unit length. The
    student's map goes through a connector first. By default the last three stages that are equally
    high and wide on both sides; where there are fewer (WRN and MobileNetV2), the last three of each
    in order. Maps of unequal size meet at the smaller one's, by average pooling. The form of
    the ImageNet runs: four taps, `connectors` False, beta 100. The public code has the teacher's
    BatchNorm on batch statistics, momentum 0.8, and a fresh optimiser at each milestone; the last
    two are the recipe's. Its teacher logits are not detached, which changes no result.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 200.0,
        gamma: float = 1.0,
        alpha: float = 0.9,
        temperature: float = 4.0,
        teacher_statistics: Literal["batch", "running"] = "batch",
        connectors: bool = True,
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        self.pairs = (
            stage_pairs(self, taps, teacher_taps) if taps or teacher_taps else self._three_levels()
        )
        for pair in self.pairs:
            for role, tap, (c, h, w) in (
                ("student", pair.student, pair.shape),
                ("teacher", pair.teacher, pair.teacher_shape),
            ):
                if h != w:
                    raise MethodError(
                        f"SAKD compares the rows of square maps, but '{tap}' of the {role} is "
                        f"{c}x{h}x{w}; use square images"
                    )
            if not connectors and pair.shape[0] != pair.teacher_shape[0]:
                raise MethodError(
                    f"SAKD without connectors needs equal widths, but '{pair.student}' of the "
                    f"student is {by(pair.shape)} and '{pair.teacher}' of the "
                    f"teacher {by(pair.teacher_shape)}; leave connectors on"
                )
        if alpha:
            require_same_classes(self)
        self.connectors = nn.ModuleList(
            connector(pair.shape[0], pair.teacher_shape[0]) if connectors else nn.Identity()
            for pair in self.pairs
        )
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature
        self.teacher_statistics = teacher_statistics

    def _three_levels(self) -> list[Pair]:
        """The last three stages of one size; or else the last three, where both have as many."""
        equal = stage_pairs(self, by="size")
        own, theirs = self.student.stages()[-3:], self.teachers[0].stages()[-3:]
        if len(equal) < 3 and len(own) == len(theirs) == 3:
            return stage_pairs(self, own, theirs)
        return equal[-3:]

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs((pair.teacher for pair in self.pairs), self.alpha)

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, and the connectors on the student's maps."""
        return connect(self, batch, progress, self.connectors, self.pairs)

    def loss(self, out: Connected) -> Terms:
        """The weighted terms "ce" and "sad", and "kd" where alpha is not 0."""
        (teacher,), n = out.teachers, len(self.pairs)
        stages = []
        for i, (mapped, pair) in enumerate(zip(out.mapped, self.pairs, strict=True), start=1):
            student_map, teacher_map = meet(mapped, teacher[pair.teacher].detach())
            p, q = (
                F.normalize(self_attended_energy(x).flatten(1), dim=1, eps=1e-12)
                for x in (student_map, teacher_map)
            )
            stages.append(F.mse_loss(p, q) / 2 ** (n - i))
        terms = supervision(out, self.gamma, self.alpha, self.temperature)
        return {**terms, "sad": self.beta * torch.stack(stages).sum()}


def self_attended_energy(x: Tensor) -> Tensor:
    """Energy of a square map, weighted by the affinity of its rows. (B, C, H, H) -> (B, H, H)

    g * (1 + (A + A^T) / sqrt(H)) elementwise, with g the mean of squares over channels and A the
    softmax, over the first of its two row indices, of g g^T. The factor lies in
    (1, 1 + 2 / sqrt(H)).
    """
    g = x.square().mean(dim=1)
    affinity = (g @ g.mT).softmax(dim=1)
    return g * (1 + (affinity + affinity.mT) / math.sqrt(g.shape[2]))
