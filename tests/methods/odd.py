"""Throw-away methods, one for each odd thing the contract must carry. Not shipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import distributed
from potstill.batchnorm import batch_statistics
from potstill.losses import soft_kl
from potstill.method import (
    Batch,
    DataSpec,
    Method,
    Outputs,
    Phase,
    Progress,
    Terms,
    Turn,
    Update,
)
from potstill.net import Net


class TwoOptimizers(Method):
    """SGD on the whole student, Adam on its backbone, Adam on a critic, all from one forward."""

    def __init__(self, students: Sequence[Net], teachers: Sequence[Net], data: DataSpec) -> None:
        super().__init__(students, teachers, data)
        (width,), (other,) = (n.shape_of("embed") for n in (self.student, self.teachers[0]))
        self.transfer = nn.Linear(width, other)
        self.critic = nn.Sequential(nn.Linear(other, 8), nn.Tanh(), nn.Linear(8, 1))

    def logit_loss(self, out: Outputs) -> Terms:
        return {"ce": F.cross_entropy(out.students[0].logits, out.batch.label)}

    def feature_loss(self, out: Outputs) -> Terms:
        own = self.transfer(out.students[0]["embed"])
        return {"adv": (1 - self.critic(own)).square().mean()}

    def critic_loss(self, out: Outputs) -> Terms:
        own = self.transfer(out.students[0]["embed"]).detach()
        other = out.teachers[0]["embed"]
        real, fake = (1 - self.critic(other)).square().mean(), self.critic(own).square().mean()
        return {"real": real, "fake": fake}

    def phases(self) -> Sequence[Phase]:
        updates = [
            Update("logits", self.logit_loss, list(self.student.parameters())),
            Update(
                "features",
                self.feature_loss,
                [*self.student.backbone_parameters(), *self.transfer.parameters()],
            ),
            Update("critic", self.critic_loss, list(self.critic.parameters())),
        ]
        return [Phase("online", [Turn(self.__call__, updates)], 300)]


class Alternating(Method):
    """Two peers take turns; the second learns from the first's refreshed prediction."""

    students_needed = (2, 2)
    teachers_needed = (0, 0)

    def refresh(self, batch: Batch, progress: Progress, previous: Outputs | None) -> Outputs:
        assert previous is not None
        with torch.no_grad(), batch_statistics(self.students[0]):
            fresh = self.students[0](batch.image)
        return Outputs(batch, progress, [fresh, previous.students[1]], [])

    def loss_of(self, k: int, out: Outputs) -> Terms:
        own, peer = out.students[k].logits, out.students[1 - k].logits
        return {"ce": F.cross_entropy(own, out.batch.label), "kl": soft_kl(own, peer, 1.0)}

    def phases(self) -> Sequence[Phase]:
        peers = [
            Update(f"peer{k}", lambda out, k=k: self.loss_of(k, out), list(s.parameters()))
            for k, s in enumerate(self.students)
        ]
        turns = [Turn(self.__call__, [peers[0]]), Turn(self.refresh, [peers[1]])]
        return [Phase("mutual", turns, 200)]


@dataclass(frozen=True)
class Connected(Outputs):
    mapped: Tensor


class PrePhase(Method):
    """A connector learns on the teacher alone; then class centres are prepared, and used."""

    def __init__(self, students: Sequence[Net], teachers: Sequence[Net], data: DataSpec) -> None:
        super().__init__(students, teachers, data)
        (width,), (other,) = (n.shape_of("embed") for n in (self.student, self.teachers[0]))
        self.head = nn.Linear(other, len(data.classes))
        self.connector = nn.Sequential(nn.Linear(width, other), nn.LayerNorm(other))
        self.centres: Tensor
        self.register_buffer("centres", torch.zeros(len(data.classes), other))
        self.prepared = 0

    def watch_teacher(self, batch: Batch, progress: Progress, previous: Any) -> Outputs:
        return Outputs(batch, progress, [], self.teach(batch))

    def head_loss(self, out: Outputs) -> Terms:
        return {"head": F.cross_entropy(self.head(out.teachers[0]["embed"]), out.batch.label)}

    def prepare(self, images: Iterable[Batch]) -> None:
        self.prepared += 1
        self.centres.zero_()
        for batch in images:
            self.centres.index_add_(0, batch.label, self.teach(batch)[0]["embed"])
        self.centres.copy_(F.normalize(self.centres, dim=1))

    def forward(self, batch: Batch, progress: Progress, previous: Any = None) -> Connected:
        student = self.student(batch.image)
        return Connected(batch, progress, [student], [], self.connector(student["embed"]))

    def loss(self, out: Connected) -> Terms:
        near = F.cosine_similarity(out.mapped, self.centres[out.batch.label])
        ramp = min(1.0, (1 + out.progress.published_epoch) / 20)  # moves all from the first step
        ce = F.cross_entropy(out.students[0].logits, out.batch.label)
        return {"ce": ce, "centre": ramp * (1 - near).mean()}

    def balanced(self, data: DataSpec, epoch: int, generator: torch.Generator) -> Tensor:
        """Every class in turn, each class's images in a random order."""
        keys = torch.rand(len(data.labels), generator=generator, dtype=torch.float64)
        rank = torch.empty_like(data.labels)
        for c in data.labels.unique():
            members = (data.labels == c).nonzero()[:, 0]
            rank[members[keys[members].argsort()]] = torch.arange(len(members))
        return (rank * len(data.classes) + data.labels).argsort(stable=True)

    def phases(self) -> Sequence[Phase]:
        student = [*self.student.parameters(), *self.connector.parameters()]
        first = Turn(
            self.watch_teacher, [Update("head", self.head_loss, [*self.head.parameters()])]
        )
        second = Turn(self.__call__, [Update("student", self.loss, student)])
        return [
            Phase("fit", [first], 20),
            Phase("distill", [second], 100, self.balanced, self.prepare),
        ]


