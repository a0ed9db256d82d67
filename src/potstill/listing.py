"""Everything that has a name, described for `potstill list`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from potstill.errors import by

if TYPE_CHECKING:
    from potstill.anatomy import Anatomy

WIDTH = 100
"""Columns that a table keeps to."""


def entries(what: str) -> list[dict[str, Any]]:
    """One object for each thing of a kind, "methods" and so on; with "name" and "description"."""
    return {
        "methods": _methods,
        "models": _models,
        "datasets": _datasets,
        "papers": _papers,
        "recipes": _recipes,
    }[what]()


def table(what: str, found: Sequence[dict[str, Any]]) -> list[str]:
    """The lines that `potstill list` prints of these entries."""
    if what == "papers":
        return _of_papers(found)
    if what != "models":
        return columns([(e["name"], e["description"]) for e in found])
    head = ("name", "params", "FLOPs", "input", "description")
    rows = [
        (
            e["name"],
            f"{e['parameters'] / 1e6:.2f} M",
            f"{e['flops'] / 1e6:,.0f} M",
            by(e["input_shape"]),
            e["description"],
        )
        for e in found
    ]
    return [
        *map(_cut, columns([head, *rows], right=(1, 2))),
        "",
        "params with 100 classes; potstill show NAME draws a network with its taps",
        "FLOPs of one image: a multiply-add is two; convolutions and linear layers only",
    ]


def _cut(line: str) -> str:
    if len(line) <= WIDTH:
        return line
    return line[: WIDTH - 3].rpartition(" ")[0].rstrip(" ,;") + "..."


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows as lines, in columns of the widest entry each; `right` are the ones with numbers.

    >>> columns([("a", "10"), ("long", "9")], right=[1])
    ['a     10', 'long   9']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [text.rjust(w) if i in right else text.ljust(w) for i, (text, w) in enumerate(pairs)]
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    return ["  ".join(row).rstrip() for row in aligned]


def _methods() -> list[dict[str, Any]]:
    from potstill.methods import METHODS

    own = ("self", "students", "teachers", "data")
    return [
        {
            "name": name,
            "description": inspect.getdoc(method).partition("\n")[0],  # type: ignore[union-attr]
            "students": list(method.students_needed),
            "teachers": list(method.teachers_needed),
            "epochs": dict(method.lengths),
            "optimizers": list(method.published_optimizers),
            "arguments": {
                p.name: p.default
                for p in inspect.signature(method.__init__).parameters.values()
                if p.name not in own
            },
        }
        for name, method in METHODS.items()
    ]


def _models() -> list[dict[str, Any]]:
    from potstill.anatomy import examine
    from potstill.models import MODELS

    return [as_object(examine(name)) for name in MODELS]


def as_object(found: Anatomy) -> dict[str, Any]:
    """A network as an object for JSON, without its layers."""
    return {
        "name": found.name,
        "description": found.description,
        "parameters": found.parameters,
        "flops": found.flops,
        "macs": found.macs,
        "input_shape": list(found.input_shape),
        "classes": found.classes,
        "taps": {name: asdict(tap) for name, tap in found.taps.items()},
        "blocks": list(found.blocks),
    }


def _datasets() -> list[dict[str, Any]]:
    from potstill.data import DATASETS

    return [{"name": name, **asdict(info)} for name, info in DATASETS.items()]


def _papers() -> list[dict[str, Any]]:
    from potstill import papers

    found = []
    for name in papers.PAPERS:
        paper = papers.load(name)
        absent = [c.table for c in paper.cells if isinstance(paper.origin(c), papers.Absent)]
        tables = [
            {
                "table": key,
                "number": table.number,
                "title": table.title,
                "figures": sum(cell.table == key for cell in paper.cells),
                "reproducible": sum(cell.table == key for cell in paper.cells) - absent.count(key),
                "selection": table.selection,
                "runs": table.runs,
                "settings": table.settings,
            }
            for key, table in paper.tables.items()
        ]
        found.append(
            {
                "name": name,
                "description": paper.title,
                "reference": paper.reference,
                "tables": tables,
            }
        )
    return found


def _of_papers(found: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for paper in found:
        lines += [f"{paper['name']}: {paper['description']}", f"  {paper['reference']}"]
        head = ("table", "figures", "of which", "epoch", "runs", "")
        rows = [
            (
                t["number"],
                str(t["figures"]),
                str(t["reproducible"]),
                t["selection"] or "not published",
                "?" if t["runs"] is None else str(t["runs"]),
                t["title"],
            )
            for t in paper["tables"]
        ]
        lines += [f"  {line}" for line in map(_cut, columns([head, *rows], right=(1, 2, 4)))]
        lines.append("")
    return [
        *lines,
        "potstill reproduce PAPER --table T; of which: those that a training here can make",
        "epoch, runs: what the published figures are of; --json has where the settings come from",
    ]


def _recipes() -> list[dict[str, Any]]:
    from potstill.recipe import shipped

    return [{"name": n, "description": d} for n, d in shipped().items()]
