"""OFD: margins and distance by hand, the sizes and networks it takes, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.errors import MethodError, TapError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.ofd import OFD, MarginReLU, margins, partial_distance
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

PAIRS = ((-2.0, -1.5), (0.5, -0.3), (-0.5, -0.2), (3.0, 2.0))
"""Of student and teacher. With a margin of -0.8 they cost 0, 0.8^2, 0 and 1."""
U, T = torch.tensor(PAIRS).t().reshape(2, 1, 1, 2, 2)


def ofd(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> OFD:
    teacher = toy_net(1, width=6, classes=classes)
    return OFD([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def with_margin(margin: float, **arguments: Any) -> OFD:
    """Every margin of every stage the same."""
    method = ofd(**arguments)
    for layer in method.margins:
        layer.margin = torch.full((1, 1, 1, 1), margin)
    return method


def outputs(mapped: list[Tensor], teacher: list[Tensor]) -> Connected:
    """Two classes, label 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    label = torch.tensor([0])
    features = {f"stage{i}:pre": x for i, x in enumerate(teacher, start=1)}
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]]), features)
    batch = Batch(torch.zeros(1, 1), label, label, label)
    own = Captured(torch.zeros(1, 2), {})
    return Connected(batch, Progress(0, 0, 1, 1), [own], [taught], mapped)


def images(n: int = 4) -> Batch:
    return next(ToyImages(n).clean(n))


def margin(weight: float, bias: float) -> float:
    return margins(torch.tensor([weight]), torch.tensor([bias])).item()


# --- margins


def test_margins_by_hand():
    """-sqrt(2 / pi); 1 - 2 phi(1/2) / Phi(-1/2) = 1 - 2 * 0.352065 / 0.308538; and -3 s, as
    Phi(-4) is below a thousandth.
    """
    close(margin(1.0, 0.0), -math.sqrt(2 / math.pi))
    close(margin(2.0, 1.0), -1.282156, atol=1e-6, rtol=0)
    close(margin(0.5, 2.0), -1.5)


@pytest.mark.parametrize(("weight", "bias"), [(1.5, 0.7), (-0.3, -0.2), (2.0, -5.0), (1.0, 2.5)])
def test_a_margin_is_the_mean_of_negative_samples(weight: float, bias: float):
    """Within four standard errors of a million draws."""
    draws = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).double()
    x = draws * weight + bias
    below = x[x < 0]
    close(
        margin(weight, bias), below.mean().item(), atol=4 * below.std().item() / len(below) ** 0.5,
        rtol=0,
    )  # fmt: skip


def test_the_fallback_begins_where_a_thousandth_is_negative():
    """Phi(-3.0902) = 0.0010001 and Phi(-3.0903) = 0.0009998."""
    assert -0.31 < margin(1.0, 3.0902) < -0.27
    assert margin(1.0, 3.0903) == -3.0


def test_a_dead_channel_has_the_margin_of_its_point():
    """The limit of weights towards 0, for biases on both sides of it."""
    for bias, limit in ((-2.0, -2.0), (0.0, 0.0), (2.0, 0.0)):
        assert margin(0.0, bias) == limit
        close(margin(1e-6, bias), limit, atol=1e-5, rtol=0)


def test_extreme_weights_give_finite_margins_that_are_not_positive():
    values = torch.tensor([-3e38, -1e4, -1.0, -1e-45, 0.0, 1e-45, 1.0, 1e4, 3e38])
    weight, bias = torch.cartesian_prod(values, values).t()
    found = margins(weight, bias)
    assert found.dtype == torch.float64
    assert found.isfinite().all()
    assert (found <= 0).all()


def test_the_sign_of_a_weight_does_not_matter():
    weight, bias = torch.tensor([0.3, 2.0, 1.0]), torch.tensor([0.5, -1.0, 9.0])
    assert torch.equal(margins(weight, bias), margins(-weight, bias))


