"""Chung, Park, Kim, Kwak, Feature-map-level Online Adversarial Knowledge Distillation, ICML 2020.

arXiv:2002.01775.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import Connected, require_two_images, transfer
from potstill.errors import MethodError
from potstill.method import Batch, DataSpec, Outputs, Phase, Progress, Terms, Turn, Update
from potstill.net import Net
from potstill.peers import Peers, last_maps, taught

_ADAM = {
    "name": "adam",
    "lr": 2e-5,
    "weight_decay": 0.1,
    "schedule": {"name": "steps", "milestones": [75, 150], "factor": 0.1},
}


@dataclass(frozen=True, eq=False)
class Judged(Connected):
    """What the discriminators say, (B,) in (0, 1) by network; `mapped` holds the maps they see."""

    own: Sequence[Tensor]
    """D_k of the map of k, whose gradient reaches network k."""
    fake: Sequence[Tensor]
    """D_k of the same map, detached."""
    real: Sequence[Tensor]
    """D_k of the map of k's source, detached."""


class AFDOnline(Peers):
    """Networks in a ring teach the next their logits and their maps' distribution.

    Chung et al., arXiv:2002.01775. Network k learns from its source, the one before it:

    logits:          CE(k, label) + alpha * T^2 * KL(source || k at temperature T)
    features:        mean (1 - D_k(map of k))^2
    discriminators:  mean (1 - D_k(map of the source))^2 + mean D_k(map of k)^2

    All gradients are taken at the same weights, then each network takes a step on its logits' loss,
    the extractors (what the map depends on; no classifier) and transfer layers one on the features'
    by Adam with coupled weight decay ("features"), and the discriminators theirs. Two networks are
    a ring, too: each is the other's source. Where widths differ, a transfer layer (1x1 convolution,
    BatchNorm, ReLU) brings every map to the widest; larger maps are averaged down before it.

    Not public, and chosen: the discriminator's layers, the common width, that logits follow the
    ring as well. `logit_peers` "all" learns from the mean KL to all others instead. Table 2 of the
    paper leaves out one half: `alpha` 0, or `adversarial` False. `taps` has a name for each
    network, or one for all; by default the map that is pooled.
    """

    published_optimizers: ClassVar = {"features": _ADAM, "discriminators": _ADAM}

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        temperature: float = 3.0,
        alpha: float = 1.0,
        adversarial: bool = True,
        logit_peers: Literal["ring", "all"] = "ring",
        taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        if logit_peers not in ("ring", "all"):
            raise MethodError(f"AFDOnline: logit_peers is {logit_peers!r}; give 'ring' or 'all'")
        self.temperature, self.alpha = temperature, alpha
        self.adversarial, self.logit_peers = adversarial, logit_peers
        count = len(students)
        self.sources = [(k - 1) % count for k in range(count)]
        if not adversarial:
            return
        maps = last_maps(self, range(count), taps)
        self.taps = [name for name, _ in maps]
        widths, heights, breadths = zip(*(shape for _, shape in maps), strict=True)
        width, self.size = max(widths), (min(heights), min(breadths))
        if max(self.size) <= 2:
            require_two_images(self)  # the discriminators' BatchNorm sees one value an image
        self.transfers = nn.ModuleList(
            nn.Identity() if min(widths) == width else transfer(own, width) for own in widths
        )
        self.discriminators = nn.ModuleList(discriminator(width, self.size) for _ in students)

    def forward(self, batch: Batch, progress: Progress, previous: Outputs | None = None) -> Outputs:
        """Run every network once, then each discriminator on the two maps it compares."""
        out = super().forward(batch, progress)
        if not self.adversarial:
            return out
        maps = [student[tap] for student, tap in zip(out.students, self.taps, strict=True)]
        maps = [
            x if x.shape[2:] == self.size else F.adaptive_avg_pool2d(x, self.size) for x in maps
        ]
        mapped = [layer(x) for layer, x in zip(self.transfers, maps, strict=True)]
        judges = list(enumerate(self.discriminators))
        # one call a map: BatchNorm must not mix the two
        return Judged(
            batch,
            progress,
            out.students,
            [],
            mapped,
            own=[judge(mapped[k]) for k, judge in judges],
            fake=[judge(mapped[k].detach()) for k, judge in judges],
            real=[judge(mapped[self.sources[k]].detach()) for k, judge in judges],
        )

    def loss_of(self, k: int, out: Outputs) -> Terms:
        """The terms "ce", and "kd" where alpha is not 0, of student k's logits."""
        logits = [student.logits for student in out.students]
        ring = self.logit_peers == "ring"
        peers = [logits[self.sources[k]]] if ring else [*logits[:k], *logits[k + 1 :]]
        return taught(logits[k], peers, out.batch.label, self.alpha, self.temperature)

    def feature_loss(self, out: Judged) -> Terms:
        """One term a student, by its name: its discriminator should take its map for real."""
        return {self.name_of(k): (1 - own).square().mean() for k, own in enumerate(out.own)}

    def discriminator_loss(self, out: Judged) -> Terms:
        """One term a student, by its name: the source's map is real, the student's is not."""
        return {
            self.name_of(k): (1 - real).square().mean() + fake.square().mean()
            for k, (real, fake) in enumerate(zip(out.real, out.fake, strict=True))
        }

    def phases(self) -> Sequence[Phase]:
        updates: list[Update[Any]] = [self.update_of(k) for k in range(len(self.students))]
        if self.adversarial:
            extractors = [
                p
                for net, tap in zip(self.nets, self.taps, strict=True)
                for p in net.parameters_before(tap)
            ]
            features = [*extractors, *self.transfers.parameters()]
            judges = list(self.discriminators.parameters())
            updates = [replace(update, last=False) for update in updates]  # features come after
            updates.append(Update("features", self.feature_loss, features, last=True))
            updates.append(Update("discriminators", self.discriminator_loss, judges))
        return [Phase("distill", [Turn(self.__call__, updates)], self.lengths["distill"])]


def discriminator(channels: int, size: tuple[int, int]) -> nn.Sequential:
    """How real a map is, in (0, 1). (B, C, *size) -> (B,)

    3x3 convolution of stride 2 to half the channels, BatchNorm, LeakyReLU, a convolution as large
    as what is left, Sigmoid.
    """
    height, width = ((extent + 1) // 2 for extent in size)
    half = max(1, channels // 2)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, half, 3, stride=2, padding=1),
            bn=nn.BatchNorm2d(half),
            relu=nn.LeakyReLU(0.2),
            conv2=nn.Conv2d(half, 1, (height, width)),
            sigmoid=nn.Sigmoid(),
            flatten=nn.Flatten(0),
        )
    )
