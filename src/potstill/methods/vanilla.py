"""No distillation: cross-entropy alone. Trains teachers, and the baseline of every table."""

from __future__ import annotations

import torch.nn.functional as F

from potstill.method import Method, Outputs, Terms


class Vanilla(Method):
    """Plain training with cross-entropy, no teacher.

    The baseline of Tian, Krishnan, Isola, ICLR 2020, arXiv:1910.10699 (240 epochs).
    """

    teachers_needed = (0, 0)

    def loss(self, out: Outputs) -> Terms:
        """Mean cross-entropy over the batch."""
        (student,) = out.students
        return {"ce": F.cross_entropy(student.logits, out.batch.label)}
