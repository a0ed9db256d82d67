"""FSP: the matrices and the loss by hand, what each phase trains, and the networks it takes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.engine import Training
from potstill.errors import MethodError
from potstill.method import Batch, DataSpec, Outputs, Progress
from potstill.methods.fsp import FSP, fsp_matrix
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import ToyImages, pace, plan, toy_net

close = torch.testing.assert_close

FRONT = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]]])
BACK = torch.tensor(
    [[[[1.0, 0.0], [0.0, 1.0]], [[2.0, 2.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]]
)
START = Progress(0, 0, 1, 1)


def fsp(data: DataSpec | None = None, width: int = 6, classes: int = 4, **arguments: Any) -> FSP:
    teacher = toy_net(1, width=width, classes=classes)
    return FSP([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def real(student: str, teacher: str, size: int, **arguments: Any) -> FSP:
    shape = (3, size, size)
    data = ToyImages().spec()._replace(input_shape=shape)
    return FSP([build(student, 4, shape)], [build(teacher, 4, shape)], data, **arguments)


def outputs(mapped: list[Tensor], teacher: list[Tensor]) -> Connected:
    """Two classes, label 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    label = torch.tensor([0])
    features = {f"stage{i}": x for i, x in enumerate(teacher, start=1)}
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]]), features)
    batch = Batch(torch.zeros(1, 1), label, label, label)
    own = Captured(torch.zeros(1, 2), {})
    return Connected(batch, START, [own], [taught], mapped)


def two_stages(**arguments: Any) -> FSP:
    return fsp(taps=["stage1", "stage2"], **arguments)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(n: int = 4) -> Batch:
    return next(ToyImages(n).clean(n))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in (*module.named_parameters(), *module.named_buffers())}


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {k for k in one if not torch.equal(one[k], other[k])}


# --- the matrix


def test_the_matrix_by_hand():
    """(1, 2, 3, 4) . (1, 0, 0, 1) = 5, . (2, 2, 0, 0) = 6, . (1, 1, 1, 1) = 10; (0, 1, 1, 0) with
    the same: 0, 2, 2; all divided by the 4 places.
    """
    close(fsp_matrix(FRONT, BACK), torch.tensor([[[1.25, 1.5, 2.5], [0.0, 0.5, 0.5]]]))


def test_the_larger_map_is_max_pooled_by_hand():
    """0..15 in rows of four: the largest of each quarter are 5, 7, 13, 15, one for each place of
    the small map's four channels; averages would be 2.5, 4.5, 10.5, 12.5.
    """
    large = torch.arange(16.0).view(1, 1, 4, 4)
    places = torch.eye(4).view(1, 4, 2, 2)
    close(fsp_matrix(large, places), torch.tensor([[[5.0, 7.0, 13.0, 15.0]]]) / 4)
    close(fsp_matrix(places, large), torch.tensor([[[5.0], [7.0], [13.0], [15.0]]]) / 4)


@pytest.mark.parametrize("ratio", [2, 4])
def test_whole_ratios_are_plain_max_pooling(ratio: int):
    """Of negative maps too."""
    large, small = noise(2, 3, 4 * ratio, 4 * ratio) - 2, noise(2, 5, 4, 4)
    pooled = F.max_pool2d(large, ratio)
    close(fsp_matrix(large, small), torch.einsum("nchw,ndhw->ncd", pooled, small) / 16)


def test_other_ratios_meet_at_the_smaller_height_and_width():
    """3 x 4 and 6 x 2 meet at 3 x 2: each is pooled along one of its sides."""
    wide, high = noise(2, 3, 3, 4), noise(2, 5, 6, 2, seed=1)
    pooled = F.max_pool2d(wide, (1, 2)), F.max_pool2d(high, (2, 1))
    close(fsp_matrix(wide, high), torch.einsum("nchw,ndhw->ncd", *pooled) / 6)
    assert fsp_matrix(noise(2, 3, 7, 7), noise(2, 5, 3, 3)).shape == (2, 3, 5)


