"""Several ways to do one training, measured in turns in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from potstill.stopwatch import now

FIRST = 2
"""Steps that belong to the begin of an epoch: workers start, and files are opened, in these."""


class Contestant(Protocol):
    """A training whose epoch can be begun, gone on with for some steps, and ended, repeatedly."""

    name: str
    images: int
    """Of one epoch."""
    batch_size: int

    def begin(self) -> None:
        """Begin an epoch, up to and with its first `FIRST` steps."""

    def steps(self, count: int) -> None:
        """Train on the next `count` batches."""

    def end_epoch(self) -> float:
        """What an epoch ends with, evaluation first; the seconds that all of it would take."""


@dataclass
class Timing:
    """Of one contestant, by round."""

    batch_size: int
    images: int
    opening_seconds: list[float] = field(default_factory=list)
    """Of an epoch's begin, the first steps included."""
    step_seconds: list[float] = field(default_factory=list)
    """Mean over a round's steps."""
    ending_seconds: list[float] = field(default_factory=list)

    @property
    def steps_per_second(self) -> list[float]:
        """Images/s of the steps alone, by round."""
        return [self.batch_size / seconds for seconds in self.step_seconds]

    @property
    def images_per_second(self) -> list[float]:
        """Of whole epochs, evaluation and checkpoint included, by round."""
        batches = self.images / self.batch_size - FIRST
        rounds = zip(self.opening_seconds, self.step_seconds, self.ending_seconds, strict=True)
        return [
            self.images / (opening + batches * step + ending) for opening, step, ending in rounds
        ]


def warm_up(contestant: Contestant, steps: int, device: torch.device) -> float:
    """Carry out all that is timed once before; the seconds that the steps took."""
    took = _seconds(contestant.begin, device) + _seconds(partial(contestant.steps, steps), device)
    contestant.end_epoch()
    return took


def contest(
    contestants: Sequence[Contestant],
    rounds: int,
    steps: int,
    device: torch.device,
    report: Callable[[str], None] = lambda line: None,
) -> Mapping[str, Timing]:
    """Measure contestants, which are warm, in turns: each one's steps and the end of its epoch."""
    found = {c.name: Timing(c.batch_size, c.images) for c in contestants}
    for number in range(rounds):
        # not always after the same one: what that leaves in the caches would be the next one's
        first = number % len(contestants)
        for c in (*contestants[first:], *contestants[:first]):
            report(f"round {number + 1} of {rounds}: {c.name}")
            timing = found[c.name]
            timing.opening_seconds.append(_seconds(c.begin, device))
            timing.step_seconds.append(_seconds(partial(c.steps, steps), device) / steps)
            timing.ending_seconds.append(c.end_epoch())
    return found


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    began = now(device)
    work()
    return now(device) - began
