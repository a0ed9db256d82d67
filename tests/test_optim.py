"""Rates and optimisers: every schedule against hand values or torch's own, every step by hand."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from potstill.optim import (
    OPTIMIZERS,
    SCHEDULES,
    Constant,
    Cosine,
    OneCycle,
    OptimizerPlan,
    Schedule,
    Steps,
    adam,
    adamw,
    sgd,
)

close = torch.testing.assert_close
EPOCH = 782  # steps of an epoch of CIFAR in batches of 64
PUBLISHED = Steps([150, 180, 210])


def drops(schedule: Schedule, steps: int, length: float) -> list[int]:
    """Steps at which the rate changes."""
    rates = [schedule(s, steps, length) for s in range(steps)]
    return [s for s in range(1, steps) if rates[s] != rates[s - 1]]


def plan(schedule: Schedule, warmup: float = 0.0, fresh: bool = False) -> OptimizerPlan:
    return OptimizerPlan(lambda p: sgd(p, 1.0), schedule, warmup, fresh)


# --- schedules ----------------------------------------------------------------------------------


def test_steps_at_the_published_epochs_exactly():
    """150, 180 and 210 of 240 epochs of 782 steps: with 1-based epochs, in epoch 151, 181, 211."""
    steps = 240 * EPOCH
    assert drops(PUBLISHED, steps, 240) == [150 * EPOCH, 180 * EPOCH, 210 * EPOCH]
    rates = [PUBLISHED(e * EPOCH, steps, 240) for e in (0, 150, 180, 210, 239)]
    close(rates, [1.0, 0.1, 0.01, 0.001, 0.001])
    assert PUBLISHED(150 * EPOCH - 1, steps, 240) == 1.0


def test_steps_of_a_shortened_training():
    """10 epochs for 240: 150, 180, 210 become 6.25, 7.5, 8.75 epochs, or 4887.5, 5865, 6842.5
    steps; the first steps at or after them.
    """
    assert drops(PUBLISHED, 10 * EPOCH, 240) == [4888, 5865, 6843]


@pytest.mark.parametrize("per_epoch", [1, 3, 7, 49, 391, 782, 5004])
def test_whole_milestones_fall_on_whole_epochs(per_epoch: int):
    """0.1 * 3 != 0.3 in floats: products of integers do not slip by a step."""
    schedule, steps = Steps(range(1, 100)), 100 * per_epoch
    for milestone in schedule.milestones:
        first = int(milestone) * per_epoch
        assert schedule.passed(first, steps, 100) == schedule.passed(first - 1, steps, 100) + 1


def test_a_step_factor_of_ones_own():
    assert Steps([1, 2], factor=0.2)(25, 30, 3) == pytest.approx(0.04)
    assert Steps([])(25, 30, 3) == 1.0


def test_constant_is_constant():
    assert {Constant()(s, 100, 10) for s in range(100)} == {1.0}


def test_cosine_by_hand():
    """1 at the start, a half in the middle, (1 + cos 60 deg) / 2 = 3/4 at a third."""
    assert Cosine()(0, 300, 30) == 1.0
    assert Cosine()(100, 300, 30) == pytest.approx(0.75)
    assert Cosine()(150, 300, 30) == pytest.approx(0.5)
    assert Cosine(final=0.2)(150, 300, 30) == pytest.approx(0.6)
    assert Cosine(final=0.2)(300, 300, 30) == pytest.approx(0.2)


def torchs(make, steps: int) -> Tensor:
    """The rates of a torch scheduler over `steps` steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    scheduler, rates = make(optimizer), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch asks for optimizer.step(), which moves nothing here
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step() if len(rates) < steps else None
    return torch.tensor(rates, dtype=torch.float64)


def ours(schedule: Schedule, steps: int) -> Tensor:
    return torch.tensor([schedule(s, steps, 10) for s in range(steps)], dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 7, 100, 1003])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_torchs(steps: int, final: float):
    def make(o):
        return torch.optim.lr_scheduler.CosineAnnealingLR(o, steps, eta_min=final)

    close(ours(Cosine(final), steps), torchs(make, steps))


