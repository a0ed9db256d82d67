"""REFILLED: tuples, divergences, weights by hand and by loops, both phases, what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill import distributed, engine
from potstill.errors import MethodError, TapError
from potstill.evaluate import class_means, evaluate
from potstill.losses import instance_weights, pairwise_distance
from potstill.method import Batch, DataSpec, Outputs, Progress
from potstill.methods.refilled import (
    REFILLED,
    _divergence,
    comparison_divergence,
    impostors,
    local_divergence,
)
from potstill.net import Captured, Net
from potstill.stochastic_depth import stochastic
from tests.methods.test_rkd import Live
from tests.test_ranks import fork_ranks
from tests.toys import ToyImages, pace, plan, toy_net

close = torch.testing.assert_close

START = Progress(0, 0, 100, 100)

# three classes of two images
OWN_ANGLES = (0.0, 0.30, 0.47, 0.52, 0.40, 2.0)
TAUGHT_ANGLES = (0.0, 0.20, 0.90, 1.00, 0.60, 2.5)
PAIRS_OF_THREE = torch.tensor([0, 0, 1, 1, 2, 2])

# four images, of classes 0 and 2 of three
PHI = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [2.0, 0.0]])
HEAD = torch.tensor([[4.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
Z = torch.tensor([[1.0, 5.0, 0.0], [0.0, 5.0, 1.0], [0.0, -3.0, 2.0], [0.5, 0.0, 0.0]])
Y = torch.tensor([0, 2, 2, 0])

every_rule = pytest.mark.parametrize(
    "rule", [{}, {"k_hat": 1}, {"k_hat": 3}, {"batch_min": True}], ids=str
)


def refilled(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> REFILLED:
    teacher = toy_net(1, width=6, classes=classes)
    return REFILLED([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


def outputs(
    label: Tensor,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    taps: tuple[str, str] = ("embed", "embed"),
) -> Outputs:
    """Each network is its logits and its vectors."""
    nets = [Captured(x[0], {tap: x[1]}) for x, tap in zip((student, teacher), taps, strict=True)]
    return Outputs(Batch(label, label, label, label), START, nets[:1], nets[1:])


def compared(student: Tensor, teacher: Tensor, label: Tensor, tap: str = "embed") -> Outputs:
    """What the first phase reads."""
    none = torch.zeros(len(label), 2)
    return outputs(label, (none, student), (none, teacher), (tap, tap))


def predicted(method: REFILLED, centres: Tensor | None = None) -> Outputs:
    """What the second phase reads in section 8.4; the method is given the centres."""
    method.centres = class_means([(PHI, Y)], 3) if centres is None else centres
    return outputs(Y, (Z, PHI), (HEAD, PHI))


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def circle(angles: Sequence[float] | Tensor) -> Tensor:
    """Points of length 1, in float64. n angles -> (n, 2)"""
    angles = torch.as_tensor(angles, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def at_distances(positive: float, *impostors: float) -> Tensor:
    """Angles of an anchor at 0, its positive ahead of it and impostors behind, so far away."""
    signs = [1, *[-1] * len(impostors)]
    angles = [s * 2 * math.asin(d / 2) for s, d in zip(signs, (positive, *impostors), strict=True)]
    return torch.tensor([0.0, *angles], dtype=torch.float64)


def kept(distance: Tensor, label: Sequence[int], margin: float = 0.2, **rule: Any) -> dict:
    """The tuples as (anchor, positive): impostors; pairs without any are left out."""
    labels = torch.tensor(label)
    pairs = [
        (a, p) for a, p in itertools.permutations(range(len(label)), 2) if label[a] == label[p]
    ]
    found = impostors(distance, labels[:, None] == labels, torch.tensor(pairs), margin, **rule)
    rows = [row.nonzero().flatten().tolist() for row in found]
    return {pair: row for pair, row in zip(pairs, rows, strict=True) if row}


def kept_on_circle(angles: Sequence[float], label: Sequence[int], **rule: Any) -> dict:
    return kept(pairwise_distance(circle(angles)), label, **rule)


class Vectors(ToyImages):
    """Vectors that are given as images of one pixel. (n, D), n labels"""

    def __init__(self, vectors: Tensor, label: Tensor) -> None:
        self.image, self.label = vectors[:, :, None, None], label

    def spec(self, *arguments: Any) -> DataSpec:
        classes = range(int(self.label.max()) + 1)
        shape = (self.image.shape[1], 1, 1)
        return super().spec(*arguments)._replace(classes=classes, input_shape=shape)


def plain(size: int, classes: int, width: int | None = None, seed: int = 0) -> Net:
    """Its "embed" is the image itself, or a linear map of it to a width."""
    torch.manual_seed(seed)
    layers = [] if width is None else [nn.Linear(size, width, bias=False)]
    head = nn.Linear(width or size, classes)
    return Net(nn.Sequential(nn.Flatten(), *layers, head), {}, (size, 1, 1))


def count_of(net: Net) -> list[int]:
    """Images in each forward from now on."""
    seen: list[int] = []
    net.module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def prepared(method: REFILLED, images: ToyImages) -> REFILLED:
    with torch.no_grad():
        method.find_centres(images.clean(16))
    return method


# --- the first phase by hand


def test_one_impostor_by_hand():
    """Distances .8 and 1.1: p = sigmoid(.3) = .574443; the teacher's .7 and .9: sigmoid(.2) =
    .549834. KL = .549834 ln(.549834 / .574443) + .450166 ln(.450166 / .425557) = .00123298. Its
    slopes in the distances are p_T - p = -.024608 of the positive's and the opposite.
    """
    label = torch.tensor([0, 0, 1])
    angles = at_distances(0.8, 1.1).requires_grad_()
    teacher = circle(at_distances(0.7, 0.9))
    found = comparison_divergence(circle(angles), teacher, label, temperature=1.0, margin=0.4)
    close(found.item(), 0.00123298, atol=5e-9, rtol=0)
    (slopes,) = torch.autograd.grad(found, angles)
    # at angle t the distance is 2 sin(t / 2), which grows by cos(t / 2) = sqrt(1 - D^2 / 4)
    p, q = 1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(-0.2))
    close(slopes[1].item(), (q - p) * math.sqrt(1 - 0.8**2 / 4))
    close(slopes[2].item(), -(p - q) * math.sqrt(1 - 1.1**2 / 4))
    close(p - q, 0.024608, atol=1e-6, rtol=0)


def test_one_impostor_by_hand_at_the_published_temperature():
    """Distances are divided by 4: KL = 7.80579e-5, and the term is 1000 times that."""
    label = torch.tensor([0, 0, 1])
    found = refilled(margin=0.4).compare_loss(
        compared(circle(at_distances(0.8, 1.1)), circle(at_distances(0.7, 0.9)), label)
    )
    assert list(found) == ["match"]
    close(found["match"].item(), 0.0780579, atol=5e-8, rtol=0)


OWN_DISTANCES = (0.8, 0.85, 0.95, 1.0)
TAUGHT_DISTANCES = (0.6, 0.7, 0.9, 1.2)
TAUGHT_SHARES = (0.313041, 0.283251, 0.231907, 0.171801)
SLOPES = (0.037610, 0.021253, -0.005159, -0.053703)


def test_three_impostors_by_hand():
    """exp(-.6), exp(-.7), exp(-.9), exp(-1.2) have sum 1.753166: p_T = .313041, .283251, ...; of
    the student .275431, .261998, .237066, .225504. KL = .01032752, its slopes p_T - p.
    """
    angles = at_distances(*OWN_DISTANCES).requires_grad_()
    teacher, label = circle(at_distances(*TAUGHT_DISTANCES)), torch.tensor([0, 0, 1, 2, 3])
    found = comparison_divergence(circle(angles), teacher, label, temperature=1.0, margin=0.21)
    close(found.item(), 0.01032752, atol=5e-9, rtol=0)
    (slopes,) = torch.autograd.grad(found, angles)
    for k, (slope, d) in enumerate(zip(SLOPES, OWN_DISTANCES, strict=True)):
        moved = math.sqrt(1 - d**2 / 4) * (1 if k == 0 else -1)
        close(slopes[1 + k].item(), slope * moved, atol=1e-6, rtol=0)


def single_tuple(distances: Sequence[float]) -> Tensor:
    """A matrix whose first row has the distances of an anchor. K + 1 -> (K + 2, K + 2)"""
    matrix = torch.zeros(len(distances) + 1, len(distances) + 1, dtype=torch.float64)
    matrix[0, 1:] = torch.tensor(distances, dtype=torch.float64)
    return matrix.requires_grad_()


def of_single_tuple(own: Tensor, other: Tensor, temperature: float = 1.0) -> Tensor:
    known = torch.ones(1, len(own), dtype=torch.bool)
    known[0, :2] = False
    return _divergence(own, other, torch.tensor([[0, 1]]), known, temperature)


def test_the_divergence_is_a_logistic_loss_and_what_the_teacher_says_of_it():
    """K = 1 in the authors' terms: const + rho Diff + log(1 + exp(-Diff)) = -.68817207 +
    .68940505 with rho = 1 - p_T and Diff = .3, and its slope in Diff is p - p_T.
    """
    own, other = single_tuple((0.8, 1.1)), single_tuple((0.7, 0.9))
    q, difference = 0.549834, 1.1 - 0.8
    const = q * math.log(q) + (1 - q) * math.log(1 - q)
    varying = (1 - q) * difference + math.log1p(math.exp(-difference))
    close((const, varying), (-0.68817207, 0.68940505), atol=5e-7, rtol=0)
    found = of_single_tuple(own, other)
    close(found.item(), const + varying, atol=1e-6, rtol=0)
    (slopes,) = torch.autograd.grad(found, own)
    close(slopes[0, 2].item(), 0.574443 - 0.549834, atol=2e-6, rtol=0)
    close(slopes[0, 1], -slopes[0, 2])


def test_of_several_impostors_it_is_the_same_with_a_rectification():
    """CE(e0, p) = ln(1 + sum exp(D_P - D_k)) = 1.28941670, CE(p_T - e0, p) = sum p_Tk (D_k - D_P) =
    .08330870, const = sum p_T ln p_T = -1.36239788; the slopes are p_Tk - p_k.
    """
    own, other = single_tuple(OWN_DISTANCES), single_tuple(TAUGHT_DISTANCES)
    gaps = [d - OWN_DISTANCES[0] for d in OWN_DISTANCES[1:]]
    logistic = math.log1p(sum(math.exp(-g) for g in gaps))
    rectified = sum(q * g for q, g in zip(TAUGHT_SHARES[1:], gaps, strict=True))
    const = sum(q * math.log(q) for q in TAUGHT_SHARES)
    expected = (1.28941670, 0.08330870, -1.36239788)
    close((logistic, rectified, const), expected, atol=1e-6, rtol=0)
    found = of_single_tuple(own, other)
    close(found.item(), logistic + rectified + const, atol=1e-6, rtol=0)
    (slopes,) = torch.autograd.grad(found, own)
    close(slopes[0, 1:], torch.tensor(SLOPES, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(slopes[1:], torch.zeros_like(slopes[1:]))


@pytest.mark.parametrize("k", [1, 2, 5, 40])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_identity_holds_for_any_distances(k: int, temperature: float):
    """In units of the temperature, in which the slopes are p_Tk - p_k as well."""
    own, other = (single_tuple((2 * noise(k + 1, seed=s).sigmoid()).tolist()) for s in (k, k + 1))
    found = of_single_tuple(own, other, temperature)
    d, d_t = ([x / temperature for x in m[0, 1:].tolist()] for m in (own, other))
    q = [math.exp(-x) / sum(math.exp(-y) for y in d_t) for x in d_t]
    p = [math.exp(-x) / sum(math.exp(-y) for y in d) for x in d]
    logistic = math.log1p(sum(math.exp(d[0] - x) for x in d[1:]))
    rectified = sum(share * (x - d[0]) for share, x in zip(q[1:], d[1:], strict=True))
    const = sum(share * math.log(share) for share in q)
    close(found.item(), const + rectified + logistic, atol=1e-12, rtol=0)
    (slopes,) = torch.autograd.grad(found, own)
    expected = [(a - b) / temperature for a, b in zip(q, p, strict=True)]
    close(slopes[0, 1:], torch.tensor(expected, dtype=torch.float64))


def test_the_tuples_of_six_images_by_hand():
    """Image 0 is at .30 from its positive and at .40, .47, .52 from others: chords .299, .397, .467
    and .514, the last .215 farther. All but 5 are nearer to 1 than 0 is, and to 4 than 5 is.
    """
    rule = {"label": PAIRS_OF_THREE.tolist()}
    everything = {(0, 1): [2, 4], (2, 3): [1, 4], (3, 2): [1, 4], (5, 4): [1]}
    assert kept_on_circle(OWN_ANGLES, **rule) == everything
    nearest = {(0, 1): [4], (2, 3): [4], (3, 2): [4], (5, 4): [1]}
    assert kept_on_circle(OWN_ANGLES, k_hat=1, **rule) == nearest
    first = {(0, 1): [2], (2, 3): [1], (3, 2): [1], (5, 4): [1]}
    assert kept_on_circle(OWN_ANGLES, fewest=torch.tensor(1), **rule) == first


@pytest.mark.parametrize(
    ("rule", "temperature", "expected"),
    [
        ({}, 1.0, 0.01522731),
        ({"k_rule": "batch_min"}, 1.0, 0.02199631),
        ({"k_hat": 1}, 1.0, 0.00574394),
        ({}, 4.0, 0.00098831),
    ],
)
def test_the_mean_over_six_images_by_hand(rule: Any, temperature: float, expected: float):
    """Of four tuples; the margin is .2 by default."""
    out = compared(circle(OWN_ANGLES), circle(TAUGHT_ANGLES), PAIRS_OF_THREE)
    found = refilled(tau1=temperature, scale=1.0, **rule).compare_loss(out)["match"]
    close(found.item(), expected, atol=6e-9, rtol=0)


def test_the_published_temperature_scale_and_margin_are_the_defaults():
    out = compared(circle(OWN_ANGLES), circle(TAUGHT_ANGLES), PAIRS_OF_THREE)
    close(refilled().compare_loss(out)["match"].item(), 0.98831, atol=6e-6, rtol=0)
    found = comparison_divergence(circle(OWN_ANGLES), circle(TAUGHT_ANGLES), PAIRS_OF_THREE)
    close(found.item(), 0.00098831, atol=6e-9, rtol=0)
    method = refilled()
    assert (method.lam, method.tau2, method.weighting, method.k_hat) == (1.0, 1.0, "minmax", None)


# --- who is an impostor

SIX = (0.0, 0.10, 0.25, 0.15, 0.21, 0.12)
"""A pair of class 0, then impostors of four classes. From the first, 5, 3, 4, 2 are the nearest;
from the second, at .1 from the first, 5 and 3 are nearer than that, and 4, 2 are beyond it."""


@pytest.mark.parametrize(
    ("k_hat", "of_first", "of_second"),
    [
        (1, [5], [4]),
        (2, [3, 5], [2, 4]),
        (3, [3, 4, 5], [2, 4]),
        (4, [2, 3, 4, 5], [2, 4]),
        (5, [2, 3, 4, 5], [2, 4]),
        (6, [2, 3, 4, 5], [2, 4]),
        (1000, [2, 3, 4, 5], [2, 4]),
        (None, [2, 3, 4, 5], [2, 4]),
    ],
)
def test_each_pair_keeps_its_own_nearest(k_hat: int | None, of_first: Any, of_second: Any):
    """min(K', K_hat) of each, whatever the other pair has."""
    found = kept_on_circle(SIX, [0, 0, 1, 2, 3, 4], k_hat=k_hat)
    assert found == {(0, 1): of_first, (1, 0): of_second}


@pytest.mark.parametrize(
    ("fewest", "of_first", "of_second"),
    [(1, [2], [2]), (2, [2, 3], [2, 4]), (3, [2, 3, 4], [2, 4])],
)
def test_the_first_in_the_batch_are_kept_by_the_other_rule(
    fewest: int, of_first: Any, of_second: Any
):
    found = kept_on_circle(SIX, [0, 0, 1, 2, 3, 4], fewest=torch.tensor(fewest))
    assert found == {(0, 1): of_first, (1, 0): of_second}


def test_of_equally_near_impostors_the_earliest_is_kept():
    distance = torch.tensor([0.0, 0.5, 0.625, 0.5625, 0.625, 0.5625]).repeat(6, 1)
    label = [0, 0, 1, 2, 3, 4]
    assert kept(distance, label, k_hat=1)[0, 1] == [3]
    assert kept(distance, label, k_hat=3)[0, 1] == [2, 3, 5]


def test_an_impostor_is_farther_than_the_positive_by_at_most_the_margin():
    """Exact in binary: a gap of 0 is out, of exactly the margin in, of one bit more out."""
    beyond = torch.nextafter(torch.tensor(0.75), torch.tensor(1.0)).item()
    barely = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    distance = torch.tensor([0.0, 0.5, 0.5, 0.75, beyond, 0.375, barely]).repeat(7, 1)
    assert kept(distance, [0, 0, 1, 2, 3, 4, 5], margin=0.25)[0, 1] == [3, 6]


def test_the_margin_is_the_arguments():
    """Chords .514 - .299 = .215 of image 3, and image 5 is 1.683 away."""
    label = PAIRS_OF_THREE.tolist()
    assert kept_on_circle(OWN_ANGLES, label, margin=0.22)[0, 1] == [2, 3, 4]
    assert kept_on_circle(OWN_ANGLES, label, margin=2.0)[0, 1] == [2, 3, 4, 5]
    out = compared(circle(OWN_ANGLES), circle(TAUGHT_ANGLES), PAIRS_OF_THREE)
    one, other = (refilled(margin=m).compare_loss(out)["match"] for m in (0.2, 0.22))
    assert abs(one - other) > 1e-3


def test_no_image_of_its_own_class_is_an_impostor():
    """A third image of the class is another positive; 3 is nearer to 2 than 0 is."""
    found = kept_on_circle((0.0, 0.1, 0.15, 0.21), [0, 0, 0, 1])
    assert found == {(0, 1): [3], (0, 2): [3], (1, 0): [3], (1, 2): [3], (2, 1): [3]}


def test_the_teachers_distances_choose_nobody():
    """Another teacher, other predictions, the same tuples: a teacher who agrees costs nothing."""
    x = circle(OWN_ANGLES)
    label = PAIRS_OF_THREE
    assert comparison_divergence(x, x, label) == 0
    # the teacher sees images 1 and 4 far away, which the student compares all the same
    taught = circle((0.0, 2.0, 0.9, 1.0, 3.0, 2.5))
    close(
        comparison_divergence(x, taught, label).item(),
        stage1_by_loops(x, taught, label, 4.0)[0],
    )


def test_which_ones_are_the_first_follows_from_the_order_of_the_batch():
    """Reversed, (0, 1) keeps 4 and not 2; the nearest, or all, are the same in any order."""
    reverse = torch.arange(5, -1, -1)
    x, y, label = circle(OWN_ANGLES), circle(TAUGHT_ANGLES), PAIRS_OF_THREE

    def both(**rule: Any) -> list[float]:
        orders = (torch.arange(6), reverse)
        return [comparison_divergence(x[o], y[o], label[o], 1.0, **rule).item() for o in orders]

    for rule in ({}, {"k_hat": 1}, {"k_hat": 2}):
        one, other = both(**rule)
        close(one, other, atol=1e-12, rtol=0)
    one, other = both(batch_min=True)
    close(one, 0.02199631, atol=6e-9, rtol=0)
    close(other, 0.00574394, atol=6e-9, rtol=0)  # here the last ones are the nearest


def test_a_pair_without_impostors_sets_no_smallest_number():
    """Class 0 has two in each tuple, class 5 is far from everything: K is 2, not 0."""
    angles = (0.0, 0.10, 0.25, 0.15, 0.21, 0.12, 3.0, 3.05)
    label = torch.tensor([0, 0, 1, 2, 3, 4, 5, 5])
    x, y = circle(angles), circle([a * a for a in angles])
    found = comparison_divergence(x, y, label, batch_min=True)
    alone = comparison_divergence(x[:6], y[:6], label[:6], batch_min=True)
    assert found > 1e-7
    close(found, alone, atol=1e-12, rtol=0)


# --- against loops


def softmax(values: Sequence[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def tuples_by_loops(
    e: Sequence[Sequence[float]],
    label: Sequence[int],
    margin: float = 0.2,
    k_hat: int | None = None,
    batch_min: bool = False,
) -> list[tuple[int, int, list[int]]]:
    """Anchor, positive, impostors."""
    found = []
    for a, p in itertools.permutations(range(len(e)), 2):
        if label[a] == label[p]:
            gaps = {n: math.dist(e[a], e[n]) - math.dist(e[a], e[p]) for n in range(len(e))}
            semi_hard = [n for n, g in gaps.items() if label[n] != label[a] and 0 < g <= margin]
            if k_hat is not None:
                semi_hard = sorted(semi_hard, key=lambda n, g=gaps: g[n])[:k_hat]
            if semi_hard:
                found.append((a, p, semi_hard))
    if batch_min:
        fewest = min(len(negatives) for *_, negatives in found)
        found = [(a, p, negatives[:fewest]) for a, p, negatives in found]
    return found


def stage1_by_loops(
    student: Tensor, teacher: Tensor, label: Tensor, tau: float, **rule: Any
) -> tuple[float, list[list[float]]]:
    """The mean KL and its gradient, the latter by dKL / dD_k = (p_Tk - p_k) / tau."""
    own, other = ([[c / math.hypot(*v) for c in v] for v in x.tolist()] for x in (student, teacher))
    tuples = tuples_by_loops(own, label.tolist(), **rule)
    value, by_unit = 0.0, [[0.0] * len(v) for v in own]
    for a, p, negatives in tuples:
        others = [p, *negatives]
        q, s = (softmax([-math.dist(e[a], e[j]) / tau for j in others]) for e in (other, own))
        for j, target, share in zip(others, q, s, strict=True):
            value += target * math.log(target / share) / len(tuples)
            slope = (target - share) / tau / math.dist(own[a], own[j]) / len(tuples)
            for c in range(len(own[a])):
                by_unit[a][c] += slope * (own[a][c] - own[j][c])
                by_unit[j][c] -= slope * (own[a][c] - own[j][c])
    gradient = []
    for v, e, g in zip(student.tolist(), own, by_unit, strict=True):  # through e = v / |v|
        along = sum(x * y for x, y in zip(e, g, strict=True))
        gradient.append([(y - along * x) / math.hypot(*v) for x, y in zip(e, g, strict=True)])
    return value, gradient


@every_rule
@pytest.mark.parametrize(("seed", "tau"), [(0, 4.0), (1, 1.0), (2, 0.3)])
def test_the_first_phase_equals_loops_over_tuples(rule: Any, seed: int, tau: float):
    """24 images of 5 classes, 6 dimensions against 9."""
    student, teacher = noise(24, 6, seed=seed), noise(24, 9, seed=seed + 10)
    label = torch.randperm(24, generator=torch.Generator().manual_seed(seed)) % 5
    value, gradient = stage1_by_loops(student, teacher, label, tau, **rule)
    student.requires_grad_()
    found = comparison_divergence(student, teacher, label, tau, **rule)
    close(found.item(), value, rtol=1e-9, atol=0)
    (grad,) = torch.autograd.grad(found, student)
    close(grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-7, atol=1e-12)
    assert grad.abs().max() > 1e-6


def stage2_by_loops(
    z: Tensor, phi: Tensor, head: Tensor, label: Tensor, centres: list[list[float]], **rule: Any
) -> tuple[float, float, list[list[float]]]:
    """Cross-entropy, the local term, and the gradient of their sum in z: section 4."""
    lam, tau, weighting = rule["lam"], rule["tau2"], rule["weighting"]
    labels, n = label.tolist(), len(label)
    batch_classes = sorted(set(labels))
    losses = [-math.log(max(softmax(row))) for row in head.tolist()]
    ce, local, gradient = 0.0, 0.0, []
    for i in range(n):
        row, vector = z[i].tolist(), phi[i].tolist()
        whole = softmax(row)
        ce -= math.log(whole[labels[i]]) / n
        inner = [sum(a * b for a, b in zip(vector, centres[c], strict=True)) for c in batch_classes]
        t = softmax([x / tau for x in inner])
        s = softmax([row[c] / tau for c in batch_classes])
        u = losses[i]
        if weighting == "minmax":
            u = (u - min(losses)) / (max(losses) - min(losses))
        weight = lam * 2 / (1 + math.exp(u))
        local += weight * sum(a * math.log(a / b) for a, b in zip(t, s, strict=True)) / n
        slopes = [(p - (c == labels[i])) / n for c, p in enumerate(whole)]
        for c, a, b in zip(batch_classes, t, s, strict=True):
            slopes[c] += weight * (b - a) / tau / n
        gradient.append(slopes)
    return ce, local, gradient


def centres_by_loops(vectors: Tensor, label: Tensor, classes: int) -> list[list[float]]:
    found = []
    for c in range(classes):
        own = [v for v, y in zip(vectors.tolist(), label.tolist(), strict=True) if y == c]
        mean = [sum(column) / len(own) for column in zip(*own, strict=True)]
        found.append([x / math.hypot(*mean) for x in mean])
    return found


@pytest.mark.parametrize(
    ("lam", "tau2", "weighting"), [(1.0, 1.0, "minmax"), (2.0, 2.0, "raw"), (0.5, 0.7, "minmax")]
)
def test_the_second_phase_equals_loops_over_images(lam: float, tau2: float, weighting: Any):
    """24 images of 4 of 5 classes, teacher vectors of 9 dimensions, its head of 7 classes."""
    z, phi, head = noise(24, 5), noise(24, 9, seed=1), 3 * noise(24, 7, seed=2)
    label = torch.tensor([0, 1, 3, 4]).repeat(6)
    training, classes = noise(40, 9, seed=3), torch.arange(40) % 5
    rule = {"lam": lam, "tau2": tau2, "weighting": weighting}
    centres = centres_by_loops(training, classes, 5)
    ce, local, gradient = stage2_by_loops(z, phi, head, label, centres, **rule)
    method = refilled(**rule)
    method.centres = class_means([(training, classes)], 5)
    z.requires_grad_()
    terms = method.loss(outputs(label, (z, phi), (head, phi)))
    assert list(terms) == ["ce", "local"]
    close(terms["ce"].item(), ce, rtol=1e-10, atol=0)
    close(terms["local"].item(), local, rtol=1e-10, atol=0)
    (grad,) = torch.autograd.grad(sum(terms.values()), z)
    close(grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-9, atol=1e-13)


# --- the second phase by hand


def test_centres_and_targets_by_hand():
    """Means (1.5, 0) and (1.5, 3) of classes 0 and 2: [1, 0] and [1, 2] / sqrt 5. The third image's
    vector, not of unit length, has inner products 3 and 11 / sqrt 5 = 4.919350 with them.
    """
    centres = class_means([(PHI, Y)], 3)
    expected = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.447214, 0.894427]])
    close(centres, expected, atol=1e-6, rtol=0)
    close((PHI[2] @ centres.mT)[[0, 2]], torch.tensor([3.0, 4.919350]), atol=1e-6, rtol=0)


