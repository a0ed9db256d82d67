"""Ji, Heo, Park, Show, Attend and Distill: Knowledge Distillation via Attention-based Feature
Matching, AAAI 2021, arXiv:2102.02973.

Not online adversarial feature-map distillation, nor the attentive feature distillation of transfer
learning (ICLR 2020), which have the same acronym.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import require_two_images
from potstill.errors import MethodError, TapError
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net
from potstill.pairing import Role, map_shape, network, nothing_to_compare

MOST = 27
"""Blocks of a network that are read: those of resnet56, and every second of resnet110."""


@dataclass(frozen=True, eq=False)
class Attended(Outputs):
    """What AFD's forward gives, for S maps of the student and T of the teacher."""

    weights: Tensor
    """(B, T, S), how much each of the teacher's maps teaches each of the student's."""


class AFDAttention(Method):
    """Match every block with every block by learnt attention (Ji et al., arXiv:2102.02973).

    loss = gamma * CE + alpha * KD + beta * sum_t mean_b sum_s w_bts * mean((v_bs - v_bt)^2)

    v is the mean of squares over channels, the student's then averaged or repeated to the teacher's
    size, scaled to unit length. The weights w sum to 1 over the student's maps s; see `Attention`,
    of width `q`. The maps are what the blocks give after their ReLU, 27 at most (every second of
    54, ending with the last), or stages where no blocks are known; `taps` and `teacher_taps` choose
    others, "block1" being the first block's. A WRN's block is read at the next one's first ReLU;
    the public code runs that BatchNorm again, which moves its averages twice a step.
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
        q: int = 128,
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        require_two_images(self)
        if q < 1:
            raise MethodError(f"AFDAttention: q is {q}; choose 1 or more, 128 as published")
        self.taps = block_taps(self, "student", taps, "taps")
        self.teacher_taps = block_taps(self, "teacher", teacher_taps, "teacher_taps")
        if alpha:
            require_same_classes(self)
        self.attention = Attention(
            [map_shape(self, "student", tap, "taps")[0] for tap in self.taps],
            [map_shape(self, "teacher", tap, "teacher_taps")[0] for tap in self.teacher_taps],
            q,
        )
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs(self.teacher_taps, self.alpha)

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Attended:
        """Run both networks, and the attention on the spatial means of their maps."""
        student, teachers = self.student(batch.image), self.teach(batch)
        means = [student[tap].mean((2, 3)) for tap in self.taps]
        teacher_means = [teachers[0][tap].mean((2, 3)) for tap in self.teacher_taps]
        weights = self.attention(means, teacher_means)
        return Attended(batch, progress, [student], teachers, weights)

    def loss(self, out: Attended) -> Terms:
        """The weighted terms "ce" and "afd", and "kd" where alpha is not 0."""
        (student,), (teacher,) = out.students, out.teachers
        distances = energy_distances(
            [student[tap] for tap in self.taps],
            [teacher[tap].detach() for tap in self.teacher_taps],
        )
        afd = (out.weights * distances).sum((1, 2)).mean()
        terms = supervision(out, self.gamma, self.alpha, self.temperature)
        return {**terms, "afd": self.beta * afd}


class Attention(nn.Module):
    """Weights of the student's S maps for each of the teacher's T, from their spatial means.

    softmax over s of (<B_ts(K_s), Q_t> + <P_t, P_s>) / sqrt(q), Q_t = BN(linear(mean_t)), K_s =
    ReLU(BN(linear(mean_s))), and B = BN(linear) from q to T * q, one for all s, normalised over
    images and s. P is a table of one row for each map.
    """

    def __init__(self, widths: Sequence[int], teacher_widths: Sequence[int], q: int) -> None:
        super().__init__()
        s, t = len(widths), len(teacher_widths)
        self.queries = nn.ModuleList(nn.Linear(width, q) for width in teacher_widths)
        self.keys = nn.ModuleList(nn.Linear(width, q) for width in widths)
        self.query_norm = nn.BatchNorm1d(t * q)  # of all maps side by side, each normalised alone
        self.key_norm = nn.BatchNorm1d(s * q)
        self.bilinear = nn.Linear(q, t * q)
        self.bilinear_norm = nn.BatchNorm1d(t * q)
        self.position = nn.Parameter(nn.init.xavier_normal_(torch.empty(s, q)))
        self.teacher_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(t, q)))

    def forward(self, means: Sequence[Tensor], teacher_means: Sequence[Tensor]) -> Tensor:
        """Weights that sum to 1 over s. S of (B, C), T of (B, D) -> (B, T, S)"""
        b, (s, q), t = len(means[0]), self.position.shape, len(teacher_means)
        queries, keys = (
            torch.cat([linear(x) for linear, x in zip(layers, given, strict=True)], 1)
            for layers, given in ((self.queries, teacher_means), (self.keys, means))
        )
        queries = self.query_norm(queries).view(b, t, q)
        keys = self.key_norm(keys).relu().view(b * s, q)
        keys = self.bilinear_norm(self.bilinear(keys)).view(b, s, t, q)
        content = torch.einsum("bstq,btq->bts", keys, queries)
        place = self.teacher_position @ self.position.mT
        return ((content + place) / math.sqrt(q)).softmax(2)


def energy_distances(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared differences of unit energy maps, of every pair. -> (B, T, S)

    S of (B, C, H, W), T of (B, D, H', W'). The student's energy is averaged down, or repeated, to
    the teacher's size. Maps of zeros stay zero.
    """
    own, rows = energies(student), []
    for energy in energies(teacher):
        pooled = [F.adaptive_avg_pool2d(e, energy.shape[2:]) for e in own]  # type: ignore[arg-type]
        p, q = (F.normalize(e.flatten(2), dim=2, eps=1e-12) for e in (torch.cat(pooled, 1), energy))
        rows.append((p.unsqueeze(1) - q.unsqueeze(2)).square().mean(3))
    return torch.cat(rows, 1)


def energies(maps: Sequence[Tensor]) -> list[Tensor]:
    """Means of squares over channels, stacked where neighbours are of one size.

    n of (B, C, H, W) -> (B, m, H, W) for each stretch of m
    """
    found = groupby((x.square().mean(1) for x in maps), key=lambda energy: energy.shape)
    return [torch.stack(list(same), 1) for _, same in found]


def block_taps(
    method: Method, role: Role, taps: Sequence[str] | None, argument: str
) -> tuple[str, ...]:
    """Names of the taps given, or else of the blocks' ends, which become taps of the network."""
    net = network(method, role)
    ends = {f"block{k}": place for k, place in enumerate(net.block_ends, start=1)}
    every = max(1, math.ceil(len(ends) / MOST))
    blocks = list(ends)[(len(ends) - 1) % every :: every]
    chosen = tuple((blocks or net.stages("post")) if taps is None else taps)
    if not chosen:
        raise nothing_to_compare(method, role, argument, given=taps is not None)
    known = () if taps is None else net.taps  # a tap of that name may be someone's own
    try:
        net.add_taps({tap: ends[tap] for tap in chosen if tap in ends and tap not in known})
    except TapError as error:
        raise TapError(f"the {role}: {error}; or choose {argument}=[...]") from None
    return chosen
