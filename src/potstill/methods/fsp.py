"""Yim, Joo, Bae, Kim, A Gift from Knowledge Distillation, CVPR 2017."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.connectors import Connected, connect, connectors_between, init_then_distill
from potstill.errors import MethodError
from potstill.method import Batch, DataSpec, Method, Outputs, Phase, Progress, Terms
from potstill.methods.kd import (
    require_same_classes,
    require_supervision,
    supervision,
    teacher_outputs,
)
from potstill.net import Net
from potstill.pairing import stage_pairs


class FSP(Method):
    """Begin with the teacher's flow from stage to stage, then learn alone (Yim et al., CVPR 2017).

    init:    loss = beta * sum_i mean over images of 1/2 ||G_i(teacher) - G_i(student)||^2
    distill: loss = gamma * CE + alpha * KD

    G_i is the `fsp_matrix` of the maps i and i + 1. The init phase reads no labels. It trains what
    the maps depend on, and a connector where the student's map is not as wide as the teacher's. The
    second phase is plain training with fresh momentum; KD is none of the paper's, and without it no
    teacher runs. The published codes differ in the scale of the loss: this one, and the 40 epochs,
    are of the code around MHGD; the paper has no 1/2, RepDistiller takes the mean over entries.
    RepDistiller keeps the student in eval mode in the init phase, so that its running averages
    stay as they began; here it is in train mode. The paper and RepDistiller have the stem beside
    the stages: name it in `taps`.
    """

    lengths: ClassVar[Mapping[str, int]] = {"init": 40, "distill": 100}

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 1e-3,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        self.pairs = stage_pairs(
            self, taps, teacher_taps, form="post", teacher_form="post", fewest=2
        )
        if beta <= 0:
            raise MethodError(f"FSP's first phase needs beta above 0, but it is {beta}")
        require_supervision(self, gamma, alpha)
        if alpha:
            require_same_classes(self)
        self.connectors = connectors_between(self.pairs)
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs((pair.teacher for pair in self.pairs), self.alpha)

    def init_forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, and the connectors on the student's maps."""
        return connect(self, batch, progress, self.connectors, self.pairs)

    def init_loss(self, out: Connected) -> Terms:
        """The weighted term "fsp"."""
        (teacher,) = out.teachers
        maps = [teacher[pair.teacher].detach() for pair in self.pairs]
        distances = [
            (fsp_matrix(*theirs) - fsp_matrix(*own)).square().sum((1, 2)).mean() / 2
            for theirs, own in zip(pairwise(maps), pairwise(out.mapped), strict=True)
        ]
        return {"fsp": self.beta * torch.stack(distances).sum()}

    def forward(self, batch: Batch, progress: Progress, previous: Outputs | None = None) -> Outputs:
        """Run the student, and the teacher only where alpha is not 0."""
        teachers = self.teach(batch) if self.alpha else []
        return Outputs(batch, progress, [self.student(batch.image)], teachers)

    def loss(self, out: Outputs) -> Terms:
        """The weighted terms "ce", and "kd" where alpha is not 0."""
        return supervision(out, self.gamma, self.alpha, self.temperature)

    def phases(self) -> Sequence[Phase]:
        """In "init" nothing predicts yet; then "distill"."""
        return init_then_distill(
            self, self.init_forward, self.init_loss, self.connectors, self.pairs
        )


def fsp_matrix(front: Tensor, back: Tensor) -> Tensor:
    """Products of two maps' channels, averaged over space. (N, m, H, W), (N, n, h, w) -> (N, m, n)

    The larger map is first max-pooled to the smaller one's size: 2x2 with stride 2 where it is
    twice as high and wide.
    """
    size = [min(a, b) for a, b in zip(front.shape[2:], back.shape[2:], strict=True)]
    front, back = (
        x if list(x.shape[2:]) == size else F.adaptive_max_pool2d(x, size) for x in (front, back)
    )
    return torch.einsum("nchw,ndhw->ncd", front, back) / (size[0] * size[1])
