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
    "std",
    "±",
    "n",
    "difference",
    "verdict",
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
            title=f"{outcome['paper']}, {sheet.title}",
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
        tolerance = f"{outcome['tolerance']:g} points"
        notes = [
            f"Ours: last epoch, mean over n seeds; ± is the half width of the "
            f"{outcome['confidence']:.0%} t-interval. Matches: n of 3 or more, within {tolerance} "
            f"of the paper, and an interval within {tolerance} of its mean."
        ]
        if any(row["ours_best"] for row in rows):
            notes.append(f"Best: the mean of our runs' best epochs, {NOT_A_RESULT}.")
        whence, why = [_whence(r) for r in rows], [r["why"] for r in rows]
        if len({*whence}) == 1:
            notes.append(f"Published: {whence[0]}.")
        if len({*why}) == 1 and why[0] and not standing(outcome):
            notes.append(f"All of them: {why[0]}.")
        cells = [
            _verdict(row, w if len({*whence}) > 1 else "", y if len({*why}) > 1 else "")
            for row, w, y in zip(rows, whence, why, strict=True)
        ]
        notes += [f"{r['method']}: {r['doubt']}" for r in rows if r["doubt"]]
        yield Sheet(title, HEAD, cells, notes)


def _whence(row: Mapping[str, Any]) -> str:
    """What a published figure is of."""
    runs = row["published_runs"]
    rule = row["published_rule"].replace("not published", "which epoch is not published")
    return f"{rule}; {'how many runs is not published' if runs is None else f'n = {runs}'}"


def _ranks(ranks: Mapping[str, Any]) -> Sheet:
    tau = "no tau" if ranks["tau"] is None else f"Kendall's tau {ranks['tau']:.2f}"
    p = "" if ranks["p"] is None else f", p {ranks['p']:.3f}"
    rows = [
        [
            Cell(m["method"]),
            number(m["ours"]),
            _rank(m["our_rank"]),
            number(m["published"]),
            _rank(m["published_rank"]),
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


def _rank(value: float) -> Cell:
    """1, or 1.5 where two share it."""
    return Cell(f"{value:g}", value)


def _verdict(row: Mapping[str, Any], whence: str, why: str) -> list[Cell]:
    ours, best = row["ours"], row["ours_best"]
    conditions = ", ".join(f"{k} {v}" for k, v in row["conditions"].items())
    own = f"best {best['mean']:.2f}" if best else ""
    n = ours["n"] if ours else 0
    of = f" of {n + row['waiting']}" if row["waiting"] else ""
    return [
        Cell(row["method"], None, ", ".join(filter(None, [row["metric"], conditions]))),
        number(row["published"], 2, whence),
        number(ours and ours["mean"], 2, own),
        number(ours and ours["std"]),
        half_width(ours and ours["half_width"], n),
        Cell(f"{n}{of}", n),
        signed(row["difference"]),
        Cell(row["verdict"], None, why),
    ]
