"""How other projects name the tensors of our networks, and which naming a file follows.

A file is read by its names alone: a naming is taken only where it finds every tensor of the network
with its shape and leaves nothing over. Two layers of equal shape are never told apart by their
order, so a file whose names say nothing of it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from potstill.models import mobilenet

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""Pattern of a whole module path of ours, and what that module is called there."""


@dataclass(frozen=True)
class Naming:
    """What a project calls the modules of a family.

    The first rule for a path counts; a path without one is the same there.
    """

    project: str
    rules: Sequence[Rule] = ()

    def __call__(self, name: str) -> str:
        """Their name of one of our tensors."""
        path, dot, leaf = name.rpartition(".")
        for pattern, there in self.rules:
            if found := re.fullmatch(pattern, path):
                path = there(found) if callable(there) else found.expand(there)
                break
        return f"{path}{dot}{leaf}"


_SEPARABLE = {
    f"layer{i}.{j}": n
    for n, (i, j) in enumerate((i, j) for i, (_, k) in enumerate(mobilenet.V1, 1) for j in range(k))
}
"""Blocks of MobileNetV1 in forward order: the others have no stages."""


def _in_line(found: re.Match[str], first: int = 1) -> int:
    """Place of a numbered convolution or BatchNorm in a line of convolution, BatchNorm, ReLU."""
    return 3 * (int(found["n"]) - first) + (found["kind"] == "bn")


OURS = Naming("Potstill")
"""Those of torchvision's ResNets too, which RepDistiller, mdistiller, SimKD, OFD and AFD share."""

NAMINGS = (
    # resnetv2 and both ShuffleNets of RepDistiller and mdistiller; resnet of pytorch-cifar
    Naming(
        "RepDistiller or pytorch-cifar",
        [(r"(layer\d+\.\d+)\.downsample\.(\d)", r"\1.shortcut.\2"), ("fc", "linear")],
    ),
    # wrn of RepDistiller, mdistiller and AFD; WideResNet of OFD
    Naming(
        "RepDistiller",
        [
            (r"layer(\d+)\.(\d+)\.shortcut", r"block\1.layer.\2.convShortcut"),
            (r"layer(\d+)\.(\d+)\.(\w+)", r"block\1.layer.\2.\3"),
        ],
    ),
    # vgg of RepDistiller, mdistiller and SimKD
    Naming(
        "RepDistiller",
        [
            (
                r"layer(?P<i>\d+)\.(?P<n>\d+)\.(?P<kind>conv|bn)",
                lambda m: f"block{int(m['i']) - 1}.{_in_line(m, first=0)}",
            ),
            ("fc", "classifier"),
        ],
    ),
    # mobilenetv2 of RepDistiller, mdistiller and SimKD
    Naming(
        "RepDistiller",
        [
            (
                r"layer(?P<i>\d+)\.(?P<j>\d+)\.(?P<kind>conv|bn)(?P<n>\d)",
                lambda m: f"blocks.{int(m['i']) - 1}.{m['j']}.conv.{_in_line(m)}",
            ),
            (r"conv(\d)", r"conv\1.0"),
            (r"bn(\d)", r"conv\1.1"),
            ("fc", "classifier.0"),
        ],
    ),
    # wide_resnet and mobile_net of GKD and ReFilled
    Naming("GKD", [(r"(layer\d+\.\d+)\.shortcut", r"\1.shortcut.0"), ("bn1", "bn")]),
    Naming("GKD", [(r"(layer\d+\.\d+)\.(\w+)", lambda m: f"layers.{_SEPARABLE.get(m[1])}.{m[2]}")]),
    # mobilenet of pytorch-cifar
    Naming(
        "pytorch-cifar",
        [
            (r"(layer\d+\.\d+)\.(\w+)", lambda m: f"layers.{_SEPARABLE.get(m[1])}.{m[2]}"),
            ("fc", "linear"),
        ],
    ),
    # MobileNet of OFD; mobilenetv1 of mdistiller
    Naming(
        "OFD or mdistiller",
        [
            (
                r"(layer\d+\.\d+)\.(?P<kind>conv|bn)(?P<n>\d)",
                lambda m: f"model.{_SEPARABLE.get(m[1], -1) + 1}.{_in_line(m)}",
            ),
            ("conv1", "model.0.0"),
            ("bn1", "model.0.1"),
        ],
    ),
)

