"""Measures of a student beside a teacher of other classes: by hand, and as a user meets them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill import cross_task, data, recipe, report, training
from potstill.cross_task import (
    Joint,
    Weighed,
    fit_head,
    harmonic_mean,
    logits_of,
    union_logits,
    weigh,
)
from potstill.errors import PotstillError, StorageError
from potstill.losses import instance_weights, soft_kl
from potstill.models import build
from potstill.models.weights import Weights
from potstill.net import Net
from potstill.run import Run
from tests.test_cli import Potstill


def digits_net(classes: int) -> Net:
    torch.manual_seed(classes)
    return build("resnet8", classes, (1, 8, 8)).eval()


def test_the_harmonic_mean_by_hand():
    """2 * 0.6 * 0.2 / 0.8 = 0.3; of two zeros, 0; one zero takes all."""
    assert harmonic_mean(0.6, 0.2) == pytest.approx(0.3)
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 90.0) == 0.0
    assert Joint(60.0, 20.0).harmonic_mean == pytest.approx(30.0)


def test_the_area_under_the_curve_by_hand():
    """Of 3 x 3 pairs, .65 < .7 alone is the wrong way round: 8/9. A tie counts one half."""
    weights = torch.tensor([0.99, 0.65, 0.6, 0.9, 0.7, 0.55])
    seen = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool)
    assert Weighed(weights, seen).auc == pytest.approx(8 / 9)
    tie = Weighed(torch.tensor([0.5, 0.5]), torch.tensor([True, False]))
    assert tie.auc == pytest.approx(0.5)


@pytest.mark.parametrize("seen", [True, False])
def test_one_group_alone_has_no_area(seen: bool):
    assert Weighed(torch.rand(3), torch.full((3,), seen)).auc is None


def test_a_class_of_both_heads_has_the_larger_of_its_two_logits():
    """Student's classes 2, 7, 9, teacher's 7, 1: the union is 1, 2, 7, 9, and 7 has max(5, 6)."""
    own, second = torch.tensor([[1.0, 5.0, 3.0], [1.0, 8.0, 3.0]]), torch.tensor([[6.0, 0.0]] * 2)
    joined, union = union_logits(own, [2, 7, 9], second, [7, 1])
    assert union == [1, 2, 7, 9]
    assert joined.tolist() == [[0.0, 1.0, 6.0, 3.0], [0.0, 1.0, 8.0, 3.0]]


def test_a_second_head_finds_the_teachers_where_there_is_one():
    """Targets that are linear in the vectors are met: KL 0, and the same class for each image."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 5, generator=generator)
    target = vectors @ torch.randn(5, 3, generator=generator) + torch.tensor([1.0, 0.0, -2.0])
    head = fit_head(vectors, target)
    assert soft_kl(head(vectors), target, 4.0) < 1e-6
    assert head(vectors).argmax(1).equal(target.argmax(1))
    assert not any(p.requires_grad for p in head.parameters())
    centred = target - target.mean(1, keepdim=True)  # what a softmax sees
    torch.testing.assert_close(head(vectors), centred, rtol=0, atol=1e-3)


def test_without_information_a_second_head_is_the_mean_prediction():
    """Vectors of zeros leave the bias: the softened mean of targets, here of ln 3 and 0 at T 4."""
    target = torch.tensor([[4 * torch.log(torch.tensor(3.0)), 0.0]]).repeat(6, 1)
    found = (fit_head(torch.zeros(6, 2), target)(torch.zeros(1, 2)) / 4).softmax(1)
    assert torch.allclose(found, torch.tensor([[0.75, 0.25]]), atol=1e-4)


