"""Chen, Mei, Zhang, Wang, Feng, Chen, Knowledge Distillation with the Reused Teacher Classifier,
CVPR 2022.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.errors import MethodError
from potstill.losses import meet
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes
from potstill.methods.srrl import classifier
from potstill.net import Net, shared_copy
from potstill.pairing import last_map


class SimKD(Method):
    """Match the last map alone and predict with the teacher's classifier (Chen et al., CVPR 2022).

    loss = beta * mean((P(student's map) - teacher's map)^2)

    P is a bottleneck of three convolutions, `reduction` times narrower than the teacher's map. The
    larger of two maps of unequal size is averaged down to the other's, the student's before P.
    There is no cross-entropy and no KD term, and the student's own classifier stays as it is. What
    predicts is W mean(P(map)) + b with the teacher's W and b: the student's layers but its
    classifier, P, and a copy of the teacher's classifier, which are larger together than the
    student that other methods train.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 1.0,
        reduction: int = 2,
        tap: str | None = None,
        teacher_tap: str | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        require_same_classes(self)
        self.tap, shape = last_map(self, "student", tap, "tap")
        self.teacher_tap, teacher_shape = last_map(self, "teacher", teacher_tap, "teacher_tap")
        own, _ = classifier(self.student, "student"), classifier(self.teachers[0], "teacher")
        if not self.teachers[0].pools(self.teacher_tap):
            raise MethodError(
                "SimKD gives the teacher's classifier the mean over space of the teacher's "
                f"'{self.teacher_tap}', but that is not what this classifier reads; choose the map "
                "that is pooled with teacher_tap=..., or another teacher"
            )
        width = teacher_shape[0]
        if not 1 <= reduction <= width:
            raise MethodError(
                f"SimKD divides the {width} channels of '{self.teacher_tap}' of the teacher by "
                f"reduction={reduction}; choose 1 to {width}, 2 as published"
            )
        size = teacher_shape[1:] if shape[1] > teacher_shape[1] else None
        self.projector = projector(shape[0], width, width // reduction, size)
        own.requires_grad_(False)  # no gradient reaches it, and it must not decay
        self.beta = beta

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.teacher_tap})

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, and the projector on the student's map."""
        student, teachers = self.student(batch.image), self.teach(batch)
        mapped = self.projector(student[self.tap])
        return Connected(batch, progress, [student], teachers, [mapped])

    def loss(self, out: Connected) -> Terms:
        """The weighted term "simkd"."""
        (teacher,), (mapped,) = out.teachers, out.mapped
        own, other = meet(mapped, teacher[self.teacher_tap].detach())
        return {"simkd": self.beta * F.mse_loss(own, other)}

    def predictors(self) -> Mapping[str, nn.Module]:
        """The student's layers but its classifier, and P, sharing weights; a copy of the head."""
        student, head = self.student, copy.deepcopy(self.teachers[0].classifier)
        backbone = shared_copy(student, {student.classifier: nn.Identity()})
        return {"student": ReusedClassifier(backbone, self.tap, self.projector, head)}


class ReusedClassifier(nn.Module):
    """Student's map, projector, mean over space, teacher's classifier. (B, C, H, W) -> (B, K)"""

    def __init__(
        self, backbone: Net, tap: str, projector: nn.Module, classifier: nn.Linear
    ) -> None:
        super().__init__()
        self.backbone, self.projector, self.classifier = backbone, projector, classifier
        self.tap = tap

    def forward(self, image: Tensor) -> Tensor:
        mapped = self.projector(self.backbone.capture(image)[self.tap])
        return self.classifier(mapped.mean((2, 3)))  # type: ignore[no-any-return]


def projector(
    channels: int, out_channels: int, hidden: int, size: Sequence[int] | None = None
) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolution, each with BN-ReLU. (B, C, H, W) -> (B, D, H, W)

    Where a size is given, maps are averaged down to it first. Convolutions have no bias:
    C m + 9 m^2 + m D + 4 m + 2 D parameters for m hidden channels.
    """
    return nn.Sequential(
        OrderedDict(
            pool=nn.Identity() if size is None else nn.AdaptiveAvgPool2d(tuple(size)),
            conv1=nn.Conv2d(channels, hidden, 1, bias=False),
            bn1=nn.BatchNorm2d(hidden),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
            bn2=nn.BatchNorm2d(hidden),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(hidden, out_channels, 1, bias=False),
            bn3=nn.BatchNorm2d(out_channels),
            relu3=nn.ReLU(),
        )
    )
