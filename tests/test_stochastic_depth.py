"""Stochastic depth: the rule by hand, whole networks block by block, what dropping leaves alone."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import distributed
from potstill.depth import Depth, ResidualBlock, linear_decay
from potstill.errors import NetworkError, TapError
from potstill.models import MODELS, build, mobilenet, resnet
from potstill.net import Captured, Net, shared_copy
from potstill.stochastic_depth import WithShortcut, stochastic

close = torch.testing.assert_close

SIZE = (3, 16, 16)
NARROW = {
    "bottleneck": resnet.stages("", resnet.Bottleneck, 8, [2, 1, 1], [4, 6, 8]),
    "mobilenetv1": mobilenet.v1(0.25),
}
NATIVE = ["resnet8", "resnet20", "bottleneck", "wrn_16_1", "wrn_16_1_gkd"]
"""With shortcuts of their own."""
FAMILIES = [*NATIVE, "mobilenetv1", "vgg8"]
REFUSED = ("mobilenetv2", "shufflenetv1", "shufflenetv2")
both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
both_draws = pytest.mark.parametrize("draw", ["batch", "image"])


@functools.cache
def plain(name: str) -> Net:
    """A network of four classes; nobody changes it."""
    torch.manual_seed(0)
    if name not in NARROW:
        return build(name, 4, SIZE)
    a = NARROW[name]
    return Net(a.build(4, SIZE), a.places, SIZE, norms=a.norms, blocks=a.blocks)


def made(name: str, p_end: float = 0.5, **arguments: Any) -> Net:
    """A stochastic one in float64 and eval mode, whose BatchNorms all have averages of their own.

    It has a tap `end0`, `end1`, ... wherever a block's output is seen.
    """
    torch.manual_seed(1)
    net = stochastic(plain(name), p_end, **arguments).double().eval()
    net.add_taps({f"end{i}": place for i, place in enumerate(net.block_ends)})
    for norm in batch_norms(net).values():
        norm.running_mean.normal_(std=0.2)
        norm.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    return net


def batch_norms(net: Net) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in net.module.named_modules() if isinstance(m, nn.BatchNorm2d)}


def images(n: int = 2) -> Tensor:
    """In float64."""
    return torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(0)).double()


def decide(net: Net, alive: Sequence[float]) -> None:
    """From now on every draw is this one: what survives with probability 1 is always there."""
    (depth,) = net.depths
    assert len(alive) == len(depth.survival)
    depth.survival = tuple(map(float, alive))


def everything(found: Captured) -> dict[str, Tensor]:
    return {**found.features, "logits": found.logits}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """As float64 is."""
    assert one.keys() == other.keys()
    for name in one:
        close(one[name], other[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def state(net: Net) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in net.state_dict().items()}


class Times(ResidualBlock):
    """Alive it multiplies by `factor`: the branch is `factor` - 1 times the input."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(factor - 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.branch, x, x)

    def branch(self, x: Tensor) -> Tensor:
        return self.weight * x


PRIMES = (2, 3, 5, 7, 11, 13)


def product(*factors: int, p_end: float = 0.5, draw: Any = "batch") -> Net:
    """Stochastic: of an image of one pixel, 1, the logit is the product of what is alive.

    Of primes it tells who that is.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict((f"times{f}", Times(f)) for f in factors)
    blocks = list(parts)
    parts |= {"flatten": nn.Flatten(), "fc": nn.Linear(1, 1, bias=False)}
    nn.init.ones_(parts["fc"].weight)
    net = Net(nn.Sequential(parts), {b: b for b in blocks}, (1, 1, 1), blocks=blocks)
    return stochastic(net, p_end, draw=draw)


def times(factors: Sequence[int], alive: Tensor) -> float:
    """The product of those that are alive."""
    return float(math.prod(f for f, a in zip(factors, alive.tolist(), strict=True) if a))


def draw_until(net: Net, n: int, wanted: Callable[[Tensor], Any]) -> Tensor:
    """Seed it with the first seed whose draw for n images is wanted, and give that draw."""
    for seed in range(200):
        net.seed(seed)
        if wanted(net.drawn(n)):
            return net.drawn(n)
    raise AssertionError("no such draw")


def mixed(alive: Tensor) -> bool:
    """Whether of images some have a block that others have not; other blocks all or none have."""
    counts = set(alive.sum(0).tolist())
    return {0, len(alive)} < counts


def one_pixel(n: int = 1) -> Tensor:
    return torch.ones(n, 1, 1, 1)


# --- by hand ------------------------------------------------------------------------------------


def test_survival_by_hand():
    """L = 3, p_end 0.5: a sixth, a third and a half are lost. p_L is p_end whatever L is."""
    close(linear_decay(3, 0.5), [5 / 6, 2 / 3, 1 / 2])
    close(linear_decay(1, 0.3), [0.3])
    assert linear_decay(4, 1.0) == [1.0] * 4


@pytest.mark.parametrize(
    ("blocks", "p_end", "expected"),
    [(3, 0.5, 2.0), (15, 0.7, 12.6), (54, 0.6, 43.0), (12, 0.5, 8.75)],
)
def test_expected_live_blocks_by_hand(blocks: int, p_end: float, expected: float):
    """L - (1 - p_end)(L + 1) / 2: 3 - 0.5 * 2, 15 - 0.3 * 8, 54 - 0.4 * 27.5, 12 - 0.5 * 6.5."""
    assert blocks - (1 - p_end) * (blocks + 1) / 2 == pytest.approx(expected)
    assert sum(linear_decay(blocks, p_end)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("blocks", "p_end", "expected"), [(54, 0.6, "3e-06"), (15, 0.7, "0.0675"), (12, 0.5, "0.0177")]
)
def test_the_full_network_is_hardly_ever_drawn(blocks: int, p_end: float, expected: str):
    """The product of all p_l, to the digits that the page has."""
    digits = ".0e" if "e" in expected else ".4f"
    assert format(math.prod(linear_decay(blocks, p_end)), digits) == expected


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet32", 15), ("resnet110", 54), ("wrn_28_10", 12), ("wrn_40_4", 18), ("mobilenetv1", 13)],
)
def test_blocks_are_counted_through_the_whole_network(name: str, blocks: int):
    assert len(MODELS[name].blocks) == blocks


def test_a_networks_survival_by_hand():
    """ResNet-32 with p_end 0.7: p_1 = 1 - 0.3 / 15, p_5 = 0.9 ends the first stage; 12.6 live."""
    (depth,) = stochastic(build("resnet32", 4, SIZE), 0.7).depths
    assert len(depth.survival) == 15
    close([depth.survival[i] for i in (0, 4, 9, 14)], [0.98, 0.9, 0.8, 0.7])
    assert sum(depth.survival) == pytest.approx(12.6)


@pytest.mark.parametrize(
    ("alive", "expected"), [((1, 1), 15.0), ((1, 0), 3.0), ((0, 1), 5.0), ((0, 0), 1.0)]
)
@both_draws
def test_sub_networks_by_hand(alive: tuple[int, int], expected: float, draw: str):
    """Blocks x + 2 x and x + 4 x multiply by 3 and by 5; dropped ones by 1; nothing is rescaled."""
    net = product(3, 5, draw=draw)
    decide(net, alive)
    assert net(one_pixel(2)).logits.tolist() == [[expected], [expected]]


def test_the_expected_depth_by_hand():
    """p = (3/4, 1/2): (1 + 2 * 3/4)(1 + 4 * 1/2) = 7.5. As the network is linear, that is the mean
    of 15, 3, 5 and 1 with their chances 3/8, 3/8, 1/8 and 1/8.
    """
    net = product(3, 5)
    x = one_pixel()
    for found in (net.predictor()(x), net.logits(x), net.capture(x).logits, net.module(x)):
        assert found.item() == 7.5 == (3 * 15 + 3 * 3 + 5 + 1) / 8
    assert net.capture(x)["times3"].item() == 2.5


def test_gradients_by_hand():
    """d logit / d weight of block 1 is 5 with both alive, 3/4 * 3 at the expected depth, and none
    where it is dropped.
    """
    net = product(3, 5)
    first = net.module.times3.weight
    (found,) = torch.autograd.grad(net.predictor()(one_pixel()).sum(), first)
    assert found.item() == 0.75 * 3
    decide(net, (1, 1))
    (found,) = torch.autograd.grad(net(one_pixel()).logits.sum(), first)
    assert found.item() == 5
    decide(net, (0, 1))
    (nothing,) = torch.autograd.grad(net(one_pixel()).logits.sum(), first, allow_unused=True)
    assert nothing is None


def test_each_image_has_a_sub_network_by_hand():
    """The draw is read first: each of four images gets its own product, in taps as in logits."""
    net = product(3, 5, draw="image")
    for seed in range(8):
        net.seed(seed)
        alive = net.drawn(4)
        assert alive.shape == (4, 2) and alive.dtype == torch.bool
        found = net(one_pixel(4))
        assert found["times3"].flatten().tolist() == [3.0 if a else 1.0 for a, _ in alive]
        assert found.logits.flatten().tolist() == [times((3, 5), row) for row in alive]


# --- the page, block by block -------------------------------------------------------------------


def resnet_by_hand(net: Net, x: Tensor, strength: Iterator[float]) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all taps, for these b_l or p_l. Only what is not 0 is run."""
    m, number = net.module, 0
    h = F.relu(m.bn1(m.conv1(x)))
    yield "stem", h
    for i in range(1, len(net.stages()) + 1):
        for block in m.get_submodule(f"layer{i}"):
            s = h if block.downsample is None else block.downsample[1](block.downsample[0](h))
            b = next(strength)
            if b != 0:
                f = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(h)))))
                if hasattr(block, "conv3"):
                    f = block.bn3(block.conv3(F.relu(f)))
                s = b * f + s
            h = F.relu(s)
            yield f"end{number}", h
            number += 1
        yield f"stage{i}:pre", s
        yield f"stage{i}", h
    yield "last", h
    yield "embed", h.mean((2, 3))
    yield "logits", F.linear(h.mean((2, 3)), m.fc.weight, m.fc.bias)