def test_the_divergence_over_the_classes_of_the_batch_by_hand():
    """Logits of class 1, which no image of the batch has, do not count: of the third image targets
    3 and 4.919350 against 0 and 2, sigmoid(-1.919350) = .127940 against sigmoid(-2) = .119203.
    """
    present = torch.tensor([True, False, True])
    found = local_divergence(Z, PHI @ class_means([(PHI, Y)], 3).mT, present)
    expected = torch.tensor([0.022118, 0.045721, 0.000356, 0.037526])
    close(found, expected, atol=6e-7, rtol=0)


def test_the_weights_by_hand():
    """Of the head's logits, 4 against two zeros: l = ln(1 + 2 exp(-4)) = .035976; then 1: .551445,
    none: ln 3, 2: .239542. u = 0, .485..., 1, .19..., and 2 sigmoid(-1) = .537883. Raw, q being
    the top probability, 2 q / (1 + q): 1/3 gives .5.
    """
    scaled = torch.tensor([1.0, 0.762104, 0.537883, 0.904507])
    raw = torch.tensor([0.982014, 0.731059, 0.5, 0.880797])
    close(instance_weights(HEAD), scaled, atol=6e-7, rtol=0)
    close(instance_weights(HEAD, "raw"), raw, atol=6e-7, rtol=0)
    q = HEAD.softmax(1).amax(1)
    close(instance_weights(HEAD, "raw"), 2 * q / (1 + q))


