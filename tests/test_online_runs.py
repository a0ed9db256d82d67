"""Networks that teach each other, from a recipe to the files of a run and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from potstill import engine, training
from potstill.evaluate import evaluate
from potstill.models import build
from potstill.models import weights as model_weights
from potstill.recipe import Recipe, resolve
from potstill.run import Run

STEPS = {"name": "steps", "milestones": [1]}


def recipe(method: str, *students: str, **changes: Any) -> Recipe:
    return resolve(
        {
            "students": list(students or ("resnet8", "resnet8")),
            "method": method,
            "data": {"name": "digits", "subset": 96, "batch_size": 32},
            "optimizers": {"default": {"name": "sgd", "lr": 0.05, "schedule": STEPS}},
            "epochs": 2,
            "precision": "fp32",
            **changes,
        }
    )


def trained(method: str, place: Path, *students: str) -> Run:
    return training.train(recipe(method, *students), place, training.Silence())


@pytest.mark.parametrize("method", ["dml", "one", "l1", "l1_kd", "ensemble_kd", "afd_online"])
def test_every_network_and_the_ensemble_are_measured_saved_and_read_back(
    method: str, tmp_path: Path
):
    run = trained(method, tmp_path / "run")
    names = ["student0", "student1", "ensemble"]
    assert run.result is not None
    for found in (
        run.result["scores"],
        run.result["best_epoch"],
        run.result["parameters"],
        run.result["calibration"],
        run.result["cost"],
        *(record["scores"] for record in run.metrics),
    ):
        assert list(found) == names
    assert {p.stem for p in run.directory.glob("*.safetensors")} == set(names)
    assert all(cost["flops"] > 0 for cost in run.result["cost"].values())
    again = training.evaluate_run(run.directory)
    assert {n: s._asdict() for n, s in again.items()} == run.result["scores"]
    own = model_weights.read(f"{run.directory}:student1")
    assert own.model == "resnet8"
    assert own.tensors.keys() == build("resnet8", 10, (1, 8, 8)).state_dict().keys()


def test_ones_students_share_their_low_layers_in_the_files_too(tmp_path: Path):
    trained("one", tmp_path / "run")
    first, second = (load_file(tmp_path / "run" / f"student{k}.safetensors") for k in (0, 1))
    same = {key for key in first if torch.equal(first[key], second[key])}
    counters = {key for key in first if key.endswith("num_batches_tracked")}
    assert same - counters == {k for k in first if not k.startswith(("layer3", "fc"))} - counters


def test_a_student_starts_from_the_same_weights_in_every_method():
    """Student i of a seed depends on the seed and on i alone, not on the method or its peers."""

    def starts(*given: Any, **changes: Any) -> list[dict[str, torch.Tensor]]:
        job = training.assemble(recipe(*given, **changes))
        return [dict(net.module.state_dict()) for net in job.method.networks]

    alone = starts("vanilla", "resnet8")[0]
    pair, mixed = starts("dml"), starts("afd_online", "resnet8", "resnet14")
    for found in (pair[0], mixed[0]):
        assert all(torch.equal(found[key], alone[key]) for key in alone)
    assert not torch.equal(pair[0]["conv1.weight"], pair[1]["conv1.weight"])
    other = starts("dml", seed=1)
    assert not torch.equal(pair[0]["conv1.weight"], other[0]["conv1.weight"])


def test_networks_see_the_same_images_augmented_once():
    """One batch a step, whatever the number of networks: each is handed the same tensor."""
    job = training.assemble(recipe("ensemble_kd", "resnet8", "resnet8", "resnet14"))
    seen: list[list[int]] = [[] for _ in job.method.nets]
    for images, net in zip(seen, job.method.nets, strict=True):
        net.register_forward_pre_hook(
            lambda module, args, images=images: images.append(id(args[0]))
        )
    batches: list[torch.Tensor] = []

    class Noted:
        def batches(self, *args: Any, **kwargs: Any) -> Any:
            for batch in job.data.train.batches(*args, **kwargs):
                batches.append(batch.image)  # kept, so that no other has its id
                yield batch

    job.training.images = Noted()  # type: ignore[assignment]
    for _ in job.training.run():
        pass
    assert [id(image) for image in batches] == seen[0] == seen[1] == seen[2]
    assert len(batches) == 6


def test_the_ensemble_is_the_mean_of_the_students_that_are_saved(tmp_path: Path):
    run = trained("dml", tmp_path / "run", "resnet8", "resnet14")
    job = training.assemble(recipe("dml", "resnet8", "resnet14"))
    ensemble = job.method.predictors()["ensemble"]
    ensemble.load_state_dict(run.load_predictor("ensemble")[0])
    nets = []
    for k, name in enumerate(("resnet8", "resnet14")):
        net = build(name, 10, (1, 8, 8))
        net.load_state_dict(run.load_predictor(f"student{k}")[0])
        nets.append(net.eval())
    image = next(job.data.test.clean(8)).image
    mean = (nets[0].logits(image) + nets[1].logits(image)) / 2
    torch.testing.assert_close(ensemble.eval()(image), mean)


@pytest.mark.usefixtures("ready_kernels")
def test_a_pair_that_is_compiled_trains():
    job = training.assemble(recipe("one"))
    engine.compile_networks(job.method)
    first, *_, last = [m.terms["ce_ensemble"].item() for m in job.training.run()]
    assert last < first
    assert set(evaluate(job.method.predictors(), job.data.test)) == {
        "student0",
        "student1",
        "ensemble",
    }
