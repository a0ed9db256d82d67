"""Singular vectors of maps: by hand, against torch.linalg.svd and against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.losses import aligned, right_singular_vectors, upright
from tests.methods.test_rkd import Live

close = torch.testing.assert_close

SHAPES = [(3, 4, 5, 3), (3, 7, 3, 2), (3, 6, 3, 2), (3, 1, 3, 3), (3, 5, 1, 1)]
"""More positions than channels, fewer, as many; one channel, one position."""


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def as_map(matrix: Tensor) -> Tensor:
    """Rows are positions, columns channels. (P, D) -> (1, D, P, 1)"""
    return matrix.mT[None, :, :, None]


def with_values(values: list[float], positions: int, channels: int) -> Tensor:
    """A matrix with these singular values, others 0, and no axis of its own. -> (P, D)"""
    left, right = (torch.linalg.qr(random(n, n, seed=n)).Q for n in (positions, channels))
    n = len(values)
    return left[:, :n] @ torch.diag(torch.tensor(values).double()) @ right[:, :n].mT


def along_axes(values: list[float], positions: int, channels: int) -> Tensor:
    """The same with unit vectors: equal singular values, and those of 0, are so to the last bit."""
    matrix = torch.zeros(positions, channels, dtype=torch.float64)
    return matrix.diagonal_scatter(
        torch.tensor(values + [0.0] * (min(matrix.shape) - len(values))).double()
    )


def by_svd(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What the source promises, from torch.linalg.svd. (B, D, H, W) -> (B, n), (B, D, n)"""
    _, values, rows = torch.linalg.svd(x.flatten(2).mT, full_matrices=False)
    return values[:, :count], rows.mT[:, :, :count]


def ours(x: Tensor, count: int) -> Tensor:
    return right_singular_vectors(x, count)[1]


def reading(vectors: Tensor) -> Tensor:
    """Another quadratic form of each vector, so no sign matters. (B, D, n) -> (B,)"""
    _, d, n = vectors.shape
    return torch.einsum("bdi,ide,bei->b", vectors, random(n, d, d, seed=5).to(vectors), vectors)


def span(vectors: Tensor) -> Tensor:
    """One quadratic form, summed over vectors: only their span matters. (B, D, n) -> (B,)"""
    form = random(vectors.shape[1], vectors.shape[1], seed=5).to(vectors)
    return torch.einsum("bdi,de,bei->b", vectors, form, vectors)


def gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


