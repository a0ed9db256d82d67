"""Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019, arXiv:1904.01866."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import Connected, connect, connector
from potstill.errors import MethodError, TapError, by
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net
from potstill.pairing import Pair, stage_pairs


class OFD(Method):
    """Match what the teacher's ReLUs are about to pass, stage by stage (Heo et al., ICCV 2019).

    loss = gamma * CE + alpha * KD + beta * sum_i 2^(i - n) * d(c_i(student_i), m_i(teacher_i))

    Maps are taken before the ReLU that ends a stage. c is a connector, m the teacher's margin ReLU,
    d the partial squared distance summed over a map, averaged over images; KD is none of the
    paper's. A teacher's map of another size is first averaged to the student's, or repeated where
    it is the smaller one, as in mdistiller. The public code has the teacher's BatchNorm in train
    mode, so that its averages drift; here it normalises by the batch and they stay. Margins are
    computed once, from the teacher as it is given, and saved.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 1e-3,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        teacher_statistics: Literal["batch", "running"] = "batch",
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        self.pairs = stage_pairs(self, taps, teacher_taps, form="pre", teacher_form="pre")
        if alpha:
            require_same_classes(self)
        self.connectors = nn.ModuleList(
            connector(pair.shape[0], pair.teacher_shape[0]) for pair in self.pairs
        )
        self.margins = nn.ModuleList(
            MarginReLU(*_affine(self.teachers[0], pair)) for pair in self.pairs
        )
        self._require_maps_before_relu()
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature
        self.teacher_statistics = teacher_statistics

    def _require_maps_before_relu(self) -> None:
        teacher, found = self.teachers[0], self.teachers[0].probe()
        for pair in self.pairs:
            least, most = found[pair.teacher].aminmax()
            if least >= 0 and most > 0:
                raise MethodError(
                    f"OFD compares maps before a ReLU, but '{pair.teacher}' of the teacher "
                    f"('{teacher.taps[pair.teacher]}') is never negative; name the place before "
                    "the ReLU with Net(..., taps={'stage1:pre': 'layer1.relu:in'}, "
                    "norms={'stage1:pre': 'layer1.bn'})"
                )

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs((pair.teacher for pair in self.pairs), self.alpha)

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, and the connectors on the student's maps."""
        return connect(self, batch, progress, self.connectors, self.pairs)

    def loss(self, out: Connected) -> Terms:
        """The weighted terms "ce" and "ofd", and "kd" where alpha is not 0."""
        (teacher,), n = out.teachers, len(self.pairs)
        stages = []
        parts = zip(out.mapped, self.margins, self.pairs, strict=True)
        for i, (mapped, margin_relu, pair) in enumerate(parts, start=1):
            target = teacher[pair.teacher].detach()
            if target.shape[2:] != mapped.shape[2:]:
                target = F.adaptive_avg_pool2d(target, mapped.shape[2:])  # type: ignore[arg-type]
            stages.append(partial_distance(mapped, margin_relu(target)) / 2 ** (n - i))
        terms = supervision(out, self.gamma, self.alpha, self.temperature)
        return {**terms, "ofd": self.beta * torch.stack(stages).sum()}


class MarginReLU(nn.Module):
    """max(x, m) with a margin m for each channel. (B, C, H, W) -> (B, C, H, W)

    From weight and bias, (C,), of the normalisation before the ReLU.
    """

    margin: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        margin = margins(weight, bias).to(torch.get_default_dtype())
        self.register_buffer("margin", margin.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.margin)


def margins(weight: Tensor, bias: Tensor) -> Tensor:
    """Mean of the negative part of what a normalisation gives, float64. (C,), (C,) -> (C,)

    E[X | X < 0] for X ~ N(b, s^2) with s = |weight|, b = bias. -3 s where less than a thousandth
    of X is negative, as in the public code, which would divide by almost 0. Where s is 0, which it
    leaves a NaN, X is the point b, and the margin is the limit min(b, 0).
    """
    b, s = bias.detach().cpu().double(), weight.detach().cpu().double().abs()
    z = b / s.clamp(min=torch.finfo(s.dtype).tiny)
    share = torch.special.ndtr(-z)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(share > 0.001, b - s * density / share, -3 * s)


def partial_distance(student: Tensor, target: Tensor) -> Tensor:
    """Squared difference, but for what no ReLU would pass. (B, C, H, W), (B, C, H, W) -> ()

    A value costs nothing where the target is not positive and the student's not above it. Summed
    over a map, averaged over images.
    """
    squares = (student - target).square()
    counted = (student > target) | (target > 0)
    return squares.where(counted, 0).sum() / len(squares)


def _affine(teacher: Net, pair: Pair) -> tuple[Tensor, Tensor]:
    """Weight and bias, (C,), of the normalisation before a teacher tap's ReLU."""
    try:
        norm = teacher.norm(pair.teacher)
    except TapError as error:
        raise TapError(f"OFD takes its margins from the teacher: {error}") from None
    channels = pair.teacher_shape[0]
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    weight = torch.ones(channels) if weight is None else weight
    bias = torch.zeros(channels) if bias is None else bias
    if len(weight) != channels:
        raise MethodError(
            f"OFD takes a margin for each channel from '{teacher.norms[pair.teacher]}', which has "
            f"{len(weight)}, but '{pair.teacher}' of the teacher is "
            f"{by(pair.teacher_shape)}; say which is right before the ReLU with "
            "Net(..., norms={tap: path})"
        )
    return weight, bias
