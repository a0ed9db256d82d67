"""AB: the boundary distance and the loss by hand, what each phase trains, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.engine import Training
from potstill.errors import MethodError
from potstill.method import Batch, DataSpec, Outputs, Progress
from potstill.methods.ab import AB, boundary_distance
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import ToyImages, pace, plan, toy_net

close = torch.testing.assert_close

TEACHER = torch.tensor([-1.0, -1.0, -1.0, -1.0, 3.0, 3.0, 3.0, 3.0]).view(1, 2, 2, 2)
STUDENT = torch.tensor([-2.0, -0.5, 0.5, 2.0, -0.5, 0.5, 1.0, 2.0]).view(1, 2, 2, 2)
"""They cost 0, 0.25, 2.25, 9 and 2.25, 0.25, 0, 0: 14 in all."""
PRE = ["stage1:pre", "stage2:pre", "stage3:pre"]
START = Progress(0, 0, 1, 1)


def ab(data: DataSpec | None = None, width: int = 6, classes: int = 4, **arguments: Any) -> AB:
    teacher = toy_net(1, width=width, classes=classes)
    return AB([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def real(student: str, teacher: str, size: int, **arguments: Any) -> AB:
    shape = (3, size, size)
    data = ToyImages().spec()._replace(input_shape=shape)
    return AB([build(student, 4, shape)], [build(teacher, 4, shape)], data, **arguments)


def outputs(mapped: list[Tensor], teacher: list[Tensor]) -> Connected:
    """Two classes, label 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    label = torch.tensor([0])
    features = {f"stage{i}:pre": x for i, x in enumerate(teacher, start=1)}
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]]), features)
    batch = Batch(torch.zeros(1, 1), label, label, label)
    own = Captured(torch.zeros(1, 2), {})
    return Connected(batch, START, [own], [taught], mapped)


def one_stage(**arguments: Any) -> AB:
    return ab(taps=["stage1:pre"], **arguments)


def cost(student: float, teacher: float, margin: float = 1.0) -> float:
    s, t = (torch.full((1, 1, 1, 1), x) for x in (student, teacher))
    return boundary_distance(s, t, margin).item()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(n: int = 4) -> Batch:
    return next(ToyImages(n).clean(n))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in (*module.named_parameters(), *module.named_buffers())}


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {k for k in one if not torch.equal(one[k], other[k])}


# --- the distance


@pytest.mark.parametrize(
    ("student", "teacher", "costs"),
    [
        (-2.0, -1.0, 0.0),
        (-0.5, -1.0, 0.25),  # (-0.5 + 1)^2
        (0.5, -1.0, 2.25),  # (0.5 + 1)^2
        (2.0, -1.0, 9.0),  # (2 + 1)^2
        (-0.5, 3.0, 2.25),  # (-0.5 - 1)^2
        (0.5, 3.0, 0.25),  # (0.5 - 1)^2
        (1.0, 3.0, 0.0),
        (2.0, 3.0, 0.0),
    ],
)
def test_a_neuron_by_hand(student: float, teacher: float, costs: float):
    assert cost(student, teacher) == costs


@pytest.mark.parametrize(
    ("student", "teacher", "costs"),
    [
        (0.5, 0.0, 2.25),  # t = 0 is inactive: (0.5 + 1)^2, not (0.5 - 1)^2
        (0.5, -0.0, 2.25),
        (0.5, 1e-30, 0.25),
        (-1.0, 0.0, 0.0),
        (-1.0, 1.0, 4.0),
        (1.0, 0.0, 4.0),
        (0.0, 0.0, 1.0),
        (0.0, 1.0, 1.0),
    ],
)
def test_zero_is_inactive_and_the_margins_cost_nothing(
    student: float, teacher: float, costs: float
):
    assert cost(student, teacher) == costs


def test_the_gradient_by_hand():
    """2 (s + 1) up to inactive, 2 (s - 1) up to active; exactly 0 at a margin and beyond it."""
    s = STUDENT.clone().requires_grad_()
    boundary_distance(s, TEACHER).backward()
    assert s.grad.flatten().tolist() == [0.0, 1.0, 3.0, 6.0, -3.0, -1.0, 0.0, 0.0]
    at_margin = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).requires_grad_()
    boundary_distance(at_margin, torch.tensor([-5.0, 5.0]).view(1, 2, 1, 1)).backward()
    assert torch.equal(at_margin.grad, torch.zeros(1, 2, 1, 1))