def logsumexp(*values: float) -> float:
    return math.log(sum(math.exp(v) for v in values))


@pytest.mark.parametrize(
    ("arguments", "local"),
    [
        ({}, 0.022774),
        ({"variant": "minus"}, 0.026430),
        ({"weighting": "raw"}, 0.022094),
    ],
)
def test_the_terms_by_hand(arguments: Any, local: float):
    """Weighted, unweighted and with the raw weights: (.982014 * .022118 + .731059 * .045721 + .5 *
    .000356 + .880797 * .037526) / 4 = .022094. Cross-entropy is over all three classes.
    """
    method = refilled(**arguments)
    found = method.loss(predicted(method))
    assert list(found) == ["ce", "local"]
    each = [logsumexp(1, 5, 0) - 1, logsumexp(0, 5, 1) - 1]
    each += [logsumexp(0, -3, 2) - 2, logsumexp(0.5, 0, 0) - 0.5]
    close(found["ce"].item(), sum(each) / 4, atol=1e-6, rtol=0)
    close(found["local"].item(), local, atol=1e-6, rtol=0)


def test_the_temperature_divides_both_sides_and_nothing_is_multiplied():
    """tau2 = 2: targets .5 (3, 4.919350) against .5 (0, 2): sigmoid(-.959675) = .276934 against
    sigmoid(-1) = .268941, KL = .000162; with tau2^2 it would be four times that.
    """
    target, present = PHI @ class_means([(PHI, Y)], 3).mT, torch.tensor([True, False, True])
    found = local_divergence(Z, target, present, 2.0)
    close(found[2].item(), 0.000162, atol=6e-7, rtol=0)
    close(found, local_divergence(Z / 2, target / 2, present))
    method = refilled(variant="minus", tau2=2.0)
    close(method.loss(predicted(method))["local"], found.mean())


