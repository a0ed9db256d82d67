"""Taps that are proposed for networks nobody wrote a table for: each answer can be seen."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.discover import discover
from potstill.errors import NetworkError
from potstill.models import build
from potstill.net import Net

SHAPE = (3, 16, 16)


class Made(nn.Module):
    """Some parts, and a function that is its forward."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def taps_of(module: nn.Module, shape: tuple[int, ...] = SHAPE) -> dict[str, str]:
    """What is proposed, which a Net must take, with the same "embed" as it would add itself."""
    taps = discover(module, shape)
    net = Net(module, taps, shape)
    net.close()
    assert net.taps == taps
    for name, tap in net.shapes.items():
        assert len(tap) == {"s": 3, "t": 2}.get(name[0], len(tap)), name
    return taps


def conv(given: int, made: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(given, made, size, stride, padding=size // 2)


def unit(given: int, made: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(given, made, stride), nn.BatchNorm2d(made), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """torchvision's block: one ReLU for two places and an addition, all in place."""

    def __init__(self, given: int, made: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(given, made, stride), nn.BatchNorm2d(made)
        self.conv2, self.bn2 = conv(made, made), nn.BatchNorm2d(made)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if given == made else conv(given, made, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Mlp(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))


def head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


# --- maps ---------------------------------------------------------------------------------------


def test_a_plain_network_is_tapped_after_its_last_activations():
    """Not before an in-place ReLU, which overwrites, nor after pooling, which learns nothing."""
    module = nn.Sequential(
        *unit(3, 4), *unit(4, 4), nn.MaxPool2d(2), *unit(4, 8), nn.MaxPool2d(2), *head(8)
    )
    assert taps_of(module) == {"stage1": "5", "stage2": "9", "embed": "13:in"}


def test_a_residual_network_is_tapped_at_its_outermost_stages():
    module = Made(
        lambda m, x: m.head(m.layer2(m.layer1(m.maxpool(m.stem(x))))),
        stem=unit(3, 4, stride=2),
        maxpool=nn.MaxPool2d(2),
        layer1=nn.Sequential(Residual(4, 4), Residual(4, 4)),
        layer2=nn.Sequential(Residual(4, 8, 2), Residual(8, 8)),
        head=head(8),
    )
    assert taps_of(module) == {
        "stage1": "stem",
        "stage2": "layer1",
        "stage3": "layer2",
        "embed": "head.2:in",
    }


def test_one_relu_for_a_whole_network_is_tapped_by_its_calls():
    """Calls 0 after the stem, 1 and 2 in the first block, 3 and 4 in the second."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.relu(m.conv0(x))
        for i, shortcut in ((1, x), (2, None)):
            shortcut = m.down(x) if shortcut is None else shortcut
            out = m.get_submodule(f"conv{i}b")(m.relu(m.get_submodule(f"conv{i}a")(x)))
            out += shortcut
            x = m.relu(out)
        return m.fc(x.mean((2, 3)))

    module = Made(
        run,
        relu=nn.ReLU(inplace=True),
        conv0=conv(3, 4),
        conv1a=conv(4, 4),
        conv1b=conv(4, 4),
        conv2a=conv(4, 8, 2),
        conv2b=conv(8, 8),
        down=conv(4, 8, 2, 1),
        fc=nn.Linear(8, 5),
    )
    assert taps_of(module) == {"stage1": "relu#2", "stage2": "relu#4", "embed": "fc:in"}


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4"])
def test_our_own_networks_are_tapped_as_their_tables_say(name: str):
    net = build(name)
    taps = discover(net.module)
    assert taps == {n: net.taps[n] for n in ("stage1", "stage2", "stage3", "embed")}
    assert list(taps) == ["stage1", "stage2", "stage3", "embed"]


def test_the_same_block_called_twice_is_tapped_at_its_last_call():
    module = Made(
        lambda m, x: m.head(m.narrow(m.block(m.block(m.stem(x))))),
        stem=unit(3, 4),
        block=Residual(4, 4),
        narrow=unit(4, 8, 2),
        head=head(8),
    )
    assert taps_of(module) == {"stage1": "block#1", "stage2": "narrow", "embed": "head.2:in"}


def test_what_no_module_gives_is_tapped_where_the_next_one_takes_it():
    module = Made(
        lambda m, x: m.head(m.down(F.relu(m.left(x) + m.right(x)))),
        left=conv(3, 4),
        right=conv(3, 4),
        down=unit(4, 8, 2),
        head=head(8),
    )
    assert taps_of(module) == {"stage1": "down:in", "stage2": "down", "embed": "head.2:in"}


@pytest.mark.parametrize("modes", [(True, False), (True,), (False,)])
def test_a_tensor_that_is_overwritten_later_leaves_its_place_to_the_one_before(
    modes: tuple[bool, ...],
):
    """As in torchvision's DenseNet, whose last ReLU is a function; in one mode or in both."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.layer2(m.layer1(x))
        x = F.relu(x, inplace=m.training in modes)
        return m.fc(x.mean((2, 3)))

    module = Made(
        run,
        layer1=unit(3, 4),
        layer2=nn.Sequential(Residual(4, 8, 2), Residual(8, 8), nn.BatchNorm2d(8)),
        fc=nn.Linear(8, 5),
    )
    assert taps_of(module) == {"stage1": "layer1", "stage2": "layer2.1", "embed": "fc:in"}


def test_a_stage_end_that_the_next_stage_overwrites_is_tapped_within_that():
    """Its first ReLU is in place: what that gives stays."""
    module = Made(
        lambda m, x: m.head(m.layer2(m.layer1(x))),
        layer1=nn.Sequential(unit(3, 4), Residual(4, 4), conv(4, 4)),
        layer2=nn.Sequential(nn.ReLU(inplace=True), unit(4, 8, 2)),
        head=head(8),
    )
    assert taps_of(module) == {"stage1": "layer2.0", "stage2": "layer2", "embed": "head.2:in"}


def test_branches_gates_and_halves_are_no_taps():
    """Each runs after the block's output of this size: a gated branch that takes half of it."""

    def block(m: Any, x: Tensor) -> Tensor:
        kept, half = x.chunk(2, 1)
        half = m.act(m.conv(half))
        half = half * m.gate(half)
        return torch.cat([kept, m.out(half)], 1)

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.block(m.stem(x))
        left, right = m.left(m.wide(x)), m.right(x)
        return m.head(left + right)

    module = Made(
        run,
        stem=unit(3, 8),
        block=Made(
            block, conv=conv(4, 4), act=nn.ReLU(True), gate=conv(4, 4), out=nn.BatchNorm2d(4)
        ),
        wide=conv(8, 8),
        left=conv(8, 8, 2),
        right=conv(8, 8, 2),
        head=head(8),
    )
    assert taps_of(module) == {"stage1": "block", "stage2": "head:in", "embed": "head.2:in"}


@pytest.mark.parametrize("padded", [True, False])
def test_an_expansion_within_the_next_block_is_not_the_end_of_a_stage(padded: bool):
    """MobileNet's and DenseNet's: it widens or narrows at the old size, then strides or pools."""
    down = [nn.ZeroPad2d(4), nn.Conv2d(16, 8, 10, 2)] if padded else [conv(16, 8, 2)]
    expand = nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), *down)
    transition = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.AvgPool2d(2))
    module = nn.Sequential(
        unit(3, 4), Residual(4, 4), expand, Residual(8, 8), transition, Residual(6, 6), head(6)
    )
    taps = taps_of(module)
    assert taps == {"stage1": "1", "stage2": "3", "stage3": "5", "embed": "6.2:in"}


@pytest.mark.parametrize("deep", [True, False])
def test_a_trunk_of_several_stages_is_not_taken_for_such_a_block(deep: bool):
    """It goes on for two more stages, or for one more after most of the first."""
    first = nn.Sequential(Residual(4, 4), *([] if deep else [Residual(4, 4)]))
    more = [nn.Sequential(unit(8, 8, 2))] if deep else []
    module = Made(
        lambda m, x: m.head(m.trunk(m.stem(x))),
        stem=nn.Sequential(unit(3, 4), *([Residual(4, 4)] if deep else [])),
        trunk=nn.Sequential(first, nn.Sequential(Residual(4, 8, 2)), *more),
        head=head(8),
    )
    taps = taps_of(module)
    stages = ["trunk.0", "trunk.1", "trunk"] if deep else ["trunk.0", "trunk"]
    assert [*taps.values()] == [*stages, "head.2:in"]


def test_a_module_over_several_resolutions_hides_none():
    """From 16 by 8 to 4: the one in the middle is tapped within."""
    middle = nn.Sequential(unit(4, 8, 2), unit(8, 8), unit(8, 8, 2))
    module = nn.Sequential(unit(3, 4), middle, head(8))
    taps = taps_of(module)
    assert taps == {"stage1": "0", "stage2": "1.1", "stage3": "1", "embed": "2.2:in"}


def test_a_resolution_that_returns_is_tapped_at_its_last():
    module = nn.Sequential(
        unit(3, 4), unit(4, 4), unit(4, 8, 2), nn.Upsample(scale_factor=2), unit(8, 8), head(8)
    )
    assert taps_of(module) == {"stage1": "2", "stage2": "4", "embed": "5.2:in"}


def test_what_is_only_resized_is_no_stage():
    """As VGG on small images: 2x2, pooled to 1x1, and blown up to 4x4 for its classifier."""
    module = nn.Sequential(
        *unit(3, 4), nn.MaxPool2d(8), *unit(4, 8), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 5),
    )  # fmt: skip
    assert taps_of(module) == {"stage1": "2", "stage2": "6", "embed": "12:in"}


