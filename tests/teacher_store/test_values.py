"""What a teacher says, as bytes and back: exact where it can be, and rounded as it is told."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.errors import MethodError
from potstill.teacher_store.values import TopK, Value, Whole, kept_in

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
CPU = torch.device("cpu")
close = torch.testing.assert_close


def again(value: Value, x: Tensor) -> Tensor:
    """Through bytes and back, which must be as many as it says."""
    rows = value.encode(x)
    assert rows.dtype == np.uint8 and rows.shape == (len(x), value.bytes)
    return value.decode(rows.copy(), CPU)


def whole(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = True, name: str = "logits"
) -> Whole:
    return Whole(name, shape, dtype, channels_last)


def normal(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# --- whole outputs ------------------------------------------------------------------------------


def test_bytes_by_hand():
    """float16: 1 is 0x3C00, -2 is 0xC000. bfloat16: the upper halves of 0x3F800000, 0xC0000000.

    Little endian, the classes in their order.
    """
    x = torch.tensor([[1.0, -2.0]])
    assert whole((2,), HALF).encode(x).tolist() == [[0x00, 0x3C, 0x00, 0xC0]]
    assert whole((2,), BRAIN).encode(x).tolist() == [[0x80, 0x3F, 0x00, 0xC0]]
    assert whole((2,), FULL).encode(x).tolist() == [[0, 0, 0x80, 0x3F, 0, 0, 0, 0xC0]]


def test_a_map_is_kept_pixel_by_pixel_where_the_network_computes_it_so():
    """(C, H, W) = (2, 1, 3) of 0 ... 5: by pixel 0 3, 1 4, 2 5."""
    x = torch.arange(6.0).view(1, 2, 1, 3)
    for last, order in ((True, [0, 3, 1, 4, 2, 5]), (False, [0, 1, 2, 3, 4, 5])):
        rows = whole((2, 1, 3), FULL, last).encode(x)
        assert rows.view(np.float32).tolist() == [order]
        assert torch.equal(again(whole((2, 1, 3), FULL, last), x), x)


@pytest.mark.parametrize("shape", [(10,), (1,), (4, 3, 5), (6, 7)])
@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL, torch.float64])
def test_what_is_kept_in_its_own_type_is_the_same_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype
):
    x = normal(5, *shape, dtype=dtype)
    found = again(whole(shape, dtype), x)
    assert found.dtype == dtype and torch.equal(found, x)


def test_every_bfloat16_is_kept_as_it_is():
    """All 65 536 bit patterns, infinities, subnormals and NaN among them, from float32."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(BRAIN).float().view(-1, 16)
    found = again(whole((16,), BRAIN), x)
    same = found.view(torch.int16) == bits.view(-1, 16)
    assert (same | x.isnan()).all() and torch.equal(found.isnan(), x.isnan())


def test_float32_is_rounded_to_eleven_bits():
    """At most 2^-11 of a number that float16 holds normally, from 2^-14 on; half of 2^-24 below."""
    x = normal(1000, 10) * torch.logspace(-6, 4, 1000).view(-1, 1)
    found = again(whole((10,), HALF), x).float()
    error, normal_ones = (found - x).abs(), x.abs() >= 2.0**-14
    assert (error <= x.abs() * 2.0**-11)[normal_ones].all()
    assert (error <= 2.0**-25)[~normal_ones].all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL])
def test_layouts_are_kept(dtype: torch.dtype):
    """Strides too, as a network in channels_last computes them; from any layout of the same map."""
    x = normal(3, 4, 5, 6, dtype=dtype)
    last = x.to(memory_format=torch.channels_last)
    for given in (x, last, torch.cat([last, last])[:3], last.expand(3, -1, -1, -1)):
        found = again(whole((4, 5, 6), dtype), given)
        assert torch.equal(found, given) and found.stride() == last.stride()
        found = again(whole((4, 5, 6), dtype, False), given)
        assert torch.equal(found, given) and found.stride() == x.stride()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "value", [TopK(1, 4, FULL), TopK(3, 4, HALF), whole((4,), HALF), whole((4,), FULL)]
)
def test_an_epoch_may_end_with_one_image(value: Value, n: int):
    """The highest logit is in all of them."""
    x = normal(8, 4)
    rows = value.encode(x)
    assert (value.encode(x[:n]) == rows[:n]).all()
    close(value.decode(rows[:n], CPU).amax(1).float(), x[:n].amax(1), rtol=2.0**-11, atol=0)


def test_some_of_the_rows_are_some_of_the_images():
    x = normal(6, 4, 2, 2)
    value = whole((4, 2, 2), FULL)
    rows = value.encode(x)
    assert torch.equal(value.decode(rows[[4, 1]], CPU), x[[4, 1]])
    assert (value.encode(x[2:4]) == rows[2:4]).all()


@pytest.mark.parametrize("large", [65520.0, -1e6])
def test_what_float16_cannot_hold_is_refused_with_the_way_out(large: float):
    """65504 is the largest; what is nearer to the next one, from 65520 on, is infinite."""
    x = torch.tensor([[65504.0, 0.0], [1.0, large]])
    assert torch.equal(again(whole((2,), HALF), x[:1]), x[:1].half())
    with pytest.raises(MethodError, match=r"'embed' has numbers up to .*65504; set store\.bits=32"):
        whole((2,), HALF, name="embed").encode(x)
    for dtype in (BRAIN, FULL):
        found = again(whole((2,), dtype), x).float()
        close(found[1], x[1].to(dtype).float(), equal_nan=True)


