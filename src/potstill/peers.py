"""Networks that are trained together and teach each other: what all such methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import MethodError
from potstill.evaluate import Ensemble
from potstill.losses import soft_kl
from potstill.method import DataSpec, Method, Phase, Terms, Turn, Update
from potstill.net import Net
from potstill.pairing import Role, Shape, last_map


class Peers(Method):
    """Base of methods whose students learn from each other: K networks and no teacher.

    Every network is run once a step; then, at these parameters, each has its own gradient and its
    own optimiser, "student0", "student1" and so on. A subclass states `loss_of`. What predicts is
    every network, and the mean of their logits, "ensemble".
    """

    students_needed: ClassVar[tuple[int, int | None]] = (2, None)
    teachers_needed = (0, 0)
    lengths: ClassVar = {"distill": 300}

    def __init__(self, students: Sequence[Net], teachers: Sequence[Net], data: DataSpec) -> None:
        super().__init__(students, teachers, data)
        require_different(self, [net.module for net in self.nets])
        outputs = [net.num_classes for net in students]
        if len(set(outputs)) > 1:
            raise MethodError(
                f"{type(self).__name__}: the students have {', '.join(map(str, outputs))} outputs, "
                "and all predict the same classes; give each as many"
            )

    def loss_of(self, k: int, out: Any) -> Terms:
        """Named terms of student k; no gradient of theirs may reach another student."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_of(k, out)")

    def trained_with(self, k: int) -> Sequence[nn.Module]:
        """Modules that student k's optimiser moves: the network, and layers of its own if any."""
        return [self.nets[k]]

    def update_of(self, k: int) -> Update[Any]:
        """The step of student k."""
        modules = self.trained_with(k)
        parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        if not parameters:
            raise MethodError(
                f"{type(self).__name__}: {self.name_of(k)} is frozen, and every student learns here"
            )
        # its loss reaches its own network alone, and goes back through it for the last time
        return Update(self.name_of(k), partial(self.loss_of, k), parameters, last=True)

    def name_of(self, k: int) -> str:
        """What student k's update and predictor are called; "student" where there is one."""
        return f"student{k}" if len(self.students) > 1 else "student"

    def phases(self) -> Sequence[Phase]:
        updates = [self.update_of(k) for k in range(len(self.students))]
        return [Phase("distill", [Turn(self.__call__, updates)], self.lengths["distill"])]

    def predictors(self) -> Mapping[str, nn.Module]:
        """Every network, and "ensemble"."""
        each = {self.name_of(k): net.predictor() for k, net in enumerate(self.nets)}
        return {**each, "ensemble": Ensemble(each.values())}


def taught(
    student: Tensor, peers: Sequence[Tensor], label: Tensor, alpha: float, temperature: float
) -> dict[str, Tensor]:
    """The terms "ce" and, where alpha is not 0, "kd": of one student's logits and its peers'.

    "kd" = alpha * T^2 * KL(peer || student at temperature T), averaged over the peers. (B, K), each
    (B, K), (B,) -> ()
    """
    terms = {"ce": F.cross_entropy(student, label)}
    if alpha:
        divergences = [soft_kl(student, peer, temperature) for peer in peers]
        terms["kd"] = alpha * torch.stack(divergences).mean()
    return terms


def require_different(method: Method, modules: Sequence[nn.Module]) -> None:
    """Raise MethodError where the modules of two students start from equal weights.

    They see the same images, so they would predict the same for ever, or nearly.
    """
    for j, module in enumerate(modules):
        for i, other in enumerate(modules[:j]):
            alike = repr(module) == repr(other)
            if alike and all(map(torch.equal, module.parameters(), other.parameters())):
                raise MethodError(
                    f"{type(method).__name__}: students {i} and {j} start from equal weights and "
                    "see the same images, so neither has anything to teach; initialise each anew"
                )


def last_maps(
    method: Method, roles: Sequence[Role], taps: Sequence[str] | None
) -> list[tuple[str, Shape]]:
    """Name and (C, H, W) of one map of each network: the tap given, or the map that is pooled.

    `taps` has one name a network, or one for all. Raises MethodError for another number of them,
    and TapError or MethodError for what is no map.
    """
    names: Sequence[str | None] = [None] * len(roles)
    if taps is not None:
        names = list(taps) * len(roles) if len(taps) == 1 else taps
        if len(names) != len(roles):
            raise MethodError(
                f"{type(method).__name__} reads one map of each of {len(roles)} networks, but taps "
                f"has {len(names)} names; give one a network, or one for all"
            )
    return [last_map(method, role, name, "taps") for role, name in zip(roles, names, strict=True)]
