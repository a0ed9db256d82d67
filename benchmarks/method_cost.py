"""One epoch of every method on 5,000 images: is it sound, how fast is it, how much memory.

ResNet-56 teaches ResNet-20 on CIFAR-100 with each method's published recipe, `epochs=1`, so that
ramps and milestones are shortened with it. Every method has a process of its own, which

1. trains the epoch: every term is finite, and their sum and the cross-entropy are lower, on
   average, over its last three tenths than over the three after the first, by which every ramp is
   at its top;
2. reads its peak memory: resident set on a CPU, allocated memory on a GPU;
3. trains on, step by step in turns with `vanilla` of the same batch, for images/s and their ratio.

    python benchmarks/method_cost.py --teacher resnet56_cifar100.pth [--precision bf16] \
        [--methods kd sakd ...] [--steps 20] [--out FILE]

Needs POTSTILL_DATA. Exits with 1 where a method is not sound. --out writes the result file; rows of
other methods that are in it already stay.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from potstill import engine, training
from potstill.methods import METHODS
from potstill.recipe import load

SETTINGS = {"crd": ["method.negatives=4096"]}
"""A slice of 5,000 images has 4,950 of other classes, not 16,384."""


def job(
    method: str, teacher: str, precision: str, batch_size: int | None = None
) -> training.Assembled:
    """A method's published recipe on the slice."""
    pair = "resnet20" if method == "vanilla" else "resnet56-resnet20"
    name = f"cifar100/{method.replace('_', '-')}-{pair}"
    changes = ["data.subset=5000", "epochs=1", f"precision={precision}", *SETTINGS.get(method, [])]
    if batch_size is not None:
        changes.append(f"data.batch_size={batch_size}")
    if METHODS[method].teachers_needed[0]:
        changes.append(f"teachers.0.weights={teacher}")
    return training.assemble(load(name, changes))


def peak_bytes(device: torch.device) -> int:
    """The most memory that was held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def steps_of(found: Sequence[engine.Moment]) -> list[dict[str, float]]:
    """Terms of every step, from the running means that a training gives."""
    sums = [{k: v.item() * i for k, v in m.terms.items()} for i, m in enumerate(found, start=1)]
    before = [dict.fromkeys(sums[0], 0.0), *sums[:-1]]
    return [{k: b[k] - a[k] for k in b} for a, b in zip(before, sums, strict=True)]


def measure(method: str, teacher: str, precision: str, steps: int) -> dict[str, Any]:
    """What this process finds of one method."""
    whole = job(method, teacher, precision)
    terms = steps_of(list(whole.training.run()))
    peak = peak_bytes(whole.device)
    full = len(whole.method.data.indices) // whole.method.data.batch_size
    tenth = full // 10  # a last batch of few images says little
    ends = [
        {k: statistics.mean(step[k] for step in part) for k in terms[0]}
        for part in (terms[tenth : 4 * tenth], terms[full - 3 * tenth : full])
    ]
    finite = all(torch.tensor(list(step.values())).isfinite().all() for step in terms)
    falling = sum(ends[1].values()) < sum(ends[0].values())
    falling = falling and ends[1].get("ce", 0.0) <= ends[0].get("ce", 0.0)
    own, batch = job(method, teacher, precision), whole.method.data.batch_size
    plain = job("vanilla", teacher, precision, batch)
    runs = {"method": own.training.run(), "vanilla": plain.training.run()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(steps + 3):
        for name, run in runs.items():
            took = _seconds(run, own.device)
            if i >= 3:
                seconds[name].append(took)
    ratios = [b / a for a, b in zip(seconds["method"], seconds["vanilla"], strict=True)]
    return {
        "images_per_second": batch / statistics.median(seconds["method"]),
        "vanilla_images_per_second": batch / statistics.median(seconds["vanilla"]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [statistics.quantiles(ratios, n=4)[i] for i in (0, 2)],
        "peak_bytes": peak,
        "parameters": sum(p.numel() for p in own.method.trainable()),
        "terms_after_the_first_tenth": ends[0],
        "terms_in_the_last_three": ends[1],
        "finite": finite,
        "falling": falling,
        "environment": own.environment,
    }


def _seconds(run: Iterator[engine.Moment], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    next(run)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", required=True, help="weights of a ResNet-56 for CIFAR-100")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=20, help="timed, of each method")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", action="store_true", help="in this process, one method")
    options = parser.parse_args()
    if options.alone:
        (name,) = options.methods
        print(json.dumps(measure(name, options.teacher, options.precision, options.steps)))
        sys.exit()
    rows: dict[str, Any] = {}
    for name in options.methods:
        command = [sys.executable, __file__, "--alone", "--methods", name]
        command += ["--teacher", options.teacher, "--precision", options.precision]
        command += ["--steps", str(options.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = found = json.loads(done.stdout.splitlines()[-1])
        sound = found["finite"] and found["falling"]
        print(
            f"{name:14} {found['images_per_second']:6.0f} images/s, {found['ratio']:.3f} of "
            f"vanilla, {found['peak_bytes'] / 2**20:6.0f} MiB{'' if sound else '  NOT SOUND'}",
            flush=True,
        )
    (environment, *_) = [row.pop("environment") for row in rows.values()]
    environment.pop("command")  # names this machine's folders
    if options.out is not None:
        there = json.loads(options.out.read_text())["methods"] if options.out.exists() else {}
        every = {name: {**there, **rows}[name] for name in METHODS if name in {**there, **rows}}
        result = {"n": options.steps, "environment": environment, "methods": every}
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(any(not (row["finite"] and row["falling"]) for row in rows.values()))
