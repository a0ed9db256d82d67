"""The gradient clipping of KD-SVD and MHGD: by hand, tensor by tensor, its ramp, its extremes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.clipping import clipped
from potstill.engine import Pace, Training
from potstill.errors import MethodError
from potstill.method import Method, Outputs, Phase, Progress, Turn, Update
from potstill.optim import Constant, OptimizerPlan, sgd
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

START = Progress(epoch=0, step=0, steps=100, default_epochs=100)
"""The ramp is 1/2 here."""


def at(epoch: int) -> Progress:
    return Progress(epoch, step=7 * epoch, steps=700, default_epochs=100)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def slope(parameters: Sequence[Tensor], gradients: Sequence[Any]) -> Tensor:
    """A term with these gradients."""
    pairs = zip(parameters, gradients, strict=True)
    return torch.stack([(p * torch.as_tensor(g).to(p)).sum() for p, g in pairs]).sum()


def joined(
    g: Any, h: Any, progress: Progress = START, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What one parameter gets, whose target's gradient is g and whose transfer's is h."""
    p = zeros(*torch.as_tensor(g).shape, dtype=dtype)
    terms = {"ce": slope([p], [g]), "svd": slope([p], [h])}
    (found,) = clipped("svd")(terms, [p], progress)
    return found


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 2.5), (1, 3.655293), (5, 4.966536), (99, 5.0)], ids=str
)
def test_the_rule_by_hand(epoch: int, expected: float):
    """g = (3, 4) is 5 long, h = (0, 20): 20 becomes 5 sigmoid(e), sigmoid(1) = 0.731059."""
    close(joined([3.0, 4.0], [0.0, 20.0], at(epoch)), torch.tensor([3.0, 4.0 + expected]))


def test_a_shorter_transfer_is_left_as_it_is():
    """h = (0, 1) at a bound of 2.5, and at exactly 2.5; just above it is cut to that."""
    for length in (1.0, 2.5):
        assert torch.equal(joined([3.0, 4.0], [0.0, length]), torch.tensor([3.0, 4.0 + length]))
    close(joined([3.0, 4.0], [0.0, 2.6]), torch.tensor([3.0, 6.5]))


def test_each_tensor_is_clipped_by_its_own():
    """(3, 4) cuts (0, 20) to 2.5; (0.6, 0.8) cuts (3, 0) to 0.5; 1 leaves 0.1. One norm of all,
    5.2 / 20.2 of each, would cut the last too.
    """
    parameters = [zeros(2), zeros(2), zeros(1)]
    g, h = ([3.0, 4.0], [0.6, 0.8], [1.0]), ([0.0, 20.0], [3.0, 0.0], [0.1])
    terms = {"ce": slope(parameters, g), "svd": slope(parameters, h)}
    found = clipped("svd")(terms, parameters, START)
    for one, expected in zip(found, ([3.0, 6.5], [1.1, 0.8], [1.1]), strict=True):
        close(one, torch.tensor(expected))


def test_the_norm_is_of_all_entries_of_a_tensor():
    """A 1x1 convolution that is the identity of two channels is sqrt 2 long, not 1: of (9, 0, 0, 0)
    it leaves 1 / sqrt 2. A scalar parameter has a length too.
    """
    g, h = torch.eye(2).view(2, 2, 1, 1), torch.tensor([9.0, 0, 0, 0]).view(2, 2, 1, 1)
    close(joined(g, h), g + h / 9 / math.sqrt(2))
    close(joined(2.0, -7.0), torch.tensor(1.0))


def test_the_direction_is_kept():
    h = torch.tensor([-6.0, 8.0, 0.0])
    close(joined([0.0, 0.0, 3.0], h), torch.tensor([-0.9, 1.2, 3.0]))


def test_the_ramp_is_the_sigmoid_of_whole_epochs():
    """Of each of the first forty, in double."""
    for epoch in range(40):
        found = joined([1.0], [9.0], at(epoch), torch.float64)
        close(found.item() - 1, 1 / (1 + math.exp(-epoch)), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("step", "steps", "published", "epoch"),
    [
        (0, 1000, 100, 0),
        (9, 1000, 100, 0),
        (10, 1000, 100, 1),
        (19, 1000, 100, 1),
        (1, 20, 100, 5),
        (19, 2000, 100, 0),
        (20, 2000, 100, 1),
        (9, 10, 1, 0),
    ],
)
def test_epochs_count_on_the_scale_of_the_published_length(
    step: int, steps: int, published: int, epoch: int
):
    """100 published epochs in 1000 steps: 10 each. In 20: 5 each step. Those really done, 3 here,
    do not count.
    """
    found = joined([1.0], [9.0], Progress(3, step, steps, published))
    close(found.item() - 1, 1 / (1 + math.exp(-epoch)))


