"""`potstill.distill`: plain modules and any dataset of (image, label)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import potstill
from potstill.errors import DataError, MethodError, NetworkError, PotstillError, RecipeError
from potstill.run import Run

SHAPE = (1, 8, 8)


def images(n: int = 48, seed: int = 0) -> list[tuple[Tensor, int]]:
    """Bytes whose brightest quarter is the label: learnable at once."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        x = torch.randint(0, 60, SHAPE, generator=generator, dtype=torch.uint8)
        row, column = divmod(i % 4, 2)
        x[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 150
        found.append((x, i % 4))
    return found


def network(seed: int = 0, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 64, classes),
    )  # fmt: skip


def go(*given: Any, **more: Any) -> Run:
    settings = {"epochs": 2, "batch_size": 16, "quiet": True, "precision": "fp32"}
    return potstill.distill(*given, **{**settings, **more})


@pytest.mark.parametrize("method", ["simkd", "norm"])
def test_what_predicts_with_more_than_the_student_is_returned(method: str) -> None:
    """Complete, and usable after the training is over: the score is that of the run's result."""
    teacher, student = (potstill.build("resnet8", 4, SHAPE) for _ in range(2))
    run = go(teacher.module, student.module, images(), images(seed=1), method, epochs=4)
    assert run.student is not student.module
    x = torch.stack([image for image, _ in images(seed=1)]).float() / 255
    x = (x - x_mean(images())) / x_std(images())
    with torch.no_grad():
        found = run.student.eval()(x).argmax(1)
    right = (found == torch.tensor([y for _, y in images(seed=1)])).float().mean().item()
    assert 100 * right == pytest.approx(run.result["scores"]["student"]["top1"])


@pytest.mark.parametrize("method", ["simkd", "norm"])
@pytest.mark.parametrize("as_net", [False, True])
def test_a_student_may_be_trained_again_afterwards(
    method: str, as_net: bool, tmp_path: Path
) -> None:
    """No layer stays in it, nothing of it stays frozen, and its file is what was measured."""
    teacher, net = (potstill.build("resnet8", 4, SHAPE) for _ in range(2))
    student = net if as_net else net.module
    if not as_net:
        net.close()
    first = go(teacher, student, images(), images(seed=1), method, epochs=1)
    given = {id(p) for p in teacher.parameters()}
    assert not given & {id(p) for p in first.student.parameters()}
    assert all(p.requires_grad for p in student.parameters())
    before = copy.deepcopy(net.module.fc.weight)
    run = go(teacher, student, images(), images(seed=1), "kd", epochs=2, out=tmp_path / "kd")
    assert not torch.equal(net.module.fc.weight, before)
    tensors, _ = run.load_predictor()
    fresh = potstill.build("resnet8", 4, SHAPE)
    fresh.load_state_dict(tensors)
    x = torch.rand(4, *SHAPE)
    torch.testing.assert_close(fresh.eval().logits(x), net.eval().logits(x))


def test_what_predicts_shares_the_students_weights_and_keeps_its_taps() -> None:
    teacher, student = (potstill.build("resnet8", 4, SHAPE) for _ in range(2))
    run = go(teacher, student.module, images(), images(seed=1), "norm", epochs=1)
    x = torch.rand(4, *SHAPE)
    before = run.student.eval()(x)
    with torch.no_grad():
        student.module.fc.bias += 1
    torch.testing.assert_close(run.student(x), before + 1)
    with torch.no_grad():
        for p in run.student.transform.parameters():
            p.zero_()
    assert not torch.equal(run.student(x), before + 1)


def x_mean(pairs: list[tuple[Tensor, int]]) -> Tensor:
    return torch.stack([image for image, _ in pairs]).float().mean() / 255


def x_std(pairs: list[tuple[Tensor, int]]) -> Tensor:
    return torch.stack([image for image, _ in pairs]).float().std() / 255


