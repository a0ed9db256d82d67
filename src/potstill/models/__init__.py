"""Architectures by the names the literature uses, each with its taps: one line each."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from torch import nn

from potstill.errors import NetworkError, did_you_mean, first_line
from potstill.models import mhgd, mobilenet, outside, resnet, shufflenet, vgg, wrn
from potstill.models.architecture import Architecture
from potstill.net import Net

MODELS: dict[str, Architecture] = {
    "resnet8": resnet.cifar(8),
    "resnet14": resnet.cifar(14),
    "resnet20": resnet.cifar(20),
    "resnet32": resnet.cifar(32),
    "resnet38": resnet.cifar(38),
    "resnet44": resnet.cifar(44),
    "resnet56": resnet.cifar(56),
    "resnet110": resnet.cifar(110),
    "resnet14x2": resnet.cifar(14, (16, 32, 64, 128)),
    "resnet38x2": resnet.cifar(38, (16, 32, 64, 128)),
    "resnet8x4": resnet.cifar(8, (32, 64, 128, 256)),
    "resnet32x4": resnet.cifar(32, (32, 64, 128, 256)),
    "resnet18": resnet.four_stages(18),
    "resnet34": resnet.four_stages(34),
    "resnet50": resnet.four_stages(50),
    "resnet18_imagenet": resnet.four_stages(18, large=True),
    "resnet34_imagenet": resnet.four_stages(34, large=True),
    "resnet50_imagenet": resnet.four_stages(50, large=True),
    "wrn_16_1": wrn.wrn(16, 1),
    "wrn_16_2": wrn.wrn(16, 2),
    "wrn_16_4": wrn.wrn(16, 4),
    "wrn_28_2": wrn.wrn(28, 2),
    "wrn_28_4": wrn.wrn(28, 4),
    "wrn_28_10": wrn.wrn(28, 10),
    "wrn_40_1": wrn.wrn(40, 1),
    "wrn_40_2": wrn.wrn(40, 2),
    "wrn_40_4": wrn.wrn(40, 4),
    "wrn_16_1_gkd": wrn.wrn(16, 1, biased=True),
    "wrn_16_2_gkd": wrn.wrn(16, 2, biased=True),
    "wrn_16_4_gkd": wrn.wrn(16, 4, biased=True),
    "wrn_28_2_gkd": wrn.wrn(28, 2, biased=True),
    "wrn_28_4_gkd": wrn.wrn(28, 4, biased=True),
    "wrn_40_1_gkd": wrn.wrn(40, 1, biased=True),
    "wrn_40_2_gkd": wrn.wrn(40, 2, biased=True),
    "vgg8": vgg.vgg(8),
    "vgg11": vgg.vgg(11),
    "vgg13": vgg.vgg(13),
    "vgg16": vgg.vgg(16),
    "vgg19": vgg.vgg(19),
    "mobilenetv1": mobilenet.v1(),
    "mobilenetv1_imagenet": mobilenet.v1(large=True),
    "mobilenetv1_x0_75_imagenet": mobilenet.v1(0.75, large=True),
    "mobilenetv1_x0_5_imagenet": mobilenet.v1(0.5, large=True),
    "mobilenetv1_x0_25_imagenet": mobilenet.v1(0.25, large=True),
    "mobilenetv2": mobilenet.v2_half(),
    "shufflenetv1": shufflenet.v1(),
    "shufflenetv2": shufflenet.v2(),
    "wrn_22_4_mhgd": wrn.wrn(22, 4, halve_large=True),
    "wrn_10_4_mhgd": wrn.wrn(10, 4, halve_large=True),
    "vgg_teacher_mhgd": mhgd.plain_vgg("teacher"),
    "vgg_student_mhgd": mhgd.plain_vgg("student"),
    "resnet_mhgd": mhgd.small_resnet(),
    "mobilenet_mhgd": mhgd.small_mobilenet(),
    "vgg_bn_mhgd": mhgd.small_vgg(),
}


OWN_CODE = "py:"
"""Begins the name of a network that a function of one's own makes."""


def is_name(text: str) -> bool:
    """Whether a text names a network to build, and no file of weights."""
    return text in MODELS or text.startswith((OWN_CODE, *outside.PREFIXES))


def build(
    name: str,
    num_classes: int = 100,
    input_shape: Sequence[int] | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Net:
    """A new network with its canonical taps.

    `py:module:function` calls a function of your own with num_classes=..., which returns a module
    or a Net. timm:NAME, tv:NAME and hub:OWNER/REPO are networks of other libraries, with random
    weights. The taps of a module that is not ours are those that `Net.discover` proposes.

    `input_shape` is (channels, height, width), by default the one of the published tables.
    `normalize` is as for `Net`. Raises NetworkError for a name that does not exist, naming the
    nearest, and for images that the network cannot take; MissingExtra without the other library.
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise NetworkError(f"num_classes is {num_classes!r}; give a whole number from 1 on")
    if name.startswith(outside.PREFIXES):
        shape = tuple(input_shape or (3, 224, 224))
        return tapped(outside.make(name, num_classes, shape[0]).module, shape, normalize)
    if name.startswith(OWN_CODE):
        return _own(name, num_classes, tuple(input_shape or (3, 32, 32)), normalize)
    if name not in MODELS:
        raise NetworkError(
            f"no model '{name}'{did_you_mean(name, MODELS)}; `potstill list models` shows all"
        )
    architecture = MODELS[name]
    shape = tuple(input_shape or architecture.input_shape)
    module = architecture.build(num_classes, shape)
    places, norms = architecture.places, architecture.norms
    blocks, ends = architecture.blocks, architecture.block_ends
    return Net(module, places, shape, normalize, norms=norms, blocks=blocks, block_ends=ends)


def tapped(
    module: nn.Module,
    input_shape: Sequence[int],
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Net:
    """A module with the taps that `Net.discover` proposes."""
    return Net(module, Net.discover(module, input_shape), input_shape, normalize)


def _own(
    name: str,
    num_classes: int,
    input_shape: Sequence[int],
    normalize: tuple[Sequence[float], Sequence[float]] | None,
) -> Net:
    """A network made by a function outside this package; recipes ask for --allow-code first."""
    place, _, function = name.removeprefix(OWN_CODE).rpartition(":")
    if not place or not function:
        raise NetworkError(f"'{name}' is not py:module:function")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it and an installed command has not
    try:
        made = getattr(importlib.import_module(place), function)(num_classes=num_classes)
    except Exception as error:  # whatever a user's code raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise NetworkError(
            f"{name} cannot be made: {type(error).__name__}: {first_line(error)} "
            f"({last.filename}, line {last.lineno}); it is called with num_classes={num_classes}"
        ) from error
    finally:
        sys.path.pop(0)
    if isinstance(made, Net):
        made.close()
        made = Net(
            made.module,
            made.taps,
            input_shape,
            normalize,
            norms=made.norms,
            blocks=made.blocks,
            block_ends=made.block_ends,
        )
    elif isinstance(made, nn.Module):
        made = tapped(made, input_shape, normalize)
    else:
        raise NetworkError(f"{name} returned a {type(made).__name__}, not a module")
    return made
