"""Reading trained weights: ours, other projects', damaged and hostile ones."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.errors import NetworkError, StorageError
from potstill.files import save_tensors
from potstill.models import MODELS, build
from potstill.models.weights import HEAD, Weights, load_into, network, read
from potstill.net import Net
from potstill.run import Run

close = torch.testing.assert_close
SHAPE = (3, 8, 8)
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.5]
OWN_MEAN, OWN_STD = [0.1, 0.45, 0.3], [0.5, 0.1, 0.25]


def trained(classes: int = 10, name: str = "resnet8") -> Net:
    """A network with statistics that are not the initial ones."""
    torch.manual_seed(3)
    net = build(name, classes, SHAPE)
    with torch.no_grad():
        net(torch.randn(16, *SHAPE))
    return net.eval()


def image() -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def load(path: Path | str, classes: int = 10, **more: Any) -> Net:
    arguments = {"name": "resnet8", "mean": MEAN, "std": STD, **more}
    return network(weights=read(path), num_classes=classes, input_shape=SHAPE, **arguments).eval()


def logits(net: Net, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return net(image() if x is None else x).logits


# --- other projects' files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 240, "best_acc": 72.3},
        lambda s: {"model": s, "opt": "sgd", "epoch": torch.tensor(240)},
        lambda s: {"net": s},
        lambda s: {"epoch": 3, "model": {"state_dict": s}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"net": {f"_orig_mod.module.{k}": v for k, v in s.items()}, "acc": 72.3},
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
        lambda s: {"opt": argparse.Namespace(lr=0.05, model="resnet8"), "model": s},
    ],
    ids=[
        "bare", "state_dict", "model", "net", "nested", "parallel", "parallel in state_dict",
        "compiled", "model_state_dict", "with parsed arguments",
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_file_gives_the_same_network(wrap: Any, zipped: bool, tmp_path: Path):
    net, path = trained(), tmp_path / "net.pth"
    torch.save(wrap(net.state_dict()), path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(logits(load(path)), logits(net))


def test_a_file_knows_nothing_of_normalisation_so_the_datas_is_taken(tmp_path: Path):
    path = tmp_path / "net.pth"
    torch.save(trained().state_dict(), path)
    found = read(path)
    assert (found.model, found.mean, found.std, found.classes) == (None,) * 4
    assert load(path).scale is None


def test_a_given_normalisation_is_applied(tmp_path: Path):
    net, path = trained(), tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    pixels = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    by = [torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD, OWN_MEAN, OWN_STD)]
    found = load(path, normalize=(OWN_MEAN, OWN_STD))
    close(logits(found, (pixels - by[0]) / by[1]), logits(net, (pixels - by[2]) / by[3]))
    assert load(path, normalize=(MEAN, STD)).scale is None


def test_another_architecture_is_refused_with_the_layers_that_differ(tmp_path: Path):
    path = tmp_path / "resnet14.pth"
    torch.save(trained(name="resnet14").state_dict(), path)
    with pytest.raises(NetworkError) as error:
        load(path)
    first, second, third = str(error.value).splitlines()
    assert first == f"{path} does not fit this ResNet:"
    assert second.startswith("  only in the file: layer1.1.conv1.weight, layer1.1.bn1.weight, ")
    assert second.endswith(", and 32 more")  # 3 new blocks of 12 tensors
    assert third == "these weights fit resnet14"
    torch.save(trained().state_dict(), path)
    with pytest.raises(NetworkError, match=r"only in the network: layer1\.1\.conv1\.weight"):
        load(path, name="resnet14")


def test_other_widths_are_refused_with_both_shapes(tmp_path: Path):
    path = tmp_path / "net.pth"
    torch.save(trained().state_dict(), path)
    with pytest.raises(NetworkError) as error:
        load(path, name="resnet8x4")
    said = str(error.value)
    assert "  other shapes: conv1.weight is (16, 3, 3, 3), the network's (32, 3, 3, 3), " in said
    assert "  only in the network: layer1.0.downsample.0.weight" in said


def without_head_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != "fc.bias"}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_head_bias, r"only in the network: fc\.bias"),
        (lambda s: {**s, "fc2.bias": s["fc.bias"]}, r"only in the file: fc2\.bias"),
        (
            lambda s: {**s, "fc.bias": s["fc.bias"][:7]},
            r"fc\.bias is \(7,\), the network's \(10,\)",
        ),
        (lambda s: {**s, "fc.bias": s["fc.bias"].int()}, "fc.bias is int32, the network's float32"),
        (lambda s: {f"linear.{k}": v for k, v in without_head_bias(s).items()}, "only in the netw"),
    ],
)
def test_a_refused_file_changes_nothing(spoil: Any, said: str):
    net = build("resnet8", 10, SHAPE)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(NetworkError, match=said):
        load_into(net, Weights(spoil(trained().state_dict()), "here"))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def as_repdistiller(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A wide ResNet's tensors as RepDistiller's wrn.py names them."""
    renamed = {}
    for key, tensor in state.items():
        for i in (1, 2, 3):
            key = key.replace(f"layer{i}.", f"block{i}.layer.").replace(
                ".shortcut.", ".convShortcut."
            )
        renamed[key] = tensor.clone()
    return renamed


