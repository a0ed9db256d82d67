"""How good a network is: top-k accuracy and cross-entropy over a whole set of images.

Of what it predicts, or of its vectors alone, by the nearest class mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import distributed
from potstill.method import Batch
from potstill.net import Net


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


class Ensemble(nn.Module):
    """Mean of the logits of several predictors. (B, C, H, W) -> (B, K)"""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, image: Tensor) -> Tensor:
        return mean_logits([member(image) for member in self.members])


def mean_logits(logits: Sequence[Tensor]) -> Tensor:
    """Of several networks: each (B, K) -> (B, K)"""
    return torch.stack(list(logits)).mean(dim=0)


def class_means(vectors: Iterable[tuple[Tensor, Tensor]], classes: int) -> Tensor:
    """Mean vector of each class, then of unit length. pairs of (B, D), (B,) -> (K, D)

    The vectors are averaged as they are: the mean of unit vectors would be another direction. Over
    all ranks, each with its share, or with the same vectors. A class whose mean is zero, or that
    has no vector, is zero.
    """
    sums: Tensor | None = None
    for x, label in vectors:
        if sums is None:
            sums = torch.zeros(classes, x.shape[1], dtype=torch.float64, device=x.device)
        sums.index_add_(0, label, x.double())
    if sums is None:
        raise ValueError("there are no vectors")
    # the direction of a sum is that of the mean
    return F.normalize(distributed.summed([sums])[0], dim=1).to(x.dtype)


class NearestClassMean(nn.Module):
    """Classify by the mean of a class's training vectors. (B, C, H, W) -> (B, K)

    Inner products of an image's vector `tap` with `class_means` of the training images, which
    `evaluate` finds first; no classifier takes part. Ye, Lu, Zhan, TPAMI 2022, arXiv:2205.01915.
    """

    means: Tensor | None

    def __init__(self, net: Net, classes: int, tap: str = "embed") -> None:
        super().__init__()
        self.net, self.classes, self.tap = net, classes, tap
        self.register_buffer("means", None, persistent=False)

    def fit(self, batches: Iterable[Batch]) -> Tensor:
        """Find the means of each class, of all ranks' batches. -> (K, D)"""
        self.means = class_means(
            ((self.embed(b.image), b.label) for b in batches if len(b.label)), self.classes
        )
        return self.means

    def embed(self, image: Tensor) -> Tensor:
        """What is compared. (B, C, H, W) -> (B, D)"""
        return self.net.capture(image)[self.tap].flatten(1)

    def forward(self, image: Tensor) -> Tensor:
        assert self.means is not None, "fit() finds the means first"
        return self.embed(image) @ self.means.mT


@torch.no_grad()  # inference mode would poison what a module caches for training
def evaluate(
    predictors: Mapping[str, nn.Module],
    images: Images,
    batch_size: int = 500,
    training: Images | None = None,
) -> dict[str, Scores]:
    """Scores of every predictor (image -> logits), in eval mode, float32, over all ranks.

    Every image is seen once, clean (centred, unflipped), so the figures do not depend on the batch
    size but for rounding. An ensemble and its members run once a batch, not once each. Each
    module's mode is put back afterwards. `training` are the images that a `NearestClassMean` takes
    its means from.
    """
    modes = {m: m.training for predictor in predictors.values() for m in predictor.modules()}
    for predictor in predictors.values():
        predictor.eval()
    sums: dict[str, Tensor] = {}
    try:
        for predictor in predictors.values():
            if isinstance(predictor, NearestClassMean) and training is not None:
                predictor.fit(training.clean(batch_size, sharded=True))
        for batch in images.clean(batch_size, sharded=True):
            image, label = batch.image, batch.label
            known: dict[nn.Module, Tensor] = {}
            for name, predictor in predictors.items():
                empty = torch.zeros(4, dtype=torch.float64, device=label.device)
                # a rank's share of a short last batch may be nothing, and still counts as its part
                counted = _count(_logits(predictor, image, known), label) if len(label) else empty
                sums[name] = sums.get(name, empty) + counted
    finally:
        for module, mode in modes.items():
            module.training = mode
    scores = {}
    for name, total in zip(sums, distributed.summed(list(sums.values())), strict=True):
        top1, top5, loss, count = total.tolist()
        scores[name] = Scores(100 * top1 / count, 100 * top5 / count, loss / count, int(count))
    return scores


def _logits(predictor: nn.Module, image: Tensor, known: dict[nn.Module, Tensor]) -> Tensor:
    """What a predictor makes of a batch, from what its members made of it where these are known."""
    if predictor not in known:
        if type(predictor) is Ensemble:  # one that is derived may combine them otherwise
            known[predictor] = mean_logits([_logits(m, image, known) for m in predictor.members])
        else:
            known[predictor] = predictor(image)
    return known[predictor]


def _count(logits: Tensor, label: Tensor) -> Tensor:
    """Right at the first, right among five, summed cross-entropy, images. (B, K), (B,) -> (4,)"""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]
    loss = F.cross_entropy(logits, label, reduction="sum")
    count = torch.full_like(loss, len(label), dtype=torch.float64)
    return torch.stack([best[:, 0].sum().double(), best.sum().double(), loss.double(), count])
