"""A network and its taps: one forward captures the logits and every named feature.

Taps are read by forward hooks that are installed once, at construction, so no architecture is
edited for a method and `torch.compile` sees the hooks. A dry run at construction finds every tap's
shape and refuses taps that would silently be wrong.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from potstill.depth import Depth, ResidualBlock, settings_of
from potstill.errors import NetworkError, PotstillError, TapError, did_you_mean, first_line
from potstill.seeds import seed_of

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Captured:
    """What one network produced for one batch of B images."""

    logits: Tensor
    """(B, num_classes), float32 (float64 in a float64 network)."""
    features: Mapping[str, Tensor]
    """By tap name, as they were computed; index the object itself to have them in float32."""

    def __getitem__(self, name: str) -> Tensor:
        """A feature by tap name, at least float32. Raises TapError naming the taps that exist."""
        try:
            return in_full(self.features[name])
        except KeyError:
            raise TapError(no_feature(name, self.features)) from None


def no_feature(name: str, taps: Mapping[str, Any]) -> str:
    """The message for a tap that does not exist."""
    return f"no feature '{name}'; this network has {sorted(taps)}{did_you_mean(name, taps)}"


def in_full(x: Tensor) -> Tensor:
    """Half precision to float32, everything else as it is: losses are computed in full."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Tape:
    """Where the hooks of one Net write during one forward; closed at all other times."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] | None = None
        self.calls: dict[str, int] = {}
        self.versions: dict[str, int] | None = None  # only in a dry run

    def __getstate__(self) -> dict[str, Any]:  # activations are never copied or pickled
        return {"values": None, "calls": {}, "versions": None}


class _Recorder:
    """A hook that writes one call's input or output of a module to a tape.

    An object rather than a closure: copying or pickling a Net then copies tape and hooks together,
    where a closure would go on writing into the original.
    """

    def __init__(self, tape: _Tape, name: str, of_input: bool, call: int) -> None:
        self.tape, self.name, self.of_input, self.call = tape, name, of_input, call

    def __call__(self, module: nn.Module, args: tuple[Any, ...], third: Any) -> None:
        """As a forward hook `third` is the output, as a pre-hook the keyword arguments."""
        if self.tape.values is None:
            return
        seen = self.tape.calls.get(self.name, 0)
        self.tape.calls[self.name] = seen + 1
        if seen != self.call:
            return
        value = [*args, *third.values()][0] if self.of_input else third
        self.tape.values[self.name] = value
        if self.tape.versions is not None and isinstance(value, Tensor):
            self.tape.versions[self.name] = value._version


class _Inserted:
    """A hook that passes a module's input or output through another module."""

    def __init__(self, tape: _Tape, name: str, of_input: bool, change: nn.Module) -> None:
        self.tape, self.name, self.of_input, self.change = tape, name, of_input, change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], third: Any) -> Any:
        """As for a recorder; what it returns is used in place of the value."""
        if not self.of_input:
            return self.change(third)
        if args:
            return (self.change(args[0]), *args[1:]), third
        first = next(iter(third))
        return args, {**third, first: self.change(third[first])}


class _Target(NamedTuple):
    """A tap's place in the module: "layer3.2.relu:in#1" parsed."""

    path: str
    of_input: bool
    call: int | None


def _parse(name: str, text: str) -> _Target:
    place, _, call = text.partition("#")
    path, _, end = place.partition(":")
    if end not in ("", "in", "out") or ("#" in text and not call.isdigit()) or (not path):
        raise TapError(
            f"tap '{name}' is '{text}'; write a module's path, then ':in' for its input, then "
            "'#1' for its second call: 'layer3', 'layer3.2.relu:in', 'relu:in#1'"
        )
    return _Target(path, end == "in", int(call) if call else None)


class _Wrapper(nn.Module):
    """A module around another one whose saved keys are the wrapped module's own names."""

    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's state, under its own names."""
        return self.module.state_dict(*args, **kwargs)


