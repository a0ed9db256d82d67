"""What BatchNorm layers normalise by, other than their mode says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Within, BatchNorm layers normalise by the batch and leave every buffer as it is.

    The published runs of OFD, ReviewKD and SAKD have their teachers so, and alternating mutual
    learning refreshes a peer's prediction so. Momentum 0 would not do: it still counts batches.
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(m.training, m.track_running_stats) for m in layers]
    for layer in layers:  # without tracking, torch hands no buffers to batch_norm in train mode
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for layer, (training, tracking) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracking


@contextmanager
def running_statistics(module: nn.Module) -> Iterator[None]:
    """Within, a module is in eval mode: BatchNorm layers normalise by their running averages.

    For layers that a method has frozen while the engine has it in train mode.
    """
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
