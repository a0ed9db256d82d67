"""ReviewKD: HCL and a fusion by hand, the published sizes, the warm-up, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.connectors import Connected
from potstill.errors import MethodError, TapError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.reviewkd import ABF, ReviewKD, hierarchical_context
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

MAP = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
ZERO = torch.zeros(1, 1, 2, 2)
WARM = Progress(20, 20, 240, 240)


def reviewkd(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> ReviewKD:
    teacher = toy_net(1, width=6, classes=classes)
    return ReviewKD([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def outputs(mapped: list[Tensor], teacher: list[Tensor], progress: Progress = WARM) -> Connected:
    """A stage and the pooled vector. Two classes, label 0; the student is undecided, the teacher's
    softmax is (3/4, 1/4).
    """
    label = torch.tensor([0])
    features = dict(zip(("stage1:pre", "embed"), teacher, strict=True))
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]]), features)
    batch = Batch(torch.zeros(1, 1), label, label, label)
    own = Captured(torch.zeros(1, 2), {})
    return Connected(batch, progress, [own], [taught], mapped)


def images(n: int = 4) -> Batch:
    return next(ToyImages(n).clean(n))


# --- the hierarchical context loss


def test_a_map_of_two_rows_by_hand():
    """14 / 4 = 3.5 for the map and, with weight 1/2, 1.5^2 for its mean: 4.625 / 1.5."""
    close(hierarchical_context(MAP, ZERO).item(), 4.625 / 1.5)


def test_a_map_of_four_rows_by_hand():
    """One 4 among 16: 1 for the map, 1 / 4 averaged to 2x2 with weight 1/2, 0.25^2 averaged to 1x1
    with weight 1/4.
    """
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 3, 1] = 4.0
    close(hierarchical_context(x, 0 * x).item(), (1 + 0.25 / 2 + 0.0625 / 4) / 1.75)


def test_a_map_of_eight_rows_by_hand():
    """r / 64 for r in 0..63, as the specification has it."""
    ramp = torch.arange(64.0).view(1, 1, 8, 8) / 64
    close(hierarchical_context(ramp, 0 * ramp).item(), 0.316305, atol=1e-6, rtol=0)


def test_a_map_of_one_pixel_has_the_plain_mean():
    x = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    close(hierarchical_context(x, 0 * x).item(), 2.5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16, 32])
def test_a_constant_difference_costs_its_square(size: int):
    """At every size, as the weights are divided by their sum."""
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    close(hierarchical_context(x + 3, x).item(), 9.0, atol=1e-4, rtol=0)
    assert hierarchical_context(x, x) == 0


@pytest.mark.parametrize("size", [8, 16, 32])
def test_what_averages_out_is_seen_in_the_map_alone(size: int):
    """+1 and -1 in turn: 1 and three zeros, over 1.875, however large the map."""
    x = torch.ones(1, 1, size, size)
    x[..., 1::2] = -1
    close(hierarchical_context(x, 0 * x).item(), 1 / 1.875)


# --- the fusion


def fusion(out_size: int, gate: float) -> ABF:
    """One channel; convolutions that copy and, at the end, triple; gates sigmoid(+-gate)."""
    layer = ABF(1, 1, (1, out_size, out_size), fuse=True).eval()
    for norm in (layer.bn1, layer.bn2):
        norm.eps = 0.0
    nn.init.ones_(layer.conv1.weight)
    nn.init.zeros_(layer.conv2.weight)
    nn.init.zeros_(layer.attention.weight)
    with torch.no_grad():
        layer.conv2.weight[0, 0, 1, 1] = 3.0
        layer.attention.bias.copy_(torch.tensor([gate, -gate]))
    return layer


def test_a_fusion_by_hand():
    """Gates 3/4 and 1/4. The deeper 8 is spread over the map: 3/4 x + 2, handed on as it is, and
    three times that to compare.
    """
    compared, passed = fusion(2, math.log(3.0))(MAP, torch.full((1, 1, 1, 1), 8.0))
    close(passed, 0.75 * MAP + 2)
    close(compared, 3 * passed)


def test_both_resizings_take_the_nearest_value():
    """The deeper 2x2 map and the fused 4x4 one, in blocks; then every second value."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    _, passed = fusion(8, 0.0)(x, MAP)
    fused = 0.5 * x + 0.5 * MAP.repeat_interleave(2, 2).repeat_interleave(2, 3)
    close(passed, fused.repeat_interleave(2, 2).repeat_interleave(2, 3))
    _, passed = fusion(2, 0.0)(x, MAP)
    close(passed, fused[..., ::2, ::2])


