"""NORM: loss, scaling and ramp by hand, the transform in the student, and its merging."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.errors import MethodError, TapError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.norm import NORM, ramp, standardized
from potstill.models import build
from potstill.net import Captured, Net, Predictor
from tests.toys import SHAPE, ToyImages, toy_net

close = torch.testing.assert_close
MIDDLE = Progress(100, 100, 241, 241)


def norm(data: DataSpec | None = None, classes: int = 4, width: int = 6, **arguments: Any) -> NORM:
    teacher = toy_net(1, width=width, classes=classes)
    return NORM([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def built(teacher: str, student: str, **arguments: Any) -> NORM:
    spec = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    return NORM([build(student, 4)], [build(teacher, 4)], spec, **arguments)


def small_net() -> Net:
    """Without stages; its last map is 4 x 4."""
    parts = [nn.Conv2d(3, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    return Net(nn.Sequential(*parts), {"last": "1"}, SHAPE)


def disturb(module: nn.Module) -> None:
    """Give every BatchNorm statistics and an affine map of its own, as after a training."""
    generator = torch.Generator().manual_seed(4)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_var, layer.weight.data):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (layer.running_mean, layer.bias.data):
                tensor.normal_(0, 0.3, generator=generator)


def outputs(
    mapped: Tensor,
    teacher: Tensor,
    logits: Tensor | None = None,
    taught: Tensor | None = None,
    progress: Progress = MIDDLE,
) -> Connected:
    """One image of label 0; the student is undecided between two classes unless told."""
    label = torch.tensor([0])
    batch = Batch(torch.zeros(1, 1), label, label, label)
    zero = torch.zeros(1, 2)
    own = Captured(zero if logits is None else logits, {})
    other = Captured(zero if taught is None else taught, {"stage3": teacher, "stage2": teacher})
    return Connected(batch, progress, [own], [other], [mapped])


U, TARGET = torch.tensor([1.0, 3.0, 2.0, 0.0]).view(1, 4, 1, 1), torch.tensor([[[[1.0]], [[2.0]]]])


def test_two_segments_by_hand():
    """Differences 0, 1 and 1, -2 from (1, 2): 0.5 + 2.5. CE weighs 1/8: ln 2 / 8."""
    found = norm(segments=2).loss(outputs(U, TARGET))
    assert list(found) == ["ce", "norm"]
    close(found["norm"].item(), 3.0)
    close(found["ce"].item(), math.log(2.0) / 8)


def test_a_segment_is_a_run_of_channels():
    """The teacher's channel list is repeated, not each of its channels."""
    method = norm(segments=2)
    for channels, cost in (([1.0, 2.0, 1.0, 2.0], 0.0), ([1.0, 1.0, 2.0, 2.0], 1.0)):
        u = torch.tensor(channels).view(1, 4, 1, 1)
        close(method.loss(outputs(u, TARGET))["norm"].item(), cost)


def test_any_segment_that_differs_costs():
    teacher = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    u = teacher.repeat(1, 4, 1, 1)
    method = norm(segments=4)
    assert method.loss(outputs(u, teacher))["norm"] == 0
    for k in range(4):
        other = u.clone()
        other[:, 3 * k] += 1.0
        close(method.loss(outputs(other, teacher))["norm"].item(), 1 / 3)


def test_logits_are_scaled_by_hand():
    """(1, 2, 3): mean 2, variance 2/3, 2.5 / sqrt(2/3) = 3.061862. The most that 100 classes
    give is 2.5 sqrt(99) = 24.87; logits that are all equal give zeros.
    """
    z = 2.5 / math.sqrt(2 / 3)
    close(standardized(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[-z, 0.0, z]]))
    close(standardized(torch.eye(100)[:1]).max().item(), 24.87, atol=5e-3, rtol=0)
    close(standardized(torch.full((2, 5), 7.0)), torch.zeros(2, 5))