def test_another_margin_by_hand():
    """(-0.5 + 2)^2 where inactive, (0.5 - 2)^2 where active, 0 at -2 and 2."""
    found = [cost(s, t, margin=2.0) for s, t in ((-0.5, -1), (0.5, 1), (-2, -1), (2, 1))]
    assert found == [2.25, 2.25, 0.0, 0.0]


def test_it_is_summed_over_a_map_and_averaged_over_images():
    """14 an image; three images, of which one costs nothing, two times the channels."""
    assert boundary_distance(STUDENT, TEACHER) == 14
    student = torch.cat([STUDENT, STUDENT, 2 * TEACHER]).repeat(1, 2, 1, 1)
    close(boundary_distance(student, TEACHER.repeat(3, 2, 1, 1)).item(), 2 * 14 * 2 / 3)


@pytest.mark.parametrize("factor", [1e-30, 0.3, 7.0, 1e30])
def test_only_the_teachers_sign_matters(factor: float):
    s, t = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    assert torch.equal(boundary_distance(s, factor * t), boundary_distance(s, t))
    assert boundary_distance(s, -t) != boundary_distance(s, t)


def test_both_signs_turned_round_cost_the_same():
    s, t = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    close(boundary_distance(-s, -t), boundary_distance(s, t))


def test_nothing_is_lost_only_beyond_the_margin_on_the_teachers_side():
    t = noise(2, 3, 4, 4)
    assert boundary_distance(t.sign(), t) == 0
    assert boundary_distance(9 * t.sign(), t) == 0
    for place in range(96):
        s = t.sign()
        s.view(-1)[place] *= 0.99
        close(boundary_distance(s, t).item(), 0.01**2 / 2, atol=1e-7, rtol=0)


def test_it_is_that_of_loops_over_neurons():
    s, t = 2 * noise(2, 2, 3, 3), noise(2, 2, 3, 3, seed=1)
    total = 0.0
    for own, theirs in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True):
        if theirs <= 0 and own > -0.7:
            total += (own + 0.7) ** 2
        elif theirs > 0 and own <= 0.7:
            total += (own - 0.7) ** 2
    close(boundary_distance(s, t, 0.7).item(), total / 2)


# --- the loss of the init phase


def test_the_loss_by_hand():
    """14 * 3 / 1000."""
    found = one_stage().init_loss(outputs([STUDENT], [TEACHER]))
    assert list(found) == ["ab"]
    close(found["ab"].item(), 0.042)
    close(one_stage(beta=2.0).init_loss(outputs([STUDENT], [TEACHER]))["ab"].item(), 28.0)


@pytest.mark.parametrize(("stage", "weight"), [(0, 1 / 4), (1, 1 / 2), (2, 1.0)])
def test_later_stages_weigh_more(stage: int, weight: float):
    mapped = [2 * TEACHER] * 3
    mapped[stage] = STUDENT
    found = ab(beta=1.0).init_loss(outputs(mapped, [TEACHER] * 3))
    close(found["ab"].item(), weight * 14)


def test_the_margin_and_all_stages_enter():
    """At margin 0.5: (0 0 1 6.25), (1 0 0 0) are 8.25; times 1/4 + 1/2 + 1."""
    found = ab(beta=1.0, margin=0.5).init_loss(outputs([STUDENT] * 3, [TEACHER] * 3))
    close(found["ab"].item(), 8.25 * 1.75)


def test_half_the_images_on_each_of_two_ranks_have_the_same_mean():
    mapped, teacher = noise(4, 3, 4, 4), noise(4, 3, 4, 4, seed=1)
    method = one_stage()
    halves = [
        method.init_loss(outputs([mapped[part]], [teacher[part]]))["ab"]
        for part in (slice(0, 2), slice(2, 4))
    ]
    close(torch.stack(halves).mean(), method.init_loss(outputs([mapped], [teacher]))["ab"])


