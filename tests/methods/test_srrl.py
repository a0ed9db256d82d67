"""SRRL: both losses by hand, what passes through the teacher's classifier, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.errors import MethodError, NetworkError, TapError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.srrl import SRRL
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import SHAPE, ToyImages, toy_net

close = torch.testing.assert_close
START = Progress(0, 0, 1, 1)
WEIGHT, BIAS = [[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], [0.0, 0.0, 1.0]
EMBED, LOGITS = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0, 4.0]])


def srrl(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> SRRL:
    teacher = toy_net(1, width=6, classes=classes)
    return SRRL([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def small(weight: Any = WEIGHT, bias: Any = BIAS, **arguments: Any) -> SRRL:
    """The teacher's classifier reads two numbers and is the one given."""
    classes = range(len(bias))
    nets = [toy_net(0, classes=len(bias))], [toy_net(1, width=1, classes=len(bias))]
    data = ToyImages().spec()._replace(classes=classes, teacher_classes=[classes])
    method = SRRL(*nets, data, **arguments)
    with torch.no_grad():
        method.teachers[0].classifier.weight.copy_(torch.tensor(weight))
        method.teachers[0].classifier.bias.copy_(torch.tensor(bias))
    return method


def outputs(mapped: Any, embed: Tensor = EMBED, logits: Tensor = LOGITS) -> Connected:
    """Label 0; the student is undecided between two classes."""
    label = torch.tensor([0])
    batch = Batch(torch.zeros(1, 1), label, label, label)
    own, other = Captured(torch.zeros(1, 2), {}), Captured(logits, {"embed": embed})
    return Connected(batch, START, [own], [other], [torch.as_tensor(mapped)[None]])


@pytest.mark.parametrize(
    "mapped", [[[[2.0]], [[1.0]]], [[[0.0, 4.0], [1.0, 3.0]], [[1.0, 1.0], [2.0, 0.0]]]]
)
def test_both_losses_by_hand(mapped: Any):
    """Channel means (2, 1) against (1, 2): (1 + 1) / 2 = 1. Logits (2, 2, 4) against (1, 4, 4):
    (1 + 4 + 0) / 3 = 5/3.
    """
    found = small().loss(outputs(mapped))
    assert list(found) == ["ce", "fm", "sr"]
    close(found["ce"].item(), math.log(2.0))
    close(found["fm"].item(), 1.0)
    close(found["sr"].item(), 5 / 3)


def test_weights_multiply_and_kd_joins_with_alpha():
    """Vector 0 against (1, 2): 5/2. Logits 0 against (ln 3, 0): ln^2 3 / 2, and at T = 1 the
    divergence 3/4 ln 3/2 + 1/4 ln 1/2.
    """
    weights = {"gamma": 2.0, "alpha": 3.0, "temperature": 1.0, "feature": 5.0, "regression": 7.0}
    method = small([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0], **weights)
    zero, log3 = torch.zeros(2, 1, 1), math.log(3.0)
    found = method.loss(outputs(zero, logits=torch.tensor([[log3, 0.0]])))
    assert list(found) == ["ce", "kd", "fm", "sr"]
    close(found["ce"].item(), 2 * math.log(2.0))
    close(found["kd"].item(), 3 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), atol=1e-6, rtol=0)
    close(found["fm"].item(), 5 * 2.5)
    close(found["sr"].item(), 7 * log3**2 / 2)


def test_the_teachers_own_map_costs_nothing_wherever_its_pixels_are():
    method = srrl()
    (teacher,) = method.teach(next(ToyImages(4).clean(4)))
    shuffled = teacher["last"].flatten(2)[..., torch.tensor([2, 0, 3, 1])].unflatten(2, (2, 2))
    batch = Batch(torch.zeros(4, 1), *[torch.zeros(4, dtype=torch.int64)] * 3)
    out = Connected(batch, START, [Captured(torch.zeros(4, 4), {})], [teacher], [shuffled])
    found = method.loss(out)
    assert teacher["last"].std() > 0.1
    close(found["fm"].item(), 0.0, atol=1e-12, rtol=0)
    close(found["sr"].item(), 0.0, atol=1e-11, rtol=0)


