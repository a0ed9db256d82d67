"""Networks of other libraries: what they are asked for, and what is kept of what they publish.

Routing is tested everywhere, with small packages in the place of timm, torchvision and
transformers that take the same calls. The libraries themselves are tested where they import.
"""

from __future__ import annotations

import http.server
import importlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub_settings
from torch import Tensor, nn

from potstill.errors import MissingExtra, NetworkError, StorageError
from potstill.models.outside import PREFIXES, Outside, make
from potstill.net import Net
from potstill.optional import require

STANDARD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

TIMM = """
from types import SimpleNamespace
from torch import nn

calls, resets = [], []
# name: (classes published, channels)
PUBLISHED = {"tiny.a": (5, 3), "tiny.b": (6, 3), "gray.a": (5, 1), "features.a": (0, 3)}


class Tiny(nn.Module):
    def __init__(self, in_chans, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, 4, 3)
        self.fc = nn.Linear(4, num_classes) if num_classes else nn.Identity()

    def reset_classifier(self, num_classes):
        resets.append(num_classes)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def create_model(name, pretrained=False, in_chans=3, **rest):
    calls.append((name, pretrained, in_chans, rest))
    if name.startswith("tiny.b") and pretrained:
        raise RuntimeError("Error(s) in loading state_dict:\\n   Missing key(s)")
    local = {"tiny": "tiny.a", "bare": "tiny.a"}.get(name, "tiny.a" if ":" in name else name)
    classes, channels = PUBLISHED[local]
    model = Tiny(in_chans, rest.get("num_classes", classes))
    model.pretrained_cfg = {
        "num_classes": classes,
        "input_size": (channels, 8, 16),
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    return model


def is_model(name):
    return name in ("tiny", "gray", "features", "bare")


def list_models(filter="", include_tags=False):
    if include_tags:
        return [name for name in PUBLISHED if name.startswith(filter + ".")]
    return ["tiny", "gray", "features", "bare"]


def is_model_pretrained(name):
    return name in PUBLISHED or name == "tiny"


def get_pretrained_cfg(name):
    return SimpleNamespace(hf_hub_id="timm/gray" if name == "gray.a" else None)
"""

TORCHVISION = """
import socket
import urllib.error
from enum import Enum
from types import SimpleNamespace
from torch import nn

calls = []


class Tiny_Weights(Enum):
    V1 = 1
    DEFAULT = 1

    @property
    def meta(self):
        return {"categories": ["a", "b", "c", "d", "e"]}

    def transforms(self):
        return SimpleNamespace(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], crop_size=[8])


class Tiny(nn.Module):
    def __init__(self, num_classes, last="linear"):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.gate = nn.Linear(5, 5)  # five outputs as well, but not the last
        head = nn.Linear(5, num_classes, bias=last != "unbiased")
        if last == "conv":
            head = nn.Sequential(nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, num_classes, 1),
                                 nn.Flatten())
            self.gate = nn.Identity()
        self.head = nn.Sequential(nn.Dropout(0.0), head)
        self.aux_logits, self.AuxLogits = True, nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.gate(self.stem(x).mean((2, 3))))


def get_model(name, weights=None, **rest):
    calls.append((name, weights, rest))
    if weights is not None and rest:  # as torchvision does
        raise ValueError("The parameter 'num_classes' expected value 5 but got another instead.")
    if weights is not None and name == "far":
        try:
            raise socket.gaierror(-2, "Name or service not known")
        except OSError as error:
            raise urllib.error.URLError(error)
    last = {"squeezed": "conv", "unbiased": "unbiased"}.get(name, "linear")
    return Tiny(rest.get("num_classes", 5), last)


def get_model_weights(name):
    return Tiny_Weights


def list_models(module=None):
    classifiers = ["tiny", "unbiased", "far", "squeezed", "googlenet", "inception_v3"]
    return classifiers if module is not None else [*classifiers, "segmenter"]
"""