def test_places_moved_alike_in_both_maps_leave_the_matrix():
    front, back = noise(2, 3, 4, 4), noise(2, 5, 4, 4, seed=1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    moved = [x.flatten(2)[:, :, order].view_as(x) for x in (front, back)]
    close(fsp_matrix(*moved), fsp_matrix(front, back))
    assert (fsp_matrix(moved[0], back) - fsp_matrix(front, back)).abs().max() > 0.1


def test_the_matrix_is_bilinear_and_turns_with_its_maps():
    front, back = noise(2, 3, 4, 4), noise(2, 5, 4, 4, seed=1)
    close(fsp_matrix(-2 * front, 3 * back), -6 * fsp_matrix(front, back))
    close(fsp_matrix(back, front), fsp_matrix(front, back).mT)


def test_an_image_has_its_own_matrix():
    front, back = noise(3, 2, 4, 4), noise(3, 5, 2, 2, seed=1)
    for i in range(3):
        close(fsp_matrix(front, back)[i : i + 1], fsp_matrix(front[i : i + 1], back[i : i + 1]))


# --- the loss of the init phase


def test_the_loss_by_hand():
    """Against zero, (1.25^2 + 1.5^2 + 2.5^2 + 0 + 0.5^2 + 0.5^2) / 2 = 5.28125, times 1 / 1000."""
    dead = [torch.zeros_like(FRONT), torch.zeros_like(BACK)]
    found = two_stages().init_loss(outputs(dead, [FRONT, BACK]))
    assert list(found) == ["fsp"]
    close(found["fsp"].item(), 5.28125e-3)
    close(two_stages(beta=2.0).init_loss(outputs([FRONT, BACK], dead))["fsp"].item(), 10.5625)


def test_it_is_averaged_over_images_and_summed_over_entries():
    """Of four images one has the teacher's matrix; doubled channels make four times the entries."""
    teacher = [x.repeat(4, 2, 1, 1) for x in (FRONT, BACK)]
    mapped = [x * torch.tensor([1.0, 0.0, 0.0, 0.0]).view(4, 1, 1, 1) for x in teacher]
    found = two_stages(beta=1.0).init_loss(outputs(mapped, teacher))
    close(found["fsp"].item(), 5.28125 * 4 * 3 / 4)


def test_the_difference_of_matrices_counts_and_not_that_of_maps():
    """Both maps negated: the same matrix. One of them: twice as far as 0, four times the cost."""
    method = two_stages(beta=1.0)
    assert method.init_loss(outputs([-FRONT, -BACK], [FRONT, BACK]))["fsp"] == 0
    found = method.init_loss(outputs([-FRONT, BACK], [FRONT, BACK]))
    close(found["fsp"].item(), 4 * 5.28125)


@pytest.mark.parametrize(("stage", "matrices"), [(0, 1), (1, 2), (2, 1)])
def test_neighbours_are_compared_and_all_weigh_the_same(stage: int, matrices: int):
    """A dead first or last map is in one of two matrices, the middle one in both."""
    maps = [FRONT, BACK, FRONT]
    mapped = [torch.zeros_like(x) if i == stage else x for i, x in enumerate(maps)]
    found = fsp(beta=1.0).init_loss(outputs(mapped, maps))
    close(found["fsp"].item(), matrices * 5.28125)


def test_equal_maps_cost_nothing_and_move_nothing():
    mapped = [x.clone().requires_grad_() for x in (FRONT, BACK, FRONT)]
    found = fsp(beta=1.0).init_loss(outputs(mapped, [FRONT, BACK, FRONT]))["fsp"]
    found.backward()
    assert found == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in mapped)


def test_teacher_and_student_may_have_maps_of_other_sizes():
    """Every place four times is the same mean over places."""
    large = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (FRONT, BACK)]
    close(two_stages().init_loss(outputs(large, [FRONT, BACK]))["fsp"].item(), 0.0)
    close(two_stages().init_loss(outputs([large[0], BACK], [FRONT, BACK]))["fsp"].item(), 0.0)


def test_half_the_images_on_each_of_two_ranks_have_the_same_mean():
    mapped, teacher = ([noise(4, c, 4, 4, seed=s + c) for c in (2, 3)] for s in (0, 10))
    method = two_stages()
    whole = method.init_loss(outputs(mapped, teacher))["fsp"]
    halves = [
        method.init_loss(outputs([x[part] for x in mapped], [x[part] for x in teacher]))["fsp"]
        for part in (slice(0, 2), slice(2, 4))
    ]
    close(torch.stack(halves).mean(), whole)


