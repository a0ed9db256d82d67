"""Hinton's KD: the two terms by hand, and which teachers it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.errors import MethodError
from potstill.method import Batch, Outputs, Progress, Terms
from potstill.methods.kd import KD
from potstill.net import Captured
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close


def kd(**arguments: Any) -> KD:
    return KD([toy_net(0)], [toy_net(1)], ToyImages().spec(), **arguments)


def outputs(student: Any, teacher: Any, label: list[int]) -> Outputs:
    labels = torch.tensor(label)
    batch = Batch(torch.zeros(len(label), 1), labels, labels, labels)
    pair = [Captured(torch.as_tensor(x), {}) for x in (student, teacher)]
    return Outputs(batch, Progress(0, 0, 1, 1), pair[:1], pair[1:])


STUDENT = [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
TEACHER = [[3.0, 1.0, 0.0], [1.0, 0.0, -1.0]]


def terms(**arguments: Any) -> Terms:
    return kd(**arguments).loss(outputs(STUDENT, TEACHER, [2, 0]))


def test_terms_by_hand():
    """T = 1, teacher softmax (3/4, 1/4), student uniform: ce = ln 2, kl = 3/4 ln 3/2 + 1/4 ln 1/2;
    each is weighted by a half.
    """
    found = kd(temperature=1.0, gamma=0.5, alpha=0.5).loss(
        outputs([[0.0, 0.0]], [[math.log(3.0), 0.0]], [0])
    )
    assert list(found) == ["ce", "kd"]
    close(found["ce"].item(), 0.5 * math.log(2.0))
    close(found["kd"].item(), 0.5 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


def test_terms_of_the_specification():
    """CE 0.753109, KD 1.241372 at T = 4; 0.1 CE + 0.9 KD = 1.192546 are the defaults."""
    whole = terms(gamma=1.0, alpha=1.0)
    close(whole["ce"].item(), 0.753109, atol=1e-6, rtol=0)
    close(whole["kd"].item(), 1.241372, atol=1e-6, rtol=0)
    default = terms()
    close((default["ce"] + default["kd"]).item(), 1.192546, atol=1e-6, rtol=0)
    close(terms(gamma=1.0, alpha=1.0, temperature=1.0)["kd"].item(), 0.975670, atol=1e-6, rtol=0)


def test_soft_logits_leave_out_the_square_of_the_temperature():
    """The code around MHGD: 0.7 CE + 0.3 * mean KL at T = 4, (0.134659 + 0.020513) / 2."""
    soft = terms(gamma=0.7, alpha=0.3, t_squared=False)
    close(soft["ce"].item(), 0.7 * 0.753109, atol=1e-6, rtol=0)
    close(soft["kd"].item(), 0.3 * 0.0775857, atol=1e-6, rtol=0)


def test_weights_multiply():
    one, found = terms(gamma=1.0, alpha=1.0), terms(gamma=2.0, alpha=3.0)
    close(found["ce"], 2 * one["ce"])
    close(found["kd"], 3 * one["kd"])


def test_a_term_of_weight_zero_is_left_out():
    """0 * infinity would be NaN, and a gradient of zero still decays what it reaches."""
    assert list(terms(gamma=0.0)) == ["kd"]
    assert list(terms(alpha=0.0)) == ["ce"]


def test_an_equal_teacher_leaves_the_cross_entropy():
    found = kd().loss(outputs(TEACHER, TEACHER, [2, 0]))
    close(found["kd"].item(), 0.0, atol=1e-6, rtol=0)
    assert found["ce"] > 0


def test_no_gradient_reaches_the_teachers_logits():
    student, teacher = (torch.tensor(x, requires_grad=True) for x in (STUDENT, TEACHER))
    sum(kd().loss(outputs(student, teacher, [2, 0])).values()).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_extremes_are_finite():
    """T = 100 and logits of 1e4, in either network."""
    wide = [[1e4, -1e4, 0.0], [0.0, 1e4, -1e4]]
    for student, teacher in ((wide, TEACHER), (STUDENT, wide), (wide, wide)):
        for temperature in (1.0, 100.0):
            x: Tensor = torch.tensor(student, requires_grad=True)
            found = kd(temperature=temperature).loss(outputs(x, teacher, [2, 0]))
            total = found["ce"] + found["kd"]
            total.backward()
            assert total.isfinite()
            assert x.grad.isfinite().all()


def test_another_number_of_classes_is_refused():
    data = ToyImages().spec()._replace(teacher_classes=[range(7)])
    with pytest.raises(MethodError) as error:
        KD([toy_net(0)], [toy_net(1, classes=7)], data)
    assert str(error.value) == (
        "KD compares logits class by class, but teacher 0 has 7 classes and student 0 has 4; use "
        "a teacher trained on this data set, or a method that reads features"
    )


@pytest.mark.parametrize("classes", [[0, 1, 3, 2], [4, 5, 6, 7]])
def test_other_classes_or_another_order_are_refused(classes: list[int]):
    data = ToyImages().spec()._replace(teacher_classes=[classes])
    with pytest.raises(MethodError) as error:
        KD([toy_net(0)], [toy_net(1)], data)
    assert str(error.value) == (
        "KD compares logits class by class, but teacher 0 was trained on other classes, or in "
        "another order, than data.classes"
    )


def test_the_same_classes_of_another_type_are_accepted():
    data = ToyImages().spec()._replace(teacher_classes=[[0, 1, 2, 3]], classes=(0, 1, 2, 3))
    assert KD([toy_net(0)], [toy_net(1)], data).reads == {"logits"}