def wrn_by_hand(net: Net, x: Tensor, strength: Iterator[float]) -> Iterator[tuple[str, Tensor]]:
    """phi is the identity, and what a block starts with is the activation of the one before."""
    m, biased = net.module, net.module.conv1.bias is not None
    h = m.conv1(x)
    yield "stem", h
    number = 0
    for i in (1, 2, 3):
        for j, block in enumerate(m.get_submodule(f"layer{i}")):
            b, down = next(strength), block.shortcut is not None
            runs = b != 0 or (down and not biased)  # the projection takes what is activated
            normal = block.bn1(h) if runs else without_moving(block.bn1, h)
            if number > 0:
                yield f"end{number - 1}", F.relu(normal)
            if i > 1 and j == 0:
                yield f"stage{i - 1}:pre", normal
                yield f"stage{i - 1}:post", F.relu(normal)
            s = h if not down else block.shortcut(h if biased else F.relu(normal))
            if b != 0:
                f = F.relu(block.bn2(block.conv1(F.relu(normal))))
                s = b * block.conv2(block.dropout(f) if biased else f) + s
            h, number = s, number + 1
        yield f"stage{i}", h
    yield "stage3:pre", (normal := m.bn1(h))
    for name in ("stage3:post", f"end{number - 1}", "last"):
        yield name, F.relu(normal)
    embed = F.relu(normal).mean((2, 3))
    yield "embed", embed
    yield "logits", F.linear(embed, m.fc.weight, m.fc.bias)


def without_moving(norm: nn.BatchNorm2d, h: Tensor) -> Tensor:
    """What a BatchNorm gives, from the batch or from its averages, without an update of them."""
    averages = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    return F.batch_norm(h, *averages, norm.weight, norm.bias, norm.training, 0.0, norm.eps)


def line_by_hand(net: Net, x: Tensor, strength: Iterator[float]) -> Iterator[tuple[str, Tensor]]:
    """MobileNetV1 and VGG: added shortcuts, the branch ends in its own ReLU, nothing after."""
    m, number = net.module, 0
    mobile = hasattr(m, "conv1")
    h = F.relu(m.bn1(m.conv1(x))) if mobile else x
    if mobile:
        yield "stem", h
    for i in range(1, 6):
        for block in m.get_submodule(f"layer{i}"):
            s = h
            if not isinstance(block.shortcut, nn.Identity):
                s = block.shortcut.bn(block.shortcut.conv(h))
            b = next(strength)
            if b != 0:
                if mobile:
                    f = F.relu(block.bn1(block.conv1(h)))
                    f = F.relu(block.bn2(block.conv2(f)))
                else:
                    f = F.relu(block.bn(block.conv(h)))
                s = b * f + s
            h = s
            yield f"end{number}", h
            number += 1
        if mobile or i > 1:
            stage = f"stage{i if mobile else i - 1}"
            yield stage, h
            yield f"{stage}:pre", h
        else:
            yield "stem", h
        if not mobile and i < 4:
            h = F.max_pool2d(h, 2)
    yield "last", h
    yield "embed", h.mean((2, 3))
    yield "logits", F.linear(h.mean((2, 3)), m.fc.weight, m.fc.bias)


def by_hand(name: str) -> Callable[[Net, Tensor, Iterator[float]], Iterator[tuple[str, Tensor]]]:
    if name.startswith("wrn"):
        return wrn_by_hand
    return line_by_hand if name in ("mobilenetv1", "vgg8") else resnet_by_hand