TRANSFORMERS = """
import json
from pathlib import Path
from types import SimpleNamespace
import torch
from torch import nn

calls = []


class Tiny(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.conv = nn.Conv2d(getattr(config, "num_channels", 3), 4, 3)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, config.num_labels))
        self.half()

    def forward(self, x):
        return SimpleNamespace(logits=self.classifier(self.conv(x).mean((2, 3))))


def read(folder):
    return SimpleNamespace(**json.loads((Path(folder) / "config.json").read_text()))


class AutoConfig:
    @staticmethod
    def from_pretrained(folder, **rest):
        calls.append(("config", rest))
        return read(folder)


class AutoModelForImageClassification:
    @staticmethod
    def from_config(config, **rest):
        calls.append(("from_config", rest))
        return Tiny(config)

    @staticmethod
    def from_pretrained(folder, **rest):
        calls.append(("from_pretrained", rest))
        config = read(folder)
        return Tiny(config), {"missing_keys": set(getattr(config, "lacking", []))}
"""

FILES = {
    "timm/__init__.py": TIMM,
    "torchvision/__init__.py": "from . import models",
    "torchvision/models.py": TORCHVISION,
    "transformers/__init__.py": TRANSFORMERS,
    "transformers/modeling_utils.py": "",
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The three small packages, found before any real one."""
    ours = ("timm", "torchvision", "transformers")
    for name in [n for n in sys.modules if n.partition(".")[0] in ours]:
        monkeypatch.delitem(sys.modules, name)
    place = tmp_path / "packages"
    for name, code in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(code)
    monkeypatch.syspath_prepend(str(place))
    yield place
    for name in [n for n in sys.modules if n.partition(".")[0] in ours]:
        del sys.modules[name]


pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads the hub, or a cache that happens to be here; the empty cache."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(hub_settings, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_settings, "HF_HUB_CACHE", str(cache))
    return cache


fake = pytest.mark.usefixtures("packages")


def calls(package: str) -> list[Any]:
    return list(importlib.import_module(package).calls)


def failure(kind: type[Exception], name: str, num_classes: int | None = 7, **more: Any) -> str:
    """The message, which must be one line."""
    with pytest.raises(kind) as error:
        make(name, num_classes, **more)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


def classes(made: Outside, channels: int = 3) -> int:
    """As Net finds them, which runs the module."""
    return Net(made.module, {}, made.input_shape or (channels, 8, 8)).num_classes


def about(made: Outside) -> tuple[Any, ...]:
    return made.mean, made.std, made.input_shape, made.note


def parts(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if not k.startswith(("fc.", "head."))}


UNKNOWN = (None, None, None, None)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.mark.parametrize("name", ["resnet20", "tim:resnet18", "timm:", "hub", ":tiny", ""])
def test_a_name_of_no_library_is_refused(name: str):
    assert failure(NetworkError, name) == (
        f"'{name}' is none of timm:NAME, tv:NAME and hub:OWNER/REPO"
    )
    assert PREFIXES == ("timm:", "tv:", "hub:")


# --- timm -----------------------------------------------------------------------------------------


@fake
def test_a_timm_teacher_keeps_its_head_and_its_statistics():
    made = make("timm:tiny.a", None, pretrained=True)
    assert calls("timm") == [("tiny.a", True, 3, {})]
    assert about(made) == (MEAN, STD, (3, 8, 16), None)
    assert classes(made) == 5
    assert importlib.import_module("timm").resets == []


@fake
def test_a_timm_student_has_random_weights_and_its_own_classes():
    made = make("timm:tiny", 7)
    assert calls("timm") == [("tiny", False, 3, {"num_classes": 7})]
    assert about(made) == UNKNOWN
    assert classes(made) == 7
    assert classes(make("timm:tiny", None)) == 5
    assert calls("timm")[1] == ("tiny", False, 3, {})


@fake
def test_a_pretrained_timm_student_has_a_new_head_and_says_so():
    """Loaded whole first: timm forgives any missing weight where the classes differ."""
    made = make("timm:tiny", 7, pretrained=True)
    assert calls("timm") == [("tiny", True, 3, {})]
    assert importlib.import_module("timm").resets == [7]
    assert classes(made) == 7
    assert about(made)[:3] == (MEAN, STD, (3, 8, 16))
    assert made.note == "timm:tiny: the head is new, with 7 classes (the published one has 5)"


@fake
def test_a_pretrained_timm_student_of_as_many_classes_keeps_the_head():
    made = make("timm:tiny", 5, pretrained=True)
    assert importlib.import_module("timm").resets == []
    assert made.note is None


@fake
def test_timm_takes_other_channels_and_then_has_no_statistics():
    assert classes(make("timm:tiny", 7, in_channels=1), channels=1) == 7
    made = make("timm:tiny", 7, in_channels=1, pretrained=True)
    assert calls("timm") == [("tiny", False, 1, {"num_classes": 7}), ("tiny", True, 1, {})]
    assert about(made) == (
        None,
        None,
        (1, 8, 16),
        "timm:tiny: the head is new, with 7 classes (the published one has 5); "
        "the first layer is adapted from 3 channels to 1",
    )


@fake
def test_a_timm_network_without_a_classifier_is_no_teacher():
    assert failure(NetworkError, "timm:features.a", None, pretrained=True) == (
        "timm:features.a is published without a classifier, for its features alone; as a student "
        "it can have a new one"
    )
    made = make("timm:features.a", 7, pretrained=True)
    assert made.note == "timm:features.a: the head is new, with 7 classes (none is published)"
    assert classes(made) == 7


@fake
def test_an_unknown_timm_network_is_refused_with_the_nearest():
    assert failure(NetworkError, "timm:tinny") == (
        "timm has no network 'tinny'; did you mean \"tiny\"?; timm.list_models() gives all"
    )
    assert failure(NetworkError, "timm:tiny.bb") == (
        "timm has no network 'tiny.bb'; did you mean \"tiny.b\"?; there are tiny.a, tiny.b"
    )
    assert calls("timm") == []


@fake
def test_a_timm_network_without_weights_is_refused_if_they_are_wanted():
    assert failure(NetworkError, "timm:bare", None, pretrained=True) == (
        "timm publishes no weights of bare; give a file of them (weights=PATH), or start a "
        "student from random ones (weights=null)"
    )
    assert classes(make("timm:bare", 7)) == 7


@fake
def test_what_timm_says_is_kept_in_one_line():
    assert failure(NetworkError, "timm:tiny.b", None, pretrained=True) == (
        "timm:tiny.b cannot be built: Error(s) in loading state_dict: Missing key(s)"
    )


@fake
def test_timms_weights_on_the_hub_are_asked_for_once_before_timm_tries_for_a_minute(offline: Path):
    said = failure(StorageError, "timm:gray.a", None, in_channels=1, pretrained=True)
    assert said.startswith("the weights of timm:gray.a cannot be fetched: Cannot reach ")
    assert said.endswith(
        "; check the connection, give a file of them (weights=PATH), or start a student from "
        "random ones (weights=null)"
    )
    assert calls("timm") == []
    cached(offline, "timm/gray")
    assert make("timm:gray.a", None, in_channels=1, pretrained=True).note is None
    assert calls("timm") == [("gray.a", True, 1, {})]


# --- torchvision ----------------------------------------------------------------------------------


@fake
def test_a_torchvision_teacher_keeps_its_head_and_its_statistics():
    made = make("tv:tiny", None, pretrained=True)
    ((name, weights, rest),) = calls("torchvision.models")
    assert (name, weights.name, rest) == ("tiny", "V1", {})
    assert about(made) == (MEAN, STD, (3, 8, 8), None)
    assert classes(made) == 5


@fake
def test_a_torchvision_student_has_random_weights_and_its_own_classes():
    made = make("tv:tiny", 7)
    assert about(made) == UNKNOWN
    assert classes(made) == 7
    assert classes(make("tv:tiny", None)) == 5
    assert calls("torchvision.models") == [("tiny", None, {"num_classes": 7}), ("tiny", None, {})]


@fake
@pytest.mark.parametrize(("name", "bias"), [("tiny", True), ("unbiased", False)])
def test_a_pretrained_torchvision_student_has_a_new_head_and_all_else(name: str, bias: bool):
    torch.manual_seed(0)
    published = make(f"tv:{name}", None, pretrained=True).module
    torch.manual_seed(0)
    made = make(f"tv:{name}", 7, pretrained=True)
    assert classes(made) == 7
    assert made.note == f"tv:{name}: the head is new, with 7 classes (the published one has 5)"
    assert about(made)[:3] == (MEAN, STD, (3, 8, 8))
    old, new = parts(published), parts(made.module)
    assert "gate.weight" in new  # which has as many outputs as the head had
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)
    assert (made.module.get_submodule("head.1").bias is not None) == bias


@fake
def test_a_pretrained_torchvision_student_of_as_many_classes_keeps_the_head():
    torch.manual_seed(0)
    published = make("tv:tiny", None, pretrained=True).module.state_dict()
    torch.manual_seed(0)
    made = make("tv:tiny", 5, pretrained=True)
    assert made.note is None
    assert all(torch.equal(published[k], v) for k, v in made.module.state_dict().items())


@fake
def test_a_head_that_is_no_linear_layer_is_not_replaced():
    assert failure(NetworkError, "tv:squeezed", pretrained=True) == (
        "tv:squeezed has no final linear layer to replace by one of 7 classes; choose another "
        "network, or start from random weights (weights=null)"
    )
    assert classes(make("tv:squeezed", None, pretrained=True)) == 5


@fake
def test_auxiliary_heads_are_left_out():
    for name in ("googlenet", "inception_v3"):
        make(f"tv:{name}", 7)
    extra = {"num_classes": 7, "aux_logits": False, "init_weights": True}
    assert [rest for _, _, rest in calls("torchvision.models")] == [extra, extra]
    module: Any = make("tv:inception_v3", None, pretrained=True).module
    assert (module.aux_logits, module.AuxLogits) == (False, None)


@fake
def test_an_unknown_torchvision_network_is_refused_with_the_nearest():
    assert failure(NetworkError, "tv:tinny") == (
        "torchvision has no network 'tinny'; did you mean \"tiny\"?; "
        "torchvision.models.list_models() gives all"
    )
    assert failure(NetworkError, "tv:segmenter") == (
        "tv:segmenter does not classify images; Potstill takes those that do"
    )


@fake
def test_torchvision_takes_colour_images_alone():
    assert failure(NetworkError, "tv:tiny", in_channels=1) == (
        "tv:tiny takes images of 3 channels, and these have 1; timm's networks take any number"
    )


@fake
def test_a_failed_download_is_one_line_with_the_ways_out():
    assert failure(StorageError, "tv:far", None, pretrained=True) == (
        "the weights of tv:far cannot be fetched: Name or service not known; check the "
        "connection, give a file of them (weights=PATH), or start a student from random ones "
        "(weights=null)"
    )


# --- the hub --------------------------------------------------------------------------------------


def cached(cache: Path, repo: str) -> Path:
    """The folder of a repository's only revision, in a cache as the hub's library lays it out."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    folder = place / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    return folder


def fill(folder: Path, config: Any, processor: Any = None, weights: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if weights:
        (folder / "model.safetensors").write_bytes(b"")
    return folder


RESNET = {"model_type": "resnet", "num_labels": 5, "num_channels": 3}
PROCESSOR = {"image_mean": list(MEAN), "image_std": list(STD), "size": {"height": 8, "width": 16}}
SAFE = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}


@fake
def test_a_transformers_teacher_keeps_its_head_and_its_statistics(offline: Path):
    fill(cached(offline, "me/net"), RESNET, PROCESSOR)
    made = make("hub:me/net", None, pretrained=True)
    settings = ("config", {"trust_remote_code": False})
    assert calls("transformers") == [settings, ("from_pretrained", SAFE)]
    assert about(made) == (MEAN, STD, (3, 8, 16), None)
    assert {p.dtype for p in made.module.parameters()} == {torch.float32}  # published in half
    assert classes(made) == 5


@fake
def test_a_transformers_student_has_random_weights_and_needs_none(offline: Path):
    fill(cached(offline, "me/net"), RESNET, PROCESSOR, weights=False)
    made = make("hub:me/net", 7, in_channels=1)
    safe = {"trust_remote_code": False}
    assert calls("transformers") == [("config", safe), ("from_config", safe)]
    assert about(made) == UNKNOWN
    assert {p.dtype for p in made.module.parameters()} == {torch.float32}
    assert classes(made, channels=1) == 7
    assert classes(make("hub:me/net", None)) == 5


@fake
def test_a_pretrained_transformers_student_has_a_new_head_and_says_so(tmp_path: Path):
    name = f"hub:{fill(tmp_path / 'net', RESNET)}"
    made = make(name, 7, pretrained=True)
    assert classes(made) == 7
    assert made.module.config.num_labels == 7
    assert about(made) == (
        None,
        None,
        None,
        f"{name}: the head is new, with 7 classes (the published one has 5)",
    )
    assert make(name, 5, pretrained=True).note is None


@fake
def test_a_head_that_transformers_draws_at_random_is_not_taken_for_a_published_one(tmp_path: Path):
    lacking = {"lacking": ["classifier.1.weight", "classifier.1.bias"]}
    name = f"hub:{fill(tmp_path / 'backbone', RESNET | lacking)}"
    assert failure(NetworkError, name, None, pretrained=True) == (
        f"{name} has no weights for classifier.1.bias, classifier.1.weight; a teacher needs all "
        "of them, a student all but its head's"
    )
    for number in (5, 7):  # five is what the settings say
        made = make(name, number, pretrained=True)
        assert classes(made) == number
        assert made.note == f"{name}: the head is new, with {number} classes (none is published)"


@fake
def test_a_backbone_with_holes_is_no_student(tmp_path: Path):
    lacking = {"lacking": ["classifier.1.weight", "conv.bias"]}
    name = f"hub:{fill(tmp_path / 'net', RESNET | lacking)}"
    said = failure(NetworkError, name, 7, pretrained=True)
    assert said.startswith(f"{name} has no weights for classifier.1.weight, conv.bias; ")


@fake
def test_a_transformers_network_has_the_channels_it_was_trained_with(tmp_path: Path):
    gray = RESNET | {"num_channels": 1}
    name = f"hub:{fill(tmp_path / 'gray', gray)}"
    assert failure(NetworkError, name, None, pretrained=True) == (
        f"{name} takes images of 1 channels, and these have 3; timm's networks take any number"
    )
    assert classes(make(name, None, in_channels=1, pretrained=True), channels=1) == 5
    fixed = {k: v for k, v in RESNET.items() if k != "num_channels"}
    name = f"hub:{fill(tmp_path / 'fixed', fixed)}"
    assert "takes images of 3 channels, and these have 1" in failure(
        NetworkError, name, in_channels=1
    )


@fake
@pytest.mark.parametrize(
    ("processor", "mean", "std", "size"),
    [
        ({}, None, None, None),
        ({"image_std": [1.0] * 3, "size": 8}, None, None, (8, 8)),
        ({"size": {"shortest_edge": 8}}, None, None, (8, 8)),
        (
            {"size": {"shortest_edge": 8}, "crop_size": {"height": 6, "width": 7}},
            None,
            None,
            (6, 7),
        ),
        ({"size": 8, "crop_size": 6, "do_center_crop": False}, None, None, (8, 8)),
        # 2x - 1 of x in [0, 1], said in three ways: (x - 0.5) / 0.5, (p - 127.5) / 127.5 of
        # pixels p in [0, 255], and (p / 127.5 - 1) / 1
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (0.5,) * 3, (0.5,) * 3, None),
        (
            {"image_mean": [127.5] * 3, "image_std": [127.5] * 3, "do_rescale": False},
            (0.5,) * 3,
            (0.5,) * 3,
            None,
        ),
        (
            {"image_mean": [1] * 3, "image_std": [1] * 3, "rescale_factor": 1 / 127.5},
            (0.5,) * 3,
            (0.5,) * 3,
            None,
        ),
        (
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False},
            (0.0,) * 3,
            (1.0,) * 3,
            None,
        ),
    ],
)
def test_statistics_and_size_are_read_as_transformers_means_them(
    processor: Any, mean: Any, std: Any, size: Any, tmp_path: Path
):
    made = make(f"hub:{fill(tmp_path / 'net', RESNET, processor)}", None, pretrained=True)
    assert (made.mean, made.std) == (mean, std)
    assert made.input_shape == (None if size is None else (3, *size))


