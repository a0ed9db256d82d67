"""AML: six forms by hand and beside a naive loop, who is drawn and mined, and what is refused."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill import engine
from potstill.errors import MethodError, TapError
from potstill.method import Batch, DataSpec, Phase, Progress, Turn, Update
from potstill.methods.aml import AML, Embedded, draw_positives, hardest, pair_losses
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

NOW = Progress(0, 0, 1, 1)
FORMS = ["contrastive+", "contrastive", "regression", "triplet", "softmax", "multi_similarity"]
PAIRED = [form for form in FORMS if form != "regression"]
every_form = pytest.mark.parametrize("form", FORMS)
every_pair = pytest.mark.parametrize("form", PAIRED)

ANCHOR = torch.tensor([[1.0, 0.0]])
"""The student's anchor of the page; the teacher's own, positive and two negatives follow."""
SELF = torch.tensor([[12 / 13, 5 / 13]])
P = torch.tensor([[0.6, 0.8]])
N = torch.tensor([[[0.8, 0.6], [0.0, 1.0]]])
BOTH = torch.tensor([[True, True]])
PUBLISHED = {"contrastive": 0.7, "contrastive+": 0.7, "triplet": 0.1}


def aml(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> AML:
    torch.manual_seed(3)
    teacher = toy_net(1, width=6, classes=classes)
    return AML([toy_net(0)], [teacher], data or ToyImages().spec(), **arguments)


@functools.cache
def idle_networks() -> tuple[Net, Net]:
    return toy_net(0), toy_net(1, width=6)


def losses(**arguments: Any) -> AML:
    """For losses of made outputs: its networks, which nothing runs, are those of other tests."""
    student, teacher = idle_networks()
    return AML([student], [teacher], ToyImages().spec(), **arguments)


def embedded(own: Tensor, other: Tensor, label: Tensor, positive: Tensor) -> Embedded:
    """Two classes to predict, of which the student prefers neither."""
    batch = Batch(torch.zeros(len(label), 1), torch.zeros_like(label), label, label)
    student = Captured(torch.zeros(len(label), 2), {})
    taught = Captured(torch.zeros(len(label), 7), {})
    return Embedded(batch, NOW, [student], [taught], own, other, positive, label)


def page() -> Embedded:
    """The anchor, its positive, and the two negatives, of three classes: a batch of four.

    The students of the latter three are (-1, 0), the teacher's own vector, and its opposite.
    """
    other = torch.cat([SELF, P, N[0]])
    own = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
    return embedded(own, other, torch.tensor([5, 5, 1, 8]), torch.tensor([1, 0, 2, 3]))


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


def labels(*sizes: int, seed: int = 0) -> Tensor:
    """So many images of each class, shuffled; the classes are not numbered from 0."""
    each = torch.cat([torch.full((n,), 11 * k + 4) for k, n in enumerate(sizes)])
    return each[torch.randperm(len(each), generator=torch.Generator().manual_seed(seed))]


# --- by hand


def distances() -> tuple[float, float, float]:
    """|(1, 0) - (.6, .8)|^2 = .16 + .64; |(1, 0) - (.8, .6)|^2 = .04 + .36; |(1, 0) - (0, 1)|^2."""
    return math.sqrt(0.8), math.sqrt(0.4), math.sqrt(2.0)


def test_contrastive_by_hand():
    """.8 / 2 + (.7 - .632456)^2 / 2 = .4 + .067544^2 / 2; the second negative is 1.414214 away."""
    found = pair_losses(ANCHOR, P, N, BOTH, "contrastive", 0.7)
    close(found, torch.tensor([0.40228113]), atol=1e-7, rtol=0)
    assert torch.equal(found, pair_losses(ANCHOR, P, N, BOTH))


def test_contrastive_plus_has_the_same_pairs():
    """Its self term is one of the batch, not of an anchor."""
    close(
        pair_losses(ANCHOR, P, N, BOTH, "contrastive+", 0.7).item(), 0.40228113, atol=1e-7, rtol=0
    )


def test_triplet_by_hand():
    """.8 - .4 + .1 = .5 and .8 - 2 + .1 < 0; with a margin of 1.5, 1.9 and .3."""
    close(pair_losses(ANCHOR, P, N, BOTH, "triplet", 0.1), torch.tensor([0.5]))
    close(pair_losses(ANCHOR, P, N, BOTH, "triplet", 1.5), torch.tensor([2.2]))


@pytest.mark.parametrize(("tau", "expected"), [(0.1, 2.690386), (1.0, 1.062687)])
def test_softmax_by_hand(tau: float, expected: float):
    """log(1 + sum_n exp((d_p - d_n) / tau)): at .1 the exponents are 2.61972 and -5.19786."""
    p, *negatives = distances()
    close(
        math.log(1 + sum(math.exp((p - n) / tau) for n in negatives)), expected, atol=1e-6, rtol=0
    )
    close(pair_losses(ANCHOR, P, N, BOTH, "softmax", tau=tau).item(), expected, atol=1e-6, rtol=0)


def test_multi_similarity_by_hand():
    """s_p = .6, s_n = .8 and 0: log(1 + e^-.2) / 2 = .299069, log(1 + e^12 + e^-20) / 40 = .3."""
    expected = math.log(1 + math.exp(-0.2)) / 2
    expected += math.log(1 + math.exp(12) + math.exp(-20)) / 40
    close(expected, 0.599070, atol=1e-6, rtol=0)
    close(pair_losses(ANCHOR, P, N, BOTH, "multi_similarity").item(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("form", "first_missing", "none"),
    [
        ("contrastive", 0.4, 0.4),  # .8 / 2
        ("contrastive+", 0.4, 0.4),
        ("triplet", 0.0, 0.0),
        ("softmax", 0.005513, 0.0),  # log(1 + e^-5.19786), log 1
        ("multi_similarity", 0.299069, 0.299069),
    ],
)
def test_a_negative_that_is_not_there_costs_nothing_and_gets_no_gradient(
    form: Any, first_missing: float, none: float
):
    """Whatever its vector is."""
    for there, expected in (((False, True), first_missing), ((False, False), none)):
        for first in (N[0, 0], ANCHOR[0], -ANCHOR[0]):
            f = ANCHOR.clone().requires_grad_()
            n = torch.stack([first, N[0, 1]])[None].requires_grad_()
            value = pair_losses(f, P, n, torch.tensor([there]), form, PUBLISHED.get(form, 0.7))
            close(value.item(), expected, atol=1e-6, rtol=0)
            for_f, for_n = torch.autograd.grad(value.sum(), [f, n])
            assert for_f.isfinite().all()
            assert not for_n[0, 0].any()


def test_more_negatives_are_summed_and_each_anchor_is_alone():
    """Twice the first negative: .4 + 2 * .002281; triplet 2 * .5. The next anchor has none."""
    anchors, positives = torch.cat([ANCHOR, ANCHOR]), torch.cat([P, ANCHOR])
    negatives = torch.cat([N[:, [0, 0]], N])
    there = torch.tensor([[True, True], [False, False]])
    found = pair_losses(anchors, positives, negatives, there, "contrastive", 0.7)
    close(found, torch.tensor([0.4 + 2 * 0.00228113, 0.0]), atol=1e-7, rtol=0)
    found = pair_losses(anchors, positives, negatives, there, "triplet", 0.1)
    close(found, torch.tensor([1.0, 0.0]))


def test_terms_by_hand():
    """Anchors are the first two: .40228113, and of f = (-1, 0) with the first's g, 1 + 12/13 (both
    negatives are beyond the margin): mean 1.16267903. Self terms 1 - f.g of all four: 1/13, 1.6, 0,
    2, mean .91923077. ce = ln 2.
    """
    found = losses().loss(page())
    assert list(found) == ["ce", "pairs", "self"]
    close(found["ce"].item(), math.log(2.0))
    close(found["pairs"].item(), 1.16267903, atol=1e-6, rtol=0)
    close(found["self"].item(), 0.91923077, atol=1e-6, rtol=0)


def test_weights_multiply():
    found = losses(beta=3.0, gamma=2.0).loss(page())
    close(found["ce"].item(), 2 * math.log(2.0))
    close(found["pairs"].item(), 3 * 1.16267903, atol=1e-5, rtol=0)
    close(found["self"].item(), 3 * 0.91923077, atol=1e-5, rtol=0)


def test_contrastive_plus_of_one_anchor_by_hand():
    """.40228113 + .07692308 = .5 * .15384615: what is the page's where it is all there is."""
    alone = embedded(ANCHOR, SELF, torch.tensor([0]), torch.tensor([0]))
    found = losses().loss(alone)
    assert found["pairs"] == 0
    close(found["self"].item(), 0.07692308, atol=1e-7, rtol=0)
    pairs = pair_losses(ANCHOR, P, N, BOTH, "contrastive+", 0.7)
    close((pairs + found["self"]).item(), 0.47920420, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("form", "terms"),
    [(f, ["ce", "pairs", "self"] if f == "contrastive+" else ["ce", "pairs"]) for f in PAIRED]
    + [("regression", ["ce", "self"])],
)
def test_terms_of_each_form(form: Any, terms: list[str]):
    assert list(losses(form=form).loss(page())) == terms


