"""Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from potstill.losses import attention_map_distance
from potstill.method import DataSpec, Method, Outputs, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net
from potstill.pairing import stage_pairs


class AT(Method):
    """Match spatial attention maps at every stage (Zagoruyko & Komodakis, arXiv:1612.03928).

    loss = gamma * CE + alpha * KD + beta * sum over taps of mean((Q_student - Q_teacher)^2)

    Q is the mean over channels of |feature|^power, flattened and scaled to unit length. The paper
    prints the unsquared norm and beta / 2; the form here is that of the authors' code, which
    produced the published CIFAR figures. The maps of two stages of unequal size meet at the smaller
    one's. `taps` and `teacher_taps` choose other pairs than the stages in their order. Alpha 0, the
    published value, leaves the KD term out.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 1000.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        power: float = 2.0,
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        self.pairs = stage_pairs(self, taps, teacher_taps)
        if alpha:
            require_same_classes(self)
        self.beta, self.gamma, self.alpha = beta, gamma, alpha
        self.temperature, self.power = temperature, power

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs((pair.teacher for pair in self.pairs), self.alpha)

    def loss(self, out: Outputs) -> Terms:
        """The weighted terms "ce" and "at", and "kd" where alpha is not 0."""
        (student,), (teacher,) = out.students, out.teachers
        distances = [
            attention_map_distance(student[pair.student], teacher[pair.teacher], self.power)
            for pair in self.pairs
        ]
        terms = supervision(out, self.gamma, self.alpha, self.temperature)
        return {**terms, "at": self.beta * torch.stack(distances).sum()}
