"""Budnik, Avrithis, Asymmetric Metric Learning for Knowledge Transfer, CVPR 2021.

arXiv:2006.16331.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import distributed
from potstill.errors import MethodError
from potstill.losses import unit
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms, require_arguments
from potstill.net import Net
from potstill.pairing import feature_shape

Form = Literal[
    "contrastive+", "contrastive", "regression", "triplet", "softmax", "multi_similarity"
]
MARGINS = {"contrastive+": 0.7, "contrastive": 0.7, "triplet": 0.1}


@dataclass(frozen=True, eq=False)
class Embedded(Outputs):
    """What AML compares, of the whole batch of all ranks."""

    own: Tensor
    """(B, E) the student's vectors, mapped to the teacher's width, of unit length."""
    other: Tensor
    """(B, E) the teacher's, of unit length, without gradient."""
    positive: Tensor
    """(B,) another image of each image's class, drawn at random; itself where there is none."""
    label: Tensor
    """(B,)"""


class AML(Method):
    """Compare the student's vectors with the teacher's of other images (arXiv:2006.16331).

    loss = gamma * CE + beta * (mean over anchors of the form's pairs, + mean of the self term)

    f is a learnt linear map of the student's pooled vector to the teacher's width, g the teacher's
    vector, both of unit length. An anchor f(a) is compared with g of one random image of its class
    and of the `negatives` hardest classes in the batch of all ranks, the hardest image of each by
    f(a) . g(n); an image alone in its class, or in a batch of one class, is no anchor. Forms, with
    d = |f(a) - g(x)|, p the positive and n the negatives; see `pair_losses`:

    contrastive       d_p^2 / 2 + sum_n max(0, margin - d_n)^2 / 2, margin 0.7
    contrastive+      the same, and the self term d(a, a)^2 / 2 of every image
    regression        the self term alone
    triplet           sum_n max(0, d_p^2 - d_n^2 + margin), margin 0.1
    softmax           cross-entropy of softmax(-d / tau) over p and n
    multi_similarity  Wang et al., CVPR 2019, with f . g

    Budnik & Avrithis, CVPR 2021, is our reading of "AML" in the cross-task tables of Ye, Lu, Zhan,
    TPAMI 2022, which expand it nowhere; it was published for retrieval, and one phase beside
    cross-entropy, hard negatives of the batch and beta 1 are ours. Teacher and student need no
    class in common.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 1.0,
        gamma: float = 1.0,
        form: Form = "contrastive+",
        margin: float | None = None,
        tau: float = 0.1,
        negatives: int = 5,
        tap: str = "embed",
        teacher_tap: str = "embed",
    ) -> None:
        super().__init__(students, teachers, data)
        width = feature_shape(self, "student", tap, "tap").numel()
        teacher_width = feature_shape(self, "teacher", teacher_tap, "teacher_tap").numel()
        forms = get_args(Form)
        require_arguments(
            self,
            ("form", form, form in forms, f"one of {', '.join(forms)}"),
            ("margin", margin, margin is None or margin > 0, "a number above 0, or None"),
            ("beta", beta, beta > 0, "a number above 0"),
            ("gamma", gamma, gamma > 0, "a number above 0: nothing else trains the classifier"),
            ("tau", tau, tau > 0, "a number above 0"),
            ("negatives", negatives, negatives >= 1, "1 or more"),
        )
        if margin is not None and form not in MARGINS:
            raise MethodError(
                f"AML: form '{form}' has no margin, and margin is {margin}; leave it out"
            )
        self.beta, self.gamma, self.form, self.tau = beta, gamma, form, tau
        self.margin = MARGINS.get(form, 0.0) if margin is None else margin
        self.negatives, self.tap, self.teacher_tap = negatives, tap, teacher_tap
        self.embed = nn.Linear(width, teacher_width)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.teacher_tap})

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Embedded:
        """Run both networks, map the student's vectors, and draw a positive for each image."""
        student, (teacher,) = self.student(batch.image), (teachers := self.teach(batch))
        own = unit(self.embed(student[self.tap].flatten(1)))
        other = unit(teacher[self.teacher_tap].flatten(1))
        label = distributed.gather(batch.label)
        return Embedded(
            batch,
            progress,
            [student],
            teachers,
            distributed.gather(own),
            distributed.gather(other.detach()),
            draw_positives(label),
            label,
        )

    def loss(self, out: Embedded) -> Terms:
        """The weighted terms "ce", and "pairs" and "self" as the form has them."""
        (student,) = out.students
        terms = {"ce": self.gamma * F.cross_entropy(student.logits, out.batch.label)}
        if self.form != "regression":
            chosen, there = hardest(out.own @ out.other.mT, out.label, self.negatives)
            own, other = out.own, out.other
            each = pair_losses(
                own, other[out.positive], other[chosen], there, self.form, self.margin, self.tau
            )
            anchor = (out.positive != torch.arange(len(own), device=own.device)) & there.any(dim=1)
            mean = each.where(anchor, 0.0).sum() / anchor.sum().clamp_min(1)
            terms["pairs"] = self.beta * mean
        if self.form in ("contrastive+", "regression"):
            distance = (out.own - out.other).square().sum(dim=1) / 2
            terms["self"] = self.beta * distance.mean()
        return terms