def test_lambda_multiplies_the_local_term_alone():
    """A power of two exactly."""
    for arguments in ({}, {"weighting": "raw"}, {"variant": "minus"}):
        one, four, three = (refilled(lam=lam, **arguments) for lam in (1.0, 4.0, 3.0))
        terms, fourfold, threefold = (m.loss(predicted(m)) for m in (one, four, three))
        assert torch.equal(fourfold["local"], 4 * terms["local"])
        close(threefold["local"], 3 * terms["local"])
        assert torch.equal(fourfold["ce"], terms["ce"])


def test_constant_weights_are_the_variant_minus():
    """A teacher that is equally sure of all images gives every one of them weight 1."""
    full, minus = refilled(lam=3.0), refilled(lam=3.0, variant="minus")
    out = predicted(full)
    minus.centres = full.centres
    sure = Captured(torch.tensor([[5.0, 0.0, 0.0, 1.0]]).repeat(4, 1), out.teachers[0].features)
    even = Outputs(out.batch, START, out.students, [sure])
    assert full.loss(even) == minus.loss(even) == minus.loss(out)
    assert full.loss(out)["local"] < minus.loss(out)["local"]


# --- degenerate and extreme cases


@pytest.mark.parametrize(
    "label", [[0, 1, 2, 3], [0, 0, 0, 0], [0], [0, 0], [0, 1]], ids="labels{}".format
)
@pytest.mark.parametrize("rule", [{}, {"k_hat": 1}, {"batch_min": True}], ids=str)
def test_a_batch_without_tuples_gives_zero_and_gradients_of_zeros(label: Any, rule: Any):
    """No pair, no negative, one image."""
    x, y = noise(len(label), 3).requires_grad_(), noise(len(label), 2)
    found = comparison_divergence(x, y, torch.tensor(label), **rule)
    (grad,) = torch.autograd.grad(found, x)
    assert found == 0 and torch.equal(grad, torch.zeros_like(x))


def test_negatives_that_are_all_nearer_or_too_far_leave_no_tuple():
    """One at the anchor's very place, one on the other side."""
    x = circle((0.0, 0.5, 0.01, 3.0)).requires_grad_()
    found = comparison_divergence(x, noise(4, 2), torch.tensor([0, 0, 1, 2]), margin=0.1)
    (grad,) = torch.autograd.grad(found, x)
    assert found == 0 and torch.equal(grad, torch.zeros_like(x))