def _add_prefix(
    module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:  # at module level, because a bound method would tie a copy to its original
    for key in [k for k in state if k.startswith(prefix)]:
        state[f"{prefix}module.{key[len(prefix) :]}"] = state.pop(key)


class Predictor(_Wrapper):
    """A Net as a plain module from image to logits, without capturing. (B, C, H, W) -> (B, K)"""

    def __init__(self, net: Net) -> None:
        super().__init__(net)

    def forward(self, image: Tensor) -> Tensor:
        return self.module.logits(image)  # type: ignore[operator, no-any-return]


class Net(_Wrapper):
    """A network with named taps.

    `taps` maps a name to a place in `module`: a submodule's output (`"layer3"`), its input
    (`"layer3.2.relu:in"`), and, for a module that runs more than once in a forward, which call
    (`"relu:in#1"` is the second). `"embed"`, the vector that the classifier reads, is added where a
    final linear layer is found. `normalize` is (scale, shift) per channel, applied to the
    image first, for a network trained with other statistics than the data's; see
    `affine_between`. `norms` says, by tap, which BatchNorm is right before the ReLU that follows,
    `blocks` which submodules a stochastic depth counts, in forward order, and `block_ends` where
    each one's output is seen after its ReLU, if that is not the block's own output.

    >>> net = Net(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)),
    ...           taps={"map": "0"}, input_shape=(3, 8, 8))
    >>> net.shapes["map"], net.num_classes
    (torch.Size([8, 6, 6]), 5)

    Raises TapError for a tap that does not exist, runs several times, does not give a tensor or is
    overwritten in place; NetworkError where the module cannot take `input_shape` or does not
    return logits (B, K).
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        module: nn.Module,
        taps: Mapping[str, str] | None = None,
        input_shape: Sequence[int] = (3, 32, 32),
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        *,
        norms: Mapping[str, str] | None = None,
        blocks: Sequence[str] = (),
        block_ends: Sequence[str] | None = None,
    ) -> None:
        super().__init__(module)
        scale, shift = normalize if normalize is not None else (None, None)
        self.register_buffer("scale", _per_channel(scale), persistent=False)
        self.register_buffer("shift", _per_channel(shift), persistent=False)
        self.input_shape = tuple(input_shape)
        self.precision: torch.dtype | None = None
        """What `forward` is autocast to; None for none. `logits` and `predictor` never are."""
        image_like = len(self.input_shape) == 3
        self.channels_last = image_like
        """Whether images reach the module so; False where it can only take contiguous ones."""
        self.architecture: str | None = None
        """Its name in recipes, where a training knows it."""
        self.sampled = False
        """Whether a sub-network has been drawn; who wants to know sets it back."""
        parts = [m for m in module.modules() if isinstance(m, ResidualBlock) and m.survival < 1]
        first = {id(part.depth): i for i, part in reversed(list(enumerate(parts)))}
        # one network's blocks after another's, each in the order they are counted in
        self._skippable = sorted(parts, key=lambda part: (first[id(part.depth)], part.number))
        self._tape = _Tape()
        for what, given in (("taps", taps), ("norms", norms)):
            texts = given.values() if isinstance(given, Mapping) else [None]
            if given is not None and not all(isinstance(text, str) for text in texts):
                raise TapError(
                    f'{what} is {given}; write a mapping of names to places: {{"a": "layer1"}}'
                )
        for what, paths in (("blocks", blocks), ("block_ends", block_ends)):
            if isinstance(paths, str):
                raise TapError(f"{what} is '{paths}'; write a list of paths: ['layer1.0']")
        wanted = dict(taps or {})
        unknown = (norms or {}).keys() - wanted.keys() - {"embed"}
        if unknown:
            raise TapError(no_feature(min(unknown), wanted))
        self.norms = dict(norms or {})
        self.blocks = tuple(blocks)
        self.block_ends = self.blocks if block_ends is None else tuple(block_ends)
        if len(self.block_ends) != len(self.blocks):
            raise TapError(
                f"there are {len(self.blocks)} blocks and {len(self.block_ends)} block_ends; give "
                "one end a block"
            )
        if twice := sorted({path for path in self.blocks if self.blocks.count(path) > 1}):
            raise TapError(f"blocks name '{twice[0]}' more than once; name each block once")
        for path in self.blocks:
            self._require(path, "blocks name")
        for path in self.norms.values():
            norm = self._require(path, "norms name")
            if not isinstance(norm, (_BatchNorm, nn.GroupNorm)):
                kind = type(norm).__name__
                raise TapError(f"norms name '{path}', which is a {kind}, no BatchNorm or GroupNorm")
        try:
            self.classifier_path = self._find_classifier()
        except NetworkError:  # x.view(len(x), -1) needs contiguous images
            self.channels_last = False
            self.classifier_path = self._find_classifier()
        if self.classifier_path is not None:
            wanted.setdefault("embed", f"{self.classifier_path}:in")
        self.taps: dict[str, str] = {}
        self._targets: dict[str, _Target] = {}
        self.add_taps(wanted)

    @staticmethod
    def discover(module: nn.Module, input_shape: Sequence[int] = (3, 32, 32)) -> dict[str, str]:
        """Taps proposed for any classifier, from one traced forward; see `potstill.discover`.

        >>> module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5))
        >>> Net.discover(module, (3, 8, 8))
        {'stage1': '0', 'embed': '2:in'}
        """
        from potstill.discover import discover  # which is about Nets

        return discover(module, input_shape)

    def add_taps(self, taps: Mapping[str, str]) -> None:
        """Capture at more places, for a method that reads more than the usual ones.

        Before the network is compiled. Raises TapError as the constructor does, and for a name that
        another place has; the taps are then as they were.
        """
        for name, place in taps.items():
            if self.taps.get(name, place) != place:
                raise TapError(
                    f"tap '{name}' is '{self.taps[name]}' already; give '{place}' another name"
                )
        new = {name: _parse(name, text) for name, text in taps.items() if name not in self.taps}
        before = self.taps, self._targets
        self.taps, self._targets = {**self.taps, **taps}, {**self._targets, **new}
        try:
            for name, target in new.items():
                self._install(name, target)
            self.shapes, self.num_classes = self._dry_run()
        except BaseException:
            self.taps, self._targets = before
            self._remove_hooks((_Recorder,), new)
            raise

    def insert(self, tap: str, change: nn.Module) -> None:
        """From now on a tap's value goes on through `change`, captured or not.

        The tap itself is captured before the change. `change` is not made a part of this network:
        its parameters are its owner's to train and to save. Raises TapError for a tap that does not
        exist, or one of a module that runs several times.
        """
        self.shape_of(tap)
        target = self._targets[tap]
        if target.call is not None:
            raise TapError(f"'{tap}' is one call of several; nothing can be inserted there")
        if any(True for _ in self._own_hooks((_Inserted,), (tap,))):
            raise TapError(
                f"a layer is inserted at '{tap}' already, by another method perhaps; call "
                "take_out() first"
            )
        self._hook(target, _Inserted(self._tape, tap, target.of_input, change))

    def take_out(self) -> None:
        """Undo every `insert`."""
        self._remove_hooks((_Inserted,), None)

    def pools(self, tap: str) -> bool:
        """Whether "embed", what the classifier reads, is the mean over space of a tap's map.

        >>> from potstill.models import build
        >>> net = build("wrn_16_1", 10)
        >>> net.pools("last"), net.pools("stage3")
        (True, False)
        """
        if len(self.shape_of(tap)) != 3 or len(self.shape_of("embed")) != 1:
            return False
        found = self.probe()
        mean, embed = found[tap].mean((2, 3)), found["embed"]
        return mean.shape == embed.shape and torch.allclose(mean, embed, rtol=1e-3, atol=1e-5)

    def parameters_before(self, *taps: str) -> list[nn.Parameter]:
        """Those that the values of some taps depend on, frozen ones left out.

        >>> from potstill.models import build
        >>> net = build("wrn_16_1", 10)
        >>> names = {id(p): name for name, p in net.module.named_parameters()}
        >>> [names[id(p)] for p in net.parameters_before("stage1:pre")][-1]
        'layer2.0.bn1.bias'

        Raises TapError for a tap that does not exist.
        """
        for tap in taps:
            self.shape_of(tap)
        found = self.probe(differentiable=True)
        nodes = [found.features[tap].grad_fn for tap in taps]
        seen: set[Any] = set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [before for before, _ in node.next_functions]
        reached = {id(node.variable) for node in seen if hasattr(node, "variable")}
        return [p for p in self.parameters() if id(p) in reached]

    def probe(self, differentiable: bool = False) -> Captured:
        """What the network makes of two images of noise, in eval mode; changes nothing."""
        self._tape.values, self._tape.calls = {}, {}
        try:
            logits = self._try_out(training=False, noise=True, differentiable=differentiable)
            return Captured(logits, self._tape.values)
        finally:
            self._tape.values = None

    @property
    def stochastic(self) -> Mapping[str, Any] | None:
        """The arguments that `potstill.stochastic` made it with; None for a plain network."""
        return settings_of(self.module)

    @property
    def depths(self) -> list[Depth]:
        """What says which blocks are alive: none where all are, several in joined parts."""
        found = {id(m.depth): m.depth for m in self._skippable if m.depth is not None}
        return list(found.values())

    @property
    def samples(self) -> bool:
        """Whether every forward is of a sub-network, drawn anew."""
        return any(depth.draw != "never" for depth in self.depths)

    def seed(self, seed: int | None) -> None:
        """Where the next sub-networks come from: one seed, one draw. None: torch's generator."""
        for i, depth in enumerate(self.depths):
            depth.seed(None if seed is None else seed_of(seed, i))

    def drawn(self, images: int) -> Tensor:
        """Which of its skippable blocks a forward runs: the next one, where a seed is set.

        (blocks,) bool, or (images, blocks) where each image has a sub-network of its own.
        """
        alive = {id(depth): depth.drawn(images) for depth in self.depths}
        return torch.stack([alive[id(m.depth)][..., m.number] for m in self._skippable], dim=-1)

    def forward(self, image: Tensor) -> Captured:
        """Run once, in `precision`, and capture. (B, C, H, W) -> Captured

        A stochastic network runs as a sub-network here, in train and in eval mode alike, and at its
        expected depth everywhere else.
        """
        if not self.samples:
            return self._run(image)
        self.sampled = True
        with ExitStack() as stack:
            for depth in self.depths:
                if depth.draw != "never":
                    stack.enter_context(depth.sampling(len(image), image.device))
            return self._run(image)

    def _run(self, image: Tensor) -> Captured:
        if self.precision is None:
            return self.capture(image)
        # the cache would hand casts made under no_grad to a forward with gradients
        with torch.autocast(image.device.type, self.precision, cache_enabled=False):
            return self.capture(image)

    def capture(self, image: Tensor) -> Captured:
        """The same without autocast: for predictors that read features."""
        self._tape.values, self._tape.calls = {}, {}
        try:
            logits = self.logits(image)
            features = self._tape.values
        finally:
            self._tape.values = None
        return Captured(logits, features)

    @property
    def memory_format(self) -> torch.memory_format:
        """The same as torch calls it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def logits(self, image: Tensor) -> Tensor:
        """The network's prediction alone, in at least float32. (B, C, H, W) -> (B, K)"""
        if self.scale is not None and self.shift is not None:
            image = image * self.scale + self.shift
        output = self.module(image.contiguous(memory_format=self.memory_format))
        return in_full(output if isinstance(output, Tensor) else output.logits)

    def predictor(self) -> nn.Module:
        """This network as a module from image to logits, sharing its weights."""
        return Predictor(self)

    @property
    def classifier(self) -> nn.Linear:
        """The last linear layer, for methods that reuse it. NetworkError if there is none."""
        if self.classifier_path is None:
            raise NetworkError(
                f"{type(self.module).__name__} has no final linear layer from features to logits; "
                "this method needs one"
            )
        return self.module.get_submodule(self.classifier_path)  # type: ignore[return-value]

    def stages(self, form: Literal["", "pre", "post"] = "") -> tuple[str, ...]:
        """Names of the stage taps in forward order.

        With a form, a stage's map before ("pre") or after ("post") its activation where the network
        has it, else the stage itself: the ends of a linear bottleneck have neither.

        >>> from potstill.models import build
        >>> build("wrn_16_1").stages("pre")
        ('stage1:pre', 'stage2:pre', 'stage3:pre')
        >>> build("resnet8").stages("post")
        ('stage1', 'stage2', 'stage3')
        """
        plain = [name for name in self.taps if re.fullmatch(r"stage\d+", name)]
        ordered = sorted(plain, key=lambda name: int(name.removeprefix("stage")))
        return tuple(f"{s}:{form}" if f"{s}:{form}" in self.taps else s for s in ordered)

    def norm(self, tap: str) -> nn.Module:
        """The BatchNorm right before the ReLU that follows a tap: OFD's margins come from it.

        Or the GroupNorm, in a network that has these.
        Raises TapError where none is known.
        """
        if tap not in self.norms:
            self.shape_of(tap)  # a tap that does not exist is told first
            raise TapError(
                f"no BatchNorm is known right before the ReLU after '{tap}' of this "
                f"{type(self.module).__name__}; known: {sorted(self.norms) or 'none'}; say which "
                "with Net(..., norms={tap: path})"
            )
        return self.module.get_submodule(self.norms[tap])

    def tail(self, tap: str) -> nn.Module:
        """What turns a tap's value into the logits, sharing this network's layers.

        For a network that is one line of parts (`nn.Sequential`) and a tap at the start or the end
        of one of them; otherwise NetworkError.

        >>> from potstill.models import build
        >>> build("resnet8", 10).tail("embed")(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
        """
        self.shape_of(tap)
        target = self._targets[tap]
        line = type(self.module).forward is nn.Sequential.forward
        parts = list(self.module._modules.items()) if line else []
        part = self.module.get_submodule(target.path)
        places = [i for i, (_, module) in enumerate(parts) if module is part]  # once for each call
        if (target.call or 0) >= len(places):
            raise NetworkError(
                f"'{tap}' ('{self.taps[tap]}') is not between two parts of a line of parts, so "
                f"this {type(self.module).__name__} cannot be cut there"
            )
        start = places[target.call or 0] + (0 if target.of_input else 1)
        return nn.Sequential(OrderedDict(parts[start:]))  # type: ignore[arg-type]

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter but the classifier's."""
        head = {id(p) for p in self.classifier.parameters()}
        return (p for p in self.parameters() if id(p) not in head)

    def close(self) -> None:
        """Remove this Net's hooks, so that the module is again as it was given."""
        self._tape.values = None
        self._remove_hooks((_Recorder, _Inserted), None)

    def _remove_hooks(
        self, kinds: tuple[type[_Recorder | _Inserted], ...], names: Iterable[str] | None
    ) -> None:
        for hooks, key in list(self._own_hooks(kinds, names)):
            del hooks[key]

    def _own_hooks(
        self, kinds: tuple[type[_Recorder | _Inserted], ...], names: Iterable[str] | None
    ) -> Iterator[tuple[dict[int, Any], int]]:
        """Where this Net's hooks are, those of some kinds, at some taps or all."""
        for module in self.module.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in cast("dict[int, Any]", hooks).items():
                    ours = isinstance(hook, kinds) and hook.tape is self._tape
                    if ours and (names is None or hook.name in names):
                        yield hooks, key

    def shape_of(self, tap: str) -> torch.Size:
        """Shape of a feature without the batch axis. Raises TapError naming the taps that exist."""
        if tap not in self.shapes:
            raise TapError(no_feature(tap, self.shapes))
        return self.shapes[tap]

    def _require(self, path: str, who: str) -> nn.Module:
        modules: dict[str, nn.Module] = dict(self.module.named_modules(remove_duplicate=False))
        if path not in modules:
            raise TapError(
                f"{who} the module '{path}', which does not exist in "
                f"{type(self.module).__name__}{did_you_mean(path, modules)}; its parts are "
                f"{[n for n, _ in self.module.named_children()]}"
            )
        return modules[path]

    def _install(self, name: str, target: _Target) -> None:
        self._require(target.path, f"tap '{name}' names")
        self._hook(target, _Recorder(self._tape, name, target.of_input, target.call or 0))

    def _hook(self, target: _Target, hook: _Recorder | _Inserted) -> None:
        module = self.module.get_submodule(target.path)
        if target.of_input:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            module.register_forward_hook(hook)

    def _find_classifier(self) -> str | None:
        """Path of the linear layer whose output is the logits, found by running once."""
        outputs: dict[str, Tensor] = {}

        def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda module, args, output: outputs.__setitem__(name, output)

        handles = [
            m.register_forward_hook(note(name))
            for name, m in self.module.named_modules()
            if isinstance(m, nn.Linear)
        ]
        try:
            logits = self._try_out(training=False)
        finally:
            for handle in handles:
                handle.remove()
        return next((name for name, x in outputs.items() if x is logits), None)

    def _dry_run(self) -> tuple[dict[str, torch.Size], int]:
        for training in (True, False):
            self._tape.values, self._tape.calls, self._tape.versions = {}, {}, {}
            logits = self._try_out(training)
            self._check(self._tape)
            captured = self._tape.values
            if self._skippable:
                self._check_skipped(training)
            self._tape.values, self._tape.versions = None, None
        return {name: x.shape[1:] for name, x in captured.items()}, logits.shape[1]

    def _check_skipped(self, training: bool) -> None:
        """Refuse taps that are not there, or other ones, where a stochastic depth skips a block."""
        before = self._tape.calls
        self._tape.values, self._tape.calls = {}, {}
        with ExitStack() as stack:
            for depth in self.depths:
                stack.enter_context(depth.without())
            self._try_out(training)
        for name, times in before.items():
            if self._tape.calls.get(name) != times:
                raise TapError(
                    f"feature '{name}' ('{self.taps[name]}') is inside a block that a stochastic "
                    "depth skips at times; tap where a block begins or ends"
                )

    def _try_out(self, training: bool, noise: bool = False, differentiable: bool = False) -> Tensor:
        """One forward of two images that leaves modes, buffers and random state as they were.

        Of black images, or of noise: without biases, all that a network makes of black is zero.
        """
        reference = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        with torch.inference_mode(False):  # or the image would have no version
            image = torch.zeros(2, *self.input_shape)
            if noise:
                image.normal_(generator=torch.Generator().manual_seed(0))
            image = image.contiguous(memory_format=self.memory_format)
            if reference is not None:
                image = image.to(reference)
        version = image._version
        modes = [(m, m.training) for m in self.module.modules()]
        plain = [m for m in self.module.modules() if isinstance(m._buffers, dict)]  # not scripted
        buffers = [(m, dict(m._buffers)) for m in plain]
        values = [(b, b.clone()) for b in self.module.buffers()]
        devices = [image.device] if image.is_cuda else []
        kind = "cuda" if image.is_cuda else "cpu"
        try:
            self.module.train(training)
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(differentiable),
                torch.random.fork_rng(devices),
                torch.autocast(kind, enabled=False),
            ):
                output = self.module(image)
        except PotstillError:
            raise
        except Exception as error:
            raise NetworkError(
                f"{type(self.module).__name__} cannot take images of {self.input_shape} "
                f"(channels, height, width): {first_line(error)}"
            ) from error
        finally:
            for module, mode in modes:
                module.training = mode
            for module, held in buffers:  # a forward may have put others in their place
                module._buffers.clear()
                module._buffers.update(held)
            with torch.no_grad():
                for buffer, before in values:
                    buffer.copy_(before)
        if image._version != version:
            raise NetworkError(
                f"{type(self.module).__name__} writes into the images it is given, which other "
                "networks read too; let it make new tensors (x = x - 0.5, not x -= 0.5)"
            )
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise NetworkError(
                f"{type(self.module).__name__} must return logits of shape (images, classes), or "
                f"an object with .logits; for two images it returned {got}"
            )
        return logits

    def _check(self, tape: _Tape) -> None:
        assert tape.values is not None and tape.versions is not None
        for name, target in self._targets.items():
            where = f"feature '{name}' ('{self.taps[name]}')"
            times = tape.calls.get(name, 0)
            if times == 0:
                raise TapError(f"{where} never runs in a forward; tap a module that does")
            if target.call is None and times > 1:
                choices = " or ".join(f"'{self.taps[name]}#{i}'" for i in range(min(times, 3)))
                raise TapError(f"{where} runs {times} times in a forward; say which: {choices}")
            if target.call is not None and target.call >= times:
                raise TapError(
                    f"{where} is call number {target.call + 1}, but that module runs {times} "
                    f"time(s) in a forward; the last is '#{times - 1}'"
                )
            value = tape.values[name]
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise TapError(f"{where} is a {kind}, not a tensor; tap a module inside it")
            if value._version != tape.versions[name]:
                raise TapError(
                    f"{where} is overwritten in place by a later module; build that module with "
                    "inplace=False"
                )


