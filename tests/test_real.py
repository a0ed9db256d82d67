"""Real trainings on real data, minutes long: `make slow`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from potstill import training
from potstill.methods import METHODS
from potstill.recipe import load

DATA = Path(os.environ.get("POTSTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
WEIGHTS = DATA / "weights" / "resnet56_cifar100.pth"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(
        not WEIGHTS.exists() or not (DATA / "cifar100").exists(),
        reason=f"no CIFAR-100 and ResNet-56 weights under {DATA}; set POTSTILL_DATA",
    ),
]


def test_the_given_teacher_scores_what_it_is_known_for() -> None:
    """73.04 % of 10,000 test images: data, normalisation, architecture and weights all fit."""
    scores = training.evaluate_weights("resnet56", WEIGHTS, "cifar100", DATA)
    assert scores["resnet56"].images == 10_000
    assert round(scores["resnet56"].top1, 2) == 73.04


def test_a_plain_student_learns_in_ten_epochs(tmp_path: Path) -> None:
    """At least 57 % after the last of 10 one-cycle epochs."""
    recipe = load("cifar100/vanilla-resnet20-onecycle", [f"data.root={DATA}"])
    run = training.train(recipe, tmp_path / "run", training.Silence())
    assert run.result is not None
    assert run.result["scores"]["student"]["top1"] >= 57


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.teachers_needed[0]])
def test_every_method_trains_on_a_slice(name: str, precision: str) -> None:
    """One epoch of 5,000 images with the shipped recipe: finite terms, and a falling loss."""
    script = Path(__file__).parents[1] / "benchmarks" / "method_cost.py"
    command = [sys.executable, str(script), "--teacher", str(WEIGHTS), "--methods", name]
    command += ["--precision", precision, "--steps", "2"]
    environment = {**os.environ, "POTSTILL_DATA": str(DATA)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "networks",
    ["resnet20,resnet32", "wrn_16_2,wrn_28_2", "resnet20,resnet20,resnet20"],
)
def test_networks_teach_each_other_on_a_slice(networks: str, precision: str) -> None:
    """Every online method: finite terms, and a falling cross-entropy of each network."""
    script = Path(__file__).parents[1] / "benchmarks" / "online_cost.py"
    command = [sys.executable, str(script), "--networks", networks]
    command += ["--precision", precision, "--steps", "2"]
    environment = {**os.environ, "POTSTILL_DATA": str(DATA)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
