"""What a network is made of: its layers and taps, their sizes, and what one image costs.

Sizes come from one forward in evaluation mode: of our own networks without any arithmetic, of
others on the CPU. A multiply-add counts as two FLOPs, and those of convolutions and linear layers
(any matrix product) are all that is counted, as in the published tables.
"""

from __future__ import annotations

import statistics
import textwrap
import time
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from potstill.errors import NetworkError, by, first_line
from potstill.evaluate import eval_mode
from potstill.listing import columns
from potstill.models import MODELS, build
from potstill.models.architecture import Kind
from potstill.net import _parse

IMAGES = 2
"""In the forward that is watched: with one, `squeeze` would take the axis of images too."""
WARM_UPS, REPETITIONS = 3, 20
"""Of a forward that is timed."""
LINES = 60
"""A tree of more is folded."""


@dataclass(frozen=True)
class Layer:
    """A module by its path, and what one forward showed of it."""

    path: str
    type: str
    sizes: str
    """Where blocks of one kind may differ: "16->32"."""
    settings: str
    """Where they may not: "3x3 /2"."""
    output: tuple[int, ...] | None
    """Shape for one image; None where it never runs or gives no tensor."""
    parameters: int
    """Of all that is in it."""
    calls: int
    """How often it runs."""

    def __str__(self) -> str:
        """ "Conv2d 16->32 3x3 /2" """
        often = f", runs {self.calls} times" if self.calls > 1 else ""
        return _join(self.type, self.sizes, self.settings) + often


@dataclass(frozen=True)
class Tapped:
    """A tap, and what is known of it."""

    place: str
    """As `Net` reads it."""
    shape: tuple[int, ...]
    """For one image."""
    kind: Kind | None = None
    """None where nobody has said."""
    norm: str | None = None
    """Path of the BatchNorm right before the ReLU that follows, where one is known."""


@dataclass(frozen=True)
class Anatomy:
    """A network's size, its layers in the order of their definition, and its taps."""

    name: str
    description: str
    input_shape: tuple[int, ...]
    classes: int
    parameters: int
    flops: int
    """Of one image."""
    layers: Sequence[Layer]
    taps: Mapping[str, Tapped]
    blocks: Sequence[str]

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.flops // 2


def examine(name: str, num_classes: int = 100, input_shape: Sequence[int] | None = None) -> Anatomy:
    """The anatomy of a network by name; the name is as for `potstill.build`.

    >>> found = examine("wrn_16_2")
    >>> found.parameters, found.macs, found.taps["stage2:pre"].shape
    (703284, 101118464, (64, 16, 16))

    Raises NetworkError as `build` does.
    """
    if name in MODELS:
        known, classes, blocks = MODELS[name], num_classes, MODELS[name].blocks
        description, shape = known.description, tuple(input_shape or known.input_shape)
        try:
            with torch.device("meta"), _ShapesOnly():
                module = known.build(num_classes, shape)
                flops, calls = _watch(module, shape)
        except (RuntimeError, ValueError) as error:
            raise NetworkError(
                f"{name} cannot take images of {shape} (channels, height, width): "
                f"{first_line(error)}"
            ) from error
        taps = {
            tap: Tapped(place, _shape_at(place, calls), kind, norm)
            for tap, (place, kind, norm) in known.taps.items()
        }
    else:
        net = build(name, num_classes, input_shape)
        module, shape, classes, blocks = net.module, net.input_shape, net.num_classes, net.blocks
        description = type(module).__name__
        with _countable():
            flops, calls = _watch(module, shape)
        taps = {
            tap: Tapped(place, tuple(net.shapes[tap]), None, net.norms.get(tap))
            for tap, place in net.taps.items()
        }
    layers = [
        _layer(path, part, calls[path])
        for path, part in module.named_modules(remove_duplicate=False)
        if path
    ]
    return Anatomy(name, description, shape, classes, _size(module), flops, layers, taps, blocks)


@torch.no_grad()
def flops_of(module: nn.Module, input_shape: Sequence[int]) -> int:
    """FLOPs of one image through any module, in eval mode, where its weights are.

    Leaves modes and buffers as they were.

    >>> flops_of(nn.Linear(8, 5), (8,))
    80
    """
    counter = FlopCounterMode(display=False)
    with eval_mode(module), _countable(), counter:
        module(_black(module, IMAGES, input_shape))
    return counter.get_total_flops() // IMAGES


@torch.no_grad()
def latency_of(module: nn.Module, input_shape: Sequence[int]) -> float:
    """Milliseconds that one image takes, in eval mode, where the module's weights are.

    The median of `REPETITIONS` forwards, after `WARM_UPS`.
    """
    image = _black(module, 1, input_shape)
    seconds = []
    with eval_mode(module):
        for _ in range(WARM_UPS + REPETITIONS):
            began = time.perf_counter()
            module(image)
            if image.is_cuda:  # it was only queued
                torch.cuda.synchronize(image.device)
            seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[WARM_UPS:])


