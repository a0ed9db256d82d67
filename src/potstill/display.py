"""How a training looks while it runs: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from potstill.engine import Moment

REFRESH_SECONDS = 0.5
LINE_SECONDS = 30.0


class Speed:
    """Images a second over the last few seconds, and the time left at that pace."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.history: deque[tuple[float, int, int]] = deque()
        self.images = 0

    def note(self, step: int, images: int) -> None:
        """One step is done."""
        self.images += images
        now = time.monotonic()
        self.history.append((now, step, self.images))
        while now - self.history[0][0] > self.seconds and len(self.history) > 2:
            self.history.popleft()

    def read(self, remaining_steps: int) -> tuple[float, float]:
        """(images a second, seconds left); zeros before two steps are done."""
        (t0, s0, i0), (t1, s1, i1) = self.history[0], self.history[-1]
        if t1 == t0 or s1 == s0:
            return 0.0, 0.0
        return (i1 - i0) / (t1 - t0), remaining_steps * (t1 - t0) / (s1 - s0)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def epoch_line(record: Mapping[str, Any]) -> str:
    """One finished epoch, from its record in metrics.jsonl.

    In one line; where several updates have terms of their own, these are in a second one.
    """
    spent, terms = record["time"], record["terms"]
    several = any("." in name for name in terms)
    parts = [f"{record['phase']} epoch {record['epoch']}"]
    if not several:
        parts += [f"{name} {value:.4f}" for name, value in terms.items()]
    parts += accuracies(record)
    parts += [
        f"{name} drew {drawn['distinct']:,} sub-network{'s' if drawn['distinct'] > 1 else ''}, "
        f"{drawn['live']:.1f} of {drawn['blocks']} blocks alive"
        for name, drawn in record.get("subnetworks", {}).items()
    ]
    if spent["seconds"]:
        parts.append(f"{spent['images'] / spent['seconds']:,.0f} images/s")
    line = " · ".join(parts)
    return f"{line}\n  {' · '.join(_by_update(terms))}" if several else line


def accuracies(record: Mapping[str, Any]) -> list[str]:
    """Top-1 of every predictor that an epoch was evaluated with."""
    found = record["scores"].items()
    return [f"{name} {score['top1']:.2f} % {record['split']}" for name, score in found]


def _by_update(terms: Mapping[str, float]) -> list[str]:
    """ "update.term" by update: ["student0: ce 1.2000, kd 0.1000", ...]"""
    updates: dict[str, list[str]] = {}
    for name, value in terms.items():
        update, _, term = name.partition(".")
        updates.setdefault(update, []).append(f"{term} {value:.4f}")
    return [f"{update}: {', '.join(found)}" for update, found in updates.items()]


class Plain:
    """Plain lines: every epoch, and every half minute within one."""

    def __init__(self, console: Console, prefix: str = "", brief: bool = False) -> None:
        self.console, self.prefix, self.brief = console, prefix, brief
        self.speed = Speed(seconds=60.0)
        self.last = time.monotonic()

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def say(self, line: str) -> None:
        """Print one line as it is."""
        if self.brief:
            return
        self.console.print(self.prefix + line, markup=False, highlight=False, soft_wrap=True)

    def step(self, done: int, total: int, moment: Moment) -> None:
        """Note a step; every half minute, say where the training stands."""
        self.speed.note(done, moment.images)
        if moment.epoch_done:
            self.last = time.monotonic()
        elif time.monotonic() - self.last > LINE_SECONDS:
            self.last = time.monotonic()
            self.say("  " + " · ".join(_standing(done, total, moment, self.speed)))

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Say how an epoch ended."""
        self.say(epoch_line(record))


class Live:
    """A line that is redrawn in place on a terminal, with the epochs above it."""

    def __init__(self, console: Console, prefix: str = "", brief: bool = False) -> None:
        self.console, self.prefix, self.brief = console, prefix, brief
        self.progress = Progress(
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1)),
            expand=True,  # or what does not fit on one line is cut off
            console=console,
            transient=True,
            auto_refresh=False,
        )
        self.task = self.progress.add_task("starting")
        self.speed = Speed()
        self.last = 0.0
        self.accuracies: list[str] = []

    def __enter__(self) -> Live:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        if self.brief:
            return
        self.console.print(self.prefix + line, markup=False, highlight=False)

    def step(self, done: int, total: int, moment: Moment) -> None:
        """Note a step; twice a second, redraw."""
        self.speed.note(done, moment.images)
        if time.monotonic() - self.last > REFRESH_SECONDS:
            self.last = time.monotonic()
            standing = [*_standing(done, total, moment, self.speed), *self.accuracies]
            text = self.prefix + " · ".join(standing)
            self.progress.update(self.task, completed=done, total=total, description=text)
            self.progress.refresh()

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Say how an epoch ended; the bar goes on showing the last accuracies."""
        self.accuracies = accuracies(record) or self.accuracies
        self.say(epoch_line(record))


def _standing(done: int, total: int, moment: Moment, speed: Speed) -> list[str]:
    """Where a training stands. Reads the terms, so on a GPU it waits for them: twice a second."""
    rate, left = speed.read(total - done)
    sums: dict[str, float] = {}  # of each update, where there are several
    for name, term in moment.terms.items():
        update = name.partition(".")[0]
        sums[update] = sums.get(update, 0.0) + term.item()
    losses = [f"{name} {value:.3f}" for name, value in sums.items()]
    several = any("." in name for name in moment.terms)
    epoch = moment.epoch if moment.epoch_done else moment.epoch + 1
    return [
        f"{moment.phase} epoch {epoch}/{moment.epochs}",
        f"step {done}/{total}",
        f"{rate:,.0f} images/s",
        f"{duration(left)} left",
        *(["loss " + ", ".join(losses)] if several else losses),
    ]


def watcher(
    console: Console, prefix: str = "", quiet: bool = False, brief: bool = False
) -> Plain | Live:
    """The display that fits the console.

    `brief` leaves out everything but the live bar; `quiet` (ranks other than 0) that too.
    """
    if quiet:
        return Plain(Console(quiet=True))
    return (Live if console.is_terminal else Plain)(console, prefix, brief)