def test_the_attention_sees_both_maps():
    """A gate that only the deeper map opens: sigmoid(8) and sigmoid(-8)."""
    layer = fusion(2, 0.0)
    with torch.no_grad():
        layer.attention.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, -1.0]]).view(2, 2, 1, 1))
    _, passed = layer(MAP, torch.full((1, 1, 1, 1), 8.0))
    open_, shut = (torch.tensor(v).sigmoid() for v in (8.0, -8.0))
    close(passed, open_ * MAP + shut * 8)


def test_the_deepest_level_is_not_fused():
    layer = ABF(2, 3, (5, 1, 1), fuse=False)
    assert layer.attention is None
    compared, passed = layer(torch.rand(4, 2, 1, 1), None)
    assert (compared.shape, passed.shape) == ((4, 5, 1, 1), (4, 3, 1, 1))


def test_convolutions_start_uniform_with_the_variance_of_a_linear_layer():
    """Kaiming with a = 1: within +-sqrt(3 / fan in), sqrt(3 / 64) and sqrt(3 / 576)."""
    torch.manual_seed(0)
    layer = ABF(64, 64, (64, 1, 1), fuse=True)
    for conv, fan_in in ((layer.conv1, 64), (layer.conv2, 576)):
        bound = math.sqrt(3 / fan_in)
        assert 0.99 * bound < conv.weight.abs().max() <= bound
        assert conv.bias is None


# --- the method


def test_terms_by_hand():
    """4.625 / 1.5 for the stage, (1 + 4) / 2 for the vector; beta 1 by default; ce = ln 2."""
    vector = torch.tensor([1.0, 2.0])
    out = outputs([MAP, vector.view(1, 2, 1, 1)], [ZERO, torch.zeros(1, 2)])
    found = reviewkd(taps=["stage1"]).loss(out)
    assert list(found) == ["ce", "review"]
    close(found["ce"].item(), math.log(2.0))
    close(found["review"].item(), 4.625 / 1.5 + 2.5)


def test_weights_multiply_and_kd_joins_with_alpha():
    """kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2."""
    method = reviewkd(taps=["stage1"], beta=2.0, gamma=3.0, alpha=5.0, temperature=1.0)
    found = method.loss(outputs([MAP, ZERO[..., :1, :1]], [ZERO, torch.zeros(1, 1)]))
    assert list(found) == ["ce", "kd", "review"]
    close(found["ce"].item(), 3 * math.log(2.0))
    close(found["review"].item(), 2 * 4.625 / 1.5)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 5 * kl, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("step", "steps", "factor"),
    [
        (0, 2400, 0.0),
        (9, 2400, 0.0),  # the last step of the first of 240 epochs
        (10, 2400, 0.05),
        (100, 2400, 0.5),
        (109, 2400, 0.5),
        (199, 2400, 0.95),
        (200, 2400, 1.0),
        (2399, 2400, 1.0),
        (0, 24, 0.0),  # a tenth of the length: ten epochs a step
        (1, 24, 0.5),
        (2, 24, 1.0),
    ],
)
def test_the_warm_up_follows_whole_published_epochs(step: int, steps: int, factor: float):
    progress = Progress(0, step, steps, 240)
    out = outputs([MAP, ZERO[..., :1, :1]], [ZERO, torch.zeros(1, 1)], progress)
    close(reviewkd(taps=["stage1"]).loss(out)["review"].item(), factor * 4.625 / 1.5)


def test_a_warm_up_of_no_epochs_is_none():
    out = outputs([MAP, ZERO[..., :1, :1]], [ZERO, torch.zeros(1, 1)], Progress(0, 0, 240, 240))
    found = reviewkd(taps=["stage1"], warmup_epochs=0).loss(out)
    close(found["review"].item(), 4.625 / 1.5)


