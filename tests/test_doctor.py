"""`potstill doctor`: each mistake that silently spoils a distillation, made once and found."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn

from potstill import data as datasets
from potstill import doctor, recipe, training
from potstill.doctor import Finding
from potstill.doctor.inputs import of_data
from potstill.doctor.machine import of_disk, of_memory, of_out, run_bytes
from potstill.doctor.teachers import Judgement, in_other_order, instead, near_chance
from potstill.method import Method, Outputs, Phase, Terms, Turn
from potstill.methods import METHODS
from potstill.methods.vanilla import Vanilla
from potstill.models import build
from potstill.run import Run

SHAPE = (1, 8, 8)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-8 that has learnt 899 digits for a few epochs."""
    place = tmp_path_factory.mktemp("doctor") / "teacher"
    words = ["data.subset=null", "epochs=4", "evaluate_every=4", "precision=fp32"]
    training.train(recipe.load("digits/vanilla", words), place, training.Silence())
    return place


def kd(weights: Path | str, *words: str) -> recipe.Recipe:
    given = ["teachers.0.name=resnet8", f"teachers.0.weights={weights}", "precision=fp32"]
    return recipe.load("digits/kd", [*given, *words])


def examined(loaded: recipe.Recipe) -> list[Finding]:
    """Everything before time and disk, which cost seconds."""
    return list(takewhile(lambda f: f.name != "machine", doctor.examine(loaded)))


def only(findings: Sequence[Finding], name: str, level: str | None = None) -> Finding:
    """The one finding of a name, of a level where one is given."""
    (found,) = [f for f in findings if f.name == name and level in (None, f.level)]
    return found


