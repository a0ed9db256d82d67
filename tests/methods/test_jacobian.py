"""Jacobian: linear networks by hand, two naive checks, what stays attached, and refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import engine
from potstill.errors import MethodError, TapError
from potstill.evaluate import evaluate
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.jacobian import Jacobian, Jacobians, jacobian_distance
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import ToyImages, pace, toy_net

close = torch.testing.assert_close

NOW = Progress(0, 0, 1, 1)
TEACHER, STUDENT = [[1.0, 2.0], [0.0, -1.0]], [[2.0, 1.0], [1.0, 1.0]]
"""Two networks of the page: the logits are the rows times the image, of two pixels."""
every_form = pytest.mark.parametrize("form", ["logits", "attention"])


def linear(rows: Sequence[Sequence[float]]) -> Net:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
    return Net(nn.Sequential(nn.Flatten(), layer), {}, (2, 1, 1))


def spec_of(shape: tuple[int, int, int], classes: int) -> DataSpec:
    spec = ToyImages().spec()._replace(input_shape=shape, classes=range(classes))
    return spec._replace(teacher_classes=[range(classes)])


def pair(student: Any = STUDENT, teacher: Any = TEACHER, **arguments: Any) -> Jacobian:
    return Jacobian([linear(student)], [linear(teacher)], spec_of((2, 1, 1), 2), **arguments)


def images(image: Any, label: Sequence[int]) -> Batch:
    found = torch.tensor(label)
    return Batch(torch.tensor(image).view(-1, 2, 1, 1), found, found, found)


ONE = images([[1.0, 1.0]], [0])


def jacobian(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> Jacobian:
    teacher = toy_net(1, width=6, classes=classes)
    return Jacobian([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def toys(n: int = 8) -> Batch:
    return next(ToyImages(n).clean(n))


def term(method: Jacobian, batch: Batch) -> Tensor:
    return method.loss(method(batch, NOW))["jacobian"]


# --- logits, by hand


def test_linear_networks_by_hand():
    """J_T = (1, 2), J_S = (2, 1): cos = .8, 2 - 2 cos = .4; the mean over 2 pixels would be .2."""
    out = pair()(ONE, NOW)
    assert torch.equal(out.target[0], torch.tensor([[1.0, 2.0]]))
    assert torch.equal(out.own[0], torch.tensor([[2.0, 1.0]]))
    assert len(out.own) == len(out.target) == 1
    found = pair().loss(out)
    assert list(found) == ["ce", "jacobian"]
    close(found["jacobian"].item(), 0.4)
    close(found["ce"].item(), math.log(1 + math.exp(2 - 3)))  # logits 3 and 2


def test_the_mean_is_over_images():
    """Of class 1, J_T = (0, -1) and J_S = (1, 1): cos = -1/sqrt 2, 2 + sqrt 2; of class 0, .4."""
    batch = images([[1.0, 1.0], [5.0, -3.0], [0.0, 1.0]], [0, 1, 0])
    close(term(pair(), batch).item(), (0.4 + 2 + math.sqrt(2.0) + 0.4) / 3)


def test_the_class_is_the_labels_or_the_teachers_top_one():
    """Of (-1, 2) the teacher's logits are 3 and -2, the student's 0 and 1; its label is 1."""
    batch = images([[-1.0, 2.0]], [1])
    close(term(pair(), batch).item(), 2 + math.sqrt(2.0))
    close(term(pair(of="label"), batch).item(), 2 + math.sqrt(2.0))
    close(term(pair(of="teacher"), batch).item(), 0.4)
    close(term(pair(of="teacher"), images([[1.0, -2.0]], [0])).item(), 2 + math.sqrt(2.0))


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (3.0, 0.0), (0.01, 0.0), (-1.0, 4.0)])
def test_multiples_of_the_teacher(factor: float, expected: float):
    """Identical networks and positive multiples cost nothing, negated logits 4."""
    student = (factor * torch.tensor(TEACHER)).tolist()
    close(term(pair(student), ONE).item(), expected, atol=1e-6, rtol=0)


def test_the_gradient_by_hand():
    """-2/|J_S| (t - cos s) with unit s, t: -2/5 ((1, 2) - .8 (2, 1)) = (.24, -.48) for the row of
    the class, none for the other, and none for the teacher.
    """
    method = pair()
    term(method, ONE).backward()
    close(method.student.module[1].weight.grad, torch.tensor([[0.24, -0.48], [0.0, 0.0]]))
    (weight,) = method.teachers[0].parameters()
    assert weight.grad is None and not weight.requires_grad


def test_weights_multiply_and_kd_joins_with_alpha():
    """ce = log(1 + e^-1); the teacher's logits 3, -1, the student's 3, 2: kl at T = 2."""
    found = pair(beta=5.0, gamma=2.0, alpha=3.0, temperature=2.0)
    terms = found.loss(found(ONE, NOW))
    assert list(terms) == ["ce", "kd", "jacobian"]
    close(terms["ce"].item(), 2 * math.log(1 + math.exp(-1)))
    close(terms["jacobian"].item(), 5 * 0.4)
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-0.5))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    close(terms["kd"].item(), 3 * 4 * kl, atol=1e-6, rtol=0)
    assert pair().temperature == 4.0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, ["ce", "jacobian"]),
        ({"beta": 0.0}, ["ce"]),
        ({"gamma": 0.0, "alpha": 1.0}, ["kd", "jacobian"]),
        ({"beta": 0.0, "alpha": 1.0}, ["ce", "kd"]),
        ({"form": "attention"}, ["ce", "jacobian"]),
        ({"form": "attention", "beta": 0.0, "alpha": 1.0}, ["ce", "attention"]),
        ({"form": "attention", "alpha": 1.0}, ["ce", "attention", "jacobian"]),
        ({"form": "attention", "beta": 0.0}, ["ce"]),
    ],
)
def test_a_term_without_weight_is_left_out(arguments: dict[str, Any], names: list[str]):
    method = jacobian(**arguments)
    assert list(method.loss(method(toys(), NOW))) == names


# --- the distance


def test_each_image_is_normalised_by_itself():
    """Of length 1 and at a right angle: 2; of length 1000 and parallel: 0. Over the batch the
    first would vanish beside the second.
    """
    own = torch.tensor([[1.0, 0.0], [1000.0, 0.0]])
    target = torch.tensor([[0.0, 1.0], [1000.0, 0.0]])
    close(jacobian_distance(own, target), torch.tensor([2.0, 0.0]))
    close(jacobian_distance(own * torch.tensor([[1e-6], [1.0]]), target), torch.tensor([2.0, 0.0]))


def test_it_is_two_less_twice_the_cosine():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = [
        2 - 2 * (a @ b / a.dot(a).sqrt() / b.dot(b).sqrt()) for a, b in zip(x, y, strict=True)
    ]
    close(jacobian_distance(x, y), torch.stack(expected))
    assert torch.autograd.gradcheck(lambda x: jacobian_distance(x, y), x.requires_grad_())


def test_zeros_stay_zeros():
    """On one side |0 - t|^2 = 1, on both 0."""
    zero, some = torch.zeros(1, 3), torch.tensor([[0.0, 3.0, 4.0]])
    for own, target, expected in ((zero, some, 1.0), (some, zero, 1.0), (zero, zero, 0.0)):
        own = own.clone().requires_grad_()
        value = jacobian_distance(own, target)
        (grad,) = torch.autograd.grad(value.sum(), own)
        close(value.item(), expected)
        assert grad.isfinite().all()


def test_tiny_jacobians_have_their_direction():
    """1e-9 long, of which the square is far below float32's."""
    own, target = torch.tensor([[1e-9, 0.0]]), torch.tensor([[3.0, 4.0]])
    close(jacobian_distance(own, target).item(), 2 - 2 * 0.6)