def test_margins_come_from_the_normalisation_before_each_stages_last_relu():
    teacher = toy_net(1, width=6)
    with torch.no_grad():
        for i in (1, 2, 3):
            norm = teacher.module.get_submodule(f"layer{i}")[-1].bn2
            norm.weight.copy_(torch.linspace(-1, 2, norm.num_features))
            norm.bias.fill_(float(i))
    method = OFD([toy_net(0)], [teacher], ToyImages().spec())
    for i, layer in enumerate(method.margins, start=1):
        n = 6 * (1 + (i > 1))
        wanted = margins(torch.linspace(-1, 2, n), torch.full((n,), float(i)))
        close(layer.margin, wanted.float().view(1, n, 1, 1))


def test_a_wrns_margins_come_from_the_next_stages_first_normalisation():
    teacher = build("wrn_16_1", 4, (3, 8, 8))
    for path, bias in (("layer2.0.bn1", -1.0), ("layer3.0.bn1", -2.0), ("bn1", -3.0)):
        norm = teacher.module.get_submodule(path)
        nn.init.constant_(norm.bias, bias)
        nn.init.zeros_(norm.weight)
    method = OFD([toy_net(0)], [teacher], ToyImages().spec())
    assert [layer.margin.unique().tolist() for layer in method.margins] == [[-1.0], [-2.0], [-3.0]]


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(12, affine=False), nn.GroupNorm(2, 12), nn.GroupNorm(2, 12, affine=False)],
)
def test_other_normalisations_have_margins_too(norm: nn.Module):
    """Without weights it is N(0, 1) in every channel."""
    teacher = toy_net(1, width=6)
    teacher.module.layer2[-1].bn2 = norm
    method = OFD([toy_net(0)], [teacher], ToyImages().spec())
    close(method.margins[1].margin, torch.full((1, 12, 1, 1), -math.sqrt(2 / math.pi)))


def test_margins_are_buffers_that_follow_and_are_saved():
    """A training that is resumed beside another teacher goes on with the margins that it had."""
    method = ofd()
    assert not list(method.margins.parameters())
    with torch.no_grad():
        method.teachers[0].module.layer1[-1].bn2.bias.fill_(-7.0)
    assert OFD(method.students, method.teachers, method.data).margins[0].margin.max() < -6
    fresh = ofd()
    fresh.margins[0].margin.zero_()
    fresh.load_state_dict(method.state_dict())
    close(fresh.margins[0].margin, torch.full((1, 6, 1, 1), -math.sqrt(2 / math.pi)))
    assert method.double().margins[0].margin.dtype == torch.float64


# --- the distance


def test_terms_by_hand():
    """0 + (0.5 + 0.3)^2 + 0 + (3 - 2)^2 = 1.64, times beta = 1 / 1000; ce = ln 2."""
    found = with_margin(-0.8, taps=["stage1:pre"]).loss(outputs([U], [T]))
    assert list(found) == ["ce", "ofd"]
    close(found["ce"].item(), math.log(2.0))
    close(found["ofd"].item(), 1.64e-3)


def test_it_is_summed_over_a_map_and_averaged_over_images():
    """Three images of two such channels: 2 * 1.64 an image."""
    maps = [x.repeat(3, 2, 1, 1) for x in (U, T)]
    found = with_margin(-0.8, beta=1.0, taps=["stage1:pre"]).loss(outputs(maps[:1], maps[1:]))
    close(found["ofd"].item(), 3.28)


@pytest.mark.parametrize(("stage", "weight"), [(0, 1 / 4), (1, 1 / 2), (2, 1.0)])
def test_later_stages_weigh_more(stage: int, weight: float):
    mapped = [T, T, T]
    mapped[stage] = U
    found = with_margin(-9.0, beta=1.0).loss(outputs(mapped, [T, T, T]))
    close(found["ofd"].item(), weight * 1.64)


