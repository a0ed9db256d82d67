"""SimKD: the loss by hand, what predicts and what belongs to it, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.errors import MethodError, NetworkError
from potstill.method import Batch, Progress
from potstill.methods.simkd import SimKD
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import SHAPE, ToyImages, toy_net

close = torch.testing.assert_close
START = Progress(0, 0, 1, 1)


class Change(nn.Module):
    """In the projector's place: a function of the map."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def simkd(**arguments: Any) -> SimKD:
    return SimKD([toy_net(0)], [toy_net(1, width=6)], ToyImages().spec(), **arguments)


def twins(function: Any) -> SimKD:
    """The student has the teacher's weights, and the projector is the function."""
    teacher = toy_net(1)
    method = SimKD([copy.deepcopy(teacher)], [teacher], ToyImages().spec())
    nn.init.zeros_(method.student.classifier.weight)
    method.projector = Change(function)
    return method.eval()


def outputs(mapped: Tensor, teacher: Tensor) -> Connected:
    label = torch.zeros(len(mapped), dtype=torch.int64)
    batch, logits = Batch(label[:, None], label, label, label), torch.zeros(len(mapped), 4)
    other = Captured(logits, {"last": teacher})
    return Connected(batch, START, [Captured(logits, {})], [other], [mapped])


def test_half_too_much_everywhere_by_hand():
    """0.5^2 = 0.25, the only term; logits move by half of W's row sums."""
    method = twins(lambda x: x + 0.5)
    found = method.loss(method(next(ToyImages(4).clean(4)), START))
    assert list(found) == ["simkd"]
    close(found["simkd"].item(), 0.25)
    image, teacher = torch.randn(3, *SHAPE), method.teachers[0]
    shift = 0.5 * teacher.classifier.weight.sum(1)
    close(method.predictors()["student"](image), teacher.logits(image) + shift)


def test_the_teachers_own_map_gives_no_loss_and_the_teachers_logits():
    method = twins(lambda x: x)
    out = method(next(ToyImages(4).clean(4)), START)
    assert method.loss(out)["simkd"] == 0
    found = method.predictors()["student"](out.batch.image)
    close(found, out.teachers[0].logits)
    assert found.std() > 0.1


def test_the_place_of_a_pixel_matters_to_the_loss_and_not_to_the_prediction():
    method, image = twins(lambda x: x.flip(2, 3)), torch.randn(3, *SHAPE)
    close(method.predictors()["student"](image), method.teachers[0].logits(image))
    assert method.loss(method(next(ToyImages(4).clean(4)), START))["simkd"] > 0.01


def test_beta_multiplies_a_mean_over_all_elements():
    """Of 8 elements two differ, by 2: 3 * 8 / 8."""
    mapped = torch.zeros(2, 2, 1, 2)
    mapped[0, 0] = 2.0
    close(simkd(beta=3.0).loss(outputs(mapped, torch.zeros(2, 2, 1, 2)))["simkd"].item(), 3.0)


def test_no_gradient_reaches_the_teacher():
    mapped, teacher = torch.ones(1, 2, 1, 1).requires_grad_(), torch.zeros(1, 2, 1, 1)
    simkd().loss(outputs(mapped, teacher.requires_grad_()))["simkd"].backward()
    close(mapped.grad, torch.ones(1, 2, 1, 1))
    assert teacher.grad is None


def test_backbone_and_projector_learn_and_the_students_classifier_is_frozen():
    method = simkd()
    method.loss(method(next(ToyImages(16).clean(16)), START))["simkd"].backward()
    own = [*method.student.backbone_parameters(), *method.projector.parameters()]
    assert all(p.grad is not None for p in own)
    assert method.student.module.conv1.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in method.student.classifier.parameters())
    assert {id(p) for p in method.trainable()} == {id(p) for p in own}


@pytest.mark.parametrize(
    ("teacher", "student", "reduction", "parameters"),
    [
        ("resnet56", "resnet20", 2, 13_568),
        ("wrn_40_2", "wrn_16_2", 2, 53_760),
        ("wrn_40_2", "wrn_40_1", 2, 49_664),
        ("resnet32x4", "resnet8x4", 2, 214_016),
        ("resnet32x4", "resnet8x4", 4, 70_400),
        ("resnet32x4", "resnet8x4", 8, 26_240),
    ],
)
def test_published_counts(teacher: str, student: str, reduction: int, parameters: int):
    """Of the projector; what predicts has the teacher's classifier in place of the student's."""
    spec = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    spec = spec._replace(classes=range(100), teacher_classes=[range(100)])
    method = SimKD([build(student)], [build(teacher)], spec, reduction=reduction)
    assert sum(p.numel() for p in method.projector.parameters()) == parameters
    backbone = sum(p.numel() for p in method.student.backbone_parameters())
    head = sum(p.numel() for p in method.teachers[0].classifier.parameters())
    deployed = method.predictors()["student"]
    assert sum(p.numel() for p in deployed.parameters()) == backbone + parameters + head
    assert method.tap == method.teacher_tap == "last"  # in a WRN after the last BN-ReLU


def test_the_projector_has_three_convolutions_without_bias_and_ends_in_a_relu():
    method = simkd(reduction=3)
    kinds = [type(m).__name__ for m in method.projector]
    assert kinds == ["Identity", *["Conv2d", "BatchNorm2d", "ReLU"] * 3]
    convolutions = [m for m in method.projector if isinstance(m, nn.Conv2d)]
    assert [m.weight.shape for m in convolutions] == [(4, 8, 1, 1), (4, 4, 3, 3), (12, 4, 1, 1)]
    assert all(m.bias is None for m in convolutions)
    assert method.projector(torch.randn(2, 8, 5, 5)).shape == (2, 12, 5, 5)


