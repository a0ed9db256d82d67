"""What `potstill list models` and `potstill show` say of a network."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from potstill.anatomy import describe, examine
from potstill.errors import NetworkError
from potstill.listing import entries, table
from potstill.models import MODELS, build
from potstill.models.architecture import Architecture, Tap
from potstill.net import Net

WIDTH = 100
OWN = "py:tests.test_listing:"
"""Before the name of a function in this file."""
ONE_OF_EACH = ["resnet8", "resnet18_imagenet", "wrn_16_1", "wrn_16_1_gkd", "vgg8", "mobilenetv1",
               "mobilenetv2", "shufflenetv1", "shufflenetv2", "vgg_student_mhgd", "mobilenet_mhgd",
               "vgg_bn_mhgd"]  # fmt: skip
examined = cache(examine)
every_model = pytest.mark.parametrize("name", list(MODELS))
folded_or_not = pytest.mark.parametrize("everything", [False, True])


# --- sizes ----------------------------------------------------------------------------------------

# Millions of multiply-adds with 100 classes: specs/architectures-gkd.md, sections 2 and 3
MACS = {
    "wrn_40_2": "327.6",
    "wrn_16_2": "101.1",
    "wrn_40_1": "83.3",
    "wrn_16_1": "26.7",
    "wrn_28_4": "845.6",
    "wrn_16_4": "392.6",
    "wrn_28_2": "214.4",
    "mobilenetv1_imagenet": "567.8",
    "mobilenetv1_x0_75_imagenet": "324.7",
    "mobilenetv1_x0_5_imagenet": "149.0",
    "mobilenetv1_x0_25_imagenet": "40.8",
}


@pytest.mark.parametrize("name", MACS)
def test_multiply_adds_are_the_published_ones(name: str):
    found = examined(name)
    assert f"{found.macs / 1e6:.1f}" == MACS[name]
    assert found.flops == 2 * found.macs


class Small(nn.Module):
    """Layers of many kinds; `relu` runs twice, `again` is `norm`, `unused` runs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.relu = nn.ReLU()
        self.deep = nn.Conv2d(4, 4, 3, stride=(2, 1), padding=1, groups=4, bias=False)
        self.again = self.norm
        self.grouped = nn.Conv2d(4, 8, (3, 1), 2, dilation=(1, 2), groups=2, bias=False)
        self.pool = nn.AdaptiveAvgPool2d((1, None))
        self.unused = nn.Dropout(0.1)
        self.scale = nn.Softplus(beta=2)
        self.fc = nn.Linear(32, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.wide(x)))
        x = self.relu(self.again(self.deep(x)))
        x = self.unused(x) if self.training else x
        return self.fc(self.pool(self.scale(self.grouped(x))).flatten(1))


def small(num_classes: int) -> Net:
    taps = {"first": "relu:in#0", "second": "relu#1", "deep": "deep"}
    return Net(Small(), taps, (3, 8, 8), norms={"first": "norm"}, blocks=["wide", "deep"])


SMALL = f"""\
{OWN}small: Small

module   layer                                     output  parameters  taps (:in, of its input)
wide     Conv2d 3->4 3x3 bias                      4x8x8          112
norm     GroupNorm 4 groups 2, runs 2 times        4x8x8            8
relu     ReLU, runs 2 times                        4x8x8               :in#0 -> first, #1 -> second
deep     Conv2d 4->4 3x3 /2x1 depthwise            4x4x8           36  -> deep
again    GroupNorm 4 groups 2, runs 2 times        4x8x8            8
grouped  Conv2d 4->8 3x1 /2 dilation 1x2 groups 2  8x1x4           48
pool     AdaptiveAvgPool2d to 1x?                  8x1x4
unused   Dropout 0.1
scale    Softplus beta=2, threshold=20.0           8x1x4
fc       Linear 32->5 no bias                      5              160  :in -> embed

input       3x8x8, 5 classes
parameters  364
FLOPs       16,832, which is 8,416 multiply-adds; convolutions and linear layers only
blocks      2, wide to deep

tap     kind  shape  place      norm
first         4x8x8  relu:in#0  norm
second        4x4x8  relu#1
deep          4x4x8  deep
embed         32     fc:in"""