@pytest.mark.parametrize(
    ("student", "teacher", "count"),
    [
        ("resnet20", "resnet56", 114_278),
        ("wrn_16_2", "wrn_40_2", 453_830),
        ("wrn_40_1", "wrn_40_2", 216_006),
        ("resnet8x4", "resnet32x4", 1_808_774),
    ],
)
def test_the_published_parameter_counts(student: str, teacher: str, count: int):
    data = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    method = ReviewKD([build(student)], [build(teacher)], data)
    assert sum(p.numel() for p in method.fusions.parameters()) == count


LISTS = {
    ("resnet20", "resnet56"): ([16, 32, 64, 64], [32, 16, 8, 1], [16, 32, 64, 64], [32, 16, 8, 1]),
    ("shufflenetv1", "wrn_40_2"): (
        [240, 480, 960, 960], [16, 8, 4, 1], [32, 64, 128, 128], [32, 16, 8, 1],
    ),
    ("shufflenetv1", "resnet32x4"): (
        [240, 480, 960, 960], [16, 8, 4, 1], [64, 128, 256, 256], [32, 16, 8, 1],
    ),
    ("shufflenetv2", "resnet32x4"): (
        [116, 232, 464, 1024], [16, 8, 4, 1], [64, 128, 256, 256], [32, 16, 8, 1],
    ),
    ("vgg8", "vgg13"): (
        [128, 256, 512, 512, 512], [16, 8, 4, 4, 1], [128, 256, 512, 512, 512], [16, 8, 4, 4, 1],
    ),
    ("vgg8", "resnet50"): (
        [128, 256, 512, 512, 512], [16, 8, 4, 4, 1],
        [256, 512, 1024, 2048, 2048], [32, 16, 8, 4, 1],
    ),
    ("mobilenetv2", "resnet50"): (
        [12, 16, 48, 160, 1280], [16, 8, 4, 2, 1],
        [256, 512, 1024, 2048, 2048], [32, 16, 8, 4, 1],
    ),
    ("mobilenetv2", "vgg13"): (
        [12, 16, 48, 160, 1280], [16, 8, 4, 2, 1], [128, 256, 512, 512, 512], [16, 8, 4, 4, 1],
    ),
}  # fmt: skip
"""Channels and sizes, from the first stage to the pooled vector, of student and teacher."""


@pytest.mark.parametrize(("pair", "lists"), LISTS.items(), ids=map("<-".join, LISTS))
def test_the_published_levels(pair: tuple[str, str], lists: tuple[list[int], ...]):
    """Read without weights: shapes are all that is asked. The middle width is at most 512."""
    data = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    with torch.device("meta"):
        method = ReviewKD([build(pair[0])], [build(pair[1])], data)
    own, other = [lv.shape for lv in method.levels], [lv.teacher_shape for lv in method.levels]
    found = [c for c, _, _ in own], [h for _, h, _ in own], [c for c, _, _ in other]
    assert (*found, [h for _, h, _ in other]) == lists
    assert {f.conv1.out_channels for f in method.fusions} == {min(512, lists[0][-1])}


def test_fusions_give_the_teachers_shapes():
    """Of every level, whichever side has the larger maps."""
    for student, teacher in (("resnet8", "shufflenetv1"), ("shufflenetv1", "resnet8")):
        shape = (3, 16, 16)
        data = ToyImages().spec()._replace(input_shape=shape)
        method = ReviewKD([build(student, 4, shape)], [build(teacher, 4, shape)], data)
        label = torch.zeros(2, dtype=torch.int64)
        out = method(Batch(torch.rand(2, *shape), label, label, label), WARM)
        shapes = [tuple(mapped.shape[1:]) for mapped in out.mapped]
        assert shapes == [level.teacher_shape for level in method.levels]
        assert method.loss(out)["review"] > 0


def test_the_student_is_read_after_its_relus_and_the_teacher_before():
    method = reviewkd()
    assert [(level.student, level.teacher) for level in method.levels] == [
        ("stage1", "stage1:pre"),
        ("stage2", "stage2:pre"),
        ("stage3", "stage3:pre"),
        ("embed", "embed"),
    ]


