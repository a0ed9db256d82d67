"""Every model: its published size, taps, initialisation, and what it takes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import NetworkError, TapError
from potstill.models import MODELS, build, mobilenet, resnet, shufflenet, wrn
from potstill.net import Captured, Net

close = torch.testing.assert_close

# Trainable parameters with 100 classes. specs/architectures-cifar.md, -gkd.md and -mhgd.md, but for
# resnet38 and resnet14x2, which are there without a count: six blocks of a 97,216 parameters' step,
# and, as with 38x2, the 448 of three more BatchNorms than WRN-16-2.
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet38": 83_892 + 5 * 97_216,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet14x2": 703_284 + 448,
    "resnet38x2": 2_255_604,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
    "resnet50": 23_705_252,
    "resnet18_imagenet": 11_689_512 - 900 * 513,  # as torchvision counts 1000 classes
    "resnet34_imagenet": 21_797_672 - 900 * 513,
    "resnet50_imagenet": 25_557_032 - 900 * 2049,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_16_4": 2_772_020,
    "wrn_28_2": 1_479_220,
    "wrn_28_4": 5_872_180,
    "wrn_28_10": 36_536_884,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "wrn_40_4": 8_972_340,
    "wrn_16_1_gkd": 181_476,
    "wrn_16_2_gkd": 704_420,
    "wrn_16_4_gkd": 2_774_276,
    "wrn_28_2_gkd": 1_481_252,
    "wrn_28_4_gkd": 5_876_228,
    "wrn_40_1_gkd": 571_236,
    "wrn_40_2_gkd": 2_258_084,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "mobilenetv1": 3_309_476,
    "mobilenetv1_imagenet": 3_309_476,
    "mobilenetv1_x0_75_imagenet": 1_893_460,
    "mobilenetv1_x0_5_imagenet": 869_892,
    "mobilenetv1_x0_25_imagenet": 238_772,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "wrn_22_4_mhgd": 4_322_100,
    "wrn_10_4_mhgd": 1_221_940,
    "vgg_teacher_mhgd": 17_964_964,
    "vgg_student_mhgd": 6_111_460,
    "resnet_mhgd": 1_222_836,
    "mobilenet_mhgd": 158_244,
    "vgg_bn_mhgd": 1_179_956,
}
# ... and with other numbers of classes
COUNTS = [
    ("wrn_16_1", 200, 187_416),
    ("wrn_16_2", 200, 716_184),
    ("wrn_16_4", 200, 2_797_720),
    ("wrn_28_2", 200, 1_492_120),
    ("wrn_28_4", 200, 5_897_880),
    ("wrn_28_10", 200, 36_600_984),
    ("wrn_40_1", 200, 576_280),
    ("wrn_40_2", 200, 2_268_056),
    ("wrn_40_4", 200, 8_998_040),
    ("wrn_40_2", 50, 2_248_706),
    ("wrn_16_2", 50, 696_834),
    ("wrn_40_1", 50, 566_530),
    ("wrn_16_1", 50, 177_666),
    ("wrn_28_4", 50, 5_859_330),
    ("wrn_16_4", 50, 2_759_170),
    ("wrn_28_2", 50, 1_472_770),
    ("wrn_16_1_gkd", 50, 178_226),
    ("wrn_16_2_gkd", 50, 697_970),
    ("wrn_16_4_gkd", 50, 2_761_426),
    ("wrn_28_2_gkd", 50, 1_474_802),
    ("wrn_28_4_gkd", 50, 5_863_378),
    ("wrn_40_1_gkd", 50, 567_986),
    ("wrn_40_2_gkd", 50, 2_251_634),
    ("mobilenetv1", 200, 3_411_976),
    ("mobilenetv1_imagenet", 200, 3_411_976),
    ("mobilenetv1_x0_75_imagenet", 200, 1_970_360),
    ("mobilenetv1_x0_5_imagenet", 200, 921_192),
    ("mobilenetv1_x0_25_imagenet", 200, 264_472),
    ("resnet18_imagenet", 1000, 11_689_512),
    ("resnet34_imagenet", 1000, 21_797_672),
    ("resnet50_imagenet", 1000, 25_557_032),
]


def three(c: int, stem: int = 16) -> list[tuple[int, ...]]:
    """Stem, three stages of c, 2c and 4c channels at 32, 16 and 8 pixels; `last` and `embed`."""
    return [(stem, 32, 32), (c, 32, 32), (2 * c, 16, 16), (4 * c, 8, 8), (4 * c, 8, 8), (4 * c,)]


def four(c: int, stem: int = 32, first: int = 32) -> list[tuple[int, ...]]:
    """Stem, four stages from c channels and `first` pixels on; `last` and `embed`."""
    stages = [(c * 2**i, first // 2**i, first // 2**i) for i in range(4)]
    return [(64, stem, stem), *stages, stages[-1], (8 * c,)]


def v1(c: int, first: int) -> list[tuple[int, ...]]:
    """MobileNetV1: stem of c channels, five stages from 2c channels and `first` pixels on."""
    stages = [(2 * c * 2**i, first // 2**i, first // 2**i) for i in range(5)]
    return [(c, first, first), *stages, stages[-1], (32 * c,)]


VGG = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4), (512, 4, 4), (512,)]
SENSED = [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 4, 4), (512, 2, 2), (512, 2, 2), (1024,)]
# Published shapes of stem (but in VGG pairs of MHGD), stages, last and embed, at the default input
SHAPES = {
    **dict.fromkeys([f"resnet{d}" for d in (8, 14, 20, 32, 38, 44, 56, 110)], three(16)),
    **dict.fromkeys(["resnet14x2", "resnet38x2"], three(32)),
    **dict.fromkeys(["resnet8x4", "resnet32x4"], three(64, stem=32)),
    **dict.fromkeys(["resnet18", "resnet34"], four(64)),
    "resnet50": four(256),
    **dict.fromkeys(["resnet18_imagenet", "resnet34_imagenet"], four(64, 112, 56)),
    "resnet50_imagenet": four(256, 112, 56),
    **dict.fromkeys([n for n in PARAMETERS if n.startswith(("wrn_16_1", "wrn_40_1"))], three(16)),
    **dict.fromkeys(["wrn_16_2", "wrn_28_2", "wrn_40_2"], three(32)),
    **dict.fromkeys(["wrn_16_2_gkd", "wrn_28_2_gkd", "wrn_40_2_gkd"], three(32)),
    **dict.fromkeys(["wrn_16_4", "wrn_28_4", "wrn_40_4"], three(64)),
    **dict.fromkeys(["wrn_16_4_gkd", "wrn_28_4_gkd"], three(64)),
    "wrn_28_10": three(160),
    **dict.fromkeys([f"vgg{d}" for d in (8, 11, 13, 16, 19)], VGG),
    "mobilenetv1": v1(32, 32),
    "mobilenetv1_imagenet": v1(32, 112),
    "mobilenetv1_x0_75_imagenet": v1(24, 112),
    "mobilenetv1_x0_5_imagenet": v1(16, 112),
    "mobilenetv1_x0_25_imagenet": v1(8, 112),
    "mobilenetv2": [(16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2), (1280, 2, 2),
                    (1280,)],
    "shufflenetv1": [(24, 32, 32), (240, 16, 16), (480, 8, 8), (960, 4, 4), (960, 4, 4), (960,)],
    "shufflenetv2": [(24, 32, 32), (116, 16, 16), (232, 8, 8), (464, 4, 4), (1024, 4, 4), (1024,)],
    **dict.fromkeys(["vgg_teacher_mhgd", "vgg_student_mhgd"], SENSED),
    **dict.fromkeys([n for n in PARAMETERS if n.endswith("_mhgd") and "vgg_" not in n], three(64)),
    "vgg_bn_mhgd": three(64),
}  # fmt: skip
# Sensing points on 64x64 images, and where else a size changes the layers
LARGER = {
    "wrn_22_4_mhgd": [(64, 32, 32), (128, 16, 16), (256, 8, 8)],
    "wrn_10_4_mhgd": [(64, 32, 32), (128, 16, 16), (256, 8, 8)],
    "vgg_teacher_mhgd": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)],
    "vgg_student_mhgd": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)],
    "vgg13": [(128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)],
    "wrn_16_1": [(16, 64, 64), (32, 32, 32), (64, 16, 16)],
    "resnet8": [(16, 64, 64), (32, 32, 32), (64, 16, 16)],
    "mobilenetv1": [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4)],
    "mobilenetv2": [(12, 32, 32), (16, 16, 16), (48, 8, 8), (160, 4, 4)],
    "shufflenetv1": [(240, 32, 32), (480, 16, 16), (960, 8, 8)],
}
BLOCKS = {
    "resnet32": 15,
    "resnet110": 54,
    "wrn_28_10": 12,
    "wrn_40_4": 18,
    "mobilenetv1": 13,
    "vgg13": 10,
    "resnet50": 16,
    "shufflenetv2": 16,
    "mobilenetv2": 17,
}
every_model = pytest.mark.parametrize("name", list(MODELS))
ONE_OF_EACH = [
    "resnet50","resnet8", "resnet18", "resnet18_imagenet", "wrn_16_1", "wrn_16_1_gkd", "vgg8",
               "mobilenetv1", "mobilenetv2", "shufflenetv1", "shufflenetv2", "vgg_student_mhgd",
               "mobilenet_mhgd", "vgg_bn_mhgd"]  # fmt: skip
SMALL = "resnet8"


def images(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *(shape or (3, 32, 32)), generator=torch.Generator().manual_seed(0))


def small(name: str, classes: int = 5) -> Net:
    """A network on the smallest images that leave every stage a few pixels where they can."""
    torch.manual_seed(0)
    return build(name, classes, (3, 32, 32) if name not in BIG else (3, 16, 16))


BIG = ("wrn_28_10", "wrn_40_4", "resnet50", "resnet34", "resnet18", "resnet110")


def shape_of(net: Net) -> tuple[int, ...]:
    return tuple(net.input_shape)


@every_model
def test_the_number_of_parameters_is_the_published_one(name: str):
    with torch.device("meta"):
        net = build(name)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert all(p.requires_grad for p in net.parameters())
    assert net.num_classes == 100


@pytest.mark.parametrize(("name", "classes", "count"), COUNTS)
def test_the_number_of_parameters_with_other_classes(name: str, classes: int, count: int):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, classes).parameters()) == count


@every_model
def test_taps_have_the_published_shapes(name: str):
    with torch.device("meta"):
        net = build(name)
    plain = [tap for tap in net.taps if ":" not in tap]
    assert [tuple(net.shapes[tap]) for tap in plain] == SHAPES[name]
    stages = [f"stage{i}" for i in range(1, len(net.stages()) + 1)]
    assert plain == [*(["stem"] if "stem" in net.taps else []), *stages, "last", "embed"]
    for tap in net.taps.keys() - set(plain):
        stage, form = tap.split(":")
        assert form in ("pre", "post")
        pooled = name.startswith("vgg_") and not name.startswith("vgg_bn")  # a stage ends in a pool
        if not pooled:
            assert net.shapes[tap] == net.shapes[stage]


@pytest.mark.parametrize("name", LARGER)
def test_stages_on_64_by_64_images(name: str):
    with torch.device("meta"):
        net = build(name, 200, (3, 64, 64))
    assert [tuple(net.shapes[stage]) for stage in net.stages()] == LARGER[name]


def test_pairs_of_the_graph_paper_have_equal_channels_where_they_are_sensed():
    pairs = [("wrn_22_4_mhgd", s) for s in
             ("wrn_10_4_mhgd", "resnet_mhgd", "mobilenet_mhgd", "vgg_bn_mhgd")]  # fmt: skip
    with torch.device("meta"):
        for teacher, student in [*pairs, ("vgg_teacher_mhgd", "vgg_student_mhgd")]:
            a, b = build(teacher), build(student)
            assert [a.shapes[t] for t in a.stages("post")] == [
                b.shapes[t] for t in b.stages("post")
            ]


def forward(net: Net, x: Tensor, training: bool) -> tuple[Captured, dict[str, Tensor]]:
    """What a Net captures, and the same tensors copied at the moment each of them was made."""
    copies: dict[str, Tensor] = {}
    handles = []
    for tap, place in net.taps.items():
        path, _, end = place.partition(":")

        def note(module: nn.Module, args: Any, out: Any = None, tap: str = tap) -> None:
            copies[tap] = (args[0] if out is None else out).detach().clone()

        target = net.module.get_submodule(path)
        hook = target.register_forward_pre_hook if end else target.register_forward_hook
        handles.append(hook(note))
    net.train(training)
    with torch.no_grad():
        out = net(x)
    for handle in handles:
        handle.remove()
    return out, copies


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_no_tap_is_overwritten_by_a_later_layer(name: str, training: bool):
    """What was captured is, when the forward is over, what it was when it was made."""
    net = small(name)
    out, copies = forward(net, images(3, *shape_of(net)), training)
    assert out.features.keys() == copies.keys()
    for tap, made in copies.items():
        assert torch.equal(out.features[tap], made), tap


def within(net: Net, place: str, values: dict[str, Tensor]) -> Tensor:
    """The value at a place inside a block, from what enters the block's stage."""
    (stage, number, part), end = place.partition(":")[0].split("."), place.partition(":")[2]
    x, layer = values[f"{stage}:in"], net.module.get_submodule(stage)
    for block in layer[: int(number)]:
        x = block(x)
    block = copy.deepcopy(layer[int(number)])
    if not end:  # a wide ResNet's block begins with bn1 and relu1
        x = block.bn1(x)
        return x if part == "bn1" else F.relu(x)
    setattr(block, part, nn.Identity())
    if isinstance(block, shufflenet.V2Unit):
        block.shuffle = nn.Identity()
    return block(x)


