"""Loss functions that several methods use: hand values, limits, extremes, invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.losses import attention_map, attention_map_distance, meet, soft_kl, unit

close = torch.testing.assert_close

# --- meet ---------------------------------------------------------------------------------------


def test_the_larger_map_is_averaged_down():
    """Of 1, 2, 3, 6 the mean is 3, on whichever side they are."""
    large, small = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]), torch.tensor([[[[9.0]]]])
    for one, other in (meet(large, small), meet(small, large)[::-1]):
        assert one.tolist() == [[[[3.0]]]]
        assert other is small


def test_maps_of_one_size_meet_as_they_are():
    one, other = torch.rand(2, 3, 4, 5), torch.rand(2, 7, 4, 5)
    assert meet(one, other)[0] is one
    assert meet(one, other)[1] is other


def test_height_decides_which_map_is_larger():
    one, other = meet(torch.rand(1, 1, 4, 2), torch.rand(1, 1, 2, 4))
    assert one.shape == other.shape == (1, 1, 2, 4)
    one, other = meet(torch.rand(1, 1, 4, 2), torch.rand(1, 1, 4, 4))
    assert one.shape == other.shape == (1, 1, 4, 2)


# --- soft_kl ------------------------------------------------------------------------------------

STUDENT = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
TEACHER = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, -1.0]])


def test_soft_kl_by_hand():
    """Teacher softmax (3/4, 1/4), student uniform: 3/4 ln (3/4 / 1/2) + 1/4 ln (1/4 / 1/2)."""
    found = soft_kl(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), temperature=1.0)
    assert found.shape == ()
    close(found.item(), 0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_temperature_softens_and_is_squared_by_hand():
    """At T = 2 logits 2 ln 3 have the softmax of ln 3 at T = 1, and the loss is 2^2 times that."""
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]], dtype=torch.float64)
    found = soft_kl(torch.zeros_like(teacher), teacher, temperature=2.0)
    close(found.item(), 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


def test_soft_kl_of_the_specification():
    """Per image 1.685124 and 0.266217 at T = 1; at T = 4, 0.134659 and 0.020513 before T^2."""
    close(soft_kl(STUDENT, TEACHER, 1.0).item(), 0.975670, atol=1e-6, rtol=0)
    close(soft_kl(STUDENT[:1], TEACHER[:1], 1.0).item(), 1.685124, atol=1e-6, rtol=0)
    close(soft_kl(STUDENT[1:], TEACHER[1:], 1.0).item(), 0.266217, atol=1e-6, rtol=0)
    close(soft_kl(STUDENT, TEACHER, 4.0).item(), 1.241372, atol=1e-6, rtol=0)
    close(soft_kl(STUDENT[:1], TEACHER[:1], 4.0).item() / 16, 0.134659, atol=1e-6, rtol=0)
    close(soft_kl(STUDENT[1:], TEACHER[1:], 4.0).item() / 16, 0.020513, atol=1e-6, rtol=0)
    close(soft_kl(STUDENT, TEACHER).item(), 1.241372, atol=1e-6, rtol=0)  # 4 is the default


def test_soft_kl_gradient_of_the_specification():
    """(T / B) (p_student - p_teacher), and none for the teacher."""
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    soft_kl(student, teacher, 4.0).backward()
    expected = [[-0.453498, 0.069480, 0.384018], [-0.171791, 0.013675, 0.158116]]
    close(student.grad, torch.tensor(expected), atol=1e-6, rtol=0)
    formula = 4 / 2 * ((STUDENT / 4).softmax(1) - (TEACHER / 4).softmax(1))
    close(student.grad, formula)
    assert teacher.grad is None


def logits(rows: int = 3, classes: int = 4) -> st.SearchStrategy[Tensor]:
    number = st.floats(-30, 30)
    row = st.lists(number, min_size=classes, max_size=classes)
    return st.lists(row, min_size=rows, max_size=rows).map(
        lambda x: torch.tensor(x, dtype=torch.float64)
    )


@settings(max_examples=50, deadline=None)
@given(logits(), logits(), st.sampled_from([0.5, 1.0, 4.0, 100.0]))
def test_soft_kl_is_never_negative(student: Tensor, teacher: Tensor, temperature: float):
    assert soft_kl(student, teacher, temperature) >= -1e-9 * temperature**2


@settings(max_examples=50, deadline=None)
@given(logits(), st.floats(-50, 50), st.sampled_from([1.0, 4.0, 100.0]))
def test_a_constant_shift_per_image_is_no_difference(
    teacher: Tensor, shift: float, temperature: float
):
    shifts = torch.tensor([[shift], [0.0], [-2 * shift]], dtype=torch.float64)
    close(soft_kl(teacher + shifts, teacher, temperature).item(), 0.0, atol=1e-8, rtol=0)


@settings(max_examples=25, deadline=None)
@given(logits(), logits(), st.permutations(range(4)))
def test_the_order_of_classes_and_images_does_not_matter(
    student: Tensor, teacher: Tensor, order: list[int]
):
    expected = soft_kl(student, teacher)
    close(soft_kl(student[:, order], teacher[:, order]), expected)
    close(soft_kl(student.flip(0), teacher.flip(0)), expected)


def test_a_large_temperature_compares_centred_logits():
    """T -> infinity: mean over images of |z_s - mean z_s - z_t + mean z_t|^2 / (2 K).

    Differences of the centred logits: (-1, 0, 1) - (5/3, -1/3, -4/3) = (-8/3, 1/3, 7/3) and
    (-1, 0, 1): squares 114/9 and 2, mean 22/3, over 2 * 3.
    """
    found = soft_kl(STUDENT.double(), TEACHER.double(), 1e4).item()
    close(found, 22 / 18, atol=1e-3, rtol=0)


def test_soft_kl_at_temperature_100_in_float32():
    exact = soft_kl(STUDENT.double(), TEACHER.double(), 100.0).item()
    close(soft_kl(STUDENT, TEACHER, 100.0).item(), exact, atol=5e-3, rtol=0)
    student = STUDENT.clone().requires_grad_()
    soft_kl(student, TEACHER, 100.0).backward()
    centred = (STUDENT - STUDENT.mean(1, keepdim=True)) - (TEACHER - TEACHER.mean(1, keepdim=True))
    close(student.grad, centred / 3 / 2, atol=2e-2, rtol=0)  # the gradient's limit: d / (K B)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_huge_logits_stay_finite(temperature: float):
    """Teacher sure of class 0, student as sure of class 1 at 1e4: T^2 * 1e4 / T, no NaN."""
    student = torch.tensor([[0.0, 1e4]]).requires_grad_()
    found = soft_kl(student, torch.tensor([[1e4, 0.0]]), temperature)
    close(found.item(), 1e4 * temperature)
    found.backward()
    close(student.grad, torch.tensor([[-temperature, temperature]]))
    assert soft_kl(torch.tensor([[1e4, 0.0]]), torch.tensor([[1e4, 0.0]]), temperature) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_and_finite(dtype: torch.dtype):
    close(soft_kl(STUDENT.to(dtype), TEACHER.to(dtype), 4.0).item(), 1.241372, atol=0.1, rtol=0)
    wide = torch.tensor([[0.0, 1e4]], dtype=dtype)
    assert soft_kl(wide, wide.flip(1), 1.0).isfinite()


# --- attention maps -----------------------------------------------------------------------------

S = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]]])
T = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [1.0, 0.0]]]])


def test_attention_map_by_hand():
    """Channels (3, 0) and (-3, 4): squares average to (9, 8), of length sqrt 145."""
    x = torch.tensor([[[[3.0, 0.0]], [[-3.0, 4.0]]]])
    close(attention_map(x), torch.tensor([[9.0, 8.0]]) / math.sqrt(145))
    close(attention_map(x, power=1.0), torch.tensor([[3.0, 2.0]]) / math.sqrt(13))


def test_attention_maps_of_the_specification():
    """Energies (2, 1, 0, 4) / 2 and (4, 0, 1, 4) / 3, lengths sqrt 21 / 2 and sqrt 33 / 3."""
    close(attention_map(S), torch.tensor([[2.0, 1.0, 0.0, 4.0]]) / math.sqrt(21))
    close(attention_map(T), torch.tensor([[4.0, 0.0, 1.0, 4.0]]) / math.sqrt(33))
    expected = torch.tensor([[0.436436, 0.218218, 0.0, 0.872872]])
    close(attention_map(S), expected, atol=1e-6, rtol=0)
    close(attention_map_distance(S, T).item(), 0.044158, atol=1e-6, rtol=0)


def test_the_distance_is_two_minus_two_cosines_per_pixel():
    """cos = (8 + 16) / sqrt(21 * 33): (2 - 2 cos) / 4."""
    cosine = 24 / math.sqrt(21 * 33)
    close(attention_map_distance(S, T).item(), (2 - 2 * cosine) / 4)


def test_no_gradient_reaches_the_teachers_map():
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    attention_map_distance(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def feature(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_attention_gradient_is_the_numerical_one():
    student, teacher = feature(0, 2, 3, 3, 3).requires_grad_(), feature(1, 2, 2, 3, 3)
    for power in (1.5, 2.0, 3.0):
        assert torch.autograd.gradcheck(
            lambda x, p=power: attention_map_distance(x, teacher, p), student
        )


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 4.0])
def test_scale_sign_and_channel_order_do_not_matter(power: float):
    """Positive factor per image, permuted channels, flipped signs: the same map."""
    x = feature(0, 3, 4, 5, 5)
    other = x[:, [2, 0, 3, 1]] * torch.tensor([0.1, 7.0, 1e3]).view(3, 1, 1, 1)
    other[:, 1] *= -1
    close(attention_map_distance(x, other, power).item(), 0.0, atol=1e-15, rtol=0)
    doubled = torch.cat([x, x], dim=1)  # mean or sum over channels: no difference
    close(attention_map(doubled, power), attention_map(x, power))


def test_the_order_of_pixels_matters():
    x = feature(0, 1, 2, 4, 4)
    assert attention_map_distance(x, x.flip(3)) > 1e-4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_the_distance_is_between_zero_and_two_per_pixel(seed: int, channels: int, h: int, w: int):
    found = attention_map_distance(feature(seed, 2, channels, h, w), feature(seed + 1, 2, 3, h, w))
    assert 0 <= found <= 2 / (h * w) + 1e-12


def test_the_bound_is_reached_by_disjoint_maps():
    """Unit vectors at a right angle: |difference|^2 = 2 over 4 pixels."""
    one, other = torch.zeros(2, 1, 1, 2, 2)
    one[..., 0, 0], other[..., 1, 1] = 5.0, 0.1
    close(attention_map_distance(one, other).item(), 0.5)


def test_the_larger_map_is_averaged_down_before_squaring():
    """2 x 2 averages of signed features: (1, -1, 1, -1) gives 0, (2, 2, 2, 2) gives 2.

    The student's 2 x 4 map becomes (0, 2), the teacher's is (0, 1): the same direction.
    """
    student = torch.tensor([[[[1.0, -1.0, 2.0, 2.0], [1.0, -1.0, 2.0, 2.0]]]])
    teacher = torch.tensor([[[[0.0, 1.0]]]])
    close(attention_map_distance(student, teacher).item(), 0.0)
    close(attention_map_distance(teacher, student).item(), 0.0)
    assert attention_map_distance(student, teacher.flip(3)) == pytest.approx(2 / 2)


def test_a_zero_map_gives_zeros_and_a_finite_gradient():
    """Distance to a unit vector of 4 pixels: 1 / 4."""
    for power in (1.0, 1.5, 2.0, 3.0):
        dead = torch.zeros(1, 2, 2, 2, requires_grad=True)
        assert attention_map(dead, power).tolist() == [[0.0] * 4]
        found = attention_map_distance(dead, T, power)
        close(found.item(), 0.25)
        found.backward()
        assert dead.grad.isfinite().all()
    assert attention_map_distance(torch.zeros(1, 2, 2, 2), torch.zeros(1, 5, 2, 2)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_do_not_overflow(dtype: torch.dtype):
    """300^2 = 90,000 is beyond float16; the map of (300, 400) is (9, 16) / sqrt 337."""
    x = torch.tensor([[[[300.0, 400.0]]]], dtype=dtype)
    found = attention_map(x)
    assert found.dtype == torch.float32
    close(found, torch.tensor([[9.0, 16.0]]) / math.sqrt(337), atol=2e-3, rtol=0)
    large = torch.full((1, 8, 4, 4), 6e4).to(dtype)
    close(attention_map_distance(large, S.to(dtype)), attention_map_distance(large.float(), S))


def test_float64_stays_float64():
    assert attention_map(S.double()).dtype == torch.float64
    close(attention_map_distance(S.double(), T.double()).item(), 0.044158, atol=1e-6, rtol=0)


def test_a_vector_without_a_direction_stays_as_it_is_and_so_does_its_gradient():
    """3, 4 has length 5; of (1, 0) times the upstream gradient, what is across it is left, / 5.

    d (x / |x|)_1 = (1 - .36, -.48) / 5. At zero, and below 1e-12, the slope is 1, not 1e12.
    """
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3e-13, 4e-13]], requires_grad=True)
    found = unit(x)
    expected = torch.tensor([[0.0, 0.0], [0.6, 0.8], [3e-13, 4e-13]])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0], [0.128, -0.096], [1.0, 0.0]]))


def test_unit_vectors_of_any_rank_and_in_half_precision():
    x = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert unit(x).shape == (2, 1, 2) and unit(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(unit(x)[:, 0], torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
