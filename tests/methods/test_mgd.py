"""MGD: the loss by hand, the masks, the weight of a sum, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.errors import MethodError, TapError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.mgd import MGD
from potstill.models import build
from potstill.net import Captured
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close
START = Progress(0, 0, 1, 1)


def mgd(data: DataSpec | None = None, classes: int = 4, width: int = 6, **arguments: Any) -> MGD:
    teacher = toy_net(1, width=width, classes=classes)
    return MGD([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def built(teacher: str, student: str, **arguments: Any) -> MGD:
    spec = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    return MGD([build(student, 4)], [build(teacher, 4)], spec, **arguments)


def outputs(mapped: Tensor, teacher: Tensor) -> Connected:
    """Two classes, label 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    label = torch.zeros(len(mapped), dtype=torch.int64)
    batch = Batch(label[:, None], label, label, label)
    logits = torch.tensor([[math.log(3.0), 0.0]]).expand(len(mapped), 2)
    own, other = Captured(torch.zeros(len(mapped), 2), {}), Captured(logits, {"last": teacher})
    return Connected(batch, START, [own], [other], [mapped])


GENERATED = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).view(2, 1, 1, 2)
TARGET = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).view(2, 1, 1, 2)


def identity(method: MGD) -> None:
    """Let the generator give back what is not negative."""
    for conv in (method.generator.conv1, method.generator.conv2):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)


def test_a_sum_over_elements_and_a_mean_over_images_by_hand():
    """Sums 1 + 4 and 0 + 4 of two images: 4.5."""
    found = mgd(beta=10.0).loss(outputs(GENERATED, TARGET))
    assert list(found) == ["ce", "mgd"]
    close(found["mgd"].item(), 45.0)
    close(found["ce"].item(), math.log(2.0))


def test_weights_multiply_and_kd_joins_with_alpha():
    """kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2."""
    method = mgd(beta=1.0, gamma=2.0, alpha=3.0, temperature=1.0)
    found = method.loss(outputs(GENERATED, TARGET))
    assert list(found) == ["ce", "kd", "mgd"]
    close(found["ce"].item(), 2 * math.log(2.0))
    close(found["kd"].item(), 3 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), atol=1e-6, rtol=0)
    close(found["mgd"].item(), 4.5)


@pytest.mark.parametrize(
    ("teacher", "student", "generator", "align", "beta"),
    [
        ("resnet56", "resnet20", 73_856, 0, 4.29e-4),
        ("wrn_40_2", "wrn_16_2", 295_168, 0, 2.14e-4),
        ("wrn_40_2", "wrn_40_1", 295_168, 8_320, 2.14e-4),
    ],
)
def test_published_counts_and_weights(
    teacher: str, student: str, generator: int, align: int, beta: float
):
    method = built(teacher, student)
    assert sum(p.numel() for p in method.generator.parameters()) == generator
    assert sum(p.numel() for p in method.align.parameters()) == align
    close(method.beta, beta, rtol=2e-3, atol=0)
    assert method.tap == method.teacher_tap == "last"  # in a WRN after the last BN-ReLU
    assert method.drop == 0.15 and method.mask == "channel"


def test_the_default_weight_is_one_of_the_mean_on_any_map():
    """1.75616 = 7e-5 * 512 * 49, whatever the size at which the maps meet; a number is kept."""
    teacher, student = torch.zeros(2, 12, 2, 2), torch.ones(2, 12, 2, 2)
    close(mgd().loss(outputs(student, teacher))["mgd"].item(), 1.75616)
    larger = mgd(teacher_tap="stage1")  # 6 x 8 x 8, met at the student's 2 x 2
    out = outputs(torch.ones(2, 6, 2, 2), teacher)
    out.teachers[0].features["stage1"] = torch.zeros(2, 6, 8, 8)
    close(larger.loss(out)["mgd"].item(), 1.75616)
    assert mgd(beta=7e-5).beta == 7e-5


def test_of_non_negative_maps_an_identity_without_a_mask_costs_their_distance():
    method = mgd(width=4, drop=0.0, beta=3.0)
    identity(method)
    out = method(next(ToyImages(4).clean(4)), START)
    own, other = out.students[0]["last"], out.teachers[0]["last"]
    assert isinstance(method.align, nn.Identity)
    close(out.mapped[0], own)
    close(method.loss(out)["mgd"], 3 * (own - other).square().sum() / 4)
    close(method.generator(-own), torch.zeros_like(own))  # there is a ReLU


def test_a_mask_leaves_what_it_keeps_as_it_is_and_is_new_each_time():
    """No rescaling by 1 / (1 - drop); the same seed draws the same."""
    method = mgd(width=4, drop=0.5)
    identity(method)
    batch = next(ToyImages(16).clean(16))
    torch.manual_seed(3)
    out = method(batch, START)
    x, masked = out.students[0]["last"], out.mapped[0]
    kept = masked.abs().sum((2, 3)) > 0
    close(masked, x * kept[:, :, None, None])
    assert 0.2 < kept.float().mean() < 0.8
    again = method(batch, START).mapped[0]
    torch.manual_seed(3)
    assert not torch.equal(again, masked)
    close(method(batch, START).mapped[0], masked)


