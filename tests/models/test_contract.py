"""Every model: its published size, taps, initialisation, and what it takes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import NetworkError
from potstill.models import MODELS, build
from potstill.net import Net

close = torch.testing.assert_close

# specs/architectures-cifar.md, section 1: trainable parameters with 100 classes
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
}
NARROW = {
    "stem": (16, 32, 32),
    "stage1": (16, 32, 32),
    "stage2": (32, 16, 16),
    "stage3": (64, 8, 8),
    "embed": (64,),
}
WIDE = {
    "stem": (32, 32, 32),
    "stage1": (64, 32, 32),
    "stage2": (128, 16, 16),
    "stage3": (256, 8, 8),
    "embed": (256,),
}
every_model = pytest.mark.parametrize("name", list(MODELS))
SMALL = "resnet8"


def images(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *(shape or (3, 32, 32)), generator=torch.Generator().manual_seed(0))


@every_model
def test_the_number_of_parameters_is_the_published_one(name: str):
    net = build(name)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == PARAMETERS[name]
    assert net.num_classes == 100


@every_model
def test_taps_have_the_published_shapes(name: str):
    expected = WIDE if "x4" in name else NARROW
    expected = expected | {f"stage{i}:pre": expected[f"stage{i}"] for i in (1, 2, 3)}
    assert {tap: tuple(shape) for tap, shape in build(name).shapes.items()} == expected


@every_model
def test_taps_are_what_their_names_say(name: str):
    """Stages end after a ReLU, `:pre` is before it, and the pooled vector gives the logits."""
    net = build(name, num_classes=10, input_shape=(3, 16, 16)).eval()
    with torch.no_grad():
        out = net(images(2, 3, 16, 16))
    for tap in ("stem", "stage1", "stage2", "stage3"):
        assert out[tap].min() == 0
    for i in (1, 2, 3):
        assert out[f"stage{i}:pre"].min() < 0
        assert torch.equal(F.relu(out[f"stage{i}:pre"]), out[f"stage{i}"])
    close(out["stage3"].mean((2, 3)), out["embed"])
    close(out["embed"] @ net.classifier.weight.T + net.classifier.bias, out.logits)


@every_model
def test_initialisation_is_the_published_one(name: str):
    """Convolutions normal with std sqrt(2 / (k k C_out)), BatchNorm 1 and 0, linear by default."""
    net = build(name)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            std = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            n = module.weight.numel()
            assert abs(module.weight.std() / std - 1) < 6 / math.sqrt(2 * n)
            assert abs(module.weight.mean() / std) < 6 / math.sqrt(n)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    bound = 1 / math.sqrt(net.classifier.in_features)
    assert 0.9 * bound < net.classifier.weight.abs().max() <= bound


@every_model
def test_a_gradient_reaches_every_parameter(name: str):
    net = build(name, num_classes=3, input_shape=(3, 8, 8))
    F.cross_entropy(net(images(4, 3, 8, 8)).logits, torch.tensor([0, 1, 2, 0])).backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("classes", [1, 2, 10, 200, 1000])
def test_any_number_of_classes(classes: int):
    """Only the head changes: 64 weights and a bias for each class."""
    net = build(SMALL, classes, (3, 8, 8))
    assert net.num_classes == classes
    assert net(images(2, 3, 8, 8)).logits.shape == (2, classes)
    count = sum(p.numel() for p in net.parameters())
    assert count == PARAMETERS[SMALL] + 65 * (classes - 100)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (4, 16, 24), (3, 33, 31)])
def test_any_channels_and_size(shape: tuple[int, int, int]):
    """Each later stage halves, rounding up."""
    net = build(SMALL, 5, shape)
    c, h, w = shape
    assert net(images(2, *shape)).logits.shape == (2, 5)
    assert net.shape_of("stage1") == (16, h, w)
    assert net.shape_of("stage3") == (64, math.ceil(h / 4), math.ceil(w / 4))
    assert net.module.conv1.in_channels == c


def test_eval_is_deterministic_and_images_do_not_mix():
    net = build(SMALL, 5, (3, 8, 8)).eval()
    x = images(4, 3, 8, 8)
    first = net(x).logits
    assert torch.equal(first, net(x).logits)
    close(net(x[1:2]).logits, first[1:2])


def test_train_and_eval_agree_once_the_statistics_have_converged():
    """BatchNorm's averages of one repeated batch; its variance is unbiased, hence the tolerance."""
    net = build(SMALL, 5, (3, 16, 16))
    x = images(16, 3, 16, 16)
    with torch.no_grad():
        for _ in range(150):
            train = net(x).logits
        close(net.eval()(x).logits, train, atol=2e-2, rtol=1e-2)


def test_building_is_reproducible_and_independent():
    torch.manual_seed(0)
    one, other = build(SMALL), build(SMALL)
    torch.manual_seed(0)
    again = build(SMALL)
    assert torch.equal(one.module.conv1.weight, again.module.conv1.weight)
    assert not torch.equal(one.module.conv1.weight, other.module.conv1.weight)


def test_normalize_is_passed_on():
    net = build(SMALL, 5, (3, 8, 8), ([2.0] * 3, [1.0] * 3)).eval()
    plain = Net(net.module, net.taps, (3, 8, 8)).eval()
    x = images(2, 3, 8, 8)
    close(net(x).logits, plain(2 * x + 1).logits)


def test_every_model_says_what_it_is():
    assert all(model.description for model in MODELS.values())
    assert PARAMETERS.keys() == MODELS.keys(), "add the published count of the new model"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(NetworkError) as error:
        build("resnet55")
    said = str(error.value)
    assert said.startswith("no model 'resnet55'; did you mean \"resnet")
    assert said.endswith("the models are " + ", ".join(MODELS))


def test_images_that_a_network_cannot_take_are_refused():
    with pytest.raises(NetworkError, match=r"cannot take images of \(3, 0, 8\)"):
        build(SMALL, 5, (3, 0, 8))