def test_a_difference_that_the_classifier_does_not_see_costs_features_alone():
    """W reads the first number only: (1, 5) for (1, 2)."""
    method = small([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    found = method.loss(outputs([[[1.0]], [[5.0]]], logits=logits))
    close(found["sr"].item(), 0.0)
    close(found["fm"].item(), 4.5)


def test_the_gradient_passes_through_the_frozen_classifier():
    """By the regression alone: connector and student learn, the classifier does not."""
    method = srrl(feature=0.0, gamma=0.0)
    out = method(next(ToyImages(4).clean(4)), START)
    sum(method.loss(out).values()).backward()
    head = method.teachers[0].classifier
    assert all(p.grad is None and not p.requires_grad for p in head.parameters())
    assert method.connector[0].conv.weight.grad.abs().sum() > 0
    assert method.student.module.conv1.weight.grad.abs().sum() > 0
    assert method.student.classifier.weight.grad is None


def test_no_gradient_reaches_the_teachers_outputs():
    embed, logits = EMBED.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    mapped = torch.ones(2, 1, 1, requires_grad=True)
    sum(small().loss(outputs(mapped, embed, logits)).values()).backward()
    assert mapped.grad is not None and embed.grad is None and logits.grad is None


@pytest.mark.parametrize(
    ("teacher", "student", "parameters"),
    [
        ("resnet56", "resnet20", 4_224),
        ("wrn_40_2", "wrn_16_2", 16_640),
        ("wrn_40_2", "wrn_40_1", 8_448),
    ],
)
def test_published_counts_of_connectors(teacher: str, student: str, parameters: int):
    """At the map that is pooled, which in a WRN is after the last BN-ReLU."""
    spec = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    method = SRRL([build(student, 4)], [build(teacher, 4)], spec)
    assert sum(p.numel() for p in method.connector.parameters()) == parameters
    assert method.tap == "last"


def test_the_connector_is_a_convolution_batchnorm_and_a_relu():
    torch.manual_seed(0)
    method = SRRL([toy_net(0, width=64)], [toy_net(1, width=64)], ToyImages().spec())
    conv, bn = method.connector[0]
    assert conv.bias is None and bn.weight.eq(1).all() and bn.bias.eq(0).all()
    close(conv.weight.std().item(), math.sqrt(2 / 128), rtol=0.05, atol=0)
    out = method(next(ToyImages(16).clean(16)), START)
    x = bn(conv(out.students[0]["last"]))
    assert (x < 0).any()
    close(out.mapped[0], x.clamp_min(0))


def test_a_pooled_vector_is_a_map_of_one_pixel():
    """The form of SimKD's tables: connector on vectors, KD beside it."""
    method = srrl(tap="embed", alpha=1.0).eval()
    out = method(next(ToyImages(4).clean(4)), START)
    assert out.mapped[0].shape == (4, 12, 1, 1)
    close(out.mapped[0], method.connector(out.students[0]["last"].mean((2, 3), keepdim=True)))
    assert list(method.loss(out)) == ["ce", "kd", "fm", "sr"]


def test_a_teacher_with_hidden_layers_is_read_where_its_classifier_reads():
    parts = [nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU()]
    teacher = Net(nn.Sequential(*parts, nn.Linear(5, 4)), {"last": "0"}, SHAPE)
    method = SRRL([toy_net(0)], [teacher], ToyImages().spec())
    out = method(next(ToyImages(4).clean(4)), START)
    assert out.mapped[0].shape == (4, 5, 2, 2)
    vector = out.mapped[0].mean((2, 3))
    close(method.loss(out)["fm"], (vector - out.teachers[0]["embed"]).square().mean())


def test_it_reads_the_vector_and_the_logits():
    assert srrl().reads == {"embed", "logits"}


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = srrl(data, classes=9)
    found = method.loss(method(next(ToyImages(4).clean(4)), START))
    assert list(found) == ["ce", "fm", "sr"] and found["sr"] > 0
    with pytest.raises(MethodError, match="SRRL compares logits class by class"):
        srrl(data, classes=9, alpha=0.1)


def test_the_student_predicts_with_its_own_classifier():
    method = srrl().eval()
    image = torch.randn(2, *SHAPE)
    close(method.predictors()["student"](image), method.student.logits(image))


def test_a_teacher_without_a_classifier_is_refused():
    parts = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    teacher = Net(nn.Sequential(*parts), {"last": "0"}, SHAPE)
    with pytest.raises(NetworkError) as error:
        SRRL([toy_net(0)], [teacher], ToyImages().spec())
    assert str(error.value) == (
        "the teacher: Sequential has no final linear layer from features to logits; this method "
        "needs one"
    )


def test_a_teacher_whose_embed_is_something_else_is_refused():
    parts = [nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    teacher = Net(nn.Sequential(*parts), {"embed": "0"}, SHAPE)
    with pytest.raises(MethodError) as error:
        SRRL([toy_net(0)], [teacher], ToyImages().spec())
    assert str(error.value) == (
        "SRRL needs a teacher whose 'embed' is the vector that its classifier reads, (6,), but it "
        "is (6, 6, 6); name no other tap embed, or choose another teacher"
    )


def test_a_tap_of_the_student_that_is_no_map_and_no_vector_is_refused():
    parts = [nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    student = Net(nn.Sequential(*parts, nn.Linear(4, 4)), {"tokens": "1"}, SHAPE)
    with pytest.raises(MethodError) as error:
        SRRL([student], [toy_net(1)], ToyImages().spec(), tap="tokens")
    assert str(error.value) == (
        "SRRL needs a feature map (C, H, W) or a vector, but 'tokens' of the student is (4, 36); "
        "choose another tap=..."
    )


def test_an_unknown_tap_is_refused_with_those_that_exist():
    with pytest.raises(TapError) as error:
        srrl(tap="stage4")
    assert str(error.value) == (
        "the student: no feature 'stage4'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        '"stage3"?; choose tap=...'
    )