@every_model
def test_taps_are_what_running_the_layers_one_by_one_gives(name: str):
    """Top level one by one, and block by block within a stage; a block without its last ReLU gives
    its pre-activation. From every tap between two parts, the rest of them give the logits."""
    net = small(name).eval()
    x = images(3, *shape_of(net)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = net(x)
        values, parts = {}, dict(net.module.named_children())
        for path, layer in parts.items():
            values[f"{path}:in"] = x
            values[path] = x = layer(x)
        for tap, place in net.taps.items():
            if place not in values:
                values[place] = within(net, place, values)
                assert torch.equal(out[tap], values[place]), tap
        found = [tap for tap, place in net.taps.items() if place.split(":")[0] in parts]
        assert {"last", "embed", *net.stages()} <= {*found, *net.stages("post")}
        for tap in found:
            assert torch.equal(out[tap], values[net.taps[tap]]), tap
            torch.testing.assert_close(net.tail(tap)(out[tap]), out.logits)


@every_model
def test_taps_are_what_their_kinds_say(name: str):
    """After a ReLU nothing is negative; before it, and in a raw sum, something is."""
    net = small(name)
    out, _ = forward(net, images(8, *shape_of(net)), training=True)
    for tap, known in MODELS[name].taps.items():
        if known.kind == "post":
            assert out[tap].min() >= 0, tap
        else:
            assert out[tap].min() < 0, tap
    for stage in net.stages():
        before, after = f"{stage}:pre", f"{stage}:post"
        if MODELS[name].taps[stage].kind == "raw":
            assert (before in net.taps) == (after in net.taps)
        if after in net.taps:
            assert torch.equal(F.relu(out[before]), out[after])
        elif name == "shufflenetv2":  # channels are shuffled after the ReLU
            assert torch.equal(F.relu(out[before]).sum(1), out[stage].sum(1)) or torch.allclose(
                F.relu(out[before]).sum(1), out[stage].sum(1)
            )
        elif before in net.taps:
            pools = out[before].shape != out[stage].shape
            expected = F.max_pool2d(F.relu(out[before]), 2) if pools else F.relu(out[before])
            assert torch.equal(expected, out[stage])


@every_model
def test_the_pooled_vector_gives_the_logits(name: str):
    net = small(name).eval()
    with torch.no_grad():
        out = net(images(2, *shape_of(net)))
        if isinstance(getattr(net.module, "avgpool", None), nn.Module):
            close(out["last"].mean((2, 3)), out["embed"])
        close(out["embed"] @ net.classifier.weight.T + net.classifier.bias, out.logits)


@every_model
def test_norms_are_the_batchnorms_right_before_the_relu(name: str):
    """Of a pre-activation the last BatchNorm that ran before it, of a raw map the first after."""
    net = small(name).eval()
    order: list[str] = []
    handles = []
    for path, module in net.module.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            handles.append(
                module.register_forward_hook(lambda *_, path=path: order.append(f"bn {path}"))
            )
    for tap, place in net.taps.items():
        path, _, end = place.partition(":")
        target = net.module.get_submodule(path)
        if end:
            handles.append(target.register_forward_pre_hook(lambda *_, t=tap: order.append(t)))
        else:
            handles.append(target.register_forward_hook(lambda *_, t=tap: order.append(t)))
    net.logits(images(2, *shape_of(net)))
    for handle in handles:
        handle.remove()
    for tap, known in MODELS[name].taps.items():
        if known.norm is None:
            assert tap not in net.norms
            continue
        at = order.index(tap)
        norms = [e for e in order[:at][::-1] if e.startswith("bn ")]
        if known.kind == "raw":
            norms = [e for e in order[at:] if e.startswith("bn ")]
        assert norms[0] == f"bn {known.norm}", tap
        assert net.norm(tap).num_features == net.shape_of(tap)[0]
    if name.startswith(("resnet", "wrn", "vgg1", "mobilenetv1", "shufflenetv1")):
        assert {f"stage{i}:pre" for i in range(1, len(net.stages()) + 1)} <= net.norms.keys()


@every_model
def test_blocks_are_in_forward_order_and_leave_out_no_stage(name: str):
    with torch.device("meta"):
        net = build(name, 5, (3, 32, 32))
        ran: list[str] = []
        for path in net.blocks:
            net.module.get_submodule(path).register_forward_hook(
                lambda *_, path=path: ran.append(path)
            )
        net.eval().logits(torch.empty(2, 3, 32, 32))
    assert tuple(ran) == net.blocks
    assert len(net.blocks) == BLOCKS.get(name, len(net.blocks))
    stages = {path.split(".")[0] for path in net.blocks}
    assert stages == {n for n, _ in net.module.named_children() if n.startswith("layer")}


@every_model
def test_block_ends_are_the_blocks_outputs_after_their_relu(name: str):
    """A wide ResNet's raw sum passes BatchNorm and ReLU in the next block; a bottleneck has
    none at its end."""
    net = small(name)
    ends = {f"block{i}": place for i, place in enumerate(net.block_ends, start=1)}
    places = {f"plain{i}": path for i, path in enumerate(net.blocks, start=1)}
    net.add_taps({**ends, **places})
    out, _ = forward(net, images(8, *shape_of(net)), training=True)
    for i in range(1, len(ends) + 1):
        assert out[f"block{i}"].shape == out[f"plain{i}"].shape
        assert name == "mobilenetv2" or out[f"block{i}"].min() >= 0
    stages = [path.split(".")[0] for path in net.blocks]
    last = [i for i, stage in enumerate(stages, start=1) if stage not in stages[i:]]
    if name.startswith(("resnet", "wrn")):
        for i, stage in zip(last, net.stages("post"), strict=True):
            assert torch.equal(out[f"block{i}"], out[stage]), stage


@every_model
def test_initialisation_is_the_published_one(name: str):
    """Convolutions normal with std sqrt(2 / (k k C_out)), or as PyTorch does it; BatchNorm 1, 0."""
    torch.manual_seed(0)
    net = build(name, 100, (3, 32, 32))
    own = name.startswith(("mobilenetv1", "shufflenet")) or name.endswith("_gkd")
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            area = math.prod(module.kernel_size)
            n = module.weight.numel()
            if own:  # uniform between +-1 / sqrt(fan in)
                bound = 1 / math.sqrt(area * module.in_channels / module.groups)
                assert module.weight.abs().max() <= bound
                std = bound / math.sqrt(3)
            else:
                std = math.sqrt(2 / (area * module.out_channels))
                assert module.bias is None or not module.bias.any()
            assert abs(module.weight.std() / std - 1) < 6 / math.sqrt(2 * n)
            assert abs(module.weight.mean() / std) < 6 / math.sqrt(n)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert module.eps == 1e-5
    head, bound = net.classifier, 1 / math.sqrt(net.classifier.in_features)
    if name.startswith(("vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "mobilenetv2")):
        assert abs(head.weight.std() / 0.01 - 1) < 6 / math.sqrt(2 * head.weight.numel())
        assert not head.bias.any()
    elif name.startswith(("vgg_teacher", "vgg_student")):
        std = math.sqrt(2) * bound
        assert abs(head.weight.std() / std - 1) < 6 / math.sqrt(2 * head.weight.numel())
        assert not head.bias.any()
    else:
        assert 0.9 * bound < head.weight.abs().max() <= bound
        zeroed = name.startswith("wrn") and not name.endswith("_gkd")
        assert zeroed == (not head.bias.any())


@every_model
def test_a_gradient_reaches_every_parameter(name: str):
    net = small(name, classes=3)
    F.cross_entropy(net(images(4, *shape_of(net))).logits, torch.tensor([0, 1, 2, 0])).backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_tapped_network_is_one_graph(name: str):
    """Nothing in a network or its hooks makes the compiler give up, with gradients either."""
    torch._dynamo.reset()
    net = small(name)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = images(2, *shape_of(net))
    compiled, eager = torch.compile(net, fullgraph=True, backend="eager")(x), net(x)
    assert compiled.logits.requires_grad
    assert compiled.features.keys() == eager.features.keys()
    for tap in eager.features:
        close(compiled[tap], eager[tap])


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


@every_model
def test_train_and_eval_agree_on_the_statistics_of_one_batch(name: str):
    """With a batch's own mean and biased variance as running statistics both modes are equal."""
    net = small(name).double()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for norm in norms:
        norm.momentum = 1.0
        norm.register_forward_hook(lambda m, args, _: setattr(m, "n", args[0][:, 0].numel()))
    x = images(8, *shape_of(net)).double()
    with torch.no_grad():
        train = net.train()(x).logits
        for norm in norms:
            norm.running_var.mul_((norm.n - 1) / norm.n)
        close(net.eval()(x).logits, train, atol=1e-9, rtol=1e-6)


def test_building_is_reproducible_and_independent():
    torch.manual_seed(0)
    one, other = build(SMALL), build(SMALL)
    torch.manual_seed(0)
    again = build(SMALL)
    assert torch.equal(one.module.conv1.weight, again.module.conv1.weight)
    assert not torch.equal(one.module.conv1.weight, other.module.conv1.weight)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("shape", [(1, 32, 32), (4, 64, 48), (3, 37, 35), (3, 224, 224)])
def test_every_family_takes_other_channels_and_sizes(name: str, shape: tuple[int, int, int]):
    with torch.device("meta"):
        net = build(name, 7, shape)
    assert net.num_classes == 7
    assert next(net.parameters()).shape[1] == shape[0]


class Sakd(nn.Module):
    """The form of SAKD and OFD: a block begins with the ReLU that ends the one before it."""

    class Block(nn.Module):
        def __init__(self, like: resnet.BasicBlock) -> None:
            super().__init__()
            self.conv1, self.bn1, self.conv2, self.bn2, self.downsample = (
                copy.deepcopy(part)
                for part in (like.conv1, like.bn1, like.conv2, like.bn2, like.downsample)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(x)
            shortcut = x if self.downsample is None else self.downsample(x)
            return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut

    def __init__(self, like: resnet.ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.fc = map(copy.deepcopy, (like.conv1, like.bn1, like.fc))
        for i in (1, 2, 3):
            blocks = [self.Block(block) for block in like.get_submodule(f"layer{i}")]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(x).mean((2, 3)))


def test_weights_of_the_sakd_form_give_the_same_logits():
    theirs = Sakd(build("resnet14", 10).module)
    for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    net = build("resnet14", 10)
    net.load_state_dict(theirs.state_dict())
    x = images(4)
    close(net.eval()(x).logits, theirs.eval()(x), atol=1e-4, rtol=1e-4)


# --- layers, by hand ----------------------------------------------------------------------------


def test_half_of_a_shuffle_unit_passes():
    """The first half of the channels comes out unchanged, at the even places."""
    unit = shufflenet.V2Unit(8).eval()
    x = images(2, 8, 4, 4).abs()
    out = unit(x)
    assert torch.equal(out[:, ::2], x[:, :4])
    assert not torch.equal(out[:, 1::2], x[:, 4:])


def test_a_shuffle_unit_of_stride_two_appends_its_pooled_input():
    unit = shufflenet.V1Unit(24, 240, 2).eval()
    x = images(2, 24, 8, 8).abs()
    out = unit(x)
    assert out.shape == (2, 240, 4, 4)
    close(out[:, 216:], F.avg_pool2d(x, 3, 2, 1))
    assert unit.conv1.groups == 1  # the stem's 24 channels are not grouped
    assert shufflenet.V1Unit(240, 240, 1).conv1.groups == 3


def silent(block: nn.Module) -> nn.Module:
    """The block with a last convolution of zeros: its shortcut alone."""
    nn.init.zeros_(block.conv2.weight)
    if block.conv2.bias is not None:
        nn.init.zeros_(block.conv2.bias)
    return block.eval()


def test_shortcuts_of_wide_resnets():
    """Standard: the projection takes the input after BN-ReLU. GKD's: the raw input."""
    x = images(2, 4, 6, 6)
    standard, gkd = silent(wrn.Block(4, 8, 2)), silent(wrn.BiasedBlock(4, 8, 2))
    active = F.relu(x / math.sqrt(1 + 1e-5))
    close(standard(x), F.conv2d(active, standard.shortcut.weight, stride=2))
    close(gkd(x), F.conv2d(x, gkd.shortcut.weight, gkd.shortcut.bias, stride=2))
    for block in (wrn.Block(4, 4, 1), wrn.BiasedBlock(4, 4, 1)):
        assert block.shortcut is None
        assert torch.equal(silent(block)(x), x)


def test_where_the_stride_of_a_block_is():
    """First convolution, but the second of GKD's blocks and the 3x3 one of bottlenecks."""
    found = {
        type(block).__name__: [block.get_submodule(f"conv{i}").stride[0] for i in (1, 2)]
        for block in (
            resnet.BasicBlock(4, 4, 2),
            wrn.Block(4, 8, 2),
            wrn.BiasedBlock(4, 8, 2),
            resnet.Bottleneck(4, 4, 2),
        )
    }
    assert found == {
        "BasicBlock": [2, 1],
        "Block": [2, 1],
        "BiasedBlock": [1, 2],
        "Bottleneck": [1, 2],
    }


def test_what_else_is_different_in_gkds_wide_resnets():
    """Biases everywhere, dropout 0.3, and a last BatchNorm that follows the newest batch."""
    gkd, standard = build("wrn_16_1_gkd").module, build("wrn_16_1").module
    convolutions = [m for m in gkd.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is not None for m in convolutions)
    assert {m.p for m in gkd.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert gkd.bn1.momentum == 0.9
    assert {m.momentum for m in gkd.layer1.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert not any(isinstance(m, nn.Dropout) for m in standard.modules())
    assert standard.bn1.momentum == 0.1


def test_an_inverted_residual_adds_its_input_where_it_keeps_its_shape():
    x = images(2, 4, 6, 6)
    for arguments, added in (((4, 4, 1, 6), True), ((4, 4, 2, 6), False), ((4, 8, 1, 6), False)):
        block = mobilenet.InvertedResidual(*arguments).eval()
        nn.init.zeros_(block.conv3.weight)
        assert torch.equal(block(x), x if added else torch.zeros_like(block(x)))


def test_the_fourth_pooling_is_for_large_images_only():
    assert not hasattr(build("vgg8", 5, (3, 32, 32)).module, "pool4")
    assert hasattr(build("vgg8", 5, (3, 64, 64)).module, "pool4")


# --- anatomy as a network gives it --------------------------------------------------------------


def test_stages_by_form():
    """Before and after the activation where there is one; a linear bottleneck is its own."""
    assert build("wrn_16_1").stages() == ("stage1", "stage2", "stage3")
    assert build("wrn_16_1").stages("pre") == ("stage1:pre", "stage2:pre", "stage3:pre")
    assert build("wrn_16_1").stages("post") == ("stage1:post", "stage2:post", "stage3:post")
    assert build("resnet8").stages("post") == ("stage1", "stage2", "stage3")
    assert build("mobilenetv2").stages("pre") == build("mobilenetv2").stages()
    many = {f"stage{i}": "0" for i in (10, 2, 1)}
    net = Net(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), many, (3, 2, 2))
    assert net.stages() == ("stage1", "stage2", "stage10")


def test_a_norm_that_is_not_known_is_told_with_those_that_are():
    net = build("shufflenetv2")
    with pytest.raises(TapError) as error:
        net.norm("stage1:pre")
    assert str(error.value) == (
        "no BatchNorm is known right before the ReLU after 'stage1:pre' of this ShuffleNetV2; "
        "known: none; say which with Net(..., norms={tap: path})"
    )
    with pytest.raises(TapError, match="no feature 'stage9'"):
        net.norm("stage9")


def test_a_part_that_stands_twice_in_a_line_is_cut_at_the_call_that_is_meant():
    relu, conv = nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)
    module = nn.Sequential(conv, relu, conv, relu, nn.Flatten(), nn.Linear(32, 3))
    net = Net(module, {"first": "1#0", "second": "1#1", "in": "1:in#1"}, (2, 4, 4)).eval()
    out = net(images(2, 2, 4, 4))
    for tap, parts in (("first", 4), ("second", 2), ("in", 3)):
        assert len(net.tail(tap)) == parts
        close(net.tail(tap)(out[tap]), out.logits)


def test_a_sequential_with_a_forward_of_its_own_is_not_cut():
    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    net = Net(Own(nn.Flatten(), nn.Linear(12, 3)), {"a": "0"}, (3, 2, 2))
    with pytest.raises(NetworkError, match=r"'a' \('0'\) is not between two parts"):
        net.tail("a")


@pytest.mark.parametrize("classes", [0, -1, 2.5, None])
def test_a_number_of_classes_that_is_none_is_refused(classes: Any):
    with pytest.raises(NetworkError, match=f"num_classes is {classes}; give a whole number"):
        build(SMALL, classes)


def test_norms_and_blocks_that_do_not_exist_are_refused():
    module = build("resnet8").module
    with pytest.raises(TapError, match=r"norms name the module 'layer1\.0\.bn9', which"):
        Net(module, {"a": "layer1"}, norms={"a": "layer1.0.bn9"})
    with pytest.raises(TapError, match="blocks name the module 'layer9', which does not"):
        Net(module, blocks=["layer9"])
    with pytest.raises(
        TapError, match=r"norms name 'layer1\.0\.conv1', which is a Conv2d, no Batch"
    ):
        Net(module, {"a": "layer1"}, norms={"a": "layer1.0.conv1"})
    with pytest.raises(TapError, match=r"blocks is 'layer1'; write a list"):
        Net(module, blocks="layer1")
    with pytest.raises(TapError, match=r"no feature 'b'; this network has \['a'\]"):
        Net(module, {"a": "layer1"}, norms={"b": "layer1.0.bn1"})


def test_a_network_is_cut_between_its_parts_only():
    net = build("resnet8", 5)
    with pytest.raises(NetworkError, match=r"'stage1:pre' \('layer1.0.relu2:in'\) is not between"):
        net.tail("stage1:pre")
    with pytest.raises(TapError, match="no feature 'stage9'"):
        net.tail("stage9")
    tail = net.tail("stage3")
    assert {id(p) for p in tail.parameters()} == {id(p) for p in net.classifier.parameters()}


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
    assert said == (
        "no model 'resnet55'; did you mean \"resnet56\"?; `potstill list models` shows all"
    )


@pytest.mark.parametrize("name", ["py:", "py:module", "py::function", "py:module:"])
def test_a_name_of_ones_own_that_is_half_is_refused(name: str):
    with pytest.raises(NetworkError, match=f"'{name}' is not py:module:function"):
        build(name)


def test_a_factory_that_fails_is_told_with_its_place(tmp_path: Any, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "failing_factory.py"
    code.write_text("def make(num_classes):\n    return {}['absent']\n")
    with pytest.raises(NetworkError) as error:
        build("py:failing_factory:make", 7)
    assert str(error.value) == (
        f"py:failing_factory:make cannot be made: KeyError: 'absent' ({code}, line 2); it is "
        "called with num_classes=7"
    )


def test_images_that_a_network_cannot_take_are_refused():
    with pytest.raises(NetworkError, match=r"cannot take images of \(3, 0, 8\)"):
        build(SMALL, 5, (3, 0, 8))