PASSING = ("total_ops", "total_params", "n_averaged")
"""Last names of what is no part of a network: thop's counts, and that of an averaged model."""
COUNTER = "num_batches_tracked"
"""No file from before PyTorch 0.4.1 has it, and no network of ours computes with it."""


@dataclass(frozen=True)
class Translation:
    """A file's tensors and a network's, brought together by one naming."""

    naming: Naming
    prefix: str
    """What all of the file's names begin with: "module.", "student." and the like."""
    names: Mapping[str, str]
    """Our name to the file's, of tensors that fit."""
    shapes: Mapping[str, str]
    """The same of tensors whose shape or kind of number is another."""
    missing: Sequence[str]
    """What the file would call what it lacks, without the prefix."""
    unknown: Sequence[str]
    """The file's names that the network has no place for, without the prefix."""
    ignored: Sequence[str]
    """The file's names that are no part of a network."""

    @property
    def fits(self) -> bool:
        """Whether every tensor was found, and nothing is left over."""
        return not (self.missing or self.unknown or self.shapes)


def translate(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Translation:
    """The naming that brings all of a file's tensors to those of a network, or else the closest.

    The file's names as they are come first, then each known naming, all with and without a prefix
    that the whole file shares. The closest is the one that finds the most names.
    """
    tried = []
    for naming in (OURS, *NAMINGS):
        theirs = {name: naming(name) for name in own}
        if len(set(theirs.values())) < len(own):  # one tensor of theirs for two of ours
            continue
        for prefix in _prefixes(tensors):
            found = _compare(tensors, own, naming, prefix, theirs)
            if found.fits:
                return found
            tried.append(found)
    return max(tried, key=lambda t: (len(t.names) + len(t.shapes), len(t.names)))


def classes_in(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], head: str | None
) -> int | None:
    """How many classes a file's classifier has; `head` is its path in the network.

    None where the file has no such layer.
    """
    found = translate(tensors, own)
    theirs = {**found.names, **found.shapes}.get(f"{head}.weight")
    if theirs is None or tensors[theirs].dim() < 2:
        return None
    return len(tensors[theirs]) or None


def _prefixes(names: Mapping[str, Tensor]) -> list[str]:
    """Every prefix that ends in a dot and that all names share, the empty one first."""
    said = [name for name in names if not is_passing(name)]
    prefixes = [""]
    while said and all("." in name[len(prefixes[-1]) :] for name in said):
        rest = [name[len(prefixes[-1]) :] for name in said]
        first = {name.partition(".")[0] for name in rest}
        if len(first) > 1:
            break
        prefixes.append(f"{prefixes[-1]}{first.pop()}.")
    return prefixes


def is_passing(name: str) -> bool:
    """Whether a tensor of this name is no part of a network."""
    return name.rpartition(".")[2] in PASSING


def _compare(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    naming: Naming,
    prefix: str,
    theirs: Mapping[str, str],
) -> Translation:
    found = {name: prefix + there for name, there in theirs.items() if prefix + there in tensors}
    fitting = {name: there for name, there in found.items() if _alike(tensors[there], own[name])}
    left = tensors.keys() - found.values()
    ordered = [name for name in tensors if name in left]
    return Translation(
        naming,
        prefix,
        fitting,
        {name: there for name, there in found.items() if name not in fitting},
        [theirs[name] for name in own if name not in found and not name.endswith(COUNTER)],
        [name.removeprefix(prefix) for name in ordered if not is_passing(name)],
        [name for name in ordered if is_passing(name)],
    )


def _alike(theirs: Tensor, own: Tensor) -> bool:
    """The same shape, and real numbers for real numbers: a rounded copy would lose its scale."""
    real = theirs.is_floating_point() or not own.is_floating_point()
    return theirs.shape == own.shape and real
