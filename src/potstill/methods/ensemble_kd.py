"""The online ensemble baseline of Chung et al., ICML 2020, arXiv:2002.01775, Table 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from potstill.losses import soft_kl
from potstill.method import DataSpec, Outputs, Terms
from potstill.net import Net
from potstill.peers import Peers


class EnsembleKD(Peers):
    """Every network learns from the mean logits of all, itself included ("KD" of Table 4).

    loss of k = CE(k, label) + alpha * T^2 * KL(mean of all || k at temperature T)

    The mean is that of the step's own forward, and constant. The paper (Chung et al., ICML 2020,
    arXiv:2002.01775) does not say whether logits or probabilities are averaged; logits, after
    earlier code of the same group, and a weight of 1.
    """

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
        temperature: float = 3.0,
        alpha: float = 1.0,
    ) -> None:
        super().__init__(students, teachers, data)
        self.temperature, self.alpha = temperature, alpha

    def loss_of(self, k: int, out: Outputs) -> Terms:
        """The terms "ce", and "kd" where alpha is not 0, of student k."""
        own = out.students[k].logits
        terms = {"ce": F.cross_entropy(own, out.batch.label)}
        if self.alpha:
            ensemble = torch.stack([student.logits for student in out.students]).mean(dim=0)
            terms["kd"] = self.alpha * soft_kl(own, ensemble, self.temperature)
        return terms
