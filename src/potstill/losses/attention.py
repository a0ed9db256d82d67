"""Losses between spatial attention maps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from potstill.losses.alignment import meet


def attention_map(feature: Tensor, power: float = 2.0) -> Tensor:
    """Spatial attention of a feature map, unit length per image. (B, C, H, W) -> (B, H*W)

    Mean over channels of |feature|^power, eq. (1) of Zagoruyko & Komodakis, ICLR 2017,
    arXiv:1612.03928. A map that is zero everywhere gives zeros, not NaN.
    """
    # squares of half-precision activations overflow above 255, and x*x has no gradient of |x|
    x = feature.float() if feature.element_size() < 4 else feature
    energy = x.square() if power == 2 else x.abs().pow(power)
    return F.normalize(energy.mean(dim=1).flatten(1), dim=1, eps=1e-12)


def attention_map_distance(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Mean squared difference of two attention maps. (B, C, H, W), (B, D, H', W') -> ()

    Mean over images and pixels, so it lies in [0, 2 / (H*W)]. The larger feature map is averaged
    down to the smaller one's height first. No gradient reaches the teacher.
    """
    student, teacher = meet(student, teacher.detach())
    return F.mse_loss(attention_map(student, power), attention_map(teacher, power))
