"""Loss functions that two methods or more use: pure, with tested reductions.

KL everywhere: sum over classes, mean over the batch, times temperature squared.
"""

from potstill.losses.alignment import meet
from potstill.losses.attention import attention_map, attention_map_distance
from potstill.losses.distance import pairwise_distance, unit
from potstill.losses.instance import Weighting, instance_weights
from potstill.losses.logits import soft_kl
from potstill.losses.singular import aligned, right_singular_vectors, upright

__all__ = [
    "Weighting",
    "aligned",
    "attention_map",
    "attention_map_distance",
    "instance_weights",
    "meet",
    "pairwise_distance",
    "right_singular_vectors",
    "soft_kl",
    "unit",
    "upright",
]
