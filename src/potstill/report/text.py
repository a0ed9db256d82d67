"""A report as text: for a terminal, as Markdown, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Group as Together
from rich.table import Table
from rich.text import Text

from potstill.comparison import Summary
from potstill.report import tables
from potstill.report.groups import Collected
from potstill.report.sheet import ALONE, NOT_A_RESULT, Cell, Sheet

LONGEST_WORD = 16
"""Characters of a word that a column of text makes room for."""


def markdown(collected: Collected) -> str:
    """The report's tables and warnings as Markdown."""
    parts = []
    for sheet in tables.every(collected):
        marks = ["---:" if sheet.numeric(i) else "---" for i in range(len(sheet.head))]
        lines = [sheet.head, marks, *([_in_one(c) for c in row] for row in sheet.rows)]
        table = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)
        parts += [f"## {_escaped(sheet.title)}", table, *map(_escaped, sheet.notes)]
    if collected.warnings:
        warned = "\n".join(f"- {_escaped(w)}" for w in collected.warnings)
        parts += [f"## Warnings: {len(collected.warnings)}", warned]
    return "\n\n".join(parts) + "\n"


def _in_one(cell: Cell) -> str:
    return f"{cell.text} ({cell.note})" if cell.note else cell.text


def _starred(cell: Cell) -> str:
    """Notes below, but those that would fill every row: a star, and n that says it."""
    star = "*" if NOT_A_RESULT in cell.note else ""
    own = cell.note.replace(NOT_A_RESULT, "").replace(ALONE, "").removesuffix(", ")
    return "\n".join(filter(None, [cell.text + star, own]))


def _escaped(text: str) -> str:
    """Markdown that shows the text as it is, in one cell of a table."""
    for mark in "\\`*_<|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def for_terminal(sheets: Iterable[Sheet], warnings: Sequence[str] = ()) -> Together:
    """Tables and warnings, for `rich.console.Console.print`."""
    parts: list[Any] = []
    for sheet in sheets:
        made = Table(title=Text(sheet.title), box=box.SIMPLE_HEAD, collapse_padding=True)
        made.title_justify, made.title_style = "left", "bold"
        for i, head in enumerate(sheet.head):
            numeric = sheet.numeric(i)
            justify: Any = "right" if numeric else "left"
            # numbers keep their width, and text gives way, but not within a word
            words = " ".join([head, *(row[i].text for row in sheet.rows)]).split()
            longest = min(LONGEST_WORD, max(map(len, words), default=0))
            made.add_column(
                Text(head), justify=justify, overflow="fold", no_wrap=numeric, min_width=longest
            )
        for row in sheet.rows:
            made.add_row(*(Text(_starred(cell)) for cell in row))
        notes = [*sheet.notes]
        said = {cell.note for row in sheet.rows for cell in row}
        if any(NOT_A_RESULT in note for note in said):
            notes.append(f"* {NOT_A_RESULT}")
        if ALONE in said:
            notes.append(ALONE)
        parts += [made, *map(Text, notes), Text()]
    parts += [Text(f"warning: {w}", "yellow") for w in warnings]
    return Together(*parts)


def as_json(collected: Collected) -> dict[str, Any]:
    """The report's figures for other programs."""

    def plain(found: Summary | None) -> dict[str, Any] | None:
        return None if found is None else dict(vars(found))

    return {
        "groups": [
            {
                "name": group.name,
                "runs": [{"directory": str(r.directory), "seed": r.seed} for r in group.runs],
                "unfinished": [
                    {"directory": str(r.directory), "seed": r.seed, "progress": r.progress}
                    for r in group.unfinished
                ],
                "predictors": {
                    line.predictor: {
                        "top1": plain(line.top1),
                        "top5": plain(line.top5),
                        "best": plain(line.best),
                        "best_splits": [*line.best_splits],
                        **(line.measures or {}),
                    }
                    for line in (tables.of_predictors(group) if group.runs else [])
                },
                "settings": group.settings,
            }
            for group in collected.groups
        ],
        "differences": [
            {
                "group": d.group.name,
                "baseline": d.baseline.name,
                "paired": None if d.paired is None else {**vars(d.paired)},
                "also_differs_in": [*d.beside],
            }
            for d in collected.differences
        ],
        "reproduced": [*collected.reproduced],
        "warnings": collected.warnings,
    }