def test_the_size_and_the_mean_of_logits_do_not_matter():
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(standardized(300 * logits - 50), standardized(logits), atol=1e-6, rtol=1e-6)
    assert torch.equal(standardized(logits).argsort(1), logits.argsort(1))


def test_both_logits_are_scaled_for_ce_and_kd():
    """Two classes end at -2.5 and 2.5. CE of label 0: ln(1 + e^-5). KL at T = 1 of a student that
    is undecided from q = sigmoid(5): ln 2 + q ln q + (1 - q) ln (1 - q).
    """
    taught = torch.tensor([[math.log(3.0), 0.0]])
    method = norm(segments=2, gamma=1.0, alpha=1.0, temperature=1.0)
    found = method.loss(outputs(U, TARGET, torch.tensor([[0.1, 0.0]]), taught))
    assert list(found) == ["ce", "kd", "norm"]
    close(found["ce"].item(), math.log1p(math.exp(-5.0)), atol=1e-5, rtol=0)
    close(found["kd"].item(), 0.0, atol=1e-5, rtol=0)
    q = 1 / (1 + math.exp(-5.0))
    wanted = math.log(2.0) + q * math.log(q) + (1 - q) * math.log(1 - q)
    found = method.loss(outputs(U, TARGET, taught=taught))
    close(found["kd"].item(), wanted, atol=1e-5, rtol=0)


def test_without_scaling_the_terms_are_those_of_plain_kd():
    """ce = ln(1 + e^-1); kl from (3/4, 1/4) at T = 1 of an undecided student."""
    taught = torch.tensor([[math.log(3.0), 0.0]])
    method = norm(segments=2, gamma=2.0, alpha=3.0, temperature=1.0, standardize=False)
    found = method.loss(outputs(U, TARGET, torch.tensor([[1.0, 0.0]])))
    close(found["ce"].item(), 2 * math.log1p(math.exp(-1.0)))
    found = method.loss(outputs(U, TARGET, taught=taught))
    close(found["kd"].item(), 3 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("epoch", "weight"),
    [(0, 0.1), (9, 0.1), (10, 0.5), (19, 0.5), (20, 1.0), (179, 1.0),
     (180, 0.5), (209, 0.5), (210, 0.1), (239, 0.1), (240, 0.1)],
)  # fmt: skip
def test_the_matching_comes_and_goes(epoch: int, weight: float):
    """Epochs 0 to 240 of the code that published it: 241 in all."""
    assert ramp(epoch) == weight
    out = outputs(U, TARGET, progress=Progress(epoch, epoch, 241, 241))
    close(norm(segments=2, beta=2.0).loss(out)["norm"].item(), 6.0 * weight)
    close(norm(segments=2, ramp=False).loss(out)["norm"].item(), 3.0)
    assert norm().lengths == {"distill": 241}


def test_a_larger_map_of_the_teacher_is_max_pooled():
    """4 x 4 for the student's 2 x 2: the largest of each quarter is 5, 7, 13, 15."""
    teacher = torch.arange(16.0).view(1, 1, 4, 4)
    method = norm(segments=2, teacher_tap="stage2")
    assert method.ratio == (2, 2)
    u = torch.tensor([5.0, 7.0, 13.0, 15.0]).view(1, 1, 2, 2).repeat(1, 2, 1, 1)
    assert method.loss(outputs(u, teacher))["norm"] == 0
    close(method.loss(outputs(u + 1, teacher))["norm"].item(), 2.0)


@pytest.mark.parametrize(
    ("teacher", "student", "segments", "parameters"),
    [
        ("resnet56", "resnet20", 8, 66_688),
        ("wrn_40_2", "wrn_16_2", 8, 264_448),
        ("resnet56", "resnet20", 4, 33_408),
    ],
)
def test_published_counts(teacher: str, student: str, segments: int, parameters: int):
    method = built(teacher, student, segments=segments)
    assert sum(p.numel() for p in method.transform.parameters()) == parameters
    found = sum(p.numel() for p in method.predictors()["student"].parameters())
    assert found == sum(p.numel() for p in method.student.parameters()) + parameters


