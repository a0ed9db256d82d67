"""MHGD: graphs, heads and estimates by hand, against loops, both phases, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill import engine
from potstill.errors import MethodError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.mhgd import MHAN, MHGD, Estimates, Graphs, graph_divergence
from potstill.models import build
from potstill.net import Captured, Net
from potstill.optim import Constant, OptimizerPlan, sgd
from tests.toys import CLASSES, SHAPE, ToyImages, pace, toy_net

close = torch.testing.assert_close

START = Progress(0, 0, 100, 100)
PRE = ["stage1:pre", "stage2:pre", "stage3:pre"]

OWN = torch.tensor([[[1.0, -1.0], [0.0, 3.0]]])
TARGET = torch.tensor([[[2.0, 0.0], [-2.0, 0.5]]])


def mhgd(
    data: DataSpec | None = None, width: int = 4, classes: int = 4, heads: int = 2, **arguments: Any
) -> MHGD:
    """A student of widths 4, 8, 8; the teacher's are the same, or 6, 12, 12 with `width` 6."""
    nets = [toy_net(0)], [toy_net(1, width=width, classes=classes)]
    return MHGD(*nets, data or ToyImages().spec(), heads=heads, **arguments)


def of_images(image: Tensor) -> Batch:
    index = torch.arange(len(image))
    return Batch(image, index % CLASSES, index, index)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def images(n: int = 8, dtype: torch.dtype = torch.float32) -> Batch:
    return of_images(noise(n, *SHAPE, dtype=dtype))


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return nn.functional.normalize(noise(*shape, seed=seed, dtype=dtype), dim=1)


def compared(own: Sequence[Tensor], target: Sequence[Tensor]) -> Graphs:
    """Two classes, labels 0; the student is undecided, the teacher's softmax is (3/4, 1/4)."""
    label = torch.zeros(2, dtype=torch.int64)
    student = Captured(torch.zeros(2, 2), {})
    teacher = Captured(torch.tensor([[math.log(3.0), 0.0]]).repeat(2, 1), {})
    batch = Batch(torch.zeros(2, 1), label, label, label)
    return Graphs(batch, START, [student], [teacher], own, target)


def estimated(estimates: Sequence[Tensor], targets: Sequence[Tensor]) -> Estimates:
    return Estimates(images(), START, [], [], estimates, targets)


def set_(layer: nn.Module, *rows: Sequence[float]) -> None:
    """Weights of the linear layer in a sequence, or of the layer itself."""
    linear = layer[0] if isinstance(layer, nn.Sequential) else layer
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(rows))


def hand_made(front: int, back: int, heads: int, **arguments: Any) -> MHAN:
    """In eval mode and with BatchNorm that changes nothing: variance + eps is 1."""
    made = MHAN(front, back, heads, **arguments).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.fill_(1 - 1e-5)
    return made


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


def step(method: MHGD, phase: str, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Terms and gradients of one step of SGD with lr 0.1, which is taken."""
    (turn,) = next(p for p in method.phases() if p.name == phase).turns
    (update,) = turn.updates
    terms = update.loss(turn.forward(batch, START, None))
    found = update.gradients(terms, update.parameters, START)
    optimizer = torch.optim.SGD(update.parameters, lr=0.1)
    for p, g in zip(update.parameters, found, strict=True):
        p.grad = g
    optimizer.step()
    return terms, found


# --- the graphs' distance


def test_the_divergence_of_two_graphs_by_hand():
    """The student's rows are tanh (0.761594, -0.761594) and (0, 0.995055), so by the softmax of two
    P = sigmoid(1.523188) = 0.8210 over 0.1790 and sigmoid(-0.995055) = 0.2699 over 0.7301; the
    teacher's sigmoid(0.964028) = 0.7239 over 0.2761 and sigmoid(-1.426145) = 0.1937 over 0.8063.
    0.8210 ln(0.8210/0.7239) + 0.1790 ln(0.1790/0.2761) + 0.2699 ln(0.2699/0.1937)
    + 0.7301 ln(0.7301/0.8063) = 0.042818; with the teacher first it is 0.044320.
    """
    close(graph_divergence(OWN, TARGET).item(), 0.042818, atol=1e-6, rtol=0)
    close(graph_divergence(TARGET, OWN).item(), 0.044320, atol=1e-6, rtol=0)


def test_heads_rows_and_modules_are_summed():
    """Two heads, the second without a difference, then a module of both heads: 3 * 0.042818."""
    twice, target = torch.cat([OWN, OWN]), torch.cat([TARGET, TARGET])
    close(graph_divergence(twice, target).item(), 2 * 0.042818, atol=2e-6, rtol=0)
    first = torch.cat([OWN, TARGET])
    found = mhgd().loss(compared([first, twice], [target, target]))
    assert list(found) == ["ce", "graph"]
    close(found["graph"].item(), 3 * 0.042818, atol=3e-6, rtol=0)
    close(found["ce"].item(), math.log(2.0))
    one_row = graph_divergence(OWN[:, :1], TARGET[:, :1]) + graph_divergence(
        OWN[:, 1:], TARGET[:, 1:]
    )
    close(one_row.item(), 0.042818, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("sign", "entry", "expected"), [(1, 0.054983, 0.061256), (-1, 0.001064, 0.004649)]
)
def test_the_rows_of_128_images_are_bounded(sign: int, entry: float, expected: float):
    """tanh is 1 or -1: p = e^2 / (e^2 + 127) = 0.054983 where one image is for and all others
    against, p = 1 / (1 + 127 e^2) = 0.001064 the other way round. Against a uniform row that costs
    p ln 128 p + (1 - p) ln(128 (1 - p) / 127).
    """
    p = math.exp(2 * sign) / (math.exp(2 * sign) + 127)
    close(p, entry, atol=1e-6, rtol=0)
    close(
        p * math.log(128 * p) + (1 - p) * math.log(128 * (1 - p) / 127), expected, atol=1e-6, rtol=0
    )
    row = torch.full((1, 1, 128), -sign * 1e4)
    row[0, 0, 5] = sign * 1e4
    close(graph_divergence(row, torch.zeros_like(row)).item(), expected, atol=1e-6, rtol=0)


def test_scores_of_any_size_cost_little_and_have_finite_gradients():
    """Entries are between 0.001064 and 0.054983: no row costs more than the log of their ratio."""
    for scale in (1e-30, 1.0, 1e4, 1e30):
        own = (scale * noise(3, 128, 128)).requires_grad_()
        value = graph_divergence(own, scale * noise(3, 128, 128, seed=1))
        (grad,) = torch.autograd.grad(value, own)
        assert -1e-4 <= value.item() / (3 * 128) <= math.log(0.054983 / 0.001064)
        assert grad.isfinite().all()


def test_a_constant_in_a_row_does_not_matter_after_the_tanh():
    """The softmax is over columns: a constant in a row cancels, in a column it does not."""
    tanh = 0.4 * noise(1, 3, 3, dtype=torch.float64).tanh()
    target = torch.zeros(1, 3, 3, dtype=torch.float64)
    shift = torch.tensor([[[0.1], [0.3], [-0.2]]], dtype=torch.float64)
    plain = graph_divergence(tanh.atanh(), target)
    close(graph_divergence((tanh + shift).atanh(), target), plain)
    assert abs(graph_divergence((tanh + shift.mT).atanh(), target) - plain) > 1e-3


def test_equal_graphs_cost_nothing_and_pull_nowhere():
    own = noise(2, 5, 5).requires_grad_()
    value = graph_divergence(own, own.detach().clone())
    (grad,) = torch.autograd.grad(value, own)
    assert value == 0
    close(grad, torch.zeros_like(grad), atol=1e-7, rtol=0)


def test_no_gradient_reaches_the_teachers_graph():
    own, target = OWN.clone().requires_grad_(), TARGET.clone().requires_grad_()
    graph_divergence(own, target).backward()
    assert own.grad.abs().sum() > 0
    assert target.grad is None


def test_weights_multiply_and_kd_joins_with_alpha():
    """kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2 the other way round than the graphs': teacher first."""
    found = mhgd(gamma=2.0, alpha=3.0, temperature=1.0).loss(compared([OWN], [TARGET]))
    assert list(found) == ["ce", "kd", "graph"]
    close(found["ce"].item(), 2 * math.log(2.0))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 3 * kl, atol=1e-6, rtol=0)
    close(found["graph"].item(), 0.042818, atol=1e-6, rtol=0)
    assert mhgd().temperature == 4.0


