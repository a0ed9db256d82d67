"""FitNet: the terms by hand, the regressor for every ratio of sizes, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.errors import MethodError, TapError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.fitnet import FitNet, regression
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

R = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
T = torch.tensor([[[[1.0, 0.0], [0.0, 4.0]]]])


def fitnet(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> FitNet:
    teacher = toy_net(1, width=6, classes=classes)
    return FitNet([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def outputs(mapped: Tensor, hint: Tensor) -> Connected:
    """Two classes, label 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    label = torch.tensor([0])
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]]), {"stage2": hint})
    batch = Batch(torch.zeros(1, 1), label, label, label)
    own = Captured(torch.zeros(1, 2), {})
    return Connected(batch, Progress(0, 0, 1, 1), [own], [taught], [mapped])


def images(n: int = 4) -> Batch:
    return next(ToyImages(n).clean(n))


def test_terms_by_hand():
    """(0 + 4 + 9 + 0) / 4 = 3.25, times beta = 100; ce = ln 2."""
    found = fitnet().loss(outputs(R, T))
    assert list(found) == ["ce", "hint"]
    close(found["ce"].item(), math.log(2.0))
    close(found["hint"].item(), 325.0)


def test_it_is_a_mean_over_everything():
    """Twice the channels and three times the images, all alike: the same 3.25."""
    found = fitnet(beta=1.0).loss(outputs(R.repeat(3, 2, 1, 1), T.repeat(3, 2, 1, 1)))
    close(found["hint"].item(), 3.25)


def test_weights_multiply_and_kd_joins_with_alpha():
    """kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2."""
    method = fitnet(beta=2.0, gamma=3.0, alpha=5.0, temperature=1.0)
    found = method.loss(outputs(R, T))
    assert list(found) == ["ce", "kd", "hint"]
    close(found["ce"].item(), 3 * math.log(2.0))
    close(found["hint"].item(), 2 * 3.25)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 5 * kl, atol=1e-6, rtol=0)


def test_a_hint_that_is_met_costs_nothing():
    assert fitnet().loss(outputs(T, T))["hint"] == 0


@pytest.mark.parametrize(
    ("size", "aim", "kind", "kernel", "stride"),
    [
        ((16, 16), (16, 16), nn.Conv2d, (1, 1), (1, 1)),
        ((16, 16), (8, 8), nn.Conv2d, (3, 3), (2, 2)),
        ((2, 2), (1, 1), nn.Conv2d, (3, 3), (2, 2)),
        ((8, 8), (16, 16), nn.ConvTranspose2d, (4, 4), (2, 2)),
        ((16, 16), (4, 4), nn.Conv2d, (13, 13), (1, 1)),
        ((7, 7), (6, 6), nn.Conv2d, (2, 2), (1, 1)),
        ((16, 8), (8, 4), nn.Conv2d, (3, 3), (2, 2)),
        ((4, 8), (8, 16), nn.ConvTranspose2d, (4, 4), (2, 2)),
        ((16, 8), (8, 8), nn.Conv2d, (9, 1), (1, 1)),
    ],
)
def test_the_convolution_gives_the_hints_shape(size: Any, aim: Any, kind: Any, kernel, stride):
    found = regression((3, *size), (5, *aim))
    assert type(found) is kind
    assert (found.kernel_size, found.stride) == (kernel, stride)
    assert found.bias is not None
    assert found(torch.zeros(2, 3, *size)).shape == (2, 5, *aim)


@pytest.mark.parametrize(
    ("size", "aim"), [((4, 4), (6, 6)), ((4, 4), (16, 16)), ((4, 4), (4, 8)), ((4, 4), (8, 12))]
)
def test_a_map_smaller_in_another_ratio_keeps_its_size(size: Any, aim: Any):
    found = regression((3, *size), (5, *aim))
    assert found.kernel_size == (3, 3)
    assert found(torch.zeros(2, 3, *size)).shape == (2, 5, *size)


def test_the_hint_is_then_averaged_down():
    """The mean of 0..8 is 4, and (4 - 1)^2 = 9. Of one height, [[1, 3], [5, 7]] gives 2 and 6."""
    hint = torch.arange(9.0).view(1, 1, 3, 3)
    found = fitnet(beta=1.0).loss(outputs(torch.ones(1, 1, 1, 1), hint))
    close(found["hint"].item(), 9.0)
    hint = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
    found = fitnet(beta=1.0).loss(outputs(torch.tensor([[[[2.0], [5.0]]]]), hint))
    close(found["hint"].item(), 0.5)


def test_sizes_in_any_ratio_train():
    """stage3 is 2 x 2 and the teacher's stem 8 x 8."""
    method = fitnet(tap="stage3", teacher_tap="stem")
    out = method(images(), Progress(0, 0, 1, 1))
    assert out.mapped[0].shape == (4, 6, 2, 2)
    method.loss(out)["hint"].backward()
    assert method.regressor.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("student", "teacher", "count"),
    [
        ("resnet20", "resnet56", 1_120),
        ("wrn_16_2", "wrn_40_2", 4_288),
        ("wrn_40_1", "wrn_40_2", 2_240),
    ],
)
def test_the_published_regressors(student: str, teacher: str, count: int):
    data = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    method = FitNet([build(student)], [build(teacher)], data)
    assert sum(p.numel() for p in method.regressor.parameters()) == count


