"""Losses between logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_kl(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, t_squared: bool = True
) -> Tensor:
    """KL(teacher || student) of softened probabilities, times T^2. (B, K), (B, K) -> ()

    Sum over classes, mean over the batch (Hinton et al., arXiv:1503.02531, section 2). Libraries
    that average over classes as well give a value smaller by K; some leave out the T^2, as
    `t_squared` False does. No gradient reaches the teacher.
    """
    log_p = F.log_softmax(student / temperature, dim=1)
    # log_target: at T = 1 a confident teacher's probabilities underflow where their logs do not
    log_q = F.log_softmax(teacher.detach() / temperature, dim=1)
    divergence = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return divergence * temperature**2 if t_squared else divergence