def differences(loss: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a loss (B, ...) -> (B,), in all entries of each image, by svd."""
    steps = step * torch.eye(x[0].numel(), dtype=torch.float64).view(-1, *x.shape[1:])
    found = [(loss(image + steps) - loss(image - steps)) / (2 * step) for image in x]
    return torch.stack(found).view_as(x)


# --- values and vectors


def test_a_map_by_hand():
    """Two positions, three channels: rows (3, 0, 0) and (0, 0, 2), so values 3 and 2 along the
    first and the last channel. One position (3, 4): the value is 5, the vector (0.6, 0.8).
    """
    x = torch.tensor([[[3.0, 0.0]], [[0.0, 0.0]], [[0.0, 2.0]]])[None]
    values, vectors = right_singular_vectors(x, 2)
    close(values, torch.tensor([[3.0, 2.0]]))
    close(vectors.abs(), torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]]))
    values, vectors = right_singular_vectors(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), 1)
    close(values, torch.tensor([[5.0]]))
    close(vectors.abs(), torch.tensor([[[0.6], [0.8]]]))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_vectors_are_those_of_svd(shape: tuple[int, ...], count: int):
    x = random(*shape)
    (values, vectors), (expected, others) = right_singular_vectors(x, count), by_svd(x, count)
    close(values, expected, rtol=1e-12, atol=0)
    sign = (vectors * others).sum(1, keepdim=True).sign()
    close(vectors, sign * others, rtol=0, atol=1e-12)


def test_there_are_no_more_than_channels_or_positions():
    for shape in [(2, 3, 4, 4), (2, 9, 3, 1)]:
        values, vectors = right_singular_vectors(random(*shape), 8)
        assert values.shape == (2, 3)
        assert vectors.shape == (2, shape[1], 3)
        close(vectors.mT @ vectors, torch.eye(3).double().expand(2, 3, 3))


def test_fewer_are_the_first_of_more():
    """Each by its own value, whatever else is asked for."""
    for shape in [(2, 5, 3, 3), (2, 9, 2, 2)]:
        x = random(*shape)
        (one, v), (more, w) = (right_singular_vectors(x, n) for n in (1, 4))
        assert torch.equal(one, more[:, :1])
        close(v, w[:, :, :1])


@pytest.mark.parametrize("size", [(4, 3), (1, 1)])
def test_a_constant_map_has_one_direction(size: tuple[int, int]):
    """All channels alike, 1 / sqrt D each; the value is 7 sqrt(H W D), the others are missing."""
    x = torch.full((1, 4, *size), 7.0)
    values, vectors = right_singular_vectors(x, 3)
    close(values[0, 0].item(), 7 * math.sqrt(4 * size[0] * size[1]))
    close(upright(vectors)[0, :, 0], torch.full((4,), 0.5))
    assert values[0, 1:].eq(0).all() and vectors[:, :, 1:].eq(0).all()


def test_missing_directions_are_zero():
    """Rank two of four: the third and fourth value and vector, exactly."""
    for positions, channels in [(7, 5), (4, 6)]:
        x = as_map(with_values([3.0, 2.0], positions, channels))
        values, vectors = right_singular_vectors(x, 4)
        close(values, torch.tensor([[3.0, 2.0, 0.0, 0.0]]).double())
        assert values[0, 2:].eq(0).all() and vectors[0, :, 2:].eq(0).all()
        close(vectors[0, :, :2].norm(dim=0), torch.ones(2).double())


@pytest.mark.parametrize("shape", [(4, 3), (3, 4)])
def test_the_tolerance_is_of_the_squared_values(shape: tuple[int, int]):
    """Squares 1 and 1/4: at a tolerance of 1/4 the second is missing, just below it is there. The
    default is 1e-6: of a value of 1, 0.00105 is there and 0.00095 is not, in half a batch each.
    """
    x = as_map(along_axes([1.0, 0.5], *shape))
    for tolerance, there in ((0.25, 0), (0.2499, 1)):
        values, vectors = right_singular_vectors(x, 2, tolerance)
        assert vectors[0, :, 1].norm() == there and values[0, 1] == 0.5 * there
    pair = [as_map(along_axes([1.0, value], *shape)) for value in (0.00105, 0.00095)]
    for dtype in (torch.float64, torch.float32):
        values, vectors = right_singular_vectors(torch.cat(pair).to(dtype), 2)
        close(values[:, 1], torch.tensor([0.00105, 0.0], dtype=dtype), rtol=1e-3, atol=0)
        close(vectors[:, :, 1].norm(dim=1), torch.tensor([1.0, 0.0], dtype=dtype))


def test_the_tolerance_is_relative_to_each_image():
    """To its largest square: 0.36 of 1 is above a quarter of that, not above one of 3.36, nor of
    what another image has for its largest share, which is all.
    """
    x = torch.cat([as_map(along_axes(s, 5, 4)) for s in ([1.0, 1.0, 1.0, 0.6], [9.0])])
    values, _ = right_singular_vectors(x, 4, 0.25)
    close(values, torch.tensor([[1.0, 1.0, 1.0, 0.6], [9.0, 0.0, 0.0, 0.0]]).double())


# --- gradients


def test_gradients_by_hand():
    """M = diag(2, 1), loss v_1[0] v_1[1], whatever the sign: at v_1 = (1, 0), G = (0, 1), so w_1 =
    v_2 / (4 - 1) and dL/dM = M (w_1 v_1^T + v_1 w_1^T) = [[0, 2/3], [1/3, 0]]. One position (3, 4),
    loss v[0]^2 / 2: G = (0.6, 0), and what is not along v of it, (0.384, -0.288), divided by 5. For
    the second vector of M the same with v_1 / (1 - 4): minus what the first has.
    """
    expected = torch.tensor([[0.0, 2 / 3], [1 / 3, 0.0]]).double()
    x = as_map(torch.diag(torch.tensor([2.0, 1.0]).double()))
    for which, sign in ((0, 1), (1, -1)):
        close(gradient(lambda x, i=which: ours(x, 2)[:, :, i].prod(1), x), sign * as_map(expected))
    x = torch.tensor([3.0, 4.0]).double().view(1, 2, 1, 1)
    found = gradient(lambda x: ours(x, 1)[:, 0].square() / 2, x)
    close(found.flatten(), torch.tensor([0.384, -0.288]).double() / 5)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradients_are_those_of_svd(shape: tuple[int, ...], count: int):
    """All singular values differ here, so that autograd through svd is right."""
    x = random(*shape)
    expected = gradient(lambda x: reading(by_svd(x, count)[1]), x)
    close(gradient(lambda x: reading(ours(x, count)), x), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(5, 4), (4, 7), (4, 4)])
def test_gradients_are_the_closed_forms_of_the_paper(shape: tuple[int, int]):
    """For HW >= D and HW < D, with all vectors: K_ij = 1 / (s_i^2 - s_j^2), sym(A) = (A + A^T) / 2,
    2 U S sym(K^T o (V^T G)) V^T, or with E = G / S
    U E^T - U diag(E^T V) V^T - 2 U sym(K o (S V^T E)) S V^T.
    """
    m = random(*shape)
    vectors = ours(as_map(m), 4).requires_grad_()
    (g,) = torch.autograd.grad(reading(vectors).sum(), vectors)
    u, s, rows = torch.linalg.svd(m, full_matrices=False)
    sign = (rows.mT * vectors[0].detach()).sum(0).sign()
    u, v, g = u * sign, rows.mT * sign, g[0]
    k = 1 / (s.square()[:, None] - s.square()).fill_diagonal_(math.inf)
    if shape[0] >= shape[1]:
        a = k.mT * (v.mT @ g)
        expected = u @ torch.diag(s) @ (a + a.mT) @ v.mT
    else:
        e = g / s
        a = k * (torch.diag(s) @ v.mT @ e)
        expected = u @ e.mT - u @ torch.diag((e * v).sum(0)) @ v.mT
        expected = expected - u @ (a + a.mT) @ torch.diag(s) @ v.mT
    found = gradient(lambda x: reading(ours(x, 4)), as_map(m))
    close(found, as_map(expected), rtol=1e-9, atol=1e-10)


def test_values_have_no_gradient():
    x = random(2, 3, 4, 4).requires_grad_()
    values, vectors = right_singular_vectors(x, 2)
    assert vectors.requires_grad and not values.requires_grad


def test_gradients_can_be_taken_twice_but_not_of_each_other():
    """A second derivative would lack the one of the eigenvectors, silently."""
    x = random(2, 3, 4, 4).requires_grad_()
    loss = reading(ours(x, 2)).sum()
    one, other = (torch.autograd.grad(loss, x, create_graph=True)[0] for _ in range(2))
    assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        one.sum().backward()


EXACT = [
    pytest.param([3.0, 2.0, 2.0], 7, 5, 0, 1, id="well-separated-first"),
    pytest.param([3.0, 2.0, 2.0, 1.0, 0.5], 7, 5, 0, 1, id="well-separated-first-of-full-rank"),
    pytest.param([3.0, 2.0, 2.0], 3, 5, 0, 1, id="well-separated-first-wide"),
    pytest.param([2.0, 2.0, 1.0], 5, 4, 2, 3, id="well-separated-last"),
    pytest.param([2.0, 2.0, 1.0], 3, 5, 2, 3, id="well-separated-last-wide"),
    pytest.param([2.0, 2.0, 1.0, 0.5], 6, 4, 0, 2, id="span-of-two"),
    pytest.param([2.0, 2.0, 1.0], 3, 5, 0, 2, id="span-of-two-wide"),
    pytest.param([3.0, 2.0, 2.0, 1.0], 4, 4, 1, 3, id="span-of-two-square"),
    pytest.param([2.0, 2.0], 6, 4, 0, 2, id="span-of-two-of-rank-two"),
    pytest.param([2.0, 2.0], 4, 6, 0, 2, id="span-of-two-of-rank-two-wide"),
    pytest.param([2.0], 7, 5, 0, 1, id="rank-one"),
    pytest.param([2.0], 3, 5, 0, 1, id="rank-one-wide"),
    pytest.param([2.0], 4, 4, 0, 1, id="rank-one-square"),
    pytest.param([2.0, 1.0], 7, 5, 1, 2, id="second-of-rank-two"),
    pytest.param([2.0, 1.0], 4, 6, 1, 2, id="second-of-rank-two-wide"),
]


@pytest.mark.parametrize(("values", "positions", "channels", "first", "last"), EXACT)
@pytest.mark.parametrize("make", [with_values, along_axes])
def test_gradients_where_values_coincide_or_vanish_are_those_of_finite_differences(
    make: Any, values: list[float], positions: int, channels: int, first: int, last: int
):
    """What is read has a derivative here; asking for all vectors changes nothing."""
    x = as_map(make(values, positions, channels))
    expected = differences(lambda x: span(by_svd(x, last)[1][:, :, first:]), x)
    assert expected.abs().max() > 0.05
    for count in (last, 5):
        for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
            found = gradient(lambda x, n=count: span(ours(x, n)[:, :, first:last]), x.to(dtype))
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("values", "positions", "channels", "last"),
    [
        ([3.0, 2.0, 2.0], 3, 5, 1),
        ([2.0, 2.0, 1.0, 0.5], 6, 4, 2),
        ([2.0], 7, 5, 1),
        ([2.0], 3, 5, 1),
        ([2.0, 1.0], 4, 4, 2),
    ],
)
def test_autograd_through_svd_gives_nan_there(
    values: list[float], positions: int, channels: int, last: int
):
    """Two vectors with one value, or two without any, are enough, though they are not read. Along
    the axes, those without one are dead channels or positions.
    """
    x = as_map(along_axes(values, positions, channels))
    found = gradient(lambda x: span(by_svd(x, last)[1]), x)
    assert found.isnan().any()
    assert gradient(lambda x: span(ours(x, last)), x).isfinite().all()


def dead(channels: int, size: int, which: str) -> Tensor:
    """After a ReLU, with two channels or two positions of zeros. -> (1, D, H, W)"""
    x = random(1, channels, size, size, seed=2).relu()
    if which == "channels":
        x[:, [1, 4]] = 0
    else:
        x.flatten(2)[:, :, [0, 3]] = 0
    return x


@pytest.mark.parametrize("which", ["channels", "positions"])
@pytest.mark.parametrize(("channels", "size"), [(6, 3), (9, 3), (8, 2)])
def test_dead_channels_and_positions(channels: int, size: int, which: str):
    """More positions than channels, as many, fewer. Two dead channels are two vanishing values."""
    x = dead(channels, size, which)
    expected = differences(lambda x: span(by_svd(x, 2)[1]), x)
    found = gradient(lambda x: span(ours(x, 4)[:, :, :2]), x)
    assert expected.abs().max() > 0.05
    close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("channels", "size"), [(8, 6), (24, 3), (9, 3)], ids=["tall", "wide", "square"]
)
def test_in_float32_gradients_of_maps_after_a_relu_are_right_to_a_thousandth(
    channels: int, size: int
):
    """One dead channel, neighbours alike, as maps are; differences in double."""
    x = random(1, channels, size, size, seed=3).relu()
    x[:, 2] = 0
    x = (x + x.roll(1, 2) + x.roll(1, 3) + 3 * x.mean(1, keepdim=True)) * x.gt(0)
    expected = differences(lambda x: reading(by_svd(x, 1)[1]), x)
    found = gradient(lambda x: reading(ours(x, 4)[:, :, :1]), x.float())
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_rotations_within_the_tolerance_are_left_out():
    """diag(1, r), loss v_1[0] v_1[1]: [[0, 1], [r, 0]] / (1 - r^2) if 1 - r^2 is above the
    tolerance, else zeros.
    """
    for r, tolerance, there in (
        (0.5, 0.7501, False),
        (0.5, 0.7499, True),
        (math.sqrt(1 - 0.9e-6), 1e-6, False),
        (math.sqrt(1 - 1.1e-6), 1e-6, True),
    ):
        x = as_map(torch.diag(torch.tensor([1.0, r], dtype=torch.float64)))
        found = gradient(
            lambda x, t=tolerance: right_singular_vectors(x, 1, t)[1][:, :, 0].prod(1), x
        )
        expected = torch.tensor([[0.0, 1.0], [r, 0.0]], dtype=torch.float64) / (1 - r * r)
        close(found, there * as_map(expected), rtol=1e-8, atol=0)


def test_the_tolerance_of_rotations_is_of_the_largest_square():
    """diag(1, a, b), loss v_2[1] v_2[2]: entries a and b over a^2 - b^2, here 2e-6 and 0.5e-6, both
    far above a millionth of a^2 = 0.01.
    """
    for gap, there in ((2e-6, True), (0.5e-6, False)):
        a, b = 0.1, math.sqrt(0.01 - gap)
        x = as_map(torch.diag(torch.tensor([1.0, a, b], dtype=torch.float64)))
        found = gradient(lambda x: ours(x, 2)[:, 1:, 1].prod(1), x)
        expected = torch.zeros(3, 3, dtype=torch.float64)
        expected[1, 2], expected[2, 1] = there * a / gap, there * b / gap
        close(found, as_map(expected), rtol=1e-7, atol=1e-7)


def test_rotations_within_the_tolerance_are_left_out_of_wide_maps_too():
    """diag(1, r) with a third channel: what turns v_1 to that one stays, v_2 is left out. Loss
    v_1[0] (v_1[1] + v_1[2]): G = (0, 1, 1), w_1 = v_2 / (1 - r^2) + e_3, M w_1 v_1^T + M v_1 w_1^T.
    """
    for r, there in ((math.sqrt(1 - 0.9e-6), 0.0), (math.sqrt(1 - 1.1e-6), 1.0)):
        x = as_map(torch.tensor([[1.0, 0.0, 0.0], [0.0, r, 0.0]], dtype=torch.float64))
        found = gradient(lambda x: ours(x, 1)[:, 0, 0] * ours(x, 1)[:, 1:, 0].sum(1), x)
        turn = there / (1 - r * r)
        expected = torch.tensor([[0.0, turn, 1.0], [r * turn, 0.0, 0.0]], dtype=torch.float64)
        close(found, as_map(expected), rtol=1e-8, atol=2e-6)


def test_the_smaller_of_two_gram_matrices_is_used():
    """512 channels at four positions, and the other way round: nothing of 512 x 512 is made."""
    for shape in [(1, 512, 2, 2), (1, 4, 32, 16)]:
        x = random(*shape).requires_grad_()
        with Live() as live:
            torch.autograd.grad(ours(x, 4).sum(), x)
        assert live.largest <= 8 * 512


def test_missing_directions_pass_no_gradient_on():
    """Rank one: a loss of the second and third vector, which are zero, moves nothing."""
    for positions, channels in [(7, 5), (3, 5)]:
        x = as_map(with_values([2.0], positions, channels))
        found = gradient(lambda x: ours(x, 3)[:, :, 1:].sum((1, 2)), x)
        assert found.eq(0).all()


# --- zeros, extremes, other types


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 9, 2, 2), (6, 4, 2, 2)])
def test_bad_maps_are_zero_and_leave_the_others_as_they_are(shape: tuple[int, ...]):
    """Zeros, NaN, inf and minus inf beside two others, bit for bit those of a batch of good ones.
    A sum of squares beyond float32 is not finite either.
    """
    good = random(*shape).float()
    x = good.clone()
    x[1] = 0
    x[2, 0, 0, 0], x[3, 1, 0, 1], x[4, 0] = math.nan, math.inf, -math.inf
    x[5] *= 1e20
    values, vectors = right_singular_vectors(x, 3)
    expected, others = right_singular_vectors(good, 3)
    found = gradient(lambda x: reading(ours(x, 3)), x)
    gradients = gradient(lambda x: reading(ours(x, 3)), good)
    for one, other in ((values, expected), (vectors, others), (found, gradients)):
        assert torch.equal(one[0], other[0]) and other[0].abs().sum() > 0
        assert one[1:].eq(0).all()
    order = torch.tensor([1, 2, 0, 3, 4, 5])
    assert torch.equal(right_singular_vectors(x[order], 3)[1][2], others[0])


def test_maps_that_are_nearly_zero_count_as_zero():
    """Squares that sum to less than 1e-24: a value of 0.9e-12; one of 1.1e-12 is there."""
    for shape in [(4, 3), (3, 4)]:
        pair = torch.cat([as_map(along_axes([s], *shape)) for s in (0.9e-12, 1.1e-12)])
        for dtype in (torch.float64, torch.float32):
            values, vectors = right_singular_vectors(pair.to(dtype), 2)
            close(values[:, 0], torch.tensor([0.0, 1.1e-12], dtype=dtype), rtol=1e-6, atol=0)
            assert vectors[0].eq(0).all()
            close(vectors[1, :, 0].norm().item(), 1.0)
            assert gradient(lambda x: reading(ours(x, 2)), pair.to(dtype))[0].eq(0).all()


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e5, 1e15])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_scale_changes_neither_vectors_nor_precision(shape: tuple[int, ...], scale: float):
    """In float32, whose squares end at 1e38: values grow with it, gradients shrink with it."""
    x = random(*shape)
    (values, vectors), (expected, others) = (
        right_singular_vectors(y, 3) for y in ((scale * x).float(), x)
    )
    close(values.double() / scale, expected, rtol=1e-5, atol=0)
    sign = (vectors * others).sum(1, keepdim=True).sign()
    close(vectors.double(), sign * others, rtol=0, atol=1e-5)
    found = scale * gradient(lambda x: reading(ours(x, 3)), (scale * x).float()).double()
    expected = gradient(lambda x: reading(ours(x, 3)), x)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    """Squares of 300 overflow float16; the gradient goes back in the map's own type."""
    for shape in SHAPES[:2]:
        x = (300 * random(*shape)).to(dtype)
        values, vectors = right_singular_vectors(x, 2)
        assert values.dtype == vectors.dtype == torch.float32
        assert torch.equal(vectors, ours(x.float(), 2))
        found = gradient(lambda x: 1e3 * reading(ours(x, 2)), x)
        assert found.dtype == dtype
        assert torch.equal(
            found, gradient(lambda x: 1e3 * reading(ours(x, 2)), x.float()).to(dtype)
        )


def test_double_stays_double():
    values, vectors = right_singular_vectors(random(2, 3, 2, 2), 1)
    assert values.dtype == vectors.dtype == torch.float64


def test_a_step_reads_no_value_and_stays_on_its_device():
    """On the meta device there are none to read, and tensors of another one are refused."""
    for shape in SHAPES:
        x = torch.zeros(*shape, device="meta", requires_grad=True)
        _, vectors = right_singular_vectors(x, 2)
        own = aligned(vectors, upright(vectors.detach()))
        assert torch.autograd.grad(own.sum(), x)[0].shape == shape


# --- symmetries


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_images_and_of_positions_does_not_matter(shape: tuple[int, ...]):
    """Positions may be transposed or shuffled: gradients go where the positions went."""
    x = random(*shape)
    values, found = right_singular_vectors(x, 2)[0], gradient(lambda x: reading(ours(x, 2)), x)
    images = torch.tensor([2, 0, 1])
    positions = torch.randperm(shape[2] * shape[3], generator=torch.Generator().manual_seed(1))
    changes: list[Any] = [
        lambda x: x[images],
        lambda x: x.mT,
        lambda x: x.flatten(2)[:, :, positions].view_as(x),
        lambda x: x.contiguous(memory_format=torch.channels_last),
    ]
    for i, change in enumerate(changes):
        close(right_singular_vectors(change(x), 2)[0], values[images] if i == 0 else values)
        close(gradient(lambda x: reading(ours(x, 2)), change(x)), change(found))


def test_vectors_turn_with_the_channels():
    """V of M Q is Q^T V, for a rotation Q of the channels; rows may be rotated, V stays."""
    m = random(6, 4)
    q, r = torch.linalg.qr(random(4, 4, seed=1)).Q, torch.linalg.qr(random(6, 6, seed=2)).Q
    projector = ours(as_map(m), 2)[0] @ ours(as_map(m), 2)[0].mT
    for changed, turn in ((m @ q, q), (r @ m, torch.eye(4).double())):
        v = ours(as_map(changed), 2)[0]
        close(v @ v.mT, turn.mT @ projector @ turn)


# --- signs and alignment


def test_upright_vectors_have_a_positive_sum():
    """Each by itself; a sum of zero stays, and the gradient turns along."""
    vectors = torch.tensor([[[-0.6, 0.6, 1.0], [-0.8, -0.8, -1.0]], [[1.0, -1.0, 0.0], [0, 0, 0]]])
    expected = torch.tensor([[[0.6, -0.6, 1.0], [0.8, 0.8, -1.0]], [[1.0, 1.0, 0.0], [0, 0, 0]]])
    assert torch.equal(upright(vectors), expected)
    assert torch.equal(upright(-vectors)[:, :, :2], expected[:, :, :2])
    weights = torch.arange(12.0).view(2, 2, 3)
    found = gradient(lambda v: upright(v) * weights, vectors)
    turns = torch.tensor([[-1.0, -1.0, 1.0], [1.0, -1.0, 1.0]])[:, None]
    assert torch.equal(found, turns * weights)


def test_alignment_by_hand():
    """Cosines of (0.6, 0.8) with (1, 0) and (0, -1): 0.6 and -0.8. The second, turned: (0, 1)."""
    candidates = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
    target = torch.tensor([[[0.6], [0.8]]])
    assert torch.equal(aligned(candidates, target), torch.tensor([[[0.0], [1.0]]]))
    assert torch.equal(aligned(candidates, -target), torch.tensor([[[0.0], [-1.0]]]))


def test_several_targets_choose_each_for_itself():
    """Three candidates e_1, -e_2, e_3; targets nearest to e_3, e_2, -e_1 and e_2 again. The other
    image of the batch has its candidates the other way round.
    """
    candidates = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    target = torch.tensor([[0.1, 0.0, -0.9, 0.3], [0.2, 1.0, 0.1, 0.9], [0.9, 0.0, 0.2, -0.3]])
    expected = torch.tensor([[0.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    found = aligned(torch.stack([candidates, candidates.flip(1)]), target.expand(2, 3, 4))
    assert torch.equal(found, expected.expand(2, 3, 4))


def test_of_candidates_equally_near_the_first_is_taken():
    """Cosines 0.6 and -0.6: one vector, not the sum or the mean of two."""
    candidates = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]]])
    target = torch.tensor([[[0.6], [0.6], [0.1]]])
    assert torch.equal(aligned(candidates, target), candidates[:, :, 1:2])
    swapped = candidates[:, :, [0, 2, 1]]
    assert torch.equal(aligned(swapped, target), -swapped[:, :, 1:2])


