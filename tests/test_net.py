"""A network and its taps: what is captured, what is refused, and what is left untouched."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from potstill.batchnorm import batch_statistics, running_statistics
from potstill.errors import NetworkError, TapError
from potstill.method import Method
from potstill.net import (
    Captured,
    Net,
    affine_between,
    own_statistics,
)
from tests.toys import SHAPE, ToyImages, toy_net

close = torch.testing.assert_close


class Plain(nn.Module):
    """Doubles, rectifies and sums: every tap can be computed in the head."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.fill_(2.0)
            self.fc.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flat(self.relu(self.conv(x))))


class Repeats(nn.Module):
    """One ReLU that runs twice, a part that never runs, and a part that gives a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)
        self.relu = nn.ReLU()
        self.spare = nn.Linear(3, 3)
        self.pair = Pair()
        with torch.no_grad():
            self.fc1.weight.copy_(-torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x.flatten(1))
        return self.fc2(self.relu(self.pair(self.fc1(x))[0]))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Bare(nn.Module):
    """A network without a final linear layer: global average pooling gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


class Noisy(nn.Module):
    """BatchNorm and dropout, with one part in eval mode: everything a dry run could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.frozen = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 3)
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.frozen(self.bn(self.conv(x))).mean((2, 3))))


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in module.named_buffers()}


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def images(n: int = 3, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


# --- what is captured ---------------------------------------------------------------------------


def test_taps_by_hand():
    """x = (-1, 2; 3, -4), doubled (-2, 4; 6, -8), rectified (0, 4; 6, 0), sum 10."""
    net = Net(Plain(), {"pre": "relu:in", "post": "relu", "flat": "flat:out"}, (1, 2, 2))
    out = net(torch.tensor([[[[-1.0, 2.0], [3.0, -4.0]]]]))
    assert out["pre"].tolist() == [[[[-2.0, 4.0], [6.0, -8.0]]]]
    assert out["post"].tolist() == [[[[0.0, 4.0], [6.0, 0.0]]]]
    assert out["flat"].tolist() == out["embed"].tolist() == [[0.0, 4.0, 6.0, 0.0]]
    assert out.logits.tolist() == [[10.0, 0.0]]
    assert set(out.features) == {"pre", "post", "flat", "embed"}


@pytest.mark.parametrize(
    ("tap", "expected"),
    [
        ("relu:in#0", [-1.0, 2.0, 3.0]),
        ("relu#0", [0.0, 2.0, 3.0]),
        ("relu:in#1", [0.0, -2.0, -3.0]),
        ("relu#1", [0.0, 0.0, 0.0]),
    ],
)
def test_a_tap_can_name_one_call_of_several(tap: str, expected: list[float]):
    """relu(-1, 2, 3) = (0, 2, 3), negated, relu again gives zeros."""
    net = Net(Repeats(), {"tap": tap}, (3, 1, 1))
    for _ in range(2):  # the call counter starts again in every forward
        out = net(torch.tensor([-1.0, 2.0, 3.0]).view(1, 3, 1, 1))
        assert out["tap"].tolist() == [expected]


def test_shapes_are_without_the_batch_axis_and_classes_are_counted():
    net = toy_net()
    assert net.shapes["stem"] == (4, 8, 8)
    assert net.shapes["stage1:pre"] == (4, 8, 8)
    assert net.shapes["stage2"] == (8, 4, 4)
    assert net.shapes["embed"] == (8,)
    assert net.num_classes == 4
    assert net.shape_of("stage3") == (8, 2, 2)


def test_every_forward_captures_its_own_batch():
    net, one, other = toy_net().eval(), images(2), images(5) + 1
    first = net(one)
    kept = first["stage1"].clone()
    assert len(net(other)["stage1"]) == 5
    assert torch.equal(first["stage1"], kept)


def test_features_carry_the_graph():
    net = toy_net()
    net(images())["stage1"].sum().backward()
    assert net.module.conv1.weight.grad.abs().sum() > 0
    assert net.module.fc.weight.grad is None


def test_embed_is_what_the_classifier_reads():
    net = toy_net().eval()
    out = net(images())
    assert net.classifier is net.module.fc
    close(F.linear(out["embed"], net.classifier.weight, net.classifier.bias), out.logits)


def test_a_given_embed_tap_is_kept():
    net = Net(Plain(), {"embed": "conv"}, (1, 2, 2))
    assert net.taps == {"embed": "conv"}
    assert net.shapes["embed"] == (1, 2, 2)


def test_the_classifier_is_found_among_several_linear_layers():
    """The last one whose output is the logits, not the last by name."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.hidden = nn.Linear(6, 2), nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.hidden(x.flatten(1)))

    net = Net(Backwards(), input_shape=(3, 1, 1))
    assert net.classifier_path == "out"
    assert net.shapes["embed"] == (6,)