def test_no_gradient_reaches_the_target():
    own, target = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    own.requires_grad_(), target.requires_grad_()
    jacobian_distance(own, target).sum().backward()
    assert own.grad.abs().sum() > 0 and target.grad is None


def test_half_precision_is_computed_in_float32():
    x = torch.cos(torch.arange(24.0)).view(2, 12)
    found = jacobian_distance(x.bfloat16(), x.flip(1).bfloat16())
    assert found.dtype == torch.float32
    close(found, jacobian_distance(x.bfloat16().float(), x.flip(1).bfloat16().float()))


# --- beside finite differences

SMALL = (1, 4, 4)


def small(seed: int) -> Net:
    """Two convolutions with BatchNorm and ReLU of 2 channels each, in float64; 75 parameters."""
    torch.manual_seed(seed)
    parts = [nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()]
    parts += [nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()]
    module = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    return Net(module, {"stage1": "1", "stage2": "4"}, SMALL)


def small_case(form: str) -> tuple[Jacobian, Batch]:
    """A student in train mode and three images, no ReLU of which is within 1e-3 of its kink."""
    method = Jacobian([small(2)], [small(1)], spec_of(SMALL, 3), form=form).double().train()
    generator = torch.Generator().manual_seed(11)
    image = torch.randn(3, *SMALL, generator=generator, dtype=torch.float64)
    label = torch.tensor([0, 2, 2])
    batch = Batch(image, label, label, label)
    for captured in (method.student(image), method.teachers[0](image)):
        assert min(captured[tap].abs().min() for tap in ("stage1", "stage2")) > 1e-3
    return method, batch