@pytest.mark.parametrize(("mask", "shape"), [("channel", (50, 40, 1, 1)), ("pixel", (50, 1, 8, 6))])
@pytest.mark.parametrize("drop", [0.15, 0.65])
def test_a_share_of_channels_or_of_pixels_is_dropped(mask: Any, shape: tuple, drop: float):
    """Of 2,000 or 2,400 draws, within four standard deviations (at most 0.043)."""
    torch.manual_seed(0)
    kept = mgd(mask=mask, drop=drop).draw_mask(torch.ones(50, 40, 8, 6))
    assert kept.shape == shape
    close(1 - kept.double().mean().item(), drop, atol=0.043, rtol=0)
    assert kept.double().mean((1, 2, 3)).std() > 0.03  # every image has its own


def test_with_everything_dropped_the_student_is_not_seen_and_without_a_mask_it_is():
    batch, other = next(ToyImages(4).clean(4)), next(ToyImages(4).clean(4))
    other = other._replace(image=other.image.flip(0))
    blind, open_eyed = mgd(drop=1.0), mgd(drop=0.0)
    assert torch.equal(blind(batch, START).mapped[0], blind(other, START).mapped[0])
    first, second = (open_eyed(b, START).mapped[0] for b in (batch, other))
    close(first, second.flip(0), atol=1e-5, rtol=1e-4)
    assert (first - second).abs().max() > 1e-3


def test_the_aligned_map_is_masked_before_the_generator():
    method = mgd(drop=1.0)
    out = method(next(ToyImages(4).clean(4)), START)
    close(out.mapped[0], method.generator(torch.zeros(4, 12, 2, 2)))


def test_the_loss_covers_masked_places_and_the_teacher_is_not_masked():
    method = mgd(width=4, drop=1.0, beta=1.0)
    identity(method)
    out = method(next(ToyImages(4).clean(4)), START)
    close(method.loss(out)["mgd"], out.teachers[0]["last"].square().sum() / 4)


def test_no_gradient_reaches_the_teacher_and_every_layer_has_one():
    method = mgd()
    sum(method.loss(method(next(ToyImages(16).clean(16)), START)).values()).backward()
    for layer in (method.align, method.generator.conv1, method.generator.conv2):
        assert layer.weight.grad.abs().sum() > 0 and layer.bias.grad.abs().sum() > 0
    assert all(p.grad is None for p in method.teachers[0].parameters())
    mapped, teacher = GENERATED.clone().requires_grad_(), TARGET.clone().requires_grad_()
    method.loss(outputs(mapped, teacher))["mgd"].backward()
    assert mapped.grad.abs().sum() > 0 and teacher.grad is None


def test_the_larger_map_is_averaged_down():
    """A student of 8 x 8 before the generator, a teacher of 8 x 8 in the loss."""
    batch = next(ToyImages(4).clean(4))
    larger = mgd(drop=0.0, tap="stage1")
    out = larger(batch, START)
    small = nn.functional.avg_pool2d(larger.align(out.students[0]["stage1"]), 4)
    close(out.mapped[0], larger.generator(small))
    smaller = mgd(beta=1.0, drop=0.0, teacher_tap="stage1")
    out = smaller(batch, START)
    small = nn.functional.avg_pool2d(out.teachers[0]["stage1"], 4)
    assert out.mapped[0].shape == small.shape
    close(smaller.loss(out)["mgd"], (out.mapped[0] - small).square().sum() / 4)


def test_it_reads_the_teachers_map_and_the_logits_only_for_kd():
    assert mgd().reads == {"last"}
    assert mgd(alpha=0.5, teacher_tap="stage2").reads == {"stage2", "logits"}


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = mgd(data, classes=9)
    assert list(method.loss(method(next(ToyImages(4).clean(4)), START))) == ["ce", "mgd"]
    with pytest.raises(MethodError, match="MGD compares logits class by class"):
        mgd(data, classes=9, alpha=0.1)


@pytest.mark.parametrize("drop", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(drop: float):
    with pytest.raises(MethodError) as error:
        mgd(drop=drop)
    assert str(error.value) == (
        f"MGD masks a share of the student's map, and drop is {drop}; choose 0 to 1"
    )


def test_an_unknown_tap_is_refused_with_those_that_exist():
    with pytest.raises(TapError) as error:
        mgd(teacher_tap="stage4")
    assert str(error.value) == (
        "the teacher: no feature 'stage4'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        '"stage3"?; choose teacher_tap=...'
    )


def test_vectors_are_refused():
    with pytest.raises(MethodError) as error:
        mgd(tap="embed")
    assert str(error.value) == (
        "MGD needs feature maps (C, H, W), but 'embed' of the student is (8,); choose tap=... "
        "before the pooling"
    )