def test_dead_and_huge_maps_have_finite_gradients():
    for factor in (0.0, 1e4):
        mapped = [(factor * x).requires_grad_() for x in (FRONT, BACK)]
        found = two_stages().init_loss(outputs(mapped, [FRONT, BACK]))["fsp"]
        found.backward()
        assert found.isfinite()
        assert all(x.grad.isfinite().all() for x in mapped)


@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, torch.ones_like, lambda x: x[:1].expand_as(x)],
    ids=["black", "constant", "one image again and again"],
)
def test_images_without_variety_have_finite_losses_and_gradients(change: Any):
    method = fsp()
    batch = images()
    found = method.init_loss(method.init_forward(batch._replace(image=change(batch.image)), START))
    found["fsp"].backward()
    assert found["fsp"].isfinite()
    reached = [p.grad for p in method.parameters() if p.grad is not None]
    assert reached and all(g.isfinite().all() for g in reached)


def test_no_gradient_reaches_the_teacher():
    mapped, teacher = ([x.clone().requires_grad_() for x in (FRONT, 2 * BACK)] for _ in range(2))
    with torch.no_grad():
        mapped[0] += 1
    two_stages().init_loss(outputs(mapped, teacher))["fsp"].backward()
    assert all(x.grad.abs().sum() > 0 for x in mapped)
    assert all(x.grad is None for x in teacher)


def test_matrices_of_half_precision_maps_are_computed_in_float32():
    """0.1 in bf16 is 0.10009766; squared in bf16 it would be 0.01001 to three digits only."""
    x = torch.full((1, 1, 2, 2), 0.1, dtype=torch.bfloat16)
    dead = [torch.zeros(1, 1, 2, 2)] * 2
    found = two_stages(beta=1.0).init_loss(outputs(dead, [x, x]))["fsp"]
    assert found.dtype == torch.float32
    close(found.item(), 0.10009765625**4 / 2, rtol=1e-6, atol=0)
    method = fsp(width=4)
    method.student.precision = torch.bfloat16
    out = method.init_forward(images(), START)
    assert out.students[0].features["stage1"].dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in out.mapped)


# --- connectors


def test_the_students_maps_go_through_connectors_to_the_teachers_width():
    method = fsp().eval()
    out = method.init_forward(images(), START)
    assert [x.shape for x in out.mapped] == [(4, 6, 8, 8), (4, 12, 4, 4), (4, 12, 2, 2)]
    for i, (layer, mapped) in enumerate(zip(method.connectors, out.mapped, strict=True), start=1):
        assert isinstance(layer, nn.Sequential)
        close(mapped, layer(out.students[0][f"stage{i}"]))


def test_equal_widths_need_no_connectors():
    method = fsp(width=4)
    assert len(list(method.parameters())) == len(list(method.student.parameters()))
    out = method.init_forward(images(), START)
    for i, mapped in enumerate(out.mapped, start=1):
        assert torch.equal(mapped, out.students[0][f"stage{i}"])


# --- the two phases


def test_the_phases_are_as_published():
    init, distill = fsp().phases()
    assert (init.name, init.epochs, distill.name, distill.epochs) == ("init", 40, "distill", 100)
    assert init.predictors() == {}
    assert distill.predictors is None
    names = [[u.name for t in p.turns for u in t.updates] for p in (init, distill)]
    assert names == [["init"], ["student"]]


def test_the_init_phase_trains_backbone_and_connectors_and_the_second_the_student():
    """With weight decay on: what a phase does not train keeps every bit."""
    method = fsp()
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
    method = fsp()
    before, teacher = state_of(method), state_of(method.teachers[0])
    for moment in Training(method, ToyImages(), pace(method, 1)).run():
        if moment.phase == "distill":
            break
        averages = {k for k in before if k.startswith("students") and k.endswith("running_mean")}
        assert averages and averages < changed(before, state_of(method))
        assert not any(m.training for m in method.teachers[0].modules())
    assert not changed(teacher, state_of(method.teachers[0]))


