"""Srinivas, Fleuret, Knowledge Transfer with Jacobian Matching, ICML 2018, arXiv:1803.00443."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from potstill.errors import MethodError
from potstill.losses import attention_map, meet, unit
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms, require_arguments
from potstill.methods.kd import require_same_classes, require_supervision, supervision
from potstill.net import Captured, Net
from potstill.pairing import stage_pairs


@dataclass(frozen=True, eq=False)
class Jacobians(Outputs):
    """Gradients with respect to the images, by what was differentiated: logit, or taps."""

    own: Sequence[Tensor]
    """(B, C * H * W), the student's, with a graph of their own."""
    target: Sequence[Tensor]
    """The teacher's, without."""


class Jacobian(Method):
    """Match how outputs change with the image (Srinivas & Fleuret, ICML 2018, arXiv:1803.00443).

    loss = gamma * CE + alpha * activation + beta * sum of |J_T / |J_T| - J_S / |J_S||^2

    A Jacobian J is the gradient of one number an image with respect to its pixels, of unit length:
    see `jacobian_distance`; a mean over images. Forms:

    logits     J of the logit of one class, the label's (`of` "label", as in public code) or the
               teacher's top one ("teacher"). The activation term is KD at `temperature`. Needs the
               same classes on both sides.
    attention  at each stage the attention map, mean over channels of squares, at the teacher's
               largest pixel; the activation term is the squared distance of the maps, of unit
               length. For any two networks with stages. The paper pools maps first, with windows
               that are not known; here there are none.

    The public code's weight is 20 / 3072 of our beta, on CIFAR-10; neither its paper's nor those of
    the published tables are known, and beta 1 is ours. The student's BatchNorm mixes the images of
    a batch, so its Jacobian has a part from the others; the teacher's has none. Costs a backward of
    both networks more, and two backwards of the student's gradient; never compiled, and in float32
    unless bf16 is asked for, whose rounding turns Jacobians visibly.
    """

    needs_input_gradient: ClassVar[bool] = True

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 1.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        form: Literal["logits", "attention"] = "logits",
        of: Literal["label", "teacher"] = "label",
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        require_arguments(
            self,
            ("form", form, form in ("logits", "attention"), "logits or attention"),
            ("of", of, of in ("label", "teacher"), "label or teacher"),
        )
        self.pairs = []
        if form == "attention":
            if not gamma:
                raise MethodError(
                    f"Jacobian: gamma is {gamma!r}, and form 'attention' has no other term that "
                    "trains the classifier; give a number above 0"
                )
            self.pairs = stage_pairs(self, taps, teacher_taps)
        else:
            if taps is not None or teacher_taps is not None:
                raise MethodError("Jacobian: taps are of form 'attention'; leave them out")
            require_same_classes(self)
            require_supervision(self, gamma, alpha)
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature
        self.of = of

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(pair.teacher for pair in self.pairs) or frozenset({"logits"})

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Jacobians:
        """Run both networks on images that are differentiated, and do it."""
        seen = batch._replace(image=batch.image.detach().requires_grad_())
        with torch.enable_grad():
            student, (teacher,) = self.student(seen.image), self.teach(seen)
            own, other = (
                self.differentiated(student, teacher, batch.label) if self.beta else ([], [])
            )
            jacobians, targets = (
                [
                    torch.autograd.grad(
                        y.sum(), seen.image, create_graph=keep, retain_graph=keep or y is not ys[-1]
                    )[0].flatten(1)
                    for y in ys
                ]
                for ys, keep in ((own, True), (other, False))
            )
        constant = Captured(
            teacher.logits.detach(), {k: v.detach() for k, v in teacher.features.items()}
        )
        return Jacobians(batch, progress, [student], [constant], jacobians, targets)

    def differentiated(
        self, student: Captured, teacher: Captured, label: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One number an image, of the student and of the teacher, for each Jacobian. (B,) each"""
        if not self.pairs:
            top = label if self.of == "label" else teacher.logits.detach().argmax(dim=1)
            own, other = (x.logits.gather(1, top[:, None]).squeeze(1) for x in (student, teacher))
            return [own], [other]
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for pair in self.pairs:
            maps = meet(student[pair.student], teacher[pair.teacher])
            energies = [x.square().mean(dim=1).flatten(1) for x in maps]
            place = energies[1].detach().argmax(dim=1, keepdim=True)
            for into, energy in zip(found, energies, strict=True):
                into.append(energy.gather(1, place).squeeze(1))
        return found

    def loss(self, out: Jacobians) -> Terms:
        """The weighted terms "ce", "kd" or "attention", and "jacobian"; none whose weight is 0."""
        terms = supervision(out, self.gamma, 0.0 if self.pairs else self.alpha, self.temperature)
        if self.alpha and self.pairs:
            (student,), (teacher,) = out.students, out.teachers
            maps = [meet(student[p.student], teacher[p.teacher]) for p in self.pairs]
            each = [
                (attention_map(x) - attention_map(y)).square().sum(dim=1).mean() for x, y in maps
            ]
            terms["attention"] = self.alpha * torch.stack(each).sum()
        if self.beta:
            pairs = zip(out.own, out.target, strict=True)
            distances = [jacobian_distance(x, y).mean() for x, y in pairs]
            terms["jacobian"] = self.beta * torch.stack(distances).sum()
        return terms


def jacobian_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|J_T / |J_T| - J_S / |J_S||^2 of each image: 2 - 2 cos. (B, D), (B, D) -> (B,)

    A Jacobian of zeros has no direction: it counts as zero. No gradient reaches the teacher.
    """
    return (unit(student) - unit(teacher.detach())).square().sum(dim=1)