def test_regression_alone_by_hand():
    """1 - 12/13 = 1/13 of one image; it needs neither a positive nor a negative."""
    alone = embedded(ANCHOR, SELF, torch.tensor([0]), torch.tensor([0]))
    found = losses(form="regression").loss(alone)
    close(found["self"].item(), 1 / 13)


def test_of_unit_vectors_regression_is_one_minus_the_cosine():
    own, other = unit(7, 5), unit(7, 5, seed=1)
    out = embedded(own, other, torch.zeros(7, dtype=torch.int64), torch.arange(7))
    expected = sum(1 - f @ g for f, g in zip(own, other, strict=True))
    close(losses(form="regression").loss(out)["self"], expected / 7)


@pytest.mark.parametrize(
    ("form", "published", "cost", "wider"),
    [
        ("contrastive", 0.7, 1.16267903, 1.24206501),  # (1.2 - .632456)^2 / 2 in L_a
        ("contrastive+", 0.7, 1.16267903, 1.24206501),
        ("triplet", 0.1, 1.39615385, 2.14615385),  # 50/13 - 3.6 and - 2 in the second anchor's
    ],
)
def test_published_margins_and_others(form: Any, published: float, cost: float, wider: float):
    """None is the published one; .5 more is active for one negative of an anchor, or for two."""
    for margin, expected in ((None, cost), (published, cost), (published + 0.5, wider)):
        found = losses(form=form, margin=margin).loss(page())
        close(found["pairs"].item(), expected, atol=1e-6, rtol=0)