def draw_positives(label: Tensor) -> Tensor:
    """For each image another one of its class, at random; itself where there is none. (B,)"""
    turn = torch.rand(len(label), len(label), device=label.device)
    other = (label[:, None] == label).fill_diagonal_(False)
    drawn = turn.masked_fill(~other, -1.0).argmax(dim=1)
    return torch.where(other.any(dim=1), drawn, torch.arange(len(label), device=label.device))


def hardest(similarity: Tensor, label: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most similar image of each of the `count` nearest other classes. (B, B), (B,) -> (B, k)

    Images, (B, k) int64, the most similar first, and whether each is there: a batch may have fewer
    classes. k is `count`, or B where that is less. Row a of the similarity is the anchor's.
    """
    n = len(label)
    order = similarity.detach().argsort(dim=1, descending=True, stable=True)
    place = torch.arange(n, device=label.device).expand(n, n)
    kind = (label[:, None] == label).int().argmax(dim=1)  # the class by its first image's number
    # where in the order each class comes first; n where it is not there, or the anchor's own
    first = torch.full_like(place, n).scatter_reduce_(1, kind[order], place, "amin")
    chosen = first.scatter_(1, kind[:, None], n).sort(dim=1).values[:, :count]
    return order.gather(1, chosen.clamp_max(n - 1)), chosen < n


def pair_losses(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    there: Tensor,
    form: Form = "contrastive",
    margin: float = 0.7,
    tau: float = 0.1,
) -> Tensor:
    """An anchor's loss with its positive and negatives. (B, D), (B, D), (B, k, D), (B, k) -> (B,)

    Summed over the negatives that are there, (B, k) bool. Vectors are of unit length.
    """
    square = (anchor - positive).square().sum(dim=1)
    if form == "multi_similarity":
        near = (anchor * positive).sum(dim=1)
        far = torch.einsum("bd,bkd->bk", anchor, negative)
        each = (40 * (far - 0.5)).masked_fill(~there, -math.inf)
        one = torch.zeros_like(each[:, :1])  # of log(1 + sum)
        sum_of_all = torch.cat([one, each], dim=1).logsumexp(dim=1)
        return F.softplus(-2 * (near - 0.5)) / 2 + sum_of_all / 40
    # a norm, and not a root of a sum: its gradient at 0 is 0
    distance = torch.linalg.vector_norm(anchor[:, None] - negative, dim=2)
    if form == "triplet":
        hinges = (square[:, None] - distance.square() + margin).clamp_min(0) * there
        return torch.sum(hinges, dim=1)
    if form == "softmax":
        root = torch.linalg.vector_norm(anchor - positive, dim=1, keepdim=True)
        other = distance.masked_fill(~there, math.inf)
        return -F.log_softmax(-torch.cat([root, other], dim=1) / tau, dim=1)[:, 0]
    push = torch.sum((margin - distance).clamp_min(0).square() * there, dim=1)
    return (square + push) / 2