def test_the_differences_are_told_in_the_files_own_names():
    state = as_repdistiller(trained(name="wrn_28_2").state_dict())
    with pytest.raises(NetworkError) as error:
        load_into(build("wrn_16_2", 10, SHAPE), Weights(state, "wrn.pth"))
    first, second, third = str(error.value).splitlines()
    assert first == "wrn.pth does not fit this WideResNet (RepDistiller names):"
    assert second.startswith("  only in the file: block1.layer.2.bn1.weight, block1.layer.2.bn1.b")
    assert third == "these weights fit wrn_28_2"


def test_the_suggestion_says_the_classes_where_they_are_others():
    state = trained(classes=7).state_dict()
    with pytest.raises(NetworkError) as error:
        load_into(build("resnet8", 10, SHAPE), Weights(state, "here"))
    first, second, third = str(error.value).splitlines()
    assert first == "here does not fit this ResNet:"
    assert second.startswith(
        "  other shapes: fc.weight is (7, 64), the network's (10, 64), fc.bias"
    )
    assert third == "these weights fit resnet8 with 7 classes"


def test_every_architecture_that_fits_is_suggested():
    """Weights do not say the stride of a stem."""
    state = trained(name="mobilenetv1").state_dict()
    with pytest.raises(NetworkError, match=r"fit mobilenetv1, mobilenetv1_imagenet$"):
        load_into(build("resnet8", 10, SHAPE), Weights(state, "here"))


def test_the_suggestion_sees_through_names_prefix_and_counts():
    state = as_repdistiller(trained(name="wrn_16_1").state_dict())
    state = {f"module.{k}": v.half() for k, v in state.items()}
    state["total_ops"] = torch.zeros(1)
    with pytest.raises(NetworkError, match=r"these weights fit wrn_16_1$"):
        load_into(build("resnet20", 10, SHAPE), Weights(state, "here"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: {**s, "extra": torch.zeros(3)},
        lambda s: {k.replace("layer1", "stage1"): v for k, v in s.items()},
        lambda s: {k: v for k, v in s.items() if not k.startswith("fc")},
    ],
    ids=["a tensor too many", "the same shapes under unknown names", "no head"],
)
def test_nothing_is_suggested_where_nothing_fits(spoil: Any):
    state = spoil(trained(name="wrn_16_1").state_dict())
    with pytest.raises(NetworkError) as error:
        load_into(build("resnet20", 10, SHAPE), Weights(state, "here"))
    assert all(line.startswith("  ") for line in str(error.value).splitlines()[1:])


def test_every_architecture_is_suggested_for_its_own_weights():
    wrong = [build("resnet8", 10), build("vgg8", 10)]
    for name, architecture in MODELS.items():
        with torch.device("meta"):  # their shapes are all that is looked at
            state = architecture.build(10, (3, 32, 32)).state_dict()
        with pytest.raises(NetworkError) as error:
            load_into(wrong[name == "resnet8"], Weights(state, "here"))
        _, _, suggested = str(error.value).rpartition("\nthese weights fit ")
        assert name in suggested.split(", ")


