"""Carrying out a training: what is evaluated when, and what is prepared how."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill import data as datasets
from potstill import engine, recipe, report, training
from potstill.anatomy import examine, flops_of, latency_of
from potstill.errors import MethodError
from potstill.method import Batch, Method, Outputs, Phase, Terms
from potstill.methods import METHODS
from potstill.models import build
from potstill.run import Run
from tests.methods.odd import PrePhase
from tests.toys import ToyImages, pace, toy_net


def assembled(method: Method, data: datasets.Data, epochs: int = 2) -> training.Assembled:
    made = engine.Training(method, data.train, pace(method, epochs))
    count = len(method.teachers)
    return training.Assembled(made, data, torch.device("cpu"), False, ["resnet8"], ["t"] * count)


class Quiet(PrePhase):
    """Nothing predicts in the first phase."""

    def phases(self) -> Sequence[Phase]:
        first, second = super().phases()
        return [Phase(first.name, first.turns, first.epochs, predictors=dict), second]


def test_a_phase_says_what_is_evaluated_and_the_last_phase_is_the_result(tmp_path: Path) -> None:
    data = datasets.load("digits", subset=40)
    shape = data.train.input_shape
    spec = training.data_spec(data.train, 16, False, [data.train.classes])
    method = Quiet([build("resnet8", 10, shape)], [build("resnet8", 10, shape)], spec)
    run = Run.create(tmp_path / "run", "", {})
    training.carry_out(assembled(method, data), run, training.Silence())
    assert [(r["phase"], list(r["scores"])) for r in run.metrics] == [
        ("fit", []),
        ("fit", []),
        ("distill", ["student"]),
        ("distill", ["student"]),
    ]
    assert run.result is not None
    assert run.result["best_epoch"]["student"]["phase"] == "distill"
    assert run.result["scores"]["student"] == run.metrics[-1]["scores"]["student"]


class Noisy(PrePhase):
    """Draws and runs a student while it prepares."""

    def prepare(self, images: Iterable[Batch]) -> None:
        super().prepare(images)
        self.centres += torch.randn_like(self.centres)
        self.student(next(ToyImages().clean(16)).image)


def test_prepare_draws_from_the_seed_and_moves_no_statistics() -> None:
    """Whatever was drawn before, as after a resume; BatchNorm is in eval mode."""
    centres = []
    for seed in (1, 2):
        images = ToyImages()
        method = Noisy([toy_net(0)], [toy_net(1)], images.spec())
        made = engine.Training(method, images, pace(method, 1))
        torch.manual_seed(seed)
        steps = made.run()
        for _ in range(made.lengths[0].steps):
            torch.manual_seed(seed)
            next(steps)
        before = {k: v.clone() for k, v in method.student.state_dict().items() if "running" in k}
        torch.manual_seed(seed)
        made._prepare(method.phases()[1].prepare)
        centres.append(method.centres.clone())
        assert all(torch.equal(v, method.student.state_dict()[k]) for k, v in before.items())
    assert torch.equal(*centres)


class PerImage(Method):
    """A loss that forgot its mean."""

    def loss(self, out: Outputs) -> Terms:
        return {"ce": out.students[0].logits.square().sum(dim=1)}


def test_a_term_for_each_image_is_refused() -> None:
    """Its sum would train, with a loss as many times too large as the batch has images."""
    images = ToyImages()
    method = PerImage([toy_net(0)], [toy_net(1)], images.spec())
    made: Any = engine.Training(method, images, pace(method, 1))
    with pytest.raises(MethodError, match=r"term 'ce' of update 'student' has shape \(16,\)"):
        next(made.run())


@pytest.mark.parametrize(
    "asked, method, expected",
    [
        ("auto", "kd", "auto"),
        ("auto", "jacobian", None),
        ("bf16", "jacobian", torch.bfloat16),
        ("fp32", "jacobian", None),
    ],
)
def test_images_are_differentiated_in_float32_unless_bf16_is_asked_for(
    asked: str, method: str, expected: Any, tmp_path: Path
) -> None:
    """What "auto" is otherwise depends on the machine."""
    settings = ["data.subset=40", "epochs=1", f"precision={asked}"]
    alone = recipe.load("digits/vanilla", ["data.subset=40", "epochs=1"])
    training.train(alone, tmp_path / "t", training.Silence())
    words = [*settings, f"method={method}", f"teachers=[{tmp_path / 't'}]"]
    job = training.assemble(recipe.load("digits/kd", words))
    if expected == "auto":
        expected = training.choose_precision("auto", torch.device("cpu"))
    assert job.pace.precision == expected
    assert job.environment["precision"] == ("bfloat16" if expected else "float32")


def test_evaluations_on_the_way_are_in_the_training_s_precision_and_the_last_in_float32(
    tmp_path: Path,
) -> None:
    settings = ["data.subset=40", "epochs=3", "precision=bf16"]
    job = training.assemble(recipe.load("digits/vanilla", settings))
    kinds: list[torch.dtype] = []

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not module.training and (not kinds or kinds[-1] != output.dtype):
            kinds.append(output.dtype)

    job.method.student.classifier.register_forward_hook(note)
    run = Run.create(tmp_path / "run", "", job.environment)
    training.carry_out(job, run, training.Silence())
    assert kinds == [torch.bfloat16, torch.float32]
    assert run.result is not None
    assert run.result["scores"]["student"] == run.metrics[-1]["scores"]["student"]
    exact = training.evaluate(job.method.predictors(), job.data.test)["student"]
    assert run.result["scores"]["student"]["loss"] == pytest.approx(exact.loss, rel=1e-6)


# --- calibration, agreement and cost in result.json


SHORT = ["data.subset=60", "epochs=1", "precision=fp32"]


def trained(name: str, place: Path, *more: str) -> Run:
    settings = recipe.load(f"digits/{name}", [*SHORT, *more])
    return training.train(settings, place, training.Silence())


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A teacher, and a student of it."""
    place = tmp_path_factory.mktemp("runs")
    teacher = trained("vanilla", place / "teacher", "epochs=8")
    words = ["epochs=3", f"teachers=[{place / 'teacher'}]"]
    return teacher, trained("kd", place / "student", *words)