def gradients(net: Net, x: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one number that every tap is in, by parameter, those it reaches; and the images'."""
    total = sum(value.square().mean() + value.mean() for value in found.values())
    where = {**dict(net.module.named_parameters()), "image": x}
    grads = torch.autograd.grad(total, where.values(), allow_unused=True)
    return {name: g for name, g in zip(where, grads, strict=True) if g is not None}


def assert_as_by_hand(
    name: str, net: Net, strength: list[float], run: Callable[[Tensor], Captured]
) -> None:
    """Every tap, every gradient and every buffer, from one run each."""
    twin = copy.deepcopy(net)
    one, other = (images().contiguous(memory_format=net.memory_format) for _ in range(2))
    one.requires_grad_(), other.requires_grad_()
    torch.manual_seed(2)  # of dropout
    found = everything(run(one))
    torch.manual_seed(2)
    expected = dict(by_hand(name)(twin, other, iter(strength)))
    assert_close(found, expected)
    assert_close(gradients(net, one, found), gradients(twin, other, expected))
    assert_close(state(net), state(twin))


@both_modes
@pytest.mark.parametrize("name", FAMILIES)
def test_a_drawn_network_is_the_page_block_by_block(name: str, training: bool):
    net = made(name, 0.2).train(training)
    seen = []
    for seed in (1, 2):
        net.seed(seed)
        alive = net.drawn(1)
        seen += alive.tolist()
        assert_as_by_hand(name, net, alive.double().tolist(), net)
    assert {True, False} == set(seen)


@both_modes
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_shortcuts_alone_is_the_page_too(name: str, training: bool):
    net = made(name).train(training)
    nobody = [0.0] * len(net.blocks)
    decide(net, nobody)
    assert_as_by_hand(name, net, nobody, net)


@both_modes
@pytest.mark.parametrize("name", FAMILIES)
def test_the_expected_depth_is_the_page_with_p_in_place_of_b(name: str, training: bool):
    net = made(name, 0.3).train(training)
    p = linear_decay(len(net.blocks), 0.3)
    assert_as_by_hand(name, net, p, net.capture)
    net.eval()
    expected = dict(by_hand(name)(net, images(), iter(p)))["logits"]
    close(net.predictor()(images()), expected, rtol=1e-9, atol=1e-11)


def outcome(net: Net) -> dict[str, dict[str, Tensor]]:
    """Of a forward and a backward: every tap, every gradient, and the state after it."""
    torch.manual_seed(4)  # of dropout
    x = images().float().requires_grad_()
    found = everything(net(x))
    return {"taps": found, "gradients": gradients(net, x, found), "state": state(net)}


@both_modes
@pytest.mark.parametrize("name", FAMILIES)
def test_with_every_block_alive_it_is_the_plain_network(name: str, training: bool):
    """Bit for bit. Networks that are given shortcuts are as with p_end 1."""
    start = plain(name)
    torch.manual_seed(3)  # of the shortcuts
    source = copy.deepcopy(start) if name in NATIVE else stochastic(start, 1.0)
    expected = outcome(source.train(training))
    for draw in ("batch", "image"):
        torch.manual_seed(3)
        net = stochastic(start, 0.5, draw=draw).train(training)
        net.seed(0)  # or the draw would take dropout's random numbers
        decide(net, [1.0] * len(net.blocks))
        for what, found in outcome(net).items():
            assert_equal(found, expected[what])


@both_modes
@pytest.mark.parametrize("name", NATIVE)
def test_p_end_1_is_the_plain_network(name: str, training: bool):
    """Bit for bit, and dropout's random numbers are all that is taken."""
    source = copy.deepcopy(plain(name)).train(training)
    net = stochastic(source, 1.0)
    assert not net.samples and net.depths == []
    expected, random = outcome(source), torch.get_rng_state()
    for what, found in outcome(net).items():
        assert_equal(found, expected[what])
    assert torch.equal(torch.get_rng_state(), random)


# --- what a dropped block leaves alone ----------------------------------------------------------

PROJECTIONS = {
    "resnet8": ["layer2.0.downsample.1", "layer3.0.downsample.1"],
    "resnet20": ["layer2.0.downsample.1", "layer3.0.downsample.1"],
    "bottleneck": [f"layer{i}.0.downsample.1" for i in (1, 2, 3)],
    "wrn_16_1": ["layer2.0.bn1", "layer3.0.bn1"],  # the projection takes what they activate
    "wrn_16_1_gkd": [],
    "mobilenetv1": [f"layer{i}.0.shortcut.bn" for i in (1, 2, 3, 4, 5)],
    "vgg8": [f"layer{i}.0.shortcut.bn" for i in (1, 2, 3, 4)],
}


def moved(net: Net, before: dict[str, Tensor]) -> set[str]:
    """The BatchNorms that counted one batch; their averages moved, those of all others did not."""
    found = set()
    for name, norm in batch_norms(net).items():
        keys = [f"{name}.{b}" for b in ("running_mean", "running_var", "num_batches_tracked")]
        after = net.state_dict()
        changed = [not torch.equal(after[k], before[k]) for k in keys]
        assert len(set(changed)) == 1, name
        if changed[0]:
            assert norm.num_batches_tracked == before[keys[2]] + 1
            found.add(name)
    return found


@both_draws
@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_blocks_move_no_average_and_projections_do(name: str, draw: str):
    net = made(name, draw=draw).train()
    decide(net, [0.0] * len(net.blocks))
    before = state(net)
    net(images())
    outside = {n for n in batch_norms(net) if not n.startswith("layer")}
    assert moved(net, before) == outside | set(PROJECTIONS[name])


def test_one_dropped_block_among_living_ones():
    net = made("resnet20").train()
    decide(net, [i != 3 for i in range(9)])  # the first of the second stage
    before = state(net)
    net(images())
    left = {"layer2.0.bn1", "layer2.0.bn2"}
    assert moved(net, before) == set(batch_norms(net)) - left


def test_the_expected_depth_moves_every_average():
    net = made("resnet20").train()
    before = state(net)
    net.capture(images())
    assert moved(net, before) == set(batch_norms(net))


@both_modes
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_dropped_blocks_are_not_run(name: str, training: bool):
    """Convolutions of branches, counted: none of a dropped block, each once of a living one."""
    net = made(name).train(training)
    calls: Counter[str] = Counter()
    for path, part in net.module.named_modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda *_, path=path: calls.update([path]))
    alive = [i % 2 == 1 for i in range(len(net.blocks))]
    decide(net, alive)
    net(images())
    for i, block in enumerate(net.blocks):
        inside = net.module.get_submodule(block)
        shortcut = ("shortcut", "downsample")
        for path, part in inside.named_modules():
            if isinstance(part, nn.Conv2d):
                runs = path.startswith(shortcut) or alive[i]
                assert calls[f"{block}.{path}"] == runs, (block, path)


def test_the_branch_runs_for_the_living_images_alone():
    net = made("resnet20", draw="image")
    seen: dict[str, int] = {}
    for path in net.blocks:
        conv = net.module.get_submodule(f"{path}.conv1")
        conv.register_forward_pre_hook(lambda _, x, path=path: seen.update({path: len(x[0])}))
    net.seed(2)
    alive = net.drawn(4)
    net(images(4))
    counts = {path: int(n) for path, n in zip(net.blocks, alive.sum(0), strict=True) if n}
    assert seen == counts
    assert {0 < n < 4 for n in counts.values()} == {True, False}


def test_averages_are_of_the_living_images_alone():
    """The first block's: 0.9 of what they were and 0.1 of the mean over two of four images."""
    net = made("resnet8", draw="image").train()
    rows = draw_until(net, 4, lambda alive: alive[:, 0].sum() == 2)[:, 0]
    block = net.module.layer1[0]
    before = block.bn1.running_mean.clone()
    stem = net(images(4))["stem"]
    expected = 0.9 * before + 0.1 * block.conv1(stem[rows]).mean((0, 2, 3))
    close(block.bn1.running_mean, expected, rtol=1e-9, atol=1e-11)
    assert block.bn1.num_batches_tracked == 1


class Counting(nn.BatchNorm2d):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@both_draws
@pytest.mark.parametrize("name", ["wrn_16_1", "wrn_16_1_gkd"])
def test_the_layers_a_dropped_block_opens_with_are_run_for_their_taps_alone(name: str, draw: str):
    """`end0` is the second block's ReLU; without that tap nothing of the block is run."""
    for taps, calls in (({}, 0), ({"end0": "layer1.1.relu1"}, 1)):
        source = copy.deepcopy(plain(name))
        source.module.layer1[1].bn1 = Counting(16)
        net = stochastic(source, 0.5, draw=draw).train()
        net.add_taps(taps)
        decide(net, [0.0] * 6)
        opening = net.module.layer1[1].bn1
        opening.calls = 0
        net(images().float())
        assert opening.calls == calls
        assert opening.num_batches_tracked == 0


def test_an_opening_that_is_shown_leaves_the_modes_as_they_were():
    net = made("wrn_16_1").train()
    net.module.layer1[1].bn1.eval()
    modes = [m.training for m in net.modules()]
    decide(net, [0.0] * 6)
    net(images())
    assert [m.training for m in net.modules()] == modes
    assert all(norm.track_running_stats for norm in batch_norms(net).values())


@both_draws
def test_a_dropped_stage_of_identity_shortcuts_is_the_relu_of_its_input(draw: str):
    net = made("resnet20", draw=draw)
    decide(net, [0.0] * 3 + [1.0] * 6)
    found = net(images())
    assert torch.equal(found["stage1"], found["stem"])
    assert torch.equal(found["stage1:pre"], found["stem"])
    assert found["stem"].min() >= 0
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    assert torch.equal(net.module.layer1(x), x.relu())


def test_a_dropped_stage_of_mobilenet_is_its_first_block():
    net = made("mobilenetv1")
    decide(net, [i not in (6, 7, 8, 9, 10) for i in range(13)])
    found = net(images())
    assert torch.equal(found["stage4"], found["end5"])


# --- draws --------------------------------------------------------------------------------------


