"""Feature maps compressed to their leading right singular vectors: KD-SVD and MHGD."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.net import in_full


def right_singular_vectors(x: Tensor, count: int, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Largest singular values and right singular vectors of maps. (B, D, H, W) -> (B, n), (B, D, n)

    Of the matrix of an image with a row a position and a column a channel; n is `count` or, if
    smaller, D or H*W. At least float32. The signs are the solver's. A direction that a map does not
    have (the square of its singular value is at most `tolerance` times the largest) is zero, as are
    those of a map whose squares sum to less than 1e-24 or are not finite.

    Values have no gradient; that of the vectors is exact and always finite. Each rotates away from
    all the others; a rotation within those whose squared values are closer than that is left out,
    which changes nothing for a loss of their span. torch.linalg.svd gives NaN there, even for
    vectors that are never used, as dead channels have it. Lee, Kim, Song, ECCV 2018,
    arXiv:1807.06819.
    """
    matrix = in_full(x).flatten(2).mT
    return _Compression.apply(matrix, count, tolerance)  # type: ignore[no-untyped-call, no-any-return]


class _Compression(torch.autograd.Function):
    """Leading singular values and right vectors of matrices. (B, P, D) -> (B, n), (B, D, n)

    From the eigenvectors of the smaller Gram matrix, divided by its trace so that no power of an
    entry overflows or vanishes; lam are its eigenvalues.
    """

    @staticmethod
    def forward(ctx: Any, m: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor]:
        tall = m.shape[1] >= m.shape[2]
        gram = m.mT @ m if tall else m @ m.mT
        trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
        usable = trace.isfinite() & (trace > 1e-24)
        lam, basis = torch.linalg.eigh(torch.where(usable, gram / trace, 0.0))
        leading = lam[:, -count:].flip(1)
        there = leading > tolerance * leading[:, :1]
        vectors = basis[:, :, -count:].flip(2)
        if not tall:  # of M M^T: the left ones
            vectors = F.normalize(m.mT @ vectors, dim=1, eps=1e-30)
        vectors = torch.where(there[:, None], vectors, 0.0)
        values = torch.where(there, (leading * trace[:, 0]).sqrt(), 0.0)
        ctx.save_for_backward(m, trace, lam, basis, leading, there, vectors)
        ctx.tolerance, ctx.tall = tolerance, tall
        ctx.mark_non_differentiable(values)
        return values, vectors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor, None, None]:
        """dL/dM = M (W V^T + V W^T), w_i = sum over j != i of v_j (v_j . g_i) / (lam_i - lam_j)."""
        m, trace, lam, basis, leading, there, vectors = ctx.saved_tensors
        leading = leading.masked_fill(~there, 1.0)[:, None]
        gap = leading - lam[:, :, None]
        near = gap.abs() <= ctx.tolerance * lam[:, -1:, None]
        if ctx.tall:
            w = basis @ ((1 / gap).masked_fill(near, 0.0) * (basis.mT @ grad))
        else:
            # the v_j without a u_j have lam_j = 0: they are what is left of g_i, divided by lam_i;
            # of the others v_j v_j^T = M^T u_j u_j^T M / lam_j, so nothing is divided by small ones
            lam = lam[:, :, None].clamp_min(ctx.tolerance * lam[:, -1:, None])
            weights = torch.where(near, -1 / lam, 1 / gap) / leading
            w = grad / leading + m.mT @ (basis @ (weights * (basis.mT @ (m @ grad / trace))))
        w = torch.where(there[:, None], w, 0.0)  # of a map of zeros, or M that is not finite
        both = torch.where(there[:, :1, None], m @ torch.cat([w, vectors], dim=2) / trace, 0.0)
        return both @ torch.cat([vectors, w], dim=2).mT, None, None


def upright(vectors: Tensor) -> Tensor:
    """Vectors with the sign that makes their sum positive or zero. (B, D, n) -> (B, D, n)

    Singular vectors have no sign of their own, and relations of two depend on both.
    """
    return torch.where(vectors.sum(dim=1, keepdim=True) < 0, -vectors, vectors)


def aligned(candidates: Tensor, target: Tensor) -> Tensor:
    """For each target the candidate nearest in direction, turned to its side.

    (B, D, n), (B, D, K) -> (B, D, K). Nearest is the first of those with the largest absolute
    cosine; one of 0 keeps its sign. What is aligned to a target of zeros is zero. The choice is a
    constant to the gradient.
    """
    cosine = target.detach().mT @ candidates.detach()
    best = cosine.abs().argmax(dim=2, keepdim=True)
    turn = torch.where(cosine.gather(2, best) < 0, -1.0, 1.0).to(candidates).mT
    turn = turn * target.detach().ne(0).any(dim=1, keepdim=True)
    return turn * candidates.gather(2, best.mT.expand(-1, candidates.shape[1], -1))
