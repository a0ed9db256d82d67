"""One epoch of every method on 5,000 images: is it sound, how fast is it, how much memory.

ResNet-56 teaches ResNet-20 on CIFAR-100 with each method's shipped recipe (that of its own tables,
where it has none for these networks) and one epoch for each of its phases, so that ramps and
milestones are shortened with it. Every method has a process of its own, which

1. trains: every term is finite, and in each phase their sum and the cross-entropy are lower, on
   average, over the last three tenths than over the three after the first, by which every ramp is
   at its top;
2. reads its peak memory: resident set on a CPU, allocated memory on a GPU;
3. trains anew, step by step in turns with `vanilla` of the same batch, for images/s of each phase
   and their ratio to plain training.

    python benchmarks/method_cost.py --teacher resnet56_cifar100.pth [--precision bf16] \
        [--methods kd sakd ...] [--steps 20] [--out FILE]

The same recipes on another data set and pair: the teacher is a run, or a file of its weights.

    python benchmarks/method_cost.py --data tiny-imagenet --images 2000 \
        --pair wrn_22_4_mhgd wrn_10_4_mhgd --teacher RUN --methods mhgd ...

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from potstill import engine, training
from potstill.methods import METHODS
from potstill.recipe import load

SETTINGS = {
    "crd": ["method.negatives=4096"],
    "norm": ["method.ramp=false"],
    "aml": ["data.overlap=null", "data.mean=null", "data.std=null"],
}
"""A slice of 5,000 images has 4,950 of other classes, not 16,384. NORM's weight falls in the end,
and its term with it, whatever is learnt. AML's recipe is for half of the classes."""
RECIPES = {
    "refilled": "cifar100/gkd-refilled-wrn_28_4-wrn_16_2",
    "aml": "cifar100/gkd-aml-wrn_40_2-wrn_16_1",
    "jacobian": "cifar100/gkd-jacobian-wrn_28_4-wrn_16_2",
}
"""Of methods that have none for ResNet-56 and ResNet-20; the networks are replaced."""
TAUGHT = [name for name, method in METHODS.items() if method.teachers_needed[0]]
"""The others are measured by online_cost.py."""


@dataclass(frozen=True)
class Setting:
    """What all methods have in common."""

    teacher: str
    precision: str
    data: str
    images: int
    pair: Sequence[str]


def job(
    method: str, setting: Setting, batch_size: int | None = None, epochs: int | None = None
) -> training.Assembled:
    """A method's shipped recipe on the slice, an epoch a phase unless told otherwise."""
    pair = "resnet20" if method == "vanilla" else "resnet56-resnet20"
    name = RECIPES.get(method, f"cifar100/{method.replace('_', '-')}-{pair}")
    changes = [f"data.name={setting.data}", f"data.subset={setting.images}"]
    changes += [f"precision={setting.precision}", f"students.0.name={setting.pair[1]}"]
    changes += SETTINGS.get(method, [])
    if batch_size is not None:
        changes.append(f"data.batch_size={batch_size}")
    if METHODS[method].teachers_needed[0]:
        changes += [f"teachers.0.name={setting.pair[0]}", f"teachers.0.weights={setting.teacher}"]
    changes.append(f"epochs={epochs or len(METHODS[method].lengths)}")
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


def soundness(found: Sequence[engine.Moment]) -> dict[str, Any]:
    """Whether a phase's terms are finite and falling, and their means at both ends."""
    terms = steps_of(found)
    full = sum(moment.images == found[0].images for moment in found)
    tenth = full // 10  # a last batch of few images says little
    first, last = (
        {k: statistics.mean(step[k] for step in part) for k in terms[0]}
        for part in (terms[tenth : 4 * tenth], terms[full - 3 * tenth : full])
    )
    finite = all(torch.tensor(list(step.values())).isfinite().all() for step in terms)
    falling = sum(last.values()) < sum(first.values())
    return {
        "terms_after_the_first_tenth": first,
        "terms_in_the_last_three": last,
        "finite": finite,
        "falling": falling and last.get("ce", 0.0) <= first.get("ce", 0.0),
    }