def test_the_transform_begins_like_the_network_around_it():
    """Normal with std sqrt(2 / C_out), no bias; BatchNorm as the identity's."""
    torch.manual_seed(0)
    method = NORM([toy_net(0, width=64)], [toy_net(1, width=8)], ToyImages().spec())
    one, other = method.transform.conv1, method.transform.conv2
    assert one.weight.shape == (128, 128, 1, 1) and one.bias is None and other.bias is None
    close(one.weight.std().item(), math.sqrt(2 / 128), rtol=0.05, atol=0)
    close(other.weight.std().item(), math.sqrt(2 / 128), rtol=0.05, atol=0)
    for bn in (method.transform.bn1, method.transform.bn2):
        assert bn.weight.eq(1).all() and bn.bias.eq(0).all()


@pytest.mark.parametrize(
    ("teacher", "student", "tap", "teacher_tap", "ratio"),
    [
        ("resnet56", "resnet20", "stage3", "stage3", (1, 1)),
        ("wrn_40_2", "wrn_16_2", "stage3", "stage3", (1, 1)),
        ("vgg13", "vgg8", "stage4", "stage4", (1, 1)),
        ("resnet50", "mobilenetv2", "last", "stage4", (2, 2)),
        ("wrn_40_2", "mobilenetv2", "last", "stage3", (4, 4)),
        ("resnet32x4", "shufflenetv2", "stage3", "stage3", (2, 2)),
        ("resnet34", "wrn_28_2", "stage3", "stage3", (1, 1)),
    ],
)
def test_the_maps_that_are_matched(
    teacher: str, student: str, tap: str, teacher_tap: str, ratio: tuple[int, int]
):
    """Of ResNet-34, whose last stage is 4 x 4, the deepest that a student's 8 x 8 fits."""
    method = built(teacher, student, segments=2)
    assert (method.tap, method.teacher_tap, method.ratio) == (tap, teacher_tap, ratio)


@pytest.mark.parametrize("names", [("resnet8", "resnet8"), ("wrn_16_1", "wrn_16_1")])
@pytest.mark.parametrize("residual", [True, False])
def test_the_students_prediction_goes_through_the_transform(names: Any, residual: bool):
    """x is what a WRN's last BN-ReLU, and a ResNet's pooling, would have seen."""
    method = built(*names, segments=2, residual=residual)
    disturb(method)
    method.eval()
    image = torch.randn(2, 3, 32, 32)
    (out,) = method(Batch(image, *[torch.zeros(2, dtype=torch.int64)] * 3), MIDDLE).students
    layers, x = method.transform, out["stage3"]
    v = layers.bn2(layers.conv2(layers.bn1(layers.conv1(x))))
    close(out.logits, method.student.tail("stage3")(x + v if residual else v))
    close(method.predictors()["student"](image), out.logits)
    base = build(names[1], 4)
    base.module.load_state_dict(method.student.module.state_dict())
    assert (base.eval().logits(image) - out.logits).abs().max() > 0.01


def test_what_is_matched_is_the_wide_map_without_a_rectifier():
    method = norm(segments=3)
    disturb(method)
    method.eval()
    out = method(next(ToyImages(4).clean(4)), MIDDLE)
    (u,), x = out.mapped, out.students[0]["stage3"]
    close(u, method.transform.bn1(method.transform.conv1(x)))
    assert u.shape == (4, 36, 2, 2) and u.min() < -0.1


