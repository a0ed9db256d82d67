"""Lee, Song, Graph-based Knowledge Distillation by Multi-head Attention Network, BMVC 2019.

arXiv:1907.02226.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import distributed
from potstill.batchnorm import running_statistics
from potstill.clipping import clipped
from potstill.connectors import connectors_between, require_whole_batches
from potstill.errors import MethodError
from potstill.losses import aligned, right_singular_vectors, upright
from potstill.method import Batch, DataSpec, Method, Outputs, Phase, Progress, Terms, Turn, Update
from potstill.methods.kd import (
    require_same_classes,
    require_supervision,
    supervision,
    teacher_outputs,
)
from potstill.net import Captured, Net
from potstill.pairing import stage_pairs


@dataclass(frozen=True, eq=False)
class Estimates(Outputs):
    """What the first phase compares, by module."""

    estimates: Sequence[Tensor]
    """(N, D), of unit length or zero; likewise the targets."""
    targets: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Graphs(Outputs):
    """What the second phase compares, by module: attention before tanh and softmax."""

    own: Sequence[Tensor]
    """(A, N, N), the student's."""
    target: Sequence[Tensor]
    """(A, N, N), the teacher's."""


class MHAN(nn.Module):
    """Multi-head attention network from one tap's vectors to the next one's, with its estimator.

    `front` is D, `back` E wide; their mean, rounded down, is the width h of a head. h A (D + E) +
    4 h A parameters of attention; h D + 2 h + h A E + E of the estimator.
    """

    def __init__(self, front: int, back: int, heads: int = 8, dropping: bool = True) -> None:
        super().__init__()
        width = (front + back) // 2
        self.count = heads
        self.dropping = dropping and heads > 1
        self.theta = nn.Sequential(linear(back, width * heads), nn.BatchNorm1d(width * heads))
        self.phi = nn.Sequential(linear(front, width * heads), nn.BatchNorm1d(width * heads))
        self.f1 = nn.Sequential(linear(front, width), nn.BatchNorm1d(width), nn.ReLU())
        self.f2 = linear(width * heads, back, bias=True)

    def graph(self, front: Tensor, back: Tensor) -> Tensor:
        """How well each front vector explains each back one. (N, D), (N, E) -> (A, N, N)

        Rows are images of the back tap, columns of the front tap. No softmax yet.
        """
        theta, phi = (x.unflatten(1, (-1, self.count)) for x in (self.theta(back), self.phi(front)))
        return torch.einsum("iha,jha->aij", theta, phi)

    def forward(self, front: Tensor, back: Tensor) -> Tensor:
        """Back vectors estimated by attention over the front ones. (N, D), (N, E) -> (N, E)

        Of unit length; an estimate shorter than 1e-3 has no direction: zero, without a gradient.
        """
        attention = self.graph(front, back).softmax(dim=2)
        if self.dropping:
            noise = torch.randn(*attention.shape[:2], 1, device=front.device)
            attention = attention * (noise > noise.mean(dim=0))
        mixed = (attention @ self.f1(front)).permute(1, 2, 0).flatten(1)
        estimate = self.f2(mixed)
        length = torch.linalg.vector_norm(estimate, dim=1, keepdim=True)
        # equal images leave rounding errors, of 1e-5, which must not be stretched to length 1
        directed: Tensor = estimate.masked_fill(length < 1e-3, 0.0) / length.clamp_min(1e-3)
        return directed


def linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """A linear layer with He's initialisation by fan-out, a normal cut at twice its deviation."""
    layer = nn.Linear(in_features, out_features, bias)
    deviation = math.sqrt(2 / out_features) / 0.87962566  # the cut takes that much of it away
    nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def graph_divergence(own: Tensor, target: Tensor) -> Tensor:
    """KL(student || teacher) of rows softmax(tanh(.)), summed over all. 2 x (A, N, N) -> ()

    Eq. (9): a sum over heads and images, with the student first. No gradient reaches the teacher.
    """
    log_p, log_q = (F.log_softmax(x.tanh(), dim=2) for x in (own, target.detach()))
    return (log_p.exp() * (log_p - log_q)).sum()


