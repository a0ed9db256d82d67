"""What `potstill reproduce` found, as a report's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from potstill.report.sheet import NOT_A_RESULT, Cell, Sheet, half_width, number, signed

HEAD = (
    "method",
    "published",
    "ours",
    "±",
    "n",
    "difference",
    "verdict",
    "why",
    "best epochs",
)


def standing(outcome: Mapping[str, Any]) -> list[str]:
    """What must be read before any verdict: a shortened schedule, changed settings."""
    found = []
    if outcome["shortened"]:
        found.append(f"Shortened: {outcome['shortened']}. These are not the published settings.")
    if outcome["changed"]:
        found.append(f"Changed: {'; '.join(outcome['changed'])}.")
    return found


def sheets(outcome: Mapping[str, Any]) -> list[Sheet]:
    """Ours beside the paper's, a table for each of its tables and pairs; ranks; differences."""
    left_out = [[Cell(x["what"]), Cell(x["because"])] for x in outcome["left_out"]]
    found = [
        *_beside_published(outcome),
        *map(_ranks, outcome["ranks"]),
        *_paired(outcome["paired"]),
        Sheet("Left out", ["what", "because"], left_out),
    ]
    return [sheet for sheet in found if sheet.rows]


def alone(outcome: Mapping[str, Any]) -> list[Sheet]:
    """The same, each with what must be read with it, for where it stands among others."""
    first = standing(outcome)
    return [
        replace(
            sheet,
            title=f"{outcome['title']}: {sheet.title}",
            notes=[*(first if sheet.head is HEAD else []), *sheet.notes],
        )
        for sheet in sheets(outcome)
    ]


def _beside_published(outcome: Mapping[str, Any]) -> Iterator[Sheet]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in outcome["rows"]:
        pair = f"{row['teacher']} -> {row['student']}" if row["teacher"] else row["student"]
        kinds.setdefault(f"{row['table']}: {pair}, {row['dataset']}", []).append(row)
    for title, rows in kinds.items():
        notes = [
            f"Matches: within {outcome['tolerance']:g} points of the paper, over three seeds or "
            f"more, with a {outcome['confidence']:.0%} interval no wider to each side."
        ]
        notes += [f"{r['method']}: {r['doubt']}" for r in rows if r["doubt"]]
        yield Sheet(title, HEAD, [*map(_verdict, rows)], notes)


def _ranks(ranks: Mapping[str, Any]) -> Sheet:
    tau = "no tau" if ranks["tau"] is None else f"Kendall's tau {ranks['tau']:.2f}"
    p = "" if ranks["p"] is None else f", p {ranks['p']:.3f}"
    rows = [
        [
            Cell(m["method"]),
            number(m["ours"]),
            number(m["our_rank"], 1),
            number(m["published"]),
            number(m["published_rank"], 1),
        ]
        for m in ranks["methods"]
    ]
    head = ["method", f"ours, {ranks['metric']}", "our rank", "published", "its rank"]
    return Sheet(f"Ranks: {ranks['title']}", head, rows, [f"{tau}{p}, n = {ranks['n']} methods."])


def _paired(pairs: Sequence[Mapping[str, Any]]) -> Iterator[Sheet]:
    head = ["method", "against", "difference", "±", "n", "p", "seeds"]
    for title in dict.fromkeys(pair["title"] for pair in pairs):
        rows = [
            [
                Cell(p["method"]),
                Cell(p["against"]),
                signed(p["mean"]),
                half_width(p["half_width"], p["n"]),
                number(p["n"], 0),
                number(p["p"], 3),
                Cell(", ".join(map(str, p["seeds"]))),
            ]
            for p in pairs
            if p["title"] == title
        ]
        yield Sheet(f"Differences by seed: {title}", head, rows)


def _verdict(row: Mapping[str, Any]) -> list[Cell]:
    ours, best = row["ours"], row["ours_best"]
    conditions = ", ".join(f"{k} {v}" for k, v in row["conditions"].items())
    runs = "" if row["published_runs"] is None else f"n = {row['published_runs']}, "
    waiting = f"{row['waiting']} runs are missing" if row["waiting"] else ""
    return [
        Cell(row["method"], None, ", ".join(filter(None, [row["metric"], conditions]))),
        number(row["published"], 2, f"{runs}{row['published_rule']}"),
        number(ours and ours["mean"]),
        half_width(ours and ours["half_width"], ours["n"] if ours else 0),
        number(ours["n"] if ours else 0, 0, waiting),
        signed(row["difference"]),
        Cell(row["verdict"]),
        Cell(row["why"]),
        number(best and best["mean"], 2, NOT_A_RESULT if best else ""),
    ]