def test_a_border_that_is_cut_off_is_no_new_stage():
    """16, 14, 12, then pooled 6: two resolutions."""
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), *head(8),
    )  # fmt: skip
    assert taps_of(module) == {"stage1": "3", "stage2": "6", "embed": "9:in"}


def test_an_image_that_is_only_normalised_is_no_stage():
    """Neither by fixed statistics nor by a BatchNorm: the first stage is half the image's size."""

    class Normalise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.ones(1, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.mean

    module = nn.Sequential(Normalise(), nn.BatchNorm2d(3), unit(3, 4, 2), head(4))
    assert taps_of(module) == {"stage1": "2", "embed": "3.2:in"}


def test_a_single_pixel_is_no_stage():
    module = nn.Sequential(unit(3, 4), unit(4, 8, 16), head(8))
    assert taps_of(module) == {"stage1": "0", "embed": "2.2:in"}


class Permute(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


class Mix(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def test_channels_at_the_end_are_no_map():
    """A Swin of torchvision: (B, H, W, C) until its last permutation.

    Its patches, a linear map of the pixels in our order, do not stand for the stage after them.
    """
    embed = nn.Sequential(nn.Conv2d(3, 6, 2, 2), Permute(0, 2, 3, 1))
    merge = Made(lambda m, x: m.fc(x.reshape(len(x), 4, 4, 24)), fc=nn.Linear(24, 12))
    body = Mix(6), Mix(6), merge, Mix(12), Mix(12), nn.LayerNorm(12)
    module = nn.Sequential(embed, *body, Permute(0, 3, 1, 2), head(12))
    assert taps_of(module) == {"stage1": "7", "embed": "8.2:in"}


def test_the_convolution_that_enters_a_stage_does_not_stand_for_it():
    """The second stage goes on with its channels at the end."""
    module = Made(
        lambda m, x: m.fc(m.second(m.first(x)).mean((1, 2))),
        first=nn.Sequential(unit(3, 6), Residual(6, 6)),
        second=nn.Sequential(conv(6, 6, 2), Permute(0, 2, 3, 1), Mix(6), Mix(6)),
        fc=nn.Linear(6, 5),
    )
    assert taps_of(module) == {"stage1": "first", "embed": "fc:in"}


@pytest.mark.parametrize("shape", [(3, 16, 24), (3, 17, 25)])
def test_the_images_proportions_tell_where_the_channels_are(shape: tuple[int, int, int]):
    """(B, 12, 8, 12) and (B, 8, 12, 12), both of 12 channels; or 9 x 13, as it is rounded."""
    first = nn.Sequential(unit(3, 12, 2), head(12))
    assert taps_of(first, shape) == {"stage1": "0", "embed": "1.2:in"}
    last = Made(
        lambda m, x: m.fc(m.mix(m.conv(x).permute(0, 2, 3, 1)).mean((1, 2))),
        conv=unit(3, 12, 2),
        mix=nn.Linear(12, 12),
        fc=nn.Linear(12, 5),
    )
    assert taps_of(last, shape) == {"stage1": "conv", "embed": "fc:in"}


@pytest.mark.parametrize(("channels", "windows"), [(12, (4, 16, 12)), (25, (16, 10, 10))])
def test_attention_windows_are_no_map(channels: int, windows: tuple[int, ...]):
    """(B, windows, N, D): four of 4 x 4 positions, and some that happen to be square."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        x = m.mix(x.reshape(len(x), *windows)).reshape(x.shape)
        return m.fc(x.mean((2, 3)))

    width = windows[-1]
    module = Made(
        run, conv=unit(3, channels), mix=nn.Linear(width, width), fc=nn.Linear(channels, 5)
    )
    assert taps_of(module, (3, 8, 8)) == {"stage1": "conv", "embed": "fc:in"}


@pytest.mark.parametrize("seen", [True, False])
def test_a_tensor_that_is_filled_piece_by_piece_is_followed(seen: bool):
    """Neither piece is all of it."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        out = torch.zeros(len(x), 8, 8, 8, dtype=x.dtype, device=x.device)
        out[:, :4] = m.left(x)
        out[:, 4:] = m.right(x)
        out = m.end(out) if seen else out.relu()
        return m.fc(out.mean((2, 3)))

    module = Made(
        run,
        stem=unit(3, 4),
        left=conv(4, 4, 2),
        right=conv(4, 4, 2),
        end=nn.ReLU(),
        fc=nn.Linear(8, 5),
    )
    assert taps_of(module) == {
        "stage1": "stem",
        **({"stage2": "end"} if seen else {}),
        "embed": "fc:in",
    }


def test_a_view_holds_what_was_written_into_its_tensor():
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        flat = x.flatten(2)
        x += m.side(x)
        m.seen(x)
        return m.fc(flat.mean(2))

    module = Made(run, conv=conv(3, 4), side=conv(4, 4), seen=nn.Identity(), fc=nn.Linear(4, 5))
    assert taps_of(module) == {"stage1": "seen", "embed": "fc:in"}


def test_half_of_a_tensor_that_is_written_into_is_not_all_of_it():
    """Neither before, which is gone, nor after."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        m.act(x[:, :2])
        return m.fc(x.mean((2, 3)))

    module = Made(run, conv=conv(3, 4), act=nn.ReLU(inplace=True), fc=nn.Linear(4, 5))
    assert taps_of(module) == {"embed": "fc:in"}


@pytest.mark.parametrize("times", range(1, 17))  # the allocator chooses what it gives out again
def test_memory_that_is_used_again_is_not_taken_for_what_it_held(times: int):
    """Some values that are forgotten at once, then a branch of their size."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        for _ in range(times):
            x = x.relu() + x
        x = m.seen(x)
        return m.fc((m.branch(x) + x).mean((2, 3)))

    module = Made(run, conv=conv(3, 4), seen=nn.Identity(), branch=conv(4, 4), fc=nn.Linear(4, 5))
    assert taps_of(module) == {"stage1": "seen", "embed": "fc:in"}


def test_the_same_elements_seen_again_keep_their_first_place():
    module = Made(
        lambda m, x: m.head(m.two(m.one(x).unsqueeze(1).squeeze(1).detach())),
        one=unit(3, 4),
        two=unit(4, 8, 2),
        head=head(8),
    )
    assert taps_of(module) == {"stage1": "one", "stage2": "two", "embed": "head.2:in"}


# --- tokens -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Written out, with a linear layer for q, k and v together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.drop, self.out = (
            nn.Linear(width, 3 * width),
            nn.Dropout(0.1),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(self.drop((q @ k.transpose(1, 2)).softmax(-1)) @ v)


class TorchAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention or Attention(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    def __init__(self, width: int, class_token: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return x if self.token is None else torch.cat([self.token.expand(len(x), -1, -1), x], 1)


@pytest.mark.parametrize("attention", [Attention, TorchAttention])
@pytest.mark.parametrize("normed", [True, False])
def test_a_vision_transformer_is_tapped_at_its_last_tokens(
    attention: Callable[[int], nn.Module], normed: bool
):
    """Not at its patches, which are a linear map of the pixels, nor within attention or MLP."""
    module = Made(
        lambda m, x: m.head(m.norm(m.blocks(m.patches(x)))[:, 0]),
        patches=Patches(8, class_token=True),
        blocks=nn.Sequential(*(Block(8, attention(8)) for _ in range(3))),
        norm=nn.LayerNorm(8) if normed else nn.Identity(),
        head=nn.Linear(8, 5),
    )
    assert taps_of(module) == {"tokens1": "norm" if normed else "blocks", "embed": "head:in"}


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_encoder_is_tapped_at_its_end(norm_first: bool):
    """In eval mode it takes a fast path that runs none of its parts."""
    layer = nn.TransformerEncoderLayer(8, 2, 20, batch_first=True, norm_first=norm_first)
    module = Made(
        lambda m, x: m.fc(m.encoder(m.patches(x)).mean(1)),
        patches=Patches(8),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        fc=nn.Linear(8, 5),
    )
    assert taps_of(module) == {"tokens1": "encoder", "embed": "fc:in"}


def test_tokens_that_merge_make_a_stage_each():
    """16 tokens of width 6, merged to 4 of width 12; the norm before reduces 24 to 12."""

    class Merge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.reduce = nn.LayerNorm(24), nn.Linear(24, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.reduce(self.norm(x.reshape(len(x), 4, 24)))

    module = Made(
        lambda m, x: m.head(m.pool(m.layers(m.patches(x)).transpose(1, 2)).flatten(1)),
        patches=Patches(6),
        layers=nn.Sequential(
            nn.Sequential(Block(6), Block(6)), nn.Sequential(Merge(), Block(12), Block(12))
        ),
        pool=nn.AdaptiveAvgPool1d(1),  # takes (B, D, N), whose 12 are channels
        head=nn.Linear(12, 5),
    )
    assert taps_of(module) == {"tokens1": "layers.0", "tokens2": "layers", "embed": "head:in"}


def test_maps_that_become_tokens_keep_their_order():
    """Convolutions at 16 and 8, then 64 tokens on the latter's grid."""
    module = Made(
        lambda m, x: m.head(m.blocks(m.down(m.stem(x)).flatten(2).transpose(1, 2)).mean(1)),
        stem=unit(3, 4),
        down=unit(4, 8, 2),
        blocks=nn.Sequential(Block(8), Block(8)),
        head=nn.Linear(8, 5),
    )
    taps = taps_of(module)
    assert taps == {"stage1": "stem", "tokens1": "blocks", "embed": "head:in"}
    assert list(taps) == ["stage1", "tokens1", "embed"]


def test_tokens_with_the_batch_second_are_no_tap():
    module = Made(
        lambda m, x: m.head(m.blocks(m.patches(x).transpose(0, 1)).mean(0)),
        patches=Patches(8),
        blocks=nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))),
        head=nn.Linear(8, 5),
    )
    assert taps_of(module) == {"embed": "head:in"}


# --- the vector ---------------------------------------------------------------------------------


def test_global_pooling_without_a_module_is_no_obstacle():
    module = Made(lambda m, x: m.fc(m.conv(x).mean((2, 3))), conv=unit(3, 4), fc=nn.Linear(4, 5))
    assert taps_of(module) == {"stage1": "conv", "embed": "fc:in"}


def test_a_convolution_as_head_reads_a_pooled_map():
    module = nn.Sequential(
        unit(3, 4), nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Conv2d(4, 5, 1), nn.Flatten()
    )
    assert taps_of(module) == {"stage1": "0", "embed": "1"}


def test_a_convolution_before_pooling_reads_no_vector():
    """As in SqueezeNet; and a map of class scores is no feature."""
    module = nn.Sequential(
        unit(3, 4), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert taps_of(module) == {"stage1": "0"}


class Cosine(nn.Module):
    def __init__(self, fixed: bool) -> None:
        super().__init__()
        weight = torch.eye(5, 4)
        if fixed:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight)) * 16.0


@pytest.mark.parametrize("fixed", [True, False])
def test_a_cosine_head_reads_the_pooled_vector(fixed: bool):
    module = Made(lambda m, x: m.head(m.conv(x).mean((2, 3))), conv=unit(3, 4), head=Cosine(fixed))
    assert taps_of(module) == {"stage1": "conv", "embed": "head:in"}


def test_a_weight_normalised_head_is_a_linear_layer():
    """Its direction (2, 4, 3, 3), as large as two maps, is no feature of the images."""
    parametrize = nn.utils.parametrizations.weight_norm
    module = nn.Sequential(
        parametrize(conv(3, 2)), nn.ReLU(), *head(2)[:2], parametrize(nn.Linear(2, 5))
    )
    assert taps_of(module) == {"stage1": "1", "embed": "4:in"}


def test_logits_that_are_scaled_afterwards_leave_embed_where_it_is():
    module = Made(
        lambda m, x: m.fc(m.conv(x).mean((2, 3))) / 4.0, conv=unit(3, 4), fc=nn.Linear(4, 5)
    )
    assert taps_of(module) == {"stage1": "conv", "embed": "fc:in"}


def test_a_classifier_that_runs_twice_is_read_at_the_call_that_gives_the_logits():
    """Deep supervision with a shared head; a Net without taps refuses it."""

    def run(m: Any, x: Tensor) -> Any:
        shallow = m.one(x)
        deep = m.two(shallow)
        early = m.fc(shallow.mean((2, 3)))
        return SimpleNamespace(early=early, logits=m.fc(deep.mean((2, 3))))

    module = Made(run, one=unit(3, 4), two=unit(4, 4, 2), fc=nn.Linear(4, 5))
    assert taps_of(module) == {"stage1": "one", "stage2": "two", "embed": "fc:in#1"}


def test_a_classifier_whose_input_is_overwritten_is_not_read_there():
    """A Net without taps refuses it; the vector before that is the last one that stays."""

    def run(m: Any, x: Tensor) -> Tensor:
        hidden = m.hidden(m.conv(x).mean((2, 3)))
        logits = m.fc(hidden)
        hidden.zero_()
        return logits

    module = Made(run, conv=unit(3, 4), hidden=nn.Linear(4, 6), fc=nn.Linear(6, 5))
    assert taps_of(module) == {"stage1": "conv", "embed": "hidden:in"}


def test_the_last_of_several_vectors_is_read():
    module = Made(
        lambda m, x: m.head(m.hidden(m.conv(x).mean((2, 3))).relu()),
        conv=unit(3, 4),
        hidden=nn.Linear(4, 4),
        head=Cosine(False),
    )
    assert taps_of(module) == {"stage1": "conv", "embed": "head:in"}


def test_indices_are_no_vector():
    module = Made(
        lambda m, x: m.table(m.pick(m.conv(x).mean((2, 3)))).mean(1),
        conv=unit(3, 4),
        pick=Made(lambda m, x: x.topk(2).indices),
        table=nn.Embedding(4, 5),
    )
    assert taps_of(module) == {"stage1": "conv", "embed": "pick:in"}


def test_pixels_are_no_vector():
    module = Made(lambda m, x: m.head(x.flatten(1)), head=Cosine(False))
    assert taps_of(module, (1, 2, 2)) == {}


def test_a_network_without_weights_after_its_map_has_nothing_to_tap():
    module = Made(lambda m, x: m.conv(x).mean((2, 3)), conv=unit(3, 5))
    assert taps_of(module) == {}


# --- kinds of modules ---------------------------------------------------------------------------


def test_an_object_with_logits_is_followed():
    module = Made(
        lambda m, x: SimpleNamespace(hidden=x, logits=m.fc(m.conv(x).mean((2, 3)))),
        conv=unit(3, 4),
        fc=nn.Linear(4, 5),
    )
    assert taps_of(module) == {"stage1": "conv", "embed": "fc:in"}


def test_grey_images():
    assert taps_of(nn.Sequential(unit(1, 4), head(4)), (1, 8, 8)) == {
        "stage1": "0",
        "embed": "1.2:in",
    }


def test_modules_that_return_several_tensors_give_way_to_what_is_within():
    """The first part returns a tuple and the second a dict, of what their own parts give."""
    module = Made(
        lambda m, x: m.head(m.two(m.one(x)[0])["out"]),
        one=Made(lambda m, x: (m.conv(x), None), conv=unit(3, 4)),
        two=Made(lambda m, x: {"out": m.conv(x)}, conv=unit(4, 8, 2)),
        head=head(8),
    )
    assert taps_of(module) == {"stage1": "one.conv", "stage2": "two.conv", "embed": "head.2:in"}


def test_a_part_called_by_keyword_is_tapped():
    module = Made(
        lambda m, x: m.fc(input=m.two(x=m.one(x=x)).mean((2, 3))),
        one=Made(lambda m, x: F.relu(m.conv(input=x)), conv=conv(3, 4)),
        two=Made(lambda m, x: F.relu(m.conv(input=x)), conv=conv(4, 8, 2)),
        fc=nn.Linear(8, 5),
    )
    assert taps_of(module) == {"stage1": "one", "stage2": "two", "embed": "fc:in"}


def test_what_runs_in_one_mode_alone_is_no_tap():
    """An auxiliary head while training; a last activation while not; calls that are counted up."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.one(x)
        x = m.act(x) if not m.training else m.act(m.act(x))
        early = m.aux(x.mean((2, 3))) if m.training else None
        x = m.two(x)
        x = x if m.training else m.last(x)
        return SimpleNamespace(early=early, logits=m.fc(x.mean((2, 3))))

    module = Made(
        run, one=unit(3, 4), act=nn.SiLU(), aux=nn.Linear(4, 5), two=unit(4, 8, 2), last=nn.SiLU(),
        fc=nn.Linear(8, 5),
    )  # fmt: skip
    assert taps_of(module) == {"stage1": "act#0", "stage2": "two", "embed": "fc:in"}


def test_a_shape_that_differs_in_training_is_no_tap():
    module = Made(
        lambda m, x: m.fc(m.two(m.one(x)[..., : 8 if m.training else 16]).mean((2, 3))),
        one=unit(3, 4),
        two=unit(4, 8, 2),
        fc=nn.Linear(8, 5),
    )
    assert taps_of(module) == {"stage1": "one", "embed": "fc:in"}


def test_names_that_a_tap_cannot_spell_are_passed_over():
    module = Made(
        lambda m, x: m.head(m.get_submodule("b#1")(m.get_submodule("a:in")(x))),
        **{"a:in": unit(3, 4), "b#1": unit(4, 8, 2), "head": head(8)},
    )
    assert taps_of(module) == {"stage1": "head:in", "embed": "head.2:in"}


def test_a_scripted_part_is_tapped_at_what_is_around_it():
    """It takes no hooks itself."""
    module = nn.Sequential(unit(3, 4), torch.jit.script(unit(4, 8, 2)), unit(8, 8, 2), head(8))
    taps = taps_of(module)
    assert taps == {"stage1": "0", "stage2": "2:in", "stage3": "2", "embed": "3.2:in"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_precision(dtype: torch.dtype):
    module = nn.Sequential(unit(3, 4), head(4)).to(dtype)
    assert taps_of(module) == {"stage1": "0", "embed": "1.2:in"}


def test_a_network_without_storage():
    """On the meta device, where a large network's taps cost nothing to find."""
    module = nn.Sequential(unit(3, 4), Residual(4, 8, 2), head(8)).to("meta")
    assert taps_of(module) == {"stage1": "0", "stage2": "1", "embed": "2.2:in"}


# --- what is left untouched ---------------------------------------------------------------------


def hooks(module: nn.Module) -> list[tuple[int, int, int]]:
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs))
        for m in module.modules()
    ]


