"""KD-SVD: relations by hand and by loops, what is summed, its taps, dead maps, its refusals."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.connectors import Connected
from potstill.errors import MethodError
from potstill.method import Batch, DataSpec, Method, Progress
from potstill.methods.kdsvd import KDSVD, compressed, relation, relation_distance
from potstill.methods.kdsvdf import KDSVDF
from potstill.models import build
from potstill.net import Captured, Net
from tests.methods.test_rkd import Live
from tests.test_singular import differences, with_values
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

START = Progress(0, 0, 100, 100)
NAMES = ["stage1", "stage2", "stage3", "stage4"]


def kdsvd(
    data: DataSpec | None = None, width: int = 6, classes: int = 4, **arguments: Any
) -> KDSVD:
    teacher = toy_net(1, width=width, classes=classes)
    return KDSVD([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def outputs(mapped: Sequence[Tensor], teacher: Sequence[Tensor]) -> Connected:
    """Two classes, labels 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    label = torch.zeros(len(mapped[0]), dtype=torch.int64)
    features = dict(zip(NAMES, teacher, strict=False))
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]]).repeat(len(label), 1), features)
    own = Captured(torch.zeros(len(label), 2), {})
    batch = Batch(torch.zeros(len(label), 1), label, label, label)
    return Connected(batch, START, [own], [taught], list(mapped))


def distance(
    mapped: Sequence[Tensor],
    teacher: Sequence[Tensor],
    method: type[KDSVD] = KDSVD,
    **arguments: Any,
) -> Tensor:
    """The transfer term of maps at the first taps."""
    built = method(
        [toy_net(0)], [toy_net(1)], ToyImages().spec(), taps=NAMES[: len(mapped)], **arguments
    )
    return built.loss(outputs(mapped, teacher))["svd"]


def pixels(*rows: Sequence[float]) -> Tensor:
    """A map of one image with a row a position. -> (1, D, P, 1)"""
    return torch.tensor(rows).mT[None, :, :, None]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


SIZES = [((4, 4, 3), (4, 3, 3)), ((5, 2, 2), (5, 3, 1)), ((3, 2, 3), (3, 2, 3))]
"""(D, H, W) of the student and the teacher: more positions than channels, fewer, others."""


