"""Scores, by hand on predictors whose logits are known."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from potstill.evaluate import evaluate
from potstill.method import Batch
from tests.toys import ToyImages, toy_net


class Known:
    """Images that are their own logits. (n, K), n labels"""

    def __init__(self, logits: list[list[float]], label: list[int]) -> None:
        self.logits, self.label = torch.tensor(logits), torch.tensor(label)

    def clean(self, batch_size: int, sharded: bool = False) -> Iterator[Batch]:
        for index in torch.arange(len(self.label)).split(batch_size):
            yield Batch(self.logits[index], self.label[index], index, torch.zeros_like(index))


def six(*best: int) -> list[float]:
    """Logits of six classes, highest first as listed."""
    values = [0.0] * 6
    for place, k in enumerate(best):
        values[k] = 6.0 - place
    return values


def test_scores_by_hand():
    """Logits ln 3 and 0: softmax 3/4 and 1/4. Labels 0, 0, 1: two right of three, mean loss
    (2 ln 4/3 + ln 4) / 3.
    """
    images = Known([[math.log(3.0), 0.0]] * 3, [0, 0, 1])
    scores = evaluate({"known": nn.Identity()}, images)["known"]
    assert scores.top1 == pytest.approx(200 / 3)
    assert scores.loss == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3)
    assert scores.images == 3


def test_top5_by_hand():
    """The label is first, fifth and sixth of six."""
    rows = [six(0, 1, 2, 3, 4), six(1, 2, 3, 4, 0), six(1, 2, 3, 4, 5)]
    scores = evaluate({"known": nn.Identity()}, Known(rows, [0, 0, 0]))["known"]
    assert scores.top1 == pytest.approx(100 / 3)
    assert scores.top5 == pytest.approx(200 / 3)


def test_fewer_than_five_classes_are_all_among_the_best_five():
    scores = evaluate({"known": nn.Identity()}, Known([[0.0, 1.0, 2.0]] * 4, [0, 0, 1, 2]))["known"]
    assert (scores.top1, scores.top5) == (25.0, 100.0)


def test_every_predictor_has_its_own_scores():
    """One says class 0 of (1, 0), the other negates it."""

    class Negated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    images = Known([[1.0, 0.0]] * 4, [0, 0, 0, 1])
    scores = evaluate({"one": nn.Identity(), "other": Negated()}, images, batch_size=3)
    assert list(scores) == ["one", "other"]
    assert scores["one"].top1 == 75.0
    assert scores["other"].top1 == 25.0


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_the_batch_size_does_not_matter(batch_size: int):
    """Not for BatchNorm either: the predictors are in eval mode, the last batch counts by size."""
    predictors, images = {"student": toy_net().predictor()}, ToyImages(20)
    expected = evaluate(predictors, images, batch_size=20)["student"]
    found = evaluate(predictors, images, batch_size)["student"]
    assert found[:2] == expected[:2]
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.images == 20


def test_modes_and_buffers_are_put_back():
    net = toy_net()
    net.module.bn1.eval()
    modes = [m.training for m in net.modules()]
    buffers = [b.clone() for b in net.buffers()]
    evaluate({"student": net.predictor()}, ToyImages(8))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))


def test_modes_are_put_back_on_an_error():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            raise RuntimeError("out of memory")

    fails, other = Fails(), toy_net().predictor()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate({"other": other, "fails": fails}, ToyImages(8))
    assert fails.training
    assert other.training


def test_a_network_can_be_trained_after_it_was_evaluated():
    """Inference mode must leave no tensor that autograd refuses."""
    net = toy_net()
    evaluate({"student": net.predictor()}, ToyImages(8))
    net(ToyImages(8).image).logits.sum().backward()
    assert net.module.conv1.weight.grad is not None


def test_extreme_logits_have_a_finite_loss():
    """1e4 on the wrong class costs 1e4 nats; a half-precision predictor's too, without overflow."""
    images = Known([[1e4, 0.0]] * 2, [1, 1])
    assert evaluate({"known": nn.Identity()}, images)["known"].loss == pytest.approx(1e4)