def test_weights_come_back_in_index_order_and_are_those_of_shuffled_batches():
    """One batch of all: the shuffle changes nothing, so weights are those of the whole set. In
    batches of 32 they depend on it, and are the same every time.
    """
    split = data.load("digits", subset=100).train
    logits = logits_of(digits_net(7), split)
    whole = weigh(logits, split, [0, 1, 2], batch_size=100)
    torch.testing.assert_close(whole.weights, instance_weights(logits), rtol=1e-5, atol=1e-6)
    assert whole.seen.equal(split.labels < 3)
    parts = weigh(logits, split, [0, 1, 2], batch_size=32)
    assert parts.weights.equal(weigh(logits, split, [0, 1, 2], batch_size=32).weights)
    assert (parts.weights - whole.weights).abs().max() > 1e-3
    raw = [weigh(logits, split, None, n, "raw") for n in (100, 32)]
    torch.testing.assert_close(raw[0].weights, raw[1].weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(raw[0].weights, instance_weights(logits, "raw"))
    assert raw[0].seen is None and raw[0].auc is None


def test_seen_is_by_original_id_and_not_by_label():
    """The task is 5, 6, 7, and the teacher knows 0, 5, 6: label 0 is 5, which is seen; 7 is not."""
    split = data.load("digits", classes=[5, 6, 7]).train
    seen = weigh(torch.zeros(len(split), 3), split, [0, 5, 6]).seen
    assert seen.equal(split.labels < 2)


class Told(nn.Module):
    """Logits that are written in the image: pixel k is the logit of class k; a vector before."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.flatten, self.fc = nn.Flatten(), nn.Linear(64, classes)
        nn.init.zeros_(self.fc.bias)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(64)[:classes])

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.flatten(image))  # type: ignore[no-any-return]


def written(labels: list[int], where: dict[int, int], size: int = 12) -> list[tuple[Tensor, int]]:
    """`size` images of each class, whose pixel where[class] is bright."""
    pairs = []
    for i in range(size):
        for c in labels:
            image = torch.zeros(1, 8, 8)
            image.view(-1)[where[c]] = 10.0
            image.view(-1)[40 + i] = 1.0
            pairs.append((image, c))
    return pairs


def test_joint_accuracy_counts_each_tasks_images_over_all_classes():
    """Ids 0, 1 are the teacher's, 1, 2 the student's. Pixels 0 and 1 are the student's logits of 1
    and 2. Images of class 0 light pixel 1 as those of 2 do, so all are taken for 2 or for what the
    second head says; those of 1 and 2 are told apart. The teacher says class 1 (its second) of
    images of 1 and class 0 of images of 2: so does the second head, which learns from them alone,
    and its logits are small beside the student's 10. Class 0: 0 %, class 1: 100 %, class 2: 100 %.
    """
    pairs = written([0, 1, 2], {0: 1, 1: 0, 2: 1})
    whole = data.from_dataset(pairs, pairs)
    task = data.Data(
        whole.train.window([1, 2]),
        whole.test.window([1, 2]),
        None,
        ["1", "2"],
        "user",
        whole.whole_test,
        whole.every_name,
    )
    student, teacher = Net(Told(2), {}, (1, 8, 8)), Net(Told(2), {}, (1, 8, 8))
    with torch.no_grad():
        teacher.module.fc.weight.copy_(torch.eye(64)[[1, 0]] * 0.5)
    target = logits_of(teacher.eval(), task.train)
    joint = cross_task.joint_accuracy(student.eval(), target, task, [0, 1])
    assert joint == Joint(50.0, 100.0)
    assert joint.harmonic_mean == pytest.approx(200 / 3)


class Heard(training.Silence):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A teacher of digits 0 to 4 and a student of 2 to 6, and what was said of the student's."""
    folder, heard = tmp_path_factory.mktemp("runs"), Heard()
    settings = ["data.subset=200", "epochs=4"]
    teacher = recipe.load("digits/vanilla", ["data.overlap=1", *settings])
    training.train(teacher, folder / "teacher", training.Silence())
    words = ["method=refilled", f"teachers=[{folder / 'teacher'}]", "data.overlap=0.6", *settings]
    training.train(recipe.load("digits/kd", words), folder / "student", heard)
    return folder, heard.lines


@pytest.fixture
def runs(potstill: Potstill, trained: tuple[Path, list[str]]) -> Potstill:
    """The command line in a folder with a copy of both runs."""
    shutil.copytree(trained[0], ".", dirs_exist_ok=True)
    return potstill


def test_what_teacher_and_student_have_in_common_is_said(trained: tuple[Path, list[str]]):
    said = "\n".join(trained[1])
    assert "data: digits, 5 of 10 classes, 200 training, 451 test" in said
    assert "teacher 0: keeps the head of its 5 classes; 3 of the data's 5 are among them" in said
    assert "on 450 images of its own classes" in said


def test_a_run_of_another_task_from_end_to_end(runs: Potstill):
    """Task labels are ranks of ids, so the teacher's 2 is the student's 0; ids are kept with both.

    What was measured before training is what is measured afterwards; result.json has what the
    first phase came to.
    """
    result = Run.open("student").result
    assert result is not None
    assert list(result["earlier"]) == ["embed"] and list(result["scores"]) == ["student"]
    assert result["earlier"]["embed"]["epoch"] == 2
    assert list(result["earlier"]["embed"]["scores"]) == ["ncm"]

    code, output, errors = runs("cross-task", "student", "--json")
    assert code == 0, errors
    found = json.loads(output)
    assert json.loads(Path("student/cross_task.json").read_text()) == found
    assert found["classes"] == [2, 3, 4, 5, 6]
    assert found["accuracy"] == result["scores"]["student"]
    teacher = found["teacher"]
    assert (teacher["classes"], teacher["shared"]) == ([0, 1, 2, 3, 4], 3)
    assert teacher["accuracy"]["top1"] == result["teachers"]["teacher0"]["top1"]
    joint = found["joint"]
    expected = harmonic_mean(joint["teacher_classes"], joint["student_classes"])
    assert joint["harmonic_mean"] == expected > 0
    assert joint["student_classes"] <= found["accuracy"]["top1"]
    weights = found["weights"]
    assert 0.5 < weights["auc"] <= 1
    rows = [line.split(",") for line in Path("student/instance_weights.csv").read_text().split()]
    assert rows[0] == ["index", "class", "seen", "weight"]
    counts = weights["images"]
    assert len(rows) == 201 == sum(counts["seen"]) + sum(counts["unseen"]) + 1
    assert {(r[1], r[2]) for r in rows[1:]} == {(str(c), str(int(c < 5))) for c in range(2, 7)}
    assert sum(r[2] == "1" for r in rows) == sum(counts["seen"])
    assert result["teacher_classes"] == {"teacher0": [0, 1, 2, 3, 4]}

    code, output, _ = runs("cross-task", "student")
    lines = output.splitlines()
    assert code == 0 and f"nearest class mean: {found['ncm']['top1']:.2f} %" in lines
    assert any(f"harmonic mean {joint['harmonic_mean']:.2f} %" in line for line in lines)
    assert any(f"AUC of the classes seen by the teacher {weights['auc']:.3f}" in x for x in lines)
    assert lines[-1].startswith("  0.975-1.000")


def test_weights_of_some_classes_are_measured_on_these(runs: Potstill):
    """As before training; labels are ranks among the teacher's ids."""
    known = Run.open("student").result["teachers"]["teacher0"]
    code, output, errors = runs("eval", "--weights", "teacher", "--data", "digits", "--json")
    assert code == 0 and json.loads(output)["resnet8"] == known
    assert "of 10 classes, those 5 that it was trained on" in errors


def test_a_folder_of_a_models_name_is_the_run(runs: Potstill):
    """Not that architecture with random weights."""
    shutil.copytree("student", "resnet8")
    for name in ("student", "resnet8"):
        code, _, errors = runs("cross-task", name)
        assert code == 0, errors
    one, other = (
        json.loads(Path(f"{n}/cross_task.json").read_text()) for n in ("student", "resnet8")
    )
    assert {**one, "run": "resnet8"} == other


def test_a_student_alone_and_a_teacher_of_the_same_classes(runs: Potstill):
    """Without a teacher there is less to say; with one of all the classes, no AUC."""
    code, output, errors = runs("cross-task", "teacher")
    assert code == 0, errors
    assert output.splitlines()[-1] == (
        "no teacher: --teacher WEIGHTS for joint accuracy and instance weights"
    )
    assert not Path("teacher/instance_weights.csv").exists()
    code, output, errors = runs("cross-task", "teacher", "--teacher", "teacher")
    assert code == 0, errors
    assert "of which the student has 5" in output
    assert "no AUC, as all or none of the classes are the teacher's" in output
    found = json.loads(Path("teacher/cross_task.json").read_text())
    assert found["weights"]["auc"] is None and sum(found["weights"]["images"]["unseen"]) == 0
    code, _, _ = runs("cross-task", "teacher")  # what another teacher's were goes with it
    assert code == 0 and not Path("teacher/instance_weights.csv").exists()


def foreign(source: str, file: str) -> None:
    """The weights of a run as another program would save them."""
    torch.save(Run.open(source).load_predictor()[0], file)


def test_weights_that_do_not_say_their_classes(runs: Potstill):
    """As many as the task's, which was chosen by an overlap: nobody knows which. Said in the
    recipe, they are known, and measures can be taken.
    """
    foreign("teacher", "t.pth")
    words = ["digits/kd", "teachers.0.name=resnet8", "teachers.0.weights=t.pth", "epochs=1"]
    some = [*words, "data.overlap=0.6", "data.subset=50"]
    code, _, errors = runs("train", *some, "--out", "a")
    assert code == 2 and "which classes teacher 0 was trained on is not known" in errors
    assert "teachers.0.classes=[...] says their ids" in errors
    code, output, errors = runs("train", *some, "method=rkd", "--out", "b")
    assert code == 0 and "are not known to be the data's" in output, errors
    code, output, errors = runs("cross-task", "b")
    assert code == 0, errors
    assert "teacher t.pth: which classes it knows is not known" in output
    assert "no AUC, as nobody knows which classes are the teacher's" in output
    found = json.loads(Path("b/cross_task.json").read_text())
    assert list(found["weights"]["images"]) == ["all"] and "joint" not in found
    assert Path("b/instance_weights.csv").read_text().splitlines()[1].split(",")[2] == ""

    told = [*some, "method=rkd", "teachers.0.classes=[0, 1, 2, 3, 4]"]
    code, output, errors = runs("train", *told, "--out", "c")
    assert code == 0 and "3 of the data's 5 are among them" in output, errors
    code, output, _ = runs("cross-task", "c")
    assert code == 0 and "of which the student has 3" in output
    code, _, errors = runs("train", *some, "teachers.0.classes=[0, 1]", "--out", "d")
    assert code == 2 and "teachers.0.classes names 2 classes, and the network has 5" in errors
    wrong = ["digits/kd", "teachers=[{name: teacher, classes: [5, 6, 7, 8, 9]}]", "data.overlap=0"]
    code, _, errors = runs("train", *wrong, "--out", "e")
    assert code == 2 and "teachers.0.classes are not those that teacher was trained on" in errors
    whole = [*words, "data.overlap=1", "data.subset=50"]
    code, output, errors = runs("train", *whole, "--out", "f")
    assert code == 0 and "its 5 classes are taken to be the data's, in their order" in output, (
        errors
    )


def test_a_run_is_measured_where_its_teacher_has_moved(runs: Potstill, trained: Any):
    """The recipe names a place that is empty now; --teacher names the new one."""
    shutil.copytree(trained[0], "moved")
    text = Path("moved/student/recipe.yaml").read_text()
    Path("moved/student/recipe.yaml").write_text(text.replace(str(trained[0]), "gone"))
    code, _, errors = runs("cross-task", "moved/student", "--teacher", "moved/teacher")
    assert code == 0, errors
    assert runs("eval", "moved/student")[0] == 0
    code, _, errors = runs("cross-task", "moved/student")
    assert code == 3 and "no weights at gone/teacher" in errors


def test_numbers_for_names_say_nothing_across_data_sets():
    """Digits' classes are called 0 to 9, and so would anybody's be who has no names."""
    known = {"data": "digits", "class_names": ["0", "1"]}
    weights = Weights({}, "w", classes=[0, 1], about=known)
    digits = data.load("digits")
    assert training.other_meaning(weights, digits) == ""
    other = data.from_dataset(*[[(torch.zeros(1, 2, 2), 0), (torch.ones(1, 2, 2), 1)]] * 2)
    assert training.other_meaning(weights, other) == (
        "trained on digits, whose classes have no names but numbers"
    )


def test_of_several_students_each_has_its_files(potstill: Potstill):
    words = ["digits/kd", "teachers=[]", "method=dml", "students=[resnet8, resnet8]"]
    code, _, errors = potstill("train", *words, "data.overlap=1", "epochs=1", "--out", "pair")
    assert code == 0, errors
    for name in ("student0", "student1"):
        code, _, errors = potstill("cross-task", f"pair:{name}", "--teacher", "pair:student0")
        assert code == 0, errors
        assert Path(f"pair/cross_task.{name}.json").is_file()
        assert Path(f"pair/instance_weights.{name}.csv").is_file()
    code, _, errors = potstill("cross-task", "pair:ensemble")
    assert code == 2 and "pair:ensemble is an ensemble, or a network with a layer" in errors


@pytest.mark.parametrize(
    "words, fault, kind",
    [
        (("nowhere",), "nowhere is not a run: there is no such folder; check the path", 2),
        (("student:student1",), 'no predictor "student1"; this run has student', 2),
        (("student", "--teacher", "resnet8"), "no weights at resnet8: no such file or run", 3),
        (("student", "--batch-size", "0"), "Invalid value for '--batch-size'", 2),
    ],
)
def test_wrong_input_is_told(runs: Potstill, words: Any, fault: str, kind: int):
    code, _, errors = runs("cross-task", *words)
    assert code == kind and fault in errors


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path):
    run = Run.create(tmp_path / "run", "", {})
    assert run.directory is not None
    with pytest.raises(PotstillError, match=r"has not finished; continue it with --resume"):
        cross_task.examine(str(run.directory))
    with pytest.raises((PotstillError, StorageError), match=r"is not a run"):
        cross_task.examine(str(tmp_path / "nowhere:student1"))


