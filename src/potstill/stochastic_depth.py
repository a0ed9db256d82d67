"""Stochastic networks: many teachers from one.

Nguyen, Lee, Shim, Stochasticity and Skip Connection Improve Knowledge Transfer, EUSIPCO 2020. A
network whose blocks are dropped at random is a collection of networks; as a teacher it is another
one of them at every batch. What the paper leaves open follows Huang et al., Deep Networks with
Stochastic Depth, ECCV 2016, arXiv:1603.09382.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from potstill.depth import Depth, Draw, ResidualBlock, linear_decay
from potstill.errors import NetworkError, by
from potstill.net import Net

Scope = Literal["full", "identity_only", "last_half"]


class WithShortcut(ResidualBlock):
    """A line of parts that had no shortcut, and one that is added. (B, C, H, W) -> (B, C', H', W')

    The parts keep their names. No activation follows the sum.
    """

    def __init__(self, parts: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.line = tuple(parts._modules)
        for name, part in parts._modules.items():
            self.add_module(name, part)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.branch, x, self.shortcut(x))

    def branch(self, x: Tensor) -> Tensor:
        """The parts, one after the other."""
        for name in self.line:
            x = self._modules[name](x)  # type: ignore[misc]
        return x


class _Sizes(NamedTuple):
    """Of what goes into a block and of what comes out, (C, H, W)."""

    inside: torch.Size
    outside: torch.Size

    @property
    def kept(self) -> bool:
        """Whether the block changes neither channels nor size."""
        return self.inside == self.outside


def stochastic(net: Net, p_end: float, scope: Scope = "full", draw: Draw = "batch") -> Net:
    """A copy of a network whose residual blocks are alive with some probability only.

    h_l = end(b_l f_l(h_{l-1}) + s_l(h_{l-1})),  b_l ~ Bernoulli(p_l),  p_l = 1 - l / L (1 - p_end)

    Block l = 1..L of the whole network has branch f_l, shortcut s_l and whatever follows their sum.
    Every call of the network itself, in train and in eval mode, is of a sub-network: what is
    dropped is not run, and nothing is rescaled. Its `predictor()` is at the expected depth, with
    p_l in place of b_l, and so is every evaluation. `draw` is "batch" for one sub-network a batch,
    "image" for one an image, "never" for the expected depth everywhere, the usual baseline.

    `scope` "identity_only" keeps the blocks that change their input's shape, "last_half" those with
    l <= L / 2; p_l counts all. Blocks without a shortcut (MobileNetV1, VGG) are given one where
    they are in the scope: the identity, or 1x1 convolution and BatchNorm where the shape changes.
    Their outputs are sums that no ReLU follows, so taps before that ReLU (`stage1:pre`) are the
    sums as well.

    >>> from potstill.models import build
    >>> net = stochastic(build("resnet8", 10), p_end=0.5)
    >>> [round(p, 4) for p in net.depths[0].survival]
    [0.8333, 0.6667, 0.5]

    Raises NetworkError for a network whose blocks are not known, have a shortcut inside that cannot
    be told from the branch, or are stochastic already; TapError for a tap inside a block.
    """
    kind = _require(net, p_end, scope, draw)
    chosen = _in_scope(_sizes(net), scope)
    if not chosen:
        raise NetworkError(f"no block of this {kind} is in the scope '{scope}'; choose another")
    made = copy.deepcopy(net)
    made.close()
    module = made.module
    depth = Depth(
        [p if i in chosen else 1.0 for i, p in enumerate(linear_decay(len(net.blocks), p_end))],
        draw,
        {"p_end": p_end, "scope": scope, "draw": draw},
    )
    added = []
    for number, sizes in chosen.items():
        path = net.blocks[number]
        block = module.get_submodule(path)
        if not isinstance(block, ResidualBlock):
            block = _with_shortcut(block, sizes, f"block '{path}' of this {kind}")
            module.set_submodule(path, block)
            added.append(path)
        block.depth, block.number = depth, number
    found = Net(
        module,
        _outside(net.taps, added),
        net.input_shape,
        norms={tap: path for tap, path in net.norms.items() if not _inside(path, added)},
        blocks=net.blocks,
        block_ends=net.block_ends,
    )
    for kept in ("architecture", "precision", "training", "scale", "shift"):
        setattr(found, kept, getattr(made, kept))
    return found


def _require(net: Net, p_end: float, scope: str, draw: str) -> str:
    """Refuse what does not fit; the kind of the network's module."""
    if not isinstance(net, Net):
        raise NetworkError(
            f"a {type(net).__name__} has no blocks that are known; wrap it in Net(..., "
            "blocks=[...]), which names them in forward order"
        )
    if not isinstance(p_end, (int, float)) or not 0 < p_end <= 1:
        raise NetworkError(
            f"p_end is {p_end!r}; it is the probability that the last block survives, a number "
            "above 0 and at most 1"
        )
    for name, given, allowed in (("scope", scope, Scope), ("draw", draw, Draw)):
        if given not in get_args(allowed):
            raise NetworkError(f"{name} is {given!r}; allowed: {', '.join(get_args(allowed))}")
    if net.stochastic is not None:
        raise NetworkError("this network is stochastic already; give the plain one")
    kind = type(net.module).__name__
    if not net.blocks:
        raise NetworkError(f"no blocks are known of this {kind}, so none can be dropped: {_FOR}")
    return kind


_FOR = (
    "stochastic depth is for the ResNets, WRNs, MobileNetV1 and VGGs of `potstill list models`, "
    "and for a Net(..., blocks=[...]) of your own whose blocks are each a ResidualBlock "
    "(potstill.depth) or an nn.Sequential"
)


def _sizes(net: Net) -> list[_Sizes]:
    """Of every block, found by running once.

    Raises NetworkError for a block that writes into what it is given: its shortcut reads that too.
    """
    seen: dict[str, _Sizes] = {}
    versions: dict[str, int] = {}

    def before(path: str) -> Callable[[nn.Module, Any], None]:
        return lambda block, args: versions.update({path: args[0]._version})

    def after(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(block: nn.Module, args: Any, out: Tensor) -> None:
            seen[path] = _Sizes(args[0].shape[1:], out.shape[1:])
            if args[0]._version != versions[path]:
                raise NetworkError(
                    f"block '{path}' of this {type(net.module).__name__} overwrites its input in "
                    "place, which its shortcut reads; build it with inplace=False"
                )

        return note

    handles = []
    for path in net.blocks:
        block = net.module.get_submodule(path)
        handles += [block.register_forward_pre_hook(before(path))]
        handles += [block.register_forward_hook(after(path))]
    try:
        net.probe()
    finally:
        for handle in handles:
            handle.remove()
    if idle := [path for path in net.blocks if path not in seen]:
        raise NetworkError(f"block '{idle[0]}' never runs in a forward; leave it out of blocks")
    return [seen[path] for path in net.blocks]


def _in_scope(sizes: Sequence[_Sizes], scope: str) -> dict[int, _Sizes]:
    """Numbers of the blocks that may be dropped, with their sizes."""
    return {
        i: size
        for i, size in enumerate(sizes)
        if scope == "full"
        or (scope == "identity_only" and size.kept)
        or (scope == "last_half" and 2 * (i + 1) > len(sizes))
    }


def _with_shortcut(block: nn.Module, sizes: _Sizes, which: str) -> WithShortcut:
    line = isinstance(block, nn.Sequential) and type(block).forward is nn.Sequential.forward
    if not line:
        raise NetworkError(
            f"{which}, of class {type(block).__name__}, does not say what is its branch and what "
            f"its shortcut: {_FOR}"
        )
    taken = [name for name in block._modules if name in _TAKEN or hasattr(ResidualBlock, name)]
    if taken:
        raise NetworkError(
            f"{which} has a part called '{taken[0]}', which it will have another of; rename it"
        )
    shortcut = nn.Identity() if sizes.kept else _projection(sizes, which)
    found = WithShortcut(block, shortcut)
    like = next(block.parameters(), None)
    if like is not None:
        shortcut.to(like)
    shortcut.train(block.training)
    found.training = block.training
    return found


_TAKEN = ("line", "branch", "shortcut")


def _projection(sizes: _Sizes, which: str) -> nn.Module:
    """1x1 convolution and BatchNorm between two sizes of a map."""
    if len(sizes.inside) == len(sizes.outside) == 3:
        (channels, *before), (width, *after) = sizes.inside, sizes.outside
        stride = [max(1, round(a / b)) for a, b in zip(before, after, strict=True)]
        if [(a - 1) // s + 1 for a, s in zip(before, stride, strict=True)] == after:
            convolution = nn.Conv2d(channels, width, 1, tuple(stride), bias=False)  # type: ignore[arg-type]
            return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(width)))
    raise NetworkError(
        f"{which} makes {by(sizes.outside)} of {by(sizes.inside)}, which no 1x1 convolution does, "
        "so it can be given no shortcut; leave it out of blocks"
    )


def _inside(path: str, blocks: Sequence[str]) -> str | None:
    """The block that a path is strictly inside of."""
    return next((block for block in blocks if path.startswith(f"{block}.")), None)


def _outside(taps: Mapping[str, str], added: Sequence[str]) -> dict[str, str]:
    """Taps before a ReLU that no longer ends its block are moved to where the block ends."""
    return {
        name: _inside(place, added) or place if name.endswith(":pre") else place
        for name, place in taps.items()
    }
