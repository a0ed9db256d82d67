"""KD-SVDF: vectors as they are, by hand and by loops; all else is tested as KD-SVD's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from potstill.errors import MethodError
from potstill.methods.kdsvdf import KDSVDF
from tests.methods.test_kdsvd import (
    NAMES,
    distance,
    gradients,
    maps,
    outputs,
    pixels,
    vectors_by_loops,
)
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close


def kdsvdf(**arguments: Any) -> KDSVDF:
    return KDSVDF([toy_net(0)], [toy_net(1, width=6)], ToyImages().spec(), **arguments)


def test_the_loss_by_hand():
    """(0.6, 0.8) in the teacher, (0, 1) in the student: 0.36 + 0.04, for any signs and sizes."""
    student, teacher = pixels([2.0, 0.0], [0.0, -1.0]), pixels([0.6, 0.8])
    close(distance([student], [teacher], KDSVDF).item(), 0.4)
    close(distance([-9 * student], [-5 * teacher], KDSVDF).item(), 0.4)


def test_images_taps_and_vectors_are_summed():
    """0.4 for each of three images at each of two taps; a tap that is equal adds nothing."""
    student, teacher = pixels([2.0, 0.0], [0.0, -1.0]), pixels([0.6, 0.8])
    three = [torch.cat([x, x, x]) for x in (student, teacher)]
    close(distance([three[0]] * 2, [three[1]] * 2, KDSVDF).item(), 2.4)
    close(distance([student, student], [teacher, student], KDSVDF).item(), 0.4)


def test_two_vectors_are_weighted_by_the_teachers_values():
    """Teacher diag(4, 3): 0.8 e_1, 0.6 e_2. The student's one direction, (1, 1) / sqrt 2, is the
    nearest to both, at a squared distance of 2 - sqrt 2: times 0.64 and 0.36, which is 1 in all.
    """
    found = distance([pixels([1.0, 1.0])], [pixels([4.0, 0.0], [0.0, 3.0])], KDSVDF, vectors=2)
    close(found.item(), 2 - math.sqrt(2))


@pytest.mark.parametrize(("count", "extra"), [(1, 3), (2, 1), (2, 0)])
def test_the_loss_is_that_of_loops_over_images_and_vectors(count: int, extra: int):
    """Values and gradients in double, with torch.linalg.svd."""
    student, teacher = maps()

    def by_loops(student: Any) -> torch.Tensor:
        return torch.stack(
            [
                (own - target).square().sum()
                for s, t in zip(student, teacher, strict=True)
                for image in vectors_by_loops(s, t, count, extra)
                for own, target in image
            ]
        ).sum()

    arguments = {"vectors": count, "extra": extra}
    close(distance(student, teacher, KDSVDF, **arguments), by_loops(student), rtol=1e-10, atol=0)
    found = gradients(lambda s: distance(s, teacher, KDSVDF, **arguments), student)
    for one, other in zip(found, gradients(by_loops, student), strict=True):
        assert other.abs().max() > 1e-2
        close(one, other, rtol=1e-8, atol=1e-10)


def test_equal_turned_and_scaled_maps_cost_nothing():
    _, teacher = maps()
    for changed in (teacher, [-3 * x for x in teacher], [x.flip(2, 3) for x in teacher]):
        assert distance(changed, teacher, KDSVDF, vectors=2) < 1e-20


def test_the_scale_of_the_student_is_of_no_matter():
    student, teacher = maps()
    expected = distance(student, teacher, KDSVDF)
    assert expected > 0.1
    close(distance([1e4 * x for x in student], teacher, KDSVDF), expected)


def test_the_farthest_vectors_cost_two():
    """A direction across the only one there is: |v - v'|^2 = 2, its half turn being taken back."""
    student, teacher = pixels([1.0, -1.0]), pixels([1.0, 1.0])
    close(distance([student], [teacher], KDSVDF).item(), 2.0)


def test_arguments_reach_their_places():
    method = kdsvdf(vectors=2, extra=1, gamma=0.5, alpha=0.25, temperature=3.0, taps=["stage2"])
    assert (method.vectors, method.extra) == (2, 1)
    assert (method.gamma, method.alpha, method.temperature) == (0.5, 0.25, 3.0)
    assert [p.teacher for p in method.pairs] == ["stage2"]
    method = kdsvdf(taps=["stage1"], teacher_taps=["stem"])
    assert [(p.student, p.teacher) for p in method.pairs] == [("stage1", "stem")]
    method = kdsvdf()
    assert (method.vectors, method.extra, dict(method.lengths)) == (1, 3, {"distill": 100})
    assert (method.gamma, method.alpha, method.temperature) == (1.0, 0.0, 4.0)


def test_terms_by_hand():
    """ce = ln 2; kl at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2; the transfer, without a weight, 0.4."""
    out = outputs([pixels([2.0, 0.0], [0.0, -1.0])], [pixels([0.6, 0.8])])
    found = kdsvdf(taps=NAMES[:1]).loss(out)
    assert list(found) == ["ce", "svd"]
    found = kdsvdf(taps=NAMES[:1], gamma=2.0, alpha=3.0, temperature=1.0).loss(out)
    assert list(found) == ["ce", "kd", "svd"]
    close(found["ce"].item(), 2 * math.log(2.0))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(found["kd"].item(), 3 * kl, atol=1e-6, rtol=0)
    close(found["svd"].item(), 0.4)


def test_refusals_bear_its_name():
    with pytest.raises(MethodError) as error:
        kdsvdf(vectors=0)
    assert str(error.value) == (
        "KDSVDF compresses a map to vectors=1 or more, among which the student has extra=0 or more "
        "to choose, but they are 0 and 3"
    )
    with pytest.raises(MethodError) as error:
        kdsvdf(taps=["stage3"], vectors=5)
    assert str(error.value) == (
        "KDSVDF: 'stage3' of the teacher is 12x2x2 and has 4 singular vectors; vectors=5 are too "
        "many"
    )