def differences(values: Sequence[Tensor], function: Callable[[], Tensor]) -> list[Tensor]:
    """d function / d values by central differences of 1e-6: right to 1e-8 or so."""
    found = []
    for x in values:
        grad = torch.zeros(x.numel(), *function().shape, dtype=torch.float64)
        flat = x.data.view(-1)
        for i, was in enumerate(flat.tolist()):
            sides = []
            for step in (1e-6, -1e-6):
                flat[i] = was + step
                sides.append(function().detach())
            flat[i] = was
            grad[i] = (sides[0] - sides[1]) / 2e-6
        found.append(grad.view(*x.shape, *grad.shape[1:]))
    return found


@every_form
def test_jacobians_are_those_of_finite_differences(form: str):
    """The student's of the sum over the batch, whose images its BatchNorm mixes; the teacher's too,
    in eval mode. Of the label's logit, or of the mean over channels of squares at the largest pixel
    of the teacher, at either stage.
    """
    method, batch = small_case(form)
    out = method(batch, NOW)
    with torch.no_grad():
        taught = method.teachers[0](batch.image)
    image, rows = batch.image.clone(), torch.arange(3)
    assert not method.teachers[0].module.training

    def sums(net: Net) -> Tensor:
        captured = net(image)
        if form == "logits":
            return captured.logits[rows, batch.label].sum()[None]
        found = []
        for stage in ("stage1", "stage2"):
            total = 0
            for i in range(3):
                where = taught.features[stage][i].pow(2).sum(0).argmax().item()
                h, w = divmod(where, 4)
                total = total + (captured.features[stage][i, :, h, w] ** 2).sum() / 2
            found.append(total)
        return torch.stack(found)

    for net, found in ((method.student, out.own), (method.teachers[0], out.target)):
        with torch.no_grad():
            (expected,) = differences([image], lambda net=net: sums(net))
        assert len(found) == (1 if form == "logits" else 2)
        for k, x in enumerate(found):
            assert x.shape == (3, 16)
            close(x.detach(), expected[..., k].reshape(3, 16), atol=1e-7, rtol=0)
            assert x.abs().max() > 1e-3


@every_form
def test_the_parameters_gradient_is_that_of_finite_differences(form: str):
    """Through both backwards and BatchNorm in train mode: to 1e-6; the largest is above .1."""
    method, batch = small_case(form)
    parameters = list(method.student.parameters())
    expected = differences(parameters, lambda: term(method, batch))
    found = torch.autograd.grad(
        term(method, batch), parameters, allow_unused=True, materialize_grads=True
    )
    for one, two in zip(found, expected, strict=True):
        close(one, two, atol=1e-6, rtol=0)
    assert max(x.abs().max() for x in expected) > 0.1


# --- attention


def naive(method: Jacobian, batch: Batch, taps: Sequence[tuple[str, str]]) -> Tensor:
    """A sum over pairs of the mean over images: image by image, and with a loop over pixels' maps.

    Where one map is larger it is averaged over squares of pixels first.
    """
    image = batch.image.clone().requires_grad_()
    student, teacher = method.student(image), method.teachers[0](image)
    total = torch.zeros((), dtype=image.dtype)
    for own, theirs in taps:
        x, y = student.features[own], teacher.features[theirs]
        ratio = x.shape[2] / y.shape[2]
        if ratio > 1:
            x = F.avg_pool2d(x, int(ratio))
        elif ratio < 1:
            y = F.avg_pool2d(y, int(1 / ratio))
        found: list[Tensor] = []
        j_student, j_teacher = torch.zeros_like(image), torch.zeros_like(image)
        for i in range(len(image)):
            energy = torch.stack([row.pow(2) for row in y[i]]).mean(0)
            h, w = divmod(int(energy.argmax()), energy.shape[1])
            j_teacher += torch.autograd.grad(energy[h, w], image, retain_graph=True)[0]
            value = x[i, :, h, w].pow(2).mean()
            # of the whole batch: what image i gives to the others' pixels is a part of theirs
            j_student = j_student + torch.autograd.grad(value, image, create_graph=True)[0]
        for one, two in zip(j_student, j_teacher, strict=True):
            difference = two / two.pow(2).sum().sqrt() - one / one.pow(2).sum().sqrt()
            found.append(difference.pow(2).sum())
        total = total + sum(found) / len(found)
    return total


