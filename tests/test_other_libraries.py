"""Networks of other libraries from a recipe to a finished run, with a package that stands for timm.

Its one network, `tiny`, is published for grey 8x8 images of ten classes; its weights are drawn from
seed 5, so that a test knows them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill import cli, recipe, training
from potstill.errors import NetworkError, RecipeError
from potstill.models import build, weights
from potstill.run import Run

TIMM = """
from types import SimpleNamespace
import torch
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, in_chans, num_classes):
        super().__init__(
            nn.Conv2d(in_chans, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes),
        )

    def reset_classifier(self, num_classes):
        self[8] = nn.Linear(6, num_classes)

def create_model(name, pretrained=False, in_chans=3, num_classes=10):
    if pretrained:
        torch.manual_seed(5)
    model = Tiny(in_chans, num_classes)
    model.pretrained_cfg = {
        "num_classes": 10, "input_size": (1, 8, 8), "mean": [0.25], "std": [0.5],
    }
    return model

def is_model(name):
    return name == "tiny"

def list_models(filter="", include_tags=False):
    return ["tiny.a"] if include_tags else ["tiny"]

def is_model_pretrained(name):
    return True

def get_pretrained_cfg(name):
    return SimpleNamespace(hf_hub_id=None, hf_hub_filename=None)
"""
KD = ("digits/kd", "data.subset=40", "epochs=1", "precision=fp32")
IMAGES = ((1, 8, 8), [0.5], [0.25])  # of the data; the network's own mean and std are others


@pytest.fixture(autouse=True)
def timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "timm.py").write_text(TIMM)
    for name in [n for n in sys.modules if n.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module("timm")
    sys.modules.pop("timm", None)


def published() -> dict[str, Tensor]:
    return sys.modules["timm"].create_model("tiny", pretrained=True, in_chans=1).state_dict()


def made(role: str, text: str, *overrides: str) -> tuple[Any, Any, list[str]]:
    """A recipe's network, its classes, and what is reported."""
    given = recipe.load("digits/kd", ["teachers.0.weights=x", f"{role}s=[{text}]", *overrides])
    data = training.load_data(given, torch.device("cpu"))
    said: list[str] = []
    torch.manual_seed(0)
    net, classes = training.build_network(
        getattr(given, f"{role}s")[0], data, f"{role}s.0", said.append
    )
    return net, classes, said


def same(module: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_a_teacher_has_its_published_weights_head_and_normalisation():
    net, classes, said = made("teacher", "timm:tiny")
    assert same(net.module, published()) and list(classes) == list(range(10))
    assert said == [
        "teachers.0 (timm:tiny): its 10 classes are taken to be the data's, in their order"
    ]
    net = weights.published("timm:tiny", None, *IMAGES).eval()
    pixels = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            net((pixels - 0.5) / 0.25).logits, net.module((pixels - 0.25) / 0.5)
        )
        given = weights.published("timm:tiny", None, *IMAGES, normalize=([0.5], [0.25])).eval()
        assert given.scale is None
    assert {"stage1", "stage2", "embed"} == net.taps.keys()


def test_a_teacher_of_other_classes_keeps_its_head():
    net, classes, said = made("teacher", "timm:tiny.a", "data.classes=[1, 2, 3]")
    assert net.num_classes == 10 and classes is None and not said
    assert same(net.module, published())


def test_a_student_is_random_unless_it_is_said_otherwise():
    """... and where its head has to be new, that is said."""
    net, classes, said = made("student", "timm:tiny", "data.classes=[1, 2, 3]")
    assert net.num_classes == 3 and list(classes) == [1, 2, 3] and not said
    assert not torch.equal(net.module[0].weight, published()["0.weight"])
    text = "{name: timm:tiny, weights: pretrained}"
    net, classes, said = made("student", text, "data.classes=[1, 2, 3]")
    assert torch.equal(net.module[4].weight, published()["4.weight"])
    assert net.num_classes == 3
    assert said == ["timm:tiny: the head is new, with 3 classes (the published one has 10)"]
    net, _, said = made("student", text)
    assert same(net.module, published()) and not said