def test_a_step_without_tuples_moves_nothing():
    """Through a network and the engine: four images of four classes."""
    method = refilled()
    (turn,) = method.phases()[0].turns
    (update,) = turn.updates
    batch = ToyImages().take(torch.arange(4), torch.zeros(4, dtype=torch.int64))
    terms = update.loss(turn.forward(batch, START, None))
    for gradient in update.gradients(terms, update.parameters, START):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    before = [p.detach().clone() for p in method.parameters()]
    optimizers = {"embed": plan(weight_decay=0.0).make(update.parameters)}
    found = engine.train_step(method.phases()[0], optimizers, batch, START, 0)
    assert list(found) == ["match"] and found["match"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))
    # with two images of a class it does move
    batch = ToyImages().take(torch.arange(16), torch.zeros(16, dtype=torch.int64))
    assert engine.train_step(method.phases()[0], optimizers, batch, START, 0)["match"] > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_embeddings_that_all_coincide_leave_no_tuple():
    """Every distance is the same, and an impostor must be farther than the positive."""
    x = torch.full((6, 3), 0.7, dtype=torch.float64, requires_grad=True)
    found = comparison_divergence(x, noise(6, 2), PAIRS_OF_THREE)
    (grad,) = torch.autograd.grad(found, x)
    assert found == 0 and torch.equal(grad, torch.zeros_like(x))


def test_a_positive_at_the_anchors_place_leaves_gradients_finite():
    """The root of the distance has no slope there; the impostor is still pushed."""
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.1]], requires_grad=True)
    found = comparison_divergence(x, circle((0.0, 1.0, 2.0)), torch.tensor([0, 0, 1]))
    (grad,) = torch.autograd.grad(found, x)
    assert found > 0 and grad.isfinite().all()
    assert 0 < grad.abs().max() < 1


def test_a_teacher_that_sees_all_images_alike_asks_for_equal_distances():
    """Its row is (1/2, 1/2): KL = -ln 2 - (ln p + ln(1 - p)) / 2 with p = .574443."""
    x, label = circle(at_distances(0.8, 1.1)), torch.tensor([0, 0, 1])
    found = comparison_divergence(x, torch.ones(3, 5), label, 1.0, 0.4)
    p = 1 / (1 + math.exp(-0.3))
    close(found.item(), -math.log(2) - (math.log(p) + math.log(1 - p)) / 2, atol=1e-6, rtol=0)


@every_rule
def test_embeddings_of_zeros_have_finite_gradients(rule: Any):
    """One has no direction; a whole batch of them are all in one place."""
    for dead in ([2], [0, 1], list(range(24))):
        x = noise(24, 6).float()
        x[dead] = 0.0
        x.requires_grad_()
        y = noise(24, 9, seed=1).float()
        y[3:5] = 0.0
        found = comparison_divergence(x, y, torch.arange(24) % 5, margin=2.0, **rule)
        (grad,) = torch.autograd.grad(found, x)
        assert found.isfinite() and grad.isfinite().all()


def test_dead_units_pass_no_gradient_on():
    """After a ReLU an embedding of zeros is what gets none, as everywhere in a network."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        module[1].bias.fill_(-100.0)
    net = Net(module, {}, (3, 1, 1))
    embed = net(noise(6, 3, 1, 1).float())["embed"]
    assert torch.equal(embed, torch.zeros(6, 4))
    found = comparison_divergence(embed, noise(6, 2), PAIRS_OF_THREE, margin=2.0)
    (grad,) = torch.autograd.grad(found, module[1].weight)
    assert found == 0 and torch.equal(grad, torch.zeros_like(grad))


@every_rule
def test_lengths_do_not_matter_and_neither_do_directions_of_axes(rule: Any):
    """Each image's vector has its own length, from 1e-4 to 1e4, in both networks."""
    x, y, label = noise(12, 6), noise(12, 9, seed=1), torch.arange(12) % 3
    lengths = torch.logspace(-4, 4, 12, dtype=torch.float64)[:, None]
    turn = torch.linalg.qr(noise(6, 6, seed=2)).Q
    expected = comparison_divergence(x, y, label, **rule)
    assert expected > 1e-6
    close(comparison_divergence(x * lengths, y / lengths, label, **rule), expected)
    close(comparison_divergence(x @ turn, y.flip(1), label, **rule), expected)


@every_rule
def test_the_numbers_that_name_classes_do_not_matter(rule: Any):
    x, y, label = noise(12, 6), noise(12, 9, seed=1), torch.arange(12) % 3
    found = comparison_divergence(x, y, torch.tensor([70, 3, 41])[label], **rule)
    assert torch.equal(found, comparison_divergence(x, y, label, **rule))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_vectors_of_half_precision_are_compared_in_float32(dtype: torch.dtype):
    """Squares of 300 overflow float16."""
    x, y = (300 * noise(24, 6)).to(dtype).requires_grad_(), (300 * noise(24, 9, seed=1)).to(dtype)
    label = torch.arange(24) % 5
    found = comparison_divergence(x, y, label)
    assert found.dtype == torch.float32 and found > 0
    assert torch.equal(found, comparison_divergence(x.float(), y.float(), label))
    assert torch.autograd.grad(found, x)[0].isfinite().all()


def test_weights_of_half_precision_are_computed_in_float32():
    for weighting in ("minmax", "raw"):
        found = instance_weights(HEAD.bfloat16(), weighting)
        assert found.dtype == torch.float32
        assert torch.equal(found, instance_weights(HEAD, weighting))


def test_one_class_alone_costs_nothing_beside_cross_entropy():
    z = noise(4, 3).requires_grad_()
    present = torch.tensor([False, True, False])
    found = local_divergence(z, 9 * noise(4, 3, seed=1), present)
    assert torch.equal(found, torch.zeros_like(found))
    (grad,) = torch.autograd.grad(found.sum(), z)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_images_of_equal_loss_all_have_weight_one():
    """Not 0 / 0; one image is such a batch too. Raw, two even classes are 2 (1/2) / (3/2)."""
    for n in (1, 3):
        logits = torch.tensor([[0.0, 0.0]]).repeat(n, 1)
        assert torch.equal(instance_weights(logits), torch.ones(n))
        close(instance_weights(logits, "raw"), torch.full((n,), 2 / 3))


def test_the_least_sure_images_weigh_least():
    """From 2 sigmoid(-1) to 1 whatever the losses are, down to 2 / (1 + K') raw."""
    logits = torch.tensor([[0.0] * 7, [1.0, *[0.0] * 6], [1e4, *[0.0] * 6], [-1e4, *[0.0] * 6]])
    scaled, raw = instance_weights(logits), instance_weights(logits, "raw")
    close(scaled[[0, 2]], torch.tensor([2 / (1 + math.e), 1.0]))
    close(raw[[0, 2, 3]], torch.tensor([2 / 8, 1.0, 2 / 7]))
    for weights in (scaled, raw):
        assert weights[2] > weights[1] > weights[3] > weights[0]


def test_only_the_raw_weights_are_the_same_in_any_batch():
    """Without the least sure image the next one is the least sure."""
    assert torch.equal(
        instance_weights(HEAD[[0, 1, 3]], "raw"), instance_weights(HEAD, "raw")[[0, 1, 3]]
    )
    close(instance_weights(HEAD[[0, 1, 3]])[[0, 1]], torch.tensor([1.0, 2 / (1 + math.e)]))


def test_losses_that_differ_by_a_rounding_still_give_weights_in_range():
    logits = torch.tensor([[20.0, 0.0], [20.000002, 0.0], [17.0, 0.0]])
    found = instance_weights(logits)
    assert found.isfinite().all() and found.min() >= 2 / (1 + math.e) - 1e-6 and found.max() == 1


