"""Yang, Martinez, Bulat, Tzimiropoulos, Knowledge Distillation via Softmax Regression
Representation Learning, ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import Connected, connector, require_two_images
from potstill.errors import MethodError, NetworkError
from potstill.method import Batch, DataSpec, Method, Outputs, Progress, Terms
from potstill.methods.kd import require_same_classes, supervision
from potstill.net import Net
from potstill.pairing import feature_shape, last_map


class SRRL(Method):
    """Make features that the teacher's own classifier reads as its own (Yang et al., ICLR 2021).

    loss = gamma * CE + alpha * KD + feature * mean((v - t)^2) + regression * mean((Wv + b - z)^2)

    v is the mean over space of ReLU(connector(student's map)), t the vector that the teacher's
    classifier (W, b) reads and z its logits; means are over images and channels, or classes. W and
    b are frozen, and gradients pass through them. The defaults are those of the authors' ImageNet
    code; their weights for CIFAR, chosen for each pair, are not public. `tap` is the map that is
    pooled; "embed" and alpha 1 give the form of SimKD's tables, a connector on the pooled vector.
    The teacher may have other classes where alpha is 0.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        feature: float = 1.0,
        regression: float = 1.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        tap: str | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        shape: Sequence[int]
        if tap is None:
            tap, shape = last_map(self, "student", None, "tap")
        else:
            shape = feature_shape(self, "student", tap, "tap")
        if len(shape) not in (1, 3):
            raise MethodError(
                f"SRRL needs a feature map (C, H, W) or a vector, but '{tap}' of the student is "
                f"{tuple(shape)}; choose another tap=..."
            )
        width = classifier(self.teachers[0], "teacher").in_features
        read = tuple(self.teachers[0].shape_of("embed"))
        if read != (width,):
            raise MethodError(
                f"SRRL needs a teacher whose 'embed' is the vector that its classifier reads, "
                f"({width},), but it is {read}; name no other tap embed, or choose another teacher"
            )
        if len(shape) == 1:
            require_two_images(self)
        if alpha:
            require_same_classes(self)
        self.tap = tap
        self.connector = nn.Sequential(connector(shape[0], width), nn.ReLU())
        self.feature, self.regression = feature, regression
        self.gamma, self.alpha, self.temperature = gamma, alpha, temperature

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"embed", "logits"})

    def forward(
        self, batch: Batch, progress: Progress, previous: Outputs | None = None
    ) -> Connected:
        """Run both networks, and the connector on the student's map."""
        student, teachers = self.student(batch.image), self.teach(batch)
        x = student[self.tap]
        mapped = self.connector(x if x.dim() == 4 else x[:, :, None, None])
        return Connected(batch, progress, [student], teachers, [mapped])

    def loss(self, out: Connected) -> Terms:
        """The weighted terms "ce", "fm" and "sr", and "kd" where alpha is not 0."""
        (teacher,), (mapped,) = out.teachers, out.mapped
        vector = mapped.mean((2, 3))
        logits: Tensor = self.teachers[0].classifier(vector)
        return {
            **supervision(out, self.gamma, self.alpha, self.temperature),
            "fm": self.feature * F.mse_loss(vector, teacher["embed"].detach()),
            "sr": self.regression * F.mse_loss(logits, teacher.logits.detach()),
        }


def classifier(net: Net, role: str) -> nn.Linear:
    """A network's last linear layer. Raises NetworkError, naming the role, if there is none."""
    try:
        return net.classifier
    except NetworkError as error:
        raise NetworkError(f"the {role}: {error}") from None
