"""How fast a training is: of whole epochs, by parts, and beside a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from potstill import memory
from potstill.bench.contest import FIRST, Contestant, Timing, contest, warm_up
from potstill.bench.loop import PlainLoop, require_plain
from potstill.bench.ours import Ours
from potstill.bench.report import as_object, table
from potstill.recipe import Recipe

__all__ = [
    "FIRST",
    "Contestant",
    "Ours",
    "PlainLoop",
    "Timing",
    "contest",
    "measure",
    "table",
    "warm_up",
]


def measure(
    ours: Ours,
    against: Recipe | None,
    rounds: int,
    steps: int,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a training, in turns with the plain loop of a recipe where one is given."""
    if against is not None:
        require_plain(ours.job)
    with memory.kept(ours.device):
        report("warming up")
        first_seconds = warm_up(ours, steps, ours.device)
        # before there is a loop: on a CPU the memory is that of the process
        peak = ours.peak_bytes()
        loop = None if against is None else PlainLoop(against)
        if loop is not None:
            report("warming up the loop")
            warm_up(loop, steps, ours.device)
        ours.hit_rate()  # what the warm-up asked for was not there
        contestants: list[Contestant] = [ours] if loop is None else [ours, loop]
        found = contest(contestants, rounds, steps, ours.device, report)
        hit_rate = ours.hit_rate()
        report("splitting a step")
        split = ours.split(steps)
    return as_object(ours, loop, found, split, peak, hit_rate, first_seconds, steps)
