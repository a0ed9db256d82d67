"""Ye, Lu, Zhan, Generalized Knowledge Distillation via Relationship Matching, TPAMI 2022.

arXiv:2205.01915.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from potstill import distributed
from potstill.errors import MethodError
from potstill.evaluate import NearestClassMean
from potstill.losses import Weighting, instance_weights, pairwise_distance, unit
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
    require_arguments,
)
from potstill.net import Net, in_full
from potstill.pairing import feature_shape

FAR = 1e9  # in place of infinity, of which softmax and KL make 0 * inf
LIMIT = 2**24  # elements of one tensor: 64 MiB in float32


class REFILLED(Method):
    """Match relationships, then predictions of a classifier made of class means (arXiv:2205.01915).

    "embed":   scale * mean over tuples of KL(teacher || student), see `comparison_divergence`
    "distill": CE + mean over images of lambda_i * KL(teacher || student), see `local_divergence`

    Teacher and student need no class in common. A tuple is an anchor, a positive of its class and
    impostors, the student's semi-hard negatives: who is compared follows from the student's labels,
    and how much nearer who is, from the teacher. The classifier's weights are the teacher's
    `class_means` of the student's training images, clean. lambda_i is `instance_weights` of what
    the teacher's own head says, over its own classes. `variant` "minus" has lambda_i = lam
    throughout, "emb" cross-entropy alone in the second phase (Ye, Lu, Zhan, TPAMI 2022).

    The head is neither trained nor decayed in the first phase, which is evaluated by the nearest
    class mean and ends with its last epoch; the authors took the best on test images. tau1, scale
    and the margin are their code's, which draws plain random batches. Batches are those of all
    ranks. `k_rule` "pair" takes for each pair its `k_hat` nearest impostors, or all there are (the
    paper's study; padded to the longest and masked, as in the CVPR 2020 code, is the same);
    "batch_min" the first K of each in the order of the batch, K the fewest that a pair has. Eq. 9
    is known from the code alone, "minmax"; "raw" would fit the text's (0, 1].
    """

    lengths: ClassVar[Mapping[str, int]] = {"embed": 200, "distill": 200}

    centres: Tensor

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        variant: Literal["full", "minus", "emb"] = "full",
        lam: float = 1.0,
        weighting: Weighting = "minmax",
        tau1: float = 4.0,
        tau2: float = 1.0,
        scale: float = 1000.0,
        margin: float = 0.2,
        k_rule: Literal["pair", "batch_min"] = "pair",
        k_hat: int | None = None,
        tap: str = "embed",
        teacher_tap: str = "embed",
    ) -> None:
        super().__init__(students, teachers, data)
        feature_shape(self, "student", tap, "tap")
        width = feature_shape(self, "teacher", teacher_tap, "teacher_tap").numel()
        require_arguments(
            self,
            ("variant", variant, variant in ("full", "minus", "emb"), "'full', 'minus' or 'emb'"),
            ("weighting", weighting, weighting in ("minmax", "raw"), "'minmax' or 'raw'"),
            ("k_rule", k_rule, k_rule in ("pair", "batch_min"), "'pair' or 'batch_min'"),
            ("k_hat", k_hat, k_hat is None or k_hat >= 1, "1 or more, or None for all"),
            ("tau1", tau1, tau1 > 0, "a number above 0"),
            ("tau2", tau2, tau2 > 0, "a number above 0"),
            ("scale", scale, scale > 0, "a number above 0"),
            ("margin", margin, margin > 0, "a number above 0"),
            ("lam", lam, lam >= 0, "0 or more"),
        )
        classes = len(data.classes)
        if self.student.num_classes != classes:
            raise MethodError(
                f"REFILLED compares logits with {classes} class means, but the student has "
                f"{self.student.num_classes} outputs; give it one a class"
            )
        if data.batch_size < 2 or int(data.labels.bincount().max()) < 2:
            raise MethodError(
                "REFILLED compares images of one class in a batch, and there are never two: make "
                "data.batch_size 2 or more, with two training images of a class or more"
            )
        if k_rule == "batch_min" and k_hat is not None:
            raise MethodError(
                f"REFILLED: k_rule 'batch_min' finds K itself, and k_hat is {k_hat}; leave one out"
            )
        self.lam = 0.0 if variant == "emb" else lam
        self.weighting: Weighting | None = weighting if variant == "full" else None
        self.tau1, self.tau2, self.scale, self.margin = tau1, tau2, scale, margin
        self.k_rule, self.k_hat = k_rule, k_hat
        self.tap, self.teacher_tap = tap, teacher_tap
        self.register_buffer("centres", torch.zeros(classes, width))

    @property
    def reads(self) -> frozenset[str]:
        own_head = self.lam and self.weighting
        return frozenset({self.teacher_tap, "logits"} if own_head else {self.teacher_tap})

    def compare(self, batch: Batch, progress: Progress, previous: Outputs | None = None) -> Outputs:
        """Run both networks."""
        return super().forward(batch, progress)

    def compare_loss(self, out: Outputs) -> Terms:
        """The term "match"."""
        (student,), (teacher,) = out.students, out.teachers
        divergence = comparison_divergence(
            distributed.gather(student[self.tap].flatten(1)),
            distributed.gather(teacher[self.teacher_tap].flatten(1)),
            distributed.gather(out.batch.label),
            self.tau1,
            self.margin,
            self.k_hat,
            self.k_rule == "batch_min",
        )
        return {"match": self.scale * divergence}

    def find_centres(self, batches: Iterable[Batch]) -> None:
        """The teacher's mean of each of the student's classes, of unit length.

        In float32, and of the whole of a stochastic teacher.
        """
        (teacher,) = self.teachers
        nearest = NearestClassMean(teacher, len(self.centres), self.teacher_tap)
        self.centres.copy_(nearest.fit(batches))

    def forward(self, batch: Batch, progress: Progress, previous: Outputs | None = None) -> Outputs:
        """Run the student, and the teacher where its predictions have a weight."""
        teachers = self.teach(batch) if self.lam else []
        return Outputs(batch, progress, [self.student(batch.image)], teachers)

    def loss(self, out: Outputs) -> Terms:
        """The terms "ce" and, but for the variant "emb", "local"."""
        (student,), label = out.students, out.batch.label
        terms = {"ce": F.cross_entropy(student.logits, label)}
        if self.lam:
            (teacher,) = out.teachers
            target = teacher[self.teacher_tap].flatten(1) @ self.centres.mT
            present = torch.zeros(len(self.centres), dtype=torch.bool, device=label.device)
            present[distributed.gather(label)] = True
            divergence = local_divergence(student.logits, target, present, self.tau2)
            weights = (
                self.lam
                if self.weighting is None
                else self.lam * instance_weights(teacher.logits, self.weighting)
            )
            terms["local"] = (weights * divergence).mean()
        return terms

    def phases(self) -> Sequence[Phase]:
        """In "embed" the student's classes have their means alone; then "distill"."""
        backbone = Update("embed", self.compare_loss, self.student.parameters_before(self.tap))
        whole = [p for p in self.student.parameters() if p.requires_grad]
        student = Update("student", self.loss, whole)

        def nearest() -> Mapping[str, NearestClassMean]:
            return {"ncm": NearestClassMean(self.student, len(self.data.classes), self.tap)}

        embed, distill = self.lengths["embed"], self.lengths["distill"]
        return [
            Phase("embed", [Turn(self.compare, [backbone])], embed, predictors=nearest),
            Phase(
                "distill",
                [Turn(self.__call__, [student])],
                distill,
                prepare=self.find_centres if self.lam else None,
            ),
        ]


def comparison_divergence(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float = 4.0,
    margin: float = 0.2,
    k_hat: int | None = None,
    batch_min: bool = False,
    limit: int = LIMIT,
) -> Tensor:
    """KL(teacher || student) of who is like whom, mean over tuples. (B, D), (B, E), (B,) -> ()

    Each tuple's row is softmax(-[D(anchor, positive), D(anchor, impostor) ...] / temperature), D
    the distance of vectors of unit length. The tuples are all ordered pairs of a class that have an
    impostor, which is a negative that the student has farther from the anchor than the positive, by
    at most `margin`; of these the `k_hat` nearest, or the first ones in the batch, as many as the
    pair with the fewest has (`batch_min`). A batch without any tuple gives 0. No gradient reaches
    the teacher. No tensor of pairs has more than `limit` elements, or those of one pair: what
    exceeds it is computed a few pairs at a time, also going backwards.
    """
    own, other = (pairwise_distance(unit(x)) for x in (student, teacher.detach()))
    same = label[:, None] == label
    themselves = torch.eye(len(label), dtype=torch.bool, device=label.device)
    # their number decides shapes: on a GPU the one wait of a step
    pairs = (same & ~themselves).nonzero()
    parts = torch.split(pairs, max(1, limit // (len(label) + 1)))
    fewest = None
    if batch_min:
        counts = [impostors(own, same, part, margin).sum(dim=1) for part in parts]
        found = torch.cat([*counts, torch.full_like(label[:1], len(label))])
        fewest = found.masked_fill(found == 0, len(label)).min()
    sums, tuples = [], []
    for part in parts:

        def of_part(own: Tensor, part: Tensor = part) -> tuple[Tensor, Tensor]:
            kept = impostors(own, same, part, margin, k_hat, fewest)
            return _divergence(own, other, part, kept, temperature), kept.any(dim=1).sum()

        if len(parts) == 1:
            divergence, count = of_part(own)
        else:
            divergence, count = checkpoint(
                of_part, own, use_reentrant=False, preserve_rng_state=False
            )
        sums.append(divergence)
        tuples.append(count)
    return torch.stack(sums).sum() / torch.stack(tuples).sum().clamp_min(1)


def impostors(
    distance: Tensor,
    same: Tensor,
    pairs: Tensor,
    margin: float,
    k_hat: int | None = None,
    fewest: Tensor | None = None,
) -> Tensor:
    """Which images each pair (anchor, positive) is compared with. (B, B), (B, B), (P, 2) -> (P, B)

    Semi-hard negatives, the `k_hat` nearest of them (the earliest of equals), or the first `fewest`
    in the order of the batch.
    """
    anchor, positive = pairs.unbind(1)
    gap = distance.detach()[anchor] - distance.detach()[anchor, positive][:, None]
    found = ~same[anchor] & (gap > 0) & (gap <= margin)
    if k_hat is not None and k_hat < len(same):
        nearest = gap.masked_fill(~found, FAR).sort(dim=1, stable=True).indices[:, :k_hat]
        found &= torch.zeros_like(found).scatter_(1, nearest, True)
    if fewest is not None:
        found &= found.cumsum(dim=1) <= fewest
    return found


def _divergence(
    own: Tensor, other: Tensor, pairs: Tensor, kept: Tensor, temperature: float
) -> Tensor:
    """Sum over the pairs of KL(teacher || student); of one without an impostor it is 0."""
    anchor, positive = pairs.unbind(1)
    log_p, log_q = (
        F.log_softmax(
            torch.cat([d[anchor, positive][:, None], d[anchor].masked_fill(~kept, FAR)], dim=1)
            / -temperature,
            dim=1,
        )
        for d in (own, other)
    )
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True)


def local_divergence(
    logits: Tensor, target: Tensor, present: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(target || logits) over the classes that are present. (B, K), (B, K), (K,) bool -> (B,)

    The temperature divides both, and its square is not multiplied on. One class alone gives 0. No
    gradient reaches the target.
    """
    log_p, log_q = (
        F.log_softmax((in_full(x) / temperature).masked_fill(~present, -FAR), dim=1)
        for x in (logits, target.detach())
    )
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)
