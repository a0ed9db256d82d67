"""Weights of trained networks: ours with what they need to be used, and other projects' files."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill import models
from potstill.errors import NetworkError, StorageError, first_line
from potstill.files import load_tensors
from potstill.net import Net, affine_between
from potstill.run import Run


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
    about: Mapping[str, Any] = field(default_factory=dict)


def read(path: str | Path) -> Weights:
    """Weights from a run directory (or RUN:predictor), a .safetensors file or a .pth file.

    A .pth is read without running code. Raises StorageError for a file that is missing or damaged,
    NetworkError for one that holds something else than weights.
    """
    path = Path(path).expanduser()
    folder, _, predictor = str(path).rpartition(":")
    if folder and not path.exists() and Path(folder).is_dir():  # RUN:student0
        return ours(*Run.open(folder).load_predictor(predictor), str(path))
    if path.is_dir():
        return ours(*Run.open(path).load_predictor("student"), str(path))
    if not path.is_file():
        raise StorageError(f"no weights at {path}: no such file or run folder")
    if path.suffix == ".safetensors":
        tensors, text = load_tensors(path)
        return ours(tensors, {k: _from_json(v) for k, v in text.items()}, str(path))
    return Weights(_read_foreign(path), str(path))


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # another program's metadata are plain text
        return text


def ours(tensors: Mapping[str, Tensor], about: Mapping[str, Any], source: str) -> Weights:
    """Weights with what a saved predictor's metadata say of them."""
    known = {k: about.get(k) for k in ("model", "classes", "mean", "std", "input_shape")}
    if str(known["model"]).startswith("py:"):  # a file must not decide which code is run
        known["model"] = None
    return Weights(tensors, source, **known, about=dict(about))


def _read_foreign(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what matters is raised below
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
        inner = next((state[k] for k in ("state_dict", "model", "net") if _is_dict(state, k)), None)
        if inner is None:
            break
        state = inner
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if _is_dict(state) else {}
    if not tensors:
        raise NetworkError(f"{path} holds no state_dict; it is a {type(content).__name__}")
    return {k.removeprefix("module."): v for k, v in tensors.items()}


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
) -> Net:
    """A network by name, with these weights, for images normalised by (mean, std).

    A network with weights keeps their head: its class count is that of the weights, never
    re-initialised to `num_classes`. `normalize` is the network's own (mean, std); by default what
    the weights' file says, else the images'. Raises NetworkError where name and weights disagree.
    """
    if weights is None:
        own = normalize or (mean, std)
        return models.build(name, num_classes, input_shape, affine_between(mean, std, *own))
    if weights.model is not None and weights.model != name:
        raise NetworkError(f"{weights.source} holds a {weights.model}, not a {name}")
    if normalize is None and weights.mean is not None and weights.std is not None:
        normalize = (weights.mean, weights.std)
    own = normalize or (mean, std)
    net = models.build(name, num_classes, input_shape, affine_between(mean, std, *own))
    head = weights.tensors.get(f"{net.classifier_path}.weight")
    if head is not None and len(head) != num_classes:
        net = models.build(name, len(head), input_shape, affine_between(mean, std, *own))
    load_into(net, weights)
    return net


def load_into(net: Net, weights: Weights) -> None:
    """Copy weights into a network. Raises NetworkError naming the layers that differ."""
    own = net.state_dict()
    missing = [k for k in own if k not in weights.tensors]
    unknown = [k for k in weights.tensors if k not in own]
    shapes = [
        f"{k} is {tuple(weights.tensors[k].shape)}, the network's {tuple(v.shape)}"
        for k, v in own.items()
        if k in weights.tensors and weights.tensors[k].shape != v.shape
    ]
    if missing or unknown or shapes:
        lines = [f"{weights.source} does not fit this {type(net.module).__name__}:"]
        for title, items in (
            ("only in the network", missing),
            ("only in the file", unknown),
            ("other shapes", shapes),
        ):
            if items:
                more = f", and {len(items) - 4} more" if len(items) > 4 else ""
                lines.append(f"  {title}: {', '.join(items[:4])}{more}")
        raise NetworkError("\n".join(lines))
    net.load_state_dict(dict(weights.tensors))
