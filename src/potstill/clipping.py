"""One task's gradient, clipped by another's: how KD-SVD and MHGD join the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from potstill import distributed
from potstill.errors import MethodError
from potstill.method import Progress, Terms


def clipped(
    transfer: str, transfer_only: Sequence[nn.Parameter] = ()
) -> Callable[[Terms, Sequence[nn.Parameter], Progress], list[Tensor]]:
    """An `Update.gradients`: of all other terms, plus that of the term `transfer`, clipped.

    For each parameter tensor, g + h * min(1, |g| * sigmoid(e) / |h|), with h the gradient of the
    transfer term and e the whole epochs done of the phase, on the scale of its published length: at
    most half as long as g at first, as long in the end. Both norms are of the gradients of the
    whole batch, before weight decay. `transfer_only` are parameters that no other term reaches,
    where the rule would leave nothing: there h is scaled as the rule would scale it if all others
    were one tensor.

    The rule of the authors' code for Lee, Kim, Song, ECCV 2018, arXiv:1807.06819; what the posters
    print would leave large gradients unclipped. It takes two backward passes of one forward.
    """
    free = {id(p) for p in transfer_only}

    def gradients(
        terms: Terms, parameters: Sequence[nn.Parameter], progress: Progress
    ) -> list[Tensor]:
        target = [term for name, term in terms.items() if name != transfer]
        if not target:
            raise MethodError(
                f"the gradient of '{transfer}' is clipped by that of the other terms, and there is "
                "none; give gamma or alpha a value above 0"
            )
        g = distributed.gradient(torch.stack(target).sum(), parameters)
        h = distributed.gradient(terms[transfer], parameters)
        ramp = 1 / (1 + math.exp(-math.floor(progress.published_epoch)))
        bounds, norms = ([torch.linalg.vector_norm(x) for x in xs] for xs in (g, h))
        bound, norm = torch.stack(bounds), torch.stack(norms)
        factors = _factor(ramp, bound, norm).unbind()
        others = [n for p, n in zip(parameters, norms, strict=True) if id(p) not in free]
        # of `transfer_only` g is 0, so that what bounds all together is what bounds the others
        together = _factor(ramp, bound.norm(), torch.stack(others or norms).norm())
        return [
            x + y * (together if id(p) in free else factor)
            for p, x, y, factor in zip(parameters, g, h, factors, strict=True)
        ]

    return gradients


def _factor(ramp: float, bound: Tensor, norm: Tensor) -> Tensor:
    return (ramp * bound / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
