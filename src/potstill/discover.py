"""Taps proposed for any image classifier, from how values flow through one forward of it.

A feature worth distilling is one that the whole prediction is computed from. Every operation of a
forward is recorded, which gives the flow of values from the image to the logits. A *cut* is a value
that all of this flow passes through, as it does through the end of a block or the residual stream
of a transformer, and not through a branch, a gate, an attention matrix or an MLP's hidden layer.
Of the cuts that a module takes or gives, one is proposed for each resolution.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from potstill.net import Net


def discover(module: nn.Module, input_shape: Sequence[int] = (3, 32, 32)) -> dict[str, str]:
    """Taps for a classifier that has no table of them, in forward order.

    `stage1`, `stage2`, ... are maps (B, C, H, W) and `tokens1`, `tokens2`, ... are tokens
    (B, N, D): of each resolution the last value that the whole prediction is computed from and
    that can be tapped in train and in eval mode, a map or tokens. `embed` is the vector that the
    last weights read. What has no such value is left out. The module stays as it was.

    >>> discover(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(True), nn.Flatten(), nn.Linear(288, 5)),
    ...          input_shape=(3, 8, 8))
    {'stage1': '1', 'embed': '3:in'}

    Raises NetworkError where the module cannot take `input_shape` or does not return logits (B, K).
    """
    net = _Untapped(module, {}, input_shape)
    flow, in_training = _trace(net, training=False), _trace(net, training=True)
    names = _names(flow, in_training)
    cuts = _cuts(flow, names)
    taps: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for end in _ends(_chain(cuts, input_shape), flow):
        kind = "stage" if len(end.shape) == 4 else "tokens"
        counts[kind] += 1
        taps[f"{kind}{counts[kind]}"] = names[end.places[0]]
    embed = _embed(cuts, flow, names, net.classifier_path)
    return taps if embed is None else {**taps, "embed": names[embed]}


class _Untapped(Net):
    """A Net that checks its module and finds the classifier, but captures nothing."""

    def _install(self, name: str, target: Any) -> None:
        """No hook, not even that of "embed"."""

    def _check(self, tape: Any) -> None:
        """Nothing was captured."""


class _Place(NamedTuple):
    """The input or output of one call of a module."""

    path: str
    of_input: bool
    call: int


class _Sight(NamedTuple):
    """The tensor that was seen at a place."""

    node: int
    """Its value in the flow; -1 where it does not depend on the image."""
    shape: torch.Size
    intact: bool
    """No later operation wrote into it."""


class _Cut(NamedTuple):
    """A value that the whole prediction is computed from, seen at a module's border."""

    node: int
    weights: int
    """How many operations with weights are behind it."""
    shape: torch.Size
    places: list[_Place]
    """Where it can be tapped, outputs first and outermost first; may be empty."""


class _Link(NamedTuple):
    """A cut that has positions."""

    cut: _Cut
    grid: int
    """The same for cuts of the same resolution."""
    learned: bool
    """Weights made it, not only pooling or reordering of a cut with other positions."""
    readable: bool
    """(B, C, H, W) or (B, N, D), not (B, H, W, C) or a single position."""


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which value is computed from which, from the image to the logits.

    Values are numbered as they are computed. A view is a value of its own, so that half of the
    channels is not taken for all of them, and so is what a tensor holds after it was written into.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[tuple[str, bool]] = Counter()
        self.sights: dict[_Place, _Sight] = {}
        self.logits = -1
        self._sources: list[set[int]] = []  # of each value, the values that it is computed from
        self._weighted: list[bool] = []  # of each value, whether weights take part in it
        self._nodes: dict[int, dict[Any, int]] = {}  # by storage, then view; None for other views
        self._weights = {_view(x) for x in weights}
        self._kept: list[Tensor] = []  # an address names one storage only while none is freed

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = _tensors((args, kwargs))  # looked up before they are written into
        sources = {node for x in given if (node := self.node_of(x)) >= 0}
        weights = [x for x in given if _view(x) in self._weights]
        result = function(*args, **(kwargs or {}))
        made = _tensors(result)
        self._kept += made
        if sources:
            scales = torch.Tag.pointwise in function.tags  # a scale or offset learns no feature
            weighted = not scales and any(x.dim() > 1 for x in weights)
            for x in made:
                self._add(x, sources, weighted, function._schema.is_mutable)
        elif weights:  # as of weight normalisation, or a cast
            self._weights.update(_view(x) for x in made)
        return result

    def begin(self, image: Tensor) -> None:
        """The flow starts here."""
        self._add(image, set())

    def node_of(self, x: Tensor) -> int:
        """The value that a tensor holds at this moment; -1 if it does not depend on the image."""
        storage, view = _view(x)
        views = self._nodes.get(storage, {})
        return views.get(view, views.get(None, -1))

    def node_at(self, place: _Place) -> int:
        """The value that was seen at a place; -1 for none."""
        return self.sights[place].node if place in self.sights else -1

    def cuts(self) -> dict[int, int]:
        """The values that all of the flow passes through, each with the weights behind it."""
        needed = {self.logits}
        last_use: dict[int, int] = {}
        for node in reversed(range(len(self._sources))):
            if node in needed:
                needed |= self._sources[node]
                for source in self._sources[node]:
                    last_use.setdefault(source, node)
        cuts, weights, reach = {}, 0, 0
        for node in sorted(needed - {-1}):
            weights += self._weighted[node]
            if reach <= node:  # nothing from before is used after it
                cuts[node] = weights
            reach = max(reach, last_use.get(node, node))
        return cuts

    def _add(
        self, x: Tensor, sources: set[int], weighted: bool = False, written: bool = False
    ) -> None:
        storage, view = _view(x)
        views = self._nodes.setdefault(storage, {})
        if view in views and not written:  # the same elements once more, as by detach()
            return
        node = len(self._sources)
        self._sources.append(sources)
        self._weighted.append(weighted)
        if written:
            views.clear()
            views[None] = node
            if x.numel() * x.element_size() < x.untyped_storage().nbytes():
                self._add(x, {node})  # what was written into is only a part of that
                return
        views[view] = node