@pytest.mark.parametrize(
    ("student", "teacher", "cost"),
    [
        (-1.0, -1.5, 0.0),  # above the teacher's value, below the margin
        (-0.8, -1.5, 0.0),
        (-0.5, -1.5, 0.09),  # above the margin: (0.8 - 0.5)^2
        (-9.0, 0.0, 0.0),  # as dead as a target of 0
        (0.0, 0.0, 0.0),
        (-1.0, 0.5, 2.25),  # dead where the teacher is alive
        (0.5, 0.5, 0.0),
    ],
)
def test_what_no_relu_would_pass_costs_nothing(student: float, teacher: float, cost: float):
    u = torch.full((1, 1, 1, 1), student, requires_grad=True)
    method = with_margin(-0.8, beta=1.0, taps=["stage1:pre"])
    found = method.loss(outputs([u], [torch.full((1, 1, 1, 1), teacher)]))["ofd"]
    close(found.item(), cost, atol=1e-6, rtol=0)
    found.backward()
    assert (u.grad.item() != 0) == (cost > 0)


def test_each_channel_has_its_own_margin():
    layer = MarginReLU(torch.tensor([0.0, 0.0]), torch.tensor([-1.0, -2.0]))
    assert layer(torch.full((1, 2, 1, 1), -3.0)).flatten().tolist() == [-1.0, -2.0]


def test_a_larger_map_of_the_teacher_is_averaged_before_its_margin():
    """The mean of (-4, 2, 0, 0) is -0.5, above the margin: (0.5 + 0.5)^2. Clipped first, 0.25."""
    method = with_margin(-1.0, beta=1.0, taps=["stage1:pre"])
    large = torch.tensor([[[[-4.0, 2.0], [0.0, 0.0]]]])
    found = method.loss(outputs([torch.full((1, 1, 1, 1), 0.5)], [large]))
    close(found["ofd"].item(), 1.0)


def test_a_smaller_map_of_the_teacher_is_repeated():
    """Four values of 1 against 3."""
    method = with_margin(-1.0, beta=1.0, taps=["stage1:pre"])
    found = method.loss(outputs([torch.ones(1, 1, 2, 2)], [torch.full((1, 1, 1, 1), 3.0)]))
    close(found["ofd"].item(), 16.0)


def test_weights_multiply_and_kd_joins_with_alpha():
    """kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2."""
    arguments = {"beta": 2.0, "gamma": 3.0, "alpha": 5.0, "temperature": 1.0}
    found = with_margin(-0.8, taps=["stage1:pre"], **arguments).loss(outputs([U], [T]))
    assert list(found) == ["ce", "kd", "ofd"]
    close(found["ce"].item(), 3 * math.log(2.0))
    close(found["ofd"].item(), 2 * 1.64)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 5 * kl, atol=1e-6, rtol=0)


def test_zero_maps_cost_nothing_and_have_a_gradient():
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    found = partial_distance(dead, torch.zeros(2, 3, 4, 4))
    found.backward()
    assert found == 0
    assert torch.equal(dead.grad, torch.zeros_like(dead))


# --- the networks


@pytest.mark.parametrize(
    ("student", "teacher", "count"),
    [("resnet20", "resnet56", 5_600), ("wrn_16_2", "wrn_40_2", 21_952)],
)
def test_the_published_connectors(student: str, teacher: str, count: int):
    data = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    method = OFD([build(student)], [build(teacher)], data)
    assert sum(p.numel() for p in method.connectors.parameters()) == count
    assert all(p.student == p.teacher == f"stage{i}:pre" for i, p in enumerate(method.pairs, 1))


def test_maps_are_taken_before_the_relu_and_go_through_connectors():
    method = ofd()
    out = method(images(), Progress(0, 0, 1, 1))
    for tap, connector, mapped in zip(
        ("stage1:pre", "stage2:pre", "stage3:pre"), method.connectors, out.mapped, strict=True
    ):
        x = out.students[0][tap]
        assert x.min() < 0
        close(mapped, connector(x))


