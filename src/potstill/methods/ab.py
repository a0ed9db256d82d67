"""Heo et al., Knowledge Transfer via Distillation of Activation Boundaries, AAAI 2019."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.connectors import Connected, connect, connectors_between, init_then_distill
from potstill.errors import MethodError, by
from potstill.method import Batch, DataSpec, Method, Outputs, Phase, Progress, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net
from potstill.pairing import stage_pairs


class AB(Method):
    """Begin with the teacher's activation boundaries (Heo et al., AAAI 2019, arXiv:1811.03233).

    init:    loss = beta * sum_i 2^(i - n) * d(c_i(student_i), teacher_i), i = 1..n
    distill: loss = CE, or KL(teacher || student at temperature T) where stage2 is "kd"

    Maps are taken before the ReLU where the network has such a tap. d is the `boundary_distance`,
    c a connector where the student's map is not as wide as the teacher's, or is never negative; of
    the teacher's only the signs count, which a ReLU does not change. The init phase reads no labels
    and trains what the maps depend on, and the connectors; the second phase is the student's alone,
    with fresh momentum. "kd", without T^2 and labels, is the second stage that the authors
    released; "ce", in which no teacher runs, is that of RepDistiller and of the code around MHGD,
    which also has the 40 epochs: the authors' number is not known. Their code has the teacher in
    train mode in the init phase, so that its averages drift, and RepDistiller has the student in
    eval mode, so that its averages stay as they began; here it is the other way round.
    """

    lengths: ClassVar[Mapping[str, int]] = {"init": 40, "distill": 100}

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 3e-3,
        margin: float = 1.0,
        stage2: Literal["ce", "kd"] = "ce",
        temperature: float = 3.0,
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        if stage2 not in ("ce", "kd"):
            raise MethodError(f"AB: stage2 is {stage2!r}; give 'ce' or 'kd'")
        if beta <= 0 or margin <= 0:
            raise MethodError(
                f"AB's first phase needs beta and margin above 0, but they are {beta} and {margin}"
            )
        self.pairs = stage_pairs(
            self, taps, teacher_taps, form="pre", teacher_form="pre", by="size"
        )
        for pair in self.pairs:
            if pair.shape[1:] != pair.teacher_shape[1:]:
                raise MethodError(
                    "AB compares neurons at equal places of two maps, but "
                    f"'{pair.student}' of the student is {by(pair.shape)} and '{pair.teacher}' of "
                    f"the teacher {by(pair.teacher_shape)}; choose maps of equal height and width "
                    "with taps=[...] and teacher_taps=[...]"
                )
        if stage2 == "kd":
            require_same_classes(self)
        found = self.student.probe()
        # after its ReLU a map could not become negative
        active = {p.student for p in self.pairs if found[p.student].min() >= 0}
        self.connectors = connectors_between(self.pairs, active)
        self.beta, self.margin, self.temperature = beta, margin, temperature
        self.stage2 = stage2

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs((pair.teacher for pair in self.pairs), self.stage2 == "kd")

    def init_forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, and the connectors on the student's maps."""
        return connect(self, batch, progress, self.connectors, self.pairs)

    def init_loss(self, out: Connected) -> Terms:
        """The weighted term "ab"."""
        (teacher,), n = out.teachers, len(self.pairs)
        stages = []
        for i, (mapped, pair) in enumerate(zip(out.mapped, self.pairs, strict=True), start=1):
            distance = boundary_distance(mapped, teacher[pair.teacher].detach(), self.margin)
            stages.append(distance / 2 ** (n - i))
        return {"ab": self.beta * torch.stack(stages).sum()}

    def forward(self, batch: Batch, progress: Progress, previous: Outputs | None = None) -> Outputs:
        """Run the student, and the teacher only where stage2 is "kd"."""
        teachers = self.teach(batch) if self.stage2 == "kd" else []
        return Outputs(batch, progress, [self.student(batch.image)], teachers)

    def loss(self, out: Outputs) -> Terms:
        """The term "ce", or "kd" alone."""
        gamma, alpha = (0.0, 1.0) if self.stage2 == "kd" else (1.0, 0.0)
        return supervision(out, gamma, alpha, self.temperature, t_squared=False)

    def phases(self) -> Sequence[Phase]:
        """In "init" nothing predicts yet; then "distill"."""
        return init_then_distill(
            self, self.init_forward, self.init_loss, self.connectors, self.pairs
        )


def boundary_distance(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """Squared hinge of the student at the teacher's signs. (B, C, H, W), (B, C, H, W) -> ()

    A neuron costs (s - margin)^2 below the margin where the teacher's is active (t > 0), and
    (s + margin)^2 above -margin where it is not. Summed over a map, averaged over images.
    """
    wrong = torch.where(teacher > 0, -student, student)
    return F.relu(margin + wrong).square().sum() / len(student)
