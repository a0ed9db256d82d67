"""The L1 baseline of Chung et al., ICML 2020, arXiv:2002.01775, Table 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import nn

from potstill.connectors import Connected, transfer
from potstill.errors import MethodError
from potstill.evaluate import Ensemble
from potstill.losses import meet
from potstill.method import Batch, DataSpec, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes, teacher_outputs
from potstill.net import Net
from potstill.pairing import Role
from potstill.peers import Peers, last_maps, taught


class L1(Peers):
    """Each network's last map is drawn to its peer's (Chung et al., arXiv:2002.01775, Table 1).

    loss of k = CE(k, label) + beta * mean |r_k(map of k) - map of the peer|
                + alpha * T^2 * KL(peer || k at temperature T)

    Two students that learn from each other, or one student of a frozen teacher. The peer's map is
    constant. r_k is there where the widths differ: 1x1 convolution, BatchNorm, ReLU, trained with
    network k. The mean is over images, channels and pixels; the paper's beta is not known, and 1
    here. `taps` has one name a network, the teacher's last; by default the map that is pooled. The
    larger of two maps is averaged down. An offline run also measures student and teacher together.
    """

    students_needed = (1, 2)
    teachers_needed = (0, 1)

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 3.0,
        taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        if len(students) + len(teachers) != 2:
            raise MethodError(
                f"{type(self).__name__} takes two students, or one student and its teacher; "
                f"{len(students)} and {len(teachers)} given"
            )
        roles: list[Role] = ["student", "teacher"] if teachers else [0, 1]
        maps = last_maps(self, roles, taps)
        self.taps = [name for name, _ in maps]
        if alpha:
            require_same_classes(self)
        widths = [shape[0] for _, shape in maps]
        self.transfers = nn.ModuleList(
            transfer(widths[k], widths[1 - k]) if beta and widths[0] != widths[1] else nn.Identity()
            for k in range(len(students))
        )
        self.beta, self.alpha, self.temperature = beta, alpha, temperature

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs([self.taps[1]], self.alpha) if self.teachers else frozenset()

    def trained_with(self, k: int) -> Sequence[nn.Module]:
        """Student k and its r."""
        return [self.nets[k], self.transfers[k]]

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, and each student's r on its map."""
        out = super().forward(batch, progress)
        mapped = [
            layer(student[tap])
            for layer, student, tap in zip(self.transfers, out.students, self.taps, strict=False)
        ]
        return Connected(batch, progress, out.students, out.teachers, mapped)

    def loss_of(self, k: int, out: Connected) -> Terms:
        """The terms "ce", "l1" and "kd" of student k; those whose weight is 0 are left out."""
        own, peer = out.students[k], [*out.students, *out.teachers][1 - k]
        terms = taught(own.logits, [peer.logits], out.batch.label, self.alpha, self.temperature)
        if self.beta:
            distance = F.l1_loss(*meet(out.mapped[k], peer[self.taps[1 - k]].detach()))
            terms = {"ce": terms["ce"], "l1": self.beta * distance, **terms}
        return terms

    def predictors(self) -> Mapping[str, nn.Module]:
        """Every student, and "ensemble", to which a teacher of the same classes belongs."""
        each = dict(super().predictors())
        if self.teachers:
            del each["ensemble"]
            (teacher,), (classes,) = self.teachers, self.data.teacher_classes
            same = list(classes or ()) == list(self.data.classes)
            if same and teacher.num_classes == self.student.num_classes:
                each["ensemble"] = Ensemble([each["student"], teacher.predictor()])
        return each
