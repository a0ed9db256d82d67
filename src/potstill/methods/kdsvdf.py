"""KD-SVD without its relation: an ablation of Lee & Song, BMVC 2019, arXiv:1907.02226."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.method import DataSpec
from potstill.methods.kdsvd import KDSVD
from potstill.net import Net


class KDSVDF(KDSVD):
    """Match each stage's leading singular vectors as they are (KD-SVDF, BMVC 2019).

    transfer = sum over images and taps of |v_student - v_teacher|^2

    All else is KD-SVD's: the vectors, see `kdsvd.compressed`, and the clipping. How the published
    figures sum is not known; KD-SVD's sum over the batch is taken, and the clipping makes a factor
    matter little.
    """

    pairs_needed = 1

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        vectors: int = 1,
        extra: int = 3,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            students,
            teachers,
            data,
            vectors,
            extra,
            gamma=gamma,
            alpha=alpha,
            temperature=temperature,
            taps=taps,
            teacher_taps=teacher_taps,
        )

    def distance(self, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over images and taps, of student's and teacher's vectors by tap."""
        return torch.stack([(own - target).square().sum() for own, target in found]).sum()