def _view(x: Tensor) -> tuple[int, Any]:
    """Which storage, and which elements of it."""
    return x.untyped_storage()._cdata, (x.storage_offset(), x.shape, x.stride())


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _trace(net: Net, training: bool) -> _Flow:
    """One forward of two images: the flow, and the tensor at every place."""
    flow = _Flow([*net.module.parameters(), *net.module.buffers()])
    seen: dict[_Place, tuple[Tensor, int, int]] = {}

    def see(path: str, of_input: bool, x: Any) -> None:
        place = _Place(path, of_input, flow.calls[path, of_input])
        flow.calls[path, of_input] += 1
        if isinstance(x, Tensor) and x.is_floating_point():
            seen[place] = x, flow.node_of(x), x._version

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter([*args, *kwargs.values()]), None)
            if not path and isinstance(x, Tensor):
                flow.begin(x)
            see(path, True, x)

        return hook

    def after(path: str) -> Callable[..., None]:
        return lambda module, args, output: see(path, False, output)

    handles = []
    try:
        for path, module in net.module.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path)))
        with flow:
            logits = net._try_out(training)
    finally:
        for handle in handles:
            handle.remove()
    flow.logits = flow.node_of(logits)
    flow.sights = {
        place: _Sight(node, x.shape, x._version == version)
        for place, (x, node, version) in seen.items()
    }
    return flow


def _names(flow: _Flow, in_training: _Flow) -> dict[_Place, str]:
    """How to write each place at which Net takes a tap, which it tries out in both modes."""
    names = {}
    for place, sight in flow.sights.items():
        path, of_input, call = place
        other = in_training.sights.get(place)
        if other is None or other.shape != sight.shape or not (sight.intact and other.intact):
            continue
        if path and not {":", "#"} & set(path):
            once = flow.calls[path, of_input] == in_training.calls[path, of_input] == 1
            names[place] = f"{path}{':in' if of_input else ''}{'' if once else f'#{call}'}"
    return names


def _cuts(flow: _Flow, names: Mapping[_Place, str]) -> list[_Cut]:
    """The cuts that a module takes or gives, between the first weights and the last, in order."""
    weights = flow.cuts()
    last = max(weights.values(), default=0)
    places: dict[tuple[int, torch.Size], list[_Place]] = {}
    for place, (node, shape, _) in flow.sights.items():
        if 0 < weights.get(node, 0) < last:
            here = places.setdefault((node, shape), [])
            here += [place] if place in names else []
    for here in places.values():
        here.sort(key=lambda place: (place.of_input, place.path.count(".")))
    return [_Cut(node, weights[node], shape, places[node, shape]) for node, shape in sorted(places)]


