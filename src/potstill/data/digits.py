"""scikit-learn's handwritten digits: 1,797 real 8x8 images that need no download.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

from __future__ import annotations

import torch

from potstill.data.cache import Decoded
from potstill.data.splits import hold_out

MEAN = (0.3042,)
STD = (0.3754,)
"""Of the training half, pixel / 255."""


def digits() -> tuple[Decoded, Decoded]:
    """Training and test half, the same split of each class every time; greys 0..16 as 0..255."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8)[..., None]
    labels = torch.from_numpy(found.target).to(torch.int64)
    names = [str(c) for c in range(10)]
    train, test = (Decoded(pixels[at], labels[at], names) for at in hold_out(labels, 0.5))
    return train, test