def test_dead_and_huge_maps_have_finite_gradients():
    """A dead student is pushed to both sides: (1 - 0)^2 a neuron."""
    for factor, wanted in ((0.0, 8.0), (1e4, None)):
        s = (factor * STUDENT).requires_grad_()
        found = one_stage(beta=1.0).init_loss(outputs([s], [TEACHER]))["ab"]
        found.backward()
        assert found.isfinite() and s.grad.isfinite().all()
        assert wanted is None or found == wanted
    s = torch.zeros(1, 2, 2, 2, requires_grad=True)
    found = one_stage(beta=1.0).init_loss(outputs([s], [torch.zeros(1, 2, 2, 2)]))["ab"]
    found.backward()
    assert found == 8 and torch.equal(s.grad, torch.full_like(s, 2.0))


@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, torch.ones_like, lambda x: x[:1].expand_as(x)],
    ids=["black", "constant", "one image again and again"],
)
def test_images_without_variety_have_finite_losses_and_gradients(change: Any):
    method = ab()
    batch = images()
    found = method.init_loss(method.init_forward(batch._replace(image=change(batch.image)), START))
    found["ab"].backward()
    assert found["ab"].isfinite()
    reached = [p.grad for p in method.parameters() if p.grad is not None]
    assert reached and all(g.isfinite().all() for g in reached)


def test_no_gradient_reaches_the_teacher():
    s, t = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    one_stage().init_loss(outputs([s], [t]))["ab"].backward()
    assert s.grad.abs().sum() > 0
    assert t.grad is None


def test_half_precision_networks_have_float32_losses():
    method = ab(width=4)
    for net in (method.student, method.teachers[0]):
        net.precision = torch.bfloat16
    out = method.init_forward(images(), START)
    assert out.students[0].features["stage1:pre"].dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in out.mapped)
    found = method.init_loss(out)["ab"]
    assert found.dtype == torch.float32
    full = {k: x.float() for k, x in out.teachers[0].features.items()}
    other = Connected(out.batch, START, [], [Captured(out.teachers[0].logits, full)], out.mapped)
    assert torch.equal(found, method.init_loss(other)["ab"])


# --- connectors


def test_maps_before_the_relu_go_through_connectors_to_the_teachers_width():
    method = ab().eval()
    assert [p.student for p in method.pairs] == [p.teacher for p in method.pairs] == PRE
    out = method.init_forward(images(), START)
    assert [x.shape for x in out.mapped] == [(4, 6, 8, 8), (4, 12, 4, 4), (4, 12, 2, 2)]
    for tap, layer, mapped in zip(PRE, method.connectors, out.mapped, strict=True):
        x = out.students[0][tap]
        assert x.min() < 0 and mapped.min() < 0
        close(mapped, layer(x))


def test_equal_widths_need_no_connectors():
    method = ab(width=4)
    assert len(list(method.parameters())) == len(list(method.student.parameters()))
    out = method.init_forward(images(), START)
    for tap, mapped in zip(PRE, out.mapped, strict=True):
        assert torch.equal(mapped, out.students[0][tap])


def test_a_student_that_is_its_teacher_costs_only_what_is_within_the_margins():
    method = AB([toy_net(0)], [toy_net(0)], ToyImages().spec(), beta=1.0).eval()
    out = method.init_forward(images(), START)
    total = 0.0
    for tap, weight in zip(PRE, (0.25, 0.5, 1.0), strict=True):
        x = out.teachers[0][tap]
        # the teacher's zeros are inactive: 1 from their margin
        total += weight * (1 - x.abs()).clamp(min=0).square().sum().item() / 4
    close(method.init_loss(out)["ab"].item(), total, rtol=1e-5, atol=0)


# --- the two phases


def test_the_phases_are_as_published():
    init, distill = ab().phases()
    assert (init.name, init.epochs, distill.name, distill.epochs) == ("init", 40, "distill", 100)
    assert init.predictors() == {}
    assert distill.predictors is None
    names = [[u.name for t in p.turns for u in t.updates] for p in (init, distill)]
    assert names == [["init"], ["student"]]