def test_tables_have_what_an_earlier_phase_ended_with(trained: tuple[Path, list[str]]):
    """Table 4 of the paper reads nothing else."""
    run = Run.open(trained[0] / "student")
    assert run.result is not None
    student, ncm = report.rows({"refilled": [run, run]})
    assert (student["name"], ncm["name"]) == ("refilled student", "refilled ncm after embed")
    assert ncm["mean"] == run.result["earlier"]["embed"]["scores"]["ncm"]["top1"]
    assert (ncm["n"], ncm["std"], ncm["parameters"]) == (2, 0.0, None)


def test_a_run_of_ones_own_architecture_is_measured(potstill: Potstill, monkeypatch: Any):
    """Its file does not say which code is run: the recipe does, with leave."""
    monkeypatch.syspath_prepend(".")
    Path("own_net.py").write_text(
        "from torch import nn\n\n\ndef small(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    words = ["digits/vanilla", "students=[{name: 'py:own_net:small'}]", "epochs=1", "--allow-code"]
    code, _, errors = potstill("train", *words, "data.overlap=1", "--out", "own")
    assert code == 0, errors
    code, output, errors = potstill("cross-task", "own", "--allow-code")
    assert code == 0 and "nearest class mean" in output, errors
    code, _, errors = potstill("cross-task", "own")
    assert code == 2 and "add --allow-code" in errors


def test_a_teacher_is_measured_on_test_images_of_its_classes_where_there_are_any():
    """In the order of its outputs; not where a class of its is unknown, or none has an image."""
    digits = data.load("digits", overlap=0)
    found = training.test_images(digits, [3, 1])
    assert found is not None and found.classes == [3, 1]
    assert len(found) == int(((w := digits.whole_test.labels) == 3).sum() + (w == 1).sum())
    assert training.test_images(digits, None) is None
    assert training.test_images(digits, [3, 10]) is None
    whole = digits.whole_test
    empty = dataclasses.replace(whole, indices=whole.indices[:0], labels=whole.labels[:0])
    assert training.test_images(dataclasses.replace(digits, whole_test=empty), [3, 1]) is None
