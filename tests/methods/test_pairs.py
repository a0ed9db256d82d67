"""Every method on every pair of networks of the SAKD tables, as it comes from its defaults."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from potstill.method import Batch, DataSpec, Progress
from potstill.methods import METHODS
from potstill.models import build
from potstill.net import Net

QUICK = [
    ("resnet56", "resnet20", 32),
    ("wrn_40_2", "resnet32", 32),
    ("wrn_40_2", "wrn_16_2", 32),
    ("wrn_40_2", "wrn_40_1", 32),
    ("wrn_40_2", "mobilenetv2", 32),
    ("resnet50", "mobilenetv2", 32),
    ("resnet34", "wrn_28_2", 32),
    ("wrn_16_2", "resnet20", 64),
]
DEEP = [
    ("resnet110", "resnet20", 32),
    ("resnet110", "resnet32", 32),
    ("resnet110", "resnet56", 32),
    ("resnet110", "wrn_16_1", 32),
    ("resnet110", "wrn_16_2", 32),
    ("resnet110", "wrn_40_1", 32),
    ("resnet56", "resnet32", 32),
    ("wrn_40_2", "resnet56", 32),
    ("resnet34", "wrn_28_2", 64),
    ("resnet50", "mobilenetv2", 64),
]
WIDE = [(name, "resnet50", "mobilenetv2", 32) for name in ("semckd", "mgd", "mhgd")]
TAUGHT = [name for name, method in METHODS.items() if method.teachers_needed[0] > 0]
FEW = {"crd": {"negatives": 8}}
"""Arguments for 20 images of 10 classes."""


@functools.cache
def network(name: str, size: int) -> Net:
    torch.manual_seed(0)
    return build(name, 10, (3, size, size)).to(memory_format=torch.channels_last)


def cases() -> list[Any]:
    """Slow: deep networks, and convolutions on the 2,048 and 4,096 channels of a ResNet-50."""
    return [
        pytest.param(
            name,
            *pair,
            id="-".join(map(str, (name, *pair))),
            marks=[pytest.mark.slow] if pair in DEEP or (name, *pair) in WIDE else [],
        )
        for name in TAUGHT
        for pair in (*QUICK, *DEEP)
    ]


@pytest.mark.parametrize(("name", "teacher", "student", "size"), cases())
def test_it_trains_without_a_layer_named(name: str, teacher: str, student: str, size: int):
    """Built from its defaults: terms and gradients are finite in every phase, its layers learn."""
    labels = torch.arange(20) % 10
    shape = (3, size, size)
    spec = DataSpec(
        range(10), [range(10)], torch.arange(20), labels, 20, 8, True, shape, (0.5,) * 3, (0.2,) * 3
    )
    nets = [copy.deepcopy(network(student, size))], [copy.deepcopy(network(teacher, size))]
    torch.manual_seed(1)
    method = METHODS[name](*nets, spec, **FEW.get(name, {}))
    generator = torch.Generator().manual_seed(2)
    index = torch.arange(8)
    batch = Batch(torch.randn(8, *shape, generator=generator), labels[:8], index, index)
    method.train()
    students = {id(p) for p in method.student.parameters()}
    for phase in method.phases():
        (turn,) = phase.turns
        (update,) = turn.updates
        progress = Progress(phase.epochs // 2, 100, 200, phase.epochs)
        terms = update.loss(turn.forward(batch, progress, None))
        assert all(term.isfinite() and term.dim() == 0 for term in terms.values()), terms
        found = update.gradients(terms, update.parameters, progress)
        assert all(gradient.isfinite().all() for gradient in found)
        own = [g for p, g in zip(update.parameters, found, strict=True) if id(p) not in students]
        assert not own or sum(gradient.abs().sum() for gradient in own) > 0