def test_the_published_temperature_is_a_tenth():
    """L_a = 2.690386. Of f = (-1, 0): |f - (12/13, 5/13)|^2 = 50/13, |f - (.8, .6)|^2 = 3.6, 2."""
    p, *negatives = (math.sqrt(x) for x in (50 / 13, 3.6, 2.0))
    for tau in (0.1, 0.5):
        second = math.log(1 + sum(math.exp((p - n) / tau) for n in negatives))
        a, *rest = distances()
        first = math.log(1 + sum(math.exp((a - n) / tau) for n in rest))
        found = losses(form="softmax", **({} if tau == 0.1 else {"tau": tau})).loss(page())
        close(found["pairs"].item(), (first + second) / 2, atol=1e-5, rtol=0)


def test_five_negatives_are_the_published_number():
    """Eight lone classes in one place, at distance 0 from the two anchors: m^2 / 2 each."""
    own = other = ANCHOR.repeat(10, 1)
    label = torch.tensor([0, 0, *range(1, 9)])
    out = embedded(own, other, label, torch.tensor([1, 0, *range(2, 10)]))
    close(losses().loss(out)["pairs"].item(), 5 * 0.49 / 2)
    close(losses(negatives=2).loss(out)["pairs"].item(), 2 * 0.49 / 2)
    close(losses(negatives=20).loss(out)["pairs"].item(), 8 * 0.49 / 2)


# --- beside a naive loop


def naive(
    own: Tensor,
    other: Tensor,
    label: list[int],
    positive: list[int],
    form: str,
    margin: float,
    tau: float,
    count: int,
) -> tuple[Tensor, Tensor]:
    """The mean over anchors of the pairs, and the mean over images of the self term: the page."""
    pairs = []
    for a in range(len(own)):
        best: dict[int, tuple[float, int]] = {}
        for x in range(len(own)):
            near = (own[a] * other[x]).sum().item()
            if label[x] != label[a] and (label[x] not in best or near > best[label[x]][0]):
                best[label[x]] = (near, x)
        chosen = [x for _, x in sorted(best.values(), reverse=True)][:count]
        if positive[a] == a or not chosen:
            continue
        f, g = own[a], other[positive[a]]
        d_p = (f - g).pow(2).sum().sqrt()
        d_n = [(f - other[x]).pow(2).sum().sqrt() for x in chosen]
        zero = torch.zeros((), dtype=own.dtype)
        if form in ("contrastive", "contrastive+"):
            push = [max(zero, margin - d) ** 2 / 2 for d in d_n]
            pairs.append(d_p**2 / 2 + sum(push))
        elif form == "triplet":
            pairs.append(sum((max(zero, d_p**2 - d**2 + margin) for d in d_n), zero))
        elif form == "softmax":
            weights = [(-d / tau).exp() for d in (d_p, *d_n)]
            pairs.append(-(weights[0] / sum(weights)).log())
        else:
            far = sum((40 * ((f * other[x]).sum() - 0.5)).exp() for x in chosen)
            near = (-2 * ((f * g).sum() - 0.5)).exp()
            pairs.append((1 + near).log() / 2 + (1 + far).log() / 40)
    alone = [(own[a] - other[a]).pow(2).sum() / 2 for a in range(len(own))]
    return sum(pairs) / len(pairs), sum(alone) / len(alone)


