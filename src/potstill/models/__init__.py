"""Architectures by the names the literature uses, each with its taps: one line each."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from potstill.errors import NetworkError, did_you_mean
from potstill.models import resnet_cifar
from potstill.net import Net


@dataclass(frozen=True)
class Architecture:
    """How a network is built, and its canonical taps.

    `build(num_classes=..., in_channels=...)` gives a new module with its published initialisation.
    """

    build: Callable[..., nn.Module]
    taps: Mapping[str, str]
    input_shape: tuple[int, int, int] = (3, 32, 32)
    description: str = ""


def _resnet(depth: int, widths: Sequence[int] = (16, 16, 32, 64)) -> Architecture:
    blocks = (depth - 2) // 6
    return Architecture(
        partial(resnet_cifar.ResNetCifar, blocks, tuple(widths)),
        resnet_cifar.taps(blocks),
        description=f"CIFAR ResNet-{depth}, widths {', '.join(map(str, widths))}",
    )


MODELS: dict[str, Architecture] = {
    "resnet8": _resnet(8),
    "resnet14": _resnet(14),
    "resnet20": _resnet(20),
    "resnet32": _resnet(32),
    "resnet44": _resnet(44),
    "resnet56": _resnet(56),
    "resnet110": _resnet(110),
    "resnet8x4": _resnet(8, (32, 64, 128, 256)),
    "resnet32x4": _resnet(32, (32, 64, 128, 256)),
}


def build(
    name: str,
    num_classes: int = 100,
    input_shape: Sequence[int] | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Net:
    """A new network with its canonical taps.

    `py:module:function` calls a function of your own with num_classes=..., which returns a module
    or a Net; a module's only tap is "embed".

    `input_shape` is (channels, height, width), by default the one of the published tables.
    `normalize` is as for `Net`. Raises NetworkError for a name that does not exist, naming those
    that do, and for images that the network cannot take.
    """
    if name.startswith("py:"):
        return _own(name, num_classes, tuple(input_shape or (3, 32, 32)), normalize)
    if name not in MODELS:
        raise NetworkError(
            f"no model '{name}'{did_you_mean(name, MODELS)}; the models are {', '.join(MODELS)}"
        )
    architecture = MODELS[name]
    shape = tuple(input_shape or architecture.input_shape)
    module = architecture.build(num_classes=num_classes, in_channels=shape[0])
    return Net(module, architecture.taps, shape, normalize)


def _own(
    name: str,
    num_classes: int,
    input_shape: Sequence[int],
    normalize: tuple[Sequence[float], Sequence[float]] | None,
) -> Net:
    """A network made by a function outside this package; recipes ask for --allow-code first."""
    place, _, function = name.removeprefix("py:").rpartition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it and an installed command has not
    try:
        made = getattr(importlib.import_module(place), function)(num_classes=num_classes)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise NetworkError(
            f"{name} cannot be made: {error}; write py:module:function, for a function that takes "
            "num_classes"
        ) from error
    finally:
        sys.path.pop(0)
    if isinstance(made, Net):
        made.close()
        made = Net(made.module, made.taps, input_shape, normalize)
    elif isinstance(made, nn.Module):
        made = Net(made, {}, input_shape, normalize)
    else:
        raise NetworkError(f"{name} returned a {type(made).__name__}, not a module")
    return made
