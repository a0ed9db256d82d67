"""Chen et al., Cross-Layer Distillation with Semantic Calibration, AAAI 2021, arXiv:2012.03236."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import distributed
from potstill.connectors import require_whole_batches
from potstill.errors import MethodError
from potstill.losses import meet
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net
from potstill.pairing import Shape, map_shape, nothing_to_compare


@dataclass(frozen=True, eq=False)
class Calibrated(Outputs):
    """What SemCKD's forward gives, for S maps of the student and T of the teacher."""

    weights: Tensor
    """(B, S, T), how much each of the student's maps learns from each of the teacher's."""
    projected: Sequence[Sequence[Tensor]]
    """For each of the student's maps and each of the teacher's: (B, C of the teacher, h, w)."""


class SemCKD(Method):
    """Learn from all of the teacher's stages at every stage (Chen et al., arXiv:2012.03236).

    loss = gamma * CE + alpha * KD + beta * mean_b mean_i sum_j w_bij * mean((P_ij(x_bi) - y_bj)^2)

    The weights w sum to 1 over the teacher's stages j. They compare what two small MLPs make of an
    image's similarities to its batch, at the student's stage i and at j, and are learnt with the
    student, as are the projections P; the larger map of a pair is averaged down to the smaller
    one's size before P. `soft` is the weights' temperature, which the authors' later code added.

    The MLPs are as wide as the batch, so batches must be whole, and the order of images matters. On
    several ranks that is the global batch, where the public code has each rank's own. Stages of a
    WRN are read before BatchNorm, as in RepDistiller; the authors' have ResNet form. beta is 50 on
    ImageNet; distances grow with the teacher's maps, and training diverges where these are large.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 400.0,
        gamma: float = 1.0,
        alpha: float = 1.0,
        temperature: float = 4.0,
        soft: float = 1.0,
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        self.taps = tuple(self.student.stages() if taps is None else taps)
        self.teacher_taps = tuple(
            self.teachers[0].stages() if teacher_taps is None else teacher_taps
        )
        if not self.taps:
            raise nothing_to_compare(self, "student", "taps", taps is not None)
        if not self.teacher_taps:
            raise nothing_to_compare(self, "teacher", "teacher_taps", teacher_taps is not None)
        shapes = [map_shape(self, "student", tap, "taps") for tap in self.taps]
        teacher_shapes = [
            map_shape(self, "teacher", tap, "teacher_taps") for tap in self.teacher_taps
        ]
        if data.batch_size < 8:
            raise MethodError(
                "SemCKD gives an image data.batch_size // 4 numbers and compares their direction, "
                f"so there must be two, but data.batch_size is {data.batch_size}; make it 8 or more"
            )
        require_whole_batches(self, "layers are as wide as")
        if soft <= 0:
            raise MethodError(f"SemCKD: soft is {soft:g}; choose a number above 0, 1 as published")
        if alpha:
            require_same_classes(self)
        self.queries = nn.ModuleList(embedding(data.batch_size) for _ in shapes)
        self.keys = nn.ModuleList(embedding(data.batch_size) for _ in teacher_shapes)
        self.projections = nn.ModuleList(
            nn.ModuleList(projection(own, other) for other in teacher_shapes) for own in shapes
        )
        self.beta, self.gamma, self.alpha = beta, gamma, alpha
        self.temperature, self.soft = temperature, soft

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs(self.teacher_taps, self.alpha)

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Calibrated:
        """Run both networks, the MLPs and the projections. MethodError for an incomplete batch."""
        images = len(batch.image) * distributed.world_size()
        if images != self.data.batch_size:
            raise MethodError(
                f"SemCKD's layers are as wide as data.batch_size, {self.data.batch_size}, but this "
                f"batch has {images} images; give whole batches"
            )
        student, teachers = self.student(batch.image), self.teach(batch)
        own = [student[tap] for tap in self.taps]
        others = [teachers[0][tap] for tap in self.teacher_taps]
        queries, keys = (
            torch.stack([embed(similarity(x)) for embed, x in zip(layers, maps, strict=True)], 1)
            for layers, maps in ((self.queries, own), (self.keys, others))
        )
        projected = [
            [project(meet(x, y)[0]) for project, y in zip(row, others, strict=True)]  # type: ignore[call-overload]
            for row, x in zip(self.projections, own, strict=True)
        ]
        weights = association(queries, keys, self.soft)
        return Calibrated(batch, progress, [student], teachers, weights, projected)

    def loss(self, out: Calibrated) -> Terms:
        """The weighted terms "ce" and "semantic", and "kd" where alpha is not 0."""
        others = [out.teachers[0][tap].detach() for tap in self.teacher_taps]
        distances = torch.stack(
            [
                torch.stack([distance(x, y) for x, y in zip(row, others, strict=True)], 1)
                for row in out.projected
            ],
            1,
        )
        semantic = (out.weights * distances).sum(2).mean()
        terms = supervision(out, self.gamma, self.alpha, self.temperature)
        return {**terms, "semantic": self.beta * semantic}


def similarity(x: Tensor) -> Tensor:
    """Inner products of this rank's maps with all of the batch. (B/W, C, H, W) -> (B/W, B)

    Not normalised: maps of size 100 give 1e5 and more, which half precision does not hold.
    """
    x = x.flatten(1)
    return x @ distributed.gather(x).mT


def association(queries: Tensor, keys: Tensor, soft: float) -> Tensor:
    """Weights that sum to 1 over the teacher's taps. (B, S, D), (B, T, D) -> (B, S, T)

    Softmax of cosine / soft, so at soft 1 each is between 1 / (1 + (T - 1) e^2) and
    1 / (1 + (T - 1) / e^2). A vector of zeros is alike to all.
    """
    queries, keys = (F.normalize(x, dim=2, eps=1e-12) for x in (queries, keys))
    return (queries @ keys.mT / soft).softmax(2)


def distance(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of each image's maps. (B, C, h, w), (B, C, H, W) -> (B,)"""
    projected, teacher = meet(projected, teacher)
    return (projected - teacher).square().mean((1, 2, 3))


def embedding(batch_size: int) -> nn.Sequential:
    """The MLP that reads an image's similarities to its batch of B. (N, B) -> (N, B // 4)"""
    width = batch_size // 4
    return nn.Sequential(nn.Linear(batch_size, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def projection(own: Shape, other: Shape) -> nn.Sequential:
    """From the student's channels to the teacher's. (B, C, H, W) -> (B, D, H, W)"""
    width = 2 * other[0]
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(own[0], width, 1, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(width, width, 3, padding=1, bias=False),
            bn2=nn.BatchNorm2d(width),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(width, other[0], 1, bias=False),
        )
    )