def test_a_small_network_by_hand():
    """Multiply-adds: wide 4*8*8 * 3*9 = 6912, deep 4*4*8 * 9 = 1152, grouped 8*1*4 * 2*3 = 192,
    fc 5 * 32 = 160; 8,416 in all. A shared layer's parameters are there once: 112+8+36+48+160.
    """
    assert "\n".join(describe(examine(f"{OWN}small", 5, (3, 8, 8)))) == SMALL


class Attention(nn.Module):
    """Three kinds of attention; the first has the tokens before the images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.first = nn.MultiheadAttention(8, 2)
        self.windows = nn.Identity()
        self.second = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.embed(image.flatten(2).transpose(1, 2)).transpose(0, 1)
        tokens, _ = self.first(tokens, tokens, tokens, need_weights=False)
        tokens = self.windows(tokens.transpose(0, 1).unflatten(1, (2, 3)).flatten(0, 1))
        tokens = self.second(tokens.unflatten(0, (-1, 2)).flatten(1, 2))
        fused = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.fc(fused.mean(1))


def attention(num_classes: int) -> Net:
    return Net(Attention(num_classes), {}, (4, 2, 3))


def test_attention_is_counted_and_its_tokens_are_those_of_one_image():
    """6 tokens of 8; multiply-adds:

    embed 6*4*8 = 192; each attention 4 projections of 6*8*8 and two products of 6*6*8, 2112; its
    MLP 2 * 6*8*16 = 1536; the last one without projections 2 * 6*6*8 = 576; fc 8*5 = 40.
    """
    torch.backends.mha.set_fastpath_enabled(True)
    found = examine(f"{OWN}attention", 5, (4, 2, 3))
    assert found.macs == 192 + 2 * 2112 + 1536 + 576 + 40
    assert torch.backends.mha.get_fastpath_enabled()
    outputs = {layer.path: layer.output for layer in found.layers}
    assert outputs["embed"] == outputs["first"] == outputs["second"] == (6, 8)
    assert outputs["windows"] == (2, 3, 8)
    assert outputs["fc"] == (5,)


def test_a_tap_of_our_own_may_be_a_second_call_or_an_input(monkeypatch: pytest.MonkeyPatch):
    """`relu` takes 4x8x8 first, then 4x4x8; `fc` takes 32 numbers."""
    taps = {
        "first": Tap("relu#0", "post"),
        "second": Tap("relu#1", "post"),
        "embed": Tap("fc:in", "raw"),
    }
    architecture = Architecture(lambda classes, shape: Small(), taps, (), (3, 8, 8), "small")
    monkeypatch.setitem(MODELS, "small", architecture)
    found = examine("small", 5)
    assert {tap: (t.shape, t.kind) for tap, t in found.taps.items()} == {
        "first": ((4, 8, 8), "post"),
        "second": ((4, 4, 8), "post"),
        "embed": ((32,), "raw"),
    }


def on_cpu(num_classes: int) -> Net:
    """`resnet8` with arithmetic: the same network where nothing is left out."""
    return build("resnet8", num_classes)


def shuffled(num_classes: int) -> Net:
    return build("shufflenetv2", num_classes)


@pytest.mark.parametrize("name, own", [("resnet8", "on_cpu"), ("shufflenetv2", "shuffled")])
def test_a_forward_without_arithmetic_shows_the_same(name: str, own: str):
    ours, computed = examined(name), examine(OWN + own, 100, (3, 32, 32))
    assert list(ours.layers) == list(computed.layers)
    assert (ours.flops, ours.parameters) == (computed.flops, computed.parameters)
    taps = {tap: replace(tapped, kind=None) for tap, tapped in ours.taps.items()}
    assert taps == computed.taps
    assert {tapped.kind for tapped in computed.taps.values()} == {None}  # nobody said


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_taps_are_as_a_net_captures_them(name: str):
    found = examined(name)
    with torch.device("meta"):
        net = build(name)
    assert {tap: t.shape for tap, t in found.taps.items()} == net.shapes
    assert {tap: t.place for tap, t in found.taps.items()} == net.taps
    assert {tap: t.norm for tap, t in found.taps.items() if t.norm} == net.norms
    assert {tap: t.kind for tap, t in found.taps.items()} == {
        tap: t.kind for tap, t in MODELS[name].taps.items()
    }
    assert (found.blocks, found.input_shape) == (net.blocks, net.input_shape)
    assert found.parameters == sum(p.numel() for p in net.parameters())


def test_input_and_classes_are_those_that_are_asked_for():
    """vgg13 pools once more from 64 pixels on, and each class costs 512 weights and a bias."""
    found = examine("vgg13", 200, (1, 64, 64))
    assert found.taps["stage4"].shape == (512, 4, 4) == examined("vgg13").taps["stage4"].shape
    assert found.taps["stem"].shape == (64, 64, 64)
    more = 100 * 513 - 2 * 9 * 64  # classes, less two channels
    assert found.parameters == examined("vgg13").parameters + more
    assert (found.input_shape, found.classes) == ((1, 64, 64), 200)


def test_what_cannot_be_is_said():
    with pytest.raises(NetworkError, match=r"vgg13 cannot take images of \(3, 4, 4\)"):
        examine("vgg13", 100, (3, 4, 4))
    with pytest.raises(NetworkError, match='did you mean "resnet20"'):
        examine("resnet_20")
    with pytest.raises(NetworkError, match=r"cannot take images of \(3, 9, 9\)"):
        examine(f"{OWN}small", 5, (3, 9, 9))


# --- the tree -------------------------------------------------------------------------------------

COLUMNS = ("module", "layer", "output", "parameters", "taps")


def tree(name: str, everything: bool = False) -> list[dict[str, str]]:
    """The rows of the tree, each with its module's path and that of what it is within."""
    found = examined(name) if name in MODELS else examine(name)
    head, *lines = describe(found, everything)[2:]
    starts = [head.index(column) for column in COLUMNS]
    ends = [*starts[1:], None]
    rows = []
    above: list[str] = []
    for line in lines[: lines.index("")]:
        cells = [line[a:b].rstrip() for a, b in zip(starts, ends, strict=True)]
        own = cells[0].lstrip()
        above = [*above[: (len(cells[0]) - len(own)) // 2], own]
        row = dict(zip(COLUMNS, (cell.strip() for cell in cells), strict=True))
        rows.append({**row, "path": ".".join(above), "within": ".".join(above[:-1])})
    return rows


@every_model
@folded_or_not
def test_every_tap_is_marked_once_where_it_is_read(name: str, everything: bool):
    marks = [
        (tap, f"{row['path']}{end}", kind)
        for row in tree(name, everything)
        for end, tap, kind in re.findall(r"(:in )?-> (\S+) \((\w+)\)", row["taps"])
    ]
    known = [(tap, t.place, t.kind) for tap, t in MODELS[name].taps.items()]
    assert sorted((tap, place.rstrip(), kind) for tap, place, kind in marks) == sorted(known)


@every_model
@folded_or_not
def test_a_line_fits_a_hundred_columns(name: str, everything: bool):
    lines = describe(examined(name), everything)
    assert max(map(len, lines)) <= WIDTH
    assert all(line == line.rstrip() and line.isascii() for line in lines)


@every_model
def test_all_shows_every_layer(name: str):
    rows = tree(name, everything=True)
    assert [row["path"] for row in rows] == [layer.path for layer in examined(name).layers]


@every_model
def test_a_tree_is_short_and_its_parts_add_up(name: str):
    """A run of blocks has the parameters of them all."""
    rows = tree(name)
    assert len(rows) <= 65
    shown = {row["path"]: int(row["parameters"].replace(",", "") or 0) for row in rows}
    shown[""] = examined(name).parameters
    for path in {row["within"] for row in rows}:
        parts = [row["path"] for row in rows if row["within"] == path]
        if f"{path}...." not in parts:  # what is left out
            assert sum(shown[part] for part in parts) == shown[path]


@every_model
def test_what_is_left_out_is_shown_elsewhere(name: str):
    """`like` names a module that is shown in full, of the same parts but for their widths."""
    rows = tree(name)
    alike = [row for row in rows if ", like " in row["layer"]]
    assert bool(alike) == (len(examined(name).layers) > 60)
    for row in alike:
        kind, like = re.fullmatch(r"(?:\d+ x )?(\w+), like (\S+)", row["layer"]).groups()  # type: ignore[union-attr]
        (model,) = [r for r in rows if r["path"] == like]
        parts = [r["path"] for r in rows if r["within"] == like]
        first = row["path"].partition(" ..")[0]
        assert model["layer"] == kind and parts
        assert [f"{first}{part.removeprefix(like)}" for part in parts] == [
            layer.path for layer in examined(name).layers if layer.path.rpartition(".")[0] == first
        ]


TEXTS = [
    ("resnet20", "bn1", "BatchNorm2d 16"),
    ("resnet20", "layer2.0.conv1", "Conv2d 16->32 3x3 /2"),
    ("resnet20", "layer2.0.downsample.0", "Conv2d 16->32 1x1 /2"),
    ("resnet20", "fc", "Linear 64->100"),
    ("resnet50_imagenet", "maxpool", "MaxPool2d 3x3 /2"),
    ("vgg13", "pool1", "MaxPool2d 2x2 /2"),
    ("vgg13", "layer1.0.conv", "Conv2d 3->64 3x3 bias"),
    ("shufflenetv1", "layer1.1.conv1", "Conv2d 240->60 1x1 groups 3"),
    ("shufflenetv1", "layer1.1.conv2", "Conv2d 60->60 3x3 depthwise"),
    ("shufflenetv1", "layer1.1.shuffle", "ChannelShuffle groups 3"),
    ("shufflenetv1", "layer1.0.pool", "AvgPool2d 3x3 /2"),
    ("vgg_student_mhgd", "dropout1", "Dropout 0.5"),
    (f"{OWN}attention", "second.norm1", "LayerNorm 8"),
]


@pytest.mark.parametrize(("name", "path", "text"), TEXTS)
def test_a_layer_is_said_with_what_matters(name: str, path: str, text: str):
    found = examined(name) if name in MODELS else examine(name, 5, (4, 2, 3))
    assert [str(layer) for layer in found.layers if layer.path == path] == [text]


def test_a_long_network_is_folded():
    """Of 393 layers: a block of each kind in full, runs of equal ones, and the taps in others."""
    basic = ["conv1", "bn1", "relu1", "conv2", "bn2"]
    down = [*basic, "downsample", "downsample.0", "downsample.1", "relu2"]
    ends = ["17", "17....", "17.relu2"]
    stages = {
        "layer1": ["0", *(f"0.{part}" for part in (*basic, "relu2")), "1 .. 16", *ends],
        "layer2": ["0", *(f"0.{part}" for part in down), "1 .. 16", *ends],
        "layer3": ["0", "1 .. 16", *ends],
    }
    expected = ["conv1", "bn1", "relu"]
    for stage, parts in stages.items():
        expected += [stage, *(f"{stage}.{part}" for part in parts)]
    rows = tree("resnet110")
    assert [row["path"] for row in rows] == [*expected, "avgpool", "flatten", "fc"]
    texts = {row["path"]: row["layer"] for row in rows}
    assert texts["layer2.1 .. 16"] == "16 x BasicBlock, like layer1.0"
    assert texts["layer3.0"] == "BasicBlock, like layer2.0"
    assert texts["layer3.17"] == "BasicBlock, like layer1.0"
    assert "--all shows every layer" in "\n".join(describe(examined("resnet110")))
    assert "--all" not in "\n".join(describe(examined("resnet110"), everything=True))


class Line(nn.Sequential):
    """Thirty blocks in a row: one of another kind, the last two with half the channels."""

    def __init__(self, num_classes: int) -> None:
        blocks = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in range(30)]
        blocks[25] = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.ReLU())
        blocks[28] = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU())
        blocks[29] = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        body = nn.Sequential(*blocks, nn.Conv2d(4, 4, 1))
        super().__init__(nn.Conv2d(3, 8, 4, 4), body, nn.Flatten(), nn.Linear(16, num_classes))