def test_the_second_phase_is_the_students_own_and_no_teacher_runs():
    method = fsp()
    training = Training(method, ToyImages(), pace(method, 1))
    runs: list[str] = []
    method.teachers[0].module.register_forward_hook(lambda *_: runs.append(training.phase.name))
    terms = {moment.phase: list(moment.terms) for moment in training.run()}
    assert terms == {"init": ["fsp"], "distill": ["ce"]}
    assert runs == ["init"] * 4
    out = method(images(), START)
    assert type(out) is Outputs and out.teachers == []
    wanted = F.cross_entropy(out.students[0].logits, out.batch.label)
    assert torch.equal(method.loss(out)["ce"], wanted)


def test_momentum_starts_anew_in_the_second_phase():
    """A cross-entropy of no weight to speak of moves nothing by itself, without weight decay."""
    method = fsp(gamma=1e-30)
    at_rest = pace(method, 1, default=plan(weight_decay=0.0))
    training = Training(method, ToyImages(), at_rest)
    states = [state_of(method)]
    states += [state_of(method) for _ in training.run()]
    assert len(states) == 9 and changed(states[3], states[4])
    for key, p in method.named_parameters():
        close(p.detach(), states[4][key], rtol=0, atol=1e-20)


def test_kd_joins_the_second_phase_with_alpha():
    """kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2; at T = 2 the teacher's odds are sqrt(3) and 4 the
    factor.
    """
    method = fsp(gamma=3.0, alpha=5.0, temperature=1.0)
    found = method.loss(outputs([], []))
    assert list(found) == ["ce", "kd"]
    close(found["ce"].item(), 3 * math.log(2.0))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 5 * kl, atol=1e-6, rtol=0)
    q = math.sqrt(3) / (1 + math.sqrt(3))
    kl = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
    warm = fsp(alpha=1.0, temperature=2.0).loss(outputs([], []))
    close(warm["kd"].item(), 4 * kl, atol=1e-6, rtol=0)
    out = method(images(), START)
    assert len(out.teachers) == 1
    assert list(method.loss(out)) == ["ce", "kd"]


def test_the_defaults_are_those_of_the_comparison():
    method = fsp()
    assert (method.beta, method.gamma, method.alpha, method.temperature) == (1e-3, 1.0, 0.0, 4.0)


def test_a_second_phase_without_a_term_is_refused():
    with pytest.raises(MethodError) as error:
        fsp(gamma=0.0)
    assert str(error.value) == (
        "FSP needs labels or soft targets beside its own loss; give gamma or alpha a value above 0"
    )


def test_frozen_weights_are_left_out_of_both_phases():
    method = fsp()
    frozen = method.student.module.conv1.weight.requires_grad_(False)
    for phase in method.phases():
        (update,) = phase.turns[0].updates
        assert all(p is not frozen for p in update.parameters)


def test_it_reads_the_teachers_taps_and_the_logits_only_for_kd():
    assert fsp().reads == {"stage1", "stage2", "stage3"}
    assert two_stages(alpha=0.5).reads == {"stage1", "stage2", "logits"}


# --- networks


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(
    ("student", "teacher", "taps", "widths"),
    [
        ("wrn_16_1", "wrn_40_2", ["stage1:post", "stage2:post", "stage3:post"], [32, 64, 128]),
        ("wrn_10_4_mhgd", "wrn_22_4_mhgd", [f"stage{i}:post" for i in (1, 2, 3)], [64, 128, 256]),
        ("vgg8", "vgg8", [f"stage{i}" for i in (1, 2, 3, 4)], [128, 256, 512, 512]),
        (
            "vgg_student_mhgd",
            "vgg_teacher_mhgd",
            [f"stage{i}" for i in (1, 2, 3, 4, 5)],
            [64, 128, 256, 512, 512],
        ),
    ],
)
def test_real_networks_are_read_after_their_relus(
    student: str, teacher: str, taps: list[str], widths: list[int], size: int
):
    """2 matrices of three stages, 4 of the five of MHGD's VGGs; none of their entries is negative.

    The pairs of MHGD have equal widths and need no connectors.
    """
    method = real(student, teacher, size)
    assert [p.student for p in method.pairs] == [p.teacher for p in method.pairs] == taps
    found = method.teachers[0].probe()
    matrices = [fsp_matrix(found[a], found[b]) for a, b in pairwise(taps)]
    assert [m.shape for m in matrices] == [(2, *w) for w in pairwise(widths)]
    assert all(m.min() >= 0 for m in matrices)
    assert bool(list(method.connectors.parameters())) == (student == "wrn_16_1")


