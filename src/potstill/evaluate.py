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


@torch.inference_mode()
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
                counted = _count(predictor(batch.image), batch.label)
                sums[name] = sums[name] + counted if name in sums else counted
    finally:
        for module, mode in modes.items():
            module.training = mode
    distributed.sum_(list(sums.values()))
    scores = {}
    for name, total in sums.items():
        top1, top5, loss, count = total.tolist()
        scores[name] = Scores(100 * top1 / count, 100 * top5 / count, loss / count, int(count))
    return scores


def _count(logits: Tensor, label: Tensor) -> Tensor:
    """Right at the first, right among five, summed cross-entropy, images. (B, K), (B,) -> (4,)"""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]
    loss = F.cross_entropy(logits, label, reduction="sum")
    count = torch.full_like(loss, len(label), dtype=torch.float64)
    return torch.stack([best[:, 0].sum().double(), best.sum().double(), loss.double(), count])
