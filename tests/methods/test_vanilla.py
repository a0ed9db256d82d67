"""Plain training: cross-entropy and nothing else."""

from __future__ import annotations

import math

import torch

from potstill.method import Batch, Outputs, Progress
from potstill.methods.vanilla import Vanilla
from potstill.net import Captured
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close


def vanilla() -> Vanilla:
    return Vanilla([toy_net()], [], ToyImages().spec(0))


def loss(student: torch.Tensor, label: list[int]) -> torch.Tensor:
    labels = torch.tensor(label)
    batch = Batch(torch.zeros(len(label), 1), labels, labels, labels)
    terms = vanilla().loss(Outputs(batch, Progress(0, 0, 1, 1), [Captured(student, {})], []))
    assert list(terms) == ["ce"]
    return terms["ce"]


def test_the_term_by_hand():
    """Softmax (3/4, 1/4) twice, labels 0 and 1: (ln 4/3 + ln 4) / 2."""
    student = torch.tensor([[math.log(3.0), 0.0]] * 2)
    close(loss(student, [0, 1]).item(), (math.log(4 / 3) + math.log(4)) / 2)


def test_an_extreme_logit_costs_itself():
    close(loss(torch.tensor([[1e4, 0.0]]), [1]).item(), 1e4)


def test_it_reads_nothing_and_trains_the_whole_student():
    method = vanilla()
    assert method.reads == frozenset()
    (phase,) = method.phases()
    assert phase.epochs == 240
    assert len(phase.turns[0].updates[0].parameters) == len(list(method.student.parameters()))
