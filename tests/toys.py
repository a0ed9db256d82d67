"""Small networks and images that the tests share, all drawn from fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from potstill import distributed
from potstill.engine import Pace
from potstill.method import Batch, DataSpec, Method
from potstill.models import resnet
from potstill.net import Net
from potstill.optim import Constant, OptimizerPlan, Steps, adam, sgd

CLASSES, SHAPE = 4, (3, 8, 8)


def toy_net(seed: int = 0, norm: str = "batch", width: int = 4, classes: int = CLASSES) -> Net:
    """A ResNet-8 of a few channels with the usual taps; `norm` is "batch" or "group"."""
    torch.manual_seed(seed)
    architecture = resnet.cifar(8, (width, width, 2 * width, 2 * width))
    module = architecture.build(classes, SHAPE)
    if norm == "group":
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.GroupNorm(2, child.num_features))
    return Net(
        module,
        architecture.places,
        SHAPE,
        norms=architecture.norms,
        blocks=architecture.blocks,
    )


class ToyImages:
    """Noisy class means, `views` shifts the noise: the data contract without files."""

    def __init__(self, n: int = 64, dtype: torch.dtype = torch.float32, noise: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(7)
        self.label = torch.arange(n) % CLASSES
        means = torch.randn(CLASSES, *SHAPE, generator=generator, dtype=torch.float64)
        noises = torch.randn(n, *SHAPE, generator=generator, dtype=torch.float64)
        self.image = (means[self.label] + noise * noises).to(dtype)

    def spec(self, teachers: int = 1, batch_size: int = 16, drop_last: bool = False) -> DataSpec:
        n = len(self.label)
        return DataSpec(
            range(CLASSES),
            [range(CLASSES)] * teachers,
            torch.arange(n),
            self.label,
            n,
            batch_size,
            drop_last,
            SHAPE,
            (0.0,) * 3,
            (1.0,) * 3,
        )

    def take(self, index: Tensor, view: Tensor) -> Batch:
        image = self.image[index].roll(1, -1).where(view.view(-1, 1, 1, 1) == 1, self.image[index])
        return Batch(image.to(memory_format=torch.channels_last), self.label[index], index, view)

    def batches(
        self,
        positions: Tensor,
        generator: torch.Generator,
        batch_size: int,
        start: int = 0,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        views = torch.randint(2, (len(self.label),), generator=generator)
        parts = positions.split(batch_size)[start:]
        for index in parts:
            if len(index) == batch_size or not drop_last:
                index = distributed.local(index)
                yield self.take(index, views[index])

    def clean(self, batch_size: int, sharded: bool = False) -> Iterator[Batch]:
        for index in torch.arange(len(self.label)).split(batch_size):
            index = distributed.local(index) if sharded else index
            yield self.take(index, torch.zeros_like(index))


def plan(
    name: str = "sgd", lr: float = 0.05, fused: bool = True, weight_decay: float = 5e-4
) -> OptimizerPlan:
    """An optimiser with everything that must be resumed: momentum, decay, a milestone."""
    if name == "adam":
        return OptimizerPlan(
            lambda p: adam(p, lr, weight_decay=weight_decay, fused=fused), Steps([1.5])
        )
    return OptimizerPlan(
        lambda p: sgd(p, lr, 0.9, weight_decay=weight_decay, fused=fused), Constant()
    )


def pace(method: Method, epochs: int = 2, seed: int = 0, **plans: OptimizerPlan) -> Pace:
    """`epochs` for every phase of a method."""
    lengths = {p.name: epochs for p in method.phases()}
    return Pace(lengths, lengths, {"default": plan(), **plans}, seed)


def channels_last(method: Method) -> Method:
    """The method with its convolutions laid out as on a real run."""
    return method.to(memory_format=torch.channels_last)
