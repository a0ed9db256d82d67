"""Attention transfer: the terms by hand, the pairing of taps, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.errors import MethodError
from potstill.method import Batch, DataSpec, Outputs, Progress
from potstill.methods.at import AT
from potstill.net import Captured
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

S = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]]])
T = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [1.0, 0.0]]]])


def at(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> AT:
    teacher = toy_net(1, width=6, classes=classes)
    return AT([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def outputs(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Outputs:
    """Two classes, label 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    label = torch.tensor([0])
    pair = [
        Captured(torch.zeros(1, 2), student),
        Captured(torch.tensor([[math.log(3.0), 0.0]]), teacher),
    ]
    batch = Batch(torch.zeros(1, 1), label, label, label)
    return Outputs(batch, Progress(0, 0, 1, 1), pair[:1], pair[1:])


def test_terms_by_hand():
    """One tap: energies (2, 1, 0, 4) and (4, 0, 1, 4), cos = 24 / sqrt(21 * 33), so
    (2 - 2 cos) / 4 = 0.044158, times beta = 1000; ce = ln 2.
    """
    found = at(taps=["stage1"]).loss(outputs({"stage1": S}, {"stage1": T}))
    assert list(found) == ["ce", "at"]
    close(found["ce"].item(), math.log(2.0))
    close(found["at"].item(), 1000 * (2 - 2 * 24 / math.sqrt(21 * 33)) / 4, rtol=1e-5, atol=0)
    close(found["at"].item() / 1000, 0.044158, atol=1e-6, rtol=0)


def test_taps_add_up_and_are_paired_in_order():
    """Right-angled maps cost 2 / 4 in one pair, equal maps nothing in the other."""
    one = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    other = one.flip(3)
    method = at(beta=1.0, taps=["stage1", "stage2"], teacher_taps=["stage2", "stage1"])
    found = method.loss(
        outputs({"stage1": one, "stage2": one}, {"stage1": other, "stage2": 3 * one})
    )
    close(found["at"].item(), 0.5)
    both = method.loss(outputs({"stage1": one, "stage2": one}, {"stage1": other, "stage2": other}))
    close(both["at"].item(), 1.0)


def test_weights_multiply_and_kd_joins_with_alpha():
    """kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2."""
    out = outputs({"stage1": S}, {"stage1": T})
    one = at(taps=["stage1"], beta=1.0).loss(out)
    found = at(taps=["stage1"], beta=7.0, gamma=2.0, alpha=3.0, temperature=1.0).loss(out)
    assert list(found) == ["ce", "kd", "at"]
    close(found["ce"].item(), 2 * math.log(2.0))
    close(found["at"], 7 * one["at"])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 3 * kl, atol=1e-6, rtol=0)


def test_power_is_used():
    """Features (1, 2) point to (1, 2) with power 1, to (1, 4) with 2; the teacher's to (0, 1)."""
    out = outputs(
        {"stage1": torch.tensor([[[[1.0, 2.0]]]])}, {"stage1": torch.tensor([[[[0.0, 1.0]]]])}
    )
    for power, cosine in ((1.0, 2 / math.sqrt(5)), (2.0, 4 / math.sqrt(17))):
        found = at(taps=["stage1"], beta=1.0, power=power).loss(out)
        close(found["at"].item(), (2 - 2 * cosine) / 2, atol=1e-6, rtol=0)


def test_proportional_maps_of_other_widths_cost_nothing():
    """Four channels against one, whose square is the sum of theirs: the same attention."""
    student = torch.rand(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    teacher = 10 * student.square().sum(1, keepdim=True).sqrt()
    found = at(taps=["stage1"]).loss(outputs({"stage1": student}, {"stage1": teacher}))
    close(found["at"].item(), 0.0, atol=1e-8, rtol=0)


def test_no_gradient_reaches_the_teacher():
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    out = outputs({"stage1": student}, {"stage1": teacher})
    sum(at(taps=["stage1"], alpha=1.0).loss(out).values()).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_zero_maps_and_half_precision_are_finite():
    dead = torch.zeros(1, 2, 2, 2, requires_grad=True)
    found = at(taps=["stage1"]).loss(outputs({"stage1": dead}, {"stage1": T.half() * 300}))
    close(found["at"].item(), 250.0, rtol=1e-3, atol=0)  # 1000 * |unit vector|^2 / 4
    found["at"].backward()
    assert dead.grad.isfinite().all()


def test_it_reads_the_teachers_taps_and_the_logits_only_for_kd():
    assert at(teacher_taps=["stem", "stage2", "stage3"]).reads == {"stem", "stage2", "stage3"}
    assert at(alpha=0.5, taps=["stage1"]).reads == {"stage1", "logits"}


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = at(data, classes=9)
    out = method(next(ToyImages(4).clean(4)), Progress(0, 0, 1, 1))
    assert list(method.loss(out)) == ["ce", "at"]
    with pytest.raises(MethodError, match="AT compares logits class by class"):
        at(data, classes=9, alpha=0.1)


def test_by_default_all_stages_meet_in_order():
    """Of RepDistiller's MobileNetV2 row too, whose four maps are half as high as the teacher's."""
    pairs = at().pairs
    assert [(p.student, p.teacher) for p in pairs] == [(f"stage{i}",) * 2 for i in (1, 2, 3)]


def test_taps_of_different_sizes_meet_at_the_smaller():
    """stage1 is 8 x 8 in the student, stage3 is 2 x 2 in the teacher."""
    method = at(taps=["stage1"], teacher_taps=["stage3"])
    out = method(next(ToyImages(4).clean(4)), Progress(0, 0, 1, 1))
    found = method.loss(out)["at"]
    assert 0 < found <= 1000 * 2 / 4
