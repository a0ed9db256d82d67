"""Runs into tables, Markdown, and one HTML page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from potstill import files
from potstill.errors import StorageError
from potstill.report import tables, text
from potstill.report.groups import Collected as Collected
from potstill.report.groups import collect as collect
from potstill.run import Run


def write_html(
    paths: Sequence[str | Path] | Collected,
    file: str | Path,
    command: str | None = None,
    made: str | None = None,
) -> None:
    """One page of the runs at or below these paths, whole or not at all; a file there is replaced.

    `command` is what made it, `made` when, now without one. Raises MissingExtra without plotly or
    jinja2, PotstillError where there is no run, StorageError where the file cannot be written.
    """
    from potstill.report import page

    page.require()  # before runs are read
    if not (folder := Path(file).parent).is_dir():
        raise StorageError(f"{file} cannot be written: there is no folder {folder}; make it first")
    found = paths if isinstance(paths, Collected) else collect(paths)
    made = made or datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    files.write_bytes(file, page.render(found, made, command).encode())


def markdown(paths: Sequence[str | Path] | Collected) -> str:
    """Tables and warnings of the runs at or below these paths. Raises PotstillError without any."""
    return text.markdown(paths if isinstance(paths, Collected) else collect(paths))


def print_report(collected: Collected, console: Console) -> None:
    """Every table and warning, for a terminal."""
    console.print(text.for_terminal(tables.every(collected), collected.warnings))


def rows(groups: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """One row for each predictor of each named group of finished runs.

    And one for the mean of the students, where a run has several, and one for each score that an
    earlier phase ended with. "mean" and "std" (n - 1, None for
    a single run) are of the last epoch's test top-1, in percent.
    """
    found = []
    for group, runs in groups.items():
        results = [r.result for r in runs if r.result is not None]
        first = results[0]
        columns = {name: [r["scores"][name]["top1"] for r in results] for name in first["scores"]}
        parameters: dict[str, int | None] = dict(first["parameters"])
        for phase, last in first.get("earlier", {}).items():
            for name in last["scores"]:
                columns[after := f"{name} after {phase}"] = [
                    r["earlier"][phase]["scores"][name]["top1"] for r in results
                ]
                parameters[after] = None
        if (count := len(students(first))) > 1:
            columns[mean := f"mean of {count} students"] = [
                statistics.fmean(students(r)) for r in results
            ]
            parameters[mean] = None
        for name, top1 in columns.items():
            found.append(
                {
                    "name": f"{group} {name}" if len(columns) > 1 else group,
                    "mean": statistics.fmean(top1),
                    "std": statistics.stdev(top1) if len(top1) > 1 else None,
                    "n": len(top1),
                    "parameters": parameters[name],
                    "images_per_second": statistics.median(r["images_per_second"] for r in results),
                }
            )
    return found


def students(result: Mapping[str, Any]) -> list[float]:
    """Top-1 of every student of a run, without ensembles."""
    return [s["top1"] for name, s in result["scores"].items() if name.startswith("student")]


HEAD = ("", "top-1 mean %", "top-1 std", "n", "parameters", "images/s")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's entries as text, under HEAD."""
    return [
        row["name"],
        f"{row['mean']:.2f}",
        "-" if row["std"] is None else f"{row['std']:.2f}",
        str(row["n"]),
        "-" if row["parameters"] is None else f"{row['parameters']:,}",
        f"{row['images_per_second']:,.0f}",
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    made = Table(*HEAD)
    for column in made.columns[1:]:
        column.justify = "right"
    for row in rows:
        made.add_row(*cells(row))
    return made
