"""Yang, Li, Shao, Shi, Yuan, Yuan, Masked Generative Distillation, ECCV 2022, arXiv:2205.01529.

Not Matching Guided Distillation (ECCV 2020), which has the same acronym.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from potstill import distributed
from potstill.connectors import Connected
from potstill.errors import MethodError
from potstill.losses import meet
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes, supervision, teacher_outputs
from potstill.net import Net
from potstill.pairing import last_map

PER_ELEMENT = 7e-5 * 512 * 7 * 7
"""The published weight, 7e-5 of a sum over 512x7x7 elements, as one of their mean."""


class MGD(Method):
    """Regenerate the teacher's map from a masked one (Yang et al., ECCV 2022, arXiv:2205.01529).

    loss = gamma * CE + alpha * KD + beta * mean over images of sum((G(mask * x) - teacher's map)^2)

    x is the student's last map, through a 1x1 convolution where the widths differ; the mask is 0
    with probability `drop`, and G is two 3x3 convolutions. The larger of two maps of unequal size
    is averaged down to the other's. `mask` drops whole channels, as the authors' code for
    classification does, or pixels, as the paper and their code for detection do. Beta, their alpha,
    weights a sum and so depends on the map's size: None takes the published weight of an element,
    7e-5 on 512x7x7, to the map at hand.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float | None = None,
        drop: float = 0.15,
        mask: Literal["channel", "pixel"] = "channel",
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        tap: str | None = None,
        teacher_tap: str | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        self.tap, shape = last_map(self, "student", tap, "tap")
        self.teacher_tap, teacher_shape = last_map(self, "teacher", teacher_tap, "teacher_tap")
        if not 0 <= drop <= 1:
            raise MethodError(
                f"MGD masks a share of the student's map, and drop is {drop}; choose 0 to 1"
            )
        if alpha:
            require_same_classes(self)
        width, (_, height, breadth) = (
            teacher_shape[0],
            min(shape, teacher_shape, key=lambda s: s[1]),
        )
        self.align = nn.Conv2d(shape[0], width, 1) if shape[0] != width else nn.Identity()
        self.generator = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(width, width, 3, padding=1),
                relu=nn.ReLU(),
                conv2=nn.Conv2d(width, width, 3, padding=1),
            )
        )
        self.beta = PER_ELEMENT / (width * height * breadth) if beta is None else beta
        self.drop, self.mask = drop, mask
        self.gamma, self.alpha, self.temperature = gamma, alpha, temperature

    @property
    def reads(self) -> frozenset[str]:
        return teacher_outputs([self.teacher_tap], self.alpha)

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, and the generator on what a new mask leaves of the student's map."""
        student, (teacher,) = self.student(batch.image), self.teach(batch)
        x, _ = meet(self.align(student[self.tap]), teacher[self.teacher_tap])
        mapped = self.generator(x * self.draw_mask(x))
        return Connected(batch, progress, [student], [teacher], [mapped])

    def draw_mask(self, x: Tensor) -> Tensor:
        """Which channels, or pixels, of each image stay. (B, C, H, W) -> (B, C, 1, 1), (B, 1, H, W)

        Drawn for the whole batch, of which this rank takes its share.
        """
        b, c, h, w = x.shape
        shape = (c, 1, 1) if self.mask == "channel" else (1, h, w)
        drawn = torch.rand(b * distributed.world_size(), *shape, device=x.device)
        return distributed.local(drawn) >= self.drop

    def loss(self, out: Connected) -> Terms:
        """The weighted terms "ce" and "mgd", and "kd" where alpha is not 0."""
        (teacher,), (mapped,) = out.teachers, out.mapped
        own, other = meet(mapped, teacher[self.teacher_tap].detach())
        distance = (own - other).square().sum((1, 2, 3)).mean()
        terms = supervision(out, self.gamma, self.alpha, self.temperature)
        return {**terms, "mgd": self.beta * distance}