def draws(net: Net, n: int) -> Tensor:
    """One for each of so many seeds. (n, blocks) float64"""
    rows = []
    for seed in range(n):
        net.seed(seed)
        rows.append(net.drawn(1).flatten())
    return torch.stack(rows).double()


def within(sigmas: float, rows: Tensor, p: Tensor) -> None:
    """Frequencies of columns are p, and no two columns go together."""
    q = p * (1 - p)
    assert ((rows.mean(0) - p).abs() <= sigmas * (q / len(rows)).sqrt()).all()
    deviation = (rows - p) / q.sqrt()
    correlation = deviation.T @ deviation / len(rows)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() * math.sqrt(len(rows)) <= sigmas + 0.5


@both_draws
def test_blocks_survive_with_their_probability_and_independently(draw: str):
    """Over 4000 seeds within 3 sigma of p_l; of 36 pairs of blocks the largest within 3.5."""
    net = stochastic(plain("resnet20"), 0.4, draw=draw)
    p = torch.tensor(linear_decay(9, 0.4), dtype=torch.float64)
    within(3, draws(net, 4000), p)


def test_images_survive_with_their_probability_and_independently():
    """4000 images of one draw; and of 4000 draws the first image and the second."""
    net = stochastic(plain("resnet20"), 0.4, draw="image")
    p = torch.tensor(linear_decay(9, 0.4), dtype=torch.float64)
    net.seed(5)
    within(3, net.drawn(4000).double(), p)
    rows = []
    for seed in range(4000):
        net.seed(seed)
        rows.append(net.drawn(2)[:, -1].double())
    within(3, torch.stack(rows), torch.tensor([0.4, 0.4], dtype=torch.float64))


def test_neighbouring_seeds_do_not_go_together():
    rows = draws(stochastic(plain("resnet20"), 0.4), 4000)[:, -1]
    within(3, torch.stack([rows[:-1], rows[1:]], 1), torch.tensor([0.4, 0.4]).double())


def test_what_is_drawn_is_what_is_run_by_all_images_of_a_batch():
    net = product(*PRIMES)
    for seed in range(30):
        net.seed(seed)
        alive = net.drawn(4)
        assert alive.shape == (6,) and alive.dtype == torch.bool
        assert net(one_pixel(4)).logits.flatten().tolist() == [times(PRIMES, alive)] * 4


@both_modes
@both_draws
def test_two_forwards_of_one_batch_differ_unless_p_end_is_1(draw: str, training: bool):
    torch.manual_seed(0)
    net, sure = product(3, 5, draw=draw), product(3, 5, p_end=1.0, draw=draw)
    for each in (net, sure):
        each.train(training)
    assert {net(one_pixel()).logits.item() for _ in range(99)} == {1.0, 3.0, 5.0, 15.0}
    assert {sure(one_pixel()).logits.item() for _ in range(99)} == {15.0}


@both_draws
@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "mobilenetv1"])
def test_a_teacher_that_is_drawn_often_stays_as_it_is(name: str, draw: str):
    """In eval mode, without gradients: weights and averages bit for bit, while outputs differ."""
    net = made(name, draw=draw)
    before = state(net)
    torch.manual_seed(0)
    with torch.no_grad():
        found = {str(net(images(2)).logits.tolist()) for _ in range(6)}
    assert len(found) > 1
    assert_equal(state(net), before)


@both_draws
def test_one_seed_is_one_draw_until_another(draw: str):
    net = product(*PRIMES, draw=draw)
    found = []
    for seed in (3, 4, 3):
        net.seed(seed)
        found.append(net(one_pixel(2)).logits)
        assert all(torch.equal(net(one_pixel(2)).logits, found[-1]) for _ in range(5))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_what_always_survives_is_not_skipped_without_the_rest():
    depth = Depth([1.0, 0.5], "batch")
    with depth.without():
        assert [depth.fate(0), depth.fate(1)] == [1, 0]
    assert [depth.fate(0), depth.fate(1)] == [1, 0.5]


def test_zero_is_a_seed_too():
    depth = Depth([0.5] * 40, "batch")
    depth.seed(0)
    assert torch.equal(depth.drawn(1), depth.drawn(1))


@both_draws
def test_seeded_draws_leave_torchs_generator_as_it_is(draw: str):
    net = product(3, 5, draw=draw)
    net.seed(0)
    before = torch.get_rng_state()
    net(one_pixel(3)), net.drawn(3)
    assert torch.equal(torch.get_rng_state(), before)


@both_draws
def test_draws_without_a_seed_follow_torchs_generator(draw: str):
    net = product(*PRIMES, draw=draw)
    net.seed(1)
    net.seed(None)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append([net(one_pixel(2)).logits.flatten().tolist() for _ in range(3)])
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]
    torch.manual_seed(0)
    assert found[0][0] == [times(PRIMES, row) for row in net.drawn(2).expand(2, 6)]


@both_draws
def test_a_default_device_does_not_matter(draw: str):
    net = product(*PRIMES, draw=draw)
    net.seed(0)
    expected = net.drawn(3)
    with torch.device("meta"):
        assert torch.equal(net.drawn(3), expected)


def test_no_random_number_is_drawn_without_a_sub_network():
    """Nor is it said that one was."""
    before = torch.get_rng_state()
    for net in (product(3, 5, p_end=1.0), product(3, 5, draw="never")):
        torch.set_rng_state(before)
        net(one_pixel())
        assert torch.equal(torch.get_rng_state(), before)
        assert not net.sampled
    net = product(3, 5)
    torch.set_rng_state(before)
    net.predictor()(one_pixel()), net.capture(one_pixel()), net.probe()
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.sampled
    net(one_pixel())
    assert net.sampled


@both_modes
@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1_gkd", "mobilenetv1"])
def test_never_drawn_is_the_expected_depth(name: str, training: bool):
    net = made(name, draw="never").train(training)
    assert not net.samples
    twin = copy.deepcopy(net)
    torch.manual_seed(0)
    one = everything(net(images()))
    torch.manual_seed(0)
    assert_equal(one, everything(twin.capture(images())))
    assert_equal(state(net), state(twin))


@both_draws
def test_a_forward_that_fails_leaves_the_expected_depth(draw: str):
    net = product(3, 5, draw=draw)
    with pytest.raises(RuntimeError):
        net(torch.ones(1, 1, 2, 2))
    assert net.predictor()(one_pixel()).item() == 7.5


def test_a_network_of_two_stochastic_parts_draws_for_each():
    """One seed, not one draw: of equal parts they would always be equal."""
    parts = [product(*PRIMES).module for _ in range(2)]
    parts[0].fc = nn.Unflatten(1, (1, 1, 1))
    net = Net(nn.Sequential(*parts), {}, (1, 1, 1))
    assert len(net.depths) == 2 and net.samples
    equal = 0
    for seed in range(20):
        net.seed(seed)
        alive = net.drawn(1)
        assert alive.shape == (12,)
        equal += torch.equal(alive[:6], alive[6:])
        assert net.double()(one_pixel().double()).logits.item() == times(PRIMES * 2, alive)
    assert equal < 3


@pytest.mark.parametrize("name", FAMILIES)
def test_an_images_own_sub_network_is_that_image_alone(name: str):
    """In eval mode: rows of the batch, and each row as a batch of one in which it is decided."""
    net, alone = made(name, 0.3, draw="image"), made(name, 0.3)
    alive = draw_until(net, 3, mixed)
    assert alive.shape == (3, len(net.blocks))
    with torch.no_grad():
        found = everything(net(images(3)))
        for i, row in enumerate(alive):
            decide(alone, row.tolist())
            expected = everything(alone(images(3)[i : i + 1]))
            assert_close({k: v[i : i + 1] for k, v in found.items()}, expected)


