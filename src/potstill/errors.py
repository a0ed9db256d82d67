"""What Potstill raises when something is wrong that a person can put right.

    PotstillError                 exit code 2
    ├── RecipeError               a recipe or an override: every fault at once
    ├── TapError                  a feature name or tap that does not exist, or is not what it seems
    ├── NetworkError              a network that cannot be built, run or given these weights
    ├── MethodError               a method wired in a way that would train the wrong thing silently
    ├── DataError                 a data set whose contents or settings do not fit
    ├── StorageError              exit code 3: a file missing, damaged, or impossible to write
    └── MissingExtra              an optional package that is absent or broken, with the reason

Every message says what is wrong with which name, what is allowed, and what to do.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence


class PotstillError(Exception):
    """Base of every error raised on purpose; the command line prints it without a traceback."""

    exit_code = 2


class RecipeError(PotstillError):
    """Every fault found in a recipe, one line each."""

    def __init__(self, faults: Sequence[str], source: str = "recipe") -> None:
        self.faults = list(faults)
        self.source = source
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {f}" for f in self.faults)]))


class TapError(PotstillError):
    """A feature or tap that does not exist, runs more than once, or is overwritten in place."""


class NetworkError(PotstillError):
    """A network that cannot be built, run on its input, or given these weights."""


class MethodError(PotstillError):
    """A method whose wiring would train the wrong thing, or nothing, without saying so."""


class DataError(PotstillError):
    """Data whose contents or settings do not fit what was asked."""


class StorageError(PotstillError):
    """A file that is missing, truncated, damaged, or cannot be written."""

    exit_code = 3


class MissingExtra(PotstillError):
    """An optional package that is needed here and cannot be imported."""


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def by(shape: Sequence[int | None]) -> str:
    """A size as it is written.

    >>> by((3, 32, 32))
    '3x32x32'
    """
    return "x".join("?" if n is None else str(n) for n in shape)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A hint with the nearest allowed name, or an empty string: '; did you mean "kd"?'."""
    near = difflib.get_close_matches(given, list(allowed), n=5, cutoff=0.6)

    def likeness(name: str) -> tuple[float, int]:  # of equals the one that begins alike
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, given, strict=False))
        return difflib.SequenceMatcher(None, name, given).ratio(), len(list(alike))

    return f'; did you mean "{max(near, key=likeness)}"?' if near else ""
