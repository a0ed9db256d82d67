"""AFD with attention: distances, weights and loss by hand, its taps, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.errors import MethodError, TapError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.afd_attention import (
    AFDAttention,
    Attended,
    Attention,
    energy_distances,
)
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close
START = Progress(0, 0, 1, 1)


def afd(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> AFDAttention:
    torch.manual_seed(2)
    teacher = toy_net(1, width=6, classes=classes)
    return AFDAttention([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def outputs(weights: Tensor, student: list[Tensor], teacher: list[Tensor]) -> Attended:
    """Two classes, label 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    n = len(weights)
    label = torch.zeros(n, dtype=torch.int64)
    own, other = (
        {f"stage{i}": x for i, x in enumerate(maps, start=1)} for maps in (student, teacher)
    )
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]] * n), other)
    batch, learnt = Batch(torch.zeros(n, 1), label, label, label), Captured(torch.zeros(n, 2), own)
    return Attended(batch, START, [learnt], [taught], weights)


def with_energy(*rows: list[float]) -> Tensor:
    """One image, one channel, whose squares are these. -> (1, 1, H, W)"""
    return torch.tensor(rows).sqrt()[None, None]


POINT = with_energy([1.0, 0.0], [0.0, 0.0])
"""Its unit map has cosines with (0.6, 0.8, 0, 0) and (0.2, ...) of 0.6 and 0.2, so distances
(2 - 2 * 0.6) / 4 = 0.2 and (2 - 2 * 0.2) / 4 = 0.4."""
NEAR, FAR = with_energy([0.6, 0.8], [0.0, 0.0]), with_energy([0.2, 0.0], [math.sqrt(0.96), 0.0])


def test_a_distance_by_hand():
    """(1, 4, 0, 0) / sqrt 17 and (1, 0, 0, 1) / sqrt 2: (2 - 2 / sqrt 34) / 4 = 0.414251."""
    student, teacher = with_energy([1.0, 4.0], [0.0, 0.0]), with_energy([1.0, 0.0], [0.0, 1.0])
    found = energy_distances([student], [teacher])
    assert found.shape == (1, 1, 1)
    close(found.item(), (2 - 2 / math.sqrt(34)) / 4)
    close(found.item(), 0.414251, atol=1e-6, rtol=0)


def test_terms_by_hand():
    """0.25 * 0.2 + 0.75 * 0.4 = 0.35, times beta = 200; ce = ln 2, kl with its weight of 0.9."""
    method = afd(taps=["stage1", "stage2"], teacher_taps=["stage1"], temperature=1.0)
    found = method.loss(outputs(torch.tensor([[[0.25, 0.75]]]), [NEAR, FAR], [POINT]))
    assert list(found) == ["ce", "kd", "afd"]
    close(found["afd"].item(), 200 * 0.35, rtol=1e-6, atol=0)
    close(found["ce"].item(), math.log(2.0))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 0.9 * kl, rtol=1e-5, atol=0)


def test_the_teachers_taps_add_up_and_images_are_averaged():
    """Of two teacher maps the second is twice as far from the only student map: 0.2 + 0.4. In a
    batch of two images, of which one is matched in both, half of it.
    """
    method = afd(beta=1.0, taps=["stage1"], teacher_taps=["stage1", "stage2"])
    found = method.loss(outputs(torch.ones(1, 2, 1), [POINT], [NEAR, FAR]))
    close(found["afd"].item(), 0.6, rtol=1e-6, atol=0)
    both = [torch.cat([x, POINT]) for x in (NEAR, FAR)]
    found = method.loss(outputs(torch.ones(2, 2, 1), [torch.cat([POINT, POINT])], both))
    close(found["afd"].item(), 0.3, rtol=1e-6, atol=0)


def test_weights_multiply_and_alpha_0_leaves_kd_out():
    method = afd(beta=3.0, gamma=2.0, alpha=0.0, taps=["stage1"], teacher_taps=["stage1"])
    found = method.loss(outputs(torch.ones(1, 1, 1), [NEAR], [POINT]))
    assert list(found) == ["ce", "afd"]
    close(found["ce"].item(), 2 * math.log(2.0))
    close(found["afd"].item(), 0.6, rtol=1e-6, atol=0)


def test_a_larger_student_map_is_averaged_after_squaring():
    """Energies (1, 9 | 0, 0) over (0, 0 | 1, 1) average to (5, 0; 0, 1), of unit length over
    sqrt 26; against (1, 0; 0, 0) the cosine is 5 / sqrt 26. The second channel's sign is squared
    away, and two equal channels have the mean of one.
    """
    rows = with_energy([1.0, 9.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0])
    student = torch.cat([rows, -rows], 1)
    found = energy_distances([student], [POINT]).item()
    close(found, (2 - 2 * 5 / math.sqrt(26)) / 4, rtol=1e-5, atol=0)


