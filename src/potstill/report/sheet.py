"""A table of a report, which a terminal, Markdown and the page show each in its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MISSING = "-"
NOT_A_RESULT = "chosen on the test set, not a result"
ALONE = "n = 1: no interval"


class Cell(NamedTuple):
    """An entry of a table, and what its column is sorted by: a number, or its text."""

    text: str
    number: float | None = None
    note: str = ""
    """What must be read with it."""


@dataclass(frozen=True)
class Sheet:
    """A table with a title; `notes` are sentences that belong to it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, so that it is aligned to the right."""
        return any(row[column].number is not None for row in self.rows)


def number(value: float | None, digits: int = 2, note: str = "") -> Cell:
    """A number with its thousands apart; z: no -0.00."""
    return Cell(MISSING) if value is None else Cell(f"{value:z,.{digits}f}", value, note)


def signed(value: float | None) -> Cell:
    """A difference."""
    return Cell(MISSING) if value is None else Cell(f"{value:+z.2f}", value)


def half_width(value: float | None, n: int) -> Cell:
    """Of an interval, which one run does not have."""
    return Cell(MISSING, None, ALONE if n == 1 else "") if value is None else number(value)
