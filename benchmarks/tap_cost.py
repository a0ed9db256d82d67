"""Forward and backward of networks with every tap captured, beside the same module without taps.

Both train on one batch that lies ready: logits, cross-entropy, gradients. They have equal weights
and run in this process, pass by pass in turns, so that whatever else the machine does meets both; a
round is several passes of each.

    python benchmarks/tap_cost.py [--models resnet20 ...] [--rounds 21] [--batch 64] [--out FILE]

Prints time with taps / time without, median and quartiles over the rounds; the claim is at most
1.02. --out writes the result file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.models import build
from potstill.run import describe_environment
from potstill.training import choose_precision

MODELS = ["resnet20", "resnet56", "wrn_16_2", "vgg8", "mobilenetv1", "mobilenetv2", "shufflenetv2"]


def compare(
    name: str, batch: int, rounds: int, device: torch.device, precision: torch.dtype | None
) -> dict[str, Any]:
    """Seconds of a pass with and without taps, in each round."""
    torch.manual_seed(0)
    net = build(name).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = build(name).module.to(device, memory_format=torch.channels_last)
    plain.load_state_dict(net.state_dict())
    image = torch.randn(batch, *net.input_shape, device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    label = torch.randint(100, (batch,), device=device)

    def with_taps() -> Tensor:
        return net(image).logits

    def without() -> Tensor:
        return plain(image)

    def seconds(forward: Callable[[], Tensor], module: nn.Module) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        module.zero_grad()
        with torch.autocast(device.type, precision, precision is not None):
            logits = forward()
        F.cross_entropy(logits.float(), label).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(2):  # to warm up
        once = seconds(with_taps, net) + seconds(without, plain)
    passes = max(2, round(1 / once))
    found: dict[str, list[float]] = {"with_taps": [], "without": []}
    for _ in range(rounds):
        times: dict[str, list[float]] = {"with_taps": [], "without": []}
        for number in range(passes):
            if number % 2:
                times["with_taps"].append(seconds(with_taps, net))
            times["without"].append(seconds(without, plain))
            if not number % 2:
                times["with_taps"].append(seconds(with_taps, net))
        for key, values in times.items():
            found[key].append(statistics.median(values))
    ratios = [a / b for a, b in zip(found["with_taps"], found["without"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "taps": len(net.taps),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "seconds": {key: statistics.median(times) for key, times in found.items()},
        "passes_per_round": passes,
    }


def arguments(description: str, models: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """What a comparison of networks asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    return parser


def write(
    options: argparse.Namespace,
    results: Mapping[str, Any],
    device: torch.device,
    precision: torch.dtype | None,
) -> None:
    """The result file of a comparison of networks."""
    environment = describe_environment(
        device, precision=str(precision or torch.float32).removeprefix("torch.")
    )
    environment.pop("command")
    found = {"models": results, "n": options.rounds, "batch_size": options.batch}
    options.out.write_text(json.dumps(found | {"environment": environment}, indent=2) + "\n")


if __name__ == "__main__":
    options = arguments(__doc__.partition("\n")[0], MODELS, rounds=21).parse_args()
    device = torch.device(options.device)
    precision = choose_precision(options.precision, device)
    results = {}
    for name in options.models:
        results[name] = compare(name, options.batch, options.rounds, device, precision)
        low, high = results[name]["ratio_quartiles"]
        print(
            f"{name}: {results[name]['taps']} taps, {results[name]['ratio']:.3f} of the time "
            f"without (quartiles {low:.3f} to {high:.3f}, {options.rounds} rounds)",
            flush=True,
        )
    if options.out:
        write(options, results, device, precision)
