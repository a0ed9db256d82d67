"""Where the time of a training goes, by named parts; nothing is measured unless somebody asks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer")
"""Of a step, in their order."""


class Stopwatch:
    """Seconds by part. What is measured within another part is taken off that one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._within: list[float] = []
        """Seconds of inner parts, for each part that is open."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, time counts for `name`. On a GPU every border waits for the device."""
        began = now(self.device)
        self._within.append(0.0)
        try:
            yield
        finally:
            took = now(self.device) - began
            self.seconds[name] += took - self._within.pop()
            if self._within:
                self._within[-1] += took


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


_NOTHING = nullcontext()
_running: Stopwatch | None = None


def part(name: str) -> AbstractContextManager[None]:
    """A context whose time counts for `name` where a stopwatch runs, and else costs nothing."""
    return _NOTHING if _running is None else _running.part(name)


@contextmanager
def running(device: torch.device) -> Iterator[Stopwatch]:
    """Measure the parts of what is done within."""
    global _running
    before, _running = _running, Stopwatch(device)
    try:
        yield _running
    finally:
        _running = before
