"""Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import Connected, require_two_images
from potstill.errors import MethodError
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net
from potstill.pairing import Pair, Role, Shape, network, stage_pairs


class ReviewKD(Method):
    """Fuse each stage with the deeper ones, then match the teacher's (Chen et al., CVPR 2021).

    loss = gamma * CE + alpha * KD + beta * min(1, epoch / warmup_epochs) * sum of HCL over levels

    Levels are the stages and "embed" as a 1x1 map. An ABF (attention based fusion) makes each of
    the student's look like the teacher's, which is taken before its activation; HCL is
    `hierarchical_context`. `epoch` is the whole epochs done on the published scale, so the first
    one has no review term. The paper is silent on the taps before activations and the warm-up; they
    are the public code's, as is the teacher's BatchNorm on batch statistics, where mdistiller has
    running ones. Published beta: 0.6 for ResNet-56 to 20, 1 for ResNet-110 to 32, 5 from WRN-40-2
    and ResNet-32x4 but 8 to ShuffleNetV2; 30, with lr 0.01, is reported for ResNet-50 to
    MobileNetV2. The default is mdistiller's.
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
        warmup_epochs: int = 20,
        teacher_statistics: Literal["batch", "running"] = "batch",
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        pairs = stage_pairs(self, taps, teacher_taps, teacher_form="pre")
        own, other = self._pooled("student"), self._pooled("teacher")
        self.levels = [*pairs, Pair("embed", "embed", own, other)]
        require_two_images(self)
        if warmup_epochs < 0:
            raise MethodError(f"ReviewKD: warmup_epochs is {warmup_epochs}; choose 0 or more")
        if alpha:
            require_same_classes(self)
        self.fusions = nn.ModuleList(
            ABF(level.shape[0], min(512, own[0]), level.teacher_shape, level.student != "embed")
            for level in self.levels
        )
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature
        self.warmup_epochs, self.teacher_statistics = warmup_epochs, teacher_statistics

    def _pooled(self, role: Role) -> Shape:
        shape = network(self, role).shapes.get("embed")
        if shape is None or len(shape) != 1:
            raise MethodError(
                f"ReviewKD compares pooled vectors beside the maps, and the {role} has no vector "
                "'embed'; name what its classifier reads with Net(..., taps={'embed': place})"
            )
        return (shape[0], 1, 1)

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs((level.teacher for level in self.levels), self.alpha)

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, then the fusions from the deepest level up."""
        student, teachers = self.student(batch.image), self.teach(batch)
        mapped: list[Tensor] = []
        deeper = None
        for level, fuse in reversed(list(zip(self.levels, self.fusions, strict=True))):
            fused, deeper = fuse(as_map(student[level.student]), deeper)
            mapped.insert(0, fused)
        return Connected(batch, progress, [student], teachers, mapped)

    def loss(self, out: Connected) -> Terms:
        """The weighted terms "ce" and "review", and "kd" where alpha is not 0."""
        (teacher,) = out.teachers
        levels = [
            hierarchical_context(mapped, as_map(teacher[level.teacher]).detach())
            for mapped, level in zip(out.mapped, self.levels, strict=True)
        ]
        epoch = math.floor(out.progress.published_epoch)
        ramp = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        terms = supervision(out, self.gamma, self.alpha, self.temperature)
        return {**terms, "review": self.beta * ramp * torch.stack(levels).sum()}


class ABF(nn.Module):
    """Attention based fusion of a level with the deeper ones, in the shape of the teacher's.

    (B, C, H, W), (B, M, h, w) -> (B, D, H', W'), (B, M, H', W'): what is compared, and what the
    next level is fused with. `fuse` is False for the deepest level, which has nothing to fuse with.
    """

    def __init__(self, channels: int, mid: int, out_shape: Shape, fuse: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, out_shape[0], 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_shape[0])
        self.attention = nn.Conv2d(2 * mid, 2, 1) if fuse else None
        self.out_size = out_shape[1:]
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.bn1(self.conv1(x))
        if self.attention is not None and deeper is not None:
            y = resized(deeper, x.shape[2:])
            z = self.attention(torch.cat([x, y], 1)).sigmoid()
            x = x * z[:, :1] + y * z[:, 1:]
        x = resized(x, self.out_size)
        return self.bn2(self.conv2(x)), x


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map made larger or smaller by taking the nearest values. (B, C, H, W) -> (B, C, *size)"""
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, list(size), mode="nearest")


def as_map(x: Tensor) -> Tensor:
    """Vectors as maps of one pixel, maps as they are. (B, C) -> (B, C, 1, 1)"""
    return x[:, :, None, None] if x.dim() == 2 else x


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL: mean squared difference at several resolutions. (B, C, H, W), (B, C, H, W) -> ()

    Of the maps, with weight 1, and of their averages to 4x4, 2x2 and 1x1, as far as these are less
    high than the maps, with weights 1/2, 1/4, ...; divided by the sum of the weights.
    """
    difference = student - teacher  # averaging is linear
    total, weight, weights = difference.square().mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size < difference.shape[2]:
            weight /= 2
            pooled = F.adaptive_avg_pool2d(difference, size)
            total, weights = total + weight * pooled.square().mean(), weights + weight
    return total / weights
