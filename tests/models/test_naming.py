"""Other projects' names, from tables written by hand after their published files."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from potstill.errors import NetworkError
from potstill.models import MODELS, build
from potstill.models.naming import NAMINGS, OURS, classes_in, translate
from potstill.models.weights import Weights, load_into
from potstill.net import Net

State = dict[str, Tensor]


def pairs(text: str) -> dict[str, str]:
    """Our module's path to theirs: two columns."""
    return dict(line.split() for line in text.strip().splitlines())


def each(blocks: dict[str, str], parts: dict[str, str]) -> dict[str, str]:
    """Every part of every block."""
    return {
        f"{block}.{part}": f"{there}.{name}"
        for (block, there), (part, name) in itertools.product(blocks.items(), parts.items())
    }


SAME = pairs("""
conv1  conv1
bn1    bn1
fc     fc
""")
BASIC = pairs("""
conv1  conv1
bn1    bn1
conv2  conv2
bn2    bn2
""")
# HobbitLong/RepDistiller models/resnetv2.py, kuangliu/pytorch-cifar models/resnet.py: ResNet18
RESNET = {
    **SAME,
    "fc": "linear",
    **each({f"layer{i}.{j}": f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)}, BASIC),
    **pairs("""
layer2.0.downsample.0  layer2.0.shortcut.0
layer2.0.downsample.1  layer2.0.shortcut.1
layer3.0.downsample.0  layer3.0.shortcut.0
layer3.0.downsample.1  layer3.0.shortcut.1
layer4.0.downsample.0  layer4.0.shortcut.0
layer4.0.downsample.1  layer4.0.shortcut.1
"""),
}
# HobbitLong/RepDistiller models/wrn.py, clovaai/overhaul-distillation WideResNet.py: wrn_16_2
WRN = pairs("""
conv1               conv1
layer1.0.bn1        block1.layer.0.bn1
layer1.0.conv1      block1.layer.0.conv1
layer1.0.bn2        block1.layer.0.bn2
layer1.0.conv2      block1.layer.0.conv2
layer1.0.shortcut   block1.layer.0.convShortcut
layer1.1.bn1        block1.layer.1.bn1
layer1.1.conv1      block1.layer.1.conv1
layer1.1.bn2        block1.layer.1.bn2
layer1.1.conv2      block1.layer.1.conv2
layer2.0.bn1        block2.layer.0.bn1
layer2.0.conv1      block2.layer.0.conv1
layer2.0.bn2        block2.layer.0.bn2
layer2.0.conv2      block2.layer.0.conv2
layer2.0.shortcut   block2.layer.0.convShortcut
layer2.1.bn1        block2.layer.1.bn1
layer2.1.conv1      block2.layer.1.conv1
layer2.1.bn2        block2.layer.1.bn2
layer2.1.conv2      block2.layer.1.conv2
layer3.0.bn1        block3.layer.0.bn1
layer3.0.conv1      block3.layer.0.conv1
layer3.0.bn2        block3.layer.0.bn2
layer3.0.conv2      block3.layer.0.conv2
layer3.0.shortcut   block3.layer.0.convShortcut
layer3.1.bn1        block3.layer.1.bn1
layer3.1.conv1      block3.layer.1.conv1
layer3.1.bn2        block3.layer.1.bn2
layer3.1.conv2      block3.layer.1.conv2
bn1                 bn1
fc                  fc
""")
# HobbitLong/RepDistiller models/vgg.py: vgg11_bn
VGG = pairs("""
layer1.0.conv  block0.0
layer1.0.bn    block0.1
layer2.0.conv  block1.0
layer2.0.bn    block1.1
layer3.0.conv  block2.0
layer3.0.bn    block2.1
layer3.1.conv  block2.3
layer3.1.bn    block2.4
layer4.0.conv  block3.0
layer4.0.bn    block3.1
layer4.1.conv  block3.3
layer4.1.bn    block3.4
layer5.0.conv  block4.0
layer5.0.bn    block4.1
layer5.1.conv  block4.3
layer5.1.bn    block4.4
fc             classifier
""")
# HobbitLong/RepDistiller models/mobilenetv2.py: mobile_half
MOBILENET_V2 = {
    **pairs("""
conv1  conv1.0
bn1    conv1.1
conv2  conv2.0
bn2    conv2.1
fc     classifier.0
"""),
    **each(
        pairs("""
layer1.0  blocks.0.0
layer2.0  blocks.1.0
layer2.1  blocks.1.1
layer3.0  blocks.2.0
layer3.1  blocks.2.1
layer3.2  blocks.2.2
layer4.0  blocks.3.0
layer4.1  blocks.3.1
layer4.2  blocks.3.2
layer4.3  blocks.3.3
layer5.0  blocks.4.0
layer5.1  blocks.4.1
layer5.2  blocks.4.2
layer6.0  blocks.5.0
layer6.1  blocks.5.1
layer6.2  blocks.5.2
layer7.0  blocks.6.0
"""),
        pairs("""
conv1  conv.0
bn1    conv.1
conv2  conv.3
bn2    conv.4
conv3  conv.6
bn3    conv.7
"""),
    ),
}
# njulus/GKD networks/wide_resnet.py, depth 16, width 2
GKD_WRN = {
    **pairs("""
conv1  conv1
bn1    bn
fc     fc
"""),
    **each({f"layer{i}.{j}": f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)}, BASIC),
    **pairs("""
layer1.0.shortcut  layer1.0.shortcut.0
layer2.0.shortcut  layer2.0.shortcut.0
layer3.0.shortcut  layer3.0.shortcut.0
"""),
}
SEPARABLE = pairs("""
layer1.0  layers.0
layer2.0  layers.1
layer2.1  layers.2
layer3.0  layers.3
layer3.1  layers.4
layer4.0  layers.5
layer4.1  layers.6
layer4.2  layers.7
layer4.3  layers.8
layer4.4  layers.9
layer4.5  layers.10
layer5.0  layers.11
layer5.1  layers.12
""")
# njulus/GKD networks/mobile_net.py; kuangliu/pytorch-cifar models/mobilenet.py
GKD_MOBILENET = {**SAME, **each(SEPARABLE, BASIC)}
CIFAR_MOBILENET = {**GKD_MOBILENET, "fc": "linear"}
# clovaai/overhaul-distillation ImageNet/models/MobileNet.py
OFD_MOBILENET = {
    **pairs("""
conv1  model.0.0
bn1    model.0.1
fc     fc
"""),
    **each(
        pairs("""
layer1.0  model.1
layer2.0  model.2
layer2.1  model.3
layer3.0  model.4
layer3.1  model.5
layer4.0  model.6
layer4.1  model.7
layer4.2  model.8
layer4.3  model.9
layer4.4  model.10
layer4.5  model.11
layer5.0  model.12
layer5.1  model.13
"""),
        pairs("""
conv1  0
bn1    1
conv2  3
bn2    4
"""),
    ),
}
# HobbitLong/RepDistiller models/ShuffleNetv1.py and ShuffleNetv2.py: all but the head as ours
SHUFFLENETS = {
    name: {path: path for path, _ in build(name, 10).module.named_modules()} | {"fc": "linear"}
    for name in ("shufflenetv1", "shufflenetv2")
}

