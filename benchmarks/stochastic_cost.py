"""A stochastic teacher's forward beside the plain one's.

Both teachers have equal weights and see one batch that lies ready; they run in this process, in
turns, so that whatever else the machine does meets both. A round is several forwards of each, and
the stochastic one draws anew at every one of them: for the whole batch, and for the first p_end
also for every image. With p_end 1 nothing is dropped: what MobileNetV1's added shortcuts cost, and
of other networks how noisy the machine is.

    python benchmarks/stochastic_cost.py [--models resnet56 ...] [--p-end 0.9 0.5] [--rounds 15]
        [--batch 64] [--precision auto] [--out FILE]

Prints the stochastic time / the plain time, median and quartiles over the rounds, beside the share
of the blocks that are alive on average; the claim is at most 1. --out writes the result file.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from method_cost import seconds_of
from tap_cost import arguments, write

from potstill import stochastic
from potstill.depth import Draw, ResidualBlock
from potstill.models import build
from potstill.net import Net
from potstill.training import choose_precision

MODELS = ["resnet56", "resnet110", "wrn_40_4", "mobilenetv1"]


def blocks_of(net: Net) -> list[ResidualBlock]:
    """Those of a stochastic network."""
    blocks = [net.module.get_submodule(path) for path in net.blocks]
    return [block for block in blocks if isinstance(block, ResidualBlock)]


@torch.no_grad()
def compare(
    name: str,
    p_ends: list[float],
    batch: int,
    rounds: int,
    device: torch.device,
    precision: torch.dtype | None,
) -> dict[str, Any]:
    """Seconds of a forward of the plain teacher and of stochastic ones, in each round."""
    torch.manual_seed(0)
    plain = build(name)
    drawn: list[tuple[float, Draw]] = [(p, "batch") for p in (1.0, *p_ends)]
    drawn.append((p_ends[0], "image"))
    variants = {f"{p:g}, {draw}": stochastic(plain, p, draw=draw) for p, draw in drawn}
    teachers = {"plain": plain, **variants}
    for teacher in teachers.values():
        teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        teacher.eval()
        teacher.precision = precision
    image = torch.randn(batch, *plain.input_shape, device=device)
    image = image.contiguous(memory_format=torch.channels_last)

    def seconds(teacher: Net) -> float:
        return seconds_of(lambda: teacher(image), device)

    for _ in range(2):  # to warm up
        once = sum(map(seconds, teachers.values()))
    passes = max(4, round(2 / once))
    found: dict[str, list[float]] = {key: [] for key in teachers}
    for _ in range(rounds):
        times: dict[str, list[float]] = {key: [] for key in teachers}
        for number in range(passes):
            order = list(teachers.items())
            for key, teacher in order if number % 2 else reversed(order):
                times[key].append(seconds(teacher))
        for key, values in times.items():  # means: every draw counts
            found[key].append(statistics.mean(values))
    rows = {}
    for key, teacher in variants.items():
        ratios = [a / b for a, b in zip(found[key], found["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        survival = [block.survival for block in blocks_of(teacher)]
        rows[key] = {
            "alive": sum(survival) / len(survival),
            "ratio": middle,
            "ratio_quartiles": [low, high],
            "seconds": statistics.median(found[key]),
        }
    return {
        "plain_seconds": statistics.median(found["plain"]),
        "forwards_per_round": passes,
        "teachers": rows,
    }


if __name__ == "__main__":
    parser = arguments((__doc__ or "").partition("\n")[0], MODELS, rounds=15)
    parser.add_argument("--p-end", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    options = parser.parse_args()
    device = torch.device(options.device)
    precision = choose_precision(options.precision, device)
    results = {}
    for name in options.models:
        results[name] = compare(
            name, options.p_end, options.batch, options.rounds, device, precision
        )
        for key, row in results[name]["teachers"].items():
            low, high = row["ratio_quartiles"]
            print(
                f"{name}, p_end {key}: {row['ratio']:.3f} of the plain forward (quartiles "
                f"{low:.3f} to {high:.3f}, {options.rounds} rounds), {row['alive']:.3f} of the "
                "blocks alive",
                flush=True,
            )
    if options.out:
        write(options, results, device, precision)