def test_gradients_of_a_draw_of_images_are_the_sum_of_each_ones():
    net, alone = made("wrn_16_1", 0.3, draw="image"), made("wrn_16_1", 0.3)
    alive = draw_until(net, 3, mixed)
    net(images(3)).logits.square().sum().backward()
    for i, row in enumerate(alive):
        decide(alone, row.tolist())
        alone(images(3)[i : i + 1]).logits.square().sum().backward()
    for (name, one), other in zip(net.named_parameters(), alone.parameters(), strict=True):
        got = torch.zeros_like(one) if one.grad is None else one.grad
        want = torch.zeros_like(other) if other.grad is None else other.grad
        close(got, want, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_ranks_draw_for_the_whole_batch_and_run_their_share(monkeypatch: pytest.MonkeyPatch):
    net = product(*PRIMES, draw="image")
    net.seed(0)
    whole = net(one_pixel(6)).logits
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert torch.equal(net(one_pixel(3)).logits, whole[3 * rank : 3 * rank + 3])


# --- scopes, and what a copy is -----------------------------------------------------------------


def who(net: Net) -> list[int]:
    """Numbers of the blocks that may be dropped."""
    paths = {id(net.module.get_submodule(path)): i for i, path in enumerate(net.blocks)}
    found = [m for m in net.module.modules() if isinstance(m, ResidualBlock) and m.depth]
    assert all(paths[id(m)] == m.number and m.depth is net.depths[0] for m in found)
    return [m.number for m in found]


@pytest.mark.parametrize(
    ("name", "scope", "expected"),
    [
        ("resnet20", "full", range(9)),
        ("resnet20", "identity_only", [0, 1, 2, 4, 5, 7, 8]),
        ("resnet20", "last_half", [4, 5, 6, 7, 8]),  # 2 * 5 > 9
        ("bottleneck", "identity_only", [1]),
        ("wrn_16_1", "full", range(6)),
        ("wrn_16_1", "identity_only", [0, 1, 3, 5]),
        ("wrn_16_1", "last_half", [3, 4, 5]),  # 2 * 3 = 6 is not more
        ("wrn_16_1_gkd", "identity_only", [0, 1, 3, 5]),
        ("mobilenetv1", "full", range(13)),
        ("mobilenetv1", "identity_only", [2, 4, 6, 7, 8, 9, 10, 12]),  # 8 of 13
        ("mobilenetv1", "last_half", [6, 7, 8, 9, 10, 11, 12]),
        ("vgg8", "full", range(5)),
        ("vgg8", "identity_only", [4]),
        ("vgg8", "last_half", [2, 3, 4]),
    ],
)
def test_a_scope_says_who_may_be_dropped_and_p_counts_all(
    name: str, scope: Any, expected: Sequence[int]
):
    net = stochastic(plain(name), 0.4, scope)
    assert who(net) == list(expected)
    (depth,) = net.depths
    every = len(net.blocks)
    p = [1 - (i + 1) / every * 0.6 if i in expected else 1.0 for i in range(every)]
    close(list(depth.survival), p)
    assert net.drawn(1).shape == (len(expected),)
    kinds = [type(net.module.get_submodule(path)) for path in net.blocks]
    given = [i for i, kind in enumerate(kinds) if kind is WithShortcut]
    assert given == ([] if name in NATIVE else list(expected))


@pytest.mark.parametrize(("name", "always"), [("resnet20", 3), ("wrn_16_1", 2), ("mobilenetv1", 3)])
def test_blocks_outside_the_scope_are_always_there_and_at_full_strength(name: str, always: int):
    """The first of the second or third stage, of the drawn network and at the expected depth."""
    net = made(name, scope="identity_only")
    block = net.blocks[always]
    source = copy.deepcopy(plain(name)).double().eval()
    source.load_state_dict(net.state_dict())
    net.add_taps({"before": f"{block}:in", "after": block})
    decide(net, [i not in who(net) for i in range(len(net.blocks))])
    for found in (net(images()), net.capture(images())):
        expected = source.module.get_submodule(block)(found["before"])
        assert torch.equal(found["after"], expected)


@pytest.mark.parametrize("name", NATIVE)
def test_a_plain_state_loads_and_is_the_same(name: str):
    net = stochastic(plain(name), 0.5)
    assert_equal(net.state_dict(), plain(name).state_dict())
    other = made(name)
    net.load_state_dict(other.state_dict(), strict=True)
    copy.deepcopy(plain(name)).load_state_dict(other.state_dict(), strict=True)
    assert net.module.layer1[0].conv1.weight.eq(other.module.layer1[0].conv1.weight).all()


KEYS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
        "bn.num_batches_tracked")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scope", "stages"),
    [
        ("mobilenetv1", "full", [1, 2, 3, 4, 5]),
        ("mobilenetv1", "identity_only", []),
        ("mobilenetv1", "last_half", [5]),
        ("vgg8", "full", [1, 2, 3, 4]),
        ("vgg8", "last_half", [3, 4]),
    ],
)
def test_only_shortcuts_that_change_the_shape_add_to_the_state(
    name: str, scope: Any, stages: list[int]
):
    """The first block of each stage; all that was there has its name and its value still."""
    before, after = plain(name).state_dict(), stochastic(plain(name), 0.5, scope).state_dict()
    added = {f"layer{i}.0.shortcut.{key}" for i in stages for key in KEYS}
    assert after.keys() - before.keys() == added
    assert_equal({k: v for k, v in after.items() if k not in added}, before)


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("mobilenetv1", "layer1.0", (8, 16, (1, 1))),
        ("mobilenetv1", "layer4.0", (64, 128, (2, 2))),
        ("mobilenetv1", "layer4.1", None),
        ("vgg8", "layer1.0", (3, 64, (1, 1))),
        ("vgg8", "layer5.0", None),
    ],
)
def test_added_shortcuts_are_1x1_convolutions_of_the_blocks_stride_or_nothing(
    name: str, path: str, expected: Any
):
    shortcut = stochastic(plain(name), 0.5).module.get_submodule(path).shortcut
    if expected is None:
        assert isinstance(shortcut, nn.Identity)
        return
    conv, bn = shortcut
    assert (conv.in_channels, conv.out_channels, conv.stride) == expected
    assert conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.bias is None
    assert bn.num_features == expected[1]


@pytest.mark.parametrize("size", [15, 16, 17, 18, 31])
def test_added_shortcuts_fit_images_of_any_size(size: int):
    a = NARROW["mobilenetv1"]
    net = stochastic(Net(a.build(4, SIZE), a.places, (3, size, size), blocks=a.blocks), 0.5).eval()
    decide(net, [1.0] * 13)
    assert net(torch.zeros(1, 3, size, size)).logits.shape == (1, 4)


def test_shortcuts_added_to_a_float64_network_are_float64():
    net = stochastic(copy.deepcopy(plain("mobilenetv1")).double(), 0.5)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert net.eval()(images()).logits.dtype == torch.float64


@pytest.mark.parametrize("name", FAMILIES)
def test_the_original_stays_plain_and_shares_nothing(name: str):
    source = copy.deepcopy(plain(name)).eval()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in source.module.modules()]
    taps, before = dict(source.taps), state(source)
    x = images(2).float()
    expected = everything(source(x))
    net = stochastic(source, 0.5).eval()
    decide(net, [0.0] * len(net.blocks))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.5)
        net(x)
    assert not source.samples and source.depths == [] and source.stochastic is None
    assert source.taps == taps
    assert_equal(state(source), before)
    assert_equal(everything(source(x)), expected)
    now = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in source.module.modules()]
    assert now == hooks
    ours, theirs = ({t.data_ptr() for t in n.state_dict().values()} for n in (net, source))
    assert not ours & theirs
    net.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.module.modules())