def test_a_cosine_of_zero_keeps_the_sign():
    """Of a candidate across: the first, as it is. Beside a target of zeros it is zero, or its sign
    would be the solver's.
    """
    candidates = torch.tensor([[[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]])
    across = aligned(candidates, torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1))
    assert torch.equal(across, candidates[:, :, :1])
    assert torch.equal(aligned(candidates, torch.zeros(1, 3, 1)), torch.zeros(1, 3, 1))
    found = aligned(candidates[:, :, 1:], torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1))
    assert torch.equal(found, candidates[:, :, 1:])


def test_the_gradient_reaches_the_chosen_candidate_alone_with_its_sign():
    """The choice is a constant: nothing reaches the target or the other candidate."""
    candidates = torch.tensor([[[0.8, 0.6], [0.6, -0.8]]], requires_grad=True)
    target = torch.tensor([[[0.0], [1.0]]], requires_grad=True)
    loss = (aligned(candidates, target) * torch.tensor([[[2.0], [3.0]]])).sum()
    own, other = torch.autograd.grad(loss, [candidates, target], allow_unused=True)
    assert torch.equal(own, torch.tensor([[[0.0, -2.0], [0.0, -3.0]]]))
    assert other is None


def test_alignment_keeps_the_type_of_the_candidates():
    v = random(2, 3, 2)
    assert aligned(v, v).dtype == torch.float64
    assert aligned(v.float(), v.float()).dtype == torch.float32


# --- at the edges of float32 and of the tolerance


def test_wide_maps_near_1e15_have_a_finite_gradient():
    m = with_values([1.0, math.sqrt(3.5e-6), math.sqrt(2e-6)], 4, 64)
    x = as_map(m / m.abs().max() * 1e15).float()
    assert gradient(lambda x: reading(ours(x, 3)), x).isfinite().all()


def test_wide_maps_near_1e_12_have_vectors_of_unit_length():
    x = as_map(along_axes([0.8e-12, 0.8e-12], 2, 4))
    close(ours(x, 2).norm(dim=1), torch.ones(1, 2).double())


@pytest.mark.parametrize(("positions", "channels"), [(7, 5), (3, 5)])
def test_a_span_of_values_near_the_tolerance_has_its_gradient(positions: int, channels: int):
    x = as_map(with_values([1.0, math.sqrt(1.9e-6), math.sqrt(1.01e-6)], positions, channels))
    wanted = differences(lambda x: span(by_svd(x, 3)[1][:, :, 1:]), x, 1e-7)
    found = gradient(lambda x: span(ours(x, 3)[:, :, 1:]), x)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