@dataclass(frozen=True)
class Contrasted(Outputs):
    own: Tensor
    rows: Tensor


class Bank(Method):
    """A memory bank: negatives drawn in forward, a constant fixed at step 0, rows written after."""

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        negatives: int = 4,
    ) -> None:
        super().__init__(students, teachers, data)
        (width,), (other,) = (n.shape_of("embed") for n in (self.student, self.teachers[0]))
        self.embed = nn.Linear(width, 6)
        self.teacher_embed = nn.Linear(other, 6)
        self.negatives = negatives
        self.bank: Tensor
        self.constant: Tensor
        self.register_buffer("bank", F.normalize(torch.randn(data.size, 6), dim=1))
        self.register_buffer("constant", torch.full((), -1.0))

    def forward(self, batch: Batch, progress: Progress, previous: Any = None) -> Contrasted:
        student, (teacher,) = self.student(batch.image), self.teach(batch)
        count = len(batch.index) * distributed.world_size()
        drawn = torch.randint(len(self.bank), (count, self.negatives), device=batch.index.device)
        rows = torch.cat([batch.index[:, None], distributed.local(drawn)], dim=1)
        own = F.normalize(self.embed(student["embed"]), dim=1)
        own = own + 0.1 * F.normalize(self.teacher_embed(teacher["embed"]), dim=1)
        return Contrasted(batch, progress, [student], [teacher], own, rows)

    def scores(self, out: Contrasted) -> Tensor:
        return torch.einsum("bd,bkd->bk", out.own, self.bank[out.rows]).exp()

    def scale(self, scores: Tensor) -> Tensor:
        found = distributed.gather(scores.detach()).mean()
        return torch.where(self.constant < 0, found, self.constant)

    def loss(self, out: Contrasted) -> Terms:
        scores = self.scores(out)
        p = scores / self.scale(scores)
        return {
            "ce": F.cross_entropy(out.students[0].logits, out.batch.label),
            "bank": -(p[:, 0] / (p.sum(dim=1))).log().mean(),
        }

    def write(self, out: Contrasted) -> None:
        self.constant.copy_(self.scale(self.scores(out)))
        index, own = distributed.gather(out.batch.index), distributed.gather(out.own.detach())
        self.bank[index] = F.normalize(0.5 * self.bank[index] + 0.5 * own, dim=1)

    def phases(self) -> Sequence[Phase]:
        update = Update("student", self.loss, self.trainable())
        return [Phase("distill", [Turn(self.__call__, [update], self.write)], 240)]


class ReusedHead(nn.Module):
    """Student's features, a projector, the teacher's head: what predicts."""

    def __init__(self, student: Net, projector: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.student, self.projector, self.head = student, projector, head

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.projector(self.student(image)["stage3"]).mean((2, 3)))


class OtherPredictor(Method):
    """Predicts with the student's features and the teacher's head; the student's own is frozen."""

    def __init__(self, students: Sequence[Net], teachers: Sequence[Net], data: DataSpec) -> None:
        super().__init__(students, teachers, data)
        (c, _, _), (d, _, _) = (n.shape_of("stage3") for n in (self.student, self.teachers[0]))
        self.projector = nn.Sequential(nn.Conv2d(c, d, 1, bias=False), nn.ReLU())
        self.student.classifier.requires_grad_(False)

    def forward(self, batch: Batch, progress: Progress, previous: Any = None) -> Connected:
        student, teachers = self.student(batch.image), self.teach(batch)
        mapped = self.projector(student["stage3"])
        return Connected(batch, progress, [student], teachers, mapped)

    def loss(self, out: Connected) -> Terms:
        return {"feature": F.mse_loss(out.mapped, out.teachers[0]["stage3"])}

    def predictors(self) -> Mapping[str, nn.Module]:
        return {"student": ReusedHead(self.student, self.projector, self.teachers[0].classifier)}


class Relation(Method):
    """A loss over all pairs of the batch, so several ranks must gather; surgery on gradients."""

    teacher_statistics = "batch"

    def loss(self, out: Outputs) -> Terms:
        own, other = (
            distributed.gather(F.normalize(c["embed"], dim=1))
            for c in (out.students[0], out.teachers[0])
        )
        return {
            "ce": F.cross_entropy(out.students[0].logits, out.batch.label),
            "pairs": (own @ own.T - other @ other.T).square().mean(),
        }

    @staticmethod
    def clipped(terms: Terms, parameters: Sequence[nn.Parameter], p: Progress) -> list[Tensor]:
        """The pairs' gradient, per tensor no longer than the cross-entropy's, ramped."""
        task = distributed.gradient(terms["ce"], parameters)
        pairs = distributed.gradient(terms["pairs"], parameters)
        bound = torch.sigmoid(torch.tensor(p.published_epoch, dtype=task[0].dtype))
        return [
            a + b * (bound * a.norm() / b.norm().clamp_min(1e-12)).clamp_max(1.0)
            for a, b in zip(task, pairs, strict=True)
        ]

    def phases(self) -> Sequence[Phase]:
        update = Update("student", self.loss, self.trainable(), self.clipped)
        return [Phase("distill", [Turn(self.__call__, [update])], 240)]


ODD: dict[str, type[Method]] = {
    "two_optimizers": TwoOptimizers,
    "alternating": Alternating,
    "pre_phase": PrePhase,
    "bank": Bank,
    "other_predictor": OtherPredictor,
    "relation": Relation,
}