def labels_of(run: Run, images: datasets.Split) -> Tensor:
    """The classes that the saved weights say, all images at once."""
    net = build("resnet8", 10, images.input_shape)
    net.load_state_dict(run.load_predictor()[0])
    (batch,) = images.clean(len(images))
    with torch.no_grad():
        return net.predictor().eval()(batch.image).argmax(dim=1)


def test_the_rows_of_a_result_make_up_its_calibration_error(taught: tuple[Run, Run]) -> None:
    result = taught[1].result
    assert result is not None
    assert result["scores"]["student"] == taught[1].metrics[-1]["scores"]["student"]
    rows = [row for row in result["calibration"]["student"] if row[0]]
    assert len(result["calibration"]["student"]) == 15 and len(rows) > 1
    assert sum(n for n, _, _ in rows) == 898
    gaps = sum(n * abs(accuracy - confidence) for n, confidence, accuracy in rows)
    assert 100 * gaps / 898 == pytest.approx(result["scores"]["student"]["ece"])


def test_the_agreement_of_a_result_is_that_of_the_saved_weights(taught: tuple[Run, Run]) -> None:
    test = datasets.load("digits").test
    teacher, student = (labels_of(run, test) for run in taught)
    expected = 100 * (teacher == student).double().mean().item()
    assert 0 < expected < 100
    result = taught[1].result
    assert result is not None
    assert result["agreement"] == {"student": {"teacher0": pytest.approx(expected)}}
    alone = taught[0].result
    assert alone is not None and alone["agreement"] == {}


def test_several_students_without_a_teacher_are_compared_in_pairs(tmp_path: Path) -> None:
    words = ["method=dml", "teachers=[]", "students=[resnet8, resnet8, resnet8]"]
    run = trained("kd", tmp_path / "run", *words)
    assert run.result is not None
    pairs = {name: list(others) for name, others in run.result["agreement"].items()}
    assert pairs == {"student0": ["student1", "student2"], "student1": ["student2"]}
    assert list(run.result["cost"]) == ["student0", "student1", "student2", "ensemble"]


@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [5, 4, 3, 2]], ids=["other", "turned"])
def test_a_teacher_of_other_classes_is_not_compared(classes: list[int], tmp_path: Path) -> None:
    """Nor is one of the same classes in another order: its class 0 is not the student's."""
    torch.save(build("resnet8", 4, (1, 8, 8)).state_dict(), tmp_path / "teacher.pth")
    teacher = {"name": "resnet8", "weights": str(tmp_path / "teacher.pth"), "classes": classes}
    words = ["method=rkd", f"teachers=[{json.dumps(teacher)}]", "data.classes=[2, 3, 4, 5]"]
    run = trained("kd", tmp_path / "run", *words)
    assert run.result is not None
    assert list(run.result["teachers"]) == ["teacher0"]
    assert run.result["agreement"] == {}


