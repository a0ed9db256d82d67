"""Tian et al., Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from potstill import distributed
from potstill.errors import MethodError
from potstill.losses import unit
from potstill.method import (
    Batch,
    DataSpec,
    Method,
    Outputs,
    Phase,
    Progress,
    Terms,
    Turn,
    Update,
    require_arguments,
)
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net
from potstill.pairing import feature_shape

LIMIT = 2**25  # elements of one tensor: 128 MiB in float32


@dataclass(frozen=True, eq=False)
class Contrasted(Outputs):
    """What CRD's forward gives; side 0 is the student's, side 1 the teacher's."""

    anchors: Tensor
    """(2, B, D) embeddings of unit length."""
    log_scores: Tensor
    """(2, B, K + 1) anchor . row / tau with the other side's bank; first the image's own row."""
    log_z: Tensor
    """(2,) log of the constants Z, of the first batch of all."""


class CRD(Method):
    """Tell an image from K others by the peer's memory of them (Tian et al., arXiv:1910.10699).

    loss = gamma * CE + alpha * KD + beta * (nce(P_student) + nce(P_teacher))

    P = exp(a . M / tau) / Z over the image itself and its negatives; see `noise_contrastive`.

    Anchors a are linear maps of the pooled vectors (or of `tap` and `teacher_tap`, flattened) to
    unit vectors of `dimensions`, both learnt; a zero vector stays zero. M are the rows of the other
    network's memory bank, whose own row moves by `momentum` after each step; the last of several
    equal images in a batch writes it. Z is n times the mean of the first batch's scores. This is
    the authors' code, which produced the published figures; the paper derives a critic over current
    pairs. Alpha 0 leaves the KD term out; the published CRD + KD has alpha 1.

    Negatives are drawn anew for each image from those of other classes: without replacement, as
    published ("exact", from n random numbers an image), or with ("fast", from K).

    Memory, in float32: the banks hold 8 n D bytes for n training images, 51 MB with CIFAR-100. A
    step keeps 24 B (K + 1) bytes until its backward, 25 MB for 64 images, while tensors of B n
    elements (13 MB) come and go, never of more than 2^25 or n. The rows of the banks, 537 MB a
    side, are not gathered.
    """

    banks: Tensor
    log_z: Tensor
    row_of: Tensor
    first: Tensor
    members: Tensor

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 0.8,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        negatives: int = 16384,
        dimensions: int = 128,
        tau: float = 0.07,
        momentum: float = 0.5,
        sampling: Literal["exact", "fast"] = "exact",
        tap: str = "embed",
        teacher_tap: str = "embed",
    ) -> None:
        super().__init__(students, teachers, data)
        width = feature_shape(self, "student", tap, "tap").numel()
        teacher_width = feature_shape(self, "teacher", teacher_tap, "teacher_tap").numel()
        require_arguments(
            self,
            ("negatives", negatives, negatives >= 1, "1 or more"),
            ("dimensions", dimensions, dimensions >= 1, "1 or more"),
            ("tau", tau, tau > 0, "a number above 0"),
            ("momentum", momentum, 0 <= momentum < 1, "a number from 0 to below 1"),
            ("sampling", sampling, sampling in ("exact", "fast"), "'exact' or 'fast'"),
        )
        if alpha:
            require_same_classes(self)
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature
        self.negatives, self.tau, self.momentum, self.sampling = negatives, tau, momentum, sampling
        self.tap, self.teacher_tap = tap, teacher_tap
        self.embed = nn.Linear(width, dimensions)
        self.teacher_embed = nn.Linear(teacher_width, dimensions)

        # rows of the banks are sorted by class, so that a class is a range of rows
        order, n = data.labels.argsort(stable=True), len(data.indices)
        row_of = torch.full((data.size,), n)  # no row: an image that is not trained on fails
        row_of[data.indices[order]] = torch.arange(n)
        members = data.labels.bincount(minlength=len(data.classes))
        self.register_buffer("row_of", row_of, persistent=False)
        self.register_buffer("first", members.cumsum(0) - members, persistent=False)
        self.register_buffer("members", members, persistent=False)
        largest = int(members.argmax())
        fewest = n - int(members[largest])
        if fewest == 0:
            raise MethodError(
                f"CRD contrasts an image with those of other classes, but all {n} training images "
                "are of one class; train on two classes or more"
            )
        if sampling == "exact" and negatives > fewest:
            raise MethodError(
                f"CRD draws {negatives} negatives without replacement, but there are "
                f"{fewest} images of other classes than {data.classes[largest]}; set negatives "
                f"to {fewest} or less, or sampling to 'fast'"
            )

        bound = 1 / math.sqrt(dimensions / 3)  # rows of about unit length
        self.register_buffer("banks", torch.empty(2, n, dimensions).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), math.inf))  # not known yet

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs([self.teacher_tap], self.alpha)

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Contrasted:
        """Run both networks, embed what they give, and score it against rows of the banks."""
        student, (teacher,) = self.student(batch.image), self.teach(batch)
        own = self.embed(student[self.tap].flatten(1))
        other = self.teacher_embed(teacher[self.teacher_tap].flatten(1))
        anchors = unit(torch.stack([own, other]))
        drawn = distributed.local(self.draw(distributed.gather(batch.label)))
        rows = torch.cat([self.row_of[batch.index][:, None], drawn], dim=1)
        pairs = zip(anchors, (self.banks[1], self.banks[0]), strict=True)
        log_scores = torch.stack([products(a / self.tau, bank, rows) for a, bank in pairs])
        log_z = torch.where(self.log_z.isinf(), self.first_log_z(log_scores), self.log_z)
        return Contrasted(batch, progress, [student], [teacher], anchors, log_scores, log_z)

    def draw(self, label: Tensor, limit: int = LIMIT) -> Tensor:
        """Rows of K images of other classes for each label. (B,) -> (B, K)

        "exact" takes where the K smallest of n random numbers are, for `limit` // n labels at a
        time; "fast" the remainders of 62-bit ones, which are even to n / 2^62.
        """
        n, device = self.banks.shape[1], label.device
        members = self.members[label][:, None]
        others = n - members
        if self.sampling == "fast":
            bits = torch.randint(2**62, (len(label), self.negatives), device=device)
            drawn = bits % others
        else:
            places = torch.arange(n, device=device)
            drawn = torch.cat(
                [
                    torch.rand(len(part), n, device=device)
                    .masked_fill_(places >= part, math.inf)
                    .topk(self.negatives, largest=False, sorted=False)
                    .indices
                    for part in torch.split(others, max(1, limit // n))
                ]
            )
        # the d-th of the others, who stand before and after the label's own range
        return drawn + members * (drawn >= self.first[label][:, None])

    def first_log_z(self, log_scores: Tensor) -> Tensor:
        """log(n * mean score) of each side, over the batch of all ranks. (2, B, K + 1) -> (2,)"""
        each = log_scores.detach().flatten(1)
        shared = distributed.gather(each.logsumexp(dim=1)[None])
        scores = each.shape[1] * len(shared)
        return shared.logsumexp(dim=0) + math.log(self.banks.shape[1] / scores)

    def loss(self, out: Contrasted) -> Terms:
        """The weighted terms "ce" and "crd", and "kd" where alpha is not 0."""
        n = self.banks.shape[1]
        sides = zip(out.log_scores, out.log_z, strict=True)
        each = [noise_contrastive(log_scores - log_z, n) for log_scores, log_z in sides]
        terms = supervision(out, self.gamma, self.alpha, self.temperature)
        return {**terms, "crd": self.beta * torch.stack(each).sum()}

    def remember(self, out: Contrasted) -> None:
        """Move the rows of the batch's images towards their embeddings, and keep Z."""
        rows = self.row_of[distributed.gather(out.batch.index)]
        anchors = distributed.gather(out.anchors.transpose(0, 1).contiguous()).transpose(0, 1)
        moved = unit(self.momentum * self.banks[:, rows] + (1 - self.momentum) * anchors)
        self.banks[:, rows] = moved[:, last_equal(rows)]  # CUDA writes in no fixed order
        self.log_z.copy_(out.log_z)

    def phases(self) -> Sequence[Phase]:
        update = Update("student", self.loss, self.trainable())
        return [
            Phase(
                "distill", [Turn(self.__call__, [update], self.remember)], self.lengths["distill"]
            )
        ]


def last_equal(x: Tensor) -> Tensor:
    """Where each number is for the last time. (B,) -> (B,)

    >>> last_equal(torch.tensor([7, 5, 7, 3])).tolist()
    [2, 1, 2, 3]
    """
    return ((x == x[:, None]) * torch.arange(len(x), device=x.device)).amax(dim=1)


class _Products(torch.autograd.Function):
    """`products`; torch's own gather would keep the products with all rows until the backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, bank: Tensor, rows: Tensor, limit: int) -> Tensor:
        ctx.save_for_backward(bank, rows)
        ctx.size = max(1, limit // len(bank))
        parts = (torch.split(x, ctx.size) for x in (anchor, rows))
        return torch.cat([(a @ bank.T).gather(1, r) for a, r in zip(*parts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bank, rows = ctx.saved_tensors
        parts = zip(*(torch.split(x, ctx.size) for x in (grad, rows)), strict=True)
        weights = (g.new_zeros(len(g), len(bank)).scatter_add_(1, r, g) for g, r in parts)
        return torch.cat([w @ bank for w in weights]), None, None, None


def products(anchor: Tensor, bank: Tensor, rows: Tensor, limit: int = LIMIT) -> Tensor:
    """Inner products with some rows of a bank. (B, D), (n, D), (B, K + 1) -> (B, K + 1)

    The products with all rows are computed, for `limit` // n anchors at a time, and most of them
    dropped: n / (K + 1) times the arithmetic of gathering the rows first, but no (B, K + 1, D) to
    write and read, also going backwards. No gradient reaches the bank. On CUDA the gradients of a
    row that is drawn several times for one anchor are added in no fixed order.
    """
    return _Products.apply(anchor, bank, rows, limit)  # type: ignore[no-untyped-call, no-any-return]


def noise_contrastive(log_p: Tensor, n: int, eps: float = 1e-7) -> Tensor:
    """Loss of telling the first of each row from K noise samples of n. (B, K + 1) -> ()

    -mean over the batch of log(P_0 / (P_0 + c + eps)) + sum over k >= 1 of
    log(c / (P_k + c + eps)), c = K / n, as in the authors' code.
    """
    c = (log_p.shape[1] - 1) / n
    # both ratios are logistic in log P; taken as they stand, in float32, the second is 1 - 6e-5 for
    # most negatives, and 16,384 such logs leave an error of 5e-4
    x = log_p - math.log(c + eps)
    each = F.softplus(-x[:, 0]) + F.softplus(x[:, 1:]).sum(dim=1)
    return each.mean() + (log_p.shape[1] - 1) * math.log1p(eps / c)
