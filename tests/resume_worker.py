"""A small real training that kills itself, for test_resume.py.

Its settings: `method`, `optimizer`, `fused`, `every_step` (save after each step), and `kill`: a
step to die after, or {"rename": n} to die before the n-th renaming of a file or folder into place.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from potstill import data as datasets
from potstill import engine, training
from potstill.engine import Moment, Pace
from potstill.method import Method
from potstill.methods import METHODS
from potstill.models import build
from potstill.run import Run
from tests.methods.odd import ODD
from tests.toys import plan


class Killer(training.Silence):
    """A watcher that dies after a step, as a machine does."""

    def __init__(self, after: int | None) -> None:
        self.after = after

    def step(self, done: int, total: int, moment: Moment) -> None:
        if done == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def die_before_rename(number: int) -> None:
    """Kill this process just before its `number`-th os.rename or os.replace."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "os.rename":
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def assemble(settings: Mapping[str, Any]) -> training.Assembled:
    """kd or two optimisers on one set of weights: ResNet-8 on 60 digits, 3 epochs of 4 steps."""
    data = datasets.load("digits", subset=60)
    shape = data.train.input_shape
    torch.manual_seed(1)
    nets = [build("resnet8", 10, shape) for _ in range(2)]
    spec = training.data_spec(data.train, 16, False, [data.train.classes])
    make: type[Method] = {**METHODS, **ODD}[settings["method"]]
    method = make([nets[0]], [nets[1]], spec).to(memory_format=torch.channels_last)
    lengths = {p.name: 3 for p in method.phases()}
    moved = plan(settings["optimizer"], 0.01, settings["fused"])
    pace = Pace(lengths, lengths, {"default": moved}, seed=3)
    return training.Assembled(
        engine.Training(method, data.train, pace),
        data,
        torch.device("cpu"),
        False,
        ["resnet8"],
        ["resnet8"],
    )


def train(folder: Path, settings: Mapping[str, Any]) -> Run:
    """Start, or continue what is there."""
    job = assemble(settings)
    if (folder / "recipe.yaml").exists():
        run = Run.open(folder)
    else:
        run = Run.create(folder, "not from a recipe", job.environment)
    if settings["every_step"]:
        training.CHECKPOINT_SECONDS = 0.0
    kill = settings.get("kill")
    if isinstance(kill, Mapping):
        die_before_rename(kill["rename"])
    training.carry_out(job, run, Killer(kill if isinstance(kill, int) else None))
    return run


def work(folder: Path, settings: Mapping[str, Any]) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    train(folder, settings)