def test_nothing_is_kept_between_two_forwards():
    method = norm()
    batch = next(ToyImages(4).clean(4))
    for act in (
        lambda: method(batch, MIDDLE),
        lambda: method.predictors()["student"](batch.image),
        lambda: method(batch._replace(image=batch.image[:, :2]), MIDDLE),
    ):
        try:
            act()
        except RuntimeError as error:
            assert "channels" in str(error)
        assert method.transform.tape is None
    assert not any("tape" in key for key in method.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copys_student_runs_the_copys_transform(copied: Any):
    """With both last factors at zero the copy's transform adds nothing, the original's does."""
    method = norm().eval()
    image = torch.randn(2, *SHAPE)
    was = method.student.logits(image)
    other = copied(method)
    close(other.student.logits(image), was)
    nn.init.zeros_(other.transform.bn2.weight)
    base = toy_net(0).eval()
    close(other.student.logits(image), base.logits(image))
    close(method.student.logits(image), was)
    assert (was - base.logits(image)).abs().max() > 1e-3


def test_a_compiled_student_gives_the_wide_map_too():
    method = norm()
    batch = next(ToyImages(4).clean(4))
    method.eval()
    wanted = method(batch, MIDDLE)
    torch.compiler.reset()  # each network is one more version of Net.forward, and few are kept
    method.student.compile(backend="eager", fullgraph=True)
    found = method(batch, MIDDLE)
    close(found.mapped[0], wanted.mapped[0])
    close(found.students[0].logits, wanted.students[0].logits)
    method.loss(found)["norm"].backward()
    assert method.transform.conv1.weight.grad.abs().sum() > 0


def test_no_gradient_reaches_the_teacher_and_every_layer_has_one():
    method = norm()
    sum(method.loss(method(next(ToyImages(16).clean(16)), MIDDLE)).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.transform.parameters())
    assert method.student.classifier.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in method.teachers[0].parameters())
    u, teacher = U.clone().requires_grad_(), TARGET.clone().requires_grad_()
    norm(segments=2).loss(outputs(u, teacher))["norm"].backward()
    assert u.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize("residual", [True, False])