def test_a_network_says_how_it_was_made():
    source = copy.deepcopy(plain("resnet8"))
    source.architecture = "resnet8"
    net = stochastic(source, 0.7, "last_half", "image")
    assert net.stochastic == {"p_end": 0.7, "scope": "last_half", "draw": "image"}
    assert net.architecture == "resnet8"
    assert stochastic(source, 1.0).stochastic == {"p_end": 1.0, "scope": "full", "draw": "batch"}
    assert net.input_shape == SIZE and net.num_classes == 4
    assert net.blocks == source.blocks and net.block_ends == source.block_ends
    default = stochastic(source, 0.7)
    assert default.stochastic == {"p_end": 0.7, "scope": "full", "draw": "batch"}
    close(net.depths[0].survival[1:], (0.8, 0.7))
    blocks = [net.module.get_submodule(path) for path in net.blocks]
    assert [block.extra_repr() for block in blocks] == ["", "survival=0.8", "survival=0.7"]


@both_modes
def test_mode_and_precision_are_kept(training: bool):
    """Those of added shortcuts are their block's."""
    source = copy.deepcopy(plain("mobilenetv1")).train(training)
    source.module.layer2[0].train(not training)
    source.precision = torch.bfloat16
    net = stochastic(source, 0.5)
    assert net.precision is torch.bfloat16
    assert {name for name, m in net.named_modules() if m.training is not training} == {
        name for name, _ in net.named_modules() if name.startswith("module.layer2.0")
    }


def test_block_ends_of_a_wide_resnet_are_kept():
    net = stochastic(plain("wrn_16_1"), 0.5)
    assert net.block_ends == plain("wrn_16_1").block_ends
    assert net.block_ends != net.blocks


# --- taps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n for n in MODELS if not n.endswith("_imagenet") and n not in REFUSED]
)
def test_taps_exist_whichever_blocks_are_dropped(name: str):
    """Of every network, all of whose weights are zero: drawing millions of them takes a second."""
    a, size = MODELS[name], 16 if name.endswith("mhgd") else 8
    with torch.device("meta"):
        module = a.build(4, (3, size, size))
    module.to_empty(device="cpu").requires_grad_(False)
    for x in (*module.parameters(), *module.buffers()):
        x.zero_()
    source = Net(module, a.places, (3, size, size), norms=a.norms, blocks=a.blocks)
    net = stochastic(source, 0.5, draw="image").eval()
    expected = {tap: (2, *shape) for tap, shape in source.shapes.items()}
    for survival in (net.depths[0].survival, [0.0] * len(net.blocks)):
        decide(net, survival)
        net.seed(0)
        found = net(torch.zeros(2, 3, size, size)).features
        assert {tap: tuple(value.shape) for tap, value in found.items()} == expected


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("resnet8", "layer2.0.conv2"),
        ("resnet8", "layer2.0.conv1:in"),
        ("resnet8", "layer3.0.bn2"),
        ("wrn_16_1", "layer2.0.conv1"),
        ("wrn_16_1_gkd", "layer1.1.relu2"),
        ("mobilenetv1", "layer2.0.relu2:in"),
        ("vgg8", "layer5.0.bn"),
    ],
)
def test_a_tap_inside_a_branch_is_refused_and_changes_nothing(name: str, place: str):
    said = (
        f"feature 'mine' ('{place}') is inside a block that a stochastic depth skips at times; "
        "tap where a block begins or ends"
    )
    net = made(name)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.module.modules()]
    taps, shapes, before = dict(net.taps), dict(net.shapes), state(net)
    with pytest.raises(TapError) as error:
        net.add_taps({"fine": "fc", "mine": place})
    assert str(error.value) == said
    assert (net.taps, net.shapes) == (taps, shapes)
    assert_equal(state(net), before)
    now = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.module.modules()]
    assert now == hooks
    net.seed(0)
    assert net(images()).features.keys() == taps.keys()
    source = copy.deepcopy(plain(name))
    source.add_taps({"mine": place})
    with pytest.raises(TapError) as error:
        stochastic(source, 0.5)
    assert str(error.value) == said
    assert source.eval()(images(2).float())["mine"].shape[0] == 2


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("resnet8", "layer2.0"),
        ("resnet8", "layer2.0:in"),
        ("resnet8", "layer2.0.downsample"),
        ("resnet8", "layer2.0.relu2:in"),
        ("wrn_16_1", "layer1.1.bn1"),
        ("wrn_16_1", "layer1.0.relu1:in"),
        ("wrn_16_1", "layer2.0.shortcut"),
        ("wrn_16_1_gkd", "layer2.0.relu1"),
        ("mobilenetv1", "layer2.0.shortcut.bn"),
        ("vgg8", "pool2"),
    ],
)
def test_a_tap_where_a_block_begins_or_ends_or_on_its_shortcut_is_there(name: str, place: str):
    net = made(name)
    net.add_taps({"mine": place})
    decide(net, [0.0] * len(net.blocks))
    assert net(images())["mine"].shape == (2, *net.shapes["mine"])


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "mobilenetv1"])
def test_taps_are_discovered_as_in_the_plain_network(name: str):
    """Proposed are only those that are there whichever blocks are dropped."""
    net = stochastic(plain(name), 0.5)
    found = Net.discover(net.module, SIZE)
    assert found == Net.discover(plain(name).module, SIZE)
    assert Net(net.module, found, SIZE).shapes.keys() == found.keys()


def test_a_tap_inside_a_block_outside_the_scope_is_there():
    source = copy.deepcopy(plain("resnet8"))
    source.add_taps({"mine": "layer1.0.conv2"})  # l = 1 of 3: not in the last half
    net = stochastic(source, 0.5, "last_half")
    assert net(images(2).float())["mine"].shape == (2, 16, 16, 16)
    with pytest.raises(TapError, match=r"feature 'mine' \('layer1.0.conv2'\) is inside a block"):
        stochastic(source, 0.5)


def test_with_p_end_1_every_place_of_a_native_network_can_be_tapped():
    net = stochastic(plain("resnet8"), 1.0)
    net.add_taps({"mine": "layer2.0.conv2"})
    assert net.shapes["mine"] == (32, 8, 8)


@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("mobilenetv1", {"stage4:pre": "layer4.5", "stage5:pre": "layer5.1"}),
        ("vgg8", {"stage2:pre": "layer3.0", "stage3:pre": "layer4.0", "stage4:pre": "layer5.0"}),
    ],
)
def test_taps_before_a_relu_that_ends_no_block_any_more_are_where_the_block_ends(
    name: str, late: dict[str, str]
):
    """In the scope; a block outside of it has its ReLU and its tap as before."""
    source, net = plain(name), stochastic(plain(name), 0.5, "last_half")
    assert net.taps == {**source.taps, **late}
    full = stochastic(plain(name), 0.5)
    for tap in source.taps:
        assert (full.taps[tap] in full.blocks) == tap.endswith(":pre")
        assert tap.endswith(":pre") or full.taps[tap] == source.taps[tap]
    assert full.stages("pre") == source.stages("pre")


@pytest.mark.parametrize("name", NATIVE)
def test_norms_of_native_networks_are_known_still(name: str):
    source, net = plain(name), stochastic(plain(name), 0.5)
    assert net.norms == source.norms and net.taps == source.taps
    for tap, path in source.norms.items():
        assert net.norm(tap) is net.module.get_submodule(path)


def test_norms_inside_blocks_that_end_in_a_sum_are_not_known_any_more():
    net = stochastic(plain("mobilenetv1"), 0.5)
    with pytest.raises(TapError) as error:
        net.norm("stage1:pre")
    assert str(error.value) == (
        "no BatchNorm is known right before the ReLU after 'stage1:pre' of this MobileNetV1; "
        "known: none; say which with Net(..., norms={tap: path})"
    )
    half = stochastic(plain("mobilenetv1"), 0.5, "last_half")
    assert sorted(half.norms) == ["stage1:pre", "stage2:pre", "stage3:pre"]
    assert half.norm("stage3:pre") is half.module.layer3[1].bn2


# --- refusals -----------------------------------------------------------------------------------


def refusal(*arguments: Any, **named: Any) -> str:
    with pytest.raises(NetworkError) as error:
        stochastic(*arguments, **named)
    return str(error.value)


