"""CRD: the loss by hand, what is scored against what, the draws, the banks, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.errors import MethodError, TapError
from potstill.losses import unit
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.crd import CRD, Contrasted, last_equal, noise_contrastive, products
from potstill.models import build
from potstill.net import Captured
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

HAND = torch.tensor([[0.5, 0.1, 0.2]])
START = Progress(0, 0, 10, 1)
both_modes = pytest.mark.parametrize("sampling", ["exact", "fast"])


def crd(data: DataSpec | None = None, classes: int = 4, **arguments: Any) -> CRD:
    teacher = toy_net(1, width=6, classes=classes)
    settings = {"negatives": 2, "dimensions": 3, **arguments}
    return CRD([toy_net(0)], [teacher], data or ToyImages().spec(), **settings)


def of_classes(*members: int, stored: int = 100) -> DataSpec:
    """So many images of each class, at mixed positions of a larger stored set."""
    labels = torch.arange(len(members)).repeat_interleave(torch.tensor(members))
    mixed = torch.randperm(stored, generator=torch.Generator().manual_seed(3))[: len(labels)]
    order = mixed.argsort()
    return (
        ToyImages()
        .spec()
        ._replace(
            classes=range(len(members)), indices=mixed[order], labels=labels[order], size=stored
        )
    )


def images_of(method: CRD, rows: Tensor) -> Tensor:
    """Places in `data.indices` of rows of the banks."""
    found = torch.empty(len(method.data.indices), dtype=torch.int64)
    found[method.row_of[method.data.indices]] = torch.arange(len(found))
    return found[rows]


def contrasted(log_scores: Tensor, log_z: Tensor, label: int = 0) -> Contrasted:
    """Two classes; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    at = torch.full((log_scores.shape[1],), label)
    own = Captured(torch.zeros(len(at), 2), {})
    taught = Captured(torch.tensor([[math.log(3.0), 0.0]]).repeat(len(at), 1), {})
    batch = Batch(torch.zeros(len(at), 1), at, at, at)
    return Contrasted(batch, START, [own], [taught], torch.zeros(2, len(at), 3), log_scores, log_z)


def as_printed(scores: Tensor, z: Tensor, n: int, eps: float = 1e-7) -> Tensor:
    """One side's loss from scores exp(a . M / tau), line by line. (B, K + 1), () -> ()"""
    c, total = (scores.shape[1] - 1) / n, torch.zeros((), dtype=scores.dtype)
    for p in scores / z:
        total = total + (p[0] / (p[0] + c + eps)).log()
        for k in range(1, len(p)):
            total = total + (c / (p[k] + c + eps)).log()
    return -total / len(scores)


# the loss


def test_one_side_by_hand():
    """n = 10, K = 2, so c = 0.2: -ln(0.5 / 0.7) - ln(0.2 / 0.3) - ln(0.2 / 0.4) = ln 4.2."""
    close(noise_contrastive(HAND.log(), 10).item(), 1.435085, atol=2e-6, rtol=0)
    close(noise_contrastive(HAND.double().log(), 10, eps=0).item(), math.log(4.2))


def test_terms_by_hand():
    """Side 0 as above with scores 7 P and Z = 7; where every P is c, all three logs are ln 2."""
    log_scores = torch.stack([(7 * HAND).log(), torch.full((1, 3), math.log(0.2 * 5))])
    method = crd(of_classes(5, 5))
    found = method.loss(contrasted(log_scores, torch.tensor([7.0, 5.0]).log()))
    assert list(found) == ["ce", "crd"]
    close(found["ce"].item(), math.log(2.0))
    close(found["crd"].item(), 0.8 * (math.log(4.2) + 3 * math.log(2.0)), atol=5e-6, rtol=0)


def test_weights_multiply_and_kd_joins_with_alpha():
    """kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2. CRD + KD is alpha 1, and T = 4 by default."""
    data = ToyImages().spec()
    out = contrasted(HAND.log().expand(2, 1, 3), torch.zeros(2))
    one = crd(data, beta=1.0).loss(out)["crd"]
    found = crd(data, beta=7.0, gamma=2.0, alpha=3.0, temperature=1.0).loss(out)
    assert list(found) == ["ce", "kd", "crd"]
    close(found["ce"].item(), 2 * math.log(2.0))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 3 * kl, atol=1e-6, rtol=0)
    close(found["crd"], 7 * one)
    q = torch.tensor([3.0**0.25, 1.0]) / (3.0**0.25 + 1)
    both = crd(data, alpha=1.0).loss(out)
    close(both["kd"], 16 * (q * (2 * q).log()).sum(), atol=1e-5, rtol=0)