def _chain(cuts: Sequence[_Cut], input_shape: Sequence[int]) -> list[_Link]:
    """The cuts that have positions, sorted into grids of them.

    A new grid begins where the number of positions halves or doubles: a border that a convolution
    cuts off, or a class token, is no new resolution.
    """
    chain: list[_Link] = []
    grids: dict[int, int] = {}  # by number of positions, as are the weights behind the last one
    weights: dict[int, int] = {}
    before = 0
    for cut in cuts:
        count, in_order = _positions(cut.shape, input_shape)
        grown = before < count < 2 * before
        if count == 0 or (grown and len(cut.shape) == 4):  # padded, or windows that look like it
            continue
        same = max(count, before) < 2 * min(count, before)
        grids.setdefault(count, grids[before] if same else len(grids))
        before = count
        learned = cut.weights > max((w for n, w in weights.items() if n != count), default=0)
        weights[count] = cut.weights
        chain.append(_Link(cut, grids[count], learned, in_order and count > 1))
    return chain


def _positions(shape: torch.Size, input_shape: Sequence[int]) -> tuple[int, bool]:
    """How many positions two images' tensor has, H * W or N, and whether its axes are in order.

    Of (B, C, H, W) and (B, H, W, C) it is the one with the image's proportions. If neither has
    them, as attention windows (B, windows, N, D), there are no positions.
    """
    if len(shape) == 4 and shape[0] == 2:
        *_, height, width = input_shape
        limit = 0.0 if height == width else math.log(2)  # a small map's sides are rounded
        _, one, two, three = shape
        first, last = _skew(two, three, height / width), _skew(one, two, height / width)
        if min(first, last) > limit:
            return 0, False
        return (two * three, True) if first <= last else (one * two, False)
    if len(shape) == 3 and 2 in shape[:2]:
        return (shape[1], True) if shape[0] == 2 else (shape[0], False)
    return 0, False


def _skew(height: int, width: int, proportion: float) -> float:
    """How far a map is from a proportion of its sides, as the logarithm of a factor."""
    return abs(math.log(height / width / proportion))


def _ends(chain: Sequence[_Link], flow: _Flow) -> list[_Cut]:
    """The last good cut of every grid, in forward order.

    A good one can be tapped and read, is learned, comes late in its grid and is not yet within the
    module that leads to the next grid.
    """
    late = _late(chain)
    good = [x for x in chain if x.cut.places and x.learned and x.readable and x.cut.node in late]
    nodes = {link.cut.node for link in good}
    last = {link.grid: link.cut for link in good if not _leads_on(link, chain, nodes, flow)}
    return sorted(last.values())


def _late(chain: Sequence[_Link]) -> set[int]:
    """The cuts with at least half of their grid's weights behind them."""
    entry: dict[int, int] = {}
    end: dict[int, int] = {}
    before = 0
    for cut, grid, *_ in chain:
        entry.setdefault(grid, before)
        end[grid] = before = cut.weights
    return {cut.node for cut, grid, *_ in chain if 2 * cut.weights >= entry[grid] + end[grid]}


def _leads_on(link: _Link, chain: Sequence[_Link], good: Container[int], flow: _Flow) -> bool:
    """Whether a cut is within a module from its grid to the next one.

    Such a block or transition may activate or widen what it takes, before it strides. The end of
    the grid is what it takes, if that is as good.
    """
    cut, grid, *_ = link
    after = [x.grid for x in chain if x.cut.node > cut.node and x.grid != grid and x.learned]
    following = after[0] if after else -1
    grids = {link.cut.node: link.grid for link in chain}
    parts = cut.places[0].path.split(".")
    for path in (".".join(parts[:n]) for n in range(1, len(parts))):
        for call in range(flow.calls[path, True]):
            taken, given = (flow.node_at(_Place(path, end, call)) for end in (True, False))
            around = taken in good and taken < cut.node < given
            if around and (grids[taken], grids.get(given)) == (grid, following):
                return True
    return False


def _embed(
    cuts: Sequence[_Cut], flow: _Flow, names: Container[_Place], classifier: str | None
) -> _Place | None:
    """Where the vector is that the last weights read."""
    if classifier is not None:
        for call in range(flow.calls[classifier, False]):
            place = _Place(classifier, True, call)
            gives_logits = flow.node_at(place._replace(of_input=False)) == flow.logits
            if gives_logits and place in names:
                return place
    vectors = [cut.places[0] for cut in cuts if cut.places and _is_vector(cut.shape)]
    return vectors[-1] if vectors else None


def _is_vector(shape: torch.Size) -> bool:
    """(B, D) or (B, D, 1, 1), for a batch of two."""
    return shape[0] == 2 and tuple(shape[2:]) in ((), (1, 1))
