"""Finished runs into tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from potstill.run import Run


def rows(groups: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """One row for each predictor of each named group of finished runs.

    "mean" and "std" (n - 1, None for a single run) are of the last epoch's test top-1, in percent.
    """
    found = []
    for group, runs in groups.items():
        results = [r.result for r in runs if r.result is not None]
        for predictor in results[0]["scores"]:
            top1 = [r["scores"][predictor]["top1"] for r in results]
            several = len(results[0]["scores"]) > 1
            found.append(
                {
                    "name": f"{group} {predictor}" if several else group,
                    "mean": statistics.fmean(top1),
                    "std": statistics.stdev(top1) if len(top1) > 1 else None,
                    "n": len(top1),
                    "parameters": results[0]["parameters"][predictor],
                    "images_per_second": statistics.median(r["images_per_second"] for r in results),
                }
            )
    return found


HEAD = ("", "top-1 mean %", "top-1 std", "n", "parameters", "images/s")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's entries as text, under HEAD."""
    return [
        row["name"],
        f"{row['mean']:.2f}",
        "-" if row["std"] is None else f"{row['std']:.2f}",
        str(row["n"]),
        f"{row['parameters']:,}",
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
