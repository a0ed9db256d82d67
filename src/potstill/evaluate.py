"""How good a network is: accuracy, cross-entropy and calibration over a whole set of images.

Of what it predicts, or of its vectors alone, by the nearest class mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import distributed
from potstill.method import Batch
from potstill.net import Net

BINS = 15
"""Of equal width, that confidences in (0, 1] are sorted into."""


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
    ece: float
    """Expected calibration error in percent, see `reliability`. It means little where the outputs
    are no logits, as a `NearestClassMean`'s."""


class Predictions(NamedTuple):
    """What one predictor says of each image that this rank saw, in their order."""

    label: Tensor
    """(n,) int64"""
    best: Tensor
    """(n,) int64, the class of the highest logit."""
    confidence: Tensor
    """(n,) its softmax probability, in float32 or the logits' float64."""
    in_top5: Tensor
    """(n,) bool, whether the label is among the five highest logits."""
    loss: Tensor
    """(n,) cross-entropy, in nats."""


class Bin(NamedTuple):
    """The images whose confidence is in one of `BINS` parts of (0, 1]. Fractions, not percent."""

    images: int
    confidence: float | None
    """Mean; None where there is no image."""
    accuracy: float | None


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


def evaluate(
    predictors: Mapping[str, nn.Module],
    images: Images,
    batch_size: int = 500,
    training: Images | None = None,
    precision: torch.dtype | None = None,
) -> dict[str, Scores]:
    """Scores of every predictor (image -> logits), in eval mode, over all ranks; see `predict`."""
    found = predict(predictors, images, batch_size, training, precision)
    return {name: scores(predictions) for name, predictions in found.items()}


@torch.no_grad()  # inference mode would poison what a module caches for training
def predict(
    predictors: Mapping[str, nn.Module],
    images: Images,
    batch_size: int = 500,
    training: Images | None = None,
    precision: torch.dtype | None = None,
) -> dict[str, Predictions]:
    """What every predictor says of each image of this rank's share, on their device.

    Every image is seen once, clean (centred, unflipped), so the figures do not depend on the batch
    size but for rounding. An ensemble and its members run once a batch, not once each. Each
    module's mode is put back afterwards. `training` are the images that a `NearestClassMean` takes
    its means from. `precision` is the type that predictors are autocast to; None: float32.
    """
    found: dict[str, list[Predictions]] = defaultdict(list)
    with eval_mode(*predictors.values()), _autocast(predictors, precision):
        for predictor in predictors.values():
            if isinstance(predictor, NearestClassMean) and training is not None:
                predictor.fit(training.clean(batch_size, sharded=True))
        for batch in images.clean(batch_size, sharded=True):
            image, label = batch.image, batch.label
            known: dict[nn.Module, Tensor] = {}
            none = label.new_zeros(0, 1, dtype=torch.float32)
            for name, predictor in predictors.items():
                # a rank's share of a short last batch may be nothing, and still counts as its part
                logits = _logits(predictor, image, known) if len(label) else none
                found[name].append(_predictions(logits, label))
    return {
        name: Predictions(*(torch.cat(part) for part in zip(*parts, strict=True)))
        for name, parts in found.items()
    }


def _autocast(predictors: Mapping[str, nn.Module], precision: torch.dtype | None) -> Any:
    """A context in which predictors compute in a type, on the device they are on."""
    tensors = (p for predictor in predictors.values() for p in predictor.parameters())
    kind = next((p.device.type for p in tensors), "cpu")
    return torch.autocast(kind, precision, enabled=precision is not None)


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Within, modules are in eval mode; each part's own mode is put back afterwards."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def scores(predictions: Predictions) -> Scores:
    """Over all ranks' images."""
    label, best, _, in_top5, loss = predictions
    sums = [(best == label).sum(), in_top5.sum(), loss.double().sum(), torch.ones_like(loss).sum()]
    totals, bins = distributed.summed(
        [torch.stack([part.double() for part in sums]), _binned(predictions)]
    )
    top1, top5, nats, count = totals.tolist()
    gaps = (bins[:, 1] - bins[:, 2]).abs().sum().item()
    ece = 100 * gaps / count
    return Scores(100 * top1 / count, 100 * top5 / count, nats / count, int(count), ece)


def reliability(predictions: Predictions) -> list[Bin]:
    """How often a predictor is right when it is how sure: `BINS` bins, over all ranks' images.

    Their gaps |accuracy - mean confidence|, weighted by the images in them, sum up to the expected
    calibration error: eq. (3) of Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural
    Networks, ICML 2017, arXiv:1706.04599. A confidence on an edge belongs to the bin below.
    """
    (bins,) = distributed.summed([_binned(predictions)])
    return [
        Bin(int(count), confidence / count, right / count) if count else Bin(0, None, None)
        for count, confidence, right in bins.tolist()
    ]


def agreement(a: Predictions, b: Predictions) -> float:
    """Percent of images, over all ranks, of which two predictors' best classes are the same.

    Raises ValueError for predictions of other images.
    """
    if not torch.equal(a.label, b.label):
        raise ValueError("the two have predicted different images")
    same = a.best == b.best
    (sums,) = distributed.summed([torch.stack([same.sum(), torch.ones_like(same).sum()])])
    return 100 * sums[0].item() / sums[1].item()


def _logits(predictor: nn.Module, image: Tensor, known: dict[nn.Module, Tensor]) -> Tensor:
    """What a predictor makes of a batch, from what its members made of it where these are known."""
    if predictor not in known:
        if type(predictor) is Ensemble:  # one that is derived may combine them otherwise
            known[predictor] = mean_logits([_logits(m, image, known) for m in predictor.members])
        else:
            known[predictor] = predictor(image)
    return known[predictor]


def _predictions(logits: Tensor, label: Tensor) -> Predictions:
    """Of one batch. (B, K), (B,) -> each (B,)"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    confidence = logits.softmax(dim=1).gather(1, best[:, :1])[:, 0]
    in_top5 = (best == label[:, None]).any(dim=1)
    loss = F.cross_entropy(logits, label, reduction="none")
    return Predictions(label, best[:, 0], confidence, in_top5, loss)


def _binned(predictions: Predictions) -> Tensor:
    """Images, summed confidence and right ones of each bin, of this rank. -> (BINS, 3) float64"""
    label, best, confidence, *_ = predictions
    edges = torch.arange(1, BINS, dtype=confidence.dtype, device=confidence.device) / BINS
    each = torch.stack([torch.ones_like(confidence), confidence, best == label], dim=1).double()
    at = F.one_hot(torch.bucketize(confidence, edges), BINS).double()
    return at.mT @ each  # not index_add_, whose order of additions differs from run to run on a GPU