def _black(module: nn.Module, images: int, input_shape: Sequence[int]) -> Tensor:
    """Zeros, of the type and on the device of a module's weights."""
    reference = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(images, *input_shape, dtype=reference.dtype, device=reference.device)


# --- one forward, watched -------------------------------------------------------------------------


class _Call(NamedTuple):
    """One call of a module: shapes with the axis of images."""

    taken: torch.Size | None
    given: torch.Size | None


class _ShapesOnly(TorchFunctionMode):
    """Meta tensors have no values, so what keeps a tensor's shape has nothing to do.

    Torch would work out the layout of each such result in Python, for longer than all else takes.
    """

    KEEPING = (F.batch_norm, F.relu, Tensor.normal_, Tensor.uniform_, nn.init.normal_,
               nn.init.uniform_, nn.init.kaiming_uniform_)  # fmt: skip

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self.KEEPING:
            return [*args, *kwargs.values()][0]
        return function(*args, **kwargs)


@contextmanager
def _countable() -> Iterator[None]:
    """Within, attention is made of matrix products that a FLOP counter sees."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _watch(module: nn.Module, input_shape: Sequence[int]) -> tuple[int, dict[str, list[_Call]]]:
    """FLOPs of one image, and every call of every module by path, from one forward."""
    calls: dict[str, list[_Call]] = defaultdict(list)

    def see(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[path].append(_Call(_first_shape((args, kwargs)), _first_shape(output)))

        return hook

    image = _black(module, IMAGES, input_shape)
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        for path, part in module.named_modules(remove_duplicate=False):
            handle = part.register_forward_hook(see(path), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        module.eval()(image)
    return counter.get_total_flops() // IMAGES, calls


def _first_shape(tree: Any) -> torch.Size | None:
    return next((x.shape for x in tree_leaves(tree) if isinstance(x, Tensor)), None)


def _shape_at(place: str, calls: Mapping[str, Sequence[_Call]]) -> tuple[int, ...]:
    """A tap's shape for one image."""
    path, of_input, number = _parse("", place)
    call = calls[path][number or 0]
    shape = call.taken if of_input else call.given
    assert shape is not None
    return tuple(shape[1:])


