"""How good a network is: top-k accuracy and cross-entropy over a whole set of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import distributed
from potstill.method import Batch
from potstill.net import captured_from


class Images(Protocol):
    """A set of images to evaluate on; `potstill.data.Split` is one."""

    def clean(self, batch_size: int, sharded: bool = False) -> Iterator[Batch]: ...


class Scores(NamedTuple):
    """Of one predictor on one set of images."""

    top1: float
    """Percent of images whose highest logit is their label's."""
    top5: float
    """Percent whose label is among the five highest logits, or all where there are fewer."""
    loss: float
    """Mean cross-entropy, in nats."""
    images: int


@torch.no_grad()  # inference mode would poison what a module caches for training
def evaluate(
    predictors: Mapping[str, nn.Module], images: Images, batch_size: int = 500
) -> dict[str, Scores]:
    """Scores of every predictor (image -> logits), in eval mode, float32, over all ranks.

    Every image is seen once, clean (centred, unflipped), so the figures do not depend on the batch
    size but for rounding. Modules that several predictors have in common, as an ensemble and its
    members, run once a batch. Each module's mode is put back afterwards.
    """
    modes = {m: m.training for predictor in predictors.values() for m in predictor.modules()}
    for predictor in predictors.values():
        predictor.eval()
    sums: dict[str, Tensor] = {}
    try:
        with _running_once(_in_common(predictors.values())):
            for batch in images.clean(batch_size, sharded=True):
                image, label = batch.image, batch.label
                for name, predictor in predictors.items():
                    empty = torch.zeros(4, dtype=torch.float64, device=label.device)
                    # a rank's share of a short last batch may be nothing, and counts as its part
                    counted = _count(predictor(image), label) if len(label) else empty
                    sums[name] = sums.get(name, empty) + counted
    finally:
        for module, mode in modes.items():
            module.training = mode
    scores = {}
    for name, total in zip(sums, distributed.summed(list(sums.values())), strict=True):
        top1, top5, loss, count = total.tolist()
        scores[name] = Scores(100 * top1 / count, 100 * top5 / count, loss / count, int(count))
    return scores


def _in_common(predictors: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules of several predictors, without the parts of such modules."""
    predictors = list(predictors)
    times = Counter(module for predictor in predictors for module in predictor.modules())

    def topmost(module: nn.Module) -> Iterator[nn.Module]:
        if times[module] > 1:
            yield module
        else:
            for part in module.children():
                yield from topmost(part)

    return list(dict.fromkeys(m for predictor in predictors for m in topmost(predictor)))


@contextmanager
def _running_once(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, each module answers a tensor that it has just seen with what it gave then."""
    changed = [m for m in modules if "forward" not in vars(m) and not _is_scripted(m)]
    for module in changed:
        module.forward = _Memory(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward  # the instance's; the class has its own


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)  # its forward cannot be replaced


class _Memory:
    """A module's forward that remembers its last call with one tensor.

    Not one whose input or output has been written into since, nor where a feature is to be captured
    inside.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward
        self.last: tuple[Tensor, int, Tensor, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return self.forward(*args, **kwargs)
        if self.last is not None and not captured_from(self.module):
            given, version, output, output_version = self.last
            same = given is args[0] and given._version == version
            if same and output._version == output_version:
                return output
        output = self.forward(args[0])
        fresh = isinstance(output, Tensor) and output is not args[0]
        if fresh and not args[0].is_inference() and not output.is_inference():  # has no version
            self.last = args[0], args[0]._version, output, output._version
        return output


def _count(logits: Tensor, label: Tensor) -> Tensor:
    """Right at the first, right among five, summed cross-entropy, images. (B, K), (B,) -> (4,)"""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]
    loss = F.cross_entropy(logits, label, reduction="sum")
    count = torch.full_like(loss, len(label), dtype=torch.float64)
    return torch.stack([best[:, 0].sum().double(), best.sum().double(), loss.double(), count])