def wide(
    student: str, teacher: str, size: int = 32, n: int = 3, **arguments: Any
) -> tuple[Jacobian, Batch]:
    torch.manual_seed(0)
    nets = [build(name, 10, (3, size, size)) for name in (student, teacher)]
    method = Jacobian(
        nets[:1], nets[1:], spec_of((3, size, size), 10), form="attention", **arguments
    )
    image = torch.randn(n, 3, size, size, dtype=torch.float64)
    label = torch.arange(n)
    return method.double(), Batch(image, label, label, label)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_on_wide_resnets_is_that_of_a_naive_loop(mode: str):
    """Values and the student's gradients, in float64, of all three groups."""
    method, batch = wide("wrn_16_1", "wrn_16_2")
    method.train(mode == "train")
    stages = [(s, s) for s in ("stage1", "stage2", "stage3")]
    assert [(p.student, p.teacher) for p in method.pairs] == stages
    found, expected = term(method, batch), naive(method, batch, stages)
    close(found, expected, rtol=1e-10, atol=0)
    assert 0.5 < found < 12
    parameters = list(method.student.parameters())
    for one, two in zip(
        *(torch.autograd.grad(x, parameters, allow_unused=True) for x in (found, expected)),
        strict=True,
    ):
        assert (one is None) == (two is None)
        if one is not None:
            close(one, two, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher"), [("wrn_16_1", "wrn_10_4_mhgd"), ("wrn_10_4_mhgd", "wrn_16_1")]
)
def test_maps_of_unequal_size_meet_at_the_smaller(student: str, teacher: str):
    """At 64 pixels one's groups end in 64, 32 and 16, those of the one that halves in 32, 16, 8."""
    method, batch = wide(student, teacher, 64, 2, taps=["stage1", "stage3"])
    assert sorted([method.pairs[0].shape[1], method.pairs[0].teacher_shape[1]]) == [32, 64]
    expected = naive(method, batch, [("stage1", "stage1"), ("stage3", "stage3")])
    close(term(method, batch), expected, rtol=1e-10, atol=0)


def handmade(maps: Sequence[Any], teacher: Sequence[Any]) -> Jacobians:
    """Two classes, label 0, of which the student prefers neither; J as on the page at each stage.

    Maps are (B, C, H, W).
    """
    n = len(maps[0])
    label = torch.zeros(n, dtype=torch.int64)
    own, taught = (
        Captured(torch.zeros(n, 2), {f"stage{i}": x for i, x in enumerate(xs, start=1)})
        for xs in (maps, teacher)
    )
    j_s, j_t = (torch.tensor([x]).repeat(n, 1) for x in ([2.0, 1.0], [1.0, 2.0]))
    batch = Batch(torch.zeros(n, 1), label, label, label)
    return Jacobians(batch, NOW, [own], [taught], [j_s] * len(maps), [j_t] * len(maps))


def attention(stages: int, **arguments: Any) -> Jacobian:
    taps = [f"stage{i}" for i in range(1, stages + 1)]
    return jacobian(form="attention", taps=taps, **arguments)


A = torch.tensor([[[[3.0, 0.0]], [[3.0, 24**0.5]]], [[[1.0, 1.0]], [[1.0, 1.0]]]])
B = torch.tensor([[[[5.0, 0.0]]], [[[-7.0, 7.0]]]])


def test_the_activation_term_by_hand():
    """A's first image has the mean squares 9 and 12, of unit length (.6, .8); B's 25 and 0, (1, 0):
    .16 + .64. The second ones are uniform. Mean over images .4; twice with a second stage, but
    nothing for a third of equal maps.
    """
    found = attention(1, alpha=1.0).loss(handmade([A], [B]))
    assert list(found) == ["ce", "attention", "jacobian"]
    close(found["attention"].item(), 0.4)
    found = attention(3, alpha=1.0).loss(handmade([A, A, B], [B, B, B]))
    close(found["attention"].item(), 0.8)


