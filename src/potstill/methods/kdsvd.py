"""Lee, Kim, Song, Self-supervised Knowledge Distillation Using SVD, ECCV 2018, arXiv:1807.06819."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from potstill import distributed
from potstill.clipping import clipped
from potstill.connectors import Connected, connect, connectors_between
from potstill.errors import MethodError, by
from potstill.losses import aligned, right_singular_vectors, upright
from potstill.method import Batch, DataSpec, Method, Outputs, Phase, Progress, Terms, Turn, Update
from potstill.methods.kd import (
    require_same_classes,
    require_supervision,
    supervision,
    teacher_outputs,
)
from potstill.net import Net
from potstill.pairing import stage_pairs


class KDSVD(Method):
    """Relate leading singular vectors of consecutive stages (KD-SVD, ECCV 2018, arXiv:1807.06819).

    transfer = sum over images and consecutive taps of |R_student - R_teacher|^2; see `relation`

    What is related are the `vectors` leading right singular vectors of each map, the student's
    chosen among `extra` more and turned to the teacher's side; see `compressed`. The loss has no
    weight: its gradient is clipped by that of gamma * CE + alpha * KD; see `clipping.clipped`.
    `bandwidth` is the paper's beta. Where the authors' codes differ, the later one, which stands
    behind the comparison of MHGD, is followed: the student is turned, not the teacher; the sum is
    over the batch; the reference norm is without weight decay. Two of its slips are not: a gradient
    of the vectors that is twice the exact one, and none for nearly square maps. Maps of unequal
    width: the student's goes through a connector, which the transfer loss alone trains, clipped as
    the student's weights are together.
    """

    lengths: ClassVar[Mapping[str, int]] = {"distill": 100}
    pairs_needed: ClassVar[int] = 2
    """Fewest pairs of maps: a relation is of two."""

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        vectors: int = 1,
        extra: int = 3,
        bandwidth: float = 8.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        self.pairs = stage_pairs(
            self, taps, teacher_taps, form="post", teacher_form="post", fewest=self.pairs_needed
        )
        if vectors < 1 or extra < 0:
            raise MethodError(
                f"{type(self).__name__} compresses a map to vectors=1 or more, among which the "
                f"student has extra=0 or more to choose, but they are {vectors} and {extra}"
            )
        if bandwidth <= 0:
            raise MethodError(f"KDSVD's bandwidth must be above 0, but it is {bandwidth}")
        for pair in self.pairs:
            d, h, w = pair.teacher_shape
            if min(d, h * w) < vectors:
                raise MethodError(
                    f"{type(self).__name__}: '{pair.teacher}' of the teacher is "
                    f"{by(pair.teacher_shape)} and has {min(d, h * w)} singular vectors; "
                    f"vectors={vectors} are too many"
                )
        require_supervision(self, gamma, alpha)
        if alpha:
            require_same_classes(self)
        self.connectors = connectors_between(self.pairs)
        self.vectors, self.extra, self.bandwidth = vectors, extra, bandwidth
        self.gamma, self.alpha, self.temperature = gamma, alpha, temperature

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs((pair.teacher for pair in self.pairs), self.alpha)

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, and the connectors on the student's maps."""
        return connect(self, batch, progress, self.connectors, self.pairs)

    def loss(self, out: Connected) -> Terms:
        """The weighted terms "ce" and "kd", where their weights are not 0, and "svd"."""
        (teacher,) = out.teachers
        found = [
            compressed(mapped, teacher[pair.teacher].detach(), self.vectors, self.extra)
            for mapped, pair in zip(out.mapped, self.pairs, strict=True)
        ]
        # a sum over the images of all ranks, whose gradient the engine will average
        distance = distributed.world_size() * self.distance(found)
        return {**supervision(out, self.gamma, self.alpha, self.temperature), "svd": distance}

    def distance(self, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over images and consecutive taps, of student's and teacher's vectors by tap."""
        return torch.stack(
            [
                relation_distance(front, back, self.bandwidth)
                for front, back in itertools.pairwise(found)
            ]
        ).sum()

    def phases(self) -> Sequence[Phase]:
        """One, "distill"; the transfer's gradient is clipped by the target's, tensor by tensor."""
        gradients = clipped("svd", list(self.connectors.parameters()))
        update = Update("student", self.loss, self.trainable(), gradients)
        return [Phase("distill", [Turn(self.__call__, [update])], self.lengths["distill"])]


def compressed(
    student: Tensor, teacher: Tensor, count: int = 1, extra: int = 3
) -> tuple[Tensor, Tensor]:
    """Leading singular vectors of two maps, aligned. (B, D, H, W), (B, D, h, w) -> 2 x (B, D, K)

    The teacher's `count` leading ones, each with the sign that makes its sum positive, and for each
    the nearest of the student's `count + extra`, turned to its side. Both are weighted by the
    teacher's singular values, scaled to unit length.
    """
    # as many as of the student, so that equal maps give equal vectors to the last bit
    values, target = (x[..., :count] for x in right_singular_vectors(teacher, count + extra))
    target, weights = upright(target), F.normalize(values, dim=1)[:, None]
    own = aligned(right_singular_vectors(student, count + extra)[1], target)
    return weights * own, weights * target


def relation(front: Tensor, back: Tensor, bandwidth: float = 8.0) -> Tensor:
    """How like two taps' vectors are, entry by entry. (B, D, K), (B, E, K) -> (B, E, D, K)

    exp(-(back - front)^2 / bandwidth): 1 for equal entries.
    """
    return torch.exp(-(back[:, :, None] - front[:, None]).square() / bandwidth)


def relation_distance(
    front: tuple[Tensor, Tensor],
    back: tuple[Tensor, Tensor],
    bandwidth: float = 8.0,
    limit: int = 2**24,
) -> Tensor:
    """Sum of squared differences of two networks' relations. (B, D, K) and (B, E, K) of each -> ()

    Each argument is the student's vectors and the teacher's. No tensor has more than `limit`
    elements (or those of one image): what exceeds it is computed a few images at a time, and once
    more going backwards.
    """
    (own_front, front_target), (own_back, back_target) = front, back
    images = max(1, limit // (own_front[0].numel() * own_back.shape[1]))
    tensors = (own_front, own_back, front_target, back_target)
    parts = list(zip(*(torch.split(x, images) for x in tensors), strict=True))
    if len(parts) == 1:
        return _differences(*tensors, bandwidth)
    sums = [
        checkpoint(_differences, *part, bandwidth, use_reentrant=False, preserve_rng_state=False)
        for part in parts
    ]
    return torch.stack(sums).sum()


def _differences(
    own_front: Tensor, own_back: Tensor, front: Tensor, back: Tensor, bandwidth: float
) -> Tensor:
    own, other = relation(own_front, own_back, bandwidth), relation(front, back, bandwidth)
    return (own - other).square().sum()
