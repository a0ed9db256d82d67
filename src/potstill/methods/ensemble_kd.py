"""The online ensemble baseline of Chung et al., ICML 2020, arXiv:2002.01775, Table 4."""

from __future__ import annotations

from collections.abc import Sequence

from potstill.evaluate import mean_logits
from potstill.method import DataSpec, Outputs, Terms
from potstill.net import Net
from potstill.peers import Peers, taught


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
        logits = [student.logits for student in out.students]
        ensemble = mean_logits(logits)
        return taught(logits[k], [ensemble], out.batch.label, self.alpha, self.temperature)