def test_a_long_training_does_not_overflow():
    close(
        joined([3.0, 4.0], [0.0, 20.0], Progress(0, 9999, 10000, 10000)), torch.tensor([3.0, 9.0])
    )


def test_several_target_terms_are_one_gradient():
    """(3, 0) + (0, 4) is 5 long, not 7; the transfer may stand anywhere and has any name. Where
    they cancel nothing of the transfer is left.
    """
    p = zeros(2)
    for other, expected in (([0.0, 4.0], [3.0, 6.5]), ([-3.0, 0.0], [0.0, 0.0])):
        terms = {
            "ce": slope([p], [[3.0, 0.0]]),
            "graph": slope([p], [[0.0, 20.0]]),
            "kd": slope([p], [other]),
        }
        (found,) = clipped("graph")(terms, [p], START)
        close(found, torch.tensor(expected))
    del terms["kd"]
    (found,) = clipped("ce")(terms, [p], START)
    close(found, torch.tensor([3.0, 20.0]))


def test_own_parameters_are_scaled_as_all_others_together():
    """Of the others g is (3, 4) and 0, h (0, 20) and (0, 20), 28.284271 long together: a factor of
    2.5 / 28.284271 = 0.088388. Those given, by identity, however long theirs is; where nothing is
    clipped it is 1.
    """
    parameters = [zeros(2), zeros(2), zeros(2)]
    for theirs in (20.0, 3e4):
        h = [[0.0, 20.0], [0.0, theirs], [0.0, 20.0]]
        terms = {"ce": slope(parameters[:1], [[3.0, 4.0]]), "svd": slope(parameters, h)}
        found = clipped("svd", transfer_only=parameters[1:2])(terms, parameters, START)
        expected = ([3.0, 6.5], [0.0, 0.0883883476 * theirs], [0.0, 0.0])
        for one, other in zip(found, expected, strict=True):
            close(one, torch.tensor(other))
    short = [[0.0, 0.1], [0.0, 20.0], [0.1, 0.0]]
    terms = {"ce": slope(parameters[:1], [[3.0, 4.0]]), "svd": slope(parameters, short)}
    found = clipped("svd", transfer_only=parameters[1:2])(terms, parameters, START)
    for one, other in zip(found, ([3.0, 4.1], [0.0, 20.0], [0.0, 0.0]), strict=True):
        close(one, torch.tensor(other))
    (_, late, _) = clipped("svd", transfer_only=parameters[1:2])(
        {"ce": terms["ce"], "svd": slope(parameters, h)}, parameters, at(1)
    )
    close(late, torch.tensor([0.0, 5 * 0.731059 / 28.284271 * 3e4]), rtol=1e-5, atol=0)


def test_own_parameters_alone_have_nothing_to_be_as_long_as():
    p, q = zeros(2), zeros(2)
    terms = {"ce": torch.zeros(()), "svd": slope([p, q], [[1.0, 2.0], [0.0, 0.0]])}
    found = clipped("svd", transfer_only=[p, q])(terms, [p, q], START)
    assert all(torch.equal(x, torch.zeros(2)) for x in found)


def test_without_a_target_the_rule_has_no_meaning():
    p = zeros(2)
    with pytest.raises(MethodError) as error:
        clipped("svd")({"svd": slope([p], [[0.0, 1.0]])}, [p], START)
    assert str(error.value) == (
        "the gradient of 'svd' is clipped by that of the other terms, and there is none; give "
        "gamma or alpha a value above 0"
    )


def test_without_a_gradient_of_the_target_nothing_is_left():
    """A target of 0, or one that does not reach the parameter."""
    assert torch.equal(joined([0.0, 0.0], [0.0, 20.0]), torch.zeros(2))
    p, q = zeros(2), zeros(2)
    terms = {"ce": slope([q], [[3.0, 4.0]]), "svd": slope([p], [[0.0, 20.0]])}
    found = clipped("svd")(terms, [p, q], START)
    assert torch.equal(found[0], torch.zeros(2))
    assert torch.equal(found[1], torch.tensor([3.0, 4.0]))


