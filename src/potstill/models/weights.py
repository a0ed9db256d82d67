"""Weights of trained networks: ours with what they need to be used, and other projects' files."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill import models
from potstill.errors import NetworkError, StorageError, first_line
from potstill.files import load_tensors
from potstill.models import naming, outside
from potstill.net import Net, affine_between
from potstill.run import Run
from potstill.stochastic_depth import WithShortcut
from potstill.stochastic_depth import stochastic as with_stochastic_depth


@dataclass(frozen=True)
class Weights:
    """A trained network's tensors, and what is known of how to use them; None is not known."""

    tensors: Mapping[str, Tensor]
    source: str
    model: str | None = None
    classes: Sequence[int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    input_shape: Sequence[int] | None = None
    stochastic: Mapping[str, Any] | None = None
    """Arguments of `potstill.stochastic`, for weights of a network with stochastic depth."""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def foreign(self) -> bool:
        """Whether another program wrote them: ours always say an architecture, or that none is."""
        return "model" not in self.about


@dataclass(frozen=True)
class Loaded:
    """What of a file went into a network. Its text is one line."""

    source: str
    tensors: int
    """How many of the network's tensors the file had, and how many there are."""
    expected: int
    naming: str | None
    """Whose names the file has; None for those of the network itself."""
    prefix: str
    """What all of the file's names begin with."""
    renamed: Mapping[str, str]
    """The network's name to the file's without the prefix, where they differ."""
    converted: Sequence[str]
    """Numbers that were converted: "float16 to float32"."""
    ignored: Sequence[str]
    """What the file has beside the network, a profiler's counts."""

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.tensors} of {self.expected} tensors"]
        if self.naming is not None:
            parts.append(f"{self.naming} names")
        if self.prefix:
            parts.append(f"prefix {self.prefix} left out")
        if self.tensors < self.expected:
            parts.append(f"no {naming.COUNTER}")
        parts.extend(self.converted)
        if self.ignored:
            kinds = sorted({name.rpartition(".")[2] for name in self.ignored})
            parts.append(f"{len(self.ignored)} ignored ({', '.join(kinds)})")
        return ", ".join(parts)


def read(path: str | Path) -> Weights:
    """Weights from a run directory (or RUN:predictor), a .safetensors file or a .pth file.

    A .pth is read without running code. Raises StorageError for a file that is missing or damaged,
    NetworkError for one that holds something else than weights.
    """
    path, predictor = place_of(path)
    if predictor:
        tensors, about = Run.open(path).load_predictor(predictor)
        path = Path(f"{path}:{predictor}")
    elif path.is_dir():
        tensors, about = Run.open(path).load_predictor("student")
    elif not path.is_file():
        raise StorageError(f"no weights at {path}: no such file or run folder")
    elif path.suffix == ".safetensors":
        tensors, text = load_tensors(path)
        about = {k: _from_json(v) for k, v in text.items()}
    else:
        return Weights(_read_foreign(path), str(path))
    return ours(tensors, about, str(path))


def place_of(source: str | Path) -> tuple[Path, str]:
    """A run's folder and the predictor that RUN:student1 names; else the path itself, and ""."""
    path = Path(source).expanduser()
    folder, _, predictor = str(path).rpartition(":")
    if folder and not path.exists() and Path(folder).is_dir():
        return Path(folder), predictor
    return path, ""


def require_architecture(found: Weights, otherwise: str) -> str:
    """The architecture that a file says. Raises NetworkError, with what to do `otherwise`."""
    if found.model is not None:
        return found.model
    if found.about.get("model", "") is None:  # of a run of ours
        raise NetworkError(
            f"{found.source} is no single network, but an ensemble or a network with a layer of "
            "its method; choose another of the run's predictors"
        )
    raise NetworkError(f"{found.source} does not say its architecture; {otherwise}")


HEAD = "fc"
"""The classifier's path in every architecture of ours."""
WRAPPERS = ("state_dict", "model", "net", "model_state_dict")
"""Under which of its keys a checkpoint has the weights."""


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # another program's metadata are plain text
        return text


def ours(tensors: Mapping[str, Tensor], about: Mapping[str, Any], source: str) -> Weights:
    """Weights with what a saved predictor's metadata say of them."""
    keys = ("model", "classes", "mean", "std", "input_shape", "stochastic")
    known = {k: about.get(k) for k in keys}
    depth = known["stochastic"]
    if not isinstance(depth, dict) or depth.keys() != {"p_end", "scope", "draw"}:
        known["stochastic"] = None  # another program's word
    if str(known["model"]).startswith("py:"):  # a file must not decide which code is run
        known["model"] = None
    return Weights(tensors, source, **known, about=dict(about))