def test_what_bytes_mean_says_the_layout_of_maps_alone():
    assert whole((4,), HALF, True).identity == whole((4,), HALF, False).identity
    one, other = (whole((4, 2, 2), HALF, last).identity for last in (True, False))
    assert one == {"shape": [4, 2, 2], "type": "float16", "layout": "channels_last"}
    assert other == {**one, "layout": "contiguous"}


# --- the highest logits -------------------------------------------------------------------------


def test_two_of_four_logits_by_hand():
    """Probabilities 8, 4, 3, 1 of 16. Two are kept; the others have (3 + 1) / 2 = 2 of 16 each.

    Two numbers and two places of two bytes, and the level in four: 12.
    """
    x = torch.tensor([[3.0, 8.0, 1.0, 4.0]]).log()
    value = TopK(2, 4, FULL)
    assert value.bytes == 2 * (4 + 2) + 4 and TopK(2, 4, HALF).bytes == 12
    found = again(value, x)
    close(found.softmax(1), torch.tensor([[2.0, 8.0, 2.0, 4.0]]) / 16)
    assert torch.equal(found[0, [1, 3]], x[0, [1, 3]])
    close(found[0, [0, 2]], torch.tensor([2.0, 2.0]).log())
    rows = value.encode(x)
    assert rows[0, 8:12].view(np.int16).tolist() == [1, 3]


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL])
@pytest.mark.parametrize("k", [1, 5, 10, 19])
def test_a_softmax_has_the_highest_probabilities_and_the_remaining_mass(k: int, dtype: torch.dtype):
    x = (3 * normal(50, 20)).to(dtype)
    p, q = x.float().softmax(1), again(TopK(k, 20, dtype), x).softmax(1)
    top = p.topk(k, dim=1).indices
    close(q.gather(1, top), p.gather(1, top), rtol=1e-5, atol=1e-7)
    rest = torch.ones_like(p).scatter(1, top, 0.0).bool()
    others = q[rest].view(50, -1)
    close(others, others[:, :1].expand_as(others))
    close(others.sum(1), p[rest].view(50, -1).sum(1), rtol=1e-5, atol=1e-7)


def test_all_but_one_class_are_all_of_them():
    """The mean of one exponential is its own: nothing is lost."""
    x = 5 * normal(20, 7)
    close(again(TopK(6, 7, FULL), x), x, rtol=0, atol=2e-6)


def test_large_logits_do_not_overflow():
    x = torch.tensor([[1e4, 9e3, -1e4, -1e4]])
    found = again(TopK(1, 4, FULL), x)
    assert found.isfinite().all()
    close(found[0], torch.tensor([1e4, *[9e3 - math.log(3)] * 3]))


def test_logits_that_float16_cannot_hold_are_refused_too():
    """As they are among whole outputs: an infinite logit would train on NaN."""
    x = torch.tensor([[70000.0, 1.0, 2.0]])
    with pytest.raises(MethodError, match=r"'logits' has numbers up to 7e\+04.*store\.bits=32"):
        TopK(1, 3, HALF).encode(x)
    assert again(TopK(1, 3, FULL), x)[0, 0] == 70000
    assert again(TopK(1, 3, HALF), -x).isfinite().all()


@pytest.mark.parametrize("classes, place", [(2**15, 2), (2**15 + 1, 4)])
def test_places_take_two_bytes_as_long_as_they_can(classes: int, place: int):
    """The last of 32 768 classes is 32 767, the largest int16."""
    x = torch.zeros(2, classes)
    x[0, classes - 1], x[1, 0] = 9.0, 8.0
    value = TopK(1, classes, HALF)
    assert value.bytes == 2 + place + 4
    found = again(value, x)
    assert found.argmax(1).tolist() == [classes - 1, 0]
    assert found[0, -1] == 9.0 and found[1, 0] == 8.0
    close(found[0, :-1], torch.zeros(classes - 1), atol=1e-5, rtol=0)


def test_what_bytes_mean_says_how_many_are_kept_of_how_many():
    assert TopK(5, 10, BRAIN).identity == {"classes": 10, "type": "bfloat16", "top_k": 5}


# --- which type ---------------------------------------------------------------------------------


def test_an_output_is_kept_in_its_own_type_or_in_half_of_it():
    """What was computed in bfloat16 and made float32 since has 16 bits and is kept in them."""
    x = normal(10, 10)
    kept = partial(kept_in, precision="bfloat16")
    assert kept(x, 16) == HALF
    assert kept(x.double(), 16) == HALF
    assert kept(x.bfloat16().float(), 16) == BRAIN
    assert kept(x, 32) == FULL and kept(x.bfloat16().float(), 32) == FULL
    assert kept(x.double(), 32) == torch.float64
    for bits in (16, 32):
        assert kept(x.bfloat16(), bits) == BRAIN
        assert kept(x.half(), bits) == HALF


def test_zeros_of_a_float32_network_are_kept_in_the_type_that_its_other_outputs_need():
    """Zeros are exact in bfloat16; a tap that is dead at first would be rounded to 8 bits later."""
    assert kept_in(torch.zeros(3, 3), 16, "float32") == HALF


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_as_such(value: float):
    with pytest.raises(MethodError, match="'stage1' has numbers that are not finite"):
        Whole("stage1", (2,), HALF, False).encode(torch.tensor([[1.0, value]]))