def test_the_jacobians_of_all_stages_are_summed_and_weights_multiply():
    found = attention(3, alpha=3.0, beta=5.0, gamma=2.0).loss(handmade([A] * 3, [B] * 3))
    close(found["ce"].item(), 2 * math.log(2.0))
    close(found["attention"].item(), 3 * 3 * 0.4)
    close(found["jacobian"].item(), 5 * 3 * 0.4)


def test_activations_of_unequal_size_meet_too():
    """A of twice the height and width, each pixel four times."""
    larger = A.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    found = attention(1, alpha=1.0).loss(handmade([larger], [B]))
    close(found["attention"].item(), 0.4)


def test_the_scale_of_a_map_and_dead_maps():
    """Only its shape counts; a map of zeros has none, and is 1 away from any other."""
    method = attention(1, alpha=1.0)
    close(method.loss(handmade([9 * A], [B / 9]))["attention"].item(), 0.4)
    x = torch.zeros_like(A).requires_grad_()
    value = method.loss(handmade([x], [B]))["attention"]
    value.backward()
    assert value == 1 and x.grad.isfinite().all()


def test_attention_is_no_kd():
    """With alpha it compares maps: a teacher of other classes may take part."""
    data = ToyImages().spec()._replace(teacher_classes=[range(20, 29)])
    method = jacobian(data, classes=9, form="attention", alpha=1.0)
    found = method.loss(method(toys(), NOW))
    assert list(found) == ["ce", "attention", "jacobian"]
    assert all(x.isfinite() and x > 0 for x in found.values())


def test_the_pixel_is_the_teachers_largest_for_both():
    """The teacher's only channel is the image, largest at the last pixel, the student's a shift by
    one column of its negative: J_T is 2 x at that pixel, J_S the same one to the left of it.
    """

    def shifted(taps: Sequence[float]) -> Net:
        conv = nn.Conv2d(1, 1, (1, 3), padding=(0, 1), bias=False)
        with torch.no_grad():
            conv.weight.copy_(torch.tensor(taps).view(1, 1, 1, 3))
        rest = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)]
        return Net(nn.Sequential(conv, *rest), {"stage1": "0"}, (1, 1, 4))

    nets = [shifted([-1.0, 0.0, 0.0])], [shifted([0.0, 1.0, 0.0])]
    method = Jacobian(*nets, spec_of((1, 1, 4), 2), form="attention")
    label = torch.tensor([0, 1])
    image = torch.tensor([[1.0, 2.0, 3.0, -4.0], [5.0, 1.0, 0.0, 2.0]]).view(2, 1, 1, 4)
    out = method(Batch(image, label, label, label), NOW)
    assert torch.equal(out.target[0], torch.tensor([[0.0, 0, 0, -8], [10.0, 0, 0, 0]]))
    assert torch.equal(out.own[0], torch.tensor([[0.0, 0, 6, 0], [0.0, 0, 0, 0]]))
    close(method.loss(out)["jacobian"].item(), (2 + 1) / 2)


# --- what stays attached


@every_form
def test_images_keep_no_gradient(form: str):
    """Through a forward, a step of the engine and an evaluation; none reaches one that takes it."""
    method, batch = jacobian(form=form, alpha=1.0), toys(16)
    out = method(batch, NOW)
    assert out.batch is batch
    (phase,) = method.phases()
    sgd = torch.optim.SGD(phase.turns[0].updates[0].parameters, 0.1)
    engine.train_step(phase, {"student": sgd}, batch, NOW, 0)
    assert not batch.image.requires_grad and batch.image.grad is None
    seen = ToyImages()
    evaluate(method.predictors(), seen)
    assert not seen.image.requires_grad and seen.image.grad is None
    batch.image.requires_grad_()
    sum(method.loss(method(batch, NOW)).values()).backward()
    assert batch.image.grad is None


