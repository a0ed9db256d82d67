"""Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from potstill.errors import MethodError, TapError
from potstill.losses import attention_map_distance, soft_kl
from potstill.method import DataSpec, Method, Outputs, Terms
from potstill.methods.kd import require_same_classes
from potstill.net import Net


class AT(Method):
    """Match spatial attention maps at every stage (Zagoruyko & Komodakis, arXiv:1612.03928).

    loss = gamma * CE + alpha * KD + beta * sum over taps of mean((Q_student - Q_teacher)^2)

    Q is the mean over channels of |feature|^power, flattened and scaled to unit length. The paper
    prints the unsquared norm and beta / 2; the form here is that of the authors' code, which
    produced the published CIFAR figures. `taps` are read from both networks, in pairs;
    `teacher_taps` names the teacher's where they differ. Alpha 0 leaves the KD term out.
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
        taps: Sequence[str] = ("stage1", "stage2", "stage3"),
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        self.taps = tuple(taps)
        self.teacher_taps = tuple(taps if teacher_taps is None else teacher_taps)
        if len(self.taps) != len(self.teacher_taps) or not self.taps:
            raise MethodError(
                f"AT pairs taps with teacher_taps, but there are {len(self.taps)} and "
                f"{len(self.teacher_taps)}; name at least one, and as many on both sides"
            )
        for role, argument, net, names in (
            ("student", "taps", self.student, self.taps),
            ("teacher", "teacher_taps", self.teachers[0], self.teacher_taps),
        ):
            for name in names:
                try:
                    shape = net.shape_of(name)
                except TapError as error:
                    raise TapError(f"the {role}: {error}; choose {argument}=[...]") from None
                if len(shape) != 3:
                    raise MethodError(
                        f"AT needs feature maps (C, H, W), but '{name}' is "
                        f"{tuple(shape)}; choose a tap before the pooling"
                    )
        if alpha:
            require_same_classes(self)
        self.beta, self.gamma, self.alpha = beta, gamma, alpha
        self.temperature, self.power = temperature, power

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(self.teacher_taps) | (frozenset({"logits"}) if self.alpha else frozenset())

    def loss(self, out: Outputs) -> Terms:
        """The weighted terms "ce" and "at", and "kd" where alpha is not 0."""
        (student,), (teacher,) = out.students, out.teachers
        pairs = zip(self.taps, self.teacher_taps, strict=True)
        distances = [attention_map_distance(student[s], teacher[t], self.power) for s, t in pairs]
        terms = {
            "ce": self.gamma * F.cross_entropy(student.logits, out.batch.label),
            "at": self.beta * torch.stack(distances).sum(),
        }
        if self.alpha:
            terms["kd"] = self.alpha * soft_kl(student.logits, teacher.logits, self.temperature)
        return terms