BOTH = "RepDistiller or pytorch-cifar"
TABLES = [
    ("resnet18", RESNET, BOTH),
    ("wrn_16_2", WRN, "RepDistiller"),
    ("vgg11", VGG, "RepDistiller"),
    ("mobilenetv2", MOBILENET_V2, "RepDistiller"),
    ("shufflenetv1", SHUFFLENETS["shufflenetv1"], BOTH),
    ("shufflenetv2", SHUFFLENETS["shufflenetv2"], BOTH),
    ("wrn_16_2_gkd", GKD_WRN, "GKD"),
    ("mobilenetv1_x0_25_imagenet", GKD_MOBILENET, "GKD"),
    ("mobilenetv1", CIFAR_MOBILENET, "pytorch-cifar"),
    ("mobilenetv1_imagenet", OFD_MOBILENET, "OFD or mdistiller"),
]
families = pytest.mark.parametrize(
    ("name", "table", "project"), TABLES, ids=[f"{project} {name}" for name, _, project in TABLES]
)
SHAPE = (3, 32, 32)


def filled(name: str, seed: int = 0) -> Net:
    """A network without two equal tensors, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    net = build(name, 10, SHAPE)
    for key, tensor in net.state_dict().items():
        if tensor.dim() == 0:
            tensor.fill_(int(torch.randint(1, 1000, (), generator=generator)))
        else:  # a variance must be positive
            values = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(values + 0.5 if key.endswith("running_var") else (values - 0.5) / 4)
    return net.eval()


def published(net: Net, table: dict[str, str]) -> State:
    """A network's tensors, cloned, under the names that a table says."""
    named = {}
    for key, tensor in net.state_dict().items():
        path, leaf = key.rsplit(".", 1)
        named[f"{table[path]}.{leaf}"] = tensor.clone()
    return named


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def logits(net: Net) -> Tensor:
    image = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net(image).logits