@pytest.mark.parametrize("count", [1, 3, 9])
@every_form
def test_the_loss_is_that_of_a_naive_loop(form: Any, count: int):
    """20 images of 5 classes, one of which has one image: values and gradients in float64."""
    for seed in range(3):
        label = labels(7, 6, 4, 2, 1, seed=seed)
        raw, other = unit(20, 4, seed=2 * seed), unit(20, 4, seed=2 * seed + 1)
        torch.manual_seed(seed)
        positive = draw_positives(label)
        method = losses(form=form, negatives=count)
        own, again = raw.clone().requires_grad_(), raw.clone().requires_grad_()
        found = method.loss(embedded(own, other, label, positive))
        pairs, alone = naive(
            again,
            other,
            label.tolist(),
            positive.tolist(),
            form,
            PUBLISHED.get(form, 0.0),
            0.1,
            count,
        )
        expected = {"pairs": pairs, "self": alone}
        for name in found.keys() - {"ce"}:
            close(found[name], expected[name], rtol=1e-12, atol=0)
            (one,) = torch.autograd.grad(found[name], own, retain_graph=True)
            (two,) = torch.autograd.grad(expected[name], again, retain_graph=True)
            close(one, two, rtol=1e-10, atol=1e-13)
            assert one.abs().max() > 1e-3


@every_form
def test_turning_both_spaces_alike_changes_nothing(form: Any):
    turn = torch.linalg.qr(unit(4, 4, seed=9)).Q
    label, own, other = labels(4, 3, 2), unit(9, 4), unit(9, 4, seed=1)
    torch.manual_seed(0)
    positive = draw_positives(label)
    one = losses(form=form).loss(embedded(own, other, label, positive))
    two = losses(form=form).loss(embedded(own @ turn, other @ turn, label, positive))
    for name, term in one.items():
        close(two[name], term)
    three = losses(form=form).loss(embedded(own @ turn, other, label, positive))
    assert any((three[name] - term).abs() > 1e-3 for name, term in one.items())


@every_form
def test_the_order_of_images_does_not_matter(form: Any):
    label, own, other = labels(4, 3, 2), unit(9, 4), unit(9, 4, seed=1)
    torch.manual_seed(0)
    positive, order = draw_positives(label), torch.tensor([3, 8, 0, 1, 7, 2, 4, 6, 5])
    one = losses(form=form).loss(embedded(own, other, label, positive))
    moved = order.argsort()[positive[order]]
    two = losses(form=form).loss(embedded(own[order], other[order], label[order], moved))
    for name, term in one.items():
        close(two[name], term)


# --- gradients


@every_pair
def test_who_is_no_anchor_gives_neither_value_nor_gradient(form: Any):
    """The last two images are alone in their class: negatives of the others, and nothing else."""
    label, other = torch.tensor([0, 0, 1, 2]), unit(4, 3, seed=1)
    own = unit(4, 3).requires_grad_()
    positive = torch.tensor([1, 0, 2, 3])
    method = losses(form=form, **({"margin": 4.0} if form in PUBLISHED else {}))
    value = method.loss(embedded(own, other, label, positive))["pairs"]
    (grad,) = torch.autograd.grad(value, own)
    assert grad[:2].abs().amin(dim=1).gt(0).all() and not grad[2:].any()
    moved = own.detach().clone()
    moved[2:] = -moved[2:]
    same = method.loss(embedded(moved, other, label, positive))["pairs"]
    assert torch.equal(same, value)


@every_pair
@pytest.mark.parametrize("label", [[4, 4, 4], [4, 5, 6], [4]], ids=str)
def test_a_batch_without_anchors_costs_nothing(form: Any, label: list[int]):
    """Of one class there are no negatives, of lone images no positives; of one image neither."""
    n = len(label)
    own = unit(n, 3).requires_grad_()
    torch.manual_seed(0)
    positive = draw_positives(torch.tensor(label))
    out = embedded(own, unit(n, 3, seed=1), torch.tensor(label), positive)
    value = losses(form=form).loss(out)["pairs"]
    (grad,) = torch.autograd.grad(value, own)
    assert value == 0 and torch.equal(grad, torch.zeros_like(own))