@fake
def test_colours_in_another_order_are_refused(tmp_path: Path):
    folder = fill(tmp_path / "net", RESNET, PROCESSOR | {"do_flip_channel_order": True})
    assert "blue, green, red" in failure(NetworkError, f"hub:{folder}", None, pretrained=True)


@fake
def test_a_timm_network_of_the_hub_is_built_by_timm_from_what_is_here(
    offline: Path, tmp_path: Path
):
    folder = fill(cached(offline, "me/net"), {"architecture": "tiny"})
    made = make("hub:me/net", None, pretrained=True)
    assert calls("timm") == [(f"local-dir:{folder}", True, 3, {})]
    assert about(made) == (MEAN, STD, (3, 8, 16), None)
    made = make(f"hub:{fill(tmp_path / 'net', {'architecture': 'tiny'})}", 7, pretrained=True)
    assert calls("timm")[1] == (f"local-dir:{tmp_path / 'net'}", True, 3, {})
    assert made.note is not None and made.note.endswith("(the published one has 5)")
    assert "transformers" not in sys.modules


@fake
def test_other_repositories_are_refused(tmp_path: Path):
    name = f"hub:{fill(tmp_path / 'net', {'hidden_size': 3})}"
    assert failure(NetworkError, name) == (
        f"{name} is no classifier of timm or transformers: its config.json names neither an "
        "architecture nor a model_type"
    )
    (tmp_path / "net" / "config.json").write_text("<html>")
    assert failure(StorageError, name).startswith(
        f"{tmp_path}/net/config.json is damaged: not JSON: "
    )
    (tmp_path / "net" / "config.json").write_text("[]")
    assert failure(StorageError, name) == f"{tmp_path}/net/config.json is damaged: not a mapping"
    assert "must be in the form" in failure(NetworkError, "hub:a/b/c")