def test_every_classifier_is_where_the_suggestion_looks_for_it():
    assert {build(name, 10).classifier_path for name in ("resnet8", "wrn_16_1", "vgg8")} == {HEAD}
    for architecture in MODELS.values():
        with torch.device("meta"):
            module = architecture.build(13, architecture.input_shape)
        assert list(module.state_dict())[-2:] == [f"{HEAD}.weight", f"{HEAD}.bias"]


def test_the_head_is_kept_under_another_projects_names(tmp_path: Path):
    net, path = trained(classes=10, name="shufflenetv1"), tmp_path / "net.pth"
    state = {k.replace("fc.", "linear."): v for k, v in net.state_dict().items()}
    torch.save({"net": {f"module.{k}": v for k, v in state.items()}}, path)
    found = load(path, classes=100, name="shufflenetv1")
    assert found.num_classes == 10
    assert torch.equal(found.classifier.weight, net.classifier.weight)
    assert torch.equal(logits(found), logits(net))


def test_what_was_taken_from_a_foreign_file_is_told_in_a_line(tmp_path: Path):
    said: list[str] = []
    path, net = tmp_path / "wrn.pth", trained(name="wrn_16_1")
    torch.save({"model": as_repdistiller(net.half().state_dict())}, path)
    load(path, name="wrn_16_1", report=said.append)
    assert said == [f"{path}: 82 of 82 tensors, RepDistiller names, float16 to float32"]


def test_a_refused_file_is_not_reported(tmp_path: Path):
    said: list[str] = []
    path = tmp_path / "net.pth"
    torch.save(without_head_bias(trained().state_dict()), path)
    with pytest.raises(NetworkError):
        load(path, report=said.append)
    assert said == []


def test_a_network_keeps_the_head_it_was_trained_with(tmp_path: Path):
    """Ten classes, though the student's task has a hundred: never a fresh head of a hundred."""
    net, path = trained(classes=10), tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    found = load(path, classes=100)
    assert found.num_classes == 10
    assert torch.equal(found.classifier.weight, net.classifier.weight)
    assert torch.equal(logits(found), logits(net))


def test_without_weights_a_new_network_is_built():
    net = network("resnet8", None, 7, SHAPE, MEAN, STD)
    assert net.num_classes == 7
    assert net.scale is None
    affine = network("resnet8", None, 7, SHAPE, MEAN, STD, normalize=(OWN_MEAN, OWN_STD))
    close(affine.scale.flatten(), torch.tensor(STD) / torch.tensor(OWN_STD))


# --- our files ----------------------------------------------------------------------------------


def metadata(**changes: Any) -> dict[str, Any]:
    return {
        "model": "resnet8",
        "mean": OWN_MEAN,
        "std": OWN_STD,
        "classes": list(range(10, 20)),
        "input_shape": list(SHAPE),
        **changes,
    }


def saved(tmp_path: Path, how: str, **changes: Any) -> Path:
    about = metadata(**changes)
    if how == "file":
        path = tmp_path / "net.safetensors"
        save_tensors(path, trained().state_dict(), {k: json.dumps(v) for k, v in about.items()})
        return path
    run = Run.create(tmp_path / "run", "", {})
    run.save_predictor("student", trained().state_dict(), about)
    run.finish({})
    return tmp_path / "run"


both = pytest.mark.parametrize("how", ["file", "run"])


@both
def test_our_weights_bring_their_normalisation_along(how: str, tmp_path: Path):
    pixels = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    by = [torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD, OWN_MEAN, OWN_STD)]
    path = saved(tmp_path, how)
    found = load(path)
    close(logits(found, (pixels - by[0]) / by[1]), logits(trained(), (pixels - by[2]) / by[3]))
    weights = read(path)
    assert weights.classes == list(range(10, 20))
    assert weights.input_shape == list(SHAPE)
    assert weights.model == "resnet8"


@both
def test_a_given_normalisation_goes_before_the_files(how: str, tmp_path: Path):
    assert load(saved(tmp_path, how), normalize=(MEAN, STD)).scale is None


@both
def test_equal_normalisation_adds_no_operation(how: str, tmp_path: Path):
    found = load(saved(tmp_path, how, mean=MEAN, std=STD))
    assert found.scale is None
    assert torch.equal(logits(found), logits(trained()))