@pytest.mark.parametrize("p_end", [0, 0.0, 1.5, -1, math.nan, "0.5"])
def test_an_end_that_is_no_probability_is_refused(p_end: Any):
    assert refusal(plain("resnet8"), p_end) == (
        f"p_end is {p_end!r}; it is the probability that the last block survives, a number above 0 "
        "and at most 1"
    )


def test_unknown_scopes_and_draws_are_refused():
    net = plain("resnet8")
    assert refusal(net, 0.5, "half") == "scope is 'half'; allowed: full, identity_only, last_half"
    assert refusal(net, 0.5, draw="epoch") == "draw is 'epoch'; allowed: batch, image, never"


FOR = (
    "stochastic depth is for the ResNets, WRNs, MobileNetV1 and VGGs of `potstill list models`, "
    "and for a Net(..., blocks=[...]) of your own whose blocks are each a ResidualBlock "
    "(potstill.depth) or an nn.Sequential"
)


def test_a_network_without_blocks_is_refused():
    net = Net(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), {}, (3, 2, 2))
    expected = f"no blocks are known of this Sequential, so none can be dropped: {FOR}"
    assert refusal(net, 0.5) == expected


def test_a_module_that_is_no_net_is_refused():
    assert refusal(plain("resnet8").module, 0.5) == (
        "a ResNet has no blocks that are known; wrap it in Net(..., blocks=[...]), which names "
        "them in forward order"
    )


def test_a_scope_without_blocks_is_refused():
    """Each of the three blocks is the first of its stage."""
    expected = "no block of this ResNet is in the scope 'identity_only'; choose another"
    assert refusal(plain("resnet_mhgd"), 0.5, "identity_only") == expected


UNKNOWN = f"does not say what is its branch and what its shortcut: {FOR}"


@pytest.mark.parametrize(
    ("name", "scope", "block", "kind", "of"),
    [
        ("shufflenetv1", "full", "layer1.0", "V1Unit", "ShuffleNetV1"),
        ("shufflenetv2", "full", "layer1.0", "V2DownUnit", "ShuffleNetV2"),
        ("shufflenetv2", "identity_only", "layer1.1", "V2Unit", "ShuffleNetV2"),
        ("mobilenetv2", "full", "layer1.0", "InvertedResidual", "MobileNetV2"),
    ],
)
def test_blocks_with_a_shortcut_that_cannot_be_told_are_refused(
    name: str, scope: str, block: str, kind: str, of: str
):
    said = f"block '{block}' of this {of}, of class {kind}, {UNKNOWN}"
    assert refusal(plain(name), 0.5, scope) == said


def test_a_stochastic_network_is_refused():
    for p_end in (0.5, 1.0):
        net = stochastic(plain("resnet8"), p_end)
        assert refusal(net, 0.5) == "this network is stochastic already; give the plain one"
    wrapped = Net(product(3, 5).module, {}, (1, 1, 1), blocks=["times3", "times5"])
    assert refusal(wrapped, 0.5) == "this network is stochastic already; give the plain one"


class Odd(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x - super().forward(x)


def one_block(block: nn.Module) -> Net:
    module = nn.Sequential(block, nn.Flatten(), nn.Linear(1, 2))
    return Net(module, {}, (1, 1, 1), blocks=["0"])


def test_a_line_with_a_forward_of_its_own_is_refused():
    expected = f"block '0' of this Sequential, of class Odd, {UNKNOWN}"
    assert refusal(one_block(Odd(nn.Conv2d(1, 1, 1))), 0.5) == expected


@pytest.mark.parametrize("name", ["shortcut", "branch", "line", "depth", "number", "join"])
def test_a_part_of_a_line_may_not_have_a_name_that_is_taken(name: str):
    line = nn.Sequential(OrderedDict({"conv": nn.Conv2d(1, 1, 1), name: nn.Conv2d(1, 1, 1)}))
    assert refusal(one_block(line), 0.5) == (
        f"block '0' of this Sequential has a part called '{name}', which it will have another of; "
        "rename it"
    )


def test_one_call_of_several_is_no_tap_where_the_calls_come_and_go():
    """A ReLU inside the branch and after the sum: without the branch its first call is another."""

    class Shared(ResidualBlock):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(1, 1, 1), nn.ReLU()

        def branch(self, x: Tensor) -> Tensor:
            return self.conv(self.relu(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.join(self.branch, x, x))

    module = nn.Sequential(Shared(), nn.Flatten(), nn.Linear(1, 2))
    net = Net(module, {"inner": "0.relu#0"}, (1, 1, 1), blocks=["0"])
    with pytest.raises(
        TapError, match=r"^feature 'inner' \('0.relu#0'\) is inside a block that a "
    ):
        stochastic(net, 0.5)


def test_a_normalisation_of_its_own_keeps_its_kind_of_number():
    normalize = ([2.0] * 3, [0.5] * 3)
    net = build("resnet8", 4, (3, 8, 8), normalize).to(torch.bfloat16)
    copied = stochastic(net, 0.5)
    for name in ("scale", "shift"):
        assert torch.equal(getattr(copied, name), getattr(net, name))
        assert getattr(copied, name).dtype == torch.bfloat16
        assert getattr(copied, name) is not getattr(net, name)


@pytest.mark.parametrize(
    ("line", "sizes"),
    [
        (nn.Conv2d(4, 4, 3), "4x6x6 of 4x8x8"),
        (nn.Upsample(scale_factor=2), "4x16x16 of 4x8x8"),
        (nn.Flatten(), "256 of 4x8x8"),
    ],
)
def test_a_line_whose_change_of_shape_no_convolution_has_is_refused(line: nn.Module, sizes: str):
    parts = {"line": nn.Sequential(line), "flatten": nn.Flatten(), "fc": nn.LazyLinear(2)}
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(OrderedDict(parts)))
    module(torch.zeros(1, 3, 8, 8))
    net = Net(module, {}, (3, 8, 8), blocks=["1.line"])
    assert refusal(net, 0.5) == (
        f"block '1.line' of this Sequential makes {sizes}, which no 1x1 convolution does, so it "
        "can be given no shortcut; leave it out of blocks"
    )


def test_a_line_that_overwrites_what_its_shortcut_reads_is_refused():
    line = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
    module = nn.Sequential(nn.Conv2d(3, 3, 1), line, nn.Flatten(), nn.Linear(12, 2))
    net = Net(module, {}, (3, 2, 2), blocks=["1"])
    hooks = len(line._forward_hooks) + len(line._forward_pre_hooks)
    assert refusal(net, 0.5) == (
        "block '1' of this Sequential overwrites its input in place, which its shortcut reads; "
        "build it with inplace=False"
    )
    assert len(line._forward_hooks) + len(line._forward_pre_hooks) == hooks


def test_a_block_that_never_runs_is_refused():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x.flatten(1))

    net = Net(Half(), {}, (1, 1, 2), blocks=["used", "idle"])
    expected = "block 'idle' never runs in a forward; leave it out of blocks"
    assert refusal(net, 0.5) == expected


def test_a_block_that_is_named_twice_is_refused():
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(TapError) as error:
        Net(module, {}, (3, 2, 2), blocks=["1", "0", "1"])
    assert str(error.value) == "blocks name '1' more than once; name each block once"


# --- copies, precision, layout, normalisation ---------------------------------------------------


def copied(net: Net, how: str) -> Net:
    if how == "pickle":
        return pickle.loads(pickle.dumps(net))
    return shared_copy(net) if how == "shared" else copy.deepcopy(net)


every_copy = pytest.mark.parametrize("how", ["deepcopy", "pickle", "shared"])


