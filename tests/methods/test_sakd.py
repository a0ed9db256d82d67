"""SAKD: the energy map and the loss by hand, its invariances, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.errors import MethodError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.sakd import SAKD, self_attended_energy
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

X = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]], [[1.0, 2.0], [0.0, 1.0]]]])
Y = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]]])


def sakd(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> SAKD:
    teacher = toy_net(1, width=6, classes=classes)
    return SAKD([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def outputs(mapped: list[Tensor], teacher: list[Tensor]) -> Connected:
    """Two classes, label 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    label = torch.tensor([0])
    features = {f"stage{i}": x for i, x in enumerate(teacher, start=1)}
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]]), features)
    batch = Batch(torch.zeros(1, 1), label, label, label)
    own = Captured(torch.zeros(1, 2), {})
    return Connected(batch, Progress(0, 0, 1, 1), [own], [taught], mapped)


def test_the_energy_map_by_hand():
    """g = [[1, 2], [1/2, 1]]; S = g g^T = [[5, 2.5], [2.5, 1.25]]; its columns' softmax is
    sigmoid(2.5) = 0.924142 over sigmoid(-2.5) = 0.075858, and sigmoid(1.25) = 0.777300 over
    0.222700. o = g (1 + (A + A^T) / sqrt 2).
    """
    close(
        self_attended_energy(X),
        torch.tensor([[[2.306934, 3.206548], [0.801637, 1.314946]]]),
        atol=1e-6,
        rtol=0,
    )
    close(
        self_attended_energy(Y),
        torch.tensor([[[0.897519, 1.343123], [2.686246, 0.0]]]),
        atol=1e-6,
        rtol=0,
    )


def test_a_constant_map_by_hand():
    """g = 3: both softmaxes are 1/2 everywhere, o = 3 (1 + 1 / sqrt 2) = 5.121320."""
    x = torch.full((1, 1, 2, 2), math.sqrt(3.0))
    close(self_attended_energy(x), torch.full((1, 2, 2), 3 * (1 + 1 / math.sqrt(2))))


def test_one_stage_by_hand():
    """Both maps scaled to unit length: the mean of squared differences is 0.179050."""
    found = sakd(taps=["stage1"], alpha=0.0).loss(outputs([X], [Y]))
    assert list(found) == ["ce", "sad"]
    close(found["sad"].item() / 200, 0.179050, atol=1e-6, rtol=0)
    close(found["ce"].item(), math.log(2.0))


@pytest.mark.parametrize(("stage", "weight"), [(0, 1 / 4), (1, 1 / 2), (2, 1.0)])
def test_later_stages_weigh_more(stage: int, weight: float):
    maps = [Y, Y, Y]
    maps[stage] = X
    found = sakd(beta=1.0, alpha=0.0).loss(outputs(maps, [Y, Y, Y]))
    close(found["sad"].item(), weight * 0.179050, atol=1e-6, rtol=0)


def test_the_weights_are_those_of_the_public_code():
    """kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2, times 0.9; the cross-entropy weighs 1."""
    out = outputs([X, Y, Y], [Y, Y, Y])
    found = sakd(temperature=1.0).loss(out)
    close(found["sad"].item(), 200 * 0.179050 / 4, atol=1e-4, rtol=0)
    close(found["ce"].item(), math.log(2.0))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 0.9 * kl, atol=1e-6, rtol=0)
    assert sakd().temperature == 4.0


@pytest.mark.parametrize(
    ("teacher", "student", "parameters"),
    [
        ("resnet56", "resnet20", 5_600),
        ("wrn_40_2", "wrn_16_2", 21_952),
        ("wrn_40_2", "resnet32", 11_200),
    ],
)
def test_published_counts_of_connectors(teacher: str, student: str, parameters: int):
    spec = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    spec = spec._replace(classes=range(100), teacher_classes=[range(100)])
    method = SAKD([build(student)], [build(teacher)], spec)
    assert sum(p.numel() for p in method.connectors.parameters()) == parameters


def test_connectors_begin_as_published():
    """Normal with std sqrt(2 / C_t), no bias; BatchNorm as the identity's. Equal widths too."""
    spec = ToyImages().spec()
    torch.manual_seed(0)
    method = SAKD([toy_net(0, width=64)], [toy_net(1, width=64)], spec)
    conv, bn = method.connectors[0]
    assert conv.bias is None
    close(conv.weight.std().item(), math.sqrt(2 / 64), rtol=0.05, atol=0)
    assert bn.weight.eq(1).all() and bn.bias.eq(0).all()


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: x.flip(1), lambda x: x.roll(1, 1)])
def test_signs_and_the_order_of_channels_do_not_matter(change: Any):
    x = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    close(self_attended_energy(change(x)), self_attended_energy(x))


def test_scale_and_transposition_do_matter():
    """Unlike plain attention maps: the softmax of S sharpens, and rows are compared."""
    x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def unit(y: Tensor) -> Tensor:
        return nn.functional.normalize(self_attended_energy(y).flatten(1))

    assert (unit(3 * x) - unit(x)).abs().max() > 1e-3
    assert (self_attended_energy(x.mT).mT - self_attended_energy(x)).abs().max() > 1e-3