def _per_image(shape: torch.Size) -> tuple[int, ...]:
    """Without the axis of images: the first, or the second before tokens, or part of the first.

    (2, 8, 4, 4) -> (8, 4, 4); (50, 2, 64) -> (50, 64); windows of 7 x 7: (8, 49, 64) -> (4, 49, 64)
    """
    if shape[:1] != (IMAGES,) and shape[1:2] == (IMAGES,):
        return (shape[0], *shape[2:])
    if shape and shape[0] != IMAGES and shape[0] % IMAGES == 0:
        return (shape[0] // IMAGES, *shape[1:])
    return tuple(shape[1:])


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _layer(path: str, module: nn.Module, calls: Sequence[_Call]) -> Layer:
    given = calls[0].given if calls else None
    output = None if given is None else _per_image(given)
    sizes, settings = _arguments(module)
    return Layer(path, type(module).__name__, sizes, settings, output, _size(module), len(calls))


def _arguments(module: nn.Module) -> tuple[str, str]:
    """The sizes and the settings of a layer: of its arguments, those that matter."""
    match module:
        case _ConvNd():
            depthwise = module.groups == module.in_channels > 1
            return f"{module.in_channels}->{module.out_channels}", _join(
                by(module.kernel_size),
                _stride(module.stride),
                f"dilation {by(module.dilation)}" if set(module.dilation) != {1} else "",
                "depthwise" if depthwise else f"groups {module.groups}" * (module.groups > 1),
                "bias" if module.bias is not None else "",
            )
        case nn.Linear():
            bias = "" if module.bias is not None else "no bias"
            return f"{module.in_features}->{module.out_features}", bias
        case _NormBase():
            return f"{module.num_features}", ""
        case nn.GroupNorm():
            return f"{module.num_channels}", f"groups {module.num_groups}"
        case nn.LayerNorm():
            return by(module.normalized_shape), ""
        case nn.MaxPool2d() | nn.AvgPool2d():
            return "", _join(by(_both(module.kernel_size)), _stride(module.stride))
        case nn.AdaptiveAvgPool2d() | nn.AdaptiveMaxPool2d():
            return "", f"to {by(_both(module.output_size))}"
        case nn.Dropout():
            return f"{module.p:g}", ""
        case nn.ChannelShuffle():
            return "", f"groups {module.groups}"
        case nn.ReLU() | nn.Flatten():
            return "", ""
    if any(True for _ in module.children()):
        return "", ""
    return textwrap.shorten(module.extra_repr(), 24, placeholder="..."), ""


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _both(size: Any) -> Sequence[int | None]:
    """Height and width, where one number may stand for both."""
    return size if isinstance(size, Sequence) else (size, size)


def _stride(stride: Any) -> str:
    """(2, 2) -> "/2", (2, 1) -> "/2x1", 1 -> "" """
    steps = _both(stride)
    if set(steps) == {1}:
        return ""
    return f"/{steps[0]}" if len(set(steps)) == 1 else f"/{by(steps)}"


# --- as text --------------------------------------------------------------------------------------


def describe(found: Anatomy, everything: bool = False) -> list[str]:
    """Lines: the tree of layers with the taps where they are read, the totals, a table of the taps.

    A tree of more than `LINES` is folded, unless `everything` is asked for: what a kind of block is
    made of is then shown once, and neighbours of a kind with outputs of one size are one line.
    """
    rows = _rows(found, folded=False)
    folding = len(rows) > LINES and not everything
    if folding:
        rows = _rows(found, folded=True)
    head = ("module", "layer", "output", "parameters", "taps (:in, of its input)")
    taps = [
        (name, tap.kind or "", by(tap.shape), tap.place, tap.norm or "")
        for name, tap in found.taps.items()
    ]
    totals = [
        ("input", f"{by(found.input_shape)}, {found.classes} classes"),
        ("parameters", f"{found.parameters:,}"),
        (
            "FLOPs",
            f"{_rounded(found.flops)}, which is {_rounded(found.macs)} multiply-adds; "
            "convolutions and linear layers only",
        ),
    ]
    if found.blocks:
        totals.append(("blocks", f"{len(found.blocks)}, {found.blocks[0]} to {found.blocks[-1]}"))
    return [
        f"{found.name}: {found.description}",
        "",
        *columns([head, *rows], right=(3,)),
        *(["", "like: but for its sizes; --all shows every layer"] if folding else []),
        "",
        *columns(totals),
        "",
        *columns([("tap", "kind", "shape", "place", "norm"), *taps]),
    ]


def _rounded(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


Row = tuple[str, str, str, str, str]
"""Module, layer, output, parameters, taps."""


class _Line(NamedTuple):
    """A layer in the tree."""

    layer: Layer
    like: str | None = None
    """Path of the one that shows what it is made of."""
    left_out: bool = False


def _rows(found: Anatomy, folded: bool) -> list[Row]:
    """A row for each layer; where folded, for each that says something new or has a tap."""
    below: dict[str, list[Layer]] = defaultdict(list)
    for layer in found.layers:
        below[_parent(layer.path)].append(layer)
    marks: dict[str, list[str]] = defaultdict(list)
    tapped: set[str] = set()
    """Paths of modules that are read, and of all around them."""
    for name, tap in found.taps.items():
        path = _parse(name, tap.place).path
        kind = f" ({tap.kind})" if tap.kind else ""
        marks[path].append(f"{tap.place.removeprefix(path)} -> {name}{kind}".lstrip())
        while path:
            tapped.add(path)
            path = _parent(path)
    shown: dict[Hashable, str] = {}

    def build_of(layer: Layer) -> Hashable:
        """Equal for layers of equal parts but for their sizes."""
        parts = tuple((_own_name(part.path), build_of(part)) for part in below[layer.path])
        return layer.type, layer.settings, parts

    def walk(path: str, taps_only: bool = False) -> Iterator[_Line]:
        for layer in below[path]:
            parts = below[layer.path]
            if taps_only and layer.path not in tapped:
                yield _Line(layer, left_out=True)
                continue
            like = shown.get(build_of(layer)) if folded and path and parts else None
            yield _Line(layer, like)
            if like is None:
                shown.setdefault(build_of(layer), layer.path)
                yield from walk(layer.path)
            elif any(part.path in tapped for part in parts):
                yield from walk(layer.path, taps_only=True)

    def run_of(line: _Line) -> Hashable:
        """Equal for neighbours that one row stands for."""
        path = line.layer.path
        if line.left_out:
            return "left out", _parent(path)
        if line.like is None or path in tapped:
            return path
        return _parent(path), line.like, line.layer.output

    def row(run: Sequence[_Line]) -> Row:
        (layer, like, left_out), last = run[0], run[-1].layer
        indent = "  " * layer.path.count(".")
        if left_out:
            return f"{indent}...", "", "", "", ""
        name, text = _own_name(layer.path), str(layer)
        if like is not None:
            text = f"{layer.type}, like {like}"
        if len(run) > 1:
            name, text = f"{name} .. {_own_name(last.path)}", f"{len(run)} x {text}"
        count = sum(line.layer.parameters for line in run)
        return (
            indent + name,
            text,
            by(layer.output or ()),
            f"{count:,}" if count else "",
            ", ".join(marks[layer.path]),
        )

    return [row(list(run)) for _, run in groupby(walk(""), run_of)]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _own_name(path: str) -> str:
    return path.rpartition(".")[2]