# --- every family's names -----------------------------------------------------------------------


@families
def test_a_published_naming_is_read(name: str, table: dict[str, str], project: str):
    """And the order of the names in the file says nothing."""
    net, fresh = filled(name), build(name, 10, SHAPE).eval()
    state = dict(sorted(published(net, table).items(), reverse=True))
    loaded = load_into(fresh, Weights(state, "FILE"))
    assert same(fresh.state_dict(), net.state_dict())
    assert torch.equal(logits(fresh), logits(net))
    assert (loaded.naming, loaded.tensors, loaded.expected) == (project, len(state), len(state))
    assert str(loaded) == f"FILE: {len(state)} of {len(state)} tensors, {project} names"
    for ours, theirs in loaded.renamed.items():
        assert f"{table[ours.rsplit('.', 1)[0]]}.{ours.rsplit('.', 1)[1]}" == theirs != ours


@families
def test_one_lacking_tensor_is_refused(name: str, table: dict[str, str], project: str):
    """The last BatchNorm's mean, under their name of it."""
    net = filled(name)
    state = published(net, table)
    key = [k for k in state if k.endswith("running_mean")][-1]
    del state[key]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(NetworkError) as error:
        load_into(net, Weights(state, "FILE"))
    shown = str(error.value).splitlines()
    assert shown == [
        f"FILE does not fit this {type(net.module).__name__} ({project} names):",
        f"  only in the network: {key}",
    ]
    assert same(net.state_dict(), before)


@families
def test_one_tensor_too_many_is_refused(name: str, table: dict[str, str], project: str):
    net = filled(name)
    state = {**published(net, table), "fc_teacher.weight": torch.zeros(10, 8)}
    with pytest.raises(NetworkError, match=r"\n  only in the file: fc_teacher\.weight$"):
        load_into(net, Weights(state, "FILE"))


@families
def test_the_heads_classes_are_found_under_its_name(name: str, table: dict[str, str], project: str):
    state, asked = published(filled(name), table), build(name, 7, SHAPE)
    assert classes_in(state, asked.state_dict(), asked.classifier_path) == 10
    assert classes_in({}, asked.state_dict(), asked.classifier_path) is None
    assert classes_in(state, asked.state_dict(), None) is None


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "resnet18_imagenet", "resnet50_imagenet"])
def test_torchvisions_names_are_ours(name: str):
    """Which RepDistiller, mdistiller, SimKD, OFD and AFD took over for their ResNets."""
    net, fresh = filled(name), build(name, 10, SHAPE)
    loaded = load_into(fresh, Weights(dict(net.state_dict()), "FILE"))
    assert same(fresh.state_dict(), net.state_dict())
    assert (loaded.naming, loaded.renamed) == (None, {})
    assert str(loaded) == f"FILE: {loaded.expected} of {loaded.expected} tensors"
    blocks = {"resnet8": 3, "resnet8x4": 3, "resnet18_imagenet": 8, "resnet50_imagenet": 16}
    published = {
        "conv1.weight", "bn1.running_var", "layer1.0.conv2.weight", "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.running_mean", "layer3.0.bn2.num_batches_tracked", "fc.bias",
    }  # fmt: skip
    assert published <= net.state_dict().keys()
    assert sum(k.endswith(".conv1.weight") for k in net.state_dict()) == blocks[name]


# --- no guessing --------------------------------------------------------------------------------


def test_no_file_could_be_read_in_two_ways():
    """Where two namings have the same names for a network, they mean the same by each of them."""
    compared = 0
    for architecture in MODELS.values():
        with torch.device("meta"):
            own = list(architecture.build(10, architecture.input_shape).state_dict())
        read: dict[frozenset[str], dict[str, str]] = {}
        for naming in (OURS, *NAMINGS):
            theirs = {naming(name): name for name in own}
            if len(theirs) == len(own):  # otherwise it is for another family
                compared += frozenset(theirs) in read
                assert read.setdefault(frozenset(theirs), theirs) == theirs
    assert compared


