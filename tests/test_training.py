"""Carrying out a training: what is evaluated when, and what is prepared how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill import data as datasets
from potstill import engine, recipe, training
from potstill.errors import MethodError
from potstill.method import Batch, Method, Outputs, Phase, Terms
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