@every_form
def test_nothing_of_the_teacher_stays_in_a_graph(form: str):
    """Its logits and all its features, and what it was differentiated to; none is lost."""
    method = jacobian(form=form)
    out = method(toys(), NOW)
    (teacher,) = out.teachers
    assert teacher.features.keys() == method.teachers[0].shapes.keys()
    kept = [teacher.logits, *teacher.features.values(), *out.target]
    assert not any(x.requires_grad or x.grad_fn is not None for x in kept)
    with torch.no_grad():
        expected = method.teachers[0](toys().image)
    assert torch.equal(teacher.logits, expected.logits)
    assert all(torch.equal(x, expected.features[k]) for k, x in teacher.features.items())
    assert all(x.requires_grad for x in out.own)
    sum(method.loss(out).values()).backward()
    for p in method.teachers[0].parameters():
        assert p.grad is None and not p.requires_grad


def test_no_gradient_reaches_a_teacher_that_could_learn():
    method = jacobian(form="attention", alpha=1.0)
    for p in method.teachers[0].parameters():
        p.requires_grad_()
    out = method(toys(), NOW)
    sum(method.loss(out).values()).backward()
    assert all(p.grad is None for p in method.teachers[0].parameters())
    assert method.student.module.conv1.weight.grad.abs().sum() > 0


@every_form
def test_the_teacher_is_in_eval_mode_and_the_student_is_not(form: str):
    """So an image's Jacobian is the same alone and in a batch for the one, not for the other."""
    method = jacobian(form=form).train()
    batch = toys(8)
    assert not any(m.training for m in method.teachers[0].modules())
    part = Batch(*(x[:3] for x in batch))
    whole, alone = method(batch, NOW), method(part, NOW)
    for one, two in zip(whole.target, alone.target, strict=True):
        close(one[:3], two)
    for one, two in zip(whole.own, alone.own, strict=True):
        assert (one[:3] - two).abs().max() > 1e-4


@every_form
def test_it_differentiates_under_no_grad_too(form: str):
    method = jacobian(form=form)
    with torch.no_grad():
        out = method(toys(), NOW)
    again = method(toys(), NOW)
    for one, two in zip([*out.own, *out.target], [*again.own, *again.target], strict=True):
        assert torch.equal(one, two) and one.abs().max() > 0


@every_form
def test_several_gradients_may_be_taken_of_one_forward(form: str):
    """Each term by itself: of each, the graph is whole."""
    method = jacobian(form=form, alpha=1.0)
    parameters = method.trainable()
    out = method(toys(), NOW)
    for value in method.loss(out).values():
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        assert sum(x.abs().sum() for x in found if x is not None) > 0


def test_a_dead_student_has_no_gradient_and_no_nan():
    """No ReLU of it lets anything through: J_S = 0, |0 - t|^2 = 1, whatever the weights."""
    method, batch = small_case("logits")
    with torch.no_grad():
        for layer in (method.student.module[4], method.teachers[0].module[4]):
            layer.bias.fill_(-100.0)
    for p in method.student.parameters():
        p.grad = None
    value = term(method, batch)
    value.backward()
    assert value == 0  # both are dead
    assert all(p.grad is None or not p.grad.any() for p in method.student.parameters())
    method.teachers[0].load_state_dict(small(1).double().state_dict())
    value = term(method, batch)
    value.backward()
    close(value.item(), 1.0)
    assert all(p.grad is None or not p.grad.any() for p in method.student.parameters())


def test_equal_networks_in_eval_mode_cost_nothing():
    """Of either form, on real layers."""
    student = toy_net(0)
    for arguments in ({}, {"form": "attention", "alpha": 1.0}):
        method = Jacobian([student], [copy.deepcopy(student)], ToyImages().spec(), **arguments)
        method.student.eval()
        found = method.loss(method(toys(), NOW))
        for name in found.keys() - {"ce"}:
            close(found[name].item(), 0.0, atol=1e-6, rtol=0)


def test_bf16_jacobians_point_where_the_others_do():
    """WRN-16-1 as it begins, 32 images of noise. Measured: the cosine with float32's is .94 to .97
    for the student, in train mode, and .98 to .99 for the teacher, in eval mode; where weights and
    images alone are rounded to bf16 it is .977 and .991 in the median.
    """
    torch.manual_seed(0)
    nets = [build("wrn_16_1", 10), build("wrn_16_1", 10)]
    method = Jacobian(nets[:1], nets[1:], spec_of((3, 32, 32), 10))
    label = torch.arange(32) % 10
    batch = Batch(torch.randn(32, 3, 32, 32), label, label, label)
    full = method(batch, NOW)
    for net in nets:
        net.precision = torch.bfloat16
    half = method(batch, NOW)
    for one, two in ((full.own[0], half.own[0]), (full.target[0], half.target[0])):
        assert two.dtype == torch.float32
        cosine = F.cosine_similarity(one, two)
        assert cosine.min() > 0.9 and cosine.max() < 0.9999