class MHGD(Method):
    """Multi-head graph distillation (Lee & Song, BMVC 2019, arXiv:1907.02226).

    "heads":   sum over modules of mean over images of 1 - cos(estimate, back vector), teacher alone
    "distill": gamma * CE + alpha * KD, and the gradient of
               transfer = sum over modules, heads and images of KL(student's row || teacher's row)

    A graph tells which images' vectors at one tap, the front, explain an image's at the next, the
    back: see `MHAN`, one a pair of consecutive taps. A vector is the leading right singular vector
    of a map, the student's the nearest of its leading four, turned to the teacher's side. The heads
    learn on the teacher, then are frozen, their BatchNorm too, and read both networks; rows are
    softmax(tanh(.)) over the batch of all ranks. The transfer has no weight, its gradient is
    clipped by that of the other terms: see `clipping.clipped`.

    The paper prints eq. (7) without "1 -"; it is a likeness, to be made large. `head_dropping` is
    the code's: in the first phase each image drops the heads whose Gaussian noise is below their
    mean. Not in the paper, and nothing is dropped of a single head, which would always be. The
    teacher's vectors are turned so that their sum is positive, in both phases: the paper leaves
    the sign to the solver. An estimate shorter than 1e-3 counts as none. Maps of unequal width: the
    student's goes through a connector, which the transfer alone trains, clipped as the student's
    weights are together.
    """

    lengths: ClassVar[Mapping[str, int]] = {"heads": 20, "distill": 100}

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        heads: int = 8,
        head_dropping: bool = True,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        if heads < 1:
            raise MethodError(f"MHGD has heads=1 or more, but heads is {heads}")
        if data.batch_size < 2:
            raise MethodError(
                "MHGD's graphs join the images of a batch; make data.batch_size 2 or more"
            )
        require_whole_batches(self, "graphs are as large as")
        self.pairs = stage_pairs(
            self, taps, teacher_taps, form="post", teacher_form="post", fewest=2
        )
        require_supervision(self, gamma, alpha)
        if alpha:
            require_same_classes(self)
        widths = [pair.teacher_shape[0] for pair in self.pairs]
        self.heads = nn.ModuleList(
            MHAN(front, back, heads, head_dropping) for front, back in itertools.pairwise(widths)
        )
        self.connectors = connectors_between(self.pairs)
        self.gamma, self.alpha, self.temperature = gamma, alpha, temperature

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs((pair.teacher for pair in self.pairs), self.alpha)

    def vectors(self, teacher: Captured) -> list[Tensor]:
        """The teacher's by tap, of this rank's images. (B, D) each"""
        # four, as of the student, so that equal maps give equal vectors to the last bit
        found = [right_singular_vectors(teacher[pair.teacher], 4)[1] for pair in self.pairs]
        return [upright(x)[:, :, 0] for x in found]

    def student_vectors(self, student: Captured, target: Sequence[Tensor]) -> list[Tensor]:
        """The student's, aligned with the teacher's. (B, D) each"""
        found = []
        for layer, pair, vector in zip(self.connectors, self.pairs, target, strict=True):
            candidates = right_singular_vectors(layer(student[pair.student]), 4)[1]
            found.append(aligned(candidates, vector[:, :, None]).squeeze(2))
        return found

    def estimate(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Estimates:
        """Run the teacher alone; each module estimates the back vectors from the front ones."""
        (teacher,) = teachers = self.teach(batch)
        vectors = [distributed.gather(x) for x in self.vectors(teacher)]
        estimates = [
            heads(front, back)
            for heads, (front, back) in zip(self.heads, itertools.pairwise(vectors), strict=True)
        ]
        return Estimates(batch, progress, [], teachers, estimates, vectors[1:])

    def estimate_loss(self, out: Estimates) -> Terms:
        """The term "heads", eq. (7) as a distance."""
        pairs = zip(out.estimates, out.targets, strict=True)
        distances = [(1 - (x * y).sum(dim=1)).mean() for x, y in pairs]
        return {"heads": torch.stack(distances).sum()}

    def forward(self, batch: Batch, progress: Progress, previous: Outputs | None = None) -> Graphs:
        """Run both networks, and the frozen heads on both."""
        student, (teacher,) = self.student(batch.image), (teachers := self.teach(batch))
        target = self.vectors(teacher)
        own = self.student_vectors(student, target)
        with running_statistics(self.heads):
            graphs = self._graphs(own)
            with torch.no_grad():
                targets = self._graphs(target)
        return Graphs(batch, progress, [student], teachers, graphs, targets)

    def _graphs(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        whole = [distributed.gather(x) for x in vectors]
        return [
            heads.graph(front, back)  # type: ignore[operator]
            for heads, (front, back) in zip(self.heads, itertools.pairwise(whole), strict=True)
        ]

    def loss(self, out: Graphs) -> Terms:
        """The weighted terms "ce" and "kd", where their weights are not 0, and "graph", eq. (9)."""
        rows = zip(out.own, out.target, strict=True)
        graph = torch.stack([graph_divergence(x, y) for x, y in rows]).sum()
        return {**supervision(out, self.gamma, self.alpha, self.temperature), "graph": graph}

    def phases(self) -> Sequence[Phase]:
        """In "heads" nothing predicts yet; then "distill"."""
        heads = Update("heads", self.estimate_loss, list(self.heads.parameters()))
        moved = [*self.student.parameters(), *self.connectors.parameters()]
        student = Update(
            "student",
            self.loss,
            [p for p in moved if p.requires_grad],
            clipped("graph", list(self.connectors.parameters())),
        )
        return [
            Phase("heads", [Turn(self.estimate, [heads])], self.lengths["heads"], predictors=dict),
            Phase("distill", [Turn(self.__call__, [student])], self.lengths["distill"]),
        ]