def test_layers_of_equal_shape_go_where_their_names_say():
    net, fresh = filled("wrn_16_2"), build("wrn_16_2", 10, SHAPE)
    state = published(net, WRN)
    a, b = "block1.layer.1.conv1.weight", "block1.layer.1.conv2.weight"
    state[a], state[b] = state[b], state[a]
    load_into(fresh, Weights(state, "FILE"))
    assert torch.equal(fresh.module.layer1[1].conv1.weight, net.module.layer1[1].conv2.weight)
    assert torch.equal(fresh.module.layer1[1].conv2.weight, net.module.layer1[1].conv1.weight)


@pytest.mark.parametrize(
    "rename",
    [
        lambda i, key: f"tensor{i:03d}",
        lambda i, key: f"features.{i}.{key.rsplit('.', 1)[1]}",
        lambda i, key: key.replace("layer1", "stage1"),
        lambda i, key: key.upper(),
    ],
)
def test_the_right_tensors_in_the_right_order_are_not_enough(rename: Callable[[int, str], str]):
    net = filled("resnet8")
    state = {rename(i, k): v.clone() for i, (k, v) in enumerate(net.state_dict().items())}
    with pytest.raises(NetworkError, match="only in the file: "):
        load_into(net, Weights(state, "FILE"))


def test_two_namings_are_never_mixed():
    """Half a file under our names and half under another's is neither."""
    net = filled("wrn_16_2")
    state: State = {}
    for key, tensor in net.state_dict().items():
        path, leaf = key.rsplit(".", 1)
        state[key if path.startswith("layer3") else f"{WRN[path]}.{leaf}"] = tensor
    with pytest.raises(NetworkError, match=r"RepDistiller names\):\n  only in the network: block3"):
        load_into(net, Weights(state, "FILE"))