def test_the_init_phase_trains_backbone_and_connectors_and_the_second_the_student():
    """With weight decay on: what a phase does not train keeps every bit."""
    method = ab()
    training = Training(method, ToyImages(), pace(method, 1))
    states = [state_of(method)]
    states += [state_of(method) for moment in training.run() if moment.step == moment.steps]
    weights = {k for k, _ in method.named_parameters()}
    head = {"students.0.module.fc.weight", "students.0.module.fc.bias"}
    connectors = {k for k in weights if k.startswith("connectors.")}
    assert head < weights and len(connectors) == 9
    assert changed(*states[:2]) & weights == weights - head
    assert changed(*states[1:]) & weights == weights - connectors


def test_the_student_is_in_train_mode_in_the_init_phase_and_the_teacher_is_not():
    """Running averages, which the second phase starts from, follow the weights."""
    method = ab()
    before, teacher = state_of(method), state_of(method.teachers[0])
    for moment in Training(method, ToyImages(), pace(method, 1)).run():
        if moment.phase == "distill":
            break
        averages = {k for k in before if k.startswith("students") and k.endswith("running_mean")}
        assert averages and averages < changed(before, state_of(method))
        assert not any(m.training for m in method.teachers[0].modules())
    assert not changed(teacher, state_of(method.teachers[0]))


@pytest.mark.parametrize(("stage2", "runs"), [("ce", 4), ("kd", 8)])
def test_the_teacher_runs_in_the_second_phase_only_for_kd(stage2: Any, runs: int):
    method = ab(stage2=stage2)
    training = Training(method, ToyImages(), pace(method, 1))
    seen: list[str] = []
    method.teachers[0].module.register_forward_hook(lambda *_: seen.append(training.phase.name))
    terms = {moment.phase: list(moment.terms) for moment in training.run()}
    assert terms == {"init": ["ab"], "distill": [stage2]}
    assert seen == (["init"] * 4 + ["distill"] * 4)[:runs]


def test_the_second_phase_is_plain_cross_entropy():
    method = ab()
    out = method(images(), START)
    assert type(out) is Outputs and out.teachers == []
    terms = method.loss(out)
    assert list(terms) == ["ce"]
    assert torch.equal(terms["ce"], F.cross_entropy(out.students[0].logits, out.batch.label))


def test_the_released_second_phase_by_hand():
    """At T = 3 the teacher's odds are 3^(1/3); KL to (1/2, 1/2), no label, no factor of 9."""
    q = 3 ** (1 / 3) / (1 + 3 ** (1 / 3))
    kl = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
    found = ab(stage2="kd").loss(outputs([], []))
    assert list(found) == ["kd"]
    close(found["kd"].item(), kl, atol=1e-7, rtol=0)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = ab(stage2="kd", temperature=1.0).loss(outputs([], []))
    close(found["kd"].item(), kl, atol=1e-7, rtol=0)


def test_the_released_second_phase_is_averaged_over_images():
    method = ab(stage2="kd")
    out = method(images(4), START)
    p, q = ((x.logits / 3).softmax(1) for x in (out.students[0], out.teachers[0]))
    close(method.loss(out)["kd"], (q * (q / p).log()).sum() / 4, atol=1e-6, rtol=1e-4)


def test_momentum_starts_anew_in_the_second_phase():
    """Distributions so soft that none differs move nothing by themselves, without weight decay."""
    method = ab(stage2="kd", temperature=1e30)
    at_rest = pace(method, 1, default=plan(weight_decay=0.0))
    training = Training(method, ToyImages(), at_rest)
    states = [state_of(method)]
    states += [state_of(method) for _ in training.run()]
    assert len(states) == 9 and changed(states[3], states[4])
    for key, p in method.named_parameters():
        close(p.detach(), states[4][key], rtol=0, atol=1e-20)


def test_the_defaults_are_the_authors():
    method = ab()
    assert (method.beta, method.margin, method.temperature) == (3e-3, 1.0, 3.0)
    assert method.stage2 == "ce"