def test_plain_modules_learn_and_come_back_clean(tmp_path: Path, monkeypatch: Any) -> None:
    """The student is the given module, trained, without our hooks; nothing is written."""
    monkeypatch.chdir(tmp_path)
    teacher, student = network(1).train(), network(2)
    before = copy.deepcopy(teacher.state_dict())
    run = go(None, teacher, images(), images(seed=1), "vanilla", epochs=8)
    assert run.student is teacher and run.result["scores"]["student"]["top1"] > 90
    before = copy.deepcopy(teacher.state_dict())
    run = go(teacher, student, images(), images(seed=1), "kd", epochs=8, temperature=2.0)
    assert run.student is student
    assert run.result["scores"]["student"]["top1"] > 90
    assert run.result["teachers"]["teacher0"]["top1"] > 90
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.requires_grad for p in teacher.parameters()) and teacher[1].training
    for module in [*teacher.modules(), *student.modules()]:
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not list(tmp_path.iterdir())
    assert student(images()[0][0][None].float()).shape == (1, 4)


def test_features_of_plain_modules_are_found() -> None:
    """One map of 8x8 in both: nobody has to name a tap."""
    student = network(2)
    run = go(network(1), student, images(), images(seed=1), "at", taps=["stage1"])
    assert run.result["scores"]["student"]["images"] == 48
    assert {"at", "ce"} <= run.metrics[-1]["terms"].keys()
    for module in student.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_teacher_of_other_classes_keeps_its_head() -> None:
    """Its features teach; its accuracy is not measured, and its logits are not compared."""
    teacher = network(1, classes=7)
    before = copy.deepcopy(teacher.state_dict())
    run = go(teacher, network(2), images(), images(seed=1), "at", taps=["stage1"])
    assert run.result["teachers"] == {}
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    with pytest.raises(MethodError, match="teacher 0 has 7 classes and student 0 has 4"):
        go(teacher, network(2), images(), images(seed=1), "kd")


def test_the_same_seed_gives_the_same_student() -> None:
    students = [network(3) for _ in range(2)]
    for student in students:
        go(network(1), student, images(), images(seed=1))
    one, other = (s.state_dict() for s in students)
    assert all(torch.equal(v, other[k]) for k, v in one.items())


def test_float_tensors_are_taken_as_they_are() -> None:
    x = torch.stack([i for i, _ in images()]).float() / 100 - 1
    data = TensorDataset(x, torch.arange(48) % 4)
    run = go(network(1), network(2), data, data)
    assert run.result["scores"]["student"]["images"] == 48


def test_methods_that_read_features_take_nets(tmp_path: Path) -> None:
    def tapped(seed: int) -> potstill.Net:
        return potstill.Net(network(seed), {"map": "2"}, SHAPE)

    run = go(tapped(1), tapped(2), images(), images(), "at", taps=["map"], out=tmp_path / "run")
    assert {"ce", "at"} == run.metrics[0]["terms"].keys()
    assert (tmp_path / "run" / "student.safetensors").exists()
    with pytest.raises(PotstillError, match="already holds a run"):
        go(tapped(1), tapped(2), images(), images(), "at", taps=["map"], out=tmp_path / "run")
    again = go(
        tapped(1), tapped(2), images(), images(), "at", taps=["map"], out=tmp_path / "run",
        resume=True,
    )  # fmt: skip
    assert again.result == run.result


def test_resuming_a_finished_run_gives_its_student(tmp_path: Path) -> None:
    first, second = network(1), network(2)
    go(None, first, images(), images(), "vanilla", out=tmp_path / "run")
    run = go(None, second, images(), images(), "vanilla", out=tmp_path / "run", resume=True)
    assert run.student is second
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_names_and_run_directories_stand_for_networks(tmp_path: Path) -> None:
    settings = {"subset": 40}
    go(None, "resnet8", "digits", None, "vanilla", epochs=1, data=settings, out=tmp_path / "t")
    run = go(tmp_path / "t", "resnet8", "digits", epochs=1, data=settings)
    assert run.result["teachers"]["teacher0"]["images"] == 898