def test_extreme_logits_have_a_finite_divergence_and_gradient():
    """Sure of the one class where the target is sure of the other: 1e4 nats, and slopes +-1."""
    z = torch.tensor([[0.0, 1e4, 0.0], [1e4, -1e4, 0.0]], requires_grad=True)
    target = torch.tensor([[1e4, 0.0, 0.0], [1e4, 0.0, -1e4]])
    found = local_divergence(z, target, torch.tensor([True, True, False]))
    close(found, torch.tensor([1e4, 0.0]))
    (grad,) = torch.autograd.grad(found.sum(), z)
    close(grad, torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_logits_of_absent_classes_do_not_matter_and_get_no_gradient():
    z, target = noise(4, 5).requires_grad_(), noise(4, 5, seed=1)
    present = torch.tensor([True, False, True, True, False])
    found = local_divergence(z, target, present)
    (grad,) = torch.autograd.grad(found.sum(), z)
    assert torch.equal(grad[:, ~present], torch.zeros(4, 2, dtype=z.dtype))
    assert grad[:, present].abs().min() > 0
    other = torch.where(present, z, torch.tensor(1e4, dtype=z.dtype))
    assert torch.equal(found, local_divergence(other, torch.where(present, target, -7.0), present))
    few = local_divergence(z[:, present], target[:, present], torch.ones(3, dtype=torch.bool))
    close(found, few)


def test_a_class_without_training_images_has_a_centre_of_zeros():
    """It may be in the batch all the same; nothing is NaN."""
    method = refilled()
    centres = class_means([(PHI, torch.tensor([0, 1, 1, 0]))], 3)
    assert torch.equal(centres[2], torch.zeros(2))
    z = Z.clone().requires_grad_()
    method.centres = centres
    terms = method.loss(outputs(Y, (z, PHI), (HEAD, PHI)))
    (grad,) = torch.autograd.grad(sum(terms.values()), z)
    assert all(t.isfinite() for t in terms.values()) and grad.isfinite().all()
    target = PHI @ centres.mT
    present = torch.tensor([True, False, True])
    expected = (instance_weights(HEAD) * local_divergence(z, target, present)).mean()
    assert torch.equal(terms["local"], expected)


def test_no_gradient_reaches_the_teacher():
    """Neither its vectors nor its head: the weights are no function of the student either."""
    x, y = (circle(a).requires_grad_() for a in (OWN_ANGLES, TAUGHT_ANGLES))
    comparison_divergence(x, y, PAIRS_OF_THREE).backward()
    assert x.grad.abs().sum() > 0 and y.grad is None
    z, target = Z.clone().requires_grad_(), PHI.new_ones(4, 3).requires_grad_()
    local_divergence(z, target, torch.ones(3, dtype=torch.bool)).sum().backward()
    assert z.grad.abs().sum() > 0 and target.grad is None
    head, phi = HEAD.clone().requires_grad_(), PHI.clone().requires_grad_()
    method = refilled()
    method.centres = class_means([(PHI, Y)], 3)
    sum(method.loss(outputs(Y, (z, PHI), (head, phi))).values()).backward()
    assert head.grad is None and phi.grad is None
    assert not instance_weights(head).requires_grad


def test_an_image_that_is_in_no_tuple_gets_no_gradient():
    """However near the margin its distance is: .215 beyond the positive's."""
    x = circle((0.0, 0.30, 0.47, 0.52)).requires_grad_()
    found = comparison_divergence(x, circle((0.0, 0.2, 0.9, 1.0)), torch.tensor([0, 0, 1, 2]))
    (grad,) = torch.autograd.grad(found, x)
    assert found > 1e-4 and grad[:3].abs().sum(dim=1).min() > 1e-4
    close(grad[3], torch.zeros_like(grad[3]), atol=1e-15, rtol=0)


# --- bounded memory


@every_rule
@pytest.mark.parametrize("limit", [1, 24, 24 * 7, 24 * 90, 24 * 91])
def test_pairs_in_parts_are_the_same_pairs(rule: Any, limit: int):
    """24 images of 5 classes have 4 * 5 * 4 + 4 * 3 = 92 pairs; parts of 1, 1, 7, 90 and 91."""
    x, again = noise(24, 6).requires_grad_(), noise(24, 6).requires_grad_()
    y, label = noise(24, 9, seed=1), torch.arange(24) % 5
    whole = comparison_divergence(x, y, label, **rule)
    parts = comparison_divergence(again, y, label, **rule, limit=limit)
    close(parts, whole, rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(whole, x)
    for _ in range(2):  # a turn may differentiate one forward several times
        (grad,) = torch.autograd.grad(parts, again, retain_graph=True)
        close(grad, expected, rtol=1e-9, atol=1e-14)


@every_rule
def test_pairs_in_parts_bound_the_memory_of_both_directions(rule: Any):
    """48 images of 2 classes have 1104 pairs, each with 48 images and its positive."""
    seen = []
    for limit in (2**24, 48 * 48):
        x, label = noise(48, 4).requires_grad_(), torch.arange(48) % 2
        with Live() as live:
            found = comparison_divergence(x, noise(48, 4, seed=1), label, limit=limit, **rule)
            torch.autograd.grad(found, x)
        seen.append(live)
    assert seen[0].largest == 1104 * 49
    assert seen[1].largest <= 48 * 49
    assert seen[1].peak < seen[0].peak / 4


def test_predictions_and_weights_read_no_value_and_stay_on_their_device():
    """On the meta device there are none to read. (The number of pairs is one, in the other.)"""
    z = torch.zeros(4, 3, device="meta", requires_grad=True)
    target, present = (torch.zeros(4, 3, device="meta"), torch.ones(3, device="meta").bool())
    assert torch.autograd.grad(local_divergence(z, target, present).sum(), z)[0].is_meta
    for weighting in ("minmax", "raw"):
        assert instance_weights(z, weighting).is_meta


# --- other classes than the teacher's


OTHER = (0, 2, 3, 9, 11, 12, 13)


def cross_task(teacher_classes: Any = OTHER, **arguments: Any) -> tuple[REFILLED, ToyImages]:
    """Ids 2, 3, 4, 5 against seven, two of them in common; a head that is sure of some images."""
    images = ToyImages()
    data = images.spec()._replace(classes=(2, 3, 4, 5), teacher_classes=[teacher_classes])
    method = refilled(data, classes=7, **arguments)
    with torch.no_grad():
        method.teachers[0].classifier.weight.mul_(20)
    return prepared(method, images), images


def both_terms(method: REFILLED, images: ToyImages) -> dict[str, Tensor]:
    """Of both phases, for a batch of 16."""
    batch = next(images.clean(16))
    first = method.compare_loss(method.compare(batch, START))
    return {**first, **method.loss(method(batch, START))}


@pytest.mark.parametrize("weighting", ["minmax", "raw"])
def test_the_order_of_the_teachers_classes_does_not_matter(weighting: Any):
    """Only its highest probability counts. Were its head indexed by the student's labels, which are
    numbers of other classes, another order would give another loss.
    """
    method, images = cross_task(weighting=weighting)
    batch, (teacher,) = next(images.clean(16)), method.teachers

    def wrong() -> Tensor:
        """What indexing by the student's labels makes of the local term."""
        out = method(batch, START)
        loss = nn.functional.cross_entropy(out.teachers[0].logits, batch.label, reduction="none")
        if weighting == "minmax":
            loss = (loss - loss.min()) / (loss.max() - loss.min())
        target = out.teachers[0]["embed"] @ method.centres.mT
        every = torch.ones(4, dtype=torch.bool)
        divergence = local_divergence(out.students[0].logits, target, every)
        return (2 * torch.sigmoid(-loss) * divergence).mean()

    before, mistaken = both_terms(method, images), wrong()
    assert abs(mistaken - before["local"]) > 1e-3
    with torch.no_grad():
        order = torch.tensor([3, 6, 0, 5, 1, 2, 4])
        teacher.classifier.weight.copy_(teacher.classifier.weight[order])
        teacher.classifier.bias.copy_(teacher.classifier.bias[order])
    after = both_terms(method, images)
    assert list(after) == ["match", "ce", "local"]
    for name in before:
        close(after[name], before[name], rtol=1e-5, atol=0)
    assert abs(wrong() - mistaken) > 1e-3


def test_which_classes_the_teacher_has_does_not_matter():
    """None in common, all, or nobody knows."""
    method, images = cross_task()
    expected = both_terms(method, images)
    for ids in (range(20, 27), (2, 3, 4, 5, 6, 7, 8), (5, 4, 3, 2, 0, 1, 9), None):
        other, _ = cross_task(ids)
        found = both_terms(other, images)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(other.centres, method.centres)


def test_the_order_of_the_students_classes_does_not_matter():
    """Its labels and the rows of its head moved together, and the centres found again."""
    method, images = cross_task()
    expected = both_terms(method, images)
    order = torch.tensor([2, 0, 3, 1])  # class c is now called order[c]
    images.label = order[images.label]
    head = method.student.classifier
    with torch.no_grad():
        for x in (head.weight, head.bias):
            x[order] = x.clone()
    relabelled = both_terms(prepared(method, images), images)
    for name in expected:
        close(relabelled[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_teacher_with_another_number_of_classes_trains():
    method, images = cross_task()
    moments = list(engine.Training(method, images, pace(method, 1)).run())
    assert [list(m.terms) for m in moments if m.epoch_done] == [["match"], ["ce", "local"]]
    assert all(t.isfinite() for m in moments for t in m.terms.values())


# --- variants and phases


@pytest.mark.parametrize(
    ("arguments", "reads", "prepares", "terms"),
    [
        ({}, {"embed", "logits"}, True, ["ce", "local"]),
        ({"weighting": "raw"}, {"embed", "logits"}, True, ["ce", "local"]),
        ({"variant": "minus"}, {"embed"}, True, ["ce", "local"]),
        ({"variant": "emb"}, {"embed"}, False, ["ce"]),
        ({"variant": "emb", "lam": 3.0}, {"embed"}, False, ["ce"]),
        ({"lam": 0.0}, {"embed"}, False, ["ce"]),
        ({"variant": "minus", "lam": 0.0}, {"embed"}, False, ["ce"]),
        ({"teacher_tap": "stage3"}, {"stage3", "logits"}, True, ["ce", "local"]),
        ({"teacher_tap": "stage3", "variant": "minus"}, {"stage3"}, True, ["ce", "local"]),
    ],
)
def test_what_each_variant_reads_and_computes(
    arguments: Any, reads: Any, prepares: bool, terms: list[str]
):
    method = refilled(**arguments)
    assert method.reads == reads
    embed, distill = method.phases()
    assert (embed.name, embed.epochs, distill.name, distill.epochs) == (
        "embed",
        200,
        "distill",
        200,
    )
    assert embed.prepare is None and (distill.prepare is not None) == prepares
    assert distill.predictors is None and embed.order is distill.order is None
    moments = list(engine.Training(method, ToyImages(), pace(method, 1)).run())
    assert [list(m.terms) for m in moments if m.epoch_done] == [["match"], terms]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [16] * 12),
        ({"variant": "minus"}, [16] * 12),
        ({"variant": "emb"}, [16] * 4),
        ({"lam": 0.0}, [16] * 4),
    ],
)
def test_the_teacher_runs_only_where_it_is_asked(arguments: Any, expected: list[int]):
    """An epoch of 64 images in each phase, and once over all for the centres."""
    method = refilled(**arguments)
    seen = count_of(method.teachers[0])
    list(engine.Training(method, ToyImages(), pace(method, 1)).run())
    assert seen == expected


def test_without_weight_it_is_the_variant_of_the_embedding_alone():
    """Bit for bit, after an epoch of each phase."""
    states = []
    for arguments in ({"lam": 0.0}, {"variant": "emb"}):
        method = refilled(**arguments)
        list(engine.Training(method, ToyImages(), pace(method, 1)).run())
        states.append(method.state_dict())
    one, other = states
    assert all(torch.equal(one[key], other[key]) for key in one)


def names_of(method: REFILLED) -> list[set[str]]:
    """What each phase trains."""
    names = {id(p): name for name, p in method.student.module.named_parameters()}
    updates = [u for phase in method.phases() for turn in phase.turns for u in turn.updates]
    assert [u.name for u in updates] == ["embed", "student"]
    return [{names[id(p)] for p in u.parameters} for u in updates]


def test_the_head_rests_in_the_first_phase():
    """Neither gradient nor decay, and the other weights move; then everything does."""
    method = refilled()
    everything = {name for name, _ in method.student.module.named_parameters()}
    head = {n for n in everything if n.startswith(method.student.classifier_path)}
    assert len(head) == 2
    assert names_of(method) == [everything - head, everything]
    start = {n: p.detach().clone() for n, p in method.student.module.named_parameters()}
    for moment in engine.Training(method, ToyImages(), pace(method, 1)).run():
        moved = {
            n for n, p in method.student.module.named_parameters() if not torch.equal(p, start[n])
        }
        assert moved == (everything - head if moment.phase == "embed" else everything)


def test_frozen_parts_stay_in_both_phases():
    """A head that is frozen: the first phase is as ever, the second trains what is before it."""
    method = refilled()
    method.student.classifier.requires_grad_(False)
    method.student.module.conv1.requires_grad_(False)
    learning = {n for n, p in method.student.module.named_parameters() if p.requires_grad}
    assert names_of(method) == [learning, learning]
    frozen = [method.student.classifier.weight, method.student.module.conv1.weight]
    before = [p.clone() for p in frozen]
    moments = list(engine.Training(method, ToyImages(), pace(method, 1)).run())
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    assert [list(m.terms) for m in moments if m.epoch_done] == [["match"], ["ce", "local"]]


def test_the_second_phase_begins_with_a_fresh_optimiser_and_the_centres():
    """When the teacher sees the images for the centres there is no momentum, and no draw."""
    method, images = refilled(), ToyImages()
    training = engine.Training(method, images, pace(method, 1))
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any) -> None:
        if training.phase.name == "distill" and training.step == 0 and len(seen) < 4:
            assert len(training.optimizers["student"].state) == 0
            assert not module.training and not torch.is_grad_enabled()
            seen.append(args[0].clone())

    method.teachers[0].module.register_forward_pre_hook(note)
    steps = 0
    for moment in training.run():
        steps += 1
        if moment.phase == "embed":
            assert len(training.optimizers["embed"].state) > 0
            assert torch.equal(method.centres, torch.zeros_like(method.centres))
    assert steps == 8
    # every image once, clean, in the order of their positions
    assert torch.equal(torch.cat(seen), images.image)
    with torch.no_grad():
        vectors = method.teachers[0](images.image)["embed"].double()
    expected = torch.tensor(centres_by_loops(vectors, images.label, 4))
    close(method.centres, expected.float(), atol=1e-5, rtol=0)