def test_backbone_parameters_are_all_but_the_classifiers():
    net = toy_net()
    backbone = {id(p) for p in net.backbone_parameters()}
    head = {id(p) for p in net.classifier.parameters()}
    assert len(head) == 2
    assert not backbone & head
    assert backbone | head == {id(p) for p in net.parameters()}


def test_a_network_without_a_final_linear_layer_has_no_embed():
    net = Net(Bare(), {"map": "conv"}, SHAPE)
    assert net.num_classes == 5
    assert set(net.taps) == {"map"}
    with pytest.raises(NetworkError, match="Bare has no final linear layer"):
        _ = net.classifier
    with pytest.raises(NetworkError, match="Bare has no final linear layer"):
        net.backbone_parameters()


def test_an_object_with_logits_is_accepted():
    class Wrapped(Plain):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(x), extra=x)

    net = Net(Wrapped(), input_shape=(1, 2, 2))
    plain = Net(Plain(), input_shape=(1, 2, 2))
    x = images(2, (1, 2, 2))
    assert torch.equal(net(x).logits, plain(x).logits)
    assert torch.equal(net.predictor()(x), plain(x).logits)
    assert net.classifier_path == "fc"


def test_captured_gives_half_precision_in_full_and_leaves_the_rest():
    raw = {
        "bf16": torch.tensor([1.5], dtype=torch.bfloat16),
        "fp16": torch.tensor([1.5], dtype=torch.float16),
        "fp32": torch.tensor([1.5]),
        "fp64": torch.tensor([1.5], dtype=torch.float64),
    }
    captured = Captured(torch.zeros(1, 2), raw)
    assert captured["bf16"].dtype == captured["fp16"].dtype == torch.float32
    assert captured["fp32"] is raw["fp32"]
    assert captured["fp64"] is raw["fp64"]
    assert captured["bf16"].item() == captured["fp16"].item() == 1.5


def test_a_missing_feature_names_those_that_exist():
    captured = Captured(torch.zeros(1, 2), {"stage2": torch.zeros(1), "stage1": torch.zeros(1)})
    expected = "no feature 'stage9'; this network has ['stage1', 'stage2']; did you mean \"stage"
    with pytest.raises(TapError, match=re.escape(expected)):
        captured["stage9"]
    with pytest.raises(TapError, match=re.escape("no feature 'zzz'; this network has")):
        toy_net().shape_of("zzz")


def test_logits_are_float32_under_autocast_and_features_as_computed():
    net = toy_net()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(images())
        assert net.predictor()(images()).dtype == torch.float32
    assert out.logits.dtype == torch.float32
    assert out.features["stage3:pre"].dtype == torch.bfloat16
    assert out["stage3:pre"].dtype == torch.float32


def test_a_float64_network_stays_float64():
    net = toy_net().double()
    out = net(images().double())
    assert out.logits.dtype == out["stage1"].dtype == torch.float64
    assert Net(net.module, net.taps, SHAPE).shapes == net.shapes  # the dry run follows the weights


# --- what is refused ----------------------------------------------------------------------------


def refused(module: nn.Module, tap: str, shape: tuple[int, int, int] = (3, 1, 1)) -> str:
    with pytest.raises(TapError) as error:
        Net(module, {"x": tap}, shape)
    return str(error.value)


def test_a_module_that_does_not_exist_is_refused_with_the_nearest_name():
    assert refused(Repeats(), "rleu") == (
        "tap 'x' names the module 'rleu', which does not exist in Repeats; "
        "did you mean \"relu\"?; its parts are ['fc1', 'fc2', 'relu', 'spare', 'pair']"
    )


def test_a_module_that_never_runs_is_refused():
    assert refused(Repeats(), "spare") == (
        "feature 'x' ('spare') never runs in a forward; tap a module that does"
    )