@fake
@pytest.mark.parametrize("config", [RESNET, {"architecture": "tiny"}])
def test_weights_that_could_run_code_are_refused(config: Any, tmp_path: Path):
    folder = fill(tmp_path / "net", config, weights=False)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert failure(NetworkError, f"hub:{folder}", None, pretrained=True) == (
        f"hub:{folder} has no model.safetensors, and other files of weights can run code; give a "
        "file of them (weights=PATH), or start a student from random ones (weights=null)"
    )
    assert (calls("timm"), calls("transformers")) == ([], [])


@fake
def test_a_repository_that_is_not_here_and_cannot_be_reached_is_one_line(offline: Path):
    fill(cached(offline, "me/settings"), RESNET, weights=False)
    for name in ("hub:me/absent", "hub:me/settings"):
        said = failure(StorageError, name, None, pretrained=True)
        assert said.startswith(f"{name} cannot be fetched: Cannot reach ")
        assert said.endswith(
            "; check the connection, or give a local copy of the repository (hub:FOLDER)"
        )


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with some repositories, and others that it does not have or keeps closed."""

    files: Mapping[str, Mapping[str, bytes]]
    asked: list[str]

    def do_GET(self) -> None:
        repo = next((r for r in self.files if f"/{r}/" in f"{self.path}/"), "")
        file = self.path.rpartition("/")[2]
        headers = {"X-Repo-Commit": "a" * 40, "ETag": f'"{file}"'}
        status, body = 200, b""
        if not repo:
            status = 403 if "gated" in self.path else 404
            headers = {"X-Error-Code": "GatedRepo" if status == 403 else "RepoNotFound"}
        elif "/resolve/" in self.path:
            self.asked.append(self.command + " " + file)
            body = self.files[repo][file]
        elif "/tree/" in self.path:
            tree = [
                {"type": "file", "path": f, "size": len(b), "oid": f}
                for f, b in self.files[repo].items()
            ]
            body = json.dumps(tree).encode()
        else:
            siblings = [{"rfilename": f} for f in self.files[repo]]
            body = json.dumps({"id": repo, "sha": "a" * 40, "siblings": siblings}).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(offline: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A server in the place of the Hugging Face hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(hub_settings, "HF_HUB_OFFLINE", False)
    place = f"http://127.0.0.1:{server.server_port}"
    files = place + hub_settings.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(hub_settings.ENDPOINT)
    monkeypatch.setattr(hub_settings, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(hub_settings, "ENDPOINT", place)
    monkeypatch.setattr(Hub, "files", {}, raising=False)
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_repository_that_does_not_exist_or_is_gated_is_said_so(hub: type[Hub]):
    assert failure(NetworkError, "hub:me/absent") == (
        "hub:me/absent: the Hugging Face hub has no model 'me/absent', or it is private: log in "
        "with `hf auth login`"
    )
    assert failure(NetworkError, "hub:me/gated") == (
        "hub:me/gated is gated: ask for access on its page, then log in with `hf auth login`"
    )


@fake
def test_of_a_repository_only_settings_and_safe_weights_are_fetched_and_once(hub: type[Hub]):
    files = {"config.json": json.dumps(RESNET).encode(), "model.safetensors": b"weights"}
    unwanted = dict.fromkeys(("pytorch_model.bin", "modeling.py", "README.md"), b"code")
    hub.files = {"me/net": files | unwanted}
    assert classes(make("hub:me/net", 7)) == 7
    assert sorted(hub.asked) == ["GET config.json", "HEAD config.json"]
    hub.asked.clear()
    for _ in range(2):
        assert classes(make("hub:me/net", None, pretrained=True)) == 5
    assert sorted(hub.asked) == ["GET model.safetensors", "HEAD model.safetensors"]


def test_a_repository_without_settings_is_refused(hub: type[Hub]):
    hub.files = {"me/data": {"README.md": b""}}
    for pretrained in (False, True):
        assert failure(NetworkError, "hub:me/data", None, pretrained=pretrained) == (
            "hub:me/data is no classifier of timm or transformers: no config.json"
        )


# --- without the libraries, and with the real ones ------------------------------------------------


@pytest.mark.parametrize("name", ["timm:resnet18", "tv:resnet18", "hub:{}"])
def test_a_broken_library_is_explained_by_the_networks_name(
    name: str, tmp_path: Path, packages: Path
):
    name = name.format(fill(tmp_path / "net", RESNET))
    for file in ("timm/__init__.py", "torchvision/__init__.py", "transformers/modeling_utils.py"):
        (packages / file).write_text("raise RuntimeError('operator torchvision::nms not there')")
    assert (
        "installed but cannot be imported: operator torchvision::nms not there; torchvision "
        in (failure(MissingExtra, name))
    )
    assert failure(MissingExtra, name).startswith(f"{name} needs t")


def real(module: str, extra: str) -> Any:
    """A library, or a skipped test with the reason why it cannot be imported."""
    try:
        return require(module, extra, "this test")
    except MissingExtra as error:
        pytest.skip(str(error))


libraries = pytest.mark.filterwarnings("default")  # of other people's code


@libraries
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "inception_v3"])
def test_a_real_torchvision_network(name: str):
    real("torchvision", "vision")
    net = Net(make(f"tv:{name}", 7).module, {}, (3, 96, 96))
    assert net(torch.zeros(2, 3, 96, 96)).logits.shape == (2, 7)
    assert net.classifier.out_features == 7


@libraries
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_a_real_timm_network(name: str):
    real("timm", "timm")
    net = Net(make(f"timm:{name}", 7, in_channels=1).module, {}, (1, 224, 224))
    assert net(torch.zeros(2, 1, 224, 224)).logits.shape == (2, 7)
    assert net.classifier.out_features == 7


@libraries
def test_real_published_weights_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From torch's cache, where a file lies in the place of the published one."""
    models = real("torchvision", "vision").models
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = models.get_model_weights("resnet18").DEFAULT
    published = models.get_model("resnet18")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    torch.save(published.state_dict(), file)
    kept, new = make("tv:resnet18", None, pretrained=True), make("tv:resnet18", 7, pretrained=True)
    assert about(kept) == (*STANDARD, (3, 224, 224), None)
    assert new.note == "tv:resnet18: the head is new, with 7 classes (the published one has 1000)"
    assert all(
        torch.equal(v, kept.module.state_dict()[k]) for k, v in published.state_dict().items()
    )
    assert all(torch.equal(v, new.module.state_dict()[k]) for k, v in parts(published).items())
    assert new.module.get_submodule("fc").out_features == 7