class TwoHeads(nn.Module):
    """A user's network, both of whose heads another project would call "linear"."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.linear(x.flatten(1)))


def test_one_tensor_is_never_taken_twice():
    module = TwoHeads()
    state = {f"linear.{k}": v.clone() for k, v in module.linear.named_parameters()}
    found = translate(state, module.state_dict())
    assert not found.fits
    assert found.missing == ["fc.weight", "fc.bias"]


# --- what is around the names -------------------------------------------------------------------


PREFIXES = [
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "student.",
    "model.", "module.student.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_all_names_share_is_a_wrappers(prefix: str):
    net, fresh = filled("wrn_16_2"), build("wrn_16_2", 10, SHAPE)
    state = {f"{prefix}{k}": v for k, v in published(net, WRN).items()}
    loaded = load_into(fresh, Weights(state, "FILE"))
    assert same(fresh.state_dict(), net.state_dict())
    assert loaded.prefix == prefix
    assert str(loaded).endswith(f" names, prefix {prefix} left out")


def test_a_prefix_of_our_own_names():
    net, fresh = filled("resnet8"), build("resnet8", 10, SHAPE)
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    loaded = load_into(fresh, Weights(state, "FILE"))
    assert same(fresh.state_dict(), net.state_dict())
    assert str(loaded) == "FILE: 56 of 56 tensors, prefix module. left out"
    assert loaded.renamed == {}


def test_a_prefix_that_is_the_networks_own_stays():
    own = {f"body.{k}": v for k, v in filled("resnet8").state_dict().items()}
    assert translate(own, own).prefix == ""
    bare = {k.removeprefix("body."): v for k, v in own.items()}
    assert not translate(bare, own).fits


def test_a_prefix_that_one_name_lacks_is_no_wrappers():
    """A student and its teacher in one file: which of them is meant is not said."""
    net = filled("resnet8")
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    with pytest.raises(NetworkError, match=r"only in the file: module\.conv1\.weight"):
        load_into(net, Weights({**state, "conv1.weight": torch.zeros(16, 3, 3, 3)}, "FILE"))
    two = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in net.state_dict().items()}
    with pytest.raises(NetworkError, match=r"only in the file: student\.conv1\.weight"):
        load_into(net, Weights(two, "FILE"))
    assert translate(two, net.state_dict()).prefix == ""
    one = {f"module.{k}": v for k, v in two.items()}
    assert len(translate(one, net.state_dict()).unknown) == len(one)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_profilers_counts_are_ignored_and_told(prefix: str):
    """thop registers two buffers on every module, on the outermost one too."""
    net, fresh = filled("wrn_16_2"), build("wrn_16_2", 10, SHAPE)
    state = {f"{prefix}{k}": v for k, v in published(net, WRN).items()}
    counts = ["total_ops", "total_params", f"{prefix}block1.layer.0.conv1.total_ops"]
    state |= {name: torch.zeros(1, dtype=torch.float64) for name in counts}
    loaded = load_into(fresh, Weights(state, "FILE"))
    assert same(fresh.state_dict(), net.state_dict())
    assert loaded.ignored == counts
    assert str(loaded).endswith(", 3 ignored (total_ops, total_params)")


def test_an_averaged_model_is_read():
    """torch.optim.swa_utils.AveragedModel: everything under "module." but its own count."""
    net, fresh = filled("resnet8"), build("resnet8", 10, SHAPE)
    averaged = torch.optim.swa_utils.AveragedModel(net.module)
    loaded = load_into(fresh, Weights(averaged.state_dict(), "FILE"))
    assert same(fresh.state_dict(), net.state_dict())
    assert loaded.ignored == ["n_averaged"]


def test_a_file_from_before_batches_were_counted():
    net, fresh = filled("wrn_16_2"), build("wrn_16_2", 10, SHAPE).eval()
    state = {k: v for k, v in published(net, WRN).items() if not k.endswith("num_batches_tracked")}
    loaded = load_into(fresh, Weights(state, "FILE"))
    assert torch.equal(logits(fresh), logits(net))
    assert str(loaded) == "FILE: 70 of 83 tensors, RepDistiller names, no num_batches_tracked"
    assert fresh.module.bn1.num_batches_tracked == 0


def test_other_buffers_must_be_there():
    net = filled("wrn_16_2")
    state = {k: v for k, v in published(net, WRN).items() if not k.endswith("running_var")}
    with pytest.raises(NetworkError, match=r"network: block1\.layer\.0\.bn1\.running_var"):
        load_into(net, Weights(state, "FILE"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_converted_to_the_networks(dtype: torch.dtype):
    net, fresh = filled("wrn_16_2"), build("wrn_16_2", 10, SHAPE).eval()
    state = {k: v.to(dtype) if v.dim() else v for k, v in published(net, WRN).items()}
    loaded = load_into(fresh, Weights(state, "FILE"))
    for key, tensor in fresh.state_dict().items():
        expected = net.state_dict()[key]
        assert tensor.dtype == expected.dtype
        assert torch.equal(
            tensor, expected.to(dtype).to(expected.dtype) if tensor.dim() else expected
        )
    name = str(dtype).removeprefix("torch.")
    assert loaded.converted == [f"{name} to float32"]
    assert str(loaded) == f"FILE: 83 of 83 tensors, RepDistiller names, {name} to float32"


def test_into_a_network_of_another_precision():
    net, fresh = filled("resnet8"), build("resnet8", 10, SHAPE).double()
    loaded = load_into(fresh, Weights(dict(net.state_dict()), "FILE"))
    assert loaded.converted == ["float32 to float64"]
    assert torch.equal(fresh.module.fc.weight, net.module.fc.weight.double())


def test_whole_numbers_are_no_weights():
    """A quantised file's integers need a scale that a plain copy would lose."""
    net = filled("resnet8")
    state = dict(net.state_dict())
    state["fc.weight"] = torch.zeros(10, 64, dtype=torch.int8)
    with pytest.raises(NetworkError) as error:
        load_into(net, Weights(state, "FILE"))
    assert "  other shapes: fc.weight is int8, the network's float32" in str(error.value)


def test_an_averaged_count_of_batches_is_taken():
    """Averaging a whole state leaves its counters as real numbers."""
    net, fresh = filled("resnet8"), build("resnet8", 10, SHAPE)
    state = {k: v.float() for k, v in net.state_dict().items()}
    load_into(fresh, Weights(state, "FILE"))
    assert same(fresh.state_dict(), net.state_dict())


def test_the_closest_naming_is_the_one_of_most_names():
    """A file of other widths has no shape in common but follows a naming all the same."""
    wide, narrow = filled("wrn_16_4"), build("wrn_16_2", 10, SHAPE).state_dict()
    found = translate(published(wide, WRN), narrow)
    assert found.naming.project == "RepDistiller"
    assert found.missing == found.unknown == []
    assert found.shapes["layer1.0.shortcut.weight"] == "block1.layer.0.convShortcut.weight"
    assert translate({}, narrow).naming is OURS