def test_centres_are_of_vectors_that_were_not_normalised_first():
    """(10, 0) and (0, 1): (10, 1) / sqrt 101, where unit vectors have their mean at 45 degrees."""
    vectors = torch.tensor([[10.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 2.0]])
    images = Vectors(vectors, torch.tensor([0, 0, 1, 1]))
    method = REFILLED([plain(2, 2, 3)], [plain(2, 5)], images.spec())
    assert method.centres.shape == (2, 2)
    prepared(method, images)
    close(method.centres, torch.tensor([[0.9950, 0.0995], [0.0, 1.0]]), atol=5e-5, rtol=0)


def test_centres_are_the_whole_teachers_and_in_float32():
    """Of a stochastic one at its expected depth, whatever the training is autocast to."""
    teacher, images = stochastic(toy_net(1, width=6), 0.5), ToyImages(32)
    method = REFILLED([toy_net(0)], [teacher], images.spec())
    teacher.precision = torch.bfloat16
    prepared(method, images)
    assert not teacher.sampled
    with torch.no_grad():
        vectors = teacher.eval().capture(images.image)["embed"]
    close(method.centres, class_means([(vectors, images.label)], 4), atol=1e-6, rtol=0)


def test_centres_are_saved_and_not_found_again():
    """In a training that goes on from within the second phase they are what they were."""
    method = refilled()
    training = engine.Training(method, ToyImages(), pace(method, 1))
    for _ in itertools.islice(training.run(), 6):
        pass
    tensors, state = training.state()
    assert torch.equal(tensors["method/centres"], method.centres)
    close(method.centres.norm(dim=1), torch.ones(4))
    tensors["method/centres"] = method.centres.flip(0)
    resumed = refilled()
    again = engine.Training(resumed, ToyImages(), pace(resumed, 1))
    again.restore(tensors, state)
    seen = count_of(resumed.teachers[0])
    assert len(list(again.run())) == 2 and seen == [16, 16]
    assert torch.equal(resumed.centres, method.centres.flip(0))