def busy() -> nn.Module:
    """Statistics, dropout, one frozen part, one gradient and one hook of somebody else's."""
    module = nn.Sequential(unit(3, 4), nn.Dropout(), Residual(4, 8, 2), head(8)).train()
    module[0].eval()
    module[0].requires_grad_(False)
    module[2].conv1.weight.grad = torch.ones_like(module[2].conv1.weight)
    module[1].register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize("shape", [SHAPE, (1, 16, 16)])
def test_the_module_and_the_random_state_stay_as_they_were(shape: tuple[int, ...]):
    """Where taps are found, and where the network refuses its images."""
    module = busy()
    state, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    frozen, installed = [p.requires_grad for p in module.parameters()], hooks(module)
    seeds = torch.random.get_rng_state(), random.getstate()
    if shape == SHAPE:
        discover(module, shape)
    else:
        with pytest.raises(NetworkError):
            discover(module, shape)
    assert all(torch.equal(x, state[name]) for name, x in module.state_dict().items())
    assert list(module.state_dict()) == list(state)
    assert [m.training for m in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == frozen
    assert [n for n, p in module.named_parameters() if p.grad is not None] == ["2.conv1.weight"]
    assert hooks(module) == installed
    assert torch.equal(torch.random.get_rng_state(), seeds[0])
    assert random.getstate() == seeds[1]


def test_a_forward_that_fails_under_the_recording_leaves_no_hooks():
    """It fails only the fourth time: after it was checked, while it is watched."""
    times = iter(range(9))

    def run(m: Any, x: Tensor) -> Tensor:
        if next(times) == 3:
            raise RuntimeError("tired")
        return m.head(m.conv(x))

    module = Made(run, conv=unit(3, 4), head=head(4))
    with pytest.raises(NetworkError, match="tired"):
        discover(module, SHAPE)
    assert not any(map(any, hooks(module)))


def test_the_same_taps_are_found_again():
    module = busy()
    assert discover(module, SHAPE) == discover(module, SHAPE) == taps_of(module)


# --- what is refused ----------------------------------------------------------------------------


def test_images_that_the_network_cannot_take_are_refused_in_words():
    with pytest.raises(NetworkError) as error:
        discover(nn.Sequential(unit(3, 4), head(4)), (1, 8, 8))
    assert str(error.value).startswith(
        "Sequential cannot take images of (1, 8, 8) (channels, height, width): "
    )


def test_what_gives_no_logits_is_refused():
    with pytest.raises(NetworkError, match="must return logits of shape"):
        discover(unit(3, 4), SHAPE)