def test_deeper_levels_are_reviewed_in_all_the_shallower_ones():
    """The deepest level's first layer reaches every level; the first stage's only its own."""
    method = reviewkd()
    out = method(images(), WARM)
    for layer, reached in ((3, [True, True, True, True]), (0, [True, False, False, False])):
        weight = method.fusions[layer].conv1.weight
        found = [
            torch.autograd.grad(x.square().sum(), weight, retain_graph=True, allow_unused=True)[0]
            for x in out.mapped
        ]
        assert [g is not None for g in found] == reached


def test_what_is_handed_up_is_not_what_is_compared():
    """The deepest level's second layer reaches its own level alone."""
    method = reviewkd()
    out = method(images(), WARM)
    weight = method.fusions[3].conv2.weight
    found = [
        torch.autograd.grad(x.square().sum(), weight, retain_graph=True, allow_unused=True)[0]
        for x in out.mapped
    ]
    assert [g is not None for g in found] == [False, False, False, True]


def test_no_gradient_reaches_the_teacher():
    mapped = [MAP.clone().requires_grad_(), torch.ones(1, 2, 1, 1, requires_grad=True)]
    taught = [ZERO.clone().requires_grad_(), torch.zeros(1, 2, requires_grad=True)]
    sum(reviewkd(taps=["stage1"], alpha=1.0).loss(outputs(mapped, taught)).values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in mapped)
    assert all(x.grad is None for x in taught)


def test_the_teacher_normalises_by_the_batch_and_keeps_its_averages():
    by_batch, running = reviewkd(), reviewkd(teacher_statistics="running")
    before = {k: v.clone() for k, v in by_batch.teachers[0].state_dict().items()}
    batch = images(16)
    one, other = (m(batch, WARM).teachers[0]["stage3:pre"] for m in (by_batch, running))
    assert (one - other).abs().max() > 0.1
    close(other, running.teachers[0](batch.image)["stage3:pre"])
    after = by_batch.teachers[0].state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_it_reads_the_teachers_levels_and_the_logits_only_for_kd():
    assert reviewkd().reads == {"stage1:pre", "stage2:pre", "stage3:pre", "embed"}
    assert reviewkd(alpha=0.5, taps=["stage1"]).reads == {"stage1:pre", "embed", "logits"}


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = reviewkd(data, classes=9)
    assert list(method.loss(method(images(), WARM))) == ["ce", "review"]
    with pytest.raises(MethodError, match="ReviewKD compares logits class by class"):
        reviewkd(data, classes=9, alpha=0.1)


def test_an_unknown_tap_is_refused_with_those_that_exist():
    with pytest.raises(TapError) as error:
        reviewkd(taps=["stage4"])
    assert str(error.value) == (
        "the student: no feature 'stage4'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        '"stage3"?; choose taps=[...]'
    )


class Convolutional(nn.Module):
    """A classifier without a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.conv2 = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)).mean((2, 3))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("taps", [{"stage1": "conv1"}, {"stage1": "conv1", "embed": "conv2"}])
def test_a_network_without_a_pooled_vector_is_refused(role: str, taps: dict[str, str]):
    nets = {
        "student": toy_net(0),
        "teacher": toy_net(1),
        role: Net(Convolutional(), taps, (3, 8, 8)),
    }
    with pytest.raises(MethodError) as error:
        ReviewKD(
            [nets["student"]], [nets["teacher"]], ToyImages().spec(), 1.0,
            taps=["stage1"], teacher_taps=["stage1"],
        )  # fmt: skip
    assert str(error.value) == (
        f"ReviewKD compares pooled vectors beside the maps, and the {role} has no vector 'embed'; "
        "name what its classifier reads with Net(..., taps={'embed': place})"
    )


def test_a_last_batch_of_one_image_is_refused():
    """BatchNorm cannot normalise one value, which is all that one vector has in a channel."""
    data = ToyImages(33).spec()
    with pytest.raises(MethodError, match="the last batch of an epoch gives each of 1 rank only"):
        reviewkd(data)
    reviewkd(data._replace(drop_last=True))
    with pytest.raises(MethodError, match="a batch gives each of 1 rank only one; make"):
        reviewkd(data._replace(batch_size=1))


def test_a_warm_up_of_negative_length_is_refused():
    """It would maximise the review term."""
    with pytest.raises(MethodError) as error:
        reviewkd(warmup_epochs=-1)
    assert str(error.value) == "ReviewKD: warmup_epochs is -1; choose 0 or more"