def line(num_classes: int) -> Net:
    return Net(Line(num_classes), {"whole": "1.20", "entry": "1.9:in"}, (3, 8, 8))


def test_a_run_ends_at_a_tap_and_at_another_kind_or_output():
    """A tap on a block itself shows nothing of its inside."""
    found = describe(examine(f"{OWN}line", 10, (3, 8, 8)))
    start = found.index(next(text for text in found if text.startswith("  0")))
    assert [re.sub("  +", "  ", text.strip()) for text in found[start : start + 15]] == [
        "0  Sequential  8x2x2  72",
        "0  Conv2d 8->8 1x1 bias  8x2x2  72",
        "1  ReLU  8x2x2",
        "1 .. 8  8 x Sequential, like 1.0  8x2x2  576",
        "9  Sequential, like 1.0  8x2x2  72  :in -> entry",
        "10 .. 19  10 x Sequential, like 1.0  8x2x2  720",
        "20  Sequential, like 1.0  8x2x2  72  -> whole",
        "21 .. 24  4 x Sequential, like 1.0  8x2x2  288",
        "25  Sequential  8x2x2  40",
        "0  Conv2d 8->8 1x1 groups 2 bias  8x2x2  40",
        "1  ReLU  8x2x2",
        "26 .. 27  2 x Sequential, like 1.0  8x2x2  144",
        "28 .. 29  2 x Sequential, like 1.0  4x2x2  56",
        "30  Conv2d 4->4 1x1 bias  4x2x2  20",
        "2  Flatten  16",
    ]