def test_the_loss_of_real_networks_is_that_of_loops_over_images_and_matrices():
    method = real("vgg_student_mhgd", "vgg_teacher_mhgd", 32, beta=1.0)
    out = method.init_forward(Batch(noise(2, 3, 32, 32), *[torch.zeros(2).long()] * 3), START)
    total = 0.0
    for front, back in pairwise(f"stage{i}" for i in (1, 2, 3, 4, 5)):
        for image in range(2):
            own, theirs = (
                fsp_matrix(net[front], net[back])[image]
                for net in (out.students[0], out.teachers[0])
            )
            total += (own - theirs).norm().item() ** 2 / 2 / 2
    close(method.init_loss(out)["fsp"].item(), total, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "behind"),
    [
        ("wrn_16_1", "wrn_40_2", {"fc"}),
        ("vgg_student_mhgd", "vgg_teacher_mhgd", {"fc1", "fc"}),
        ("mobilenetv2", "vgg8", {"conv2", "bn2", "fc"}),
    ],
)
def test_what_lies_behind_the_last_map_is_not_trained_in_the_init_phase(
    student: str, teacher: str, behind: set[str]
):
    method = real(student, teacher, 32)
    ((update,), (second,)) = (p.turns[0].updates for p in method.phases())
    named = list(method.student.module.named_parameters())
    trained = {id(p) for p in update.parameters}
    assert {k.split(".")[0] for k, p in named if id(p) not in trained} == behind
    everything = {id(p) for p in method.parameters()}
    assert trained == everything - {id(p) for k, p in named if k.split(".")[0] in behind}
    assert {id(p) for p in second.parameters} == {id(p) for p in method.student.parameters()}


def test_the_stem_joins_where_it_is_named():
    """As in the paper and RepDistiller: three matrices of four maps."""
    taps = ["stem", "stage1", "stage2", "stage3"]
    method = fsp(taps=taps)
    assert [p.teacher for p in method.pairs] == taps
    assert [x.shape[1] for x in method.init_forward(images(), START).mapped] == [6, 6, 12, 12]


def test_each_network_is_read_at_its_own_taps():
    method = fsp(taps=["stage1", "stage2"], teacher_taps=["stage2", "stage3"], beta=2.0).eval()
    assert method.reads == {"stage2", "stage3"}
    out = method.init_forward(images(), START)
    own, (teacher,) = out.students[0], out.teachers
    for tap, layer, mapped in zip(["stage1", "stage2"], method.connectors, out.mapped, strict=True):
        close(mapped, layer(own[tap]))
    difference = fsp_matrix(teacher["stage2"], teacher["stage3"]) - fsp_matrix(*out.mapped)
    close(method.init_loss(out)["fsp"], difference.square().sum() / 4)


# --- refusals


def test_a_single_map_is_refused():
    with pytest.raises(MethodError) as error:
        fsp(taps=["stage2"])
    assert str(error.value) == (
        "FSP relates consecutive feature maps, but there is only 'stage2' of the student with "
        "'stage2' of the teacher; name 2 or more with taps=[...] and teacher_taps=[...]"
    )


def test_a_network_of_one_stage_is_refused():
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    student = Net(nn.Sequential(*body), {"stage1": "0"}, (3, 8, 8))
    with pytest.raises(MethodError) as error:
        FSP([student], [toy_net(1)], ToyImages().spec())
    assert str(error.value) == (
        "FSP relates consecutive feature maps, but there is only 'stage1' of the student with "
        "'stage1' of the teacher; name 2 or more with taps=[...] and teacher_taps=[...]"
    )


def test_a_vector_is_refused():
    with pytest.raises(MethodError) as error:
        fsp(taps=["stage3", "embed"])
    assert str(error.value) == (
        "FSP needs feature maps (C, H, W), but 'embed' of the student is (8,); choose taps=[...] "
        "before the pooling"
    )


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = fsp(data, classes=9)
    assert list(method.init_loss(method.init_forward(images(), START))) == ["fsp"]
    assert list(method.loss(method(images(), START))) == ["ce"]
    with pytest.raises(MethodError) as error:
        fsp(data, classes=9, alpha=0.1)
    assert str(error.value) == (
        "FSP compares logits class by class, but teacher 0 has 9 classes and student 0 has 4; use "
        "a teacher trained on this data set, or a method that reads features"
    )