def test_with_a_validation_split_calibration_and_agreement_are_of_the_test_images(
    taught: tuple[Run, Run], tmp_path: Path
) -> None:
    words = [f"teachers=[{taught[0].directory}]", "data.subset=null", "data.validation=0.2"]
    run = trained("kd", tmp_path / "run", *words)
    assert run.result is not None
    assert run.metrics[-1]["scores"]["student"]["images"] < 200
    assert sum(n for n, _, _ in run.result["calibration"]["student"]) == 898
    assert run.result["scores"]["student"]["images"] == 898
    same = labels_of(run, test := datasets.load("digits").test) == labels_of(taught[0], test)
    expected = {"teacher0": pytest.approx(100 * same.double().mean().item())}
    assert run.result["agreement"] == {"student": expected}


def test_a_run_that_was_killed_at_the_very_end_has_the_same_result(
    taught: tuple[Run, Run], tmp_path: Path
) -> None:
    words = [f"teachers=[{taught[0].directory}]"]
    first = trained("kd", tmp_path / "run", *words).result
    (tmp_path / "run" / "result.json").unlink()
    settings = recipe.load("digits/kd", [*SHORT, *words])
    again = training.train(settings, tmp_path / "run", training.Silence(), resume=True).result
    assert first is not None and again is not None
    for key in ("scores", "calibration", "agreement"):
        assert again[key] == first[key]


def test_no_network_sees_the_test_images_once_more_for_the_result(tmp_path: Path) -> None:
    """Each is taught with 40 images and sees 898; for a student's cost it sees 2 and then 23."""
    data = datasets.load("digits", subset=40)
    shape = data.train.input_shape
    student, teacher = (build("resnet8", 10, shape) for _ in range(2))
    spec = training.data_spec(data.train, 40, False, [data.train.classes])
    job = assembled(METHODS["kd"]([student], [teacher], spec), data, epochs=1)
    seen = {student.module: 0, teacher.module: 0}

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        seen[module] += len(args[0])

    for module in seen:
        module.register_forward_pre_hook(count)
    training.carry_out(job, Run.create(tmp_path / "run", "", {}), training.Silence())
    assert list(seen.values()) == [40 + 898 + 2 + 23, 40 + 898]


@pytest.mark.parametrize("method", ["kd", "simkd", "norm"])
def test_what_a_predictor_costs_is_in_the_result(
    method: str, taught: tuple[Run, Run], tmp_path: Path
) -> None:
    """Of SimKD and NORM also the layers that are added to the student."""
    words = [f"method={method}", f"teachers=[{taught[0].directory}]"]
    run = trained("kd", tmp_path / "run", *words)
    assert run.result is not None
    cost = run.result["cost"]["student"]
    plain = examine("resnet8", 10, (1, 8, 8)).flops
    assert cost["flops"] == plain if method == "kd" else cost["flops"] > plain
    assert isinstance(cost["flops"], int)
    assert cost["latency_ms"] > 0
    assert cost["latency_n"] == 20


def test_flops_by_hand() -> None:
    """3x3 on 4x4 with padding, 2 to 5 channels, without bias: 16 places x 90 multiply-adds. Then
    80 to 3: 240. Two FLOPs each.
    """
    conv = nn.Conv2d(2, 5, 3, padding=1, bias=False)
    module = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    assert flops_of(module, (2, 4, 4)) == 2 * (16 * 90 + 240)


def test_attention_is_counted_too() -> None:
    """Of 6 tokens of 4: four projections of 6 x 4 x 4, and two products of 6 x 6 x 4."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    assert flops_of(Attention(), (6, 4)) == 2 * (4 * 6 * 4 * 4 + 2 * 6 * 6 * 4)


@pytest.mark.parametrize("measure", [flops_of, latency_of])
def test_measuring_a_cost_moves_no_mode_and_no_statistics(measure: Any) -> None:
    net = toy_net()
    net.module.bn1.eval()
    modes = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert measure(net.predictor(), (3, 8, 8)) > 0
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_cannot_be_measured_has_no_cost_and_stops_nothing() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("a batch of 500 or nothing")

    class Squeezes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            images, features = x.squeeze().shape
            return x.new_ones(images, features)

    nothing = {"flops": None, "latency_ms": None, "latency_n": 20}
    assert training._cost(Refuses(), (3, 8, 8)) == nothing
    assert training._cost(Squeezes(), (8,)) == {**nothing, "flops": 0}


def test_a_result_of_an_older_version_is_read(taught: tuple[Run, Run], tmp_path: Path) -> None:
    """One without calibration, agreement, cost and calibration error."""
    run = trained("vanilla", tmp_path / "run")
    place = tmp_path / "run" / "result.json"
    result = json.loads(place.read_text())
    for key in ("calibration", "agreement", "cost"):
        del result[key]
    del result["scores"]["student"]["ece"]
    place.write_text(json.dumps(result))
    found = training.evaluate_run(tmp_path / "run")["student"]
    assert found.top1 == result["scores"]["student"]["top1"]
    (row,) = report.rows({"old": [run]})
    assert row["mean"] == found.top1