def test_it_is_the_printed_formula_in_values_and_gradients():
    """B = 5, K = 6, n = 20, float64: against the gathered rows, exponentials and a loop of logs."""
    generator = torch.Generator().manual_seed(0)
    anchor, bank = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (20, 4))
    )
    rows = torch.randint(20, (5, 7), generator=generator)
    rows[0, 1:4] = 9  # drawn three times for one image
    a, b = anchor.clone().requires_grad_(), anchor.clone().requires_grad_()
    scores = (torch.einsum("bd,bkd->bk", a, bank[rows]) / 0.7).exp()
    z = 20 * scores.detach().mean()
    expected = as_printed(scores, z, 20)
    log_scores = products(b / 0.7, bank, rows, limit=40)  # two anchors at a time, then one
    found = noise_contrastive(log_scores - z.log(), 20)
    close(found, expected, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(found, b)[0], torch.autograd.grad(expected, a)[0]
    close(*grads, rtol=1e-10, atol=1e-14)


def test_it_falls_when_the_positive_rises_and_when_any_negative_falls():
    log_p = (torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) / 10).log()
    log_p.requires_grad_()
    (grad,) = torch.autograd.grad(noise_contrastive(log_p, 50), log_p)
    assert (grad[:, 0] < 0).all() and (grad[:, 1:] > 0).all()


def test_many_small_probabilities_keep_their_digits_in_float32():
    """K = 16,384 logs of 1 - 6e-5: in float32 as printed, the sum is off by 5e-4."""
    n, generator = 50_000, torch.Generator().manual_seed(0)
    log_p = torch.randn(4, 16_385, generator=generator, dtype=torch.float64) - math.log(n)
    close(
        noise_contrastive(log_p.float(), n).double(), noise_contrastive(log_p, n), rtol=0, atol=2e-5
    )


@both_modes
def test_it_starts_at_about_eleven_and_a_half_a_side(sampling: Any):
    """The published sizes and random unit vectors: 10.70 for equal P, and 0.8 by their spread."""
    n = 50_000
    labels = torch.arange(n) % 100
    whole = {"indices": torch.arange(n), "labels": labels, "size": n, "classes": range(100)}
    data = ToyImages().spec()._replace(**whole)
    torch.manual_seed(0)
    method = crd(data, classes=100, negatives=16_384, dimensions=128, sampling=sampling)
    index = torch.randint(n, (32,))
    rows = torch.cat([method.row_of[index][:, None], method.draw(labels[index])], dim=1)
    anchors = unit(torch.randn(2, 32, 128)) / method.tau
    scores = torch.stack([products(a, b, rows) for a, b in zip(anchors, method.banks, strict=True)])
    for side, log_z in zip(scores, method.first_log_z(scores), strict=True):
        assert 11 < noise_contrastive(side - log_z, n) < 12.5


# anchors and scores


def test_parameters():
    """64 * 128 + 128 twice; 128 * 128 + 128 twice. Banks are no parameters."""
    for student, teacher, count in (
        ("resnet20", "resnet56", 16_640),
        ("wrn_16_2", "wrn_40_2", 33_024),
    ):
        data = of_classes(2, 2)._replace(classes=range(100), input_shape=(3, 32, 32))
        nets = [build(student), build(teacher)]
        method = CRD(nets[:1], nets[1:], data, negatives=1)
        own = sum(p.numel() for p in method.parameters())
        assert own - sum(p.numel() for p in method.student.parameters()) == count
        assert method.banks.shape == (2, 4, 128) and not method.banks.requires_grad


def test_rows_start_at_about_unit_length():
    banks = crd(of_classes(40, 40), dimensions=48).banks
    assert 0.24 < banks.abs().max() <= 0.25  # 1 / sqrt(48 / 3)
    assert abs(banks.mean()) < 0.01
    close(banks.square().sum(-1).mean().item(), 1.0, atol=0.05, rtol=0)


