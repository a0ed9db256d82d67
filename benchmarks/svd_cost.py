"""What the leading singular vectors of a batch of maps cost, beside torch.linalg.svd.

    python benchmarks/svd_cost.py [--rounds 20] [--batch-size 128] [--out FILE]

At the sensing points of MHGD's networks, forward and backward, in turns in one process; then once
more with one channel in eight dead, as after a ReLU, to see whose gradient is finite.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from potstill.losses import right_singular_vectors
from potstill.run import describe_environment

MAPS = {
    "WRN 64x32x32": (64, 32),
    "WRN 128x16x16": (128, 16),
    "WRN 256x8x8": (256, 8),
    "VGG 64x16x16": (64, 16),
    "VGG 128x8x8": (128, 8),
    "VGG 256x4x4": (256, 4),
    "VGG 512x4x4": (512, 4),
    "VGG 512x2x2": (512, 2),
}
COUNT = 4
"""Of the student's maps in MHGD and KD-SVD."""


def ours(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, D, 4)"""
    return right_singular_vectors(x, COUNT)[1]


def torchs(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, D, 4)"""
    return torch.linalg.svd(x.flatten(2).mT, full_matrices=False)[2].mT[:, :, :COUNT]


def gradient(vectors: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of a loss that does not depend on the vectors' signs."""
    weight = torch.linspace(-1, 1, x.shape[1], device=x.device)[:, None]
    (found,) = torch.autograd.grad((vectors(x).square() * weight).sum(), x)
    return found


def seconds(vectors: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Of one forward and backward."""
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    gradient(vectors, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    ways = {"ours": ours, "torch": torchs}
    maps = {}
    for name, (channels, size) in MAPS.items():
        shape = (options.batch_size, channels, size, size)
        x = torch.randn(shape, generator=generator).relu().to(device)
        dead = x.clone()
        dead[:, ::8] = 0
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(options.rounds + 2):
            for way, vectors in ways.items():
                took = seconds(vectors, x.requires_grad_())
                if i >= 2:
                    taken[way].append(took)
        ratios = [b / a for a, b in zip(taken["ours"], taken["torch"], strict=True)]
        finite = {
            way: gradient(vectors, dead.requires_grad_()).isfinite().all((1, 2, 3)).float().mean()
            for way, vectors in ways.items()
        }
        maps[name] = {
            "seconds": {way: statistics.median(times) for way, times in taken.items()},
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [statistics.quantiles(ratios, n=4)[i] for i in (0, 2)],
            "finite_with_dead_channels": {way: share.item() for way, share in finite.items()},
        }
        print(
            f"{name:14} {1000 * maps[name]['seconds']['ours']:7.1f} ms, torch.linalg.svd "
            f"{maps[name]['ratio']:.2f} times that; finite with dead channels: ours "
            f"{finite['ours']:.0%}, torch's {finite['torch']:.0%}",
            flush=True,
        )
    if options.out is not None:
        found = describe_environment(device)
        found.pop("command")  # names this machine's folders
        result = {"n": options.rounds, "batch_size": options.batch_size, "environment": found}
        options.out.write_text(json.dumps({**result, "maps": maps}, indent=2) + "\n")
