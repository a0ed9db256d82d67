"""Directions of vectors, and distances among the images of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.net import in_full


def unit(x: Tensor) -> Tensor:
    """Vectors scaled to unit length. (..., D) -> (..., D), at least float32

    One shorter than 1e-12 has no direction and stays as it is, and so does its gradient, which a
    division by a bound would make 1e12 times larger.
    """
    x = in_full(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 1e-12, length, 1.0)


def pairwise_distance(x: Tensor) -> Tensor:
    """Euclidean distances of all pairs, at least 1e-6 but on the diagonal. (B, D) -> (B, B)

    At least float32. The gradient is 0 where the bound holds, not that of a root at 0.
    """
    x = in_full(x)
    x = x - x.mean(dim=0)  # far from the origin the next line would cancel
    squares = x.square().sum(dim=1)
    distance = (squares[:, None] + squares - 2 * x @ x.T).clamp_min(1e-12).sqrt()
    same = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return distance.masked_fill(same, 0.0)