@pytest.mark.parametrize("steps", [10, 37, 100, 1003])
@pytest.mark.parametrize(
    ("rise", "start", "final"), [(0.3, 1 / 25, 1 / 25e4), (0.5, 0.1, 0.001), (0.25, 1 / 10, 1 / 50)]
)
def test_one_cycle_is_torchs(steps: int, rise: float, start: float, final: float):
    def make(o):
        return torch.optim.lr_scheduler.OneCycleLR(
            o,
            1.0,
            total_steps=steps,
            pct_start=rise,
            div_factor=1 / start,
            final_div_factor=start / final,
            cycle_momentum=False,
        )

    close(ours(OneCycle(rise, start, final), steps), torchs(make, steps))
    if (rise, steps) == (0.3, 10):
        close(ours(OneCycle(), steps), torchs(make, steps))  # the defaults are torch's


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_cycle_of_few_steps_is_finite(steps: int):
    assert all(0 < OneCycle()(s, steps, 1) <= 1 for s in range(steps))


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_schedule_never_exceeds_the_rate(name: str):
    schedule = Steps([3, 7]) if name == "steps" else SCHEDULES[name]()
    rates = [schedule(s, 200, 10) for s in range(200)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert max(rates) == pytest.approx(1.0, abs=1e-3)


# --- warm-up and fresh starts -------------------------------------------------------------------


def test_warmup_rises_linearly_by_hand():
    """2 epochs of 2 steps: 1/5, 2/5, 3/5, 4/5, and the whole rate from step 4 on."""
    made = plan(Constant(), warmup=2)
    close([made.factor(s, 20, 10) for s in range(6)], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_warmup_shortens_with_the_training():
    """2 warm-up epochs of 10 are 1 of 5: of 2 steps, 1/3 and 2/3."""
    made = plan(Constant(), warmup=2)
    close([made.factor(s, 10, 10) for s in range(4)], [1 / 3, 2 / 3, 1.0, 1.0])


def test_warmup_multiplies_the_schedule():
    made, bare = plan(Cosine(), warmup=1), plan(Cosine())
    assert made.factor(0, 40, 10) == pytest.approx(0.2 * bare.factor(0, 40, 10))
    assert bare.factor(0, 40, 10) == 1.0
    assert made.factor(7, 40, 10) == bare.factor(7, 40, 10) == Cosine()(7, 40, 10)


def test_an_optimizer_starts_anew_at_each_milestone_if_asked():
    steps = 24 * EPOCH
    schedule = Steps([15, 18, 21])
    anew = [s for s in range(steps) if plan(schedule, fresh=True).starts_anew(s, steps, 24)]
    assert anew == [15 * EPOCH, 18 * EPOCH, 21 * EPOCH]
    assert not any(plan(schedule).starts_anew(s, steps, 24) for s in anew)
    assert not plan(Cosine(), fresh=True).starts_anew(anew[0], steps, 24)
    assert not plan(Steps([0]), fresh=True).starts_anew(0, steps, 24)


# --- optimisers ---------------------------------------------------------------------------------


def one_step(make, gradients: list[float], **arguments) -> float:
    """A weight of 2 after steps along the given gradients."""
    w = nn.Parameter(torch.tensor(2.0))
    optimizer = make([w], **arguments)
    for g in gradients:
        w.grad = torch.tensor(g)
        optimizer.step()
    return w.item()


def test_sgd_by_hand():
    """Decay 0.5 on w = 2 adds 1 to gradient 3: 2 - 0.1 * 4 = 1.6.

    With momentum 0.9, gradient 3 + 0.8 and buffer 0.9 * 4 + 3.8 = 7.4: 1.6 - 0.74 = 0.86. Nesterov:
    first 0.1 * (4 + 0.9 * 4) = 0.76, so 1.24.
    """
    assert one_step(sgd, [3.0], lr=0.1, weight_decay=0.5) == pytest.approx(1.6)
    assert one_step(sgd, [3.0, 3.0], lr=0.1, momentum=0.9, weight_decay=0.5) == pytest.approx(0.86)
    nesterov = one_step(sgd, [3.0], lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=True)
    assert nesterov == pytest.approx(1.24)


def test_adams_decay_is_coupled():
    """eps = 1: g = 3 + 0.5 * 2 = 4, the first step is 0.1 * 4 / (4 + 1) = 0.08."""
    assert one_step(adam, [3.0], lr=0.1, eps=1.0, weight_decay=0.5) == pytest.approx(1.92)


def test_adamws_decay_is_decoupled():
    """w shrinks by 0.1 * 0.5 * 2 = 0.1, then steps 0.1 * 3 / (3 + 1) = 0.075 along gradient 3."""
    assert one_step(adamw, [3.0], lr=0.1, eps=1.0, weight_decay=0.5) == pytest.approx(1.825)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_fused_equals_unfused(name: str):
    """Over 20 steps of a quadratic, decay on."""
    start = torch.linspace(-1, 1, 24).view(2, 3, 2, 2)
    found = []
    for fused in (True, False):
        w = nn.Parameter(start.clone())
        more = {"momentum": 0.9} if name == "sgd" else {}
        optimizer = OPTIMIZERS[name]([w], lr=0.01, weight_decay=0.1, fused=fused, **more)
        assert bool(optimizer.param_groups[0]["fused"]) == fused
        for _ in range(20):
            w.grad = (w - 3).detach()
            optimizer.step()
        found.append(w.detach())
    close(found[0], found[1])
    assert not torch.equal(found[0], start)
    assert math.isfinite(found[0].sum().item())
