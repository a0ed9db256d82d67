"""Whole-run throughput of kd ResNet-56 -> ResNet-20 beside a bare loop on the same tensors.

The bare loop does the same forwards, loss, backward and optimiser step on one batch that lies
ready, and nothing else: no data work, no logging, no checks. What the toolkit adds (order, crops,
flips, normalisation, seeding, running means, gradient layout) is the difference. Both run in this
process, in turns, on CIFAR-100. "Whole run" adds what an epoch ends with, measured in every round:
evaluation on the 10,000 test images and a checkpoint.

    python benchmarks/engine_overhead.py [--rounds 5] [--steps 60] [--precision auto] [--out FILE]

Prints images/s of both in each round, medians, spread and ratio; --out writes the result file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from potstill import data as datasets
from potstill import engine, optim, training
from potstill.evaluate import evaluate
from potstill.methods import METHODS
from potstill.models import build
from potstill.run import Run, describe_environment

BATCH = 64


def networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A teacher and a student with the same weights for every loop."""
    torch.manual_seed(0)
    return build("resnet56"), build("resnet20")


def potstill_loop(
    data: datasets.Data, precision: torch.dtype | None, folder: Path
) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Steps of the engine on the real training set, and what ends an epoch."""
    teacher, student = networks()
    spec = training.data_spec(data.train, BATCH, False, [data.train.classes])
    method = METHODS["kd"]([student], [teacher], spec).to(memory_format=torch.channels_last)
    lengths = {"distill": 240}
    plan = optim.OptimizerPlan(lambda p: optim.sgd(p, 0.05, 0.9, 5e-4), optim.Constant())
    pace = engine.Pace(lengths, lengths, {"default": plan}, 0, precision)
    under_way = engine.Training(method, data.train, pace)
    steps = under_way.run()
    directory = Run.create(folder / "run", "", {})

    def run(count: int) -> None:
        for _ in itertools.islice(steps, count):
            pass

    def end_epoch() -> None:
        evaluate(method.predictors(), data.test)
        directory.save_checkpoint(under_way.done_steps, *under_way.state())

    return run, end_epoch


def bare_loop(data: datasets.Data, precision: torch.dtype | None) -> Callable[[int], None]:
    """The same mathematics on one batch that is already there."""
    teacher, student = (n.module.to(memory_format=torch.channels_last) for n in networks())
    teacher.eval().requires_grad_(False)
    student.train()
    batch = next(data.train.clean(BATCH))
    image, label = batch.image.clone(memory_format=torch.channels_last), batch.label.clone()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9, weight_decay=5e-4, fused=True)

    def run(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cpu", precision, precision is not None):
                with torch.no_grad():
                    target = teacher(image)
                logits = student(image)
            logits, target = logits.float(), target.float()
            loss = 0.1 * F.cross_entropy(logits, label) + 0.9 * 16 * F.kl_div(
                F.log_softmax(logits / 4, 1),
                F.log_softmax(target / 4, 1),
                reduction="batchmean",
                log_target=True,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def measure(rounds: int, steps: int, precision: torch.dtype | None) -> dict[str, Any]:
    """Images a second of both loops, in turns."""
    data = datasets.load("cifar100")
    epoch = len(data.train)
    speeds: dict[str, list[float]] = {"whole_run": [], "steps": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        ours, end_epoch = potstill_loop(data, precision, Path(folder))
        bare = bare_loop(data, precision)
        ours(5), bare(5), end_epoch()
        for number in range(rounds):
            speeds["steps"].append(steps * BATCH / seconds(lambda: ours(steps)))
            ending = seconds(end_epoch)
            speeds["whole_run"].append(epoch / (epoch / speeds["steps"][-1] + ending))
            speeds["bare"].append(steps * BATCH / seconds(lambda: bare(steps)))
            line = ", ".join(f"{name} {s[-1]:.0f}" for name, s in speeds.items())
            print(f"round {number + 1}: {line} images/s; end of an epoch {ending:.1f} s")
    result: dict[str, Any] = {
        "images_per_second": statistics.median(speeds["whole_run"]),
        "reference_images_per_second": statistics.median(speeds["bare"]),
    }
    for name, key in (("whole_run", "ratio"), ("steps", "ratio_of_steps")):
        ratios = [a / b for a, b in zip(speeds[name], speeds["bare"], strict=True)]
        result |= {key: statistics.median(ratios), f"{key}_range": [min(ratios), max(ratios)]}
    environment = describe_environment(
        "cpu", precision=str(precision or torch.float32).removeprefix("torch.")
    )
    environment.pop("command")
    return result | {
        "n": rounds,
        "steps_per_round": steps,
        "batch_size": BATCH,
        "rounds": speeds,
        "environment": environment,
    }


def seconds(work: Callable[[], None]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = training.choose_precision(options.precision, torch.device("cpu"))
    result = measure(options.rounds, options.steps, chosen)
    for name, key in (("whole run", "ratio"), ("steps alone", "ratio_of_steps")):
        low, high = result[f"{key}_range"]
        print(f"{name}: {result[key]:.3f} of the bare loop ({low:.3f} to {high:.3f})")
    print(
        f"whole run {result['images_per_second']:.0f} images/s, bare loop "
        f"{result['reference_images_per_second']:.0f}, medians of {result['n']}"
    )
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
