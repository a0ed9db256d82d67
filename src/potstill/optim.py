"""Optimisers and learning-rate schedules, by the names that recipes use.

A schedule is a pure function of how far its phase has come, so resuming needs no state of it and a
shortened training shortens every milestone and warm-up with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


def sgd(
    parameters: Iterable[nn.Parameter],
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum; weight decay is added to the gradient."""
    return torch.optim.SGD(
        parameters, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused
    )


def adam(
    parameters: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Adam with coupled (L2) weight decay."""
    return torch.optim.Adam(parameters, lr, betas, eps, weight_decay, fused=fused)


def adamw(
    parameters: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay."""
    return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay, fused=fused)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
}


class Schedule(Protocol):
    """Learning rate over a phase, as a factor of the optimiser's lr.

    `step` of `steps` are done; milestones count in epochs of a phase that is `length` epochs long.
    """

    def __call__(self, step: int, steps: int, length: float) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same rate throughout."""

    def __call__(self, step: int, steps: int, length: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Steps:
    """Multiply the rate by `factor` after each milestone (epochs)."""

    milestones: Sequence[float]
    factor: float = 0.1

    def passed(self, step: int, steps: int, length: float) -> int:
        """How many milestones are behind; in products, so that whole epochs compare exactly."""
        return sum(step * length >= m * steps for m in self.milestones)

    def __call__(self, step: int, steps: int, length: float) -> float:
        return float(self.factor ** self.passed(step, steps, length))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the rate down to `final` of it (Loshchilov & Hutter, arXiv:1608.03983)."""

    final: float = 0.0

    def __call__(self, step: int, steps: int, length: float) -> float:
        return _cosine(1.0, self.final, step / steps)


@dataclass(frozen=True)
class OneCycle:
    """Up from `start` of the rate during a `rise` share of the phase, then down to `final` of it.

    Both ways along half a cosine (Smith & Topin, arXiv:1708.07120); momentum stays as it is. The
    defaults are those of `torch.optim.lr_scheduler.OneCycleLR`.
    """

    rise: float = 0.3
    start: float = 1 / 25
    final: float = 1 / 25e4

    def __call__(self, step: int, steps: int, length: float) -> float:
        peak, last = self.rise * steps - 1, steps - 1
        if step <= peak:
            return _cosine(self.start, 1.0, step / peak if peak > 0 else 1.0)
        return _cosine(1.0, self.final, (step - peak) / (last - peak) if last > peak else 1.0)


def _cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


SCHEDULES: dict[str, type[Constant | Steps | Cosine | OneCycle]] = {
    "constant": Constant,
    "steps": Steps,
    "cosine": Cosine,
    "one_cycle": OneCycle,
}


@dataclass(frozen=True)
class OptimizerPlan:
    """How one update's optimiser is made and how its rate moves.

    `warmup` epochs rise linearly to the schedule's rate. They and the milestones are counted in
    epochs of a phase of `length` epochs, whatever its real length. With `fresh_at_milestones` the
    optimiser starts anew (empty momentum) at each milestone, as published SAKD and OFD runs do.
    """

    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    schedule: Schedule
    warmup: float = 0.0
    fresh_at_milestones: bool = False

    def factor(self, step: int, steps: int, length: float) -> float:
        """Factor on the rate when `step` of `steps` are done."""
        done, rise = step * length, self.warmup * steps
        ramp = (done + length) / (rise + length) if done < rise else 1.0
        return ramp * self.schedule(step, steps, length)

    def starts_anew(self, step: int, steps: int, length: float) -> bool:
        """Whether a milestone has just been passed and the optimiser's state is to be dropped."""
        if not self.fresh_at_milestones or not isinstance(self.schedule, Steps) or step == 0:
            return False
        passed = self.schedule.passed
        return passed(step, steps, length) > passed(step - 1, steps, length)
