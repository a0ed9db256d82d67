"""Networks that teach each other, on a slice: is it sound, what do K cost beside K plain runs.

Every online method with several sets of networks, one epoch of CIFAR-100's first images in the
settings of Chung et al. (arXiv:2002.01775), each in a process of its own, which

1. trains: every term is finite, and each network's cross-entropy is lower, on average, over the
   last three tenths than over the first three;
2. reads its peak memory: resident set on a CPU, allocated memory on a GPU;
3. trains anew, step by step in turns with K separate plain trainings, one a network, of the same
   batch: the ratio is the seconds of K plain steps over those of one step of K networks;
4. evaluates all predictors, the ensemble among them, in turns with the K plain networks. A whole
   run's ratio is of an epoch of 50,000 training and 10,000 test images, from the medians of both.

    python benchmarks/online_cost.py [--precision bf16] [--methods dml afd_online ...] \
        [--networks resnet20,resnet32 ...] [--images 3200] [--steps 10] [--out FILE]

Needs POTSTILL_DATA. Exits with 1 where a training is not sound. --out writes the result file; rows
of other methods and networks that are in it already stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from method_cost import peak_bytes, seconds_of, steps_of

from potstill import memory, training
from potstill.evaluate import evaluate
from potstill.recipe import load

METHODS = {
    "dml": ["method.name=dml"],
    "dml synchronous": ["method.name=dml", "method.mode=synchronous"],
    "one": ["method.name=one"],
    "l1": ["method.name=l1"],
    "l1_kd": ["method.name=l1_kd"],
    "ensemble_kd": ["method.name=ensemble_kd"],
    "afd_online": [],
    "afd_online, no features": ["method.adversarial=false"],
}
PAIRS_ONLY = ("l1", "l1_kd")
NETWORKS = [
    "resnet20,resnet20",
    "resnet20,resnet32",
    "wrn_16_2,wrn_28_2",
    "resnet20,resnet20,resnet20",
]
TRAINING_IMAGES, TEST_IMAGES = 50_000, 10_000
"""Of an epoch of CIFAR-100, for the ratio of whole runs."""
SHARE = 1000
"""Test images that are timed."""


def job(
    changes: Sequence[str], students: Sequence[str], common: Sequence[str]
) -> training.Assembled:
    """A training of one epoch on the slice."""
    overrides = [*changes, f"students=[{', '.join(students)}]", "epochs=1", *common]
    return training.assemble(load("cifar100/afd-online-resnet32-resnet32", overrides))


def soundness(terms: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Whether all terms are finite and every cross-entropy falls; its means at both ends."""
    part = 3 * len(terms) // 10
    entropies = [name for name in terms[0] if name.rpartition(".")[2].startswith("ce")]
    first, last = (
        {name: statistics.mean(step[name] for step in steps) for name in entropies}
        for steps in (terms[:part], terms[-part:])
    )
    return {
        "cross_entropy_at_first": first,
        "cross_entropy_at_last": last,
        "finite": all(torch.tensor(list(step.values())).isfinite().all() for step in terms),
        "falling": all(last[name] < first[name] for name in entropies),
    }


def in_turns(
    one: Callable[[], Any], other: Callable[[], Any], device: torch.device, n: int, skipped: int = 2
) -> tuple[list[float], list[float]]:
    """Seconds of two actions, n times each after some that do not count."""
    pairs = [(seconds_of(one, device), seconds_of(other, device)) for _ in range(n + skipped)][
        skipped:
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def measure(method: str, students: Sequence[str], common: Sequence[str], n: int) -> dict[str, Any]:
    """What this process finds of one method and its networks."""
    whole = job(METHODS[method], students, common)
    row = soundness(steps_of(list(whole.training.run())))
    row["peak_bytes"] = peak_bytes(whole.device)
    own = job(METHODS[method], students, common)
    plain = [job(["method.name=vanilla"], [student], common) for student in students]
    n = min(n, own.training.steps - 2)  # two do not count
    run, others = own.training.run(), [p.training.run() for p in plain]
    together, apart = in_turns(
        lambda: next(run), lambda: [next(other) for other in others], own.device, n
    )
    images = next(own.data.test.clean(SHARE))

    class Share:
        """The first test images, already loaded: the networks alone are timed."""

        def clean(self, batch_size: int, sharded: bool = False) -> Any:
            for i in range(0, SHARE, batch_size):
                yield type(images)(*(part[i : i + batch_size] for part in images))

    evaluated, evaluated_apart = in_turns(
        lambda: evaluate(own.method.predictors(), Share(), 125),
        lambda: [evaluate(p.method.predictors(), Share(), 125) for p in plain],
        own.device,
        5,
        1,
    )
    batch = own.method.data.batch_size
    ratios = [b / a for a, b in zip(together, apart, strict=True)]

    def epoch(steps: Sequence[float], evaluation: Sequence[float]) -> float:
        step, share = statistics.median(steps), statistics.median(evaluation)
        return step * TRAINING_IMAGES / batch + share * TEST_IMAGES / SHARE

    return {
        **row,
        "images_per_second": batch / statistics.median(together),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [statistics.quantiles(ratios, n=4)[i] for i in (0, 2)],
        "evaluation_ratio": statistics.median(evaluated_apart) / statistics.median(evaluated),
        "whole_run_ratio": epoch(apart, evaluated_apart) / epoch(together, evaluated),
        "environment": own.environment,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=3200, help="of the slice")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--steps", type=int, default=10, help="timed, of each method")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", action="store_true", help="in this process, one method")
    options = parser.parse_args()
    common = [f"data.subset={options.images}", f"data.batch_size={options.batch_size}"]
    common.append(f"precision={options.precision}")
    if options.alone:
        ((method,), (networks,)) = options.methods, options.networks
        with memory.kept(training.choose_device("auto")):  # as in every training
            found = measure(method, networks.split(","), common, options.steps)
        print(json.dumps(found))
        sys.exit()
    rows: dict[str, dict[str, Any]] = {}
    environment: dict[str, Any] = {}
    for networks in options.networks:
        students = networks.split(",")
        for method in options.methods:
            if (method == "one" and len(set(students)) > 1) or (
                method in PAIRS_ONLY and len(students) > 2
            ):
                continue
            command = [sys.executable, __file__, "--alone", "--methods", method]
            command += ["--networks", networks, "--images", str(options.images)]
            command += ["--batch-size", str(options.batch_size), "--steps", str(options.steps)]
            command += ["--precision", options.precision]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            environment = row.pop("environment")
            rows.setdefault(networks, {})[method] = row
            print(
                f"{networks:28} {method:24} {row['images_per_second']:6.0f} images/s, steps "
                f"{row['ratio']:.3f} of {len(students)} runs, whole {row['whole_run_ratio']:.3f}"
                f"{'' if row['finite'] and row['falling'] else '  NOT SOUND'}",
                flush=True,
            )
    environment.pop("command", None)  # names this machine's folders
    if options.out is not None:
        there = json.loads(options.out.read_text())["networks"] if options.out.exists() else {}
        every = {k: {**there.get(k, {}), **rows.get(k, {})} for k in [*there, *rows]}
        setting = {k: getattr(options, k) for k in ("precision", "images", "batch_size")}
        result = {"n": options.steps, "setting": setting, "environment": environment}
        options.out.write_text(json.dumps({**result, "networks": every}, indent=2) + "\n")
    found = [row for methods in rows.values() for row in methods.values()]
    sys.exit(any(not (row["finite"] and row["falling"]) for row in found))