def test_frozen_weights_are_left_out_of_both_phases():
    method = ab()
    frozen = method.student.module.conv1.weight.requires_grad_(False)
    for phase in method.phases():
        (update,) = phase.turns[0].updates
        assert all(p is not frozen for p in update.parameters)


def test_it_reads_the_teachers_taps_and_the_logits_only_for_kd():
    assert ab().reads == set(PRE)
    assert one_stage(stage2="kd").reads == {"stage1:pre", "logits"}


# --- networks


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(
    ("student", "teacher", "maps"),
    [
        ("wrn_16_1", "wrn_40_2", [(16, 1), (32, 2), (64, 4)]),
        ("resnet8", "resnet20", [(16, 1), (32, 2), (64, 4)]),
        ("wrn_10_4_mhgd", "wrn_22_4_mhgd", [(64, 1), (128, 2), (256, 4)]),
        (
            "vgg_student_mhgd",
            "vgg_teacher_mhgd",
            [(64, 1), (128, 2), (256, 4), (512, 8), (512, 8)],
        ),
    ],
)
def test_real_networks_are_read_before_their_relus(
    student: str, teacher: str, maps: list[tuple[int, int]], size: int
):
    """(C, H / r, H / r) by (C, r); of VGG before the pooling. Values of both signs."""
    method = real(student, teacher, size)
    taps = [f"stage{i}:pre" for i in range(1, len(maps) + 1)]
    assert [p.student for p in method.pairs] == [p.teacher for p in method.pairs] == taps
    full = 32 if student == "wrn_10_4_mhgd" else size  # which halves large images at once
    if student == "vgg_student_mhgd" and size == 64:  # whose fourth pooling is for these alone
        maps = [*maps[:-1], (512, 16)]
    assert [p.shape for p in method.pairs] == [(c, full // r, full // r) for c, r in maps]
    assert all(p.shape[1:] == p.teacher_shape[1:] for p in method.pairs)
    assert bool(list(method.connectors.parameters())) == (student == "wrn_16_1")
    for net in (method.student, method.teachers[0]):
        found = net.probe()
        assert all(found[tap].min() < 0 < found[tap].max() for tap in taps)


def test_a_wrns_taps_are_the_next_stages_first_normalisation():
    """As the authors have it: the BatchNorm of the next group on the sum of this one."""
    method = real("wrn_16_1", "wrn_40_2", 32)
    seen: dict[str, Tensor] = {}
    for path in ("layer2.0.bn1", "layer3.0.bn1", "bn1"):
        norm = method.student.module.get_submodule(path)
        norm.register_forward_hook(lambda m, x, y, path=path: seen.update({path: y}))
    found = method.student.probe()
    for tap, y in zip(PRE, seen.values(), strict=True):
        assert torch.equal(found[tap], y)


@pytest.mark.parametrize("size", [32, 64])
def test_pooled_and_strided_networks_meet_where_they_are_equally_large(size: int):
    """VGG-8's stages begin at half the size of a ResNet's: its last two have one size at 32."""
    method = real("vgg8", "resnet20", size)
    found = [(p.student, p.teacher) for p in method.pairs]
    assert found == [("stage1:pre", "stage2:pre"), ("stage2:pre", "stage3:pre")]
    method = real("vgg8", "vgg13", size)
    assert [p.student for p in method.pairs] == [p.teacher for p in method.pairs]
    assert [p.shape for p in method.pairs] == [
        (128, size // 2, size // 2),
        (256, size // 4, size // 4),
        (512, size // 8, size // 8),
        (512, 4, 4),
    ]


@pytest.mark.parametrize(
    ("student", "teacher", "behind"),
    [
        ("wrn_16_1", "wrn_40_2", {"fc"}),
        ("vgg_student_mhgd", "vgg_teacher_mhgd", {"fc1", "fc"}),
        ("mobilenetv2", "vgg8", {"layer6", "layer7", "conv2", "bn2", "fc"}),
    ],
)
def test_what_lies_behind_the_last_map_is_not_trained_in_the_init_phase(
    student: str, teacher: str, behind: set[str]
):
    """MobileNetV2's last map, 2 x 2, is smaller than any of VGG-8's: three of its four meet."""
    method = real(student, teacher, 32)
    ((update,), (second,)) = (p.turns[0].updates for p in method.phases())
    named = list(method.student.module.named_parameters())
    trained = {id(p) for p in update.parameters}
    assert {k.split(".")[0] for k, p in named if id(p) not in trained} == behind
    everything = {id(p) for p in method.parameters()}
    assert trained == everything - {id(p) for k, p in named if k.split(".")[0] in behind}
    assert {id(p) for p in second.parameters} == {id(p) for p in method.student.parameters()}


def test_each_network_is_read_at_its_own_taps():
    """ResNet-20's second and third stages are as large as VGG-8's first and second."""
    method = real("vgg8", "resnet20", 32, beta=1.0)
    assert method.reads == {"stage2:pre", "stage3:pre"}
    out = method.init_forward(Batch(noise(2, 3, 32, 32), *[torch.zeros(2).long()] * 3), START)
    total = 0.0
    for i, (layer, mapped) in enumerate(zip(method.connectors, out.mapped, strict=True), start=1):
        close(mapped, layer(out.students[0][f"stage{i}:pre"]))
        total += i / 2 * boundary_distance(mapped, out.teachers[0][f"stage{i + 1}:pre"]).item()
    close(method.init_loss(out)["ab"].item(), total, rtol=1e-5, atol=0)


def test_taps_given_alone_are_the_teachers_too():
    """A student's map after its ReLU, of which neurons could never leave the active side, goes
    through a connector; the teacher's boundary is the same before and after.
    """
    method = AB([toy_net(0)], [toy_net(1)], ToyImages().spec(), taps=["stage2", "stage3:pre"])
    found = [(p.student, p.teacher) for p in method.pairs]
    assert found == [("stage2", "stage2"), ("stage3:pre", "stage3:pre")]
    assert [type(c) for c in method.connectors] == [nn.Sequential, nn.Identity]


def test_a_student_without_taps_before_its_relu_can_still_learn_what_is_inactive():
    """Every neuron of both is inactive: without a connector no gradient would reach the student."""
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        body = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        nets.append(Net(nn.Sequential(*body, nn.Linear(4, 4)), {"stage1": "1"}, (3, 8, 8)))
    method = AB(nets[:1], nets[1:], ToyImages().spec())
    (pair,) = method.pairs
    assert (pair.student, pair.teacher) == ("stage1", "stage1")
    (update,) = method.phases()[0].turns[0].updates
    out = method.init_forward(next(ToyImages().clean(16)), START)
    found = update.gradients(update.loss(out), update.parameters, START)
    assert len(found) == 5 and all(g.abs().sum() > 0 for g in (found[0], found[2]))


# --- refusals


def test_maps_of_unequal_size_are_refused():
    with pytest.raises(MethodError) as error:
        ab(taps=["stage1:pre", "stage2:pre"], teacher_taps=["stage1:pre", "stage3:pre"])
    assert str(error.value) == (
        "AB compares neurons at equal places of two maps, but 'stage2:pre' of the student is "
        "8x4x4 and 'stage3:pre' of the teacher 12x2x2; choose maps of equal height and width with "
        "taps=[...] and teacher_taps=[...]"
    )


def test_an_unknown_second_stage_is_refused():
    with pytest.raises(MethodError) as error:
        ab(stage2="kl")
    assert str(error.value) == "AB: stage2 is 'kl'; give 'ce' or 'kd'"


def test_a_vector_is_refused():
    with pytest.raises(MethodError) as error:
        ab(taps=["embed"])
    assert str(error.value) == (
        "AB needs feature maps (C, H, W), but 'embed' of the student is (8,); choose taps=[...] "
        "before the pooling"
    )


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = ab(data, classes=9)
    assert list(method.init_loss(method.init_forward(images(), START))) == ["ab"]
    assert list(method.loss(method(images(), START))) == ["ce"]
    with pytest.raises(MethodError) as error:
        ab(data, classes=9, stage2="kd")
    assert str(error.value) == (
        "AB compares logits class by class, but teacher 0 has 9 classes and student 0 has 4; use "
        "a teacher trained on this data set, or a method that reads features"
    )