def test_without_a_gradient_of_the_transfer_the_target_is_alone():
    """A transfer of 0, one that does not reach the parameter, one that is a constant; both 0."""
    assert torch.equal(joined([3.0, 4.0], [0.0, 0.0]), torch.tensor([3.0, 4.0]))
    assert torch.equal(joined([0.0, 0.0], [0.0, 0.0]), torch.zeros(2))
    p, q = zeros(2), zeros(2)
    for transfer in (slope([q], [[1.0, 1.0]]), torch.tensor(7.0)):
        terms = {"ce": slope([p], [[3.0, 4.0]]), "svd": transfer}
        (found,) = clipped("svd")(terms, [p], START)
        assert torch.equal(found, torch.tensor([3.0, 4.0]))


def test_huge_transfers_stay_finite_and_no_longer_than_the_bound():
    """In float32 squares of 1e25 are infinite: at a norm of inf nothing is left, or nothing cut."""
    for scale in (1e3, 1e10, 1e18):
        close(joined([3.0, 4.0], [0.0, scale]), torch.tensor([3.0, 6.5]))
    assert torch.equal(joined([3.0, 4.0], [0.0, 1e25]), torch.tensor([3.0, 4.0]))
    assert torch.equal(joined([1e25, 1.0], [0.0, 20.0]), torch.tensor([1e25, 21.0]))


def test_tiny_gradients_stay_finite():
    """In float32 squares of 1e-30 vanish: such a transfer is too short to be clipped."""
    assert torch.equal(joined([3.0, 4.0], [1e-30, 0.0]), torch.tensor([3.0, 4.0]))
    assert torch.equal(joined([0.0, 4.0], [1e-30, 0.0]), torch.tensor([1e-30, 4.0]))
    close(joined([1e-15, 0.0], [0.0, 1.0]), torch.tensor([1e-15, 5e-16]), rtol=1e-6, atol=0)
    assert joined([1e-30, 0.0], [0.0, 1.0]).abs().max() <= 1e-30
    close(joined([1e-15, 0.0], [0.0, 1e-15]), torch.tensor([1e-15, 5e-16]), rtol=1e-6, atol=0)


def test_above_the_bound_a_factor_of_the_transfer_is_of_no_matter():
    g, h = torch.arange(1.0, 7.0), torch.arange(6.0).sin()
    for factor in (20.0, 1e6):
        close(joined(g, factor * h, dtype=torch.float64), joined(g, 1e3 * h, dtype=torch.float64))


def test_the_gradients_can_be_taken_again():
    """A turn may have further updates that differentiate the same forward."""
    p = nn.Parameter(torch.tensor([1.5, 2.0]))
    terms = {"ce": p.square().sum(), "svd": (p[1] * 20).exp().log()}
    one, other = (clipped("svd")(terms, [p], START)[0] for _ in range(2))
    assert torch.equal(one, other)
    close(one, torch.tensor([3.0, 6.5]))


class OneParameter(Method):
    """Gradients (3, 4) of "ce" and (0, 20) of "svd", of a parameter that starts at (2, 2)."""

    teachers_needed = (0, 0)

    def __init__(self) -> None:
        super().__init__([toy_net()], [], ToyImages(16).spec(0))
        self.student.requires_grad_(False)
        self.theta = nn.Parameter(torch.tensor([2.0, 2.0]))

    def loss(self, out: Outputs) -> dict[str, Tensor]:
        slopes = {"ce": [3.0, 4.0], "svd": [0.0, 20.0]}
        return {name: slope([self.theta], [s]) for name, s in slopes.items()}

    def phases(self) -> Sequence[Phase]:
        update = Update("student", self.loss, [self.theta], clipped("svd"))
        return [Phase("distill", [Turn(self.__call__, [update])], 2)]


def test_weight_decay_is_added_later_and_is_no_part_of_the_norm():
    """lr 0.1, decay 0.5, one step an epoch, two epochs. g + h' = (3, 6.5), then (3, 7.655293):
    2 - 0.1 (3 + 1) = 1.6, 2 - 0.1 (6.5 + 1) = 1.25; 1.6 - 0.1 (3 + 0.8) = 1.22,
    1.25 - 0.1 (7.655293 + 0.625) = 0.421971. With decay in the norm it would be sqrt(41) at first.
    """
    method = OneParameter()
    plan = OptimizerPlan(lambda p: sgd(p, 0.1, weight_decay=0.5), Constant())
    pace = Pace({"distill": 2}, {"distill": 2}, {"default": plan})
    seen = [method.theta.detach().clone() for _ in Training(method, ToyImages(16), pace).run()]
    for found, expected in zip(seen, ([1.6, 1.25], [1.22, 0.421971]), strict=True):
        close(found, torch.tensor(expected), rtol=1e-5, atol=0)