def test_an_inactive_negative_has_no_gradient():
    """At 1.414 and 1.897 from the anchor, which is where its positive is: nothing is left."""
    f = ANCHOR.clone().requires_grad_()
    far = torch.tensor([[[0.0, 1.0], [-0.8, 0.6]]])
    value = pair_losses(f, ANCHOR, far, BOTH, "contrastive", 0.7)
    (grad,) = torch.autograd.grad(value.sum(), f)
    assert value == 0 and not grad.any()
    (with_it,) = torch.autograd.grad(pair_losses(f, P, N, BOTH, "contrastive", 0.7).sum(), f)
    one = torch.tensor([[True, False]])
    (without,) = torch.autograd.grad(pair_losses(f, P, N, one, "contrastive", 0.7).sum(), f)
    assert torch.equal(with_it, without)


@every_form
def test_vectors_in_one_place_have_finite_gradients(form: Any):
    """Anchor, positive, negatives and own vector coincide: a distance of 0 has no direction."""
    own = ANCHOR.repeat(4, 1).requires_grad_()
    out = embedded(own, ANCHOR.repeat(4, 1), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 3, 2]))
    found = losses(form=form).loss(out)
    total = sum(term for name, term in found.items() if name != "ce")
    (grad,) = torch.autograd.grad(total, own)
    assert total.isfinite() and grad.isfinite().all()
    if form != "multi_similarity":  # which is of inner products
        assert not grad.any()


def test_the_gradient_of_a_coincident_negative_is_zero():
    """Its push is m^2 / 2 = .245, in no direction; the positive is where the anchor is."""
    f = ANCHOR.clone().requires_grad_()
    value = pair_losses(f, ANCHOR, ANCHOR[None], BOTH[:, :1], "contrastive", 0.7)
    (grad,) = torch.autograd.grad(value.sum(), f)
    close(value.item(), 0.245)
    assert not grad.any()


@every_form
def test_zero_vectors_are_finite(form: Any):
    """On either side, as a dead network's are."""
    label, positive = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 3, 2])
    zero, there = torch.zeros(4, 2), ANCHOR.repeat(4, 1)
    for one, other in ((zero, there), (there, zero), (zero, zero)):
        own = one.clone().requires_grad_()
        found = losses(form=form).loss(embedded(own, other, label, positive))
        (grad,) = torch.autograd.grad(sum(t for n, t in found.items() if n != "ce"), own)
        assert all(term.isfinite() for term in found.values())
        assert grad.isfinite().all()


@every_pair
def test_gradients_are_those_of_the_value(form: Any):
    p, n = unit(3, 4, seed=1), unit(3, 2, 4, seed=2)
    there = torch.tensor([[True, True], [True, False], [False, False]])
    assert torch.autograd.gradcheck(
        lambda f: pair_losses(f, p, n, there, form, 0.9, 0.3), unit(3, 4).requires_grad_()
    )


# --- who is drawn


def test_a_positive_is_another_image_of_the_class():
    label = labels(7, 6, 4, 2, 1)
    torch.manual_seed(0)
    for _ in range(200):
        positive = draw_positives(label)
        assert torch.equal(label[positive], label)
        itself = positive == torch.arange(20)
        assert torch.equal(itself, (label[:, None] == label).sum(dim=1) == 1)


def test_every_other_image_of_the_class_is_as_likely_and_each_image_draws_for_itself():
    """Three images of one class have 2^3 outcomes of 1/8 each, four of another a third each.

    Within 3 standard deviations in 4,000 draws.
    """
    label, n = torch.tensor([2, 7, 2, 7, 7, 5, 2, 7]), 4000
    torch.manual_seed(1)
    draws = torch.stack([draw_positives(label) for _ in range(n)])
    assert draws[:, 5].eq(5).all()
    three = [tuple(row) for row in draws[:, [0, 2, 6]].tolist()]
    for outcome in itertools.product((2, 6), (0, 6), (0, 2)):
        assert abs(three.count(outcome) - n / 8) < 3 * math.sqrt(n * 1 / 8 * 7 / 8)
    for a in (1, 3, 4, 7):
        for p in {1, 3, 4, 7} - {a}:
            assert abs(draws[:, a].eq(p).sum() - n / 3) < 3 * math.sqrt(n * 1 / 3 * 2 / 3)


@pytest.mark.parametrize("label", [[3], [3, 1, 2]], ids=str)
def test_who_is_alone_is_its_own_positive(label: list[int]):
    assert draw_positives(torch.tensor(label)).tolist() == list(range(len(label)))


# --- who is mined

