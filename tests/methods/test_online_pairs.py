"""Every online method on the pairs and trios of the published tables, and on plain modules."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.method import Batch, DataSpec, Method, Progress
from potstill.methods import METHODS
from potstill.models import build, tapped
from potstill.net import Net

PAIRS = [
    (("resnet32", "resnet56"), 32),
    (("resnet32", "wrn_16_4"), 32),
    (("resnet20", "wrn_16_2"), 32),
    (("mobilenetv2", "resnet20"), 32),
    (("resnet8", "wrn_16_1"), 64),
]
SLOW_PAIRS = [
    (("resnet56", "wrn_28_4"), 32),
    (("wrn_16_2", "wrn_28_2"), 32),
    (("wrn_16_2", "wrn_28_4"), 32),
    (("resnet18_imagenet", "resnet34_imagenet"), 64),
]
TRIOS = [(("resnet8", "wrn_16_1", "resnet14"), 32), (("resnet20",) * 3, 32)]
SLOW_TRIOS = [(("resnet32", "wrn_16_2", "mobilenetv2"), 32), (("wrn_28_2",) * 3, 32)]
EQUAL = [
    (("resnet20",) * 2, 32),
    (("wrn_16_2",) * 2, 32),
    (("mobilenetv2",) * 2, 32),
    (("resnet8",) * 2, 64),
]
SLOW_EQUAL = [
    (("resnet32",) * 3, 32),
    (("resnet56",) * 2, 32),
    (("wrn_28_4",) * 2, 32),
    (("resnet18_imagenet",) * 2, 64),
]
MANY: list[tuple[str, dict[str, Any]]] = [
    ("dml", {}),
    ("dml", {"mode": "synchronous"}),
    ("ensemble_kd", {}),
    ("afd_online", {}),
    ("afd_online", {"logit_peers": "all"}),
]
"""Of as many networks as there are; L1's are two, and ONE's of one architecture."""
TWO: list[tuple[str, dict[str, Any]]] = [("l1", {}), ("l1_kd", {})]
ONLINE = {name for name, method in METHODS.items() if method.teachers_needed[0] == 0} - {"vanilla"}


def sequential() -> nn.Module:
    """Three stages in a line, which a branch can be cut from."""
    widths = (3, 8, 12, 16)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(3):
        parts[f"part{i}"] = nn.Sequential(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1),
            nn.BatchNorm2d(widths[i + 1]),
            nn.ReLU(),
        )
    parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(16, 10)}
    return nn.Sequential(parts)


class Branching(nn.Module):
    """With a forward of its own, other widths, strides and a vector that is no mean."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 6, 5, stride=2, padding=2), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(6, 10, 3, padding=1), nn.GroupNorm(2, 10), nn.ReLU())
        self.fc = nn.Linear(2 * 10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.low(x)
        x = self.high(x) + torch.cat([x, x[:, :4]], dim=1)
        return self.fc(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))


@functools.cache
def network(name: str, size: int, seed: int) -> Net:
    torch.manual_seed(seed)
    shape = (3, size, size)
    plain = {"sequential": sequential, "branching": Branching}
    net = tapped(plain[name](), shape) if name in plain else build(name, 10, shape)
    return net.to(memory_format=torch.channels_last)


def cases(
    methods: Sequence[tuple[str, dict[str, Any]]],
    groups: Sequence[tuple[tuple[str, ...], int]],
    slow: bool = False,
) -> list[Any]:
    return [
        pytest.param(
            name,
            arguments,
            *group,
            id="-".join(map(str, (name, *arguments.values(), *group[0], group[1]))),
            marks=[pytest.mark.slow] if slow else [],
        )
        for name, arguments in methods
        for group in groups
    ]


ALL = [
    *cases([*MANY, *TWO], PAIRS),
    *cases([*MANY, *TWO], SLOW_PAIRS, slow=True),
    *cases(MANY, TRIOS),
    *cases(MANY, SLOW_TRIOS, slow=True),
    *cases([("one", {})], EQUAL),
    *cases([("one", {})], [(("resnet20",) * 3, 32)]),
    *cases([("one", {})], SLOW_EQUAL, slow=True),
    *cases([*MANY, *TWO], [(("sequential", "branching"), 32)]),
    *cases([*MANY, ("one", {})], [(("sequential",) * 3, 64)]),
]


def test_every_online_method_is_among_them():
    assert {name for name, _ in (*MANY, *TWO)} | {"one"} == ONLINE


@pytest.mark.parametrize(("name", "arguments", "names", "size"), ALL)
def test_it_trains_without_a_layer_named(
    name: str, arguments: dict[str, Any], names: tuple[str, ...], size: int
):
    """Built from its defaults: terms and gradients are finite in every turn, and every network and
    every layer of the method's own learns.
    """
    labels, shape = torch.arange(20) % 10, (3, size, size)
    spec = DataSpec(
        range(10), [], torch.arange(20), labels, 20, 4, True, shape, (0.5,) * 3, (0.2,) * 3
    )
    nets = [copy.deepcopy(network(n, size, seed)) for seed, n in enumerate(names)]
    torch.manual_seed(1)
    method = METHODS[name](nets, [], spec, **arguments).train()
    image = torch.randn(4, *shape, generator=torch.Generator().manual_seed(2))
    index = torch.arange(4)
    batch = Batch(image.to(memory_format=torch.channels_last), labels[:4], index, index)

    (phase,) = method.phases()
    progress = Progress(phase.epochs // 2, 100, 200, phase.epochs)
    learned: dict[int, float] = {}
    out = None
    for turn in phase.turns:
        out = turn.forward(batch, progress, out)
        for update in turn.updates:
            terms = update.loss(out)
            assert all(term.isfinite() and term.dim() == 0 for term in terms.values()), terms
            found = update.gradients(terms, update.parameters, progress)
            assert all(gradient.isfinite().all() for gradient in found)
            for p, gradient in zip(update.parameters, found, strict=True):
                learned[id(p)] = learned.get(id(p), 0.0) + gradient.abs().sum().item()
    for part in learning_parts(method):
        assert sum(learned[id(p)] for p in part.parameters()) > 0, part
    assert learned.keys() == {id(p) for p in method.trainable()}


def learning_parts(method: Method) -> list[nn.Module]:
    """Networks as they were given, and each layer or stack of layers of the method's own."""
    own = [module for name, module in method.named_children() if name != "students"]
    stacks = [part for module in own for part in module if list(part.parameters())]
    return [*method.networks, *stacks]