def test_a_student_of_other_classes_is_refused(tmp_path: Path) -> None:
    """From a run's directory too, not only on the command line."""
    few = {"classes": [0, 1, 2], "subset": 30}
    go(None, "resnet8", "digits", None, "vanilla", epochs=1, data=few, out=tmp_path / "three")
    with pytest.raises(NetworkError, match="has weights of 3 classes"):
        go(None, tmp_path / "three", "digits", None, "vanilla", epochs=1)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "misspelt argument": ({"temprature": 2.0}, RecipeError, 'did you mean "temperature"'),
    "no test set": ({"test": None}, PotstillError, "test is missing"),
    "no teacher": ({"teacher": None}, RecipeError, "kd takes 1 teacher, 0 given"),
    "other classes": ({"teacher": network(1, 7)}, MethodError, "class by class"),
    "too few outputs": ({"student": network(1, 3)}, PotstillError, "has 3 outputs"),
    "other size": (
        {"student": nn.Sequential(nn.Flatten(), nn.Linear(9, 4))},
        NetworkError,
        "cannot take images of (1, 8, 8)",
    ),
    "Net of another size": (
        {"student": potstill.Net(network(1), {}, SHAPE)},
        PotstillError,
        "was built for images of (1, 8, 8)",
    ),
    "empty data": ({"train": []}, DataError, "train is empty"),
    "labels that are words": ({"train": [(images()[0][0], "cat")]}, DataError, "label"),
    "a named set's setting": ({"data": {"subset": 3}}, PotstillError, "data.subset"),
    "unknown optimizer": (
        {"optimizers": {"default": {"name": "sdg", "lr": 0.1}}},
        RecipeError,
        'did you mean "sgd"',
    ),
}


@pytest.mark.parametrize("change, kind, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_in_words(
    change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"teacher": network(1), "student": network(2)}
    given |= {"train": images(), "test": images()} | change
    if message.startswith("was built"):
        wide = [(torch.zeros(1, 12, 12, dtype=torch.uint8), i % 4) for i in range(8)]
        given |= {"train": wide, "test": wide, "teacher": None, "method": "vanilla"}
    with pytest.raises(kind) as error:
        go(**given)
    assert message in str(error.value)


def test_the_same_module_cannot_teach_itself() -> None:
    same = network(1)
    with pytest.raises(MethodError, match="shares weights"):
        go(same, same, images(), images())
    assert all(p.requires_grad for p in same.parameters())


def test_milestones_of_own_optimizers_count_in_own_epochs() -> None:
    """Drops after epochs 2 and 3 of 4; the default's 150/180/210 of 240 are 2.5, 3, 3.5."""
    own = {
        "default": {"name": "sgd", "lr": 0.1, "schedule": {"name": "steps", "milestones": [2, 3]}}
    }
    run = go(network(1), network(2), images(), images(), epochs=4, optimizers=own)
    rates = [record["lr"]["student"] for record in run.metrics]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])
    run = go(network(1), network(2), images(), images(), epochs=4)
    assert [r["lr"]["student"] for r in run.metrics] == pytest.approx([0.05, 0.05, 5e-3, 5e-5])


def test_default_milestones_are_those_of_the_methods_length() -> None:
    """Of kdsvdf's 100 epochs as of kd's 240: after 2.5, 3 and 3.5 of 4. Of ab's 40 + 100, 2 and 5
    here, none in the first phase and after 3.125, 3.75 and 4.375 in the second.
    """
    run = go(network(1), network(2), images(), images(), "kdsvdf", epochs=4)
    assert [r["lr"]["student"] for r in run.metrics] == pytest.approx([0.05, 0.05, 5e-3, 5e-5])
    run = go(network(1), network(2), images(), images(), "ab", epochs={"init": 2, "distill": 5})
    rates = [next(iter(record["lr"].values())) for record in run.metrics]
    assert rates == pytest.approx([0.05] * 5 + [5e-3, 5e-5])


