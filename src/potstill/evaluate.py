"""How good a network is: top-k accuracy and cross-entropy over a whole set of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import distributed
from potstill.method import Batch


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
    size but for rounding. Each module's mode is put back afterwards.
    """
    modes = {m: m.training for predictor in predictors.values() for m in predictor.modules()}
    for predictor in predictors.values():
        predictor.eval()
    sums: dict[str, Tensor] = {}
    try:
        for batch in images.clean(batch_size, sharded=True):
            for name, predictor in predictors.items():
                empty = torch.zeros(4, dtype=torch.float64, device=batch.label.device)
                # a rank's share of a short last batch may be nothing, and still counts as its part
                counted = _count(predictor(batch.image), batch.label) if len(batch.label) else empty
                sums[name] = sums.get(name, empty) + counted
    finally:
        for module, mode in modes.items():
            module.training = mode
    scores = {}
    for name, total in zip(sums, distributed.summed(list(sums.values())), strict=True):
        top1, top5, loss, count = total.tolist()
        scores[name] = Scores(100 * top1 / count, 100 * top5 / count, loss / count, int(count))
    return scores


def _count(logits: Tensor, label: Tensor) -> Tensor:
    """Right at the first, right among five, summed cross-entropy, images. (B, K), (B,) -> (4,)"""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]
    loss = F.cross_entropy(logits, label, reduction="sum")
    count = torch.full_like(loss, len(label), dtype=torch.float64)
    return torch.stack([best[:, 0].sum().double(), best.sum().double(), loss.double(), count])
