"""Park et al., Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from potstill import distributed
from potstill.losses import pairwise_distance
from potstill.method import DataSpec, Method, Outputs, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net, in_full
from potstill.pairing import feature_shape


class RKD(Method):
    """Match distances and angles among the images of a batch (Park et al., arXiv:1904.05068).

    loss = gamma * CE + alpha * KD + beta * (distance * L_distance + angle * L_angle)

    See `distance_loss` and `angle_loss`; the batch is that of all ranks. The weights 25 and 50 are
    the benchmarks' for classification, where the vectors are not normalised first; the paper tunes
    them by task. `tap` and `teacher_tap` choose other features than the pooled vectors; they are
    flattened, and need not be equally wide.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 1.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        distance: float = 25.0,
        angle: float = 50.0,
        tap: str = "embed",
        teacher_tap: str = "embed",
    ) -> None:
        super().__init__(students, teachers, data)
        feature_shape(self, "student", tap, "tap")
        feature_shape(self, "teacher", teacher_tap, "teacher_tap")
        if alpha:
            require_same_classes(self)
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature
        self.distance, self.angle = distance, angle
        self.tap, self.teacher_tap = tap, teacher_tap

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs([self.teacher_tap], self.alpha)

    def loss(self, out: Outputs) -> Terms:
        """The weighted terms "ce", "kd", "distance" and "angle"; none whose weight is 0."""
        (student,), (teacher,) = out.students, out.teachers
        own = distributed.gather(student[self.tap].flatten(1))
        other = distributed.gather(teacher[self.teacher_tap].flatten(1))
        terms = supervision(out, self.gamma, self.alpha, self.temperature)
        if weight := self.beta * self.distance:
            terms["distance"] = weight * distance_loss(own, other)
        if weight := self.beta * self.angle:
            terms["angle"] = weight * angle_loss(own, other)
        return terms


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between distances in units of their mean. (B, D), (B, E) -> ()

    The mean distance is over pairs of two images, the loss over all B^2 pairs. One image gives 0.
    Points that coincide get no gradient from each other, and none reaches the teacher.
    """
    own, other = (_by_mean(pairwise_distance(x)) for x in (student, teacher.detach()))
    return F.smooth_l1_loss(own, other)


def _by_mean(distance: Tensor) -> Tensor:
    pairs = len(distance) * (len(distance) - 1)  # two images are never at distance 0: see above
    return distance / (distance.sum() / max(pairs, 1)).clamp_min(1e-6)


def angle_loss(student: Tensor, teacher: Tensor, limit: int = 2**24) -> Tensor:
    """Huber loss between cosines of the angles of all triplets. (B, D), (B, E) -> ()

    Mean over all B^3 triplets; the vertex is the first, and a side of length 0 gives cosine 0 and
    no gradient, nor does any reach the teacher. No tensor has more than `limit` elements (or those
    of one vertex, B * max(B, D, E)): what exceeds it is computed a few vertices at a time, and once
    more going backwards, where a few vertices' tensors exist at a time too.
    """
    own, other = in_full(student), in_full(teacher.detach())
    count = len(own)
    vertices = max(1, limit // (count * max(count, own.shape[1], other.shape[1])))
    parts = list(zip(torch.split(own, vertices), torch.split(other, vertices), strict=True))
    if len(parts) == 1:
        return _angle_differences(own, own, other, other) / count**3
    sums = [
        checkpoint(
            _angle_differences, a, own, b, other, use_reentrant=False, preserve_rng_state=False
        )
        for a, b in parts
    ]
    return torch.stack(sums).sum() / count**3


def _angle_differences(vertex: Tensor, own: Tensor, other_vertex: Tensor, other: Tensor) -> Tensor:
    own, other = angle_cosines(vertex, own), angle_cosines(other_vertex, other)
    # torch's own sum keeps the memory of all its summands for as long as the sum lives
    return F.smooth_l1_loss(own, other, reduction="none").sum()


def angle_cosines(vertex: Tensor, x: Tensor) -> Tensor:
    """Cosine at each vertex between the directions to each two points. (V, D), (B, D) -> (V, B, B)

    A point at the vertex, nearer than 1e-12, has no direction: cosines 0 and no gradient.
    """
    side = x - vertex[:, None]
    length = torch.linalg.vector_norm(side, dim=2, keepdim=True)
    direction: Tensor = side.masked_fill(length <= 1e-12, 0.0) / length.clamp_min(1e-12)
    return direction @ direction.mT