def test_a_module_that_runs_several_times_is_refused_with_the_choices():
    assert refused(Repeats(), "relu:in") == (
        "feature 'x' ('relu:in') runs 2 times in a forward; say which: 'relu:in#0' or 'relu:in#1'"
    )


def test_a_call_past_the_last_is_refused():
    assert refused(Repeats(), "relu#2") == (
        "feature 'x' ('relu#2') is call number 3, but that module runs 2 time(s) in a forward; "
        "the last is '#1'"
    )


def test_a_tap_that_is_not_a_tensor_is_refused():
    assert refused(Repeats(), "pair") == (
        "feature 'x' ('pair') is a tuple, not a tensor; tap a module inside it"
    )


@pytest.mark.parametrize("tap", ["conv", "relu:in"])
def test_a_tap_that_is_overwritten_in_place_is_refused(tap: str):
    """The output before an in-place ReLU, and its input: both would silently be rectified."""
    assert refused(Plain(inplace=True), tap, (1, 2, 2)) == (
        f"feature 'x' ('{tap}') is overwritten in place by a later module; build that module "
        "with inplace=False"
    )


def test_the_output_of_an_in_place_module_is_fine():
    net = Net(Plain(inplace=True), {"post": "relu"}, (1, 2, 2))
    out = net(torch.tensor([[[[-1.0, 2.0], [3.0, -4.0]]]]))
    assert out["post"].flatten().tolist() == [0.0, 4.0, 6.0, 0.0]


def test_overwriting_in_train_mode_alone_is_refused():
    class Sometimes(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc(self.flat(x.relu_() if self.training else x.relu()))

    assert "overwritten in place" in refused(Sometimes(), "conv", (1, 2, 2))


@pytest.mark.parametrize("tap", ["", ":in", "relu:inn", "relu#x", "relu:in#-1", "relu#1:in", "#1"])
def test_bad_syntax_is_refused_with_examples(tap: str):
    assert refused(Repeats(), tap) == (
        f"tap 'x' is '{tap}'; write a module's path, then ':in' for its input, then '#1' for its "
        "second call: 'layer3', 'layer3.2.relu:in', 'relu:in#1'"
    )


def test_a_wrong_input_shape_is_refused_in_words():
    with pytest.raises(NetworkError) as error:
        Net(toy_net().module, {}, (1, 8, 8))
    message = str(error.value)
    assert message.startswith("ResNet cannot take images of (1, 8, 8) (channels, height, width): ")
    assert "\n" not in message


def test_a_network_that_checks_its_input_by_an_assertion_is_refused_in_words_too():
    """As vision transformers do: `assert H == self.img_size`."""

    class Strict(Plain):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] == 2, "Input width doesn't match model"
            return super().forward(x)

    with pytest.raises(NetworkError, match=r"cannot take images of .*Input width doesn't match"):
        Net(Strict(), {}, (1, 2, 3))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (lambda x: x, "(2, 1, 2, 2)"),
        (lambda x: x.sum(), "()"),
        (lambda x: x.flatten(1)[:1], "(1, 4)"),
        (lambda x: (x, x), "tuple"),
        (lambda x: SimpleNamespace(logits=x), "(2, 1, 2, 2)"),
    ],
)
def test_what_is_not_logits_is_refused(output: Any, said: str):
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output(x)

    with pytest.raises(NetworkError) as error:
        Net(Odd(), input_shape=(1, 2, 2))
    assert str(error.value) == (
        "Odd must return logits of shape (images, classes), or an object with .logits; for two "
        f"images it returned {said}"
    )


