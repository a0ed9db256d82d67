"""What a store of teacher outputs changes: losses on real batches, and final accuracy.

    python benchmarks/store_fidelity.py --weights FILE [--batches 100] [--seeds 3] [--out FILE]

kd ResNet-56 -> ResNet-20 on CIFAR-100. First the loss terms of the same weights on the same
batches, with the teacher's live outputs and with what a store gives back, in both precisions and
for what a store can keep. Then short trainings, each seed with and without a store that rounds
(float32 kept in 16 bits), and a paired t-test over seeds; and in bf16, where nothing is rounded,
whether the weights are equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from potstill import comparison, recipe, training
from potstill.method import Progress
from potstill.run import Run, describe_environment

KD = "cifar100/kd-resnet56-resnet20"
KEPT = {
    "bf16, store.bits=16": ["precision=bf16", "store=true"],
    "fp32, store.bits=16": ["precision=fp32", "store=true"],
    "fp32, store.bits=32": ["precision=fp32", "store.bits=32"],
    "bf16, store.top_k=20": ["precision=bf16", "store.top_k=20"],
}
SHORT = ["data.subset=5000", "epochs=3", "optimizers.default.schedule={name: one_cycle}"]


@torch.no_grad()
def losses(weights: Path, batches: int, settings: list[str], folder: str) -> dict[str, float]:
    """Largest relative difference of each term over some batches."""
    given = [f"teachers.0.weights={weights}", *settings, f"store.root={folder}"]
    job = training.assemble(recipe.load(KD, given))
    method, (phase,) = job.method, job.training.phases
    (turn,) = phase.turns
    (update,) = turn.updates
    method.eval()  # one student for all batches
    progress = Progress(0, 0, job.training.steps, phase.epochs)
    worst: dict[str, float] = {}
    for batch in islice(job.training.supply(job.data.train.clean(64)), batches):
        kept = update.loss(turn.forward(batch, progress, None))
        method.stored = None
        live = update.loss(turn.forward(batch, progress, None))
        method.stored = job.store
        for name, term in live.items():
            apart = ((kept[name] - term).abs() / term.abs()).item()
            worst[name] = max(worst.get(name, 0.0), apart)
    assert job.store is not None and job.store.counts.computed >= 64 * batches
    job.store.close()
    return worst


def trained(weights: Path, seed: int, settings: list[str], place: Path) -> Run:
    """A short training."""
    given = [f"teachers.0.weights={weights}", *SHORT, f"seed={seed}", *settings]
    return training.train(recipe.load(KD, given), place, training.Silence())


def top1(run: Run) -> float:
    """After the last epoch, in percent."""
    assert run.result is not None
    return float(run.result["scores"]["student"]["top1"])


def measure(weights: Path, batches: int, seeds: int) -> dict[str, Any]:
    """Everything."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, settings in KEPT.items():
            found[name] = losses(weights, batches, settings, f"{folder}/teachers")
            print(f"{name}: {found[name]}", flush=True)
        accuracies: dict[str, dict[int, float]] = {"live": {}, "stored": {}}
        store = f"store={{root: {folder}/teachers}}"
        for seed in range(seeds):
            for name, more in (("live", []), ("stored", [store])):
                run = trained(
                    weights, seed, ["precision=fp32", *more], Path(folder) / f"{name}{seed}"
                )
                accuracies[name][seed] = top1(run)
                print(f"seed {seed}, {name}: {accuracies[name][seed]:.2f} %", flush=True)
        pair = [
            trained(weights, 0, ["precision=bf16", *more], Path(folder) / f"bf16{len(more)}")
            for more in ([], [store])
        ]
        (a, _), (b, _) = (run.load_predictor() for run in pair)
        equal = all(torch.equal(a[name], b[name]) for name in a)
    paired = comparison.paired(accuracies["stored"], accuracies["live"])
    assert paired is not None
    environment = describe_environment("cpu", precision="both")
    environment.pop("command")
    return {
        "batches": batches,
        "batch_size": 64,
        "largest_relative_difference": found,
        "settings": SHORT,
        "accuracy": {name: list(by_seed.values()) for name, by_seed in accuracies.items()},
        "paired_t_test": {"p": paired.p, "mean": paired.mean, "half_width": paired.half_width},
        "n": seeds,
        "bf16_weights_equal": equal,
        "environment": environment,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="the ResNet-56")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(options.weights, options.batches, options.seeds)
    test = result["paired_t_test"]
    print(
        f"stored - live: {test['mean']:+.2f} ± {test['half_width']:.2f} points, "
        f"p = {test['p']:.2f}, n = {result['n']}; "
        f"bf16 weights equal: {result['bf16_weights_equal']}"
    )
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
