"""What a bench found, for a person and for a program."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from potstill.bench.contest import Timing
from potstill.bench.loop import PlainLoop
from potstill.bench.ours import Ours
from potstill.files import in_bytes
from potstill.listing import columns

PART_WORDS = {
    "data": "the next batch, augmented",
    "teacher": "the teachers' outputs, computed or read",
    "student": "the students' forward",
    "loss": "the loss terms",
    "backward": "their gradients",
    "optimizer": "the update",
    "rest": "all else",
}


def as_object(
    ours: Ours,
    loop: PlainLoop | None,
    found: Mapping[str, Timing],
    split: Mapping[str, float],
    peak_bytes: int,
    hit_rate: float | None,
    first_seconds: float,
    steps: int,
) -> dict[str, Any]:
    """Medians, spread and ratio, with what they were measured on. Speeds are images/s."""
    own = found[ours.name]
    result: dict[str, Any] = {
        "images_per_second": statistics.median(own.images_per_second),
        "reference_images_per_second": None,
        "ratio": None,
        "split": dict(split),
        "peak_memory_bytes": peak_bytes,
        "n": len(own.step_seconds),
        "step_images_per_second": statistics.median(own.steps_per_second),
        "range": _range(own.images_per_second),
        "first_seconds": first_seconds,
        "steps": steps,
        "phase": ours.job.training.phases[-1].name,
        "phases": len(ours.job.training.phases),
        "hit_rate": hit_rate,
    }
    if loop is not None:
        other = found[loop.name]
        pairs = zip(own.images_per_second, other.images_per_second, strict=True)
        ratios = [a / b for a, b in pairs]
        result |= {
            "reference_images_per_second": statistics.median(other.images_per_second),
            "ratio": statistics.median(ratios),
            "ratio_range": _range(ratios),
            "reference_workers": loop.workers,
        }
    return {**result, "environment": ours.job.environment}


def _range(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def table(result: Mapping[str, Any]) -> list[str]:
    """The lines that `potstill bench` prints."""
    low, high = result["range"]
    steps = result["steps"]
    lines = [
        f"{result['images_per_second']:,.0f} images/s of whole epochs, evaluation and checkpoint "
        f"included ({low:,.0f} to {high:,.0f}; n = {result['n']} rounds of {steps} steps)",
        f"{result['step_images_per_second']:,.0f} images/s of the steps alone; the first "
        f"{steps} took {result['first_seconds']:.1f} s, with all that is compiled or built once",
    ]
    if result["phases"] > 1:
        lines.append(f"of the last of {result['phases']} phases, {result['phase']}")
    if result["hit_rate"] is not None:
        lines.append(f"stored outputs: {100 * result['hit_rate']:.1f} % were there, a full store")
    lines.append(f"at most {in_bytes(result['peak_memory_bytes'])} of memory")
    total = sum(result["split"].values())
    rows = [
        (part, f"{1000 * seconds:.2f} ms", f"{100 * seconds / total:.1f} %", PART_WORDS[part])
        for part, seconds in result["split"].items()
    ]
    lines += ["", *columns([("a step", f"{1000 * total:.2f} ms", "", ""), *rows], right=(1, 2))]
    if result["ratio"] is not None:
        low, high = result["ratio_range"]
        workers = result["reference_workers"]
        lines += [
            "",
            f"{result['ratio']:.2f} times the plain loop ({low:.2f} to {high:.2f}), which makes "
            f"{result['reference_images_per_second']:,.0f} images/s with "
            f"{workers or 'no'} worker processes",
        ]
    return lines