@pytest.mark.parametrize("tap", ["conv", "missing"])
def test_a_refused_network_is_left_without_hooks(tap: str):
    """Or the next attempt would go on writing activations to the first one's tape."""
    module = Plain(inplace=True)
    with pytest.raises(TapError):
        Net(module, {"first": "relu", "x": tap}, (1, 2, 2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_part_under_two_names_can_be_tapped_by_either():
    class Shared(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.act = self.relu

    net = Net(Shared(), {"one": "relu", "other": "act"}, (1, 2, 2))
    out = net(images(2, (1, 2, 2)))
    assert torch.equal(out["one"], out["other"])


def test_a_part_that_is_called_by_keyword_is_refused_or_read():
    """`self.fc(input=x)`: the classifier's input is tapped unasked, so this must not crash."""

    class ByKeyword(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=self.flat(self.relu(self.conv(x))))

    try:
        net = Net(ByKeyword(), input_shape=(1, 2, 2))
    except TapError as error:
        assert "keyword" in str(error)
    else:
        assert net.num_classes == 2


# --- what is left untouched ---------------------------------------------------------------------


def test_building_a_net_leaves_buffers_modes_and_random_state():
    module = Noisy()
    module.bn(images(4, (4, 2, 2)))  # statistics that are not the initial ones
    before, modes = buffers(module), [m.training for m in module.modules()]
    state = torch.random.get_rng_state()
    Net(module, {"bn": "bn"}, SHAPE)
    assert_equal(before, buffers(module))
    assert [m.training for m in module.modules()] == modes
    assert not module.frozen.training
    assert module.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_failed_dry_run_leaves_buffers_and_modes_too():
    class Fails(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("no")

    module = Fails()
    before, modes = buffers(module), [m.training for m in module.modules()]
    with pytest.raises(NetworkError):
        Net(module, {}, SHAPE)
    assert_equal(before, buffers(module))
    assert [m.training for m in module.modules()] == modes


def test_two_nets_on_one_module_are_independent():
    module = Plain()
    one, other = (Net(module, {"x": tap}, (1, 2, 2)) for tap in ("conv", "relu"))
    x = torch.full((1, 1, 2, 2), -1.0)
    assert one(x)["x"].flatten().tolist() == [-2.0] * 4
    assert other(x)["x"].flatten().tolist() == [0.0] * 4
    one.close()
    assert other(x)["x"].flatten().tolist() == [0.0] * 4
    assert one(x).features == {}


def test_close_gives_the_module_back_as_it_was():
    module = Plain()
    kept = []
    module.relu.register_forward_hook(lambda m, args, y: kept.append(y))
    net = Net(module, {"a": "relu", "b": "conv:in"}, (1, 2, 2))
    net.close()
    assert [len(m._forward_hooks) for m in (module, module.relu, module.conv)] == [0, 1, 0]
    assert not any(m._forward_pre_hooks for m in module.modules())
    kept.clear()
    module(images(1, (1, 2, 2)))
    assert len(kept) == 1


def test_the_module_on_its_own_records_nothing():
    net = toy_net()
    net.module(images())
    assert net._tape.values is None


# --- saved state --------------------------------------------------------------------------------


def test_saved_keys_are_the_modules_own():
    net = toy_net()
    assert list(net.state_dict()) == list(net.module.state_dict())
    assert list(net.predictor().state_dict()) == list(net.module.state_dict())
    normalized = Net(net.module, {}, SHAPE, ([2.0] * 3, [1.0] * 3))
    assert list(normalized.state_dict()) == list(net.module.state_dict())
    normalized.load_state_dict(net.state_dict(), strict=True)


def test_saved_keys_are_the_modules_own_within_a_method():
    method = Method([toy_net()], [toy_net(1)], ToyImages().spec())
    assert "students.0.layer1.0.conv1.weight" in method.state_dict()
    assert len(method.state_dict()) == len(method.student.state_dict())


@pytest.mark.parametrize("of", [lambda n: n, lambda n: n.predictor(), nn.Sequential])
def test_a_state_round_trips_strictly(of: Any):
    """A Net, its predictor, and a Net inside another module."""
    one, other = toy_net(0), toy_net(1)
    state = of(one).state_dict()
    keys = list(state)
    assert str(of(other).load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert_equal(one.module.state_dict(), other.module.state_dict())
    assert list(state) == keys  # the caller's mapping is not renamed


def test_a_method_state_round_trips_strictly():
    one, other = (Method([toy_net(i)], [toy_net(9)], ToyImages().spec()) for i in (0, 1))
    other.load_state_dict(one.state_dict(), strict=True)
    assert_equal(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("of", [lambda n: n, nn.Sequential])
def test_missing_and_unexpected_keys_are_errors(of: Any):
    net = of(toy_net())
    state = net.state_dict()
    first = next(iter(state))
    value = state.pop(first)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv1\.weight"):
        net.load_state_dict(state)
    state[first], state[first.replace("conv1", "conv9")] = value, value
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv9"):
        net.load_state_dict(state)


# --- copies -------------------------------------------------------------------------------------


def copies(net: Net) -> dict[str, Net]:
    return {"deepcopy": copy.deepcopy(net), "pickle": pickle.loads(pickle.dumps(net))}


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_works_and_is_independent(how: str):
    """Copied after a forward with gradient, whose activations must not come along."""
    net = toy_net().eval()
    x = images()
    kept = net(x)
    twin = copies(net)[how]
    out = twin(x)
    assert twin._tape is not net._tape
    assert set(out.features) == set(kept.features)
    for name in kept.features:
        assert torch.equal(out[name], kept[name])
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2.0)
    assert not torch.equal(twin(x)["stem"], kept["stem"])
    assert torch.equal(net(x)["stem"], kept["stem"])
    net.close()
    assert set(twin(x).features) == set(kept.features)


def test_a_copy_taken_within_a_forward_carries_no_activation():
    """A hook of somebody else's may copy the network while its tape is open."""
    net = toy_net()
    taken: list[Net] = []
    handle = net.module.fc.register_forward_hook(lambda *_: taken.append(copy.deepcopy(net)))
    with torch.no_grad():
        net(images())
    handle.remove()
    assert taken[0]._tape.values is None
    assert taken[0]._tape.calls == {}


def test_an_averaged_model_captures():
    """torch's own weight averaging: after one update the average of w and 3 w is 2 w."""
    net = Net(Plain(), {"map": "conv"}, (1, 2, 2))
    average = AveragedModel(net)
    average.update_parameters(net)
    with torch.no_grad():
        net.module.conv.weight.mul_(3.0)
    average.update_parameters(net)
    x = torch.ones(1, 1, 2, 2)
    assert average(x)["map"].flatten().tolist() == [4.0] * 4
    assert net(x)["map"].flatten().tolist() == [6.0] * 4
    assert "module.conv.weight" in average.state_dict()


# --- normalisation ------------------------------------------------------------------------------

DATA = ([0.5, 0.4, 0.3], [0.25, 0.2, 0.5])
OWN = ([0.1, 0.45, 0.3], [0.5, 0.1, 0.25])


def test_affine_between_by_hand():
    """Pixel 0.75: (0.75 - 0.5) / 0.25 = 1 for the data, (0.75 - 0.25) / 0.5 = 1 for the network.

    Pixel 0.25: -1 and 0. So scale (1 - 0) / (1 - -1) = 1/2 and shift 1/2.
    """
    assert affine_between([0.5], [0.25], [0.25], [0.5]) == ([0.5], [0.5])


def test_equal_statistics_add_no_operation():
    assert affine_between(*DATA, *DATA) is None
    assert affine_between(*DATA, tuple(DATA[0]), tuple(DATA[1])) is None
    net = Net(Plain(), {}, (1, 2, 2), None)
    assert net.scale is None and net.shift is None
    assert own_statistics(net, *DATA) == DATA


def test_a_normalized_network_sees_the_images_it_was_trained_on():
    """Images normalised by the data's statistics give what raw ones by its own statistics give."""
    pixels = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(v).view(1, 3, 1, 1) for v in pair] for pair in (DATA, OWN)
    )
    net = toy_net().eval()
    expected = net((pixels - own_mean) / own_std)
    affine = Net(net.module, net.taps, SHAPE, affine_between(*DATA, *OWN)).eval()
    out = affine((pixels - mean) / std)
    close(out.logits, expected.logits)
    close(out["stem"], expected["stem"])
    close(affine.predictor()((pixels - mean) / std), expected.logits)


def test_own_statistics_undo_affine_between():
    net = Net(toy_net().module, {}, SHAPE, affine_between(*DATA, *OWN))
    mean, std = own_statistics(net, *DATA)
    close(torch.tensor(mean), torch.tensor(OWN[0]))
    close(torch.tensor(std), torch.tensor(OWN[1]))


def test_the_affine_follows_the_network_to_another_type():
    net = Net(toy_net().module, {}, SHAPE, affine_between(*DATA, *OWN)).double()
    assert net.scale.dtype == torch.float64
    assert net(images().double()).logits.dtype == torch.float64
    close(copy.deepcopy(net).shift, net.shift)


# --- the predictor ------------------------------------------------------------------------------


def test_a_predictor_gives_the_logits_and_captures_nothing():
    net = toy_net().eval()
    predictor, x = net.predictor(), images()
    expected = net(x)
    seen: list[bool] = []
    net.module.fc.register_forward_hook(lambda *_: seen.append(net._tape.values is None))
    assert torch.equal(predictor(x), expected.logits)
    assert seen == [True]


def test_a_predictor_shares_the_weights():
    net = toy_net().eval()
    predictor = net.predictor()
    assert [id(p) for p in predictor.parameters()] == [id(p) for p in net.parameters()]
    with torch.no_grad():
        net.classifier.bias.add_(1.0)
    assert torch.equal(predictor(images()), net(images()).logits)


# --- more taps, and layers put in -----------------------------------------------------------------


def test_taps_can_be_added():
    net = Net(Plain(), {"pre": "relu:in"}, (1, 2, 2))
    net.add_taps({"post": "relu", "pre": "relu:in"})
    out = net(-torch.ones(1, 1, 2, 2))
    assert out["pre"].eq(-2).all() and out["post"].eq(0).all()
    assert net.shapes["post"] == (1, 2, 2)
    net.close()
    assert not net.module.relu._forward_hooks and not net.module.relu._forward_pre_hooks


@pytest.mark.parametrize(
    ("taps", "said"),
    [
        ({"a": "conv", "b": "gone"}, "tap 'b' names the module 'gone'"),
        ({"a": "conv", "pre": "relu"}, "tap 'pre' is 'relu:in' already; give 'relu' another name"),
    ],
)
def test_taps_that_cannot_be_added_change_nothing(taps: dict[str, str], said: str):
    net = Net(Plain(), {"pre": "relu:in"}, (1, 2, 2))
    before, shapes = dict(net.taps), dict(net.shapes)
    with pytest.raises(TapError, match=re.escape(said)):
        net.add_taps(taps)
    assert (net.taps, net.shapes) == (before, shapes)
    assert not net.module.conv._forward_hooks
    assert set(net(images(1, (1, 2, 2))).features) == set(before)


@pytest.mark.parametrize(("tap", "place"), [("pre", "relu:in"), ("out", "conv")])
def test_a_layer_put_in_changes_what_follows_and_not_the_tap(tap: str, place: str):
    """2 * -1 = -2 is captured; times -3 it is 6, the ReLU lets it pass, the head sums four."""
    net = Net(Plain(), {tap: place, "post": "relu"}, (1, 2, 2))
    scale = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(scale.weight, -3.0)
    net.insert(tap, scale)
    x = -torch.ones(1, 1, 2, 2)
    out = net(x)
    assert out[tap].eq(-2).all() and out["post"].eq(6).all()
    assert out.logits.tolist() == [[24.0, 6.0]]
    assert torch.equal(net.predictor()(x), out.logits)
    assert net.state_dict().keys() == Plain().state_dict().keys()
    net.close()
    assert net.logits(x).tolist() == [[0.0, 0.0]]


def test_a_layer_can_be_put_before_a_module_that_is_called_by_name():
    class ByName(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.flat(self.relu(input=self.conv(x))))

    net = Net(ByName(), {"pre": "relu:in"}, (1, 2, 2))
    net.insert("pre", nn.Hardtanh(0.0, 0.5))
    assert net(torch.ones(1, 1, 2, 2)).logits.tolist() == [[2.0, 0.5]]


def test_a_copy_has_its_own_layer_put_in():
    net = Net(Plain(), {"pre": "relu:in"}, (1, 2, 2))
    both = nn.ModuleList([net, nn.Conv2d(1, 1, 1, bias=False)])
    net.insert("pre", both[1])
    other, x = copy.deepcopy(both), torch.ones(1, 1, 2, 2)
    nn.init.zeros_(other[1].weight)
    assert other[0](x).logits.eq(0).all()
    nn.init.ones_(both[1].weight)
    assert net(x).logits.tolist() == [[8.0, 2.0]]


def test_a_second_layer_at_one_place_is_refused():
    """It would run after the first, which its owner knows nothing of."""
    net = Net(Plain(), {"pre": "relu:in", "out": "conv"}, (1, 2, 2))
    net.insert("pre", nn.Identity())
    with pytest.raises(TapError) as error:
        net.insert("pre", nn.Identity())
    assert str(error.value) == (
        "a layer is inserted at 'pre' already, by another method perhaps; call take_out() first"
    )
    net.take_out()
    net.insert("pre", nn.Identity())


def test_nothing_is_put_in_where_it_would_run_several_times():
    net = Net(Repeats(), {"first": "relu#0"}, (3,))
    with pytest.raises(TapError) as error:
        net.insert("first", nn.Identity())
    assert str(error.value) == "'first' is one call of several; nothing can be inserted there"
    with pytest.raises(TapError, match="no feature 'second'"):
        net.insert("second", nn.Identity())


def test_whether_a_map_is_what_is_pooled():
    """Not the map before a ReLU, one that is flattened, or a vector."""
    net = toy_net()
    assert net.pools("last") and net.pools("stage3")
    assert not net.pools("stage3:pre") and not net.pools("stage2") and not net.pools("embed")
    assert not Net(Plain(), {"post": "relu"}, (1, 2, 2)).pools("post")
    with pytest.raises(TapError, match="no feature 'stage9'"):
        net.pools("stage9")


def test_parameters_before_a_tap_are_those_that_move_it():
    """Of a ResNet-8: conv1, bn1 and a block of two convolutions before stage1, no more."""
    net = toy_net()
    names = {id(p): name for name, p in net.module.named_parameters()}
    found = [names[id(p)] for p in net.parameters_before("stage1")]
    wanted = [n for n in names.values() if n.startswith(("conv1", "bn1", "layer1"))]
    assert found == wanted and len(found) == 9
    both = net.parameters_before("stage1", "stage2")
    assert [names[id(p)] for p in both] == [n for n in names.values() if n[:2] != "fc"][:-9]


def test_parameters_before_a_tap_leave_out_frozen_ones_and_change_nothing():
    net = toy_net()
    net.module.conv1.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        assert len(net.parameters_before("stage1")) == 8
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.requires_grad_(False)
    assert net.parameters_before("stage1") == []
    with pytest.raises(TapError, match="no feature 'stage9'"):
        net.parameters_before("stage9")


def test_running_statistics_hold_while_the_rest_trains():
    """A BatchNorm of mean 1 and variance 4 maps 3 to 1 there; modes come back as they were."""
    norm, frozen = nn.BatchNorm1d(1), nn.BatchNorm1d(1).eval()
    line = nn.Sequential(norm, frozen)
    norm.running_mean.fill_(1.0), norm.running_var.fill_(4.0)
    with running_statistics(line):
        close(norm(torch.tensor([[3.0], [3.0]])), torch.ones(2, 1), atol=1e-4, rtol=0)
        assert norm.num_batches_tracked == 0
    assert norm.training and not frozen.training and line.training


def test_asking_what_is_pooled_changes_nothing():
    net = Net(Noisy(), {"map": "frozen"}, SHAPE)
    before, modes = buffers(net), [m.training for m in net.modules()]
    random = torch.random.get_rng_state()
    assert net.pools("map")
    assert_equal(buffers(net), before)
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)


def test_block_ends_are_the_blocks_unless_named():
    assert toy_net().block_ends == toy_net().blocks == ("layer1.0", "layer2.0", "layer3.0")
    net = Net(Plain(), {}, (1, 2, 2), blocks=["conv"], block_ends=["relu"])
    assert net.block_ends == ("relu",)
    with pytest.raises(TapError) as error:
        Net(Plain(), {}, (1, 2, 2), blocks=["conv"], block_ends=["relu", "flat"])
    assert str(error.value) == "there are 1 blocks and 2 block_ends; give one end a block"
    with pytest.raises(TapError, match="block_ends is 'relu'; write a list of paths"):
        Net(Plain(), {}, (1, 2, 2), blocks=["conv"], block_ends="relu")


def test_capture_is_forward_without_autocast():
    net = toy_net()
    net.precision = torch.bfloat16
    x = images()
    assert net(x).features["stage1"].dtype == torch.bfloat16
    found = net.capture(x)
    assert found.features["stage1"].dtype == torch.float32
    assert torch.equal(found.logits, net.logits(x))


# --- torch.compile ------------------------------------------------------------------------------


def test_a_compiled_net_captures_the_same_in_one_graph():
    """The aot_eager backend traces like the default one, without generating machine code."""
    net = Net(Plain(), {"pre": "relu:in", "post": "relu"}, (1, 2, 2))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = images(3, (1, 2, 2))
    expected, out = net(x), compiled(x)
    assert set(out.features) == {"pre", "post", "embed"}
    for name in out.features:
        close(out[name], expected[name])
    close(out.logits, expected.logits)
    assert net._tape.values is None
    close(compiled(x + 1)["pre"], net(x + 1)["pre"])


def test_a_layer_put_in_compiles_with_the_network():
    net = Net(Plain(), {"pre": "relu:in"}, (1, 2, 2))
    layer = nn.Conv2d(1, 1, 1)
    net.insert("pre", layer)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = images(3, (1, 2, 2))
    close(compiled(x).logits, net(x).logits)
    compiled(x).logits.sum().backward()
    assert layer.weight.grad is not None


# --- batch statistics ---------------------------------------------------------------------------


def test_batch_statistics_normalise_by_the_batch():
    """Images 1 and 3: mean 2, deviation 1, so -1 and 1; by the running ones they stay 1 and 3."""
    bn = nn.BatchNorm1d(1, eps=1e-12).eval()
    x = torch.tensor([[1.0], [3.0]])
    with batch_statistics(bn):
        close(bn(x), torch.tensor([[-1.0], [1.0]]))
    close(bn(x), x)


@pytest.mark.parametrize("training", [True, False])
def test_batch_statistics_leave_every_buffer_and_mode(training: bool):
    net = toy_net().train(training)
    net.module.bn1.eval()
    net.module.layer1[0].bn1.track_running_stats = False
    before = buffers(net)
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()]
    with batch_statistics(net):
        net(images() + 5.0)
    assert_equal(before, buffers(net))
    assert [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()] == modes


def test_batch_statistics_end_on_an_exception():
    net = toy_net().eval()
    with pytest.raises(KeyboardInterrupt), batch_statistics(net):
        raise KeyboardInterrupt
    assert not any(m.training for m in net.modules())
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))


