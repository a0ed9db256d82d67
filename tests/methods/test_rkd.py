"""RKD: distances and angles by hand, their invariances, coinciding points, bounded memory."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.errors import MethodError, TapError
from potstill.losses import pairwise_distance
from potstill.method import Batch, DataSpec, Outputs, Progress
from potstill.methods.rkd import RKD, angle_cosines, angle_loss, distance_loss
from potstill.net import Captured, Net
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

S = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
T = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
both_losses = pytest.mark.parametrize("loss", [distance_loss, angle_loss])


def rkd(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> RKD:
    teacher = toy_net(1, width=6, classes=classes)
    return RKD([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def outputs(student: Tensor, teacher: Tensor, tap: str = "embed") -> Outputs:
    """Two classes, labels 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    label = torch.zeros(len(student), dtype=torch.int64)
    own = Captured(torch.zeros(len(label), 2), {tap: student})
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]]).repeat(len(label), 1), {tap: teacher})
    batch = Batch(torch.zeros(len(label), 1), label, label, label)
    return Outputs(batch, Progress(0, 0, 1, 1), [own], [taught])


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_distances_by_hand():
    """5, 4, 3 have mean 4, so 1.25, 1, 0.75; the teacher's 1, 1, sqrt 2 have mean 1.138071, so
    0.878680 twice and 1.242641. Half the squared differences are 0.068939, 0.007359, 0.121348, each
    twice among 9.
    """
    expected = torch.tensor([[0.0, 5, 4], [5, 0, 3], [4, 3, 0]])
    close(pairwise_distance(S), expected, rtol=1e-6, atol=0)
    close(distance_loss(S, T).item(), 0.043921, atol=1e-6, rtol=0)


def test_distances_that_differ_by_more_than_their_mean_cost_linearly():
    """Three points in one place and one apart: 0 and 2 in units of the mean. Where the first is
    apart in one and the last in the other, 4 pairs differ by 2 and cost 3/2, each twice among 16.
    """
    last = torch.tensor([[0.0], [0.0], [0.0], [8.0]])
    close(distance_loss(last, last.flip(0)).item(), 8 * 1.5 / 16, atol=1e-5, rtol=0)


def test_angles_by_hand():
    """Cosines 0.8, 0.6, 0 at the student's vertices and 0, 1/sqrt 2, 1/sqrt 2 at the teacher's;
    sides with themselves have 1 on both. Squared differences 0.64, 0.011472, 0.5 among 27.
    """
    cosines = angle_cosines(S, S)
    close(cosines[[0, 1, 2], [1, 0, 0], [2, 2, 1]], torch.tensor([0.8, 0.6, 0.0]))
    close(cosines[0], torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.8], [0.0, 0.8, 1.0]]))
    close(angle_loss(S, T).item(), 0.042647, atol=1e-6, rtol=0)


def test_opposite_angles_cost_linearly():
    """On a line the one between has cosine -1, the others 1. Where another one is between, two
    cosines differ by 2 and cost 3/2, each twice among 27.
    """
    student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [0.0], [2.0]])
    close(angle_loss(student, teacher).item(), 4 * 1.5 / 27)


def test_terms_by_hand():
    """25 * 0.043921 + 50 * 0.042647 = 3.230390; ce = ln 2."""
    found = rkd().loss(outputs(S, T))
    assert list(found) == ["ce", "distance", "angle"]
    close(found["ce"].item(), math.log(2.0))
    close((found["distance"] + found["angle"]).item(), 3.230390, atol=1e-5, rtol=0)
    close(found["distance"].item() / 25, 0.043921, atol=1e-6, rtol=0)


def test_weights_multiply_and_kd_joins_with_alpha():
    """kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2."""
    weights = {"gamma": 2.0, "alpha": 3.0, "beta": 7.0, "distance": 2.0, "angle": 0.5}
    found = rkd(temperature=1.0, **weights).loss(outputs(S, T))
    assert list(found) == ["ce", "kd", "distance", "angle"]
    close(found["ce"].item(), 2 * math.log(2.0))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 3 * kl, atol=1e-6, rtol=0)
    close(found["distance"].item(), 14 * 0.043921, atol=2e-5, rtol=0)
    close(found["angle"].item(), 3.5 * 0.042647, atol=1e-5, rtol=0)