@libraries
def test_real_published_weights_of_timm(offline: Path):
    from safetensors.torch import save_file

    timm = real("timm", "timm")
    published = timm.create_model("resnet10t")
    folder = cached(offline, timm.get_pretrained_cfg("resnet10t").hf_hub_id)
    save_file(published.state_dict(), folder / "model.safetensors")
    kept = make("timm:resnet10t", None, pretrained=True)
    new = make("timm:resnet10t", 7, pretrained=True)
    assert about(kept) == (*STANDARD, (3, 176, 176), None)
    assert (
        new.note == "timm:resnet10t: the head is new, with 7 classes (the published one has 1000)"
    )
    assert all(
        torch.equal(v, kept.module.state_dict()[k]) for k, v in published.state_dict().items()
    )
    assert all(torch.equal(v, new.module.state_dict()[k]) for k, v in parts(published).items())
    assert new.module.get_submodule("fc").out_features == 7


@libraries
def test_a_real_transformers_classifier_and_one_without_its_head(tmp_path: Path):
    real("transformers.modeling_utils", "hub")
    transformers = real("transformers", "hub")
    settings = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5
    )
    published = transformers.ResNetForImageClassification(settings)
    published.save_pretrained(tmp_path / "whole")
    published.resnet.save_pretrained(tmp_path / "backbone")
    kept = make(f"hub:{tmp_path}/whole", None, pretrained=True)
    assert all(
        torch.equal(v, kept.module.state_dict()[k]) for k, v in published.state_dict().items()
    )
    assert classes(kept) == 5
    assert classes(make(f"hub:{tmp_path}/whole", 7)) == 7
    new = make(f"hub:{tmp_path}/whole", 7, pretrained=True)
    assert classes(new) == 7 and new.note is not None
    assert "has no weights for classifier.1." in failure(
        NetworkError, f"hub:{tmp_path}/backbone", None, pretrained=True
    )
    made = make(f"hub:{tmp_path}/backbone", 5, pretrained=True)
    assert made.note is not None and made.note.endswith("5 classes (none is published)")