# --- what it reads, adds and refuses


def test_it_reads_logits_or_taps():
    assert jacobian().reads == {"logits"}
    assert jacobian(alpha=1.0).reads == {"logits"}
    assert jacobian(form="attention").reads == {"stage1", "stage2", "stage3"}
    method = jacobian(form="attention", taps=["stage1"], teacher_taps=["stage2"], alpha=1.0)
    assert method.reads == {"stage2"}
    assert len(method(toys(), NOW).own) == 1


def test_it_adds_no_parameter_and_needs_the_images_gradient():
    method = jacobian()
    assert {id(p) for p in method.trainable()} == {id(p) for p in method.student.parameters()}
    assert method.needs_input_gradient
    (phase,) = method.phases()
    assert phase.name == "distill"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "logit"}, "Jacobian: form is 'logit'; give logits or attention"),
        ({"of": "student"}, "Jacobian: of is 'student'; give label or teacher"),
        ({"taps": ["stage1"]}, "Jacobian: taps are of form 'attention'; leave them out"),
        ({"teacher_taps": ["stage1"]}, "Jacobian: taps are of form 'attention'; leave them out"),
        (
            {"gamma": 0.0},
            "Jacobian needs labels or soft targets beside its own loss; give gamma or alpha a "
            "value above 0",
        ),
        (
            {"form": "attention", "taps": ["stage1", "stage2"], "teacher_taps": ["stage1"]},
            "Jacobian pairs taps with teacher_taps, but there are 2 and 1; name as many on both "
            "sides",
        ),
        (
            {"form": "attention", "taps": []},
            "Jacobian compares feature maps, and taps is empty",
        ),
        (
            {"form": "attention", "taps": ["embed"]},
            "Jacobian needs feature maps (C, H, W), but 'embed' of the student is (8,); choose "
            "taps=[...] before the pooling",
        ),
    ],
    ids=lambda x: " ".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_refused_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(MethodError) as error:
        jacobian(**arguments)
    assert str(error.value) == message


def test_attention_without_labels_is_refused():
    """Whatever alpha is: there it weighs maps, no soft targets."""
    with pytest.raises(MethodError) as error:
        jacobian(form="attention", gamma=0.0, alpha=1.0)
    assert str(error.value) == (
        "Jacobian: gamma is 0.0, and form 'attention' has no other term that trains the "
        "classifier; give a number above 0"
    )


def test_a_head_of_zeros_takes_a_step_of_ordinary_length():
    """Its logits do not change with the image: a Jacobian of zeros, which must not be stretched."""
    student = toy_net(0)
    nn.init.zeros_(student.classifier.weight)
    method = Jacobian([student], [toy_net(1)], ToyImages().spec())
    before = student.classifier.weight.detach().clone()
    next(engine.Training(method, ToyImages(), pace(method, 1)).run())
    assert 0 < (student.classifier.weight - before).abs().max() < 1


def test_an_unknown_tap_is_refused():
    with pytest.raises(TapError) as error:
        jacobian(form="attention", taps=["stage4"])
    assert str(error.value) == (
        "the student: no feature 'stage4'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        '"stage3"?; choose taps=[...]'
    )


def test_the_logits_of_a_teacher_of_other_classes_are_refused():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    with pytest.raises(MethodError) as error:
        jacobian(data, classes=9)
    assert str(error.value) == (
        "Jacobian compares logits class by class, but teacher 0 has 9 classes and student 0 has 4; "
        "use a teacher trained on this data set, or a method that reads features"
    )
    for classes in ([3, 2, 1, 0], range(20, 24)):
        with pytest.raises(MethodError) as error:
            jacobian(ToyImages().spec()._replace(teacher_classes=[classes]))
        assert str(error.value) == (
            "Jacobian compares logits class by class, but teacher 0 was trained on other classes, "
            "or in another order, than data.classes"
        )
    with pytest.raises(MethodError) as error:
        jacobian(ToyImages().spec()._replace(teacher_classes=[None]))
    assert str(error.value) == (
        "Jacobian compares logits class by class, and which classes teacher 0 was trained on is "
        "not known, or they are others; teachers.0.classes=[...] says their ids"
    )