def test_a_term_without_weight_is_left_out():
    assert list(rkd(angle=0.0).loss(outputs(S, T))) == ["ce", "distance"]
    assert list(rkd(distance=0.0, gamma=0.0).loss(outputs(S, T))) == ["angle"]
    assert list(rkd(beta=0.0).loss(outputs(S, T))) == ["ce"]


@both_losses
def test_moved_turned_and_scaled_points_cost_nothing(loss: Any):
    """Each side by itself, in another number of dimensions too."""
    x, y = points(6, 5), points(6, 5, seed=1)
    turn = torch.linalg.qr(points(5, 5, seed=2)).Q
    wider = torch.cat([x, torch.zeros(6, 2, dtype=x.dtype)], dim=1)
    close(loss(3 * x @ turn + 7, wider).item(), 0.0, atol=1e-12, rtol=0)
    close(loss(3 * x @ turn + 7, y), loss(x, y))
    close(loss(x, 3 * y @ turn + 7), loss(x, y))
    assert loss(x, y) > 0.01


@both_losses
def test_the_order_of_images_does_not_matter(loss: Any):
    x, y, order = points(6, 5), points(6, 3, seed=1), torch.tensor([3, 0, 5, 1, 2, 4])
    close(loss(x[order], y[order]), loss(x, y))
    assert abs(loss(x[order], y) - loss(x, y)) > 1e-3


@both_losses
def test_a_common_shift_changes_neither_loss_nor_gradient(loss: Any):
    """In float32: the squares of 1000 have a spacing of 0.06."""
    grads, values = [], []
    for shift in (0.0, 1000.0):
        x = (torch.arange(12.0).view(4, 3).sin().mul(64).round() / 64 + shift).requires_grad_()
        values.append(loss(x, points(4, 3).float()))
        grads.append(torch.autograd.grad(values[-1], x)[0])
    close(values[0], values[1])
    close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_two_images_have_one_distance_and_it_is_its_own_mean():
    close(distance_loss(torch.tensor([[0.0], [9.0]]), T[:2]).item(), 0.0)


@both_losses
def test_gradients_are_those_of_the_value(loss: Any):
    x, y = points(4, 3).requires_grad_(), points(4, 2, seed=1)
    assert torch.autograd.gradcheck(lambda x: loss(x, y), x)


@both_losses
def test_one_image_costs_nothing_and_gives_no_gradient(loss: Any):
    x = torch.ones(1, 3, requires_grad=True)
    value = loss(x, torch.zeros(1, 2))
    (grad,) = torch.autograd.grad(value, x)
    assert value == 0 and torch.equal(grad, torch.zeros(1, 3))


@both_losses
def test_points_that_all_coincide_get_no_gradient(loss: Any):
    """As those of a dead network; against another such network they cost nothing."""
    x = torch.full((3, 2), 0.3, requires_grad=True)
    close(loss(x, torch.zeros(3, 5)).item(), 0.0)
    value = loss(x, T)
    (grad,) = torch.autograd.grad(value, x)
    assert value > 0.005 and torch.equal(grad, torch.zeros(3, 2))


@both_losses
def test_a_duplicate_leaves_gradients_finite_and_of_usual_size(loss: Any):
    """1 / 1e-12 would be the factor of a side of length 0."""
    x = S[[0, 1, 2, 1]].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x, points(4, 2).float()), x)
    assert 1e-4 < grad.abs().max() < 1


def test_half_precision_is_computed_in_float32():
    """Squares of 300 overflow float16."""
    x = (300 * torch.cos(torch.arange(8.0))).view(4, 2).half()
    for loss in (distance_loss, angle_loss):
        found = loss(x, 3 * x.bfloat16())
        assert found.dtype == torch.float32
        close(found, loss(x.float(), 3 * x.bfloat16()), atol=1e-6, rtol=1e-4)
    assert pairwise_distance(x).max() > 400 and pairwise_distance(x).isfinite().all()


