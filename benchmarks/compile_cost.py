"""What torch.compile brings a network as a student and as a teacher, and what it costs first.

    python benchmarks/compile_cost.py MODEL ... [--rounds 7] [--steps 5] [--out FILE]

For each model, on batches of 64 images of 32x32 with 100 classes, in the precision of the machine:
a training step (cross-entropy, SGD) and a forward without gradients, as it is and compiled, in
turns. A compiled teacher's weights are constants. First calls are told apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import engine, memory, training
from potstill.method import DataSpec
from potstill.methods import METHODS
from potstill.models import build
from potstill.net import Net
from potstill.optim import sgd
from potstill.run import describe_environment

BATCH = 64


def step_of(student: Net, image: Tensor, label: Tensor) -> Callable[[], None]:
    """One training step."""
    student.train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = sgd(parameters, 0.05, 0.9, 5e-4)

    def step() -> None:
        loss = F.cross_entropy(student(image).logits, label)
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        optimizer.step()

    return step


def forward_of(teacher: Net, image: Tensor) -> Callable[[], None]:
    """One forward."""

    def forward() -> None:
        with torch.no_grad():
            teacher(image)

    return forward


def of_model(name: str, rounds: int, steps: int, precision: torch.dtype | None) -> dict[str, Any]:
    """Seconds of a step and of a forward, as it is and compiled, by round."""
    torch.manual_seed(0)
    image = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    label = torch.randint(100, (BATCH,))
    spec = DataSpec(
        range(100),
        [range(100)],
        torch.arange(BATCH),
        label,
        BATCH,
        BATCH,
        False,
        (3, 32, 32),
        (0.0,) * 3,
        (1.0,) * 3,
    )
    work: dict[str, Callable[[], None]] = {}
    first: dict[str, float] = {}
    net = build(name)
    for kind in ("eager", "compiled"):
        student, teacher = copy.deepcopy(net), copy.deepcopy(net)
        method = METHODS["kd"]([student], [teacher], spec).to(memory_format=torch.channels_last)
        student.precision = teacher.precision = precision
        if kind == "compiled":
            engine.compile_networks(method)
        work[f"student, {kind}"] = step_of(student, image, label)
        work[f"teacher, {kind}"] = forward_of(teacher, image)
    with memory.kept(torch.device("cpu")):
        for what, run in work.items():
            began = time.perf_counter()
            run()
            first[what] = time.perf_counter() - began
            run()
        found: dict[str, list[float]] = {what: [] for what in work}
        for _ in range(rounds):
            for what, run in work.items():
                began = time.perf_counter()
                for _ in range(steps):
                    run()
                found[what].append((time.perf_counter() - began) / steps)
    ratios = {}
    for role in ("student", "teacher"):
        pairs = zip(found[f"{role}, eager"], found[f"{role}, compiled"], strict=True)
        each = [eager / compiled for eager, compiled in pairs]
        ratios[role] = {"median": statistics.median(each), "range": [min(each), max(each)]}
    return {
        "seconds": {what: statistics.median(times) for what, times in found.items()},
        "first_seconds": {what: s for what, s in first.items() if "compiled" in what},
        "speedup": ratios,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = training.choose_precision("auto", torch.device("cpu"))
    environment = describe_environment("cpu", precision=str(chosen or torch.float32)[6:])
    environment.pop("command")
    result: dict[str, Any] = {"models": {}, "n": options.rounds, "steps": options.steps}
    result |= {"batch_size": BATCH, "environment": environment}
    for model in options.models:
        row = result["models"][model] = of_model(model, options.rounds, options.steps, chosen)
        said = ", ".join(f"{role} {r['median']:.2f}x" for role, r in row["speedup"].items())
        took = sum(row["first_seconds"].values())
        print(f"{model}: {said}; compiling took {took:.0f} s", flush=True)
        if options.out:  # after each: it takes a while
            options.out.write_text(json.dumps(result, indent=2) + "\n")
