"""The L1 + KD baselines of Chung et al., ICML 2020, arXiv:2002.01775, Table 1."""

from __future__ import annotations

from collections.abc import Sequence

from potstill.method import DataSpec
from potstill.methods.l1 import L1
from potstill.net import Net


class L1KD(L1):
    """L1 between the last maps, and KD (Chung et al., ICML 2020, arXiv:2002.01775, Table 1).

    `L1` with alpha = 1: online between two students, or offline under a frozen teacher.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        beta: float = 1.0,
        alpha: float = 1.0,
        temperature: float = 3.0,
        taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__(students, teachers, data, beta, alpha, temperature, taps)