# --- heads


@pytest.mark.parametrize(
    ("front", "back", "attention", "estimator"),
    [(64, 128, 150_528, 104_768), (128, 256, 595_968, 418_432)],
)
def test_the_parameters_are_those_of_the_page(
    front: int, back: int, attention: int, estimator: int
):
    """h = (D + E) / 2: h A (D + E) + 4 h A, and h D + 2 h + h A E + E."""
    heads = MHAN(front, back)
    counts = [sum(p.numel() for p in m.parameters()) for m in (heads.theta, heads.phi)]
    assert sum(counts) == attention
    counts = [sum(p.numel() for p in m.parameters()) for m in (heads.f1, heads.f2)]
    assert sum(counts) == estimator
    assert sum(p.numel() for p in heads.parameters()) == attention + estimator


def test_the_width_of_a_head_is_rounded_down():
    """(4 + 7) / 2 = 5."""
    heads = MHAN(4, 7, 3)
    assert [tuple(m[0].weight.shape) for m in (heads.theta, heads.phi, heads.f1)] == [
        (15, 7),
        (15, 4),
        (5, 4),
    ]
    assert heads.f2.weight.shape == (7, 15)


def test_heads_begin_as_published():
    """He by fan-out, cut at twice the normal's own deviation; the estimator's bias 0."""
    torch.manual_seed(0)
    heads = MHAN(64, 128)
    for layer, fan_out in (
        (heads.theta[0], 768),
        (heads.phi[0], 768),
        (heads.f1[0], 96),
        (heads.f2, 128),
    ):
        deviation = math.sqrt(2 / fan_out)
        close(layer.weight.std().item(), deviation, rtol=0.03, atol=0)
        assert 2.1 * deviation < layer.weight.abs().max() <= 2 / 0.8796 * deviation
    assert all(m[0].bias is None for m in (heads.theta, heads.phi, heads.f1))
    assert heads.f2.bias.eq(0).all()
    for norm in (heads.theta[1], heads.phi[1], heads.f1[1]):
        assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)


def test_scores_by_hand():
    """h = 2. Head 0 takes components 0 and 2 of theta and phi, head 1 components 1 and 3: with
    theta(back) = (b1, 10 b2, 2 b2, 0) and phi(front) = (f1, f2, f2, 100 f1) scores are
    b1 f1 + 2 b2 f2 and 10 b2 f2. Not divided by sqrt 2.
    """
    heads = hand_made(2, 2, 2)
    set_(heads.theta, [1, 0], [0, 10], [0, 2], [0, 0])
    set_(heads.phi, [1, 0], [0, 1], [0, 1], [100, 0])
    front, back = torch.tensor([[0.6, 0.8], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.8, 0.6]])
    expected = [[[1.6, 0.0], [0.48 + 0.96, 0.8]], [[8.0, 0.0], [4.8, 0.0]]]
    close(heads.graph(front, back), torch.tensor(expected))


