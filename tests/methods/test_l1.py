"""L1 and L1 + KD: the pages' numbers, r, taps, what moves what, and both forms' predictors."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import engine
from potstill.connectors import Connected
from potstill.errors import MethodError, RecipeError, TapError
from potstill.method import Batch, DataSpec, Method, Outputs, Progress
from potstill.methods.l1 import L1
from potstill.methods.l1_kd import L1KD
from potstill.models import build
from potstill.net import Captured, Net
from potstill.optim import sgd
from potstill.recipe import loads
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

X, Y = (torch.tensor([f]).view(1, 1, 2, 2) for f in ((1.0, 2.0, 3.0, 4.0), (2.0, 2.0, 1.0, 4.0)))
ONE, TWO = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 2.0, 0.0]])
NOW = Progress(0, 0, 1, 1)


def online(width: int = 4, other: int = 4, kind: type[L1] = L1, **arguments: Any) -> L1:
    """Two students, whose last maps have 2 * width channels."""
    nets = [toy_net(0, width=width), toy_net(1, width=other)]
    return kind(nets, [], ToyImages().spec(0), **arguments)


def offline(
    width: int = 4,
    other: int = 6,
    kind: type[L1] = L1,
    data: DataSpec | None = None,
    classes: int = 4,
    **arguments: Any,
) -> L1:
    """A student and its teacher."""
    teacher = toy_net(1, width=other, classes=classes)
    return kind([toy_net(0, width=width)], [teacher], data or ToyImages().spec(), **arguments)


def outputs(
    maps: list[Tensor], logits: tuple[Tensor, Tensor] = (ONE, TWO), taught: bool = False
) -> Connected:
    """Of two networks, labels 0; r is the identity. The second is the teacher where `taught`."""
    nets = [Captured(z, {"last": x}) for z, x in zip(logits, maps, strict=True)]
    label = torch.zeros(len(maps[0]), dtype=torch.int64)
    batch = Batch(torch.zeros(len(label), 1), label, label, label)
    if taught:
        return Connected(batch, NOW, nets[:1], nets[1:], maps[:1])
    return Connected(batch, NOW, nets, [], maps)


def images(n: int = 16, dtype: torch.dtype = torch.float32) -> Batch:
    return next(ToyImages(n, dtype).clean(n))


def refusal(*given: Any, kind: type[L1] = L1, **arguments: Any) -> str:
    with pytest.raises((MethodError, TapError)) as error:
        kind(*given, **arguments)
    return str(error.value)


def one_step(method: Method, lr: float = 0.05, batch: Batch | None = None) -> None:
    (phase,) = method.phases()
    (turn,) = phase.turns
    optimizers = {u.name: sgd(u.parameters, lr) for u in turn.updates}
    engine.train_step(phase, optimizers, batch or images(), NOW, seed=0)


# --- the losses


def test_maps_by_hand():
    """(1, 2, 3, 4) and (2, 2, 1, 4): (1 + 0 + 2 + 0) / 4 = 0.75 for both, and the gradient on each
    one's own map is a quarter of the sign of its difference; none on the other's.
    """
    method, maps = online(), [X.clone().requires_grad_(), Y.clone().requires_grad_()]
    found = method.loss_of(0, outputs(maps))
    assert list(found) == ["ce", "l1"]
    close(found["l1"].item(), 0.75)
    found["l1"].backward()
    close(maps[0].grad.flatten(), torch.tensor([-1.0, 0.0, 1.0, 0.0]) / 4)
    assert maps[1].grad is None
    maps[0].grad = None
    second = method.loss_of(1, outputs(maps))["l1"]
    close(second.item(), 0.75)
    second.backward()
    close(maps[1].grad.flatten(), torch.tensor([1.0, 0.0, -1.0, 0.0]) / 4)
    assert maps[0].grad is None


def test_the_mean_is_over_images_channels_and_pixels():
    """Differences of 1, 0, 2, 0 in one image and channel, of 1 / 4 everywhere else: three of the
    four pairs of image and channel mean 1/4, one 3/4, so 3/8 in all.
    """
    x, y = torch.zeros(2, 2, 2, 2), torch.full((2, 2, 2, 2), 0.25)
    x[1, 0], y[1, 0] = X[0, 0], Y[0, 0]
    found = online().loss_of(0, outputs([x, y], (ONE.repeat(2, 1), TWO.repeat(2, 1))))
    close(found["l1"].item(), 0.375)


def test_kd_by_hand():
    """p_1^T and p_2^T of (1, 0, -1) / 3 and (0, 2, 0) / 3, from their three exponentials each."""
    a, b = ([math.exp(v / 3) for v in z] for z in ((1.0, 0.0, -1.0), (0.0, 2.0, 0.0)))
    p, q = ([v / sum(z) for v in z] for z in (a, b))
    to_first = sum(v * math.log(v / u) for u, v in zip(p, q, strict=True))
    to_second = sum(u * math.log(u / v) for u, v in zip(p, q, strict=True))
    assert abs(to_first - to_second) > 1e-3
    method = online(kind=L1KD)
    for k, (kl, ce) in enumerate([(to_first, 0.407606), (to_second, 2.239545)]):
        found = method.loss_of(k, outputs([X, Y]))
        assert list(found) == ["ce", "l1", "kd"]
        close(found["kd"].item(), 9 * kl, atol=1e-5, rtol=0)
        close(found["ce"].item(), ce, atol=1e-6, rtol=0)
        close(found["l1"].item(), 0.75)


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_each_weight_weighs_its_own_term(T: float):
    """Logits T times as large, at T: T^2 times the KL at T = 1, which is 0.742033 by DML's page."""
    method = online(beta=0.5, alpha=0.25, temperature=T)
    found = method.loss_of(0, outputs([X, Y], (T * ONE, T * TWO)))
    close(found["l1"].item(), 0.375)
    close(found["kd"].item(), 0.25 * T**2 * 0.742033, atol=1e-5, rtol=0)


