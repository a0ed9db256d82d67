"""Feature maps of two sizes, made one size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def meet(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The larger of two feature maps averaged down to the smaller one's size.

    (B, C, H, W), (B, D, H', W') -> (B, C, h, w), (B, D, h, w) with h = min(H, H'). The height
    decides which one is larger; equal sizes are returned as they are.
    """
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if student.shape[2] > teacher.shape[2]:
        return F.adaptive_avg_pool2d(student, teacher.shape[2:]), teacher  # type: ignore[arg-type]
    return student, F.adaptive_avg_pool2d(teacher, student.shape[2:])  # type: ignore[arg-type]