def estimating() -> MHAN:
    """One head of width 1. theta is the first component of the back, phi ln 3 / 2 of the front."""
    heads = hand_made(1, 2, 1)
    set_(heads.theta, [1, 0])
    set_(heads.phi, [math.log(3) / 2])
    set_(heads.f1, [1])
    set_(heads.f2, [4], [0])
    with torch.no_grad():
        heads.f2.bias.copy_(torch.tensor([0.0, 4.0]))
    return heads


FRONT, BACK = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def test_an_estimate_by_hand():
    """Scores (ln 3 / 2, -ln 3 / 2) and (0, 0), so attention (3/4, 1/4) and (1/2, 1/2); f1 is (1, 0)
    by its ReLU, mixed 3/4 and 1/2; f2 makes (3, 4) and (2, 4) of it, of length 5 and 2 sqrt 5.
    """
    expected = torch.tensor([[0.6, 0.8], [1 / math.sqrt(5), 2 / math.sqrt(5)]])
    close(estimating()(FRONT, BACK), expected)


def test_attention_of_the_first_phase_has_no_tanh():
    """Scores 40 times as large: the first image attends to the first alone, (4, 4) / (4 sqrt 2);
    tanh would leave it at most e^2 / (e^2 + 1) = 0.88 of it.
    """
    heads = estimating()
    set_(heads.theta, [40, 0])
    expected = torch.tensor([[1.0, 1.0], [math.sqrt(2 / 5), 2 * math.sqrt(2 / 5)]]) / math.sqrt(2)
    close(heads(FRONT, BACK), expected)


def test_the_loss_of_the_first_phase_by_hand():
    """Both cosines are 1 / sqrt 2: the mean of 1 - cos is 0.292893."""
    target = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [1.0, 0.0]])
    estimate = torch.tensor([[1.0, 0.0], [math.sqrt(0.5), math.sqrt(0.5)]])
    found = mhgd().estimate_loss(estimated([estimate], [target]))
    assert list(found) == ["heads"]
    close(found["heads"].item(), 0.292893, atol=1e-6, rtol=0)


def test_modules_are_summed_and_images_averaged_in_the_first_phase():
    """Cosines 1, 0 of one module and -1, 1, 1, 1 of four images in another: 1/2 + 2/4."""
    axis, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    estimates = [torch.stack([axis, other]), torch.stack([-axis, axis, axis, axis])]
    targets = [torch.stack([axis, axis]), torch.stack([axis] * 4)]
    close(mhgd().estimate_loss(estimated(estimates, targets))["heads"].item(), 1.0)


# --- head dropping


def along_heads(heads: int, **arguments: Any) -> MHAN:
    """One or two heads. h = 1, f1 = 3 for all, f2 the identity: an estimate is along those kept."""
    made = hand_made(1, heads, heads, **arguments)
    set_(made.f1, [3])
    set_(made.f2, *torch.eye(heads).tolist())
    return made


def test_of_two_heads_the_one_with_more_noise_is_kept():
    """Of two numbers the larger is above their mean. Not rescaled: with bias (0, 4) the estimates
    are (3, 4) and (0, 7) and not (6, 4) and (0, 10).
    """
    heads, front = along_heads(2), torch.ones(8, 1)
    with torch.no_grad():
        heads.f2.bias.copy_(torch.tensor([0.0, 4.0]))
    torch.manual_seed(3)
    first_kept = (drawn := torch.randn(2, 8, 1))[0] > drawn[1]
    torch.manual_seed(3)
    found = heads(front, unit(8, 2))
    assert 0 < first_kept.sum() < 8
    close(found, torch.where(first_kept, torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, 1.0]])))


