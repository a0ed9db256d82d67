"""SemCKD: similarities, weights and loss by hand, its layers, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import MethodError, TapError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.semckd import Calibrated, SemCKD, association, distance, similarity
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close
START = Progress(0, 0, 1, 1)


def semckd(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> SemCKD:
    torch.manual_seed(2)
    teacher = toy_net(1, width=6, classes=classes)
    return SemCKD([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def outputs(weights: Tensor, projected: list[list[Tensor]], teacher: list[Tensor]) -> Calibrated:
    """Two classes, label 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    n = len(weights)
    label = torch.zeros(n, dtype=torch.int64)
    features = {f"stage{i}": x for i, x in enumerate(teacher, start=1)}
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]] * n), features)
    batch, own = Batch(torch.zeros(n, 1), label, label, label), Captured(torch.zeros(n, 2), {})
    return Calibrated(batch, START, [own], [taught], weights, projected)


def whole_batch() -> Batch:
    return next(ToyImages(16).clean(16))


def maps_of(*distances: float) -> list[Tensor]:
    """Maps at these mean squared distances of a map of zeros, one image each."""
    return [torch.full((1, 2, 1, 1), math.sqrt(d)) for d in distances]


def test_terms_by_hand():
    """Weights [[1/4, 3/4], [1/2, 1/2]] and distances [[1, 2], [3, 5]]: (0.25 + 1.5 + 1.5 + 2.5) / 2
    is 2.875, times beta = 400; ce = ln 2; kl at T = 1 is 3/4 ln 3/2 + 1/4 ln 1/2.
    """
    method = semckd(taps=["stage1", "stage2"], teacher_taps=["stage1", "stage2"], temperature=1.0)
    weights = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    out = outputs(weights, [maps_of(1, 2), maps_of(3, 5)], [torch.zeros(1, 2, 1, 1)] * 2)
    found = method.loss(out)
    assert list(found) == ["ce", "kd", "semantic"]
    close(found["semantic"].item(), 400 * 2.875, rtol=1e-6, atol=0)
    close(found["ce"].item(), math.log(2.0))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), kl, rtol=1e-5, atol=0)


def test_weights_multiply_and_alpha_0_leaves_kd_out():
    method = semckd(beta=2.0, gamma=3.0, alpha=0.0, taps=["stage1"], teacher_taps=["stage1"])
    found = method.loss(outputs(torch.ones(1, 1, 1), [maps_of(7)], [torch.zeros(1, 2, 1, 1)]))
    assert list(found) == ["ce", "semantic"]
    close(found["ce"].item(), 3 * math.log(2.0))
    close(found["semantic"].item(), 14.0, rtol=1e-6, atol=0)


def test_the_loss_is_the_mean_over_images():
    """Image 0 weighs (1, 0) and differs by (4, 100), image 1 weighs (0, 1) and differs by (100, 2):
    (4 + 2) / 2.
    """
    method = semckd(beta=1.0, taps=["stage1"], teacher_taps=["stage1", "stage2"])
    projected = [torch.cat(maps_of(4, 100)), torch.cat(maps_of(100, 2))]
    weights = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    out = outputs(weights, [projected], [torch.zeros(2, 2, 1, 1)] * 2)
    close(method.loss(out)["semantic"].item(), 3.0, rtol=1e-6, atol=0)


def test_similarities_are_inner_products_that_are_not_normalised():
    """<(1, 2), (1, 2)> = 5, <(1, 2), (3, -1)> = 1, <(3, -1), (3, -1)> = 10: of two channels, or of
    two pixels.
    """
    x = torch.tensor([[[[1.0]], [[2.0]]], [[[3.0]], [[-1.0]]]])
    close(similarity(x.view(2, 1, 1, 2)), torch.tensor([[5.0, 1.0], [1.0, 10.0]]))
    close(similarity(x), torch.tensor([[5.0, 1.0], [1.0, 10.0]]))
    close(similarity(300 * x), 9e4 * torch.tensor([[5.0, 1.0], [1.0, 10.0]]))


def test_an_images_weights_are_a_softmax_of_cosines():
    """Cosines 1, 0, -1, whatever the lengths; at soft = 2 they are halved."""
    query, keys = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[5.0, 0.0], [0.0, 2.0], [-1.0, 0]]])
    for soft in (1.0, 2.0):
        powers = torch.tensor([1.0, 0.0, -1.0]).div(soft).exp()
        close(association(query, keys, soft), (powers / powers.sum()).view(1, 1, 3))