def test_each_anchor_meets_the_other_networks_bank_its_own_image_first():
    """Zeros in the student's bank: the teacher's anchors score 0. In the teacher's, all rows
    but those of the batch are zero.
    """
    method, batch = crd(negatives=48), next(ToyImages().clean(16))
    method.banks[0] = 0.0
    rows = method.row_of[batch.index]
    method.banks[1].index_fill_(0, rows, 1.0)
    keep = torch.zeros(64, dtype=torch.bool).index_fill_(0, rows, True)
    method.banks[1, ~keep] = 0.0
    out = method(batch, START)
    assert torch.equal(out.log_scores[1], torch.zeros(16, 49))
    close(out.log_scores[0, :, 0], out.anchors[0].sum(dim=1) / 0.07)
    # of 48 others, 12 of its own class are no candidates: 12 of the batch, 36 not
    counts = (out.log_scores[0, :, 1:] != 0).sum(dim=1)
    assert torch.equal(counts, torch.full((16,), 12))


def test_anchors_are_linear_maps_of_the_pooled_vectors_scaled_to_unit_length():
    method = crd(dimensions=5)
    out = method(next(ToyImages().clean(16)), START)
    own = method.embed(out.students[0]["embed"])
    other = method.teacher_embed(out.teachers[0]["embed"])
    close(out.anchors, torch.stack([x / x.norm(dim=1, keepdim=True) for x in (own, other)]))
    assert out.anchors.shape == (2, 16, 5)


@pytest.mark.parametrize("tau", [0.5, 0.005])
def test_tau_divides_and_may_be_so_small_that_scores_overflow(tau: float):
    """exp(1 / 0.005) is 7e86."""
    torch.manual_seed(0)
    method = crd(tau=tau)
    out = method(next(ToyImages().clean(16)), START)
    bank_rows = method.banks[1][method.row_of[out.batch.index]]
    close(out.log_scores[0, :, 0], (out.anchors[0] * bank_rows).sum(dim=1) / tau)
    loss = method.loss(out)["crd"]
    grads = torch.autograd.grad(loss, list(method.embed.parameters()))
    assert loss.isfinite() and all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def test_both_embeddings_learn_and_neither_teacher_nor_banks():
    method = crd(gamma=0.0)
    method.loss(method(next(ToyImages().clean(16)), START))["crd"].backward()
    for part in (method.embed, method.teacher_embed):
        assert all(p.grad.abs().sum() > 0 for p in part.parameters())
    assert sum(p.grad.abs().sum() for p in method.student.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in method.teachers[0].parameters())
    assert method.banks.grad is None


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return result


def test_no_tensor_has_more_elements_than_the_limit():
    """8 anchors, 40 rows, K + 1 = 5: 320 products at once, 120 with a limit below four rows."""
    anchor, bank = torch.randn(8, 2, requires_grad=True), torch.randn(40, 2)
    rows = torch.randint(40, (8, 5))
    for limit, expected in ((320, 320), (159, 120), (1, 80)):  # 80: the bank itself, transposed
        with Largest() as seen:
            torch.autograd.grad(products(anchor, bank, rows, limit).sum(), anchor)
        assert seen.elements == expected
    method = crd(of_classes(20, 20), negatives=3)
    for limit, expected in ((320, 320), (159, 120), (1, 40)):
        with Largest() as seen:
            drawn = method.draw(torch.zeros(8, dtype=torch.int64), limit)
        assert drawn.shape == (8, 3) and seen.elements == expected


def test_products_with_all_rows_are_not_kept_for_the_backward():
    anchor, bank = torch.randn(8, 2, requires_grad=True), torch.randn(40, 2)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        products(anchor, bank, torch.randint(40, (8, 5)))
    assert sorted(saved) == [40, 80]  # the rows' numbers and the bank


# negatives