def test_heads_are_dropped_by_image_and_some_always_stay():
    """1 / sqrt(k) along each of the k heads kept of 8; 1 to 7 of them, other ones by image."""
    torch.manual_seed(0)
    heads = MHAN(1, 15).eval()
    with torch.no_grad():
        heads.f2.weight.zero_()
        heads.f2.weight[:8].copy_(torch.eye(64)[:8])  # the first component of every head
        heads.f1[0].weight.fill_(3)
    found = heads(torch.ones(64, 1), unit(64, 15))
    kept = found > 0
    assert kept[:, :8].sum(1).min() >= 1 and kept[:, :8].sum(1).max() <= 7
    assert len({tuple(row) for row in kept.tolist()}) > 30
    close(kept[:, :8].float().mean().item(), 0.5, atol=0.1, rtol=0)
    close(found.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize(("count", "on"), [(2, False), (1, True)], ids=["off", "single"])
def test_nothing_is_dropped_where_it_is_off_and_of_a_single_head(count: int, on: bool):
    """A single head's noise is its own mean. No random number is drawn either."""
    heads = along_heads(count, dropping=on)
    random = torch.random.get_rng_state()
    found = heads(torch.ones(4, 1), unit(4, heads.f2.out_features))
    close(found, torch.full_like(found, 1 / math.sqrt(heads.count)))
    assert torch.equal(random, torch.random.get_rng_state())


def test_dropping_is_on_unless_told_otherwise():
    for method, random in ((mhgd(), True), (mhgd(head_dropping=False), False)):
        losses = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            out = method.estimate(images(), START)
            losses.append(method.estimate_loss(out)["heads"].item())
        assert (losses[0] != losses[1]) == random


def test_nothing_is_dropped_of_a_graph():
    method, random = mhgd(), torch.random.get_rng_state()
    out = method(images(), START)
    assert torch.equal(random, torch.random.get_rng_state())
    again = method(images(), START)
    for one, other in zip([*out.own, *out.target], [*again.own, *again.target], strict=True):
        assert torch.equal(one, other)


# --- against loops


def vectors_by_loops(feature: Tensor) -> list[list[Tensor]]:
    """By image, the right singular vectors of the matrix with a row a position."""
    return [list(torch.linalg.svd(x.flatten(1).mT, full_matrices=False)[2]) for x in feature]


def nearest_by_loops(candidates: list[Tensor], target: Tensor) -> Tensor:
    best = max(candidates[:4], key=lambda v: abs(target @ v).item())
    return best if target @ best >= 0 else -best


def normed_by_loops(x: Tensor, norm: nn.BatchNorm1d, training: bool) -> Tensor:
    columns = []
    for j in range(x.shape[1]):
        if training:
            mean = x[:, j].sum() / len(x)
            variance = ((x[:, j] - mean) ** 2).sum() / len(x)
        else:
            mean, variance = norm.running_mean[j], norm.running_var[j]
        columns.append(norm.weight[j] * (x[:, j] - mean) / (variance + 1e-5) ** 0.5 + norm.bias[j])
    return torch.stack(columns, 1)


def scores_by_loops(heads: MHAN, front: Tensor, back: Tensor, training: bool) -> list[Any]:
    theta = normed_by_loops(back @ heads.theta[0].weight.T, heads.theta[1], training)
    phi = normed_by_loops(front @ heads.phi[0].weight.T, heads.phi[1], training)
    n, count = len(front), heads.count
    return [
        [torch.stack([theta[i, a::count] @ phi[j, a::count] for j in range(n)]) for i in range(n)]
        for a in range(count)
    ]


def softmax_by_loops(row: Tensor) -> Tensor:
    return row.exp() / row.exp().sum()


def teacher_by_loops(method: MHGD, teacher: Captured) -> list[Tensor]:
    found = []
    for pair in method.pairs:
        leading = [vectors[0] for vectors in vectors_by_loops(teacher[pair.teacher])]
        found.append(torch.stack([v if v.sum() >= 0 else -v for v in leading]))
    return found


def close_gradients(one: Tensor, other: Tensor, parameters: list[nn.Parameter]) -> None:
    found, expected = (
        torch.autograd.grad(
            x, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for x in (one, other)
    )
    assert sum(g.abs().sum() for g in expected) > 0.01
    for x, y in zip(found, expected, strict=True):
        close(x, y, rtol=1e-6, atol=1e-9)


def trained_a_little(method: MHGD) -> MHGD:
    """In float64, with statistics, scales and shifts that are not those of the start."""
    method.double()
    generator = torch.Generator().manual_seed(11)
    for module in [*method.modules(), *method.teachers[0].modules()]:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for x in (module.weight.data, module.running_var):
                x.uniform_(0.5, 1.5, generator=generator)
            for x in (module.bias.data, module.running_mean):
                x.normal_(0, 0.3, generator=generator)
    return method


@pytest.mark.parametrize("drop", [True, False])
def test_the_first_phase_is_that_of_loops_over_images(drop: bool):
    """In float64, value and every parameter's gradient; maps before their ReLU have both signs."""
    method = trained_a_little(mhgd(heads=3, taps=PRE, head_dropping=drop))
    torch.manual_seed(4)
    out = method.estimate(images(5, torch.float64), START)
    torch.manual_seed(4)
    vectors, total = teacher_by_loops(method, out.teachers[0]), 0.0
    for heads, (front, back) in zip(method.heads, itertools.pairwise(vectors), strict=True):
        scores = scores_by_loops(heads, front, back, training=True)
        f1 = normed_by_loops(front @ heads.f1[0].weight.T, heads.f1[1], True).clamp_min(0)
        drawn = torch.randn(3, 5, 1, dtype=torch.float64)
        for i in range(5):
            concatenated = torch.zeros(f1.shape[1] * 3, dtype=torch.float64)
            for a in range(3):
                if not drop or drawn[a, i, 0] > drawn[:, i, 0].sum() / 3:
                    row = softmax_by_loops(scores[a][i])
                    mixed = sum(row[j] * f1[j] for j in range(5))
                    concatenated = concatenated.index_put(
                        (torch.arange(len(mixed)) * 3 + a,), mixed
                    )
            estimate = heads.f2.weight @ concatenated + heads.f2.bias
            total = total + (1 - estimate @ back[i] / estimate.norm()) / 5
    found = method.estimate_loss(out)["heads"]
    close(found, total)
    close_gradients(found, total, list(method.heads.parameters()))


@pytest.mark.parametrize("width", [4, 6], ids=["equal", "connected"])
def test_the_second_phase_is_that_of_loops_over_images(width: int):
    """In float64, value and gradients of student and connectors, with the method in train mode."""
    method = trained_a_little(mhgd(width=width, heads=3, taps=PRE))
    out = method(images(6, torch.float64), START)
    theirs, own, total = teacher_by_loops(method, out.teachers[0]), [], 0.0
    for layer, pair, target in zip(method.connectors, method.pairs, theirs, strict=True):
        candidates = vectors_by_loops(layer(out.students[0][pair.student]))
        own.append(
            torch.stack([nearest_by_loops(c, t) for c, t in zip(candidates, target, strict=True)])
        )
    for m, heads in enumerate(method.heads):
        student = scores_by_loops(heads, own[m], own[m + 1], training=False)
        teacher = scores_by_loops(heads, theirs[m], theirs[m + 1], training=False)
        for a in range(3):
            for i in range(6):
                p = softmax_by_loops(student[a][i].tanh())
                q = softmax_by_loops(teacher[a][i].tanh()).detach()
                total = total + (p * (p / q).log()).sum()
    found = method.loss(out)["graph"]
    close(found, total)
    moved = [*method.student.parameters(), *method.connectors.parameters()]
    close_gradients(found, total, moved)


# --- vectors


def test_the_teachers_vectors_sum_to_something_positive_in_both_phases():
    """Maps before their ReLU, of which a solver gives either sign."""
    method = mhgd(taps=PRE).eval()
    first, second = method.estimate(images(), START), method(images(), START)
    vectors = method.vectors(second.teachers[0])
    assert all(x.sum(1).min() >= 0 for x in vectors)
    assert any(x.min() < -0.1 for x in vectors)
    for x, y in zip(first.targets, vectors[1:], strict=True):
        assert torch.equal(x, y)
    for heads, (front, back), graph in zip(
        method.heads, itertools.pairwise(vectors), second.target, strict=True
    ):
        close(heads.graph(front, back), graph)


def features(method: MHGD, seed: int = 0, dtype: torch.dtype = torch.float64) -> Captured:
    maps = {
        p.teacher: noise(6, *p.teacher_shape, seed=seed + i, dtype=dtype)
        for i, p in enumerate(method.pairs)
    }
    return Captured(torch.zeros(6, 4), maps)


@pytest.mark.parametrize("factor", [-1.0, 1e-3, -7.0, 1e4])
def test_sign_and_size_of_a_map_do_not_matter(factor: float):
    method = mhgd()
    teacher, student = features(method), features(method, seed=9)
    target = method.vectors(teacher)
    own = method.student_vectors(student, target)
    for x in (teacher, student):
        for i, tap in enumerate(x.features):
            x.features[tap] *= factor if i != 1 else 1.0
    close(method.vectors(teacher), target)
    close(method.student_vectors(student, target), own)


def test_the_students_vector_is_the_nearest_of_its_first_four():
    """Maps of orthogonal rows 5, 4, 3, 2, 1 times the axes: the fourth axis is found, the fifth,
    which is nearer, is not; then it is turned.
    """
    method = mhgd(taps=["stage2", "stage3"])
    basis = torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0, 0, 0]))
    own = Captured(
        torch.zeros(1, 4),
        {"stage2": basis.view(1, 8, 8, 1), "stage3": torch.eye(8)[:, :1].view(1, 8, 1, 1)},
    )
    target = nn.functional.normalize(torch.tensor([[0.1, 0, 0, -0.5, 0.8, 0, 0, 0]]), dim=1)
    found = method.student_vectors(own, [target, -torch.eye(8)[:1]])
    close(found[0], -torch.eye(8)[3:4])
    close(found[1], -torch.eye(8)[:1])