def test_a_trained_transform_merges_into_a_resnets_classifier(residual: bool):
    """The copy has the names and sizes of the architecture; the student stays as it is."""
    method = built("resnet56", "resnet20", merge=True, residual=residual)
    disturb(method)
    method.eval()
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = method.student.logits(image)
    merged = method.predictors()["student"]
    assert isinstance(merged, Predictor)
    close(merged(image), wanted, atol=1e-5, rtol=1e-5)
    plain = build("resnet20", 4).eval()
    plain.load_state_dict(merged.state_dict())
    close(plain.logits(image), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(method.student.logits(image), wanted)
    assert torch.equal(method.predictors()["student"](image), merged(image))


@pytest.mark.parametrize("residual", [True, False])
def test_a_trained_transform_merges_into_one_convolution_of_a_wrn(residual: bool):
    """128 x 128 weights and 128 shifts more than the student."""
    method = built("wrn_40_2", "wrn_16_2", merge=True, residual=residual)
    disturb(method)
    method.eval()
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = method.student.logits(image)
    merged = method.predictors()["student"]
    close(merged(image), wanted, atol=1e-5, rtol=1e-5)
    more = sum(p.numel() for p in merged.parameters()) - sum(
        p.numel() for p in method.student.parameters()
    )
    assert more == 128 * 128 + 128
    other = built("wrn_40_2", "wrn_16_2", merge=True).eval().predictors()["student"]
    other.load_state_dict(merged.state_dict())
    assert torch.equal(other(image), merged(image))


def test_a_classifier_without_bias_cannot_take_the_shift():
    parts = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    student = Net(nn.Sequential(*parts, nn.Linear(4, 4, bias=False)), {"last": "1"}, SHAPE)
    teacher = Net(
        nn.Sequential(nn.Conv2d(3, 5, 3), *parts[1:], nn.Linear(5, 4)), {"last": "1"}, SHAPE
    )
    method = NORM([student], [teacher], ToyImages().spec(), merge=True)
    disturb(method)
    method.eval()
    merged, image = method.predictors()["student"], torch.randn(3, *SHAPE)
    assert not isinstance(merged, Predictor)
    close(merged(image), method.student.logits(image), atol=1e-5, rtol=1e-5)


def test_what_predicts_is_saved_with_its_transform():
    image = torch.randn(2, *SHAPE)
    saved = norm().eval().predictors()["student"]
    state = saved.state_dict()
    assert {k.partition(".")[0] for k in state} == {"student", "transform"}
    other = NORM([toy_net(5)], [toy_net(6, width=6)], ToyImages().spec()).eval()
    predictor = other.predictors()["student"]
    assert (predictor(image) - saved(image)).abs().max() > 1e-3
    predictor.load_state_dict(state)
    assert torch.equal(predictor(image), saved(image))


def test_one_segment_is_a_plain_distance_without_a_transform():
    method = norm(segments=1, width=4, ramp=False).eval()
    out = method(next(ToyImages(4).clean(4)), MIDDLE)
    own, other = out.students[0]["stage3"], out.teachers[0]["stage3"]
    close(method.loss(out)["norm"], (own - other).square().mean())
    assert method.transform is None
    found = method.predictors()["student"]
    assert isinstance(found, Predictor)
    close(found(out.batch.image), toy_net(0).eval().logits(out.batch.image))


def test_it_reads_the_teachers_map_and_the_logits_only_for_kd():
    assert norm().reads == {"stage3"}
    assert norm(alpha=0.9, teacher_tap="stage2").reads == {"stage2", "logits"}


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = norm(data, classes=9)
    assert list(method.loss(method(next(ToyImages(4).clean(4)), MIDDLE))) == ["ce", "norm"]
    with pytest.raises(MethodError, match="NORM compares logits class by class"):
        norm(data, classes=9, alpha=0.1)


def test_a_larger_map_of_the_student_is_refused():
    with pytest.raises(MethodError) as error:
        norm(tap="stage2", teacher_tap="stage3")
    assert str(error.value) == (
        "NORM needs a teacher's map as high and wide as the student's, or a whole multiple of it, "
        "but 'stage2' of the student is 8x4x4 and 'stage3' of the teacher 12x2x2; choose others "
        "with tap=... and teacher_tap=..."
    )


def test_a_ratio_that_is_no_whole_number_is_refused():
    parts = [nn.Conv2d(3, 4, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    student = Net(nn.Sequential(*parts, nn.Linear(4, 4)), {"last": "1"}, SHAPE)
    with pytest.raises(MethodError) as error:
        NORM([student], [toy_net(1)], ToyImages().spec())
    assert str(error.value) == (
        "NORM needs a teacher's map as high and wide as the student's, or a whole multiple of it, "
        "but 'last' of the student is 4x3x3 and 'stage3' of the teacher 8x2x2; choose others with "
        "tap=... and teacher_tap=..."
    )


def test_one_segment_of_another_width_is_refused():
    with pytest.raises(MethodError) as error:
        norm(segments=1)
    assert str(error.value) == (
        "NORM with segments=1 compares the maps themselves, but 'stage3' of the student is 8x2x2 "
        "and 'stage3' of the teacher 12x2x2; choose more segments, or taps of equal widths"
    )


def test_no_segment_is_refused():
    with pytest.raises(MethodError) as error:
        norm(segments=0)
    assert str(error.value) == "NORM: segments is 0; choose 1 or more, 8 as published"


def test_one_call_of_several_is_refused():
    relu = nn.ReLU()
    parts = [nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu]
    pooled = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)]
    student = Net(nn.Sequential(*parts, *pooled), {"last": "1#1"}, SHAPE)
    with pytest.raises(TapError) as error:
        NORM([student], [small_net()], ToyImages().spec())
    assert str(error.value) == (
        "the student: 'last' is one call of several; nothing can be inserted there; choose tap=..."
    )


def test_a_tap_of_each_side_is_named_when_it_does_not_exist():
    for role, argument in (("student", "tap"), ("teacher", "teacher_tap")):
        with pytest.raises(TapError) as error:
            norm(**{argument: "stage4"})
        assert str(error.value) == (
            f"the {role}: no feature 'stage4'; this network has ['embed', 'last', 'stage1', "
            "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
            f'"stage3"?; choose {argument}=...'
        )