def test_what_predicts_shares_the_weights_and_learns_on():
    method = simkd()
    before = method.predictors()["student"].eval()
    image = torch.randn(2, *SHAPE)
    was = before(image)
    with torch.no_grad():
        method.student.module.conv1.weight.mul_(2)
        method.student.module.bn1.running_mean.add_(1)
    now = before(image)
    assert (now - was).abs().max() > 1e-3
    close(now, method.predictors()["student"].eval()(image))
    assert {id(p) for p in before.backbone.parameters()} == {
        id(p) for p in method.student.backbone_parameters()
    }


def test_what_predicts_is_saved_whole_and_without_the_students_classifier():
    """Loaded into a method of other weights and of another teacher, it predicts the same."""
    image = torch.randn(2, *SHAPE)
    saved = simkd().predictors()["student"].eval()
    state = saved.state_dict()
    assert {k.partition(".")[0] for k in state} == {"backbone", "projector", "classifier"}
    assert not any(k.startswith("backbone.fc") for k in state)
    other = SimKD([toy_net(5)], [toy_net(6, width=6)], ToyImages().spec())
    predictor = other.predictors()["student"].eval()
    assert (predictor(image) - saved(image)).abs().max() > 1e-3
    predictor.load_state_dict(state)
    assert torch.equal(predictor(image), saved(image))


def test_what_predicts_is_float32_where_training_is_not_and_a_copy_is_its_own():
    method, image = simkd(), torch.randn(2, *SHAPE)
    wanted = method.predictors()["student"].eval()(image)
    method.student.precision = torch.bfloat16
    predictor = method.predictors()["student"].eval()
    assert torch.equal(predictor(image), wanted)
    assert method.student.precision is torch.bfloat16
    other = copy.deepcopy(predictor)
    nn.init.zeros_(predictor.backbone.module.conv1.weight)
    assert torch.equal(other(image), wanted) and not torch.equal(predictor(image), wanted)


def test_it_predicts_with_what_it_trained():
    """In eval mode both are the classifier of the mean of the same map; no mode is changed."""
    method = simkd()
    method(next(ToyImages(16).clean(16)), START)
    method.eval()
    out = method(next(ToyImages(4).clean(4)), START)
    wanted = method.teachers[0].classifier(out.mapped[0].mean((2, 3)))
    close(method.predictors()["student"](out.batch.image), wanted)


def test_a_larger_map_of_the_student_is_averaged_before_the_projector():
    """8 x 8 against the teacher's 2 x 2, in training and in prediction."""
    method = simkd(tap="stage1").eval()
    out = method(next(ToyImages(4).clean(4)), START)
    small = nn.functional.avg_pool2d(out.students[0]["stage1"], 4)
    close(out.mapped[0], method.projector[1:](small))
    wanted = method.teachers[0].classifier(out.mapped[0].mean((2, 3)))
    close(method.predictors()["student"](out.batch.image), wanted)
    close(method.loss(out)["simkd"], (out.mapped[0] - out.teachers[0]["last"]).square().mean())


def test_a_larger_map_of_the_teacher_is_averaged():
    """[[1, 3], [5, 7]] against 3 at one pixel: (4 - 3)^2."""
    teacher = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
    found = simkd().loss(outputs(torch.full((1, 1, 1, 1), 3.0), teacher))
    close(found["simkd"].item(), 1.0)


def test_it_reads_the_teachers_map_alone():
    assert simkd().reads == {"last"}
    assert simkd(teacher_tap="stage3").reads == {"stage3"}


def test_a_teacher_that_does_not_pool_its_map_is_refused():
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    message = (
        "SimKD gives the teacher's classifier the mean over space of the teacher's '{}', but that "
        "is not what this classifier reads; choose the map that is pooled with teacher_tap=..., or "
        "another teacher"
    )
    with pytest.raises(MethodError) as error:
        SimKD([toy_net(0)], [Net(flat, {"last": "1"}, SHAPE)], ToyImages().spec())
    assert str(error.value) == message.format("last")
    with pytest.raises(MethodError) as error:
        simkd(teacher_tap="stage3:pre")
    assert str(error.value) == message.format("stage3:pre")


@pytest.mark.parametrize("reduction", [0, 13])
def test_a_projector_without_channels_is_refused(reduction: int):
    with pytest.raises(MethodError) as error:
        simkd(reduction=reduction)
    assert str(error.value) == (
        "SimKD divides the 12 channels of 'last' of the teacher by "
        f"reduction={reduction}; choose 1 to 12, 2 as published"
    )


def test_a_teacher_of_other_classes_is_refused():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    with pytest.raises(MethodError, match="teacher 0 has 9 classes and student 0 has 4"):
        SimKD([toy_net(0)], [toy_net(1, classes=9)], data)


def test_vectors_are_refused():
    with pytest.raises(MethodError) as error:
        simkd(tap="embed")
    assert str(error.value) == (
        "SimKD needs feature maps (C, H, W), but 'embed' of the student is (8,); choose tap=... "
        "before the pooling"
    )


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_without_a_classifier_is_refused(role: str):
    parts = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    nets = {"student": toy_net(0), "teacher": toy_net(1)}
    nets[role] = Net(nn.Sequential(*parts), {"last": "0"}, SHAPE)
    with pytest.raises(NetworkError, match=f"^the {role}: Sequential has no final linear layer"):
        SimKD([nets["student"]], [nets["teacher"]], ToyImages().spec())