# --- whole batches through both networks


def equal_networks(net: Net, batch: Batch, dtype: torch.dtype = torch.float32) -> float:
    """The graph term of a student that is a copy of its teacher."""
    data = ToyImages().spec()._replace(input_shape=tuple(net.input_shape))
    method = MHGD([copy.deepcopy(net)], [net], data, heads=2).to(dtype)
    method.student.eval()
    out = method(batch._replace(image=batch.image.to(dtype)), START)
    return method.loss(out)["graph"].item()


def test_a_copy_of_the_teacher_costs_nothing():
    net = toy_net(1)
    net.train()
    for seed in range(3):
        net(noise(16, *SHAPE, seed=seed))
    assert equal_networks(net, images(16)) == 0


REAL = ["resnet_mhgd", "wrn_10_4_mhgd", "vgg_student_mhgd"]


@pytest.mark.parametrize("name", REAL)
def test_a_copy_of_a_real_teacher_costs_next_to_nothing(name: str):
    torch.manual_seed(0)
    assert abs(equal_networks(build(name, 4), of_images(noise(4, 3, 32, 32)))) < 1e-6


def test_a_copy_of_a_real_teacher_costs_exactly_nothing():
    torch.manual_seed(0)
    batch = of_images(noise(4, 3, 32, 32))
    net, toy = build("resnet_mhgd", 4), toy_net(1)
    found = [equal_networks(net, batch, dtype) for dtype in (torch.float32, torch.float64)]
    assert found == [0, 0]
    assert equal_networks(toy, images(16), torch.float64) == 0


def test_the_order_of_images_does_not_matter():
    """In train mode: BatchNorm of the student does not see it either. A graph's rows and columns
    move along.
    """
    method, batch = mhgd(head_dropping=False).double(), images(dtype=torch.float64)
    order = torch.tensor([3, 0, 5, 1, 7, 2, 4, 6])
    moved = Batch(*(x[order] for x in batch))
    one, other = method(batch, START), method(moved, START)
    close(method.loss(one)["graph"], method.loss(other)["graph"])
    assert method.loss(one)["graph"] > 0.01
    for x, y in zip([*one.own, *one.target], [*other.own, *other.target], strict=True):
        assert x.shape == (2, 8, 8)
        close(x[:, order][:, :, order], y)
    one, other = method.estimate(batch, START), method.estimate(moved, START)
    close(method.estimate_loss(one), method.estimate_loss(other))


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_it_works_with_every_published_number_of_heads(count: int):
    method = mhgd(heads=count)
    for phase in ("heads", "distill"):
        terms, found = step(method, phase, images())
        assert all(term.isfinite() for term in terms.values())
        assert all(g.isfinite().all() for g in found)
    out = method(images(), START)
    assert [x.shape for x in (*out.own, *out.target)] == [(count, 8, 8)] * 4


def test_eight_heads_that_drop_are_the_default():
    method = MHGD([toy_net(0)], [toy_net(1)], ToyImages().spec())
    assert [(heads.count, heads.dropping) for heads in method.heads] == [(8, True)] * 2
    assert (method.gamma, method.alpha) == (1.0, 0.0)


# --- phases


def test_the_phases_are_those_of_the_page():
    method = mhgd(width=6)
    heads, distill = method.phases()
    assert [(p.name, p.epochs) for p in (heads, distill)] == [("heads", 20), ("distill", 100)]
    assert heads.predictors() == {} and distill.predictors is None
    ((first,), (second,)) = (p.turns[0].updates for p in (heads, distill))
    assert {id(p) for p in first.parameters} == {id(p) for p in method.heads.parameters()}
    moved = [*method.student.parameters(), *method.connectors.parameters()]
    assert {id(p) for p in second.parameters} == {id(p) for p in moved}