def measure(method: str, setting: Setting, steps: int) -> dict[str, Any]:
    """What this process finds of one method."""
    whole = job(method, setting)
    moments = list(whole.training.run())
    peak = peak_bytes(whole.device)
    names = [phase.name for phase in whole.training.phases]
    phases = {name: soundness([m for m in moments if m.phase == name]) for name in names}
    own, batch = job(method, setting), whole.method.data.batch_size
    plain = job("vanilla", setting, batch, epochs=len(names)).training.run()
    run = own.training.run()
    for name in names:
        seconds: dict[str, list[float]] = {"method": [], "vanilla": []}
        timed = min(steps, own.training.steps - 4)  # the last one also begins the next phase
        for i in range(timed + 3):
            for key, steps_to_take in (("method", run), ("vanilla", plain)):
                took = seconds_of(lambda steps=steps_to_take: next(steps), own.device)
                if i >= 3:
                    seconds[key].append(took)
        ratios = [b / a for a, b in zip(seconds["method"], seconds["vanilla"], strict=True)]
        phases[name] |= {
            "images_per_second": batch / statistics.median(seconds["method"]),
            "vanilla_images_per_second": batch / statistics.median(seconds["vanilla"]),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [statistics.quantiles(ratios, n=4)[i] for i in (0, 2)],
            "n": timed,
        }
        while own.training.phase.name == name and name != names[-1]:
            next(run)
    return {
        "phases": phases,
        "peak_bytes": peak,
        "parameters": sum(p.numel() for p in own.method.trainable()),
        "environment": own.environment,
    }


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds it takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", required=True, help="its weights, or a run")
    parser.add_argument("--data", default="cifar100", help="the data set of the slice")
    parser.add_argument("--images", type=int, default=5000, help="of the slice")
    parser.add_argument("--pair", nargs=2, default=["resnet56", "resnet20"], help="networks")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument(
        "--methods", nargs="+", choices=["vanilla", *TAUGHT], default=["vanilla", *TAUGHT]
    )
    parser.add_argument("--steps", type=int, default=20, help="timed, of each method")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", action="store_true", help="in this process, one method")
    options = parser.parse_args()
    setting = Setting(
        options.teacher, options.precision, options.data, options.images, options.pair
    )
    if options.alone:
        (name,) = options.methods
        print(json.dumps(measure(name, setting, options.steps)))
        sys.exit()
    rows: dict[str, Any] = {}
    for name in options.methods:
        command = [sys.executable, __file__, "--alone", "--methods", name]
        command += ["--teacher", setting.teacher, "--precision", setting.precision]
        command += ["--data", setting.data, "--images", str(setting.images)]
        command += ["--pair", *setting.pair, "--steps", str(options.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = found = json.loads(done.stdout.splitlines()[-1])
        for phase, row in found["phases"].items():
            sound = row["finite"] and row["falling"]
            print(
                f"{name:14} {phase:8} {row['images_per_second']:6.0f} images/s, "
                f"{row['ratio']:.3f} of vanilla, {found['peak_bytes'] / 2**20:6.0f} MiB"
                f"{'' if sound else '  NOT SOUND'}",
                flush=True,
            )
    (environment, *_) = [row.pop("environment") for row in rows.values()]
    environment.pop("command")  # names this machine's folders
    if options.out is not None:
        there = json.loads(options.out.read_text())["methods"] if options.out.exists() else {}
        every = {name: {**there, **rows}[name] for name in METHODS if name in {**there, **rows}}
        settings = {k: v for k, v in asdict(setting).items() if k != "teacher"}
        result = {"n": options.steps, "setting": settings, "environment": environment}
        options.out.write_text(json.dumps({**result, "methods": every}, indent=2) + "\n")
    found = [phase for row in rows.values() for phase in row["phases"].values()]
    sys.exit(any(not (phase["finite"] and phase["falling"]) for phase in found))