def test_the_teacher_normalises_by_the_batch_and_keeps_its_averages():
    batch, progress = images(16), Progress(0, 0, 1, 1)
    by_batch, running = ofd(), ofd(teacher_statistics="running")
    before = {k: v.clone() for k, v in by_batch.teachers[0].state_dict().items()}
    one, other = (m(batch, progress).teachers[0]["stage3:pre"] for m in (by_batch, running))
    assert (one - other).abs().max() > 0.1
    close(other, running.teachers[0](batch.image)["stage3:pre"])
    after = by_batch.teachers[0].state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_student_without_relus_at_its_ends_and_with_more_stages_is_welcome():
    """WRN-40-2's 16 x 16 and 8 x 8 maps against MobileNetV2's, from the 64 x 64 images too."""
    for size in (32, 64):
        shape = (3, size, size)
        data = ToyImages().spec()._replace(input_shape=shape)
        method = OFD([build("mobilenetv2", 4, shape)], [build("wrn_16_1", 4, shape)], data)
        assert [(p.student, p.teacher) for p in method.pairs] == [
            ("stage1", "stage2:pre"),
            ("stage2", "stage3:pre"),
        ]


def test_gradients_reach_student_and_connectors_alone():
    method = ofd(beta=1.0)
    teacher = [T.clone().requires_grad_() for _ in range(3)]
    out = method(images(), Progress(0, 0, 1, 1))
    method.loss(out)["ofd"].backward()
    assert all(p.grad.abs().sum() > 0 for p in method.connectors.parameters() if p.dim() > 1)
    assert method.student.module.conv1.weight.grad.abs().sum() > 0
    own = [U.clone().requires_grad_() for _ in range(3)]
    sum(with_margin(-0.8, alpha=1.0).loss(outputs(own, teacher)).values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in own)
    assert all(x.grad is None for x in teacher)


def test_it_reads_the_teachers_taps_and_the_logits_only_for_kd():
    assert ofd().reads == {"stage1:pre", "stage2:pre", "stage3:pre"}
    assert ofd(alpha=0.5, taps=["stage1:pre"]).reads == {"stage1:pre", "logits"}


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = ofd(data, classes=9)
    assert list(method.loss(method(images(), Progress(0, 0, 1, 1)))) == ["ce", "ofd"]
    with pytest.raises(MethodError, match="OFD compares logits class by class"):
        ofd(data, classes=9, alpha=0.1)


def test_a_teacher_whose_normalisation_is_not_known_is_refused():
    with pytest.raises(TapError) as error:
        ofd(taps=["stage1"], teacher_taps=["stage1"])
    assert str(error.value) == (
        "OFD takes its margins from the teacher: no BatchNorm is known right before the ReLU after "
        "'stage1' of this ResNet; known: ['stage1:pre', 'stage2:pre', 'stage3:pre']; say which "
        "with Net(..., norms={tap: path})"
    )


def test_a_teachers_map_after_its_relu_is_refused():
    """Nothing there is negative: margins and the partial distance would mean nothing."""
    module = toy_net(1, width=6).module
    teacher = Net(module, {"stage1": "layer1"}, (3, 8, 8), norms={"stage1": "layer1.0.bn2"})
    with pytest.raises(MethodError) as error:
        OFD([toy_net(0)], [teacher], ToyImages().spec(), taps=["stage1"])
    assert str(error.value) == (
        "OFD compares maps before a ReLU, but 'stage1' of the teacher ('layer1') is never "
        "negative; name the place before the ReLU with Net(..., taps={'stage1:pre': "
        "'layer1.relu:in'}, norms={'stage1:pre': 'layer1.bn'})"
    )


def test_a_normalisation_of_other_channels_is_refused():
    module = toy_net(1, width=6).module
    teacher = Net(module, {"stage1": "layer1"}, (3, 8, 8), norms={"stage1": "layer2.0.bn2"})
    with pytest.raises(MethodError) as error:
        OFD(
            [toy_net(0)],
            [teacher],
            ToyImages().spec(),
            taps=["stage1:pre"],
            teacher_taps=["stage1"],
        )
    assert str(error.value) == (
        "OFD takes a margin for each channel from 'layer2.0.bn2', which has 12, but 'stage1' of "
        "the teacher is 6x8x8; say which is right before the ReLU with Net(..., norms={tap: path})"
    )