LABEL = torch.tensor([0, 1, 1, 2, 2, 3])
ROW = torch.tensor([1.0, 0.3, 0.9, 0.5, 0.4, 0.7])
"""Nearness of the first image, of class 0, to all."""


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [2]), (2, [2, 5]), (3, [2, 5, 3]), (4, [2, 5, 3]), (9, [2, 5, 3])]
)
def test_the_hardest_of_each_other_class_by_hand(count: int, expected: list[int]):
    """Class 1 at .9, class 3 at .7, class 2 at .5; never class 0, whose own image is at 1."""
    chosen, there = hardest(ROW.repeat(6, 1), LABEL, count)
    assert chosen.shape == there.shape == (6, min(count, 6))
    assert chosen.dtype == torch.int64
    assert chosen[0][there[0]].tolist() == expected
    assert there[0].tolist() == [i < 3 for i in range(min(count, 6))]


def test_rows_are_the_anchors():
    """The last image, of class 3, sees class 0 first and class 1 before class 2."""
    chosen, _ = hardest(ROW.repeat(6, 1), LABEL, 3)
    assert chosen[5].tolist() == [0, 2, 3]
    similarity = torch.zeros(6, 6)
    similarity[0, 5] = similarity[5, 1] = 1.0
    chosen, _ = hardest(similarity, LABEL, 1)
    assert (chosen[0].item(), chosen[5].item()) == (5, 1)


def test_of_equals_the_earlier_in_the_batch_is_chosen():
    chosen, there = hardest(torch.zeros(6, 6), LABEL, 5)
    assert [c[t].tolist() for c, t in zip(chosen, there, strict=True)] == [
        [1, 3, 5],
        [0, 3, 5],
        [0, 3, 5],
        [0, 1, 5],
        [0, 1, 5],
        [0, 1, 3],
    ]


@pytest.mark.parametrize("n", [1, 4])
def test_of_one_class_nobody_is_mined(n: int):
    chosen, there = hardest(torch.eye(n), torch.full((n,), 3), 5)
    assert chosen.shape == there.shape == (n, min(n, 5)) and not there.any()
    assert chosen.ge(0).all() and chosen.lt(n).all()


def test_mining_is_that_of_a_naive_loop():
    """Classes of any number, any sizes, negative nearness too."""
    for seed in range(6):
        label = labels(*([5, 4, 3, 2, 2, 1] if seed % 2 else [8, 6]), seed=seed)
        n, count = len(label), 1 + seed
        similarity = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) - seed
        chosen, there = hardest(similarity, label, count)
        for a in range(n):
            ranked = sorted(range(n), key=lambda x, a=a: -similarity[a, x].item())
            expected, seen = [], {label[a].item()}
            for x in ranked:
                if label[x].item() not in seen:
                    seen.add(label[x].item())
                    expected.append(x)
            assert chosen[a][there[a]].tolist() == expected[:count]


# --- networks


def test_what_is_compared_is_of_unit_length_and_mapped():
    """f = (W phi + b) / |W phi + b|, g the teacher's vector over its length, of another width."""
    method, batch = aml(), next(ToyImages(8).clean(8))
    out = method(batch, NOW)
    phi, vector = out.students[0].features["embed"], out.teachers[0].features["embed"]
    mapped = phi @ method.embed.weight.T + method.embed.bias
    close(out.own, mapped / mapped.square().sum(1, keepdim=True).sqrt())
    close(out.other, vector / vector.square().sum(1, keepdim=True).sqrt())
    assert phi.shape == (8, 8) and vector.shape == out.own.shape == out.other.shape == (8, 12)
    assert torch.equal(out.label, batch.label)
    assert out.positive.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]  # two of each of four classes


def test_the_length_of_the_mapped_vector_does_not_matter():
    method, batch = aml(), next(ToyImages(16).clean(16))
    torch.manual_seed(0)
    one = method.loss(method(batch, NOW))
    with torch.no_grad():
        for p in method.embed.parameters():
            p.mul_(4.0)
    torch.manual_seed(0)
    two = method.loss(method(batch, NOW))
    for name, term in one.items():
        close(two[name], term)


def test_gradient_reaches_the_student_and_the_map_and_nothing_of_the_teacher():
    method = aml(form="regression")
    for p in method.teachers[0].parameters():
        p.requires_grad_()
    out = method(next(ToyImages(8).clean(8)), NOW)
    assert out.own.requires_grad and not out.other.requires_grad
    assert not any(x.requires_grad for x in out.teachers[0].features.values())
    method.loss(out)["self"].backward()
    assert method.student.module.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in method.embed.parameters())
    assert all(p.grad is None for p in method.teachers[0].parameters())
    assert method.student.classifier.weight.grad is None  # it reads phi, not P phi