def test_a_query_meets_the_keys_of_its_own_image():
    """The two images have the keys in opposite orders, so one query's weights are mirrored."""
    query = torch.tensor([1.0, 0.0]).expand(2, 1, 2)
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    high = math.e / (math.e + 1)
    wanted = torch.tensor([[[high, 1 - high]], [[1 - high, high]]])
    close(association(query, keys, 1.0), wanted)


def test_three_weights_lie_between_their_bounds():
    """1 / (1 + 2 e^2) = 0.063379 against two opposite keys, 1 / (1 + 2 / e^2) = 0.786986 with."""
    query = torch.tensor([[[1.0, 0.0]]])
    keys = torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    least, most = association(query, keys, 1.0)[0, 0, 0], association(query, -keys, 1.0)[0, 0, 0]
    close((least.item(), most.item()), (0.063379, 0.786986), atol=1e-6, rtol=0)
    weights = semckd()(whole_batch(), START).weights
    assert weights.shape == (16, 3, 3)
    assert (weights >= 0.063379).all() and (weights <= 0.786987).all()
    close(weights.sum(2), torch.ones(16, 3))
    assert weights.std(0).min() > 0  # every image has its own


def test_vectors_of_zeros_give_equal_weights_and_finite_gradients():
    queries = torch.zeros(2, 1, 4, requires_grad=True)
    weights = association(queries, torch.zeros(2, 5, 4), 1.0)
    close(weights, torch.full((2, 1, 5), 0.2))
    weights[..., 0].sum().backward()
    assert queries.grad.isfinite().all()


def test_a_single_stage_of_the_teacher_has_all_the_weight():
    """The loss is then the mean distance: over images and the student's three stages."""
    method = semckd(beta=1.0, teacher_taps=["stage2"])
    out = method(whole_batch(), START)
    assert (out.weights == 1).all() and out.weights.shape == (16, 3, 1)
    target = out.teachers[0]["stage2"]
    means = [distance(row[0], target).mean() for row in out.projected]
    close(method.loss(out)["semantic"], torch.stack(means).mean())


def test_a_distance_is_the_mean_over_channels_and_space_of_each_image():
    """(1 + 9) / 2 = 5 over two channels; a 2 x 2 map of mean 4 meets 1 at one pixel: 9."""
    projected = torch.tensor([[[[1.0]], [[0.0]]], [[[2.0]], [[2.0]]]])
    teacher = torch.tensor([[[[0.0]], [[3.0]]], [[[2.0]], [[2.0]]]])
    close(distance(projected, teacher), torch.tensor([5.0, 0.0]))
    larger = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
    close(distance(torch.ones(1, 1, 1, 1), larger), torch.tensor([9.0]))


def test_a_larger_student_map_is_averaged_before_the_projection():
    """stage1 is 8 x 8 in the student, stage3 is 2 x 2 in the teacher."""
    method = semckd(taps=["stage1"], teacher_taps=["stage3"])
    out = method(whole_batch(), START)
    small = F.adaptive_avg_pool2d(out.students[0]["stage1"], 2)
    close(out.projected[0][0], method.projections[0][0](small))
    assert out.projected[0][0].shape == (16, 12, 2, 2)


def test_a_larger_teacher_map_is_averaged_to_the_students_size():
    method = semckd(taps=["stage3"], teacher_taps=["stage1"])
    out = method(whole_batch(), START)
    assert out.projected[0][0].shape == (16, 6, 2, 2)
    small = F.adaptive_avg_pool2d(out.teachers[0]["stage1"], 2)
    wanted = 400 * F.mse_loss(out.projected[0][0], small)
    close(method.loss(out)["semantic"], wanted)


@pytest.mark.parametrize(
    ("student", "teacher", "parameters"),
    [("resnet20", "resnet56", 656_288), ("wrn_16_2", "wrn_40_2", 2_572_832)],
)
def test_published_pairs_have_the_published_size(student: str, teacher: str, parameters: int):
    """resnet56 -> resnet20: 6 MLPs of 64 * 32 + 32 + 32 * 16 + 16 = 2,608, and for each width C of
    the teacher, with 112 the sum of the student's, 2C * 112 + 3 (36 C^2 + 2 C^2 + 8 C).
    """
    images, mean, std = torch.arange(128), (0.0,) * 3, (1.0,) * 3
    data = DataSpec(
        range(10), [range(10)], images, images % 10, 128, 64, False, (3, 32, 32), mean, std
    )
    method = SemCKD([build(student, 10)], [build(teacher, 10)], data)
    layers = (method.queries, method.keys, method.projections)
    assert sum(p.numel() for part in layers for p in part.parameters()) == parameters


def test_a_projection_ends_in_a_bare_convolution():
    kinds = [type(layer) for layer in semckd().projections[0][0]]
    hidden = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == [*hidden, *hidden, nn.Conv2d]
    biases = [m.bias for m in semckd().projections.modules() if isinstance(m, nn.Conv2d)]
    assert biases == [None] * 27