@both
def test_our_own_weights_are_nothing_to_report(how: str, tmp_path: Path):
    said: list[str] = []
    path = saved(tmp_path, how)
    assert not read(path).foreign
    load(path, report=said.append)
    (tmp_path / "more").mkdir()
    nameless = saved(tmp_path / "more", how, model=None)  # more than a network, or a user's own
    assert not read(nameless).foreign
    load(nameless, report=said.append)
    assert said == []


@both
def test_another_model_than_the_file_says_is_refused(how: str, tmp_path: Path):
    path = saved(tmp_path, how, model="resnet56")
    with pytest.raises(NetworkError) as error:
        load(path)
    assert str(error.value) == f"{path} holds a resnet56, not a resnet8"


def test_another_programs_safetensors_are_read(tmp_path: Path):
    """Its metadata are plain text ("pt"), not JSON."""
    path = tmp_path / "net.safetensors"
    save_tensors(path, trained().state_dict(), {"format": "pt"})
    said: list[str] = []
    assert torch.equal(logits(load(path, report=said.append)), logits(trained()))
    assert read(path).about == {"format": "pt"}
    assert read(path).foreign
    assert said == [f"{path}: 56 of 56 tensors"]


# --- damaged, missing, hostile ------------------------------------------------------------------


class Payload:
    """What a hostile file does when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_code_is_refused_and_does_not_run(zipped: bool, tmp_path: Path):
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = {"state_dict": trained().state_dict(), "extra": Payload(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(NetworkError) as error:
        read(path)
    said = str(error.value)
    assert said.startswith(f"{path} holds more than weights")
    assert said.endswith("save its state_dict alone and give that")
    assert "weights_only" not in said  # torch's own advice is to run the code all the same
    assert not mark.exists()


def test_parsed_arguments_hide_no_code(tmp_path: Path):
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    hidden = argparse.Namespace(lr=Payload(mark))
    torch.save({"opt": hidden, "model": trained().state_dict()}, path)
    with pytest.raises(NetworkError, match="holds more than weights"):
        read(path)
    assert not mark.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path):
    """torch.save(model) instead of its state_dict: common, and refused with the way out."""
    path = tmp_path / "net.pth"
    torch.save(trained().module, path)
    with pytest.raises(NetworkError, match="save its state_dict alone and give that"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [1, 2], {"epoch": 3}, {}, {"state_dict": {}}, {0: torch.zeros(3)}],
)
def test_a_file_without_weights_is_refused(content: Any, tmp_path: Path):
    path = tmp_path / "net.pth"
    torch.save(content, path)
    with pytest.raises(NetworkError, match="holds no state_dict; it is a "):
        read(path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    path, state = tmp_path / "net.pth", trained().state_dict()
    state["fc.bias"][3] = float("nan")
    torch.save(state, path)
    with pytest.raises(NetworkError, match=r"holds numbers that are not finite, in fc\.bias"):
        load(path)


def test_what_a_file_holds_instead_of_weights_is_told(tmp_path: Path):
    path = tmp_path / "net.pth"
    torch.save({"state_dict_ema": trained().state_dict(), "epoch": 3}, path)
    with pytest.raises(NetworkError, match=r"dict with the keys \['state_dict_ema', 'epoch'\]"):
        read(path)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "old.pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_a_storage_error(name: str, share: float, tmp_path: Path):
    path = tmp_path / name
    if path.suffix == ".pth":
        zipped = name == "net.pth"
        torch.save(trained().state_dict(), path, _use_new_zipfile_serialization=zipped)
    else:
        save_tensors(path, trained().state_dict(), {})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(StorageError, match="damaged"):
        read(path)


@pytest.mark.parametrize(
    "content", [b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_page_or_pointer_saved_for_the_weights_is_a_storage_error(content: bytes, tmp_path: Path):
    """The usual result of a failed download: nothing in it that could run."""
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="damaged or not a PyTorch file"):
        read(path)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", "absent"])
def test_a_missing_file_is_a_storage_error(name: str, tmp_path: Path):
    path = tmp_path / name
    with pytest.raises(StorageError) as error:
        read(path)
    assert str(error.value) == f"no weights at {path}: no such file or run folder"