def test_the_first_phase_is_scored_by_the_nearest_class_mean_by_hand():
    """Means of the training images' vectors, in eval mode; then argmax of inner products."""
    method, training, test = refilled(), ToyImages(noise=3.0), ToyImages(40, noise=3.0)
    for moment in engine.Training(method, training, pace(method, 1)).run():
        if moment.phase == "distill":
            break
    before = set(method.state_dict())
    predictors = method.phases()[0].predictors()
    assert list(predictors) == ["ncm"]
    found = evaluate(predictors, test, training=training)["ncm"]
    net = method.student.eval()
    with torch.no_grad():
        vectors, shown = (net.capture(i.image)["embed"].tolist() for i in (training, test))
    centres = centres_by_loops(torch.tensor(vectors), training.label, 4)
    right = 0
    for v, y in zip(shown, test.label.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(v, c, strict=True)) for c in centres]
        right += scores.index(max(scores)) == y
    assert found.top1 == pytest.approx(100 * right / 40) and 10 < right < 40
    assert found.images == 40
    # nothing of it is part of the method
    assert set(method.state_dict()) == before
    assert "ncm" not in method.predictors()


# --- other taps


def test_other_taps_are_flattened():
    """The example of six images as maps, in both phases; centres are as wide as the map."""
    rule = {"tap": "stage2", "teacher_tap": "stage2", "tau1": 1.0, "scale": 1.0}
    method = refilled(**rule)
    assert method.centres.shape == (4, 12 * 4 * 4)
    x, y = circle(OWN_ANGLES).view(6, 2, 1, 1), circle(TAUGHT_ANGLES).view(6, 1, 1, 2)
    found = method.compare_loss(compared(x, y, PAIRS_OF_THREE, "stage2"))
    close(found["match"].item(), 0.01522731, atol=6e-9, rtol=0)
    method.centres = class_means([(PHI, Y)], 3)
    maps = PHI.view(4, 1, 2, 1)
    terms = method.loss(outputs(Y, (Z, maps), (HEAD, maps), ("stage2", "stage2")))
    close(terms["local"].item(), 0.022774, atol=1e-6, rtol=0)


def test_each_side_has_its_own_tap():
    """What is compared is what the two taps give, and only what is before the student's moves."""
    method, images = refilled(tap="stage2", teacher_tap="stage3"), ToyImages(32)
    prepared(method.double(), images := ToyImages(32, torch.float64))
    batch = next(images.clean(32))
    first = method.compare(batch, START)
    student, teacher = first.students[0]["stage2"], first.teachers[0]["stage3"]
    value, _ = stage1_by_loops(student.flatten(1), teacher.flatten(1), batch.label, 4.0)
    close(method.compare_loss(first)["match"].item(), 1000 * value, rtol=1e-8, atol=0)
    centres = centres_by_loops(teacher.flatten(1), batch.label, 4)
    close(method.centres, torch.tensor(centres, dtype=torch.float64))
    out = method(batch, START)
    rule = {"lam": 1.0, "tau2": 1.0, "weighting": "minmax"}
    logits = out.students[0].logits, out.teachers[0]["stage3"].flatten(1), out.teachers[0].logits
    _, local, _ = stage2_by_loops(*logits, batch.label, centres, **rule)
    close(method.loss(out)["local"].item(), local, rtol=1e-8, atol=0)
    first_phase, second_phase = names_of(method)
    assert any(n.startswith("layer2") for n in first_phase)
    assert not any(n.startswith(("layer3", "fc")) for n in first_phase)
    assert second_phase == {n for n, _ in method.student.module.named_parameters()}


def test_the_nearest_class_mean_is_of_the_tap_that_is_trained():
    method, images = refilled(tap="stage2"), ToyImages(32)
    (predictor,) = method.phases()[0].predictors().values()
    predictor.eval()
    with torch.no_grad():
        predictor.fit(images.clean(8))
        vectors = method.student.eval().capture(images.image)["stage2"].flatten(1)
    close(predictor.means, class_means([(vectors, images.label)], 4), atol=1e-6, rtol=0)


# --- several ranks


LABELS = torch.tensor([0, 1, 1, 0, 2, 3, 3, 2])
"""The first rank has classes 0 and 1, the second 2 and 3."""


def of_a_share() -> dict[str, list[float]]:
    """Weights, the local term and class means of this rank's share of eight images."""
    share = distributed.local
    z, phi, head = noise(8, 5), noise(8, 3, seed=1), 2 * noise(8, 7, seed=2)
    images = Vectors(noise(8, 3).float(), LABELS)
    method = REFILLED([plain(3, 4, 2)], [plain(3, 7)], images.spec())
    method.centres = noise(5, 3, seed=3)
    shares = (share(LABELS), (share(z), share(phi)), (share(head), share(phi)))
    return {
        "weights": instance_weights(share(head)).tolist(),
        "local": [method.loss(outputs(*shares))["local"].item()],
        "means": class_means([(share(phi), share(LABELS))], 5).flatten().tolist(),
    }


def print_a_share() -> None:
    with distributed.together():
        print(json.dumps(of_a_share()))


def test_two_ranks_share_the_range_of_losses_the_classes_of_the_batch_and_the_means():
    """Each with half the images: the mean over ranks is what one rank has of all."""
    found = [json.loads(rank.communicate()[0]) for rank in fork_ranks(2, print_a_share)]
    whole = of_a_share()
    assert [r for f in found for r in f["weights"]] == pytest.approx(whole["weights"])
    assert sum(f["local"][0] for f in found) / 2 == pytest.approx(whole["local"][0])
    assert found[0]["means"] == found[1]["means"] == pytest.approx(whole["means"])
    alone = instance_weights(2 * noise(8, 7, seed=2)[:4])
    assert (alone - torch.tensor(whole["weights"][:4])).abs().max() > 1e-3


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"variant": "plus"},
            "REFILLED: variant is 'plus'; give 'full', 'minus' or 'emb'",
        ),
        ({"weighting": "entropy"}, "REFILLED: weighting is 'entropy'; give 'minmax' or 'raw'"),
        ({"k_rule": "padded"}, "REFILLED: k_rule is 'padded'; give 'pair' or 'batch_min'"),
        ({"k_hat": 0}, "REFILLED: k_hat is 0; give 1 or more, or None for all"),
        ({"tau1": 0.0}, "REFILLED: tau1 is 0.0; give a number above 0"),
        ({"tau2": -1.0}, "REFILLED: tau2 is -1.0; give a number above 0"),
        ({"tau2": 0.0}, "REFILLED: tau2 is 0.0; give a number above 0"),
        ({"scale": 0.0}, "REFILLED: scale is 0.0; give a number above 0"),
        ({"margin": 0.0}, "REFILLED: margin is 0.0; give a number above 0"),
        ({"lam": -0.5}, "REFILLED: lam is -0.5; give 0 or more"),
        ({"lam": math.nan}, "REFILLED: lam is nan; give 0 or more"),
        ({"tau1": math.nan}, "REFILLED: tau1 is nan; give a number above 0"),
        (
            {"k_rule": "batch_min", "k_hat": 2},
            "REFILLED: k_rule 'batch_min' finds K itself, and k_hat is 2; leave one out",
        ),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: Any, message: str):
    with pytest.raises(MethodError) as error:
        refilled(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("argument", "role"), [("tap", "the student"), ("teacher_tap", "the teacher")]
)
def test_an_unknown_tap_is_refused_with_those_that_exist(argument: str, role: str):
    with pytest.raises(TapError) as error:
        refilled(**{argument: "embedding"})
    assert str(error.value) == (
        f"{role}: no feature 'embedding'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        f'"embed"?; choose {argument}=...'
    )


def test_a_student_has_one_output_a_class():
    """Its logits meet the class means one by one."""
    with pytest.raises(MethodError) as error:
        REFILLED([toy_net(0, classes=6)], [toy_net(1)], ToyImages().spec())
    assert str(error.value) == (
        "REFILLED compares logits with 4 class means, but the student has 6 outputs; give it one "
        "a class"
    )


@pytest.mark.parametrize("of", [{"batch_size": 1}, {"labels": torch.arange(4)}])
def test_a_first_phase_that_could_never_have_a_tuple_is_refused(of: dict[str, Any]):
    """One image a batch, or one of each class."""
    data = ToyImages().spec()
    if "labels" in of:
        of["indices"] = torch.arange(4)
    with pytest.raises(MethodError) as error:
        refilled(data._replace(**of))
    assert str(error.value) == (
        "REFILLED compares images of one class in a batch, and there are never two: make "
        "data.batch_size 2 or more, with two training images of a class or more"
    )