# --- modules that change themselves, or their input -----------------------------------------------


class Rebinding(nn.Module):
    """Buffers that forward replaces, instead of writing into them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("cache", None)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3)) + 1
        self.mean = 0.9 * self.mean + 0.1 * pooled.mean(0)
        self.cache = pooled.detach()
        return self.head(pooled - self.mean)


def test_buffers_that_a_forward_replaces_are_put_back():
    module = Rebinding()
    before = list(module.state_dict())
    Net(module, input_shape=(3, 4, 4))
    assert not module.mean.any() and module.cache is None
    Net.discover(module, (3, 4, 4))
    assert not module.mean.any() and list(module.state_dict()) == before


def test_a_network_that_writes_into_its_images_is_refused():
    class Writing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5))

    with pytest.raises(NetworkError, match="Writing writes into the images it is given"):
        Net(Writing(nn.Flatten(), nn.Linear(12, 2)), input_shape=(3, 2, 2))


def test_a_net_is_saved_and_read_whole(tmp_path: Any):
    net = toy_net().eval()
    torch.save(net, tmp_path / "net.pt")
    again = torch.load(tmp_path / "net.pt", weights_only=False)
    x = torch.randn(2, *SHAPE)
    assert torch.equal(again(x).logits, net(x).logits)
    assert again.memory_format == net.memory_format == torch.channels_last


@pytest.mark.parametrize("context", ["autocast", "inference"])
def test_what_is_built_within_a_context_is_the_same(context: str):
    module = toy_net().module
    with torch.autocast("cpu", torch.bfloat16) if context == "autocast" else torch.inference_mode():
        module(torch.randn(2, *SHAPE))  # fills autocast's cache of weights
        assert Net.discover(module, SHAPE).keys() == {"stage1", "stage2", "stage3", "embed"}
        assert Net(module, {"a": "layer1"}, SHAPE).shapes["a"] == (4, 8, 8)


@pytest.mark.parametrize("taps", [["layer1"], "layer1", {"a": 0}, {"a": None}])
def test_taps_that_are_no_mapping_of_places_are_refused(taps: Any):
    with pytest.raises(TapError, match=r"taps is .*; write a mapping of names to places"):
        Net(toy_net().module, taps, SHAPE)
    with pytest.raises(TapError, match=r"norms is .*; write a mapping of names to places"):
        Net(toy_net().module, {"a": "layer1"}, SHAPE, norms=taps)


def test_a_call_without_a_number_is_refused():
    with pytest.raises(TapError, match="tap 'a' is 'layer1#'; write a module's path"):
        Net(toy_net().module, {"a": "layer1#"}, SHAPE)