def test_defaults():
    plain, kd = online(), online(kind=L1KD)
    assert (plain.beta, plain.alpha, plain.temperature) == (1.0, 0.0, 3.0)
    assert (kd.beta, kd.alpha, kd.temperature) == (1.0, 1.0, 3.0)
    assert L1.lengths == L1KD.lengths == {"distill": 300}


def test_a_term_of_weight_zero_is_left_out():
    """And what it alone would train."""
    method = online(4, 6, beta=0.0, alpha=1.0)
    assert not list(method.transfers.parameters())
    assert set(method.loss_of(0, method(images(), NOW))) == {"ce", "kd"}


def test_a_teacher_of_more_outputs_is_in_no_ensemble():
    """Its class ids are taken to be the data's, and three outputs more are nobody's."""
    method = offline(classes=7)
    assert list(method.predictors()) == ["student"]


def test_kd_is_l1_with_a_weight():
    one = online(kind=L1KD, beta=2.0, temperature=5.0, taps=["stage2"])
    other = online(alpha=1.0, beta=2.0, temperature=5.0, taps=["stage2"])
    assert one.taps == other.taps == ["stage2", "stage2"]
    found, expected = (m.loss_of(1, m(images(), NOW)) for m in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_equal_outputs_cost_the_cross_entropy():
    found = online(kind=L1KD).loss_of(1, outputs([X, X.clone()], (ONE, ONE.clone())))
    assert found["l1"] == 0
    close(found["kd"].item(), 0.0, atol=1e-6, rtol=0)
    close(found["ce"].item(), 0.407606, atol=1e-6, rtol=0)


def test_the_peers_logits_are_constant():
    logits = ONE.clone().requires_grad_(), TWO.clone().requires_grad_()
    sum(online(kind=L1KD).loss_of(0, outputs([X, Y], logits)).values()).backward()
    assert logits[0].grad.abs().sum() > 0
    assert logits[1].grad is None


def test_offline_by_hand():
    """The student's terms are those that it has online, and the teacher's outputs are constant."""
    maps, logits = [v.clone().requires_grad_() for v in (X, Y)], (ONE.clone(), TWO.clone())
    method = offline(4, 4, L1KD)
    found = method.loss_of(0, outputs(maps, logits, taught=True))
    expected = online(kind=L1KD).loss_of(0, outputs([X, Y]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    sum(found.values()).backward()
    assert maps[0].grad is not None and maps[1].grad is None


def test_extreme_values_stay_finite():
    """Logits of 1e4 for different classes: 9 * 1e4 / 3; maps that differ by 2e4."""
    sure = torch.tensor([[1e4, 0.0]])
    z = sure.clone().requires_grad_(), sure.flip(1)
    x = torch.full((1, 1, 2, 2), 1e4, requires_grad=True)
    found = online(kind=L1KD).loss_of(0, outputs([x, -x.detach()], z))
    close(found["kd"].item(), 3e4)
    close(found["l1"].item(), 2e4)
    sum(found.values()).backward()
    assert z[0].grad.isfinite().all() and x.grad.isfinite().all()


def test_the_larger_map_is_averaged_down():
    """(1, 2, 3, 4) has the mean 2.5, a quarter of one off 2.75; for both, whichever is larger."""
    small = torch.full((1, 1, 1, 1), 2.75)
    for maps in ([X, small], [small, X]):
        for k in (0, 1):
            close(online().loss_of(k, outputs(maps))["l1"].item(), 0.25)


# --- r


@pytest.mark.parametrize("kind", [L1, L1KD])
def test_r_is_there_only_where_the_widths_differ(kind: type[L1]):
    """From one network's width to the other's, and one for each student."""
    for method in (online(kind=kind), offline(4, 4, kind)):
        assert [type(r) for r in method.transfers] == [nn.Identity] * len(method.nets)
        assert method.trainable() == [p for n in method.nets for p in n.parameters()]
    first, second = online(4, 6, kind).transfers
    assert [(r.conv.in_channels, r.conv.out_channels) for r in (first, second)] == [
        (8, 12),
        (12, 8),
    ]
    assert first.conv.kernel_size == (1, 1) and first.conv.stride == (1, 1)
    (only,) = offline(4, 6, kind).transfers
    assert (only.conv.in_channels, only.conv.out_channels) == (8, 12)
    assert sum(p.numel() for p in only.parameters()) == 8 * 12 + 2 * 12


def test_r_begins_as_torch_makes_it():
    """Uniform within 1 / sqrt(C), whose standard deviation is 1 / sqrt(3 C); no bias."""
    torch.manual_seed(0)
    (r,) = offline(32, 48).transfers
    assert [type(layer) for layer in r] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert r.conv.bias is None
    assert r.conv.weight.abs().max() <= 1 / 8
    close(r.conv.weight.std().item(), 1 / math.sqrt(3 * 64), rtol=0.05, atol=0)
    assert r.bn.weight.eq(1).all() and r.bn.bias.eq(0).all()


def test_r_gives_the_peers_shape_and_nothing_below_zero():
    """The last maps are 2 x 2."""
    method = online(4, 6)
    out = method(images(), NOW)
    assert [tuple(x.shape) for x in out.mapped] == [(16, 12, 2, 2), (16, 8, 2, 2)]
    assert all(x.min() == 0 for x in out.mapped)
    assert [student["last"].shape[1] for student in out.students] == [8, 12]


def test_maps_of_unequal_size_and_width_meet():
    """4 x 4 at 8 channels, 2 x 2 at 12: each r works at its own network's size."""
    method = online(4, 6, taps=["stage2", "stage3"])
    out = method(images(), NOW)
    assert [tuple(x.shape) for x in out.mapped] == [(16, 12, 4, 4), (16, 8, 2, 2)]
    first, second = out.students[0]["stage2"], out.students[1]["stage3"]
    expected = (F.avg_pool2d(out.mapped[0], 2) - second).abs().mean()
    close(method.loss_of(0, out)["l1"], expected)
    expected = (out.mapped[1] - F.avg_pool2d(first, 2)).abs().mean()
    close(method.loss_of(1, out)["l1"], expected)


# --- the steps


def test_each_optimiser_moves_its_network_and_its_r():
    method = online(4, 6)
    (phase,) = method.phases()
    (turn,) = phase.turns
    assert [u.name for u in turn.updates] == ["student0", "student1"]
    for k, update in enumerate(turn.updates):
        expected = [*method.nets[k].parameters(), *method.transfers[k].parameters()]
        assert len(update.parameters) == len(expected)
        assert all(p is q for p, q in zip(update.parameters, expected, strict=True))


def test_offline_the_student_and_its_r_are_moved():
    method = offline(4, 6)
    (phase,) = method.phases()
    ((update,),) = (turn.updates for turn in phase.turns)
    assert update.name == "student"
    expected = [*method.student.parameters(), *method.transfers.parameters()]
    assert all(p is q for p, q in zip(update.parameters, expected, strict=True))


@pytest.mark.parametrize("kind", [L1, L1KD])
def test_no_loss_reaches_the_other_network_or_its_r(kind: type[L1]):
    method = online(4, 6, kind)
    out = method(images(), NOW)
    for k in (0, 1):
        loss = torch.stack([*method.loss_of(k, out).values()]).sum()
        other = [*method.nets[1 - k].parameters(), *method.transfers[1 - k].parameters()]
        found = torch.autograd.grad(loss, other, retain_graph=True, allow_unused=True)
        assert found == (None,) * len(other)


@pytest.mark.parametrize("kind", [L1, L1KD])
def test_a_step_leaves_the_teacher_alone(kind: type[L1]):
    """Weights, averages of BatchNorm, gradients and mode; the student moves and so does r."""
    method = offline(4, 6, kind).train()
    teacher = method.teachers[0]
    before = copy.deepcopy(teacher.state_dict())
    own = copy.deepcopy(method.state_dict())
    one_step(method)
    assert all(torch.equal(v, before[key]) for key, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    moved = {k.split(".")[0] for k, v in method.state_dict().items() if not torch.equal(v, own[k])}
    assert moved == {"students", "transfers"}


def by_the_page(
    modules: list[Net], layers: list[Tensor], batch: Batch, teacher: Net | None, lr: float
) -> None:
    """One step of L1 + KD, beta 1 and T 3, written from the page; `layers` are r's convolutions.

    r's BatchNorm is as it begins, so it is written out: scale 1, shift 0, eps 1e-5.
    """
    nets = [*modules, teacher] if teacher is not None else modules
    found = [net(batch.image) for net in nets]
    B, waiting = len(batch.label), []
    for k, conv in enumerate(layers):
        own, peer = found[k], found[1 - k]
        x = torch.einsum("bchw,dc->bdhw", own["last"], conv)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        mapped = ((x - mean) / (var + 1e-5).sqrt()).clamp(min=0)
        target = peer["last"].detach()
        loss = sum((mapped[b] - target[b]).abs().sum() for b in range(B)) / target.numel()
        for b in range(B):
            p, q = (peer.logits[b].detach() / 3).softmax(0), (own.logits[b] / 3).softmax(0)
            loss = loss + 9 * (p * (p / q).log()).sum() / B
            loss = loss - own.logits[b].softmax(0)[batch.label[b]].log() / B
        moved = [*modules[k].parameters(), conv]
        waiting.append((moved, torch.autograd.grad(loss, moved)))
    with torch.no_grad():
        for moved, gradients in waiting:
            for p, g in zip(moved, gradients, strict=True):
                p.sub_(lr * g)


@pytest.mark.parametrize("taught", [False, True], ids=["online", "offline"])
def test_a_step_equals_one_written_from_the_page(taught: bool):
    """Weights and averages of the networks, r's convolution, in double precision."""
    method = (offline if taught else online)(4, 6, L1KD).double().train()
    modules = [copy.deepcopy(net) for net in method.nets]
    layers = [r.conv.weight.detach()[:, :, 0, 0].clone() for r in method.transfers]
    for conv in layers:
        conv.requires_grad_()
    teacher = copy.deepcopy(method.teachers[0]) if taught else None
    batch = images(8, torch.float64)
    one_step(method, 0.1, batch)
    by_the_page(modules, layers, batch, teacher, 0.1)
    for net, module in zip(method.nets, modules, strict=True):
        for key, tensor in module.state_dict().items():
            close(net.state_dict()[key], tensor, rtol=1e-9, atol=1e-11, msg=key)
    for r, conv in zip(method.transfers, layers, strict=True):
        close(r.conv.weight[:, :, 0, 0], conv, rtol=1e-9, atol=1e-11)


def test_networks_run_once_a_step():
    method, calls = online(4, 6), [0, 0]
    for k, net in enumerate(method.nets):

        def count(*_: Any, k: int = k) -> None:
            calls[k] += 1

        net.module.register_forward_hook(count)
    one_step(method)
    assert calls == [1, 1]


# --- taps


def test_the_map_that_is_pooled_is_the_default():
    """Of whichever networks: after the last activation, 64 channels of 8 x 8 in a ResNet-20."""
    spec = ToyImages().spec(0)._replace(input_shape=(3, 32, 32))
    method = L1([build("resnet20", 4), build("wrn_16_1", 4)], [], spec)
    assert method.taps == ["last", "last"]
    assert all(net.pools(tap) for net, tap in zip(method.nets, method.taps, strict=True))
    assert [tuple(net.shape_of("last")) for net in method.nets] == [(64, 8, 8)] * 2


def test_taps_are_one_a_network_or_one_for_all():
    assert online(taps=["stage2"]).taps == ["stage2", "stage2"]
    assert online(taps=["stage2", "stage3"]).taps == ["stage2", "stage3"]
    assert offline(taps=["stage2", "stage3:pre"]).taps == ["stage2", "stage3:pre"]
    method = offline(taps=["stage2", "stage3:pre"])
    out = method(images(), NOW)
    r, x = method.transfers[0], out.students[0]["stage2"]
    close(out.mapped[0], r(x))
    expected = (F.avg_pool2d(out.mapped[0], 2) - out.teachers[0]["stage3:pre"]).abs().mean()
    close(method.loss_of(0, out)["l1"], expected)


@pytest.mark.parametrize("taps", [[], ["stage1", "stage2", "stage3"]])
def test_another_number_of_taps_is_refused(taps: list[str]):
    two = [toy_net(0), toy_net(1)]
    assert refusal(two, [], ToyImages().spec(0), taps=taps) == (
        f"L1 reads one map of each of 2 networks, but taps has {len(taps)} names; give one a "
        "network, or one for all"
    )


def test_a_tap_that_does_not_exist_is_refused():
    one, other = toy_net(0), toy_net(1)
    known = (
        "['embed', 'last', 'stage1', 'stage1:pre', 'stage2', 'stage2:pre', 'stage3', "
        "'stage3:pre', 'stem']"
    )
    wrong = f"no feature 'layer9'; this network has {known}; choose taps=[...]"
    data = ToyImages().spec()
    assert refusal([one, other], [], data, taps=["stage2", "layer9"]) == f"student 1: {wrong}"
    assert refusal([one], [other], data, taps=["last", "layer9"]) == f"the teacher: {wrong}"
    assert refusal([one], [other], data, taps=["layer9", "last"]) == f"the student: {wrong}"


def test_a_tap_that_is_no_map_is_refused():
    data, two = ToyImages().spec(), [toy_net(0), toy_net(1)]
    assert refusal(two, [], data, kind=L1KD, taps=["embed"]) == (
        "L1KD needs feature maps (C, H, W), but 'embed' of student 0 is (8,); choose taps=[...] "
        "before the pooling"
    )
    assert refusal(two[:1], two[1:], data, taps=["last", "embed"]) == (
        "L1 needs feature maps (C, H, W), but 'embed' of the teacher is (8,); choose taps=[...] "
        "before the pooling"
    )


def test_a_network_without_stages_wants_its_tap_named():
    torch.manual_seed(9)
    body = OrderedDict(conv=nn.Conv2d(3, 8, 5), flat=nn.Flatten(), fc=nn.Linear(8 * 16, 4))
    bare = Net(nn.Sequential(body), {"map": "conv"}, (3, 8, 8))
    data = ToyImages().spec(0)
    assert refusal([toy_net(0), bare], [], data) == (
        "L1 compares feature maps, and no stages of student 1 are known; choose taps=[...] among "
        "['map']"
    )
    assert L1([toy_net(0), bare], [], data, taps=["last", "map"]).taps == ["last", "map"]


# --- what it reads and takes


def test_it_reads_what_it_compares():
    assert online(kind=L1KD).reads == frozenset()
    assert offline().reads == {"last"}
    assert offline(kind=L1KD, taps=["stage2", "stage3"]).reads == {"stage3", "logits"}


def test_other_numbers_of_networks_are_refused():
    """Never a teacher beside two students, never one network alone."""
    data, nets = ToyImages().spec(), [toy_net(k) for k in range(3)]
    both = "L1 takes two students, or one student and its teacher; {} and {} given"
    assert refusal(nets[:1], [], data) == both.format(1, 0)
    assert refusal(nets[:2], nets[2:], data) == both.format(2, 1)
    assert refusal(nets, [], data) == "L1: takes 1 to 2 students, 3 given"
    assert refusal(nets[:1], nets[1:], data) == "L1: takes 0 to 1 teachers, 2 given"
    assert refusal([], nets[:1], data, kind=L1KD) == "L1KD: takes 1 to 2 students, 0 given"


@pytest.mark.parametrize("name", ["l1", "l1_kd"])
def test_a_recipe_with_other_numbers_of_networks_is_refused(name: str):
    text = (
        "{students: [resnet8, resnet8, resnet8], teachers: [{name: resnet8, weights: a.pt}, "
        f"{{name: resnet8, weights: b.pt}}], method: {name}, data: digits, "
        "optimizers: {default: {name: sgd, lr: 0.1}}}"
    )
    with pytest.raises(RecipeError) as error:
        loads(text)
    assert error.value.faults == [
        f"students: method {name} takes 1 to 2 students, 3 given",
        f"teachers: method {name} takes 0 to 1 teachers, 2 given",
    ]


def test_equal_students_are_refused():
    """With a teacher of the same weights there is nothing to refuse: it may be its start."""
    net = toy_net(0)
    assert refusal([net, copy.deepcopy(net)], [], ToyImages().spec(0)) == (
        "L1: students 0 and 1 start from equal weights and see the same images, so neither has "
        "anything to teach; initialise each anew"
    )
    L1([net], [copy.deepcopy(net)], ToyImages().spec())


# --- who predicts


def test_online_each_student_and_their_mean_predict():
    method = online(4, 6).eval()
    predictors, x = method.predictors(), images().image
    assert list(predictors) == ["student0", "student1", "ensemble"]
    first, second = (net.logits(x) for net in method.nets)
    close(predictors["ensemble"](x), (first + second) / 2)


def test_offline_the_student_and_its_mean_with_the_teacher_predict():
    method = offline().eval()
    predictors, x = method.predictors(), images().image
    assert list(predictors) == ["student", "ensemble"]
    assert predictors["ensemble"].members[0] is predictors["student"]  # so it is run once
    close(predictors["student"](x), method.student.logits(x))
    close(predictors["ensemble"](x), (method.student.logits(x) + method.teachers[0].logits(x)) / 2)


@pytest.mark.parametrize("known", [range(9), None, (3, 2, 1, 0)], ids=["more", "unknown", "order"])
def test_a_teacher_of_other_classes_is_in_no_ensemble(known: Any):
    """It may teach its map, but no logits."""
    data = ToyImages().spec()._replace(teacher_classes=[known])
    classes = 4 if known == (3, 2, 1, 0) else 9
    method = offline(data=data, classes=classes)
    assert list(method.predictors()) == ["student"]
    assert list(method.loss_of(0, method(images(), NOW))) == ["ce", "l1"]
    with pytest.raises(MethodError) as error:
        offline(kind=L1KD, data=data, classes=classes)
    assert str(error.value) == (
        "L1KD compares logits class by class, but teacher 0 was trained on other classes, or in "
        "another order, than data.classes"
        if classes == 4
        else "L1KD compares logits class by class, but teacher 0 has 9 classes and student 0 has "
        "4; use a teacher trained on this data set, or a method that reads features"
    )


def test_outputs_are_those_of_one_forward():
    """`mapped` is r of the very map that is compared, and nothing is run for the loss."""
    method = online(4, 6, L1KD)
    out = method(images(), NOW)
    assert isinstance(out, Outputs) and out.progress is NOW
    for r, student, mapped in zip(method.transfers, out.students, out.mapped, strict=True):
        close(r(student["last"]), mapped)
    bare = dataclasses.replace(out, mapped=[torch.zeros_like(x) for x in out.mapped])
    expected = out.students[1]["last"].abs().mean()
    close(method.loss_of(0, bare)["l1"], expected)