def test_a_smaller_student_map_is_repeated():
    """One pixel becomes (1, 1; 1, 1) / 2, whose cosine with (1, 0; 0, 0) is 1/2: (2 - 1) / 4."""
    close(energy_distances([torch.full((1, 3, 1, 1), 7.0)], [POINT]).item(), 0.25)


def test_every_pair_is_in_its_place_whatever_the_sizes():
    """Sizes that alternate: each entry is what the pair alone gives."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 4), (5, 2, 2), (3, 4, 4), (2, 4, 4), (4, 8, 8)]
    own, other = (
        [torch.randn(2, *shape, generator=generator) for shape in order]
        for order in (shapes, [*shapes[1:], shapes[0], shapes[2]])
    )
    found = energy_distances(own, other)
    assert found.shape == (2, 6, 5)
    for t, y in enumerate(other):
        for s, x in enumerate(own):
            close(found[:, t, s], energy_distances([x], [y])[:, 0, 0])


def test_proportional_energies_cost_nothing_and_channels_have_no_order():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 4, 3, 3, generator=generator)
    teacher = 1e-3 * student.square().sum(1, keepdim=True).sqrt()
    close(energy_distances([student], [teacher]), torch.zeros(2, 1, 1), atol=1e-12, rtol=0)
    other = torch.randn(2, 5, 3, 3, generator=generator)
    close(
        energy_distances([student.flip(1)], [other.flip(1)]), energy_distances([student], [other])
    )


def test_maps_of_zeros_have_finite_gradients():
    dead = torch.zeros(1, 2, 2, 2, requires_grad=True)
    found = energy_distances([dead], [POINT])
    close(found.item(), 0.25)  # |unit vector|^2 / 4
    found.sum().backward()
    assert dead.grad.isfinite().all()


def test_the_attention_by_hand():
    """q = 4, all weights 1 but the bilinear's, which is twice the unit matrix. The teacher's mean
    1/2 gives Q = 1/2; the student's 1 and -1 give K = 1 and 0, B(K) = 2 and 0, so contents
    4 * 2 * 1/2 = 4 and 0; positions 1 and (0, 1/4) give 0 and 1. Over sqrt q: 2 and 1/2.
    """
    attention = Attention([1, 1], [1], q=4).eval()
    for module in attention.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eps = 0.0
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight), nn.init.zeros_(module.bias)
    with torch.no_grad():
        attention.bilinear.weight.copy_(2 * torch.eye(4))
        attention.teacher_position.fill_(1.0)
        attention.position.copy_(torch.tensor([[0.0] * 4, [0.25] * 4]))
    found = attention([torch.tensor([[1.0]]), torch.tensor([[-1.0]])], [torch.tensor([[0.5]])])
    close(found, torch.tensor([2.0, 0.5]).softmax(0).view(1, 1, 2))


def test_the_attention_is_the_papers_tap_by_tap():
    """With a BatchNorm for each tap, and loops: queries and keys are normalised over images, the
    bilinear form over images and the student's taps together.
    """
    torch.manual_seed(0)
    b, q, widths, teacher_widths = 5, 4, [3, 2, 6], [4, 7]
    s, t = len(widths), len(teacher_widths)
    attention = Attention(widths, teacher_widths, q).double()
    for p in attention.parameters():
        nn.init.normal_(p)
    means, teacher_means = (
        [torch.randn(b, c, dtype=torch.float64) for c in given]
        for given in (widths, teacher_widths)
    )

    def normalised(x: Tensor, norm: nn.BatchNorm1d, tap: int) -> Tensor:
        own = slice(tap * q, tap * q + q)
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + norm.eps).sqrt()
        return x * norm.weight[own] + norm.bias[own]

    query = [
        normalised(linear(x), attention.query_norm, i)
        for i, (linear, x) in enumerate(zip(attention.queries, teacher_means, strict=True))
    ]
    key = [
        normalised(linear(x), attention.key_norm, i).relu()
        for i, (linear, x) in enumerate(zip(attention.keys, means, strict=True))
    ]
    mixed = attention.bilinear(torch.cat(key))  # (S * B, T * q)
    logits = torch.empty(b, t, s, dtype=torch.float64)
    for i in range(t):
        part = normalised(mixed[:, i * q : i * q + q], attention.bilinear_norm, i).view(s, b, q)
        place = attention.position @ attention.teacher_position[i]
        for j in range(s):
            logits[:, i, j] = (part[j] * query[i]).sum(1) + place[j]
    found = attention(means, teacher_means)
    close(found, (logits / 2).softmax(2))
    close(found.sum(2), torch.ones(b, t, dtype=torch.float64))


def test_one_map_of_the_student_has_all_the_weight():
    weights = afd(taps=["stage2"])(next(ToyImages().clean(16)), START).weights
    assert weights.shape == (16, 3, 1)
    assert (weights == 1).all()


def test_parameters_of_zero_weigh_all_maps_alike():
    method = afd()
    for p in method.attention.parameters():
        nn.init.zeros_(p)
    weights = method(next(ToyImages().clean(16)), START).weights
    close(weights, torch.full((16, 3, 3), 1 / 3))


def spec() -> DataSpec:
    images = torch.arange(128)
    mean, std = (0.0,) * 3, (1.0,) * 3
    return DataSpec(
        range(10), [range(10)], images, images % 10, 128, 64, False, (3, 32, 32), mean, std
    )


@pytest.mark.parametrize(
    ("student", "teacher", "maps", "teacher_maps", "parameters"),
    [("resnet20", "resnet56", 9, 27, 643_200), ("wrn_16_2", "wrn_40_2", 6, 18, 543_488)],
)
def test_published_pairs_have_the_published_size(
    student: str, teacher: str, maps: int, teacher_maps: int, parameters: int
):
    method = AFDAttention([build(student, 10)], [build(teacher, 10)], spec())
    assert method.taps == tuple(f"block{i}" for i in range(1, maps + 1))
    assert method.teacher_taps == tuple(f"block{i}" for i in range(1, teacher_maps + 1))
    assert sum(p.numel() for p in method.attention.parameters()) == parameters


def test_blocks_are_read_after_their_relu():
    method = AFDAttention([build("resnet8", 10)], [build("wrn_16_1", 10)], spec())
    assert [method.student.taps[tap] for tap in method.taps] == ["layer1.0", "layer2.0", "layer3.0"]
    assert [method.teachers[0].taps[tap] for tap in method.teacher_taps] == [
        "layer1.1.relu1",
        "layer2.0.relu1",
        "layer2.1.relu1",
        "layer3.0.relu1",
        "layer3.1.relu1",
        "relu",
    ]


def test_no_batch_norm_of_a_student_runs_twice():
    method = AFDAttention([build("wrn_16_1", 10)], [build("resnet8", 10)], spec())
    label = torch.zeros(2, dtype=torch.int64)
    method(Batch(torch.zeros(2, 3, 32, 32), label, label, label), START)
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {int(m.num_batches_tracked) for m in norms} == {1}


def line(n: int, taps: dict[str, str] | None = None, blocks: bool = True) -> Net:
    """A line of n 1x1 convolutions, each of which is a block."""
    torch.manual_seed(n)
    layers = [nn.Conv2d(4 if i else 3, 4, 1) for i in range(n)]
    parts = [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    names = [f"{i}" for i in range(n)] if blocks else []
    return Net(nn.Sequential(*parts), taps, (3, 8, 8), blocks=names)


@pytest.mark.parametrize(
    ("blocks", "read"),
    [
        (27, range(1, 28)),
        (28, range(2, 29, 2)),
        (29, range(1, 30, 2)),
        (54, range(2, 55, 2)),
        (55, range(1, 56, 3)),
    ],
)
def test_at_most_27_blocks_are_read_evenly_and_the_last_among_them(blocks: int, read: range):
    method = AFDAttention([line(2)], [line(blocks)], ToyImages().spec())
    assert method.teacher_taps == tuple(f"block{i}" for i in read)
    teacher = method.teachers[0]
    assert [teacher.taps[tap] for tap in method.teacher_taps] == [f"{i - 1}" for i in read]


def test_a_network_without_known_blocks_is_read_at_its_activated_stages():
    stages = {"stage1": "0", "stage2": "1", "stage2:post": "2"}
    method = AFDAttention([line(3, stages, blocks=False)], [toy_net(1)], ToyImages().spec())
    assert method.taps == ("stage1", "stage2:post")
    assert method.teacher_taps == ("block1", "block2", "block3")


def test_taps_given_may_be_blocks_or_any_others():
    method = afd(taps=["block3", "stem"], teacher_taps=["stage2"])
    assert method.taps == ("block3", "stem") and method.teacher_taps == ("stage2",)
    assert method.student.taps["block3"] == "layer3.0"
    assert "block1" not in method.student.taps
    out = method(next(ToyImages().clean(16)), START)
    assert out.weights.shape == (16, 1, 2)


def test_a_tap_of_ones_own_that_is_called_block1_is_never_mistaken():
    """Named, it is read; by default, where the first block is meant, it is in the way."""
    student = line(3, {"block1": "1"})
    method = AFDAttention([student], [toy_net(1)], ToyImages().spec(), taps=["block1"])
    assert student.taps["block1"] == "1" and method.taps == ("block1",)
    with pytest.raises(TapError) as caught:
        AFDAttention([line(3, {"block1": "1"})], [toy_net(1)], ToyImages().spec())
    assert str(caught.value) == (
        "the student: tap 'block1' is '1' already; give '0' another name; or choose taps=[...]"
    )


def test_gradients_reach_student_and_attention_but_no_teacher():
    method = afd(alpha=0.0, gamma=0.0)
    out = method(next(ToyImages().clean(16)), START)
    method.loss(out)["afd"].backward()
    assert method.student.module.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in method.attention.parameters())
    assert method.attention.position.grad.abs().sum() > 0
    student, teacher = NEAR.clone().requires_grad_(), POINT.clone().requires_grad_()
    one = afd(taps=["stage1"], teacher_taps=["stage1"])
    sum(one.loss(outputs(torch.ones(1, 1, 1), [student], [teacher])).values()).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_the_student_learns_through_the_weights_too():
    method = afd()
    out = method(next(ToyImages().clean(16)), START)
    (gradient,) = torch.autograd.grad(
        out.weights[..., 0].sum(), [method.student.module.conv1.weight]
    )
    assert gradient.abs().sum() > 0


def test_it_reads_the_teachers_taps_and_the_logits_only_for_kd():
    assert afd().reads == {"block1", "block2", "block3", "logits"}
    assert afd(alpha=0.0, teacher_taps=["stem"]).reads == {"stem"}


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = afd(data, classes=9, alpha=0.0)
    assert list(method.loss(method(next(ToyImages().clean(16)), START))) == ["ce", "afd"]
    with pytest.raises(MethodError, match="AFDAttention compares logits class by class"):
        afd(data, classes=9)


def test_a_batch_of_one_image_is_refused():
    with pytest.raises(MethodError) as caught:
        afd(ToyImages().spec(batch_size=1))
    assert str(caught.value) == (
        "AFDAttention normalises over the images of a rank, but a batch gives each of 1 rank only "
        "one; make data.batch_size larger"
    )
    with pytest.raises(MethodError) as caught:
        afd(ToyImages(65).spec())
    assert str(caught.value) == (
        "AFDAttention normalises over the images of a rank, but the last batch of an epoch gives "
        "each of 1 rank only one; set data.drop_last=true or another data.batch_size"
    )
    afd(ToyImages(65).spec(drop_last=True))


@pytest.mark.parametrize("side", ["taps", "teacher_taps"])
def test_taps_that_do_not_exist_or_are_no_maps_are_refused(side: str):
    role = "student" if side == "taps" else "teacher"
    with pytest.raises(TapError) as caught:
        afd(**{side: ["stage1", "block4"]})
    assert str(caught.value).startswith(f"the {role}: no feature 'block4'; this network has [")
    assert str(caught.value).endswith(f"; choose {side}=[...]")
    size = 8 if side == "taps" else 12
    with pytest.raises(MethodError) as refused:
        afd(**{side: ["embed"]})
    assert str(refused.value) == (
        f"AFDAttention needs feature maps (C, H, W), but 'embed' of the {role} is ({size},); "
        f"choose {side}=[...] before the pooling"
    )


def test_a_network_without_blocks_and_stages_is_refused():
    with pytest.raises(MethodError) as caught:
        AFDAttention([line(2, {"a": "0"}, blocks=False)], [toy_net(1)], ToyImages().spec())
    assert str(caught.value) == (
        "AFDAttention compares feature maps, and no stages of the student are known; choose "
        "taps=[...] among ['a']"
    )
    with pytest.raises(MethodError) as caught:
        afd(teacher_taps=[])
    assert str(caught.value) == "AFDAttention compares feature maps, and teacher_taps is empty"


def test_a_width_without_numbers_is_refused():
    with pytest.raises(MethodError) as caught:
        afd(q=0)
    assert str(caught.value) == "AFDAttention: q is 0; choose 1 or more, 128 as published"
