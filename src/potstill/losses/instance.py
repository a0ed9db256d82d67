"""How much a teacher can say of an image."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import distributed
from potstill.net import in_full

Weighting = Literal["minmax", "raw"]


def instance_weights(logits: Tensor, weighting: Weighting = "minmax") -> Tensor:
    """How much a teacher can say of each image: 2 sigmoid(-u). (B, K') -> (B,)

    Of the loss l = -ln of its highest probability, over its own classes: u = l ("raw": weights from
    2 / (1 + K') to 1), or l moved to [0, 1] in the batch of all ranks ("minmax": from 0.538 to 1,
    and 1 where all l are equal). Without gradient. Ye, Lu, Zhan, TPAMI 2022, arXiv:2205.01915,
    eq. (9) as their code has it.
    """
    loss = -F.log_softmax(in_full(logits.detach()), dim=1).amax(dim=1)
    if weighting == "minmax":
        low, high = distributed.gather(loss).aminmax()
        loss = (loss - low) / torch.where(high > low, high - low, 1.0)
    return 2 * torch.sigmoid(-loss)