@every_copy
def test_a_copy_draws_on_its_own(how: str):
    net = product(*PRIMES)
    twin = copied(net, how)
    assert twin.stochastic == net.stochastic and twin.samples
    net.seed(0), twin.seed(0)
    first = net(one_pixel()).logits
    assert torch.equal(twin(one_pixel()).logits, first)
    twin.seed(1)
    assert not torch.equal(twin(one_pixel()).logits, first)
    assert torch.equal(net(one_pixel()).logits, first)
    decide(twin, [0.0] * 6)
    assert twin(one_pixel()).logits.item() == 1
    assert torch.equal(net(one_pixel()).logits, first)
    shares = {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in net.parameters()}
    assert shares == (how == "shared")


@every_copy
def test_a_copy_is_at_the_expected_depth_while_the_original_is_drawn(how: str):
    """It runs in the middle of the original's forward: 7.5 within 15."""
    net, found = product(3, 5), []
    twin = copied(net, how)
    decide(net, (1, 1))
    net.module.flatten.register_forward_hook(lambda *_: found.append(twin.logits(one_pixel())))
    assert net(one_pixel()).logits.item() == 15
    assert [x.item() for x in found] == [7.5]


@both_draws
def test_a_network_can_be_taken_to_another_type(draw: str):
    """The draws are the same ones."""
    net = stochastic(plain("wrn_16_1"), 0.5, draw=draw).eval()
    twin = copy.deepcopy(net).to(torch.float64)
    for seed in range(3):
        net.seed(seed), twin.seed(seed)
        one, other = net(images().float()).logits, twin(images()).logits
        assert (one.dtype, other.dtype) == (torch.float32, torch.float64)
        close(one.double(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "mobilenetv1"])
@both_draws
def test_half_precision_is_the_same_network(name: str, draw: str):
    """Features in bfloat16 whoever is dropped, logits in float32."""
    net = stochastic(plain(name), 0.5, draw=draw).eval()
    draw_until(net, 4, lambda alive: alive.any() and not alive.all())
    x = images(4).float()
    with torch.no_grad():
        full = net(x)
        net.precision = torch.bfloat16
        half = net(x)
    assert half.logits.dtype == torch.float32
    assert {f.dtype for f in half.features.values()} == {torch.bfloat16}
    assert not torch.equal(half.logits, full.logits)
    assert (half.logits - full.logits).norm() < 0.05 * full.logits.norm()


class Mixed(ResidualBlock):
    """Under autocast either the branch is float32 and the shortcut bfloat16, or the reverse."""

    def __init__(self, full: str) -> None:
        super().__init__()
        self.full, self.one, self.other = full, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.other(x)
        return self.join(self.branch, x, shortcut.float() if self.full == "shortcut" else shortcut)

    def branch(self, x: Tensor) -> Tensor:
        return self.one(x).float() if self.full == "branch" else self.one(x)


@pytest.mark.parametrize("full", ["branch", "shortcut"])
def test_a_sum_of_two_precisions_is_the_wider_one(full: str):
    """As branch + shortcut is: with one image of two alive as with both."""
    module = nn.Sequential(Mixed(full), nn.Flatten(), nn.Linear(12, 2))
    source = Net(module, {"sum": "0", "shortcut": "0.other"}, (3, 2, 2), blocks=["0"])
    net = stochastic(source, 0.5, draw="image")
    source.precision = net.precision = torch.bfloat16
    alive = draw_until(net, 2, lambda alive: alive.sum() == 1).flatten()
    x = torch.randn(2, 3, 2, 2)
    found, expected = net(x).features, source(x).features
    assert found["sum"].dtype == expected["sum"].dtype == torch.float32
    assert found["shortcut"].dtype == torch.bfloat16
    close(found["sum"][alive], expected["sum"][alive])
    assert torch.equal(found["sum"][~alive], expected["shortcut"][~alive].float())


@both_draws
def test_layouts_do_not_matter(draw: str):
    net = made("wrn_16_1", draw=draw)
    draw_until(net, 4, lambda alive: alive.any() and not alive.all())
    net.channels_last = False
    contiguous = everything(net(images(4)))
    net.to(memory_format=torch.channels_last).channels_last = True
    found = everything(net(images(4)))
    assert all(
        x.is_contiguous(memory_format=torch.channels_last) for x in found.values() if x.dim() == 4
    )
    assert_close(found, contiguous)


def test_a_normalisation_of_its_own_is_kept():
    scale, shift = [2.0, 0.5, 3.0], [0.1, -0.2, 0.3]
    source = build("resnet8", 4, SIZE, normalize=(scale, shift)).eval()
    net = stochastic(source, 0.5)
    decide(net, [1.0] * 3)
    x = images().float()
    assert torch.equal(net(x).logits, source(x).logits)
    assert net.scale.flatten().tolist() == scale
    close(net.shift.flatten().tolist(), shift)
    assert net.scale is not source.scale
    assert stochastic(plain("resnet8"), 0.5).scale is None


# --- blocks of one's own ------------------------------------------------------------------------


class Own(nn.Module):
    """Neither a Sequential nor with our names: a stem, two blocks that are given, a head."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.head, self.second, self.first = nn.Linear(4, 2), second, first  # in another order
        self.stem = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(torch.tanh(self.stem(x))))
        return self.head(h.amax((2, 3)))


class Gate(ResidualBlock):
    """sigmoid(conv(x) + x)"""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.end = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.join(self.conv, x, x))


def own(first: nn.Module, second: nn.Module, **arguments: Any) -> Net:
    torch.manual_seed(0)
    taps = {"a": "first", "b": "second"}
    net = Net(Own(first, second), taps, (3, 8, 8), blocks=["first", "second"])
    return stochastic(net, 0.5, **arguments).eval()


@pytest.mark.parametrize("b", [(0, 0), (0, 1), (1, 0), (1, 1), (0.75, 0.5)])
@pytest.mark.parametrize("derived", [True, False], ids=["ResidualBlock", "Sequential"])
def test_blocks_of_ones_own(derived: bool, b: tuple[float, float]):
    """(0.75, 0.5) is p: the expected depth. A derived block has what it does after the sum."""
    blocks = [Gate() if derived else nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()) for _ in range(2)]
    net = own(*blocks)
    m, x = net.module, torch.randn(2, 3, 8, 8)
    h, expected = torch.tanh(m.stem(x)), {}
    for name, strength, block in zip("ab", b, (m.first, m.second), strict=True):
        if derived:
            h = torch.sigmoid(strength * block.conv(h) + h)
        else:
            h = strength * torch.tanh(block.get_submodule("0")(h)) + h
        expected[name] = h
    if b == (0.75, 0.5):
        found = net.capture(x)
    else:
        decide(net, b)
        found = net(x)
    for name in "ab":
        close(found[name], expected[name])
    close(found.logits, m.head(h.amax((2, 3))))


def test_a_line_of_ones_own_that_changes_the_shape_is_given_a_projection():
    torch.manual_seed(0)
    line = nn.Sequential(nn.MaxPool2d((2, 1)))
    net = own(nn.Sequential(nn.Conv2d(4, 4, 1)), line)
    decide(net, (0, 0))
    x = torch.randn(2, 3, 8, 8)
    found = net(x)
    shortcut = net.module.second.shortcut
    assert shortcut.conv.stride == (2, 1)
    stem = torch.tanh(net.module.stem(x))
    close(found["b"], shortcut.bn(F.conv2d(stem, shortcut.conv.weight, stride=(2, 1))))


def test_numbers_follow_the_blocks_that_are_named_and_not_their_place():
    """`second` is defined before `first`: p_1 is that of the block that is named first."""
    net = own(Gate(), Gate())
    assert net.module.first.extra_repr() == "survival=0.75"
    assert net.module.second.extra_repr() == "survival=0.5"


def test_a_block_alone_is_a_plain_sum():
    """Without a depth, `join` is branch + shortcut, and says nothing of itself."""
    block = Times(3)
    assert block(one_pixel()).item() == 3 and block.extra_repr() == ""
    block.depth = Depth([0.25], "batch")
    assert block(one_pixel()).item() == 1.5