@pytest.mark.parametrize(
    ("student", "teacher", "parameters"),
    [
        ("wrn_16_1", "wrn_40_2", 8_320),
        ("mobilenetv1_x0_25_imagenet", "mobilenetv1_imagenet", 263_168),
        ("wrn_16_1", "wrn_40_1", 64 * 64 + 64),
    ],
)
def test_published_sizes_of_the_map(student: str, teacher: str, parameters: int):
    """With a bias; at equal widths too."""
    spec = ToyImages().spec()._replace(input_shape=(3, 32, 32))
    method = AML([build(student, 4)], [build(teacher, 4)], spec)
    assert sum(p.numel() for p in method.embed.parameters()) == parameters
    own = sum(p.numel() for p in method.student.parameters())
    assert sum(p.numel() for p in method.trainable()) == own + parameters


def test_the_map_is_trained_and_no_part_of_what_is_evaluated():
    method, batch = aml(), next(ToyImages(16).clean(16))
    predictor = method.predictors()["student"].eval()
    with torch.no_grad():
        before = predictor(batch.image)
        for p in method.embed.parameters():
            p.add_(1.0)
        assert torch.equal(predictor(batch.image), before)
    assert predictor.state_dict().keys() == method.student.state_dict().keys()
    (phase,) = method.phases()
    (update,) = phase.turns[0].updates
    weight = [p.detach().clone() for p in method.embed.parameters()]
    method.train()
    sgd = torch.optim.SGD(update.parameters, 0.1)
    engine.train_step(phase, {"student": sgd}, batch, NOW, 0)
    moved = zip(weight, method.embed.parameters(), strict=True)
    assert all((was - p).abs().max() > 1e-5 for was, p in moved)


def drawn(seeds: list[int], steps: list[int]) -> list[list[int]]:
    """Positives of the forwards of so many steps of the engine, of 16 images of 4 classes."""
    found: list[list[int]] = []
    for seed, step in itertools.product(seeds, steps):
        method = aml()
        seen: list[Embedded] = []

        def loss(out: Embedded, method: AML = method, seen: list[Embedded] = seen) -> Any:
            seen.append(out)
            return method.loss(out)

        update = Update("student", loss, method.trainable())
        phase = Phase("distill", [Turn(method.__call__, [update])], 1)
        sgd = torch.optim.SGD(update.parameters, 0.1)
        batch = next(ToyImages(16).clean(16))
        torch.manual_seed(len(found))  # the engine's own seed is what counts
        engine.train_step(phase, {"student": sgd}, batch, Progress(0, step, 9, 1), seed)
        found.append(seen[0].positive.tolist())
    return found


def test_the_same_seed_and_step_draw_the_same_positives():
    one, again, step, other = *drawn([0, 0], [0]), *drawn([0], [1]), *drawn([1], [0])
    assert one == again
    assert one != step and one != other and step != other
    assert sorted(set(map(len, (one, step, other)))) == [16]


def test_other_taps_are_flattened():
    """stage3 of the student is 8 x 2 x 2, stage2 of the teacher 12 x 4 x 4."""
    method = aml(tap="stage3", teacher_tap="stage2")
    assert (method.embed.in_features, method.embed.out_features) == (32, 192)
    out = method(next(ToyImages(4).clean(4)), NOW)
    vector = out.teachers[0].features["stage2"].reshape(4, -1)
    close(out.other, vector / vector.square().sum(1, keepdim=True).sqrt())
    mapped = method.embed(out.students[0].features["stage3"].reshape(4, -1))
    close(out.own, mapped / mapped.square().sum(1, keepdim=True).sqrt())


def test_it_reads_the_teachers_tap_and_no_logits():
    assert aml().reads == {"embed"}
    assert aml(tap="stage3", teacher_tap="stage2").reads == {"stage2"}


# --- teachers of other classes


@pytest.mark.parametrize("theirs", [range(9), range(20, 29), [3, 2, 1, 0, 9, 8, 7, 6, 5], None])
def test_a_teacher_of_other_classes_is_welcome(theirs: Any):
    data = ToyImages().spec()._replace(teacher_classes=[theirs])
    method = aml(data, classes=9)
    found = method.loss(method(next(ToyImages(16).clean(16)), NOW))
    assert list(found) == ["ce", "pairs", "self"]
    assert all(term.isfinite() and term > 0 for term in found.values())