def _read_foreign(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what matters is raised below
            # RepDistiller keeps its parsed arguments beside the weights: attributes, no code
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise StorageError(f"{path} is damaged or not a PyTorch file") from None
        raise NetworkError(
            f"{path} holds more than weights ({found[1]}), and reading it would run code "
            "from the file; save its state_dict alone and give that"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise StorageError(
            f"{path} is damaged or not a PyTorch file: {first_line(error)}"
        ) from None
    state = content
    while isinstance(state, dict):
        inner = next((state[k] for k in WRAPPERS if _is_dict(state, k)), None)
        if inner is None:
            break
        state = inner
    items = state.items() if _is_dict(state) else ()
    tensors = {k: v for k, v in items if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        keys = f" with the keys {[*content][:8]}" if isinstance(content, dict) else ""
        raise NetworkError(f"{path} holds no state_dict; it is a {type(content).__name__}{keys}")
    return tensors


def _is_dict(value: Any, key: str | None = None) -> bool:
    return isinstance(value if key is None else value.get(key), dict)


def network(
    name: str,
    weights: Weights | None,
    num_classes: int,
    input_shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    report: Callable[[str], None] | None = None,
    stochastic: Mapping[str, Any] | None = None,
) -> Net:
    """A network by name, with these weights, for images normalised by (mean, std).

    A network with weights keeps their head: its class count is that of the weights, never
    re-initialised to `num_classes`. `normalize` is the network's own (mean, std); by default what
    the weights' file says, else the images'. `stochastic` are the arguments of
    `potstill.stochastic`; likewise. `report` is told, in one line, what was taken from another
    program's file. Raises NetworkError where name and weights disagree.
    """
    if weights is None:
        own = normalize or (mean, std)
        net = models.build(name, num_classes, input_shape, affine_between(mean, std, *own))
        return net if stochastic is None else with_stochastic_depth(net, **stochastic)
    if weights.model is not None and weights.model != name:
        raise NetworkError(f"{weights.source} holds a {weights.model}, not a {name}")
    if normalize is None and weights.mean is not None and weights.std is not None:
        normalize = (weights.mean, weights.std)
    own = normalize or (mean, std)
    net = models.build(name, num_classes, input_shape, affine_between(mean, std, *own))
    classes = naming.classes_in(weights.tensors, net.state_dict(), net.classifier_path)
    if classes is not None and classes != net.num_classes:
        net = models.build(name, classes, input_shape, affine_between(mean, std, *own))
    if stochastic is None:
        stochastic = weights.stochastic
    if stochastic is not None and net.stochastic != stochastic:  # a factory of one's own may be
        net = with_stochastic_depth(net, **stochastic)
    given = [m.shortcut for m in net.module.modules() if isinstance(m, WithShortcut)]
    if given and weights.stochastic is None and not any(s.state_dict() for s in given):
        raise NetworkError(  # where a shortcut has weights, their absence tells
            f"{weights.source} does not say that it was trained with stochastic depth; {_TRAIN_IT}"
        )
    loaded = load_into(net, weights)
    if report is not None and weights.foreign:
        report(str(loaded))
    return net


def published(
    name: str,
    num_classes: int | None,
    input_shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    report: Callable[[str], None] | None = None,
) -> Net:
    """A network of another library with its published weights, for images normalised so.

    `num_classes` None keeps its head; with another number than the published one the head is new,
    and `report` is told. `normalize` is its own (mean, std); by default what its publishers say,
    else the images'. Raises MissingExtra without the library, NetworkError for what does not exist
    or does not take these images, StorageError for weights that cannot be fetched.
    """
    made = outside.make(name, num_classes, input_shape[0], pretrained=True)
    if normalize is None and made.mean is not None and made.std is not None:
        normalize = (made.mean, made.std)
    own = normalize or (mean, std)
    if report is not None and made.note is not None:
        report(made.note)
    size = "x".join(map(str, input_shape[1:]))
    if report is not None and made.input_shape is not None:
        own_size = "x".join(map(str, made.input_shape[1:]))
        if own_size != size:
            report(f"{name}: published for images of {own_size}, and these are {size}")
    try:
        return models.tapped(made.module, input_shape, affine_between(mean, std, *own))
    except NetworkError as error:
        if made.input_shape in (None, tuple(input_shape)):
            raise
        raise NetworkError(
            f"{name} was published for images of {made.input_shape}: {error}"
        ) from None


def load_into(net: Net, weights: Weights) -> Loaded:
    """Copy weights into a network, under whatever known names the file has them.

    Every tensor of the network must be in the file with its shape, and nothing else but what is no
    part of any network. Raises NetworkError naming the layers that differ, and the architectures
    that the weights fit; the network is then as it was.
    """
    own: dict[str, Tensor] = net.state_dict()
    found = naming.translate(weights.tensors, own)
    if not found.fits:
        raise NetworkError("\n".join(_differences(net, own, weights, found)))
    taken = {name: weights.tensors[there] for name, there in found.names.items()}
    broken = [n for n, x in taken.items() if x.is_floating_point() and not x.isfinite().all()]
    if broken:
        raise NetworkError(f"{weights.source} holds numbers that are not finite, in {broken[0]}")
    net.load_state_dict({**own, **taken})
    pairs = {(x.dtype, own[name].dtype) for name, x in taken.items()}
    plain = {name: there.removeprefix(found.prefix) for name, there in found.names.items()}
    return Loaded(
        weights.source,
        len(taken),
        len(own),
        None if found.naming is naming.OURS else found.naming.project,
        found.prefix,
        {name: there for name, there in plain.items() if name != there},
        sorted(f"{_said(a)} to {_said(b)}" for a, b in pairs if a != b),
        found.ignored,
    )


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _differences(
    net: Net, own: Mapping[str, Tensor], weights: Weights, found: naming.Translation
) -> list[str]:
    whose = "" if found.naming is naming.OURS else f" ({found.naming.project} names)"
    lines = [f"{weights.source} does not fit this {type(net.module).__name__}{whose}:"]
    shapes = [
        _difference(there.removeprefix(found.prefix), weights.tensors[there], own[name])
        for name, there in found.shapes.items()
    ]
    for title, items in (
        ("only in the network", found.missing),
        ("only in the file", found.unknown),
        ("other shapes", shapes),
    ):
        if items:
            more = f", and {len(items) - 4} more" if len(items) > 4 else ""
            lines.append(f"  {title}: {', '.join(items[:4])}{more}")
    scopes = [s and s["scope"] for s in (weights.stochastic, net.stochastic)]
    if None not in scopes and scopes[0] != scopes[1]:
        lines.append(
            f"these weights are of a network with stochastic.scope={scopes[0]}, and this is one "
            f"with {scopes[1]}; give the same, or leave stochastic out"
        )
    elif net.stochastic is not None and _only_shortcuts(found):
        return [*lines, _TRAIN_IT]
    fitting = _fitting(weights.tensors, net.input_shape)
    if fitting:
        counts = sorted(set(fitting.values()))
        unlike = f" with {counts[0]} classes" if counts != [net.num_classes] else ""
        lines.append(f"these weights fit {', '.join(fitting)}{unlike}")
    return lines


_TRAIN_IT = (
    "this network's blocks were given shortcuts, which plain weights were trained without: train "
    "it so first, with method vanilla and this network as the student"
)


def _only_shortcuts(found: naming.Translation) -> bool:
    """Whether all that a file lacks are shortcuts that blocks were given, and nothing else is."""
    added = [name for name in found.missing if ".shortcut." in name]
    return bool(added) and len(added) == len(found.missing) and not (found.unknown or found.shapes)


def _difference(name: str, theirs: Tensor, own: Tensor) -> str:
    if theirs.shape == own.shape:
        return f"{name} is {_said(theirs.dtype)}, the network's {_said(own.dtype)}"
    return f"{name} is {tuple(theirs.shape)}, the network's {tuple(own.shape)}"


def _fitting(tensors: Mapping[str, Tensor], input_shape: Sequence[int]) -> dict[str, int]:
    """Every architecture of ours that a file's weights fit, with the classes of their head."""
    if len(input_shape) != 3:
        return {}
    sizes = _shapes({k: v for k, v in tensors.items() if not naming.is_passing(k)})
    fitting = {}
    for name in models.MODELS:
        own = _outline(name, 2, tuple(input_shape))
        needed = _shapes({k: v for k, v in own.items() if not k.startswith(f"{HEAD}.")})
        if needed - sizes or (sizes - needed).total() > 2:  # cheap, and true of nearly all
            continue
        classes = naming.classes_in(tensors, own, HEAD)
        if classes is None:
            continue
        if naming.translate(tensors, _outline(name, classes, tuple(input_shape))).fits:
            fitting[name] = classes
    return fitting


@cache
def _outline(name: str, classes: int, input_shape: tuple[int, ...]) -> Mapping[str, Tensor]:
    """An architecture's tensors without their values."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that small images leave empty
        module = models.MODELS[name].build(classes, input_shape)
    return module.state_dict()


def _shapes(tensors: Mapping[str, Tensor]) -> Counter[torch.Size]:
    """How often each shape is there, but for single numbers."""
    return Counter(x.shape for x in tensors.values() if x.dim() > 0)