# --- the table ------------------------------------------------------------------------------------


def test_models_are_a_table_of_a_hundred_columns():
    found = entries("models")
    lines = table("models", found)
    assert [entry["name"] for entry in found] == list(MODELS)
    assert [text.split()[0] for text in lines[1 : 1 + len(MODELS)]] == list(MODELS)
    assert max(map(len, lines)) <= WIDTH
    (row,) = [text for text in lines if text.startswith("wrn_40_2 ")]
    assert re.split("  +", row) == ["wrn_40_2", "2.26 M", "655 M", "3x32x32", "WRN-40-2"]
    assert len({text.index("M  3x") for text in lines[1 : 1 + len(MODELS)]}) == 1


def test_a_description_too_long_for_the_table_is_cut():
    entry = {"name": "resnet20", "parameters": 1, "flops": 1, "input_shape": [3, 32, 32]}
    _, row, *_ = table("models", [{**entry, "description": "word, " * 30}])
    assert len(row) <= WIDTH and row.endswith("word...")


def test_an_entry_has_the_size_and_the_taps():
    (found,) = [entry for entry in entries("models") if entry["name"] == "wrn_40_2"]
    assert (found["parameters"], found["flops"]) == (2_255_156, 2 * found["macs"])
    assert found["input_shape"] == [3, 32, 32]
    assert found["taps"]["stage1:pre"] == {
        "place": "layer2.0.bn1",
        "shape": (32, 32, 32),
        "kind": "pre",
        "norm": "layer2.0.bn1",
    }
    assert len(found["blocks"]) == 18 and found["blocks"][-1] == "layer3.5"