def test_the_order_and_the_ids_of_the_teachers_classes_change_nothing():
    """Its head's rows in another order, and ids to match."""
    spec = ToyImages().spec()._replace(classes=[10, 11, 12, 13])
    one = aml(spec._replace(teacher_classes=[[12, 13, 14, 15, 16]]), classes=5)
    two = aml(spec._replace(teacher_classes=[[16, 12, 15, 13, 14]]), classes=5)
    order = [4, 0, 3, 1, 2]
    head, other = one.teachers[0].classifier, two.teachers[0].classifier
    with torch.no_grad():
        other.weight.copy_(head.weight[order]), other.bias.copy_(head.bias[order])
    batch, found = next(ToyImages(16).clean(16)), []
    for method in (one, two):
        torch.manual_seed(0)
        out = method(batch, NOW)
        found.append((method.loss(out), out.teachers[0].logits))
    close(found[1][1], found[0][1][:, order])
    for name, term in found[0][0].items():
        assert torch.equal(term, found[1][0][name])


def test_only_the_students_labels_form_pairs():
    """The student has the classes 10 to 13, the teacher 12 to 15, and its head says 12 of every
    image. By what it says the page's batch would have no negative; by the classes both know, of
    which only the last image is, no positive. The loss is the page's all the same.
    """
    spec = ToyImages().spec()._replace(classes=range(10, 14), teacher_classes=[range(12, 16)])
    method = aml(spec)
    out = page()
    label = torch.tensor([0, 0, 1, 3])
    batch = Batch(torch.zeros(4, 1), torch.zeros_like(label), label, label)
    says = Captured(torch.tensor([[9.0, 0.0, 0.0, 0.0]]).repeat(4, 1), {})
    own = Captured(torch.zeros(4, 2), {})
    given = Embedded(batch, NOW, [own], [says], out.own, out.other, out.positive, label)
    close(method.loss(given)["pairs"].item(), 1.16267903, atol=1e-6, rtol=0)
    merged = embedded(out.own, out.other, torch.tensor([0, 0, 0, 0]), out.positive)
    assert method.loss(merged)["pairs"] == 0
    images = next(ToyImages(16).clean(16))
    torch.manual_seed(0)
    found = method(images, NOW)
    assert torch.equal(images.label[found.positive], images.label)
    assert torch.equal(found.label, images.label)


def test_the_teacher_may_be_of_the_students_own_width_and_weights():
    """A copy, mapped by the identity: the self terms are 0."""
    student = toy_net(0).eval()
    method = AML([student], [copy.deepcopy(student)], ToyImages().spec(), form="regression")
    with torch.no_grad():
        method.embed.weight.copy_(torch.eye(8)), method.embed.bias.zero_()
    found = method.loss(method(next(ToyImages(4).clean(4)), NOW))
    close(found["self"].item(), 0.0, atol=1e-10, rtol=0)


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"form": "contrastiv"},
            "AML: form is 'contrastiv'; give one of contrastive+, contrastive, regression, "
            "triplet, softmax, multi_similarity",
        ),
        ({"margin": 0.0}, "AML: margin is 0.0; give a number above 0, or None"),
        ({"margin": -0.1}, "AML: margin is -0.1; give a number above 0, or None"),
        ({"tau": 0.0}, "AML: tau is 0.0; give a number above 0"),
        ({"tau": -1.0}, "AML: tau is -1.0; give a number above 0"),
        ({"negatives": 0}, "AML: negatives is 0; give 1 or more"),
        (
            {"form": "softmax", "margin": 0.5},
            "AML: form 'softmax' has no margin, and margin is 0.5; leave it out",
        ),
        (
            {"form": "regression", "margin": 0.5},
            "AML: form 'regression' has no margin, and margin is 0.5; leave it out",
        ),
        (
            {"form": "multi_similarity", "margin": 0.5},
            "AML: form 'multi_similarity' has no margin, and margin is 0.5; leave it out",
        ),
    ],
    ids=lambda x: " ".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_refused_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(MethodError) as error:
        aml(**arguments)
    assert str(error.value) == message


def test_one_negative_and_small_numbers_are_taken():
    method = aml(negatives=1, margin=1e-3, form="triplet")
    assert (method.negatives, method.margin) == (1, 1e-3)
    assert aml(form="softmax", tau=1e-3).tau == 1e-3


def test_without_labels_it_is_refused():
    with pytest.raises(MethodError) as error:
        aml(gamma=0.0)
    assert str(error.value) == (
        "AML: gamma is 0.0; give a number above 0: nothing else trains the classifier"
    )


def test_there_is_no_alpha():
    """It is published without soft targets, and takes teachers that could give none."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        aml(alpha=0.5)


@pytest.mark.parametrize(("argument", "role"), [("tap", "student"), ("teacher_tap", "teacher")])
def test_an_unknown_tap_is_refused_with_those_that_exist(argument: str, role: str):
    with pytest.raises(TapError) as error:
        aml(**{argument: "embedding"})
    assert str(error.value) == (
        f"the {role}: no feature 'embedding'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        f'"embed"?; choose {argument}=...'
    )