def test_the_regressor_normalises_by_the_batch_and_rectifies():
    """Before the ReLU each channel has mean 0 and variance 1 over images and pixels."""
    raw, rectified = fitnet(relu=False), fitnet()
    rectified.regressor.load_state_dict(raw.regressor.state_dict())
    batch, progress = images(16), Progress(0, 0, 1, 1)
    for net in (raw.student, rectified.student):
        net.eval()  # as both runs see the same map
    (u,), (v,) = raw(batch, progress).mapped, rectified(batch, progress).mapped
    close(u.mean((0, 2, 3)), torch.zeros(12), atol=1e-5, rtol=0)
    close(u.var((0, 2, 3), correction=0), torch.ones(12), atol=1e-2, rtol=0)
    close(v, u.clamp(min=0))


def test_the_hint_teaches_the_layers_before_it_alone():
    method = fitnet()
    terms = method.loss(method(images(), Progress(0, 0, 1, 1)))
    terms["hint"].backward()
    reached = {
        name.split(".")[0]
        for name, p in method.student.module.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert reached == {"conv1", "bn1", "layer1", "layer2"}
    assert method.regressor.conv.weight.grad.abs().sum() > 0


def test_no_gradient_reaches_the_teacher():
    mapped, hint = R.clone().requires_grad_(), T.clone().requires_grad_()
    sum(fitnet(alpha=1.0).loss(outputs(mapped, hint)).values()).backward()
    assert mapped.grad.abs().sum() > 0
    assert hint.grad is None


def test_the_hint_is_the_second_stage_or_the_middle_one():
    assert (fitnet().tap, fitnet().teacher_tap) == ("stage2", "stage2")
    net = toy_net(0)
    few = Net(net.module, {"stage1": "layer1", "stage3": "layer3"}, (3, 8, 8))
    parts = ("conv1", "bn1", "layer1", "layer2", "layer3")
    many = Net(toy_net(1).module, {f"stage{i}": part for i, part in enumerate(parts, 1)}, (3, 8, 8))
    method = FitNet([few], [many], ToyImages().spec())
    assert (method.tap, method.teacher_tap) == ("stage3", "stage2")


def test_a_tap_given_alone_is_the_teachers_too():
    one = fitnet(tap="stage1")
    assert (one.tap, one.teacher_tap) == ("stage1", "stage1")
    other = fitnet(teacher_tap="stage1")
    assert (other.tap, other.teacher_tap) == ("stage2", "stage1")


def test_it_reads_the_hint_and_the_logits_only_for_kd():
    assert fitnet().reads == {"stage2"}
    assert fitnet(teacher_tap="stem", alpha=0.5).reads == {"stem", "logits"}


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = fitnet(data, classes=9)
    assert list(method.loss(method(images(), Progress(0, 0, 1, 1)))) == ["ce", "hint"]
    with pytest.raises(MethodError, match="FitNet compares logits class by class"):
        fitnet(data, classes=9, alpha=0.1)


@pytest.mark.parametrize(
    ("argument", "role"), [("tap", "student"), ("teacher_tap", "teacher")], ids=str
)
def test_an_unknown_tap_is_refused_with_those_that_exist(argument: str, role: str):
    with pytest.raises(TapError) as error:
        fitnet(**{"teacher_tap": "stage1", argument: "stage4"})
    assert str(error.value) == (
        f"the {role}: no feature 'stage4'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        f'"stage3"?; choose {argument}=...'
    )


def test_a_tap_that_is_no_map_is_refused():
    with pytest.raises(MethodError) as error:
        fitnet(teacher_tap="embed")
    assert str(error.value) == (
        "FitNet needs feature maps (C, H, W), but 'embed' of the teacher is (12,); choose "
        "teacher_tap=... before the pooling"
    )


@pytest.mark.parametrize(
    ("role", "argument"), [("student", "tap"), ("teacher", "teacher_tap")], ids=str
)
def test_a_network_without_stages_is_refused(role: str, argument: str):
    bare = Net(toy_net(0).module, {"end": "layer3"}, (3, 8, 8))
    nets = {"student": toy_net(1), "teacher": toy_net(2), role: bare}
    with pytest.raises(MethodError) as error:
        FitNet([nets["student"]], [nets["teacher"]], ToyImages().spec())
    assert str(error.value) == (
        f"FitNet compares feature maps, and no stages of the {role} are known; choose "
        f"{argument}=... among ['end']"
    )


class Reshaped(nn.Module):
    """A network of one convolution with a map of 4 x 8 or 8 x 4."""

    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, stride)
        self.fc = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def test_a_map_that_is_higher_but_narrower_is_refused():
    own, other = (
        Net(Reshaped(stride), {"stage1": "conv"}, (3, 8, 8)) for stride in ((1, 2), (2, 1))
    )
    with pytest.raises(MethodError) as error:
        FitNet([own], [other], ToyImages().spec())
    assert str(error.value) == (
        "FitNet regresses a map from one that is larger or smaller, but 'stage1' of the student is "
        "2x8x4 and 'stage1' of the teacher 2x4x8; choose others with tap=... and teacher_tap=..."
    )
