"""Several ranks, one training: the only file that imports torch.distributed.

Order and views are drawn globally and sliced by rank, each term's gradient is averaged over ranks
before any norm is taken, and relations within a batch are gathered with gradient. So a training on
2 ranks with batch B / 2 each equals one on 1 rank with batch B, but for BatchNorm, whose
statistics are each rank's own (their running averages are averaged after every step).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from potstill.errors import PotstillError


@contextmanager
def together() -> Iterator[None]:
    """Within, this process is one of the group that `torchrun` announces; alone without one.

    A rank that fails leaves at once, the others after all have come this far.
    """
    _join()
    try:
        yield
        barrier()  # a rank that tears down early breaks the others' last collective
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if not torch.cuda.is_available():
            dist.init_process_group("gloo")
            return
        local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= devices:
            raise PotstillError(
                f"rank {local_rank} of this machine has no GPU of its own, there are {devices}; "
                f"start at most {devices} processes on it"
            )
        torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl")


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; rank 0 alone writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def local(x: Tensor) -> Tensor:
    """This rank's contiguous share of what was drawn for the whole batch. (B, ...) -> (B/W, ...)"""
    r, w, n = rank(), world_size(), len(x)
    return x[r * n // w : (r + 1) * n // w]


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """New tensors that are the sums over ranks, sent in one bucket per dtype.

    New, because autograd hands out one tensor for several parameters, or an expanded one.
    """
    if world_size() == 1:
        return list(tensors)
    found: dict[int, Tensor] = {}
    for dtype in sorted({t.dtype for t in tensors}, key=str):  # every rank in the same order
        bucket = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in bucket])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensors[i].numel() for i in bucket])
        found |= {i: part.view(tensors[i].shape) for i, part in zip(bucket, parts, strict=True)}
    return [found[i] for i in range(len(tensors))]


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """New tensors that are the means over ranks."""
    return [t / world_size() for t in summed(tensors)] if world_size() > 1 else list(tensors)


def statistics(module: nn.Module) -> list[Tensor]:
    """BatchNorm's running averages: the only state that each rank computes from its own images."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    return [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]


def gradient(
    loss: Tensor, parameters: Sequence[nn.Parameter], retain_graph: bool = True
) -> list[Tensor]:
    """d loss / d parameters, averaged over ranks; zeros where the loss does not reach.

    `autograd.grad` fires no hook of DistributedDataParallel, so the averaging is done here, and
    before the caller can take a norm. Zeros rather than None, because a compiled network gives
    zeros anyway, and ranks that disagree on what is None would wait for each other for ever. The
    graph is kept unless told otherwise: a turn may differentiate one forward several times.
    """
    if loss.requires_grad:
        gradients = list(
            torch.autograd.grad(
                loss,
                parameters,
                retain_graph=retain_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    else:
        gradients = [torch.zeros_like(p) for p in parameters]
    return averaged(gradients)


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; backwards, sum what every rank's loss says of this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may share its own
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """The global batch's rows in order, from every rank's equal share. (B/W, ...) -> (B, ...)

    Gradients flow back: each rank that computes the same loss over the gathered rows, followed by
    `gradient`'s average, gets the gradient of one process that saw the whole batch. In a single
    process the tensor itself.
    """
    if world_size() == 1:
        return x
    return _Gather.apply(x)  # type: ignore[no-untyped-call, no-any-return]


def broadcast_(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if world_size() > 1:
        for t in [*module.parameters(), *module.buffers()]:
            dist.broadcast(t.data, 0)


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()
