"""`potstill demo`: does a teacher help a small network that sees few labelled images?"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from rich.console import Console

from potstill import data as datasets
from potstill import display, report, training
from potstill.recipe import load
from potstill.run import Run

TEACHER = ["students.0.name=resnet20", "data.subset=null", "epochs=20"]
OFTEN_ENOUGH = ["evaluate_every=10"]


def demonstrate(out: Path, seeds: int, console: Console) -> dict[str, list[Run]]:
    """Train a teacher, a plain student and students distilled by kd and at, once for each seed.

    On 1,797 handwritten digits that come with scikit-learn. Finished runs under `out` are taken as
    they are, unfinished ones continue.
    """
    began = time.monotonic()
    digits = datasets.load("digits")
    few = load("digits/kd", ["teachers.0.weights=."]).data.subset
    console.print(
        f"Handwritten digits, 8x8, {len(digits.class_names)} classes. Teachers train on "
        f"{len(digits.train)} labelled images, students on {few} of them. All are tested on "
        f"{len(digits.test)} others, after their last epoch. {4 * seeds} runs.\n",
        highlight=False,
    )
    plan: tuple[tuple[str, str, list[str], Path], ...]
    runs: dict[str, list[Run]] = {"teacher": [], "student alone": [], "kd": [], "at": []}
    for seed in range(seeds):
        teacher = out / "teacher" / f"seed{seed}"
        weights = f"teachers.0.weights={teacher}"
        plan = (
            ("teacher", "digits/vanilla", TEACHER, teacher),
            ("student alone", "digits/vanilla", [], out / "vanilla" / f"seed{seed}"),
            ("kd", "digits/kd", [weights], out / "kd" / f"seed{seed}"),
            ("at", "digits/at", [weights], out / "at" / f"seed{seed}"),
        )
        for name, recipe, overrides, place in plan:
            loaded = load(recipe, [*overrides, *OFTEN_ENOUGH, f"seed={seed}"])
            label = f"{name}, seed {seed}"
            with display.watcher(console, f"{label} · ", brief=True) as watcher:
                run = training.train(loaded, place, watcher, resume=True)
            top1 = (run.result or {})["scores"]["student"]["top1"]
            console.print(f"  {label}: {top1:.2f} %", highlight=False)
            runs[name].append(run)
    rows = report.rows(runs)
    console.print()
    console.print(report.table(rows))
    console.print(_verdict(runs, seeds), highlight=False)
    console.print(
        f"\n{display.duration(time.monotonic() - began)} in all. The runs are in {out}/: recipe, "
        "metrics, checkpoints, weights.\n"
        "Next:\n"
        f"  potstill eval {out}/kd/seed0\n"
        f"  potstill train digits/kd teachers.0.weights={out}/teacher/seed0 data.subset=50\n"
        "  potstill list recipes",
        highlight=False,
        soft_wrap=True,
    )
    return runs


def _verdict(runs: dict[str, list[Run]], seeds: int) -> str:
    """What was seen, in words: differences to the plain student, paired by seed."""
    lines = []
    alone = _top1(runs["student alone"])
    for name in ("kd", "at"):
        gains = [a - b for a, b in zip(_top1(runs[name]), alone, strict=True)]
        better = sum(g > 0 for g in gains)
        lines.append(
            f"{name} against the student alone: {statistics.fmean(gains):+.2f} points on average, "
            f"better for {better} of {seeds} seeds"
        )
    return "\n".join(lines)


def _top1(runs: list[Run]) -> list[float]:
    return [(run.result or {})["scores"]["student"]["top1"] for run in runs]