def shared_copy(module: M, instead: Mapping[nn.Module, nn.Module] | None = None) -> M:
    """A copy with hooks of its own that shares every tensor, and is not compiled.

    `instead` says which parts the copy has others for.
    """
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    memo |= {id(part): other for part, other in (instead or {}).items()}
    return copy.deepcopy(module, memo)


def _per_channel(values: Sequence[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values).view(1, -1, 1, 1)


def affine_between(
    mean: Sequence[float], std: Sequence[float], own_mean: Sequence[float], own_std: Sequence[float]
) -> tuple[list[float], list[float]] | None:
    """(scale, shift) that turns images normalised by (mean, std) into (own_mean, own_std).

    All in units of pixel / 255, per channel. None where the statistics are equal, so that an
    equal network gets no operation at all.

    >>> affine_between([0.5], [0.25], [0.25], [0.5])
    ([0.5], [0.5])
    """
    if list(mean) == list(own_mean) and list(std) == list(own_std):
        return None
    if len(mean) != len(own_mean):
        raise NetworkError(
            f"a network for images of {len(own_mean)} channels cannot take those of the data, "
            f"which have {len(mean)}"
        )
    pairs = list(zip(mean, std, own_mean, own_std, strict=True))
    return [s / t for _, s, _, t in pairs], [(m - n) / t for m, _, n, t in pairs]


def own_statistics(
    net: Net, mean: Sequence[float], std: Sequence[float]
) -> tuple[list[float], list[float]]:
    """The (mean, std) a network's module itself expects, for images normalised by (mean, std)."""
    if net.scale is None or net.shift is None:
        return list(mean), list(std)
    scale, shift = net.scale.flatten().tolist(), net.shift.flatten().tolist()
    rows = list(zip(mean, std, scale, shift, strict=True))
    return [m - b * s / a for m, s, a, b in rows], [s / a for _, s, a, _ in rows]