def test_the_order_of_the_images_matters():
    """The first layers of the MLPs read a row of similarities place by place."""
    method, batch = semckd(), whole_batch()
    straight = method(batch, START).weights
    turned = method(batch._replace(image=batch.image.flip(0)), START).weights.flip(0)
    assert (straight - turned).abs().max() > 1e-4


def test_the_student_learns_through_the_weights_too():
    method = semckd()
    out = method(whole_batch(), START)
    parts = (method.student, method.queries, method.keys)
    gradients = torch.autograd.grad(
        out.weights[..., 0].sum(),
        [next(part.parameters()) for part in parts],
    )
    assert all(g.abs().sum() > 0 for g in gradients)


def test_no_gradient_reaches_the_teacher():
    projected, teacher = maps_of(4)[0].requires_grad_(), torch.zeros(1, 2, 1, 1).requires_grad_()
    out = outputs(torch.ones(1, 1, 1), [[projected]], [teacher])
    sum(semckd(taps=["stage1"], teacher_taps=["stage1"]).loss(out).values()).backward()
    assert projected.grad.abs().sum() > 0
    assert teacher.grad is None


def test_it_reads_the_teachers_taps_and_the_logits_only_for_kd():
    assert semckd().reads == {"stage1", "stage2", "stage3", "logits"}
    assert semckd(alpha=0.0, taps=["stage1"], teacher_taps=["stem"]).reads == {"stem"}


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = semckd(data, classes=9, alpha=0.0)
    assert list(method.loss(method(whole_batch(), START))) == ["ce", "semantic"]
    with pytest.raises(MethodError, match="SemCKD compares logits class by class"):
        semckd(data, classes=9)


def refusal(error: type[Exception] = MethodError, **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        semckd(**arguments)
    return str(caught.value)


def test_an_incomplete_batch_is_refused():
    assert refusal(data=ToyImages(70).spec()) == (
        "SemCKD's layers are as wide as data.batch_size, 16, but the last batch of an epoch of 70 "
        "images has 6; set data.drop_last=true"
    )
    method = semckd(ToyImages(70).spec(drop_last=True))
    with pytest.raises(MethodError) as caught:
        method(next(ToyImages(6).clean(6)), START)
    assert str(caught.value) == (
        "SemCKD's layers are as wide as data.batch_size, 16, but this batch has 6 images; give "
        "whole batches"
    )


@pytest.mark.parametrize("batch_size", [3, 7])
def test_batches_whose_quarter_has_no_direction_to_learn_are_refused(batch_size: int):
    assert refusal(data=ToyImages().spec(batch_size=batch_size, drop_last=True)) == (
        "SemCKD gives an image data.batch_size // 4 numbers and compares their direction, so there "
        f"must be two, but data.batch_size is {batch_size}; make it 8 or more"
    )
    out = semckd(ToyImages().spec(batch_size=8))(next(ToyImages(8).clean(8)), START)
    assert out.weights.shape == (8, 3, 3)


@pytest.mark.parametrize("side", ["taps", "teacher_taps"])
def test_taps_that_do_not_exist_or_are_no_maps_are_refused(side: str):
    role = "student" if side == "taps" else "teacher"
    found = refusal(TapError, **{side: ["stage1", "stage4"]})
    assert found.startswith(f"the {role}: no feature 'stage4'; this network has [")
    assert found.endswith(f"; choose {side}=[...]")
    size = 8 if side == "taps" else 12
    assert refusal(**{side: ["embed"]}) == (
        f"SemCKD needs feature maps (C, H, W), but 'embed' of the {role} is ({size},); choose "
        f"{side}=[...] before the pooling"
    )


@pytest.mark.parametrize("side", ["taps", "teacher_taps"])
def test_a_network_without_stages_is_refused(side: str):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4))
    role = "student" if side == "taps" else "teacher"
    nets = [[Net(plain, {"map": "0"}, (3, 8, 8))], [toy_net(1)]]
    with pytest.raises(MethodError) as caught:
        SemCKD(*(nets if role == "student" else nets[::-1]), ToyImages().spec())
    assert str(caught.value) == (
        f"SemCKD compares feature maps, and no stages of the {role} are known; choose {side}=[...] "
        "among ['map']"
    )
    assert refusal(**{side: []}) == f"SemCKD compares feature maps, and {side} is empty"


def test_a_temperature_of_the_weights_that_is_not_positive_is_refused():
    assert refusal(soft=0.0) == "SemCKD: soft is 0; choose a number above 0, 1 as published"