@both_modes
def test_draws_are_even_over_the_images_of_other_classes(sampling: Any):
    """Classes of 3, 9, 0, 6 and 2 images, 4 negatives: each other image equally often, within 5
    standard deviations, the own class never.
    """
    method = crd(of_classes(3, 9, 0, 6, 2), negatives=4, sampling=sampling)
    torch.manual_seed(0)
    for label, others in ((0, 17), (1, 11), (3, 14), (4, 18)):
        drawn = images_of(method, method.draw(torch.full((6000,), label)))
        counts = drawn.flatten().bincount(minlength=20).double()
        own = method.data.labels == label
        assert counts[own].sum() == 0
        mean = 6000 * 4 / others
        spread = math.sqrt(mean * (1 - (4 if sampling == "exact" else 1) / others))
        assert (counts[~own] - mean).abs().max() < 5 * spread
        # pairs too: how often two of one draw are the same image
        equal = (drawn[:, :, None] == drawn[:, None]).double().sum((1, 2)).mean() - 4
        expected = 0 if sampling == "exact" else 12 / others
        assert abs(equal - expected) <= 5 * math.sqrt(2 * expected / 6000)


@both_modes
def test_each_label_of_a_batch_has_its_own_draw(sampling: Any):
    method = crd(of_classes(9, 9, 9), negatives=6, sampling=sampling)
    torch.manual_seed(0)
    label = torch.tensor([0, 2, 1, 1, 0])
    drawn = images_of(method, method.draw(label, limit=54)).sort(dim=1).values
    assert (method.data.labels[drawn] != label[:, None]).all()
    assert len(drawn.unique(dim=0)) == 5


def test_all_candidates_are_drawn_when_as_many_are_asked_for():
    method = crd(of_classes(3, 9, 3), negatives=6)
    drawn = images_of(method, method.draw(torch.tensor([1, 1])))
    others = (method.data.labels != 1).nonzero()[:, 0]
    assert torch.equal(drawn.sort(dim=1).values, others.expand(2, 6))


def test_fast_draws_may_be_more_than_the_candidates():
    drawn = crd(of_classes(3, 9), negatives=50, sampling="fast").draw(torch.tensor([1]))
    assert len(drawn.unique()) == 3