def maps(images: int = 3, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """A student's, which have more positions, and a teacher's, at three taps; of both signs."""
    pairs = [
        (random(images, *own, seed=seed + i), random(images, *other, seed=seed + 9 + i))
        for i, (own, other) in enumerate(SIZES)
    ]
    return [own for own, _ in pairs], [other for _, other in pairs]


def vectors_by_loops(
    student: Tensor, teacher: Tensor, count: int, extra: int
) -> list[list[tuple[Tensor, Tensor]]]:
    """The page's steps 1 and 2: for each image and each of K, the student's vector and target."""
    found = []
    for own, other in zip(student, teacher, strict=True):
        _, sigma, targets = torch.linalg.svd(other.flatten(1).T, full_matrices=False)
        _, _, candidates = torch.linalg.svd(own.flatten(1).T, full_matrices=False)
        pairs = []
        for i in range(count):
            target = targets[i] if targets[i].sum() >= 0 else -targets[i]
            cosines = [(target @ v).item() for v in candidates[: count + extra]]
            best = max(range(len(cosines)), key=lambda j: abs(cosines[j]))
            chosen = candidates[best] if cosines[best] >= 0 else -candidates[best]
            weight = sigma[i] / sigma[:count].norm()
            pairs.append((weight * chosen, weight * target))
        found.append(pairs)
    return found


def relations_by_loops(
    student: Sequence[Tensor], teacher: Sequence[Tensor], count: int, extra: int, beta: float = 8.0
) -> Tensor:
    """The page's step 3 and loss, entry by entry."""
    taps = [vectors_by_loops(s, t, count, extra) for s, t in zip(student, teacher, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for front, back in itertools.pairwise(taps):
        for image_front, image_back in zip(front, back, strict=True):
            for (f, f_target), (b, b_target) in zip(image_front, image_back, strict=True):
                for d in range(len(b)):
                    for e in range(len(f)):
                        own = torch.exp(-((b[d] - f[e]) ** 2) / beta)
                        other = torch.exp(-((b_target[d] - f_target[e]) ** 2) / beta)
                        total = total + (own - other) ** 2
    return total


def gradients(loss: Callable[..., Tensor], student: Sequence[Tensor]) -> Sequence[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in student]
    return torch.autograd.grad(loss(leaves), leaves)


# --- by hand


def test_a_relation_by_hand():
    """exp(-(0.6 - 1)^2 / 8) = exp(-0.02) = 0.980199, then exp(-0.36 / 8), exp(-0.04 / 8) and
    exp(-0.64 / 8); a row an entry of the back vector, a column one of the front.
    """
    front, back = torch.tensor([[[1.0], [0.0], [0.0]]]), torch.tensor([[[0.6], [0.8]]])
    rows = [[-0.02, -0.045, -0.045], [-0.005, -0.08, -0.08]]
    close(relation(front, back)[0, :, :, 0], torch.tensor(rows).exp())
    close(relation(front, back)[0, 0, 0, 0].item(), 0.980199, atol=1e-6, rtol=0)
    close(relation(front, back, 2.0)[0, 0, 0, 0].item(), math.exp(-0.08))
    close(relation(3 * front, back)[0, 1, 0, 0].item(), math.exp(-(2.2**2) / 8))


def test_each_vector_is_related_to_the_one_of_its_rank():
    """Two vectors a tap: the first with the first, the second with the second; 1 if equal."""
    front, back = torch.tensor([[[2.0, 5.0]]]), torch.tensor([[[2.0, 5.0], [4.0, 5.0]]])
    close(relation(front, back), torch.tensor([[[[1.0, 1.0]], [[math.exp(-0.5), 1.0]]]]))


def test_the_student_chooses_its_nearest_vector_and_turns_it():
    """The teacher's one position is (0.6, 0.8); the student's vectors are (1, 0) and (0, 1), of
    cosines 0.6 and 0.8, so (0, 1), though the first is the larger: 2 to 1.
    """
    own, target = compressed(pixels([2.0, 0.0], [0.0, -1.0]), pixels([0.6, 0.8]))
    close(own, torch.tensor([[[0.0], [1.0]]]))
    close(target, torch.tensor([[[0.6], [0.8]]]))


def test_the_loss_by_hand():
    """Front (1, 0, 0) on both sides, back (0.6, 0.8) and (0, 1); exponents -0.02, -0.045 (twice),
    -0.005, -0.08 (twice) against -0.125, 0 (twice), 0, -0.125 (twice). Squared differences
    0.009546, 0.001936 (twice), 0.000025, 0.001650 (twice).
    """
    front = pixels([3.0, 0.0, 0.0])
    found = distance([front, pixels([2.0, 0.0], [0.0, -1.0])], [2 * front, pixels([0.6, 0.8])])
    close(found.item(), 0.016743, atol=1e-6, rtol=0)
    vectors = [torch.tensor(v)[None, :, None] for v in ([1.0, 0, 0], [0, 1.0], [0.6, 0.8])]
    found = relation_distance((vectors[0], vectors[0]), (vectors[1], vectors[2]))
    close(found.item(), 0.016743, atol=1e-6, rtol=0)


def test_images_and_taps_are_summed():
    """0.016743 for each of two images; with a third tap, that of the second pair too, where front
    is what was back: (0.6, 0.8) and (0, 1) against (1, 0, 0) is the same again.
    """
    front, own, other = pixels([3.0, 0, 0]), pixels([2.0, 0.0], [0.0, -1.0]), pixels([0.6, 0.8])
    mapped, teacher = [front, own], [front, other]
    twice = [[torch.cat([x, x]) for x in side] for side in (mapped, teacher)]
    close(distance(*twice).item(), 2 * 0.016743, atol=2e-6, rtol=0)
    found = distance([*mapped, front], [*teacher, front])
    close(found.item(), 2 * 0.016743, atol=2e-6, rtol=0)
    assert distance([front, front, own], [front, front, other]) < 0.017


def test_entries_are_summed():
    """Back (1, 0, ...) in the student and (0, 1, 0, ...) in the teacher, front (1): the relations
    differ in two entries, by 1 - exp(-1/8), however many channels there are.
    """
    front = pixels([1.0])
    for channels in (2, 7):
        axes = torch.eye(channels)
        own = torch.stack([2 * axes[0], torch.zeros(channels)], 1)[None, :, :, None]
        found = distance([front, own], [front, axes[1][None, :, None, None]], extra=0)
        close(found.item(), 2 * (1 - math.exp(-1 / 8)) ** 2)


def test_both_sides_are_weighted_by_the_teachers_values():
    """Teacher diag(4, 3): weights 0.8 and 0.6. Student diag(1, 2) has the same two directions in
    the other order, with other values; in the teacher's order, with its weights, both are equal.
    """
    own, target = compressed(pixels([1.0, 0.0], [0.0, 2.0]), pixels([4.0, 0.0], [0.0, 3.0]), 2)
    close(own, torch.tensor([[[0.8, 0.0], [0.0, 0.6]]]))
    close(target, own)


def test_the_published_defaults():
    method = kdsvd()
    assert (method.vectors, method.extra, method.bandwidth) == (1, 3, 8.0)
    assert (method.gamma, method.alpha, method.temperature) == (1.0, 0.0, 4.0)
    assert [(p.name, p.epochs) for p in method.phases()] == [("distill", 100)]
    assert [p.student for p in method.pairs] == ["stage1", "stage2", "stage3"]


def test_terms_by_hand():
    """ce = ln 2; kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2. The transfer has no weight."""
    front = pixels([3.0, 0.0, 0.0])
    out = outputs([front, pixels([2.0, 0.0], [0.0, -1.0])], [front, pixels([0.6, 0.8])])
    found = kdsvd(taps=NAMES[:2]).loss(out)
    assert list(found) == ["ce", "svd"]
    close(found["ce"].item(), math.log(2.0))
    found = kdsvd(taps=NAMES[:2], gamma=2.0, alpha=3.0, temperature=1.0).loss(out)
    assert list(found) == ["ce", "kd", "svd"]
    close(found["ce"].item(), 2 * math.log(2.0))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 3 * kl, atol=1e-6, rtol=0)
    close(found["svd"].item(), 0.016743, atol=1e-6, rtol=0)
    assert list(kdsvd(taps=NAMES[:2], gamma=0.0, alpha=1.0).loss(out)) == ["kd", "svd"]


# --- by loops, and in parts


@pytest.mark.parametrize(("count", "extra"), [(1, 3), (1, 0), (2, 1), (3, 0)])
def test_the_loss_is_that_of_loops_over_images_vectors_and_entries(count: int, extra: int):
    """Values and gradients in double, written from the paper's steps with torch.linalg.svd."""
    student, teacher = maps()
    arguments = {"vectors": count, "extra": extra, "bandwidth": 0.7}
    expected = relations_by_loops(student, teacher, count, extra, 0.7)
    close(distance(student, teacher, **arguments), expected, rtol=1e-10, atol=0)
    found = gradients(lambda s: distance(s, teacher, **arguments), student)
    expected = gradients(lambda s: relations_by_loops(s, teacher, count, extra, 0.7), student)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-3
        close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [6, 3], ids=["tall", "wide"])
def test_in_float32_gradients_of_maps_after_a_relu_are_right_to_a_thousandth(size: int):
    """Of the whole transfer with respect to the front map, by differences in double."""
    back, front_target, back_target = (
        random(1, d, size, size, seed=i).relu() for i, d in enumerate((9, 12, 9), start=1)
    )
    front = random(1, 12, size, size, seed=4).relu()
    front[:, 3] = 0
    target, other = (vectors_by_loops(x, x, 1, 0)[0][0][1] for x in (front_target, back_target))
    own_back = vectors_by_loops(back, back_target, 1, 3)[0][0][0]
    expected_relation = torch.exp(-(other[:, None] - target).square() / 8)

    def reference(x: Tensor) -> Tensor:
        candidates = torch.linalg.svd(x.flatten(2).mT, full_matrices=False).Vh[:, :4]
        cosines = candidates @ target
        best = cosines.abs().argmax(1, keepdim=True)
        own = candidates.gather(1, best[:, :, None].expand(-1, -1, 12))[:, 0]
        own = own * cosines.gather(1, best).sign()
        found = torch.exp(-(own_back[None, :, None] - own[:, None]).square() / 8)
        return (found - expected_relation).square().sum((1, 2))

    expected = differences(reference, front)
    own = front.float().requires_grad_()
    loss = distance([own, back.float()], [front_target.float(), back_target.float()])
    close(loss.item(), reference(front).item(), rtol=1e-4, atol=0)
    (found,) = torch.autograd.grad(loss, own)
    assert (found - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("images", [1, 3, 5])
def test_relations_in_parts_are_the_same_relations(images: int):
    """7 images, D = 4, E = 3, K = 2: limits for so many at a time; the last part is smaller."""
    front_target, back_target = random(7, 4, 2, seed=1), random(7, 3, 2, seed=2)
    front, back = random(7, 4, 2, seed=3).requires_grad_(), random(7, 3, 2).requires_grad_()
    pairs = (front, front_target), (back, back_target)
    whole = relation_distance(*pairs)
    parts = relation_distance(*pairs, limit=24 * images + 23)
    close(whole, parts, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(whole, [front, back])
    for _ in range(2):  # the engine differentiates one forward several times
        found = torch.autograd.grad(parts, [front, back], retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            close(one, other, rtol=1e-10, atol=1e-14)
    close(relation_distance(*pairs, 2.0, limit=1), relation_distance(*pairs, 2.0))


def test_relations_in_parts_bound_the_memory_of_both_directions():
    """12 images of 2 x 8 x 20: whole, all in one tensor; two at a time, what two have."""
    seen = []
    for limit in (2**24, 2 * 320 + 319):
        front, back = random(12, 8, 2).requires_grad_(), random(12, 20, 2).requires_grad_()
        with Live() as live:
            loss = relation_distance((front, front + 1), (back, back.cos()), limit=limit)
            torch.autograd.grad(loss, [front, back])
        seen.append(live)
    assert seen[0].largest == 12 * 320
    assert seen[1].largest == 2 * 320
    assert seen[1].peak < seen[0].peak / 2


def test_no_tensor_of_the_widest_networks_exceeds_two_to_the_24():
    """128 images of MHGD's VGG, 512 to 512 channels; on the meta device, which needs no memory."""
    v = torch.zeros(128, 512, 1, device="meta", requires_grad=True)
    with Live() as live:
        torch.autograd.grad(relation_distance((v, v.detach()), (v, v.detach())), v)
    assert live.largest == 2**24


def test_a_step_reads_no_value_and_stays_on_its_device():
    """On the meta device there are none to read, and tensors of another one are refused."""
    student, teacher = maps()
    own = [x.to("meta").requires_grad_() for x in student]
    for method in (KDSVD, KDSVDF):
        found = distance(own, [x.to("meta") for x in teacher], method, vectors=2)
        assert all(g.is_meta for g in torch.autograd.grad(found, own))


# --- what changes nothing


@pytest.mark.parametrize("vectors", [1, 2])
def test_equal_maps_cost_nothing(vectors: int):
    """To the last bit, though the student's are more: in float32 too, of few positions too."""
    teacher = [random(8, d, n, 2, seed=d) for d, n in ((16, 12), (64, 2), (9, 5))]
    for maps in (teacher, [x.float().relu() for x in teacher]):
        for method in (KDSVD, KDSVDF):
            assert distance(maps, maps, method, vectors=vectors) == 0


@pytest.mark.parametrize("vectors", [1, 2])
def test_maps_whose_vectors_are_turned_round_cost_nothing(vectors: int):
    """U S V^T with the signs of single columns of V flipped is another map with the same vectors;
    so are the map scaled, its positions shuffled, and -M.
    """
    _, teacher = maps()
    turned = []
    for x in teacher:
        u, s, rows = torch.linalg.svd(x.flatten(2).mT, full_matrices=False)
        signs = torch.tensor([-1.0, 1.0, -1.0, 1.0]).double()[: s.shape[1]]
        turned.append((u * (s * signs)[:, None] @ rows).mT.reshape_as(x))
    assert (turned[0] - teacher[0]).abs().max() > 0.1
    for changed in (turned, [-x for x in teacher], [x.flip(2, 3) for x in teacher]):
        assert distance(changed, teacher, vectors=vectors) < 1e-20
        assert distance(teacher, changed, vectors=vectors) < 1e-20


def test_the_scale_of_either_side_is_of_no_matter():
    """Each tap and each image by its own factor."""
    student, teacher = maps()
    factors = torch.tensor([1e-5, 3.0, 1e6]).double().view(3, 1, 1, 1)
    expected = distance(student, teacher, vectors=2)
    assert expected > 1e-2
    close(distance([factors * x for x in student], teacher, vectors=2), expected)
    close(distance(student, [factors.flip(0) * x for x in teacher], vectors=2), expected)
    close(distance([7 * student[0], *student[1:]], teacher, vectors=2), expected)


def test_the_order_of_images_does_not_matter():
    student, teacher = maps()
    order = torch.tensor([2, 0, 1])
    expected = distance(student, teacher)
    close(distance([x[order] for x in student], [x[order] for x in teacher]), expected)
    assert (distance([x[order] for x in student], teacher) - expected).abs() > 1e-3


def test_the_teachers_vectors_have_a_positive_sum():
    """Relations of two taps depend on both signs, which the solver's would leave to chance."""
    student, teacher = maps(8)
    for own, other in zip(student, teacher, strict=True):
        assert compressed(own, other, 2)[1].sum(1).min() >= 0
        assert compressed(own, other.relu(), 1)[1].min() >= -1e-12


@pytest.mark.parametrize(("third", "extra", "there"), [(2, 3, 1), (3, 3, 1), (4, 3, 0), (1, 0, 0)])
def test_the_student_may_choose_among_a_few_more(third: int, extra: int, there: int):
    """The teacher's one direction is the student's `third` after its first: found among four."""
    values = [float(2**-i) for i in range(6)]
    student = torch.diag(torch.tensor(values))[None, :, :, None]
    teacher = torch.eye(6)[third][None, :, None, None]
    own, target = compressed(student, teacher, 1, extra)
    close((own * target).sum().item(), float(there))


def test_two_targets_may_choose_one_vector():
    """The student has one direction, (1, 1) / sqrt 2: nearest to both of the teacher's."""
    own, _ = compressed(pixels([1.0, 1.0]), pixels([4.0, 0.0], [0.0, 3.0]), 2)
    close(own, torch.tensor([[[0.8, 0.6], [0.8, 0.6]]]) / math.sqrt(2))


# --- degenerate maps and images


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("method", [KDSVD, KDSVDF])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_dead_constant_and_broken_maps_have_finite_gradients(
    method: type[KDSVD], side: str, vectors: int
):
    """Zeros, constants, rank one, NaN: in one image each. The gradients of the good one, the last,
    are those without them.
    """
    student, teacher = ([x.float() for x in side] for side in maps(6))
    alone = gradients(
        lambda s: distance(s, [x[5:] for x in teacher], method, vectors=vectors),
        [x[5:] for x in student],
    )
    for bad in (
        [student, teacher] if side == "both" else [student if side == "student" else teacher]
    ):
        for x in bad:
            x[0], x[1], x[2, :, 0, 0] = 0, 3, math.nan
            x[3] = x[3, :, :1, :1].relu()
            x[4] = x[4].relu()
            x[4, 1:] = 0
    loss = distance(student, teacher, method, vectors=vectors)
    found = gradients(lambda s: distance(s, teacher, method, vectors=vectors), student)
    assert loss.isfinite()
    for one, other in zip(found, alone, strict=True):
        assert one.isfinite().all()
        assert one[0].eq(0).all()
        close(one[5:], other)


def test_a_dead_student_costs_what_zeros_cost_and_gets_no_gradient():
    """Vectors of zeros: |v_T|^2 = 1 a tap and image in KD-SVDF; in KD-SVD all of R_S is 1."""
    _, teacher = maps()
    dead = [torch.zeros(3, *own).double() for own, _ in SIZES]
    close(distance(dead, teacher, KDSVDF).item(), 9.0)
    expected = 0.0
    taps = [vectors_by_loops(t, t, 1, 0) for t in teacher]
    for front, back in itertools.pairwise(taps):
        for ((_, f),), ((_, b),) in zip(front, back, strict=True):
            expected += (1 - torch.exp(-(b[:, None] - f).square() / 8)).square().sum().item()
    close(distance(dead, teacher).item(), expected)
    for method in (KDSVD, KDSVDF):
        for g in gradients(lambda s, m=method: distance(s, teacher, m), dead):
            assert g.eq(0).all()


def images(kind: str) -> Batch:
    batch = next(ToyImages(4).clean(4))
    changed = {
        "zero": torch.zeros_like(batch.image),
        "constant": torch.full_like(batch.image, 0.7),
        "repeated": batch.image[:1].expand_as(batch.image),
        "huge": 1e10 * batch.image,
    }
    return batch._replace(image=changed[kind].contiguous(memory_format=torch.channels_last))


def finite(method: Method, batch: Batch) -> None:
    """Both terms, and the update's gradient."""
    (update,) = method.phases()[0].turns[0].updates
    terms = update.loss(method(batch, START))
    assert all(term.isfinite() for term in terms.values())
    found = update.gradients(terms, update.parameters, START)
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("kind", ["zero", "constant", "repeated", "huge"])
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("method", [KDSVD, KDSVDF])
def test_networks_of_constant_or_repeated_images_have_finite_gradients(
    method: type[KDSVD], width: int, kind: str
):
    """BatchNorm sees no variance there. The last map has fewer positions than channels."""
    for norm in ("batch", "group"):
        networks = [toy_net(0, norm)], [toy_net(1, norm, width=width)]
        finite(method(*networks, ToyImages().spec(), vectors=2), images(kind))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("tap", ["stage1", "stage3"])
@pytest.mark.parametrize("method", [KDSVD, KDSVDF])
def test_networks_with_a_stage_of_zeros_have_finite_gradients(
    method: type[KDSVD], tap: str, role: str
):
    """The stage's last ReLU gets negative numbers only."""
    student, teacher = toy_net(0), toy_net(1)
    net = student if role == "student" else teacher
    for layer in [m for n, m in net.module.named_modules() if n.startswith(f"layer{tap[-1]}")]:
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.constant_(layer.bias, -9.0)
    built = method([student], [teacher], ToyImages().spec())
    batch = next(ToyImages(4).clean(4))
    found = built(batch, START)
    side = found.students[0] if role == "student" else found.teachers[0]
    assert side[tap].eq(0).all()
    finite(built, batch)


# --- what is trained


def test_no_gradient_reaches_the_teacher():
    student, teacher = maps()
    for side in (student, teacher):
        for x in side:
            x.requires_grad_()
    for method in (KDSVD, KDSVDF):
        distance(student, teacher, method).backward()
        assert all(x.grad.abs().sum() > 0 for x in student)
        assert all(x.grad is None for x in teacher)


def test_connectors_are_there_only_where_widths_differ():
    """4, 8, 8 to 6, 12, 12, or to 4, 8, 8: 4 * 6 + 12 parameters, then twice 8 * 12 + 24."""
    assert list(kdsvd(width=4).connectors.parameters()) == []
    assert sum(p.numel() for p in kdsvd(width=6).connectors.parameters()) == 36 + 2 * 120
    method = kdsvd(width=6, taps=["stage1", "stage2"], teacher_taps=["stem", "stage2"])
    out = method(images("repeated"), START)
    assert [tuple(x.shape[1:]) for x in out.mapped] == [(6, 8, 8), (12, 4, 4)]
    method = KDSVD(
        [toy_net(0)],
        [toy_net(1, width=8)],
        ToyImages().spec(),
        taps=["stage1", "stage2"],
        teacher_taps=["stage1", "stage1"],
    )
    assert [len(list(c.parameters())) for c in method.connectors] == [3, 0]


def test_maps_without_a_connector_are_compared_as_they_are():
    method = kdsvd(width=4)
    out = method(images("repeated"), START)
    for x, pair in zip(out.mapped, method.pairs, strict=True):
        assert x is out.students[0][pair.student]


@pytest.mark.parametrize("method", [KDSVD, KDSVDF])
def test_the_student_is_clipped_tensor_by_tensor_and_the_connectors_as_it_is_together(
    method: type[KDSVD],
):
    """By the rule, from the gradients of each term: at first by half the target's, CE and KD."""
    built = method([toy_net(0)], [toy_net(1, width=6)], ToyImages().spec(), gamma=0.3, alpha=0.9)
    (update,) = built.phases()[0].turns[0].updates
    assert {id(p) for p in update.parameters} == {id(p) for p in built.trainable()}
    terms = update.loss(built(next(ToyImages(8).clean(8)), START))
    joined = update.gradients(terms, update.parameters, START)
    g, h = (
        torch.autograd.grad(
            term, update.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for term in (terms["ce"] + terms["kd"], terms["svd"])
    )
    connectors = {id(p) for p in built.connectors.parameters()}
    student = [i for i, p in enumerate(update.parameters) if id(p) not in connectors]
    whole, other = (math.sqrt(sum(x[i].square().sum().item() for i in student)) for x in (g, h))
    together = 0.5 * whole / other
    assert len(student) < len(joined) and together < 1
    for i, (found, x, y) in enumerate(zip(joined, g, h, strict=True)):
        if i in student:
            factor = min(1.0, 0.5 * x.norm().item() / max(y.norm().item(), 1e-30))
            close(found, x + factor * y, rtol=1e-4, atol=1e-7)
        else:
            assert x.eq(0).all() and y.abs().max() > 0
            close(found, together * y, rtol=1e-4, atol=1e-7)


def test_a_transfer_without_a_target_is_refused():
    """Its gradient would be clipped to nothing."""
    for method in (KDSVD, KDSVDF):
        with pytest.raises(MethodError) as error:
            method([toy_net(0)], [toy_net(1)], ToyImages().spec(), gamma=0.0)
        assert str(error.value) == (
            f"{method.__name__} needs labels or soft targets beside its own loss; give gamma or "
            "alpha a value above 0"
        )
    assert kdsvd(gamma=0.0, alpha=0.5).alpha == 0.5


# --- taps and refusals


THREE = [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
LARGE = [(64, 64, 64), (128, 32, 32), (256, 16, 16)]
FIVE = [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 4, 4), (512, 2, 2)]
FIVE_LARGE = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]


@functools.cache
def network(name: str, size: int) -> Net:
    return build(name, 100, (3, size, size))


@pytest.mark.parametrize(
    ("teacher", "student", "size", "shapes", "teacher_shapes"),
    [
        ("vgg_teacher_mhgd", "vgg_student_mhgd", 32, FIVE, FIVE),
        ("vgg_teacher_mhgd", "vgg_student_mhgd", 64, FIVE_LARGE, FIVE_LARGE),
        ("wrn_22_4_mhgd", "wrn_10_4_mhgd", 32, THREE, THREE),
        ("wrn_22_4_mhgd", "wrn_10_4_mhgd", 64, THREE, THREE),
        *[
            ("wrn_22_4_mhgd", name, size, shapes, THREE)
            for name in ("resnet_mhgd", "mobilenet_mhgd", "vgg_bn_mhgd")
            for size, shapes in ((32, THREE), (64, LARGE))
        ],
    ],
)
def test_the_networks_of_mhgd_are_compared_at_their_stage_ends_without_connectors(
    teacher: str, student: str, size: int, shapes: Any, teacher_shapes: Any
):
    """After the ReLU, or the pooling behind it, so that no map has a negative entry."""
    spec = (
        ToyImages()
        .spec()
        ._replace(input_shape=(3, size, size), classes=range(100), teacher_classes=[range(100)])
    )
    for kind in (KDSVD, KDSVDF):
        method = kind([network(student, size)], [network(teacher, size)], spec)
        assert [p.shape for p in method.pairs] == shapes
        assert [p.teacher_shape for p in method.pairs] == teacher_shapes
        assert list(method.connectors.parameters()) == []
        ends = [f"stage{i}" for i in range(1, len(shapes) + 1)]
        post = [f"{end}:post" for end in ends]
        assert [p.student for p in method.pairs] == (post if student.startswith("wrn") else ends)
        assert [p.teacher for p in method.pairs] == (post if teacher.startswith("wrn") else ends)
        assert method.reads == {p.teacher for p in method.pairs}
    image = random(1, 3, size, size).float()
    with torch.no_grad():
        maps = method.student.eval()(image)
    assert all(maps[p.student].min() == 0 for p in method.pairs)


def test_it_reads_what_it_compares():
    assert kdsvd().reads == {"stage1", "stage2", "stage3"}
    assert kdsvd(alpha=0.5, taps=["stage1", "stage2"]).reads == {"stage1", "stage2", "logits"}
    assert kdsvd(taps=["stage1", "stage2"], teacher_taps=["stem", "stage3"]).reads == {
        "stem",
        "stage3",
    }


def test_taps_are_related_in_the_order_given():
    """Each with the one before it: of three the first and the last are not related."""
    student, teacher = maps()
    pairs = [distance(student[i : i + 2], teacher[i : i + 2]) for i in (0, 1)]
    close(distance(student, teacher), pairs[0] + pairs[1])


def test_a_single_tap_is_refused():
    with pytest.raises(MethodError) as error:
        kdsvd(taps=["stage2"])
    assert str(error.value) == (
        "KDSVD relates consecutive feature maps, but there is only 'stage2' of the student with "
        "'stage2' of the teacher; name 2 or more with taps=[...] and teacher_taps=[...]"
    )


@pytest.mark.parametrize(("vectors", "extra"), [(0, 3), (-1, 3), (1, -1)])
def test_less_than_one_vector_is_refused(vectors: int, extra: int):
    with pytest.raises(MethodError) as error:
        kdsvd(vectors=vectors, extra=extra)
    assert str(error.value) == (
        "KDSVD compresses a map to vectors=1 or more, among which the student has extra=0 or more "
        f"to choose, but they are {vectors} and {extra}"
    )


def test_more_vectors_than_the_teacher_has_are_refused():
    """6 channels in the first stage, 2 x 2 positions in the last, of which 4 are enough for 4."""
    with pytest.raises(MethodError) as error:
        kdsvd(vectors=7)
    assert str(error.value) == (
        "KDSVD: 'stage1' of the teacher is 6x8x8 and has 6 singular vectors; vectors=7 are too many"
    )
    with pytest.raises(MethodError) as error:
        kdsvd(vectors=5)
    assert str(error.value) == (
        "KDSVD: 'stage3' of the teacher is 12x2x2 and has 4 singular vectors; vectors=5 are too "
        "many"
    )
    finite(kdsvd(vectors=4, extra=9), next(ToyImages(4).clean(4)))


def test_a_student_with_fewer_vectors_than_the_teacher_is_welcome():
    """Its last map has 2 x 2 positions, the teacher's 4 x 4: six targets choose among four."""
    method = kdsvd(vectors=6, taps=["stage1", "stage3"], teacher_taps=["stage1", "stage2"])
    finite(method, next(ToyImages(4).clean(4)))


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = kdsvd(data, classes=9)
    assert list(method.loss(method(next(ToyImages(4).clean(4)), START))) == ["ce", "svd"]
    with pytest.raises(MethodError, match="KDSVD compares logits class by class"):
        kdsvd(data, classes=9, alpha=0.1)


def test_a_map_of_known_vectors_is_compressed_to_them():
    """Values 3, 2, 1 in no axis' direction; weights of the first two are 3 and 2 over sqrt 13."""
    x = with_values([3.0, 2.0, 1.0], 6, 4).mT[None, :, :, None]
    own, target = compressed(x, x, 2)
    close(target.norm(dim=1), torch.tensor([[3.0, 2.0]]).double() / math.sqrt(13))
    close(own, target)