def test_images_of_another_size_are_refused_with_the_published_one(timm: Any):
    timm.Tiny.forward = lambda self, x: nn.Sequential.forward(self, x) if x.shape[2] == 8 else 1 / 0
    with pytest.raises(NetworkError) as error:
        weights.published("timm:tiny", None, (1, 16, 16), [0.5], [0.25])
    assert str(error.value) == (
        "timm:tiny was published for images of (1, 8, 8): Tiny cannot take images of (1, 16, 16) "
        "(channels, height, width): division by zero"
    )


def test_images_of_another_size_are_told():
    said: list[str] = []
    weights.published("timm:tiny", None, (1, 12, 12), [0.5], [0.25], report=said.append)
    assert said == ["timm:tiny: published for images of 8x8, and these are 12x12"]


def test_the_published_weights_of_our_own_names_are_nowhere():
    with pytest.raises(RecipeError, match='weights=pretrained, but "resnet8" is not published'):
        recipe.load("digits/vanilla", ["students.0.weights=pretrained"])
    with pytest.raises(RecipeError, match=r"teachers\.0\.weights is null"):
        recipe.load("digits/kd", ["teachers=[resnet20]"])
    assert recipe.load("digits/kd", ["teachers=[timm:tiny]"]).teachers[0].weights is None


def test_an_absent_library_is_named_where_its_network_is_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "timm")
    Path("packages/timm.py").write_text("raise RuntimeError('operator torchvision::nms is lost')")
    importlib.invalidate_caches()
    given = recipe.load("digits/kd", ["teachers=[timm:tiny]"])
    with pytest.raises(Exception, match="timm:tiny needs timm, which is installed but cannot be"):
        training.assemble(given)


@pytest.fixture
def potstill(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["potstill", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output, errors = capfd.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), output, errors

    return run


def test_a_run_from_end_to_end(potstill: Any):
    """Trained, resumed, and its student read back by the name alone."""
    words = (*KD, "teachers=[timm:tiny]", "students=[timm:tiny]", "--out", "run")
    code, output, errors = potstill("train", *words)
    assert code == 0, errors
    assert "teacher 0 (timm:tiny): " in output
    assert Run.open(Path("run")).result is not None
    code, output, errors = potstill("eval", "run", "--json")
    assert code == 0, errors
    assert '"images": 898' in output
    (Path("run") / "result.json").unlink()
    code, output, errors = potstill("train", *words, "--resume")
    assert code == 0 and "resumed after step" in output, errors
    code, _, errors = potstill("train", *KD, "teachers=[timm:tiny]", "data.classes=[1, 2, 3]")
    assert code == 2 and "teacher 0 has 10 classes and student 0 has 3" in errors


def test_a_published_network_is_measured_without_a_file(potstill: Any):
    code, output, errors = potstill("eval", "--model", "timm:tiny", "--data", "digits")
    assert code == 0 and "timm:tiny: " in output, errors
    code, _, errors = potstill("eval", "--model", "resnet8", "--data", "digits")
    assert code == 2 and "--weights is missing" in errors
    code, _, errors = potstill("eval", "--model", "timm:tiny")
    assert code == 2 and "timm:tiny does not say what it was trained on; add --data" in errors


def test_what_was_taken_from_another_projects_file_is_printed(potstill: Any):
    net = build("wrn_16_1", 10, (1, 8, 8))
    torch.save({"model": {f"module.{k}": v for k, v in net.state_dict().items()}}, "wrn.pth")
    line = "wrn.pth: 82 of 82 tensors, prefix module. left out\n"
    words = ("eval", "--model", "wrn_16_1", "--weights", "wrn.pth", "--data", "digits", "--json")
    code, output, errors = potstill(*words)
    assert code == 0 and errors == line and output.startswith("{")
    teacher = "teachers=[{name: wrn_16_1, weights: wrn.pth}]"
    code, output, errors = potstill("train", *KD, teacher, "--out", "run")
    assert code == 0 and line in output, errors
