"""Lan, Zhu, Gong, Knowledge Distillation by On-the-Fly Native Ensemble, NeurIPS 2018.

arXiv:1806.04606.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import require_two_images
from potstill.errors import MethodError
from potstill.losses import soft_kl
from potstill.method import DataSpec, Method, Outputs, Terms
from potstill.net import Net, in_full, shared_copy
from potstill.pairing import map_shape
from potstill.peers import require_different


class ONE(Method):
    """Branches of one network learn from their gated ensemble (Lan et al., arXiv:1806.04606).

    loss = sum over branches i of CE(z_i, label) + CE(z_e, label)
           + w * T^2 * sum over i of KL(z_e || z_i at temperature T),   z_e = sum over i of g_i z_i

    The students are one architecture, each from weights of its own. They share the first one's low
    layers, up to `tap` (by default the end of the stage before the last), and keep their own from
    there on: as many branches as students. The gate is, for each image, the softmax of a linear
    layer, BatchNorm and ReLU on that map's mean. In the KL the ensemble is constant; only its
    cross-entropy trains the gate. The paper's w is 1; its code has, and this by default,
    w = exp(-5 (1 - e / 80)^2) in the first 80 of 300 epochs (`ramp_epochs`; 0 for none), on that
    scale in runs of other lengths, and whole epochs e. Nothing is said about WRNs: their branches
    begin after the second group's sum.

    Every student predicts with the shared layers, as a complete network; "ensemble" is z_e. The
    other students' own low layers are left out.
    """

    students_needed = (2, None)
    teachers_needed = (0, 0)
    lengths: ClassVar = {"distill": 300}

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        temperature: float = 3.0,
        ramp_epochs: float = 80.0,
        tap: str | None = None,
    ) -> None:
        super().__init__(students, teachers, data)
        require_two_images(self)
        if ramp_epochs < 0:
            raise MethodError(f"ONE: ramp_epochs is {ramp_epochs:g}; give 0 for no ramp, or more")
        for k, net in enumerate(self.nets):
            self._require_alike(k, net)
        self.temperature, self.ramp_epochs = temperature, ramp_epochs
        self.tap = tap or self._stage_before_the_last()
        width, _, _ = map_shape(self, "student", self.tap, "tap")
        first, *others = self.nets
        copies = [shared_copy(net) for net in others]  # what is given stays as it is
        tails = [net.tail(self.tap) for net in (first, *copies)]
        require_different(self, tails)
        trunk = _before(first.module, tails[0])
        for net in copies:  # which predict, and capture nothing
            net.close()
            for part_name, part in trunk.items():
                net.module.add_module(part_name, part)
        self.whole = (first, *copies)  # no submodules: their layers are those of the branched one
        like = next(self.student.parameters())
        branches = Branches(nn.Sequential(trunk), tails, gate(width, len(tails)).to(like))
        named = {f"branch{k}": f"branches.{k}" for k in range(len(tails))}
        taps = {"shared": "trunk", "gate": "gate", **named}
        self.students = nn.ModuleList([Net(branches, taps, self.student.input_shape)])

    def _require_alike(self, k: int, net: Net) -> None:
        name, first = type(self).__name__, self.student
        if net.scale is not None:
            raise MethodError(
                f"{name}: student {k} has a normalisation of its own, and students that share "
                "their low layers see the same images; leave normalize out"
            )
        if type(net.module).forward is not nn.Sequential.forward:
            raise MethodError(
                f"{name} cuts networks that are one line of parts (nn.Sequential), and student {k} "
                f"is a {type(net.module).__name__} with a forward of its own"
            )
        if net.stochastic != first.stochastic:
            raise MethodError(
                f"{name}: student {k} has another stochastic depth than student 0, and students "
                "share their low layers; give the same to each"
            )
        if repr(net.module) != repr(first.module) or net.taps != first.taps:
            raise MethodError(
                f"{name}: student {k} is another network than student 0, and students share their "
                "low layers; give the same architecture to each"
            )

    def _stage_before_the_last(self) -> str:
        stages = self.student.stages()
        if len(stages) < 2:
            raise MethodError(
                f"{type(self).__name__} branches before the last stage, and of the student "
                f"{len(stages)} stages are known; choose where with tap=... among "
                f"{sorted(self.student.shapes)}"
            )
        return stages[-2]

    def loss(self, out: Outputs) -> Terms:
        """Terms "ce0", "ce1" .. of the branches, "ce_ensemble", and "kd0", "kd1" .."""
        (found,), label = out.students, out.batch.label
        logits = [found[f"branch{k}"] for k in range(len(self.whole))]
        weight = ramp(out.progress.published_epoch, self.ramp_epochs)
        terms = {f"ce{k}": F.cross_entropy(z, label) for k, z in enumerate(logits)}
        terms["ce_ensemble"] = F.cross_entropy(found.logits, label)
        for k, z in enumerate(logits):
            terms[f"kd{k}"] = weight * soft_kl(z, found.logits, self.temperature)
        return terms

    @property
    def networks(self) -> Sequence[Net]:
        return self.whole

    def predictors(self) -> Mapping[str, nn.Module]:
        """Every student, whole, and the gated "ensemble"."""
        for net in self.whole:
            net.channels_last = self.student.channels_last
        each = {f"student{k}": net.predictor() for k, net in enumerate(self.whole)}
        return {**each, "ensemble": self.student.predictor()}


class Branches(nn.Module):
    """Low layers, several branches on them, and their gated logits. (B, C, H, W) -> (B, K)"""

    def __init__(self, trunk: nn.Module, tails: Iterable[nn.Module], gate: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.branches = nn.ModuleList(tails)
        self.gate = gate

    def forward(self, image: Tensor) -> Tensor:
        shared = self.trunk(image)
        logits = torch.stack([in_full(branch(shared)) for branch in self.branches], dim=1)
        with torch.autocast(image.device.type, enabled=False):
            weights = self.gate(in_full(shared).mean((2, 3)))
            return torch.einsum("bm,bmk->bk", weights, logits)


def gate(channels: int, branches: int) -> nn.Sequential:
    """Weights of the branches, which sum to 1, from a map's mean. (B, C) -> (B, m)"""
    return nn.Sequential(
        OrderedDict(
            fc=nn.Linear(channels, branches),
            bn=nn.BatchNorm1d(branches),
            relu=nn.ReLU(),
            softmax=nn.Softmax(dim=1),
        )
    )


def ramp(epoch: float, length: float) -> float:
    """w = exp(-5 (1 - e / length)^2) of whole epochs e, and 1 from `length` on."""
    done = math.floor(epoch)
    return math.exp(-5 * (1 - done / length) ** 2) if done < length else 1.0


def _before(module: nn.Module, tail: nn.Module) -> OrderedDict[str, nn.Module]:
    """The parts of a line of parts that a tail of it leaves."""
    own = list(module._modules.items())  # a part may stand there twice
    kept = own[: len(own) - len(tail._modules)]
    return OrderedDict((name, part) for name, part in kept if part is not None)