@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_factor_is_bounded(size: int):
    """In (1, 1 + 2 / sqrt(H)): 1.707, 1.5 and 1.354 at most."""
    x = 9 * torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    factor = self_attended_energy(x) / x.square().mean(1)
    assert factor.min() >= 1
    assert factor.max() <= 1 + 2 / math.sqrt(size) + 1e-6


def test_equal_maps_cost_nothing():
    found = sakd().loss(outputs([X, Y, X], [X, Y, X]))
    assert found["sad"] == 0


def test_dead_and_huge_maps_have_finite_gradients():
    """A map of zeros has no direction; energies of 1e8 make the softmax one-hot."""
    for x in (torch.zeros(1, 2, 2, 2), 1e4 * X):
        x.requires_grad_()
        found = sakd(alpha=0.0, taps=["stage1"]).loss(outputs([x], [Y]))
        found["sad"].backward()
        assert found["sad"].isfinite()
        assert x.grad.isfinite().all()


def test_no_gradient_reaches_the_teacher():
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    sum(sakd(taps=["stage1"]).loss(outputs([x], [y])).values()).backward()
    assert x.grad.abs().sum() > 0
    assert y.grad is None


def test_the_teacher_sees_batch_statistics_unless_told_otherwise():
    batch = next(ToyImages(8).clean(8))
    by_batch, running = sakd(), sakd(teacher_statistics="running")
    running.teachers[0].load_state_dict(by_batch.teachers[0].state_dict())
    one, other = (m.teach(batch)[0].logits for m in (by_batch, running))
    assert (one - other).abs().max() > 1e-3


def test_it_reads_what_it_compares():
    assert sakd().reads == {"stage1", "stage2", "stage3", "logits"}
    assert sakd(alpha=0.0, taps=["stage2"]).reads == {"stage2"}


def test_maps_of_unequal_size_meet_at_the_smaller():
    """stage1 is 8 x 8 in the student, stage3 is 2 x 2 in the teacher."""
    method = sakd(taps=["stage1"], teacher_taps=["stage3"])
    out = method(next(ToyImages(4).clean(4)), Progress(0, 0, 1, 1))
    assert out.mapped[0].shape == (4, 12, 8, 8)
    assert 0 < method.loss(out)["sad"] <= 200 * 2 / 4


def test_of_four_stages_the_last_three_of_equal_size_are_compared():
    """MobileNetV2 halves at once: its 16, 8 and 4 meet the teacher's second, third and fourth."""
    student, teacher = build("mobilenetv2", 4), build("resnet18", 4)
    spec = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    method = SAKD([student], [teacher], spec)
    assert [(p.student, p.teacher) for p in method.pairs] == [
        ("stage1", "stage2"),
        ("stage2", "stage3"),
        ("stage3", "stage4"),
    ]
    method = SAKD([build("resnet18", 4)], [teacher], spec)
    assert [p.student for p in method.pairs] == ["stage2", "stage3", "stage4"]
    four = SAKD([build("resnet18", 4)], [teacher], spec, taps=[f"stage{i}" for i in (1, 2, 3, 4)])
    assert len(four.pairs) == 4


def test_where_fewer_sizes_match_the_last_three_stages_meet_in_order():
    """WRN's 32, 16, 8 beside MobileNetV2's 8, 4, 2 (16 before): all of the WRN's are pooled."""
    student, teacher = build("mobilenetv2", 4), build("wrn_16_1", 4)
    spec = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    method = SAKD([student], [teacher], spec)
    assert [(p.student, p.teacher) for p in method.pairs] == [
        (f"stage{i + 1}", f"stage{i}") for i in (1, 2, 3)
    ]
    assert [p.teacher_shape[1] // p.shape[1] for p in method.pairs] == [4, 4, 4]


def test_without_connectors_maps_are_compared_as_they_are():
    """The ImageNet form: equal networks cost nothing, and nothing but the student learns."""
    method = SAKD([toy_net(0)], [toy_net(0)], ToyImages().spec(), connectors=False)
    assert len(list(method.parameters())) == len(list(method.student.parameters()))
    out = method(next(ToyImages(8).clean(8)), Progress(0, 0, 1, 1))
    close(method.loss(out)["sad"].item(), 0.0, atol=1e-6, rtol=0)


def test_unequal_widths_without_connectors_are_refused():
    with pytest.raises(MethodError) as error:
        sakd(connectors=False)
    assert str(error.value) == (
        "SAKD without connectors needs equal widths, but 'stage1' of the student is 4x8x8 and "
        "'stage1' of the teacher 6x8x8; leave connectors on"
    )


def test_maps_that_are_not_square_are_refused():
    def wide() -> Net:
        body = [nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return Net(nn.Sequential(*body, nn.Linear(4, 4)), {"stage1": "0"}, (3, 8, 6))

    with pytest.raises(MethodError) as error:
        SAKD([wide()], [wide()], ToyImages().spec())
    assert str(error.value) == (
        "SAKD compares the rows of square maps, but 'stage1' of the student is 4x8x6; use square "
        "images"
    )


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = sakd(data, classes=9, alpha=0.0)
    out = method(next(ToyImages(4).clean(4)), Progress(0, 0, 1, 1))
    assert list(method.loss(out)) == ["ce", "sad"]
    with pytest.raises(MethodError, match="SAKD compares logits class by class"):
        sakd(data, classes=9)
