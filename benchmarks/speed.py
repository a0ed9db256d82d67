"""Whole runs of kd ResNet-56 -> ResNet-20 on CIFAR-100 beside a plain loop and their limits.

    python benchmarks/speed.py --weights FILE [--rounds 7] [--steps 60]
        [--compile teachers] [--out FILE]

In one process, in turns, batch 64: kd with the teacher in every step, kd with a full store, plain
training of the student, the plain loop of `potstill bench --against loop`, and two limits: the bare
step of the student, and of student and teacher, on one batch that lies ready, with no data work,
evaluation or checkpoint. --compile is the recipes' setting, and that of the limits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from potstill import bench, memory, recipe, training
from potstill.run import describe_environment

KD, ALONE = "cifar100/kd-resnet56-resnet20", "cifar100/vanilla-resnet20"
LIMIT, BOTH = "bare student", "bare student and teacher"


class Bare:
    """One batch that lies ready, again and again: forwards, loss, backward, optimiser step."""

    def __init__(self, like: training.Assembled, name: str, taught: bool, compile: str) -> None:
        self.name, self.images, self.batch_size = name, len(like.data.train), 64
        self.student = like.method.student.module.train()
        self.precision = like.pace.precision
        self.teacher = like.method.teachers[0].module if taught else None
        batch = like.training.first_batch()
        self.image = batch.image.clone(memory_format=torch.channels_last)
        self.label = batch.label.clone()
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), 0.05, 0.9, weight_decay=5e-4, fused=True
        )
        self.run_student: Any = torch.compile(self.student) if compile == "true" else self.student
        self.run_teacher: Any = self.teacher
        if compile != "false" and self.teacher is not None:
            self.run_teacher = torch.compile(self.teacher)
        self.frozen = compile != "false"

    def begin(self) -> None:
        """The first steps of an epoch, which are like all others."""
        self.steps(bench.FIRST)

    def steps(self, count: int) -> None:
        """`count` times the same step."""
        for _ in range(count):
            with torch.autocast("cpu", self.precision, self.precision is not None):
                target = None if self.teacher is None else self._target()
                logits = self.run_student(self.image)
            logits = logits.float()
            loss = F.cross_entropy(logits, self.label)
            if target is not None:
                soft = F.kl_div(
                    F.log_softmax(logits / 4, 1),
                    F.log_softmax(target.float() / 4, 1),
                    reduction="batchmean",
                    log_target=True,
                )
                loss = 0.1 * loss + 0.9 * 16 * soft
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @torch.no_grad()
    def _target(self) -> Any:
        if not self.frozen:
            return self.run_teacher(self.image)
        import torch._inductor.config as inductor_config

        with inductor_config.patch(freezing=True):
            return self.run_teacher(self.image)

    def end_epoch(self) -> float:
        """Nothing."""
        return 0.0


def measure(weights: Path, rounds: int, steps: int, compile: str) -> dict[str, Any]:
    """Images/s of all, by round."""
    common = [f"compile={compile}", "device=cpu"]
    taught = recipe.load(KD, [f"teachers.0.weights={weights}", *common])
    stored = taught.model_copy(update={"store": recipe.Store()})
    ours = [
        bench.Ours(taught, "kd"),
        bench.Ours(stored, "kd, full store"),
        bench.Ours(recipe.load(ALONE, common), "vanilla"),
    ]
    contestants: list[bench.Contestant] = [
        *ours,
        bench.PlainLoop(taught, name="plain loop"),
        Bare(training.assemble(taught), LIMIT, False, compile),
        Bare(training.assemble(taught), BOTH, True, compile),
    ]
    device = torch.device("cpu")
    with memory.kept(device):
        first = {}
        for c in contestants:
            first[c.name] = bench.warm_up(c, steps, device)
            print(f"{c.name}: the first {steps} steps took {first[c.name]:.1f} s", flush=True)
        ours[1].hit_rate()
        found = bench.contest(contestants, rounds, steps, device, lambda s: print(s, flush=True))
        hit_rate = ours[1].hit_rate()
        split = {c.name: dict(c.split(steps)) for c in ours}
    environment = describe_environment("cpu", precision=ours[0].job.precision, compile=compile)
    environment.pop("command")
    for c in ours:
        c.close()
    return {
        "n": rounds,
        "steps": steps,
        "batch_size": 64,
        "hit_rate": hit_rate,
        "loop_workers": contestants[3].workers,  # type: ignore[attr-defined]
        "first_seconds": first,
        "images_per_second": {n: t.images_per_second for n, t in found.items()},
        "step_images_per_second": {n: t.steps_per_second for n, t in found.items()},
        "split": split,
        "ratios": {
            name: _ratio(rows[a], rows[b])
            for name, rows, a, b in (
                ("kd / plain loop", _whole(found), "kd", "plain loop"),
                ("kd, full store / plain loop", _whole(found), "kd, full store", "plain loop"),
                ("kd, full store / vanilla", _whole(found), "kd, full store", "vanilla"),
                ("kd / bare student and teacher, steps", _steps(found), "kd", BOTH),
                ("kd, full store / bare student, steps", _steps(found), "kd, full store", LIMIT),
                ("bare student / plain loop", _whole(found), LIMIT, "plain loop"),
                ("bare student and teacher / plain loop", _whole(found), BOTH, "plain loop"),
            )
        },
        "environment": environment,
    }


def _whole(found: Mapping[str, bench.Timing]) -> dict[str, list[float]]:
    return {name: timing.images_per_second for name, timing in found.items()}


def _steps(found: Mapping[str, bench.Timing]) -> dict[str, list[float]]:
    return {name: timing.steps_per_second for name, timing in found.items()}


def _ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Median and range of the ratios by round."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="the ResNet-56")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--compile", default="teachers", choices=["teachers", "true", "false"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(options.weights, options.rounds, options.steps, options.compile)
    for name, speeds in result["images_per_second"].items():
        steps = statistics.median(result["step_images_per_second"][name])
        print(f"{name}: {statistics.median(speeds):.0f} images/s, {steps:.0f} of the steps alone")
    for name, ratio in result["ratios"].items():
        low, high = ratio["range"]
        print(f"{name}: {ratio['median']:.3f} ({low:.3f} to {high:.3f})")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