def faults(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    return [(f.name, f.level) for f in findings if f.level != "ok"]


def saved(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    torch.save(tensors, path)
    return path


# --- mistakes


def test_nothing_is_wrong_with_a_good_teacher(teacher: Path) -> None:
    found = examined(kd(teacher))
    assert faults(found) == []
    result = Run.open(teacher).result
    assert result is not None
    said = f"resnet8: {result['scores']['student']['top1']:.2f} % top-1 on 898 test images"
    assert only(found, "teacher 0").said == said
    assert only(found, "teacher 0 classes").said == "the student's 10, in the same order"
    assert "bit for bit the same after a training step" in only(found, "teacher 0 frozen").said


def test_a_teacher_without_training_is_near_chance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = saved(build("resnet8", 10, SHAPE).state_dict(), tmp_path / "random.pth")
    found = examined(kd(weights))
    assert faults(found) == [("teacher 0", "fail")]
    assert "near chance (10 %): untrained" in only(found, "teacher 0").said


def test_a_teacher_whose_classes_are_in_another_order_is_told_which(
    teacher: Path, tmp_path: Path
) -> None:
    """Output k of the permuted head stands for class order[k]."""
    tensors, _ = Run.open(teacher).load_predictor()
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    head = {n: x[order] if n.startswith("fc.") else x for n, x in tensors.items()}
    assert any(n.startswith("fc.") for n in tensors)
    found = examined(kd(saved(head, tmp_path / "permuted.pth")))
    classes = only(found, "teacher 0 classes", "fail")
    assert classes.fix.startswith("teachers.0.classes=[3,1,4,0,5,9,2,6,8,7]")
    result = Run.open(teacher).result
    assert result is not None
    assert f"{result['scores']['student']['top1']:.2f} % of the 898" in classes.said


def test_the_order_that_is_told_is_the_one_that_mends_it(teacher: Path, tmp_path: Path) -> None:
    """For a method that reads features, which takes a teacher of any classes."""
    tensors, _ = Run.open(teacher).load_predictor()
    order = [9, *range(9)]
    head = {n: x[order] if n.startswith("fc.") else x for n, x in tensors.items()}
    weights = saved(head, tmp_path / "permuted.pth")
    at = ["teachers.0.name=resnet8", f"teachers.0.weights={weights}", "precision=fp32"]
    fix = only(examined(recipe.load("digits/at", at)), "teacher 0 classes", "fail").fix
    mended = examined(recipe.load("digits/at", [*at, fix]))
    assert only(mended, "teacher 0").level == only(mended, "teacher 0 classes").level == "ok"
    assert "10 of the student's 10, in another order" in only(mended, "teacher 0 classes").said


def test_a_teacher_that_is_given_pixels_of_another_scale(teacher: Path) -> None:
    """Trained with the data's statistics, and said to want 0..255."""
    wrong = ("teachers.0.normalize.mean=[0.0]", "teachers.0.normalize.std=[0.00392]")
    found = examined(kd(teacher, *wrong))
    normalize = only(found, "teacher 0 normalize", "warn")
    assert "with the data's statistics" in normalize.said
    mended = examined(kd(teacher, *wrong, *normalize.fix.split()))
    assert only(mended, "teacher 0 normalize").level == "ok"
    seen = only(found, "input", "warn")
    assert seen.said.startswith("teacher0 sees") and "not normalised" in seen.said


def test_data_that_are_not_normalised_are_told_by_what(teacher: Path) -> None:
    """Digits of 0..1 given as if 255 were 1; what is to be typed is near their own statistics."""
    wrong = ("data.mean=[0.0]", "data.std=[0.00392]", "precision=fp32")
    seen = only(examined(recipe.load("digits/vanilla", wrong)), "input", "warn")
    mended = examined(recipe.load("digits/vanilla", [*wrong, *seen.fix.split()]))
    (seen,) = [f for f in mended if f.name == "input"]
    mean, std = (float(x) for x in re.findall(r"\[(.*?)\]", seen.said))
    assert abs(mean) < 0.01 and std == 1.0


def test_a_weight_of_a_million_drowns_the_labels(teacher: Path) -> None:
    found = examined(kd(teacher, "method.alpha=1e6"))
    drowned = only(found, "distill.student", "warn")
    assert "the gradient of kd is" in drowned.said
    assert drowned.fix == "method.alpha=0.9, its default (it is 1e+06)"
    assert only(found, "distill step").level == "warn"


def test_weights_that_are_not_numbers(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file they are refused; a function of one's own may make them."""
    tensors, _ = Run.open(teacher).load_predictor()
    name = next(n for n, x in tensors.items() if x.dim() == 4)
    broken = {n: x.clone() for n, x in tensors.items()}
    broken[name].view(-1)[0] = math.nan
    (refused,) = [f for f in examined(kd(saved(broken, tmp_path / "nan.pth"))) if f.level == "fail"]
    assert refused.name == "networks" and "not finite" in refused.said
    (tmp_path / "own_nets.py").write_text(
        "from potstill.models import build\n"
        "def broken(num_classes):\n"
        "    module = build('resnet8', num_classes, (1, 8, 8)).module\n"
        "    module.get_parameter(next(n for n, _ in module.named_parameters()))"
        ".data.fill_(float('nan'))\n"
        "    return module\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ["teachers=['py:own_nets:broken']", "precision=fp32"]
    found = examined(recipe.load("digits/kd", own, allow_code=True))
    assert "not finite in" in only(found, "networks", "fail").said
    assert "not finite" in only(found, "teacher 0", "fail").said
    assert "kd not finite" in only(found, "distill.student", "fail").said
    assert only(found, "teacher 0 frozen").level == "ok"  # NaN, and the same NaN afterwards


def test_a_milestone_that_is_never_reached(teacher: Path) -> None:
    schedule = "optimizers.default.schedule={name: steps, milestones: [30, 90]}"
    beyond = only(examined(kd(teacher, schedule)), "recipe", "warn")
    assert "90 of 60 epochs is never reached" in beyond.said and beyond.fix


def test_a_last_batch_of_one_image_stops_a_training_before_it_begins() -> None:
    """100 images in batches of 33 leave one, of which vgg8 makes maps of one pixel."""
    words = ["students=[vgg8]", "data.batch_size=33", "precision=fp32"]
    found = examined(recipe.load("digits/vanilla", words))
    one = only(found, "distill last batch", "fail")
    assert one.fix == "data.drop_last=true, or data.batch_size=34"
    for fix in ("data.drop_last=true", "data.batch_size=34"):
        assert faults(examined(recipe.load("digits/vanilla", [*words, fix]))) == []


def test_a_last_batch_of_one_image_that_has_a_variance_is_a_warning() -> None:
    words = ["data.batch_size=33", "precision=fp32"]
    found = examined(recipe.load("digits/vanilla", words))
    assert faults(found) == [("distill last batch", "warn")]


def test_a_class_that_no_image_is_left_of() -> None:
    """As a split by hand may leave it, or one of classes with a single image."""
    data = datasets.load("digits", subset=40)
    kept = data.train.labels != 3
    train = replace(data.train, indices=data.train.indices[kept], labels=data.train.labels[kept])
    found = only(list(of_data(replace(data, train=train))), "data", "warn")
    assert "no training image of 1 of them: 3" in found.said
    assert faults(list(of_data(data))) == []


def test_images_that_are_trained_on_and_held_out() -> None:
    data = datasets.load("digits", validation=0.5)
    assert data.validation is not None
    assert faults(list(of_data(data))) == []
    train = replace(
        data.train, indices=torch.cat([data.train.indices, data.validation.indices[:2]])
    )
    (found,) = [f for f in of_data(replace(data, train=train)) if f.level == "fail"]
    assert found.said == "2 validation images are trained on"


def test_what_cannot_be_assembled_is_said_and_the_data_are_looked_at(teacher: Path) -> None:
    """KD refuses a teacher that is said to have other classes; the rest is left out."""
    found = examined(kd(teacher, "method=sakd", "method.taps=[nothing]"))
    assert [f.name for f in found if f.level == "fail"] == ["networks"]
    assert "nothing" in only(found, "networks", "fail").said
    assert [f for f in found if f.name == "data"]
    assert "was checked" in only(found, "networks", "warn").said
    assert not [f for f in found if f.name.startswith("distill")]


def test_a_rate_that_throws_the_student_off_is_seen_in_one_step() -> None:
    given = ["optimizers.default={name: sgd, lr: 1000}", "precision=fp32"]
    found = examined(recipe.load("digits/vanilla", given))
    assert faults(found) == [("distill step", "warn")]


# --- methods that are wired wrongly


class Restless(Method):
    """Its teacher's last layer moves with every step, and is kept as a part of it."""

    lengths: ClassVar = {"distill": 1}

    def __init__(self, students: Any, teachers: Any, data: Any, held: bool = False) -> None:
        super().__init__(students, teachers, data)
        if held:
            self.held = teachers[0].classifier

    def loss(self, out: Outputs) -> Terms:
        logits = out.students[0].logits
        return {"ce": nn.functional.cross_entropy(logits, out.batch.label)}

    def phases(self) -> Sequence[Phase]:
        (phase,) = super().phases()
        (turn,) = phase.turns
        return [Phase("distill", [Turn(turn.forward, turn.updates, self.drift)], 1)]

    def drift(self, out: Outputs) -> None:
        self.teachers[0].classifier.weight += 1e-7


def test_a_teacher_that_moves_or_is_saved_is_found(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "restless", Restless)
    found = only(examined(kd(teacher, "method=restless")), "teacher 0 frozen", "fail")
    assert found.said == "one step changed it: fc.weight"
    found = only(
        examined(kd(teacher, "method={name: restless, held: true}")), "teacher 0 frozen", "fail"
    )
    assert "it is saved with the student: held.weight and 1 more" in found.said


class Idle(Vanilla):
    """A term that rises from 0 and its layer, one that is always 0, a layer without any term."""

    lengths: ClassVar = {"distill": 4}

    def __init__(self, students: Any, teachers: Any, data: Any, beta: float = 1.0) -> None:
        super().__init__(students, teachers, data)
        self.beta = beta
        self.late, self.unused = nn.Linear(1, 1), nn.Linear(2, 2)

    def loss(self, out: Outputs) -> Terms:
        size = out.students[0].logits.square().mean()
        rising = 0.1 * out.progress.fraction * self.late(size[None]).sum()
        return {**super().loss(out), "rising": rising, "nothing": self.beta * 0 * size}


def test_a_term_without_gradient_and_a_layer_without_a_term(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METHODS, "idle", Idle)
    found = examined(recipe.load("digits/vanilla", ["method=idle", "precision=fp32"]))
    assert faults(found) == [("distill.student", "warn"), ("optimizers", "warn")]
    assert "nothing moves nothing" in only(found, "distill.student", "warn").said
    ramp = only(found, "distill.student", "ok").said
    assert ramp == "rising moves nothing at the first step, and does later"
    assert "a gradient for unused.bias, unused.weight, so" in only(found, "optimizers", "warn").said


# --- the parts, by hand


def test_a_renaming_is_read_off_the_confusion() -> None:
    """Output 1 is right for class 0, output 2 for class 1, output 0 for class 2: 9 of 12."""
    confusion = torch.tensor([[1, 3, 0], [0, 0, 4], [2, 2, 0]])
    found = Judgement(confusion, True)
    assert found.images == 12 and found.top1 == pytest.approx(100 / 12)
    relabelled, labels = found.relabelled()
    assert relabelled == pytest.approx(75.0) and labels == [2, 0, 1]


def test_near_chance_and_renamed_by_hand() -> None:
    """Of 10 classes: 20 % is the limit. Two classes: 60 %. 10^(-1/3) is 46 %."""
    assert near_chance(19.9, 10) and not near_chance(20.1, 10)
    assert near_chance(59.0, 2) and not near_chance(61.0, 2)
    assert in_other_order(10.0, 47.0, 10) and not in_other_order(10.0, 45.0, 10)
    assert not in_other_order(60.0, 65.0, 10)  # a teacher that is not very good


def test_another_normalisation_is_fed_exactly() -> None:
    """A black pixel of data of mean 0.5, std 0.25 is -2; the module is to see (0 - 0.1) / 0.2."""
    data, own, other = ([0.5], [0.25]), ([0.3], [0.5]), ([0.1], [0.2])
    net_input = [s / t for s, t in zip(data[1], own[1], strict=True)]
    image = torch.full((1, 1, 1, 1), -2.0)
    changed = instead(data, own, other)(image)
    seen = changed * net_input[0] + (data[0][0] - own[0][0]) / own[1][0]
    assert seen.item() == pytest.approx(-0.5)
    same = instead(data, data, data)(image)
    assert torch.equal(same, image)


@pytest.mark.parametrize(
    ("need", "free", "level"), [(10, 21, "ok"), (10, 19, "warn"), (10, 9, "fail")]
)
def test_a_run_must_fit_on_the_disk(need: int, free: int, level: str) -> None:
    assert of_disk(need, free, "runs").level == level


@pytest.mark.parametrize(("peak", "level"), [(80, "ok"), (81, "warn")])
def test_a_training_must_fit_into_memory(peak: int, level: str) -> None:
    assert of_memory(peak, 100, "cpu").level == level


def test_the_disk_that_a_run_needs_is_what_it_writes(teacher: Path) -> None:
    """Two checkpoints are left; with the third one and 2 kB a record it is never more."""
    loaded = recipe.load("digits/vanilla", ["data.subset=40", "epochs=2"])
    need = run_bytes(training.assemble(loaded))
    left = [p.stat().st_size for p in teacher.rglob("*") if p.is_file()]
    assert sum(left) < need < 2 * sum(left)


def test_a_folder_that_cannot_be_written_fails(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    job = training.assemble(kd(teacher))
    (found,) = of_out(job, tmp_path / "file" / "run")
    assert found.level == "fail"
    (found,) = of_out(job, tmp_path / "new" / "run")
    assert found.level == "ok" and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_finding_is_wrapped_under_its_name_and_what_to_type_stays_whole() -> None:
    fix = "teachers.0.classes=[" + ",".join(map(str, range(40))) + "]"
    console = Console(width=70, record=True, file=io.StringIO())
    doctor.show(Finding("teacher 0", "fail", "words " * 30, fix), console)
    lines = console.export_text().splitlines()
    assert lines[0].startswith("fail  teacher 0            words words")
    assert all(line.startswith(" " * 27) for line in lines[1:])
    assert any(line.endswith(fix) for line in lines)
    assert max(len(line) for line in lines if fix not in line) <= 70


# --- the command


Doctor = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(potstill: Doctor) -> Doctor:
    """`potstill doctor` in an empty folder; (exit code, output, errors)."""
    return partial(potstill, "doctor")


def test_the_command_says_what_is_well_and_writes_nothing(
    command: Doctor, teacher: Path, tmp_path: Path
) -> None:
    given = ("teachers.0.name=resnet8", f"teachers.0.weights={teacher}", "epochs=1")
    code, output, errors = command("digits/kd", *given)
    assert code == 0, output + errors
    assert "0 warnings, 0 failures" in output.splitlines()[-1]
    for name in ("time", "memory", "disk", "machine"):
        assert f"\nok    {name:<20} " in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "off; store=true keeps the teachers' outputs, and later runs read them"),
        (("store=true",), "on: logits, at most "),
        (("teachers.0.stochastic={p_end: 0.5}",), "off: the outputs of teacher 0 cannot be stored"),
    ],
)
def test_the_store_is_told_and_not_written_to(
    command: Doctor, teacher: Path, tmp_path: Path, monkeypatch: Any, more: Any, said: str
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    given = ("teachers.0.name=resnet8", f"teachers.0.weights={teacher}", "epochs=1", *more)
    code, output, errors = command("digits/kd", *given)
    assert code == 0, output + errors
    assert f"\nok    {'store':<20} {said}" in output
    assert not (tmp_path / "cache" / "teachers").exists()


def test_a_store_that_cannot_be_is_a_failure_before_training(
    command: Doctor, teacher: Path
) -> None:
    given = ("teachers.0.name=resnet8", f"teachers.0.weights={teacher}", "epochs=1")
    code, output, _ = command("digits/kd", *given, "store.gb=0.000001")
    assert code == 1
    assert "would take" in output and "store.gb is 1e-06" in output


def test_the_command_fails_where_a_training_would_be_spoilt(
    command: Doctor, tmp_path: Path
) -> None:
    words = ("students=[vgg8]", "data.batch_size=33", "epochs=1")
    code, output, _ = command("digits/vanilla", *words, "--json")
    found = json.loads(output)
    assert code == 1 and found["ok"] is False and found["recipe"] == "digits/vanilla"
    (failed,) = [f for f in found["findings"] if f["level"] == "fail"]
    assert set(failed) == {"name", "level", "said", "fix"}


def test_a_recipe_with_faults_is_refused_as_ever(command: Doctor) -> None:
    code, _, errors = command("digits/kd", "method.temprature=4", "epochs=0")
    assert code == 2 and "3 faults" in errors and 'did you mean "temperature"' in errors