@pytest.mark.parametrize("vertices", [1, 3, 6])
def test_angles_in_parts_are_the_same_angles(vertices: int):
    """7 images, D = 5: limits for so many vertices at a time; the last part is smaller."""
    y = points(7, 4, seed=1)
    x, again = points(7, 5).requires_grad_(), points(7, 5).requires_grad_()
    whole, parts = angle_loss(x, y), angle_loss(again, y, limit=7 * 7 * vertices)
    close(whole, parts, rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(whole, x)
    for _ in range(2):  # a turn may differentiate one forward several times
        close(torch.autograd.grad(parts, again, retain_graph=True)[0], expected, rtol=1e-10, atol=0)


class Live(TorchDispatchMode):
    """Elements of the largest tensor that was made, and bytes of all that existed at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.bytes = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                self.largest = max(self.largest, x.numel())
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self.forget, key)
        return result

    def forget(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)


def test_angles_in_parts_bound_the_memory_of_both_directions():
    """24 images: whole, 24^3 elements a tensor; one vertex at a time, 24^2."""
    seen = []
    for limit in (2**24, 24**2):
        x = points(24, 8).requires_grad_()
        with Live() as live:
            torch.autograd.grad(angle_loss(x, points(24, 8, seed=1), limit), x)
        seen.append(live)
    assert seen[0].largest == 24**3
    assert seen[1].largest == 24**2
    assert seen[1].peak < seen[0].peak / 6


def test_a_step_reads_no_value_and_stays_on_its_device():
    """On the meta device there are none to read, and tensors of another one are refused."""
    x = torch.zeros(4, 3, device="meta", requires_grad=True)
    y = torch.zeros(4, 2, device="meta")
    for value in (distance_loss(x, y), angle_loss(x, y), angle_loss(x, y, limit=1)):
        assert torch.autograd.grad(value, x)[0].is_meta


@both_losses
def test_no_loss_alone_has_a_gradient_for_the_teacher(loss: Any):
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_no_gradient_reaches_the_teacher():
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    sum(rkd(alpha=1.0).loss(outputs(student, teacher)).values()).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_it_adds_no_parameter():
    method = rkd()
    assert sum(p.numel() for p in method.trainable()) == sum(
        p.numel() for p in method.student.parameters()
    )


def test_other_taps_are_flattened():
    maps = S.view(3, 2, 1, 1), T.view(3, 1, 1, 2)
    found = rkd(tap="stage2", teacher_tap="stage2").loss(outputs(*maps, tap="stage2"))
    close(found["angle"].item() / 50, 0.042647, atol=1e-6, rtol=0)


def test_it_reads_the_teachers_tap_and_the_logits_only_for_kd():
    assert rkd().reads == {"embed"}
    assert rkd(alpha=0.5, teacher_tap="stage3").reads == {"stage3", "logits"}


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = rkd(data, classes=9)
    out = method(next(ToyImages(4).clean(4)), Progress(0, 0, 1, 1))
    assert list(method.loss(out)) == ["ce", "distance", "angle"]
    with pytest.raises(MethodError, match="RKD compares logits class by class"):
        rkd(data, classes=9, alpha=0.1)


def test_an_unknown_tap_is_refused_with_those_that_exist():
    with pytest.raises(TapError) as error:
        rkd(teacher_tap="embedding")
    assert str(error.value) == (
        "the teacher: no feature 'embedding'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        '"embed"?; choose teacher_tap=...'
    )


def test_a_network_without_a_final_linear_layer_is_told_to_name_a_tap():
    module = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())
    student = Net(module, {"map": "0"}, (3, 8, 8))
    with pytest.raises(TapError) as error:
        RKD([student], [toy_net(1)], ToyImages().spec())
    assert str(error.value) == (
        "the student: no feature 'embed'; this network has ['map']; choose tap=..."
    )
    assert RKD([student], [toy_net(1)], ToyImages().spec(), tap="map").tap == "map"
