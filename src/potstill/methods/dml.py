"""Zhang, Xiang, Hospedales, Lu, Deep Mutual Learning, CVPR 2018, arXiv:1706.00384."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch

from potstill.batchnorm import batch_statistics
from potstill.errors import MethodError
from potstill.method import Batch, DataSpec, Outputs, Phase, Progress, Terms, Turn
from potstill.net import Net
from potstill.peers import Peers, taught


class DML(Peers):
    """Every network learns from the predictions of all others (Zhang et al., arXiv:1706.00384).

    loss of k = CE(k, label) + alpha * T^2 * mean over the others l of KL(l || k at temperature T)

    `mode` "alternating" is the paper's algorithm: network k takes its step, then predicts anew, and
    network k + 1 learns from that. The new prediction normalises by the batch and moves no average
    of BatchNorm; the last network's, which nobody would read, is left out. "synchronous", as in
    most public code, takes all gradients at the same weights, and is cheaper by K - 1 forwards. At
    T = 1, the paper's, there is no T^2; the comparison of Chung et al. (arXiv:2002.01775) has T = 3
    throughout. The published weight of the KL is 1.
    """

    lengths: ClassVar = {"distill": 200}

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        mode: Literal["alternating", "synchronous"] = "alternating",
        temperature: float = 1.0,
        alpha: float = 1.0,
    ) -> None:
        super().__init__(students, teachers, data)
        if mode not in ("alternating", "synchronous"):
            raise MethodError(f"DML: mode is {mode!r}; give 'alternating' or 'synchronous'")
        self.mode, self.temperature, self.alpha = mode, temperature, alpha

    def loss_of(self, k: int, out: Outputs) -> Terms:
        """The terms "ce", and "kd" where alpha is not 0, of student k."""
        logits = [student.logits for student in out.students]
        own = logits.pop(k)
        return taught(own, logits, out.batch.label, self.alpha, self.temperature)

    def refresh(
        self, k: int, batch: Batch, progress: Progress, previous: Outputs | None
    ) -> Outputs:
        """The previous outputs with what student k makes of the batch now, without a gradient."""
        assert previous is not None
        students = list(previous.students)
        with torch.no_grad(), batch_statistics(self.nets[k]):
            students[k] = self.nets[k](batch.image)
        return replace(previous, students=students)

    def phases(self) -> Sequence[Phase]:
        """One turn, or one for each network."""
        if self.mode == "synchronous" or not self.alpha:  # or nobody reads what is predicted anew
            return super().phases()
        first, *others = [self.update_of(k) for k in range(len(self.students))]
        turns = [Turn(self.__call__, [first])]
        turns += [Turn(partial(self.refresh, k), [u]) for k, u in enumerate(others)]
        return [Phase("distill", turns, self.lengths["distill"])]