class Flat(nn.Module):
    """Flattens with view, as most hand-written networks do: contiguous images only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(x.view(x.size(0), -1))


def test_networks_that_need_contiguous_images_get_them() -> None:
    colour = [(x.expand(3, 8, 8).contiguous(), y) for x, y in images()]
    run = go(None, Flat(), colour, colour, "vanilla")
    assert run.result is not None and run.result["scores"]["student"]["images"] == 48


def test_a_refused_training_leaves_no_hooks() -> None:
    student, wrong = network(2), network(1, 7)
    with pytest.raises(MethodError):
        go(wrong, student, images(), images())
    for module in [*student.modules(), *wrong.modules()]:
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_half_precision_weights_are_refused_in_words() -> None:
    with pytest.raises(NetworkError, match=r"teacher 0 has weights in torch\.float16; call"):
        go(network(1).half(), network(2), images(), images())
    with pytest.raises(NetworkError, match=r"student 0 has weights in torch\.float64"):
        go(None, network(2).double(), images(), images(), "vanilla")


def test_float_images_record_no_normalisation(tmp_path: Path) -> None:
    """Theirs is their transforms' affair: a file must not claim mean 0 and std 1."""
    x = torch.randn(16, 1, 8, 8)
    data = TensorDataset(x, torch.arange(16) % 4)
    run = go(None, network(2), data, data, "vanilla", out=tmp_path / "run")
    _, about = run.load_predictor("student")
    assert about["mean"] is None and about["std"] is None


def test_a_module_of_as_many_classes_is_no_teacher_of_these_where_tasks_overlap() -> None:
    """The teacher's own task, overlap 1, is taken to be a module's; of another nobody knows."""
    settings = {"subset": 50, "overlap": 0}
    teacher, student = (potstill.build(n, 5, (1, 8, 8)) for n in ("resnet14", "resnet8"))
    with pytest.raises(MethodError, match=r"which classes teacher 0 was trained on is not known"):
        potstill.distill(
            teacher.module, student.module, "digits", data=settings, epochs=1, quiet=True
        )
    for method, overlap in (("kd", 1), ("rkd", 0)):
        settings["overlap"] = overlap
        run = potstill.distill(
            teacher.module,
            student.module,
            "digits",
            method=method,
            data=settings,
            epochs=1,
            quiet=True,
        )
        assert list(run.result["teachers"]) == (["teacher0"] if overlap else [])


def test_a_teacher_s_outputs_are_kept_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And read the second time; the students are the same, but for rounding in 16 bits."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    given = (network(1), images(), images(seed=1))
    alone, first, second = (network() for _ in range(3))
    go(given[0], alone, *given[1:])
    assert not list(tmp_path.iterdir())
    kept = [go(given[0], student, *given[1:], store={"bits": 32}) for student in (first, second)]
    counts = [[m["time"]["store"] for m in run.metrics] for run in kept]
    assert counts[0][0]["computed"] == 48 and counts[0][0]["read"] == 0
    assert all(c["computed"] == 0 and c["read"] == 48 for c in counts[1])
    for a, b, c in zip(*(s.state_dict().values() for s in (alone, first, second)), strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b)
    with pytest.raises(DataError, match="not for a dataset that augments itself"):
        floats = [(x.float(), y) for x, y in images()]
        go(given[0], network(), floats, floats, store=True)


@pytest.mark.usefixtures("ready_kernels")
def test_a_compiled_teacher_that_is_given_again_teaches_what_it_is_now() -> None:
    """Its weights are constants of compiled code, which must not outlive them."""
    teacher = potstill.Net(network(1), input_shape=SHAPE)
    given = (images(), images(seed=1))

    def terms(of: potstill.Net, compile: Any) -> dict[str, float]:
        run = go(of, network(3), *given, epochs=1, compile=compile)
        found: dict[str, float] = run.metrics[0]["terms"]
        return found

    before = terms(teacher, "teachers")
    with torch.no_grad():
        teacher.classifier.weight.mul_(-3)
    expected = terms(potstill.Net(copy.deepcopy(teacher.module), input_shape=SHAPE), False)
    assert abs(expected["kd"] - before["kd"]) > 0.005
    assert terms(teacher, "teachers") == pytest.approx(expected, rel=1e-4)
    assert terms(teacher, False) == pytest.approx(expected, rel=1e-4)
    assert teacher._compiled_call_impl is None, "it is given back as it came"