def test_a_frozen_layer_of_the_student_is_left_out():
    method = mhgd()
    frozen = method.student.module.conv1.weight.requires_grad_(False)
    (update,) = method.phases()[1].turns[0].updates
    assert all(p is not frozen for p in update.parameters)
    assert len(update.parameters) == len(list(method.student.parameters())) - 1


@pytest.mark.parametrize("width", [4, 6], ids=["equal", "connected"])
def test_each_phase_moves_its_own_and_nothing_else(width: int):
    """With weight decay, bit for bit, buffers included. In the first the student does not even run;
    BatchNorm of the heads is in train mode there, and not in the second, in which the method is.
    """
    method = mhgd(width=width)
    runs, modes = {"student": 0, "teacher": 0}, set()
    for name, net in (("student", method.student), ("teacher", method.teachers[0])):

        def count(*_: Any, name: str = name) -> None:
            runs[name] += 1

        net.module.register_forward_hook(count)
    norms = [m for m in method.heads.modules() if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.register_forward_hook(lambda m, *_: modes.add((m.training, method.training)))
    untouched = state_of(method)
    named = method.state_dict(keep_vars=True)
    weights = {k for k, v in named.items() if isinstance(v, nn.Parameter)}
    training = engine.Training(method, ToyImages(), pace(method, 1))
    moments = training.run()
    for _ in range(4):
        assert next(moments).phase == "heads"
    assert runs == {"student": 0, "teacher": 4} and modes == {(True, True)}
    moved = changed(method, untouched)
    assert moved == {k for k in untouched if k.startswith("heads.")}
    halfway = state_of(method)
    modes.clear()
    for moment in moments:
        assert moment.phase == "distill"
    assert runs == {"student": 4, "teacher": 8} and modes == {(False, True)}
    assert all(norm.training for norm in norms)
    moved = changed(method, halfway)
    assert not {k for k in moved if k.startswith("heads.")}
    assert {k for k in weights if not k.startswith("heads.")} <= moved


def test_batch_norm_of_the_heads_sees_the_batch_in_the_first_phase():
    """Averages go a tenth of the way, from 0 and 1; the second phase then reads them."""
    method = mhgd()
    out = method.estimate(images(), START)
    front, back = method.vectors(out.teachers[0])[:2]
    heads = method.heads[0]
    for norm, x in (
        (heads.theta[1], back @ heads.theta[0].weight.T),
        (heads.phi[1], front @ heads.phi[0].weight.T),
        (heads.f1[1], front @ heads.f1[0].weight.T),
    ):
        close(norm.running_mean, 0.1 * x.mean(0))
        close(norm.running_var, 0.9 + 0.1 * x.var(0))
        assert norm.num_batches_tracked == 1
    before = method(images(), START)
    assert heads.theta[1].training  # the mode is as it was
    heads.theta[1].running_mean += 1
    after = method(images(), START)
    for x, y in ((before.own, after.own), (before.target, after.target)):
        assert (x[0] - y[0]).abs().max() > 0.01
        assert torch.equal(x[1], y[1])
    assert heads.theta[1].num_batches_tracked == 1


def test_the_first_phase_learns():
    """Ten epochs of four steps, at the published rate: the estimates come nearer."""
    method = mhgd(heads=8)
    plan = OptimizerPlan(lambda p: sgd(p, 0.1, 0.9, nesterov=True, weight_decay=5e-4), Constant())
    moments = engine.Training(method, ToyImages(), pace(method, 10, default=plan)).run()
    losses = [m.terms["heads"].item() for m in itertools.islice(moments, 40) if m.epoch_done]
    assert 1 < losses[0] < 3
    assert losses[2] < 0.8 * losses[0]
    assert losses[-1] < 0.5 * losses[0]


# --- clipping and connectors


def split(method: MHGD, factor: float, progress: Progress) -> Any:
    """By parameter of phase 2: the step's gradient, that of "ce" and that of factor * "graph"."""
    (update,) = method.phases()[1].turns[0].updates
    terms = dict(update.loss(method(images(), START)))
    terms["graph"] = factor * terms["graph"]
    parts = [
        torch.autograd.grad(
            terms[k],
            update.parameters,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for k in ("ce", "graph")
    ]
    found = update.gradients(terms, update.parameters, progress)
    return zip(update.parameters, found, *parts, strict=True)


@pytest.mark.parametrize("factor", [1e3, 1e8])
def test_a_huge_graph_term_at_most_adds_half_the_gradient_of_the_labels_at_first(factor: float):
    """By tensor, in the first epoch; sigmoid(1) = 0.731059 of it in the second."""
    for epoch, share in ((0, 0.5), (1, 0.731059)):
        progress = Progress(epoch, epoch, 100, 100)
        clipped = 0
        for _, g, ce, graph in split(mhgd(), factor, progress):
            assert g.norm() <= (1 + share) * ce.norm() * (1 + 1e-5)
            if graph.norm() > share * ce.norm() > 0:
                close(g, ce + share * ce.norm() * graph / graph.norm(), rtol=1e-3, atol=1e-6)
                clipped += 1
        assert clipped > 10


def test_a_small_graph_term_is_added_as_it_is():
    for _, g, ce, graph in split(mhgd(), 1e-4, START):
        close(g, ce + graph)


def test_maps_of_unequal_width_go_through_connectors_to_the_teachers():
    """4, 8, 8 to 6, 12, 12: C D + 2 D each. Heads are as wide as the teacher's."""
    method = mhgd(width=6)
    counts = [sum(p.numel() for p in c.parameters()) for c in method.connectors]
    assert counts == [4 * 6 + 12, 8 * 12 + 24, 8 * 12 + 24]
    assert [h.phi[0].in_features for h in method.heads] == [6, 12]
    assert [h.theta[0].in_features for h in method.heads] == [12, 12]
    assert [h.f2.out_features for h in method.heads] == [12, 12]
    assert not list(mhgd().connectors.parameters())


@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_connectors_are_clipped_as_the_student_is_together(factor: float):
    """The labels say nothing of them: clipped one by one, they would stay as they began."""
    method = mhgd(width=6)
    own = {id(p) for p in method.connectors.parameters()}
    parts = list(split(method, factor, START))
    ce_norm, graph_norm = (
        torch.cat([part[i].flatten() for part in parts if id(part[0]) not in own]).norm()
        for i in (2, 3)
    )
    scale = min(1.0, 0.5 * (ce_norm / graph_norm).item())
    assert (scale < 1) == (factor > 1)
    seen = 0
    for p, g, ce, graph in parts:
        if id(p) in own:
            assert ce.eq(0).all()
            close(g, scale * graph)
            seen += g.abs().max() > 1e-9
    assert seen == 9


# --- networks


WRN = ("wrn_22_4_mhgd", ["stage1:post", "stage2:post", "stage3:post"], [64, 128, 256])
VGG = ("vgg_teacher_mhgd", [f"stage{i}" for i in (1, 2, 3, 4, 5)], [64, 128, 256, 512, 512])


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(
    ("student", "pair"),
    [
        ("vgg_student_mhgd", VGG),
        ("wrn_10_4_mhgd", WRN),
        ("resnet_mhgd", WRN),
        ("mobilenet_mhgd", WRN),
        ("vgg_bn_mhgd", WRN),
    ],
)
def test_the_papers_pairs_meet_at_its_sensing_points(student: str, pair: Any, size: int):
    """Four modules for VGG and two for the others; widths are equal, so there are no connectors."""
    name, taps, widths = pair
    spec = ToyImages().spec()._replace(classes=range(100), input_shape=(3, size, size))
    nets = [build(n, 100, (3, size, size)) for n in (student, name)]
    method = MHGD([nets[0]], [nets[1]], spec, heads=1)
    assert [p.teacher for p in method.pairs] == taps
    plain = [tap.removesuffix(":post") for tap in taps]
    assert [p.student.removesuffix(":post") for p in method.pairs] == plain
    assert [p.shape[0] for p in method.pairs] == widths
    sides = {
        ("vgg_teacher_mhgd", 32): [16, 8, 4, 4, 2],
        ("vgg_teacher_mhgd", 64): [32, 16, 8, 4, 2],
    }.get((name, size), [32, 16, 8])
    assert [p.teacher_shape for p in method.pairs] == [
        (w, s, s) for w, s in zip(widths, sides, strict=True)
    ]
    assert len(method.heads) == (4 if name == "vgg_teacher_mhgd" else 2)
    assert [h.phi[0].in_features for h in method.heads] == widths[:-1]
    assert [h.theta[0].in_features for h in method.heads] == widths[1:]
    assert not list(method.connectors.parameters())
    assert method.reads == set(taps)
    probe = method.student.probe()
    assert all(probe[p.student].min() >= 0 for p in method.pairs)


def test_the_wide_resnets_have_the_pages_number_of_parameters():
    spec = ToyImages().spec()._replace(classes=range(100), input_shape=(3, 32, 32))
    method = MHGD([build("wrn_10_4_mhgd")], [build("wrn_22_4_mhgd")], spec)
    counts = [sum(p.numel() for p in heads.parameters()) for heads in method.heads]
    assert counts == [150_528 + 104_768, 595_968 + 418_432]


def test_taps_can_be_chosen():
    method = mhgd(taps=["stage1", "stage3"], teacher_taps=["stage1:pre", "stage2:pre"], alpha=1.0)
    assert [(p.student, p.teacher) for p in method.pairs] == [
        ("stage1", "stage1:pre"),
        ("stage3", "stage2:pre"),
    ]
    assert len(method.heads) == 1
    assert method.reads == {"stage1:pre", "stage2:pre", "logits"}


# --- degenerate


ONE_BLACK = noise(16, *SHAPE)
ONE_BLACK[3] = 0
BATCHES = {
    "constant": torch.full((16, *SHAPE), 0.7),
    "repeated": noise(1, *SHAPE).repeat(16, 1, 1, 1),
    "black": torch.zeros(16, *SHAPE),
    "one_black": ONE_BLACK,
    "two": noise(16, *SHAPE)[:2],
    "huge": 1e6 * noise(16, *SHAPE),
}
every_width = pytest.mark.parametrize("width", [4, 6], ids=["equal", "connected"])


def sane(method: MHGD, phase: str, image: Tensor) -> None:
    """Terms and gradients are finite, and so are the weights after a step; none is above 1000."""
    terms, found = step(method, phase, of_images(image))
    assert all(term.isfinite() for term in terms.values())
    assert all(g.isfinite().all() for g in found)
    assert all(p.isfinite().all() and p.abs().max() < 1e3 for p in method.parameters())
    buffers = [b for b in method.heads.buffers() if b.is_floating_point()]
    assert all(b.isfinite().all() for b in buffers)


@every_width
@pytest.mark.parametrize("batch", BATCHES)
def test_degenerate_batches_leave_the_student_sane(batch: str, width: int):
    method = mhgd(width=width)
    for _ in range(2):
        sane(method, "distill", BATCHES[batch])


@pytest.mark.parametrize("batch", ["black", "one_black", "two", "huge"])
def test_degenerate_batches_leave_the_heads_sane(batch: str):
    method = mhgd(heads=8)
    for _ in range(2):
        sane(method, "heads", BATCHES[batch])


@pytest.mark.parametrize("batch", ["constant", "repeated"])
def test_batches_of_equal_images_leave_the_heads_sane(batch: str):
    """Three initialisations each."""
    for seed in range(3):
        torch.manual_seed(seed)
        method = MHGD([toy_net(0)], [toy_net(seed + 10)], ToyImages().spec())
        sane(method, "heads", BATCHES[batch])


@every_width
@pytest.mark.parametrize("dead", [("student",), ("teacher",), ("student", "teacher")])
def test_networks_whose_maps_are_zero_everywhere(dead: Sequence[str], width: int):
    method = mhgd(width=width)
    nets = {"student": method.student, "teacher": method.teachers[0]}
    with torch.no_grad():
        for p in itertools.chain(*(nets[role].parameters() for role in dead)):
            p.zero_()
    for phase in ("heads", "distill"):
        for _ in range(2):
            sane(method, phase, noise(16, *SHAPE))


def test_a_zero_map_is_a_zero_vector_without_a_gradient():
    """Of one image among four, at every tap; of the last more channels than pixels."""
    method = mhgd().eval()
    maps = {p.student: noise(4, *p.shape) for p in method.pairs}
    for x in maps.values():
        x[2] = 0
        x.requires_grad_()
    target = method.vectors(features(method, seed=5, dtype=torch.float32))
    own = method.student_vectors(Captured(torch.zeros(4, 4), maps), [x[:4] for x in target])
    graphs = [
        heads.graph(*x) for heads, x in zip(method.heads, itertools.pairwise(own), strict=True)
    ]
    value = torch.stack([graph_divergence(x, noise(*x.shape)) for x in graphs]).sum()
    found = torch.autograd.grad(value, list(maps.values()))
    for x, g in zip(own, found, strict=True):
        assert x[2].eq(0).all() and x[1].norm() > 0.99
        assert g.isfinite().all()
        assert g[2].eq(0).all() and g[1].abs().max() > 0


def test_an_estimate_of_zero_has_a_finite_gradient_and_costs_one():
    """Where f2 gives nothing there is no direction: the distance is 1, and nothing is pulled."""
    heads = hand_made(3, 4, 2, dropping=False)
    with torch.no_grad():
        heads.f2.weight.zero_()
    estimate = heads(unit(5, 3), target := unit(5, 4))
    assert estimate.eq(0).all()
    loss = mhgd().estimate_loss(estimated([estimate], [target]))["heads"]
    assert loss == 1
    for g in torch.autograd.grad(loss, list(heads.parameters())):
        assert g.eq(0).all()


# --- precision and device


def test_it_works_in_float64():
    method = mhgd(width=6).double()
    for phase in ("heads", "distill"):
        terms, found = step(method, phase, images(dtype=torch.float64))
        assert all(x.dtype == torch.float64 for x in (*terms.values(), *found))
    out = method(images(dtype=torch.float64), START)
    assert all(x.dtype == torch.float64 for x in (*out.own, *out.target))


@every_width
def test_a_step_reads_no_value_and_stays_on_its_device(width: int):
    """On the meta device there are none to read, and tensors of another one are refused."""
    method = mhgd(width=width).to("meta")
    batch = Batch(*(x.to("meta") for x in images()))
    for phase in ("heads", "distill"):
        terms, found = step(method, phase, batch)
        assert all(x.is_meta for x in (*terms.values(), *found))


# --- refusals


def test_an_incomplete_last_batch_is_refused_unless_dropped():
    with pytest.raises(MethodError) as error:
        mhgd(ToyImages().spec(batch_size=24))
    assert str(error.value) == (
        "MHGD's graphs are as large as data.batch_size, 24, but the last batch of an epoch of 64 "
        "images has 16; set data.drop_last=true"
    )
    assert mhgd(ToyImages().spec(batch_size=24, drop_last=True)).data.drop_last
    assert not mhgd(ToyImages().spec(batch_size=32)).data.drop_last


def test_a_batch_of_one_is_refused():
    with pytest.raises(MethodError) as error:
        mhgd(ToyImages().spec(batch_size=1))
    assert str(error.value) == (
        "MHGD's graphs join the images of a batch; make data.batch_size 2 or more"
    )
    for phase in ("heads", "distill"):
        step(mhgd(ToyImages().spec(batch_size=2)), phase, images(2))


@pytest.mark.parametrize("count", [0, -1])
def test_no_heads_are_refused(count: int):
    with pytest.raises(MethodError) as error:
        mhgd(heads=count)
    assert str(error.value) == f"MHGD has heads=1 or more, but heads is {count}"


def test_a_single_tap_is_refused():
    with pytest.raises(MethodError) as error:
        mhgd(taps=["stage2"])
    assert str(error.value) == (
        "MHGD relates consecutive feature maps, but there is only 'stage2' of the student with "
        "'stage2' of the teacher; name 2 or more with taps=[...] and teacher_taps=[...]"
    )


def test_a_teacher_of_other_classes_is_welcome_without_kd():
    data = ToyImages().spec()._replace(teacher_classes=[range(9)])
    method = mhgd(data, classes=9)
    assert list(method.loss(method(images(), START))) == ["ce", "graph"]
    with pytest.raises(MethodError) as error:
        mhgd(data, classes=9, alpha=0.1)
    assert str(error.value) == (
        "MHGD compares logits class by class, but teacher 0 has 9 classes and student 0 has 4; use "
        "a teacher trained on this data set, or a method that reads features"
    )


def test_a_graph_term_without_another_to_clip_it_by_is_refused():
    with pytest.raises(MethodError) as error:
        mhgd(gamma=0.0)
    assert str(error.value) == (
        "MHGD needs labels or soft targets beside its own loss; give gamma or alpha a value above 0"
    )
    terms, _ = step(mhgd(gamma=0.0, alpha=1.0), "distill", images())
    assert list(terms) == ["kd", "graph"]