@both_modes
def test_a_seed_determines_the_draws_and_each_step_has_its_own(sampling: Any):
    method, label = crd(negatives=40, sampling=sampling), torch.arange(4)
    draws = [(torch.manual_seed(s), method.draw(label))[1] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# the banks and Z


def test_z_is_n_times_the_mean_score_of_the_first_batch_and_then_fixed():
    data = of_classes(12, 12, 8, 8, stored=64)
    method, batch = crd(data), ToyImages().take(data.indices[:16], torch.zeros(16))
    first = method(batch, START)
    expected = 40 * first.log_scores.exp().mean((1, 2))
    close(first.log_z.exp(), expected.detach())
    assert not first.log_z.requires_grad and method.log_z.isinf().all()
    method.remember(first)
    close(method.log_z.exp(), expected.detach())
    method.banks.mul_(2)
    second = method(batch, START)
    assert torch.equal(second.log_z, first.log_z)
    method.remember(second)
    assert torch.equal(method.log_z, first.log_z)


@pytest.mark.parametrize("momentum", [0.5, 0.0, 0.9])
def test_visited_rows_move_to_their_anchors_and_others_stay(momentum: float):
    method = crd(momentum=momentum)
    before = method.banks.clone()
    out = method(ToyImages().take(torch.tensor([40, 3]), torch.tensor([0, 0])), START)
    method.remember(out)
    rows = method.row_of[torch.tensor([40, 3])]
    moved = momentum * before[:, rows] + (1 - momentum) * out.anchors.detach()
    close(method.banks[:, rows], moved / moved.norm(dim=2, keepdim=True))
    close(method.banks[:, rows].norm(dim=2), torch.ones(2, 2))
    others = torch.ones(64, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(method.banks[:, others], before[:, others])


def test_the_last_of_equal_images_writes_their_row():
    """Two views of one image are two anchors."""
    method = crd(momentum=0.0)
    index = torch.tensor([7, 5, 7, 7, 5])
    out = method(ToyImages().take(index, torch.tensor([0, 1, 1, 0, 0])), START)
    for last in (out, Contrasted(**{**vars(out), "anchors": out.anchors.flip(2)})):
        method.remember(last)
        rows = method.row_of[torch.tensor([7, 5])]
        close(method.banks[:, rows], last.anchors[:, [3, 4]].detach())


def test_the_last_of_equal_numbers_is_found_for_each():
    assert last_equal(torch.tensor([7, 5, 7, 7, 0, 5])).tolist() == [3, 5, 3, 3, 4, 5]


def test_banks_have_a_row_for_each_training_image_of_a_larger_set():
    data = of_classes(5, 3, 4, stored=64)._replace(classes=range(4))
    method = crd(data)
    assert method.banks.shape == (2, 12, 3)
    assert torch.equal(method.row_of[data.indices].sort().values, torch.arange(12))
    out = method(ToyImages().take(data.indices, torch.zeros(12)), START)
    method.remember(out)
    close(method.banks.norm(dim=2), torch.ones(2, 12))


def test_an_image_that_is_not_trained_on_has_no_row():
    data = of_classes(5, 3, stored=64)
    other = next(i for i in range(64) if i not in data.indices)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        crd(data)(ToyImages().take(torch.tensor([other]), torch.zeros(1)), START)


def test_banks_and_z_are_saved_and_what_the_data_says_is_not():
    state = crd().state_dict()
    own = [k for k in state if not k.startswith("students.")]
    assert own == [
        "banks",
        "log_z",
        "embed.weight",
        "embed.bias",
        "teacher_embed.weight",
        "teacher_embed.bias",
    ]


@both_modes
def test_a_step_reads_no_value_and_stays_on_its_device(sampling: Any):
    """On the meta device there are none to read, and tensors of another one are refused."""
    method = crd(sampling=sampling).to("meta")
    batch = Batch(*(x.to("meta") for x in next(ToyImages().clean(16))))
    out = method(batch, START)
    grads = torch.autograd.grad(method.loss(out)["crd"], list(method.embed.parameters()))
    method.remember(out)
    assert all(x.is_meta for x in (*grads, out.log_scores, method.banks))


# what it reads and what it refuses


def test_it_reads_the_teachers_tap_and_the_logits_only_for_kd():
    assert crd().reads == {"embed"}
    assert crd(alpha=0.5, teacher_tap="stage3").reads == {"stage3", "logits"}


def test_other_taps_are_flattened():
    """8 channels of 2 x 2, and 6 of 8 x 8."""
    method = crd(tap="stage3", teacher_tap="stage1")
    assert (method.embed.in_features, method.teacher_embed.in_features) == (32, 384)
    assert method(next(ToyImages().clean(4)), START).anchors.shape == (2, 4, 3)


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = crd(data, classes=9)
    assert list(method.loss(method(next(ToyImages(4).clean(4)), START))) == ["ce", "crd"]
    with pytest.raises(MethodError, match="CRD compares logits class by class"):
        crd(data, classes=9, alpha=0.1)


def test_more_negatives_than_candidates_are_refused_with_the_most_there_are():
    """Of 14 images, class 17 leaves 5."""
    data = of_classes(3, 9, 2)._replace(classes=[4, 17, 8])
    with pytest.raises(MethodError) as error:
        crd(data, negatives=6)
    assert str(error.value) == (
        "CRD draws 6 negatives without replacement, but there are 5 images of other classes than "
        "17; set negatives to 5 or less, or sampling to 'fast'"
    )
    assert crd(data, negatives=5).negatives == 5


@both_modes
def test_one_class_alone_is_refused(sampling: Any):
    with pytest.raises(MethodError) as error:
        crd(of_classes(0, 7), sampling=sampling)
    assert str(error.value) == (
        "CRD contrasts an image with those of other classes, but all 7 training images are of one "
        "class; train on two classes or more"
    )


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("negatives", 0, "1 or more"),
        ("dimensions", 0, "1 or more"),
        ("tau", 0.0, "a number above 0"),
        ("momentum", 1.0, "a number from 0 to below 1"),
        ("momentum", -0.1, "a number from 0 to below 1"),
        ("sampling", "relaxed", "'exact' or 'fast'"),
    ],
)
def test_values_without_meaning_are_refused(argument: str, value: Any, allowed: str):
    with pytest.raises(MethodError) as error:
        crd(**{argument: value})
    assert str(error.value) == f"CRD: {argument} is {value!r}; give {allowed}"


def test_an_unknown_tap_is_refused_with_those_that_exist():
    with pytest.raises(TapError) as error:
        crd(tap="stage4")
    assert str(error.value) == (
        "the student: no feature 'stage4'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        '"stage3"?; choose tap=...'
    )
