"""Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2014, arXiv:1503.02531."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor

from potstill.errors import MethodError
from potstill.losses import soft_kl
from potstill.method import DataSpec, Method, Outputs, Terms
from potstill.net import Net


class KD(Method):
    """Match the teacher's softened class probabilities (Hinton et al., arXiv:1503.02531).

    loss = gamma * CE(student, label) + alpha * T^2 * KL(teacher || student at temperature T)

    The defaults are those of the RepDistiller benchmark, whose published rows weight the
    cross-entropy by 0.1; SemCKD's and SimKD's tables use gamma = alpha = 1. The weights are not
    normalised. `t_squared` False leaves out the T^2: with gamma 0.7 and alpha 0.3 that is "soft
    logits", as the code around MHGD has it. Teacher and student must have the same classes: they
    are compared one by one.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        temperature: float = 4.0,
        gamma: float = 0.1,
        alpha: float = 0.9,
        t_squared: bool = True,
    ) -> None:
        super().__init__(students, teachers, data)
        require_same_classes(self)
        self.temperature, self.gamma, self.alpha = temperature, gamma, alpha
        self.t_squared = t_squared

    def loss(self, out: Outputs) -> Terms:
        """The two weighted terms, "ce" and "kd"."""
        return supervision(out, self.gamma, self.alpha, self.temperature, self.t_squared)


def supervision(
    out: Outputs, gamma: float, alpha: float, temperature: float, t_squared: bool = True
) -> dict[str, Tensor]:
    """The terms of labels and soft targets, beside those of other methods.

    "ce" = gamma * CE and "kd" = alpha * T^2 * KL(teacher || student at temperature T), of one
    student and one teacher. A term whose weight is 0 is left out, not multiplied by 0; no teacher
    need have run where alpha is 0.
    """
    (student,) = out.students
    terms = {}
    if gamma:
        terms["ce"] = gamma * F.cross_entropy(student.logits, out.batch.label)
    if alpha:
        (teacher,) = out.teachers
        terms["kd"] = alpha * soft_kl(student.logits, teacher.logits, temperature, t_squared)
    return terms


def teacher_outputs(taps: Iterable[str], alpha: float) -> frozenset[str]:
    """`Method.reads` of one that compares taps, and logits where the KD term has a weight."""
    return frozenset({*taps, "logits"} if alpha else taps)


def require_supervision(method: Method, gamma: float, alpha: float) -> None:
    """Raise MethodError where the weights of labels and soft targets are both 0.

    For methods that would train a student without either, or would find out after a first phase.
    """
    if not gamma and not alpha:
        raise MethodError(
            f"{type(method).__name__} needs labels or soft targets beside its own loss; give gamma "
            "or alpha a value above 0"
        )


def require_same_classes(method: Method) -> None:
    """Raise MethodError unless teachers and students predict the same classes in the same order."""
    data, name = method.data, type(method).__name__
    for t, teacher in enumerate(method.teachers):
        for s, student in enumerate(method.students):
            if teacher.num_classes != student.num_classes:
                raise MethodError(
                    f"{name} compares logits class by class, but teacher {t} has "
                    f"{teacher.num_classes} classes and student {s} has {student.num_classes}; use "
                    "a teacher trained on this data set, or a method that reads features"
                )
        known = data.teacher_classes[t]
        if known is None:
            raise MethodError(
                f"{name} compares logits class by class, and which classes teacher {t} was trained "
                f"on is not known, or they are others; teachers.{t}.classes=[...] says their ids"
            )
        if list(known) != list(data.classes):
            raise MethodError(
                f"{name} compares logits class by class, but teacher {t} was trained on other "
                "classes, or in another order, than data.classes"
            )
