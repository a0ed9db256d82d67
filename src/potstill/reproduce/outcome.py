"""What finished runs say about the figures that they are held against."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from potstill import comparison, files, papers
from potstill.errors import PotstillError, StorageError
from potstill.reproduce.plan import Plan, shortened
from potstill.run import Run

RECORD = "reproduce.json"
FORMAT = 1
TASK = ("overlap",)
"""Conditions under which methods are compared; others tell one method's variants apart."""


def record(plan: Plan, command: Sequence[str]) -> None:
    """Keep what the runs of a plan are for: all that `outcome` needs beside them."""
    files.write_json(
        plan.out / RECORD,
        {
            "format": FORMAT,
            "paper": plan.paper.name,
            "command": shlex.join(command),
            "tolerance": plan.tolerance,
            "changed": list(plan.changed),
            "settings": {
                s.name: {
                    "method": s.recipe.method.name,
                    "label": s.label,
                    "seeds": list(s.seeds),
                    "epochs": s.epochs,
                    "published_epochs": s.published_epochs,
                    "teacher": s.recipe.teachers[0].weights if s.recipe.teachers else None,
                }
                for s in plan.settings.values()
            },
            "rows": [
                {
                    **asdict(r.cell),
                    "setting": r.setting,
                    "given": r.given,
                    "score": r.score,
                }
                for r in plan.rows
            ],
            "left_out": [{**asdict(cell), "because": why} for cell, why in plan.left_out],
        },
    )


def outcome(directory: Path) -> dict[str, Any]:
    """Verdicts, ranks and paired differences of a folder that `reproduce` works in, as for JSON.

    Runs that are missing are counted as waiting. Raises PotstillError for another folder,
    StorageError for a damaged one.
    """
    if not (directory / RECORD).is_file():
        raise PotstillError(f"{directory} has no {RECORD}: it is not a folder of reproduce")
    kept = files.read_json(directory / RECORD)
    if kept.get("format") != FORMAT:
        raise StorageError(f"{directory / RECORD} is of another version of Potstill")
    paper = papers.load(kept["paper"])
    figures = _Figures(directory, kept)
    rows = [_row(row, paper, figures, kept) for row in kept["rows"]]
    every = dict.fromkeys(r["shortened"] for r in rows if r["shortened"])
    return {
        "paper": paper.name,
        "title": paper.title,
        "command": kept["command"],
        "tolerance": kept["tolerance"],
        "confidence": comparison.CONFIDENCE,
        "shortened": ", ".join(every) or None,
        "changed": kept["changed"],
        "rows": rows,
        "ranks": _ranks(rows),
        "paired": _paired(rows),
        "left_out": _left_out(kept["left_out"]),
    }


def figure(result: Mapping[str, Any], score: str) -> float:
    """One figure of a finished run, in percent; `score` as in `papers.Training`.

    "students" is the mean over them all, "best" the top-1 of the best epoch. Raises PotstillError
    for a score that the run does not have.
    """
    place, _, measure = score.rpartition(".")
    phase, _, predictor = place.rpartition("/")
    try:
        scores = result["earlier"][phase]["scores"] if phase else result["scores"]
        names = [n for n in scores if n.startswith("student")] if predictor == "students" else []
        if measure == "best":
            best = result["best_epoch"]
            return statistics.fmean(best[n]["top1"] for n in names or [predictor])
        return statistics.fmean(scores[n][measure] for n in names or [predictor])
    except KeyError as error:
        raise PotstillError(f"a run has no {score}: there is no {error.args[0]}") from error


class _Figures:
    """Our figures by seed, read off the finished runs of a folder."""

    def __init__(self, directory: Path, kept: Mapping[str, Any]) -> None:
        self.directory, self.settings = directory, kept["settings"]
        self.results: dict[str, dict[int, dict[str, Any]]] = {
            name: dict(self._finished(name, setting["seeds"]))
            for name, setting in self.settings.items()
        }

    def _finished(self, name: str, seeds: Iterable[int]) -> Iterable[tuple[int, dict[str, Any]]]:
        for seed in seeds:
            result = Run(self.directory / name / f"seed{seed}").result
            if result is not None:
                yield seed, result

    def of(self, row: Mapping[str, Any], score: str | None = None) -> dict[int, float]:
        """By seed; the accuracy that weights were given with counts as a single run's."""
        if row["setting"] is not None:
            results = self.results[row["setting"]].items()
            return {seed: figure(result, score or row["score"]) for seed, result in results}
        measured = [
            result["teachers"]["teacher0"]["top1"]
            for name, results in self.results.items()
            if self.settings[name]["teacher"] == row["given"]
            for result in results.values()
            if "teacher0" in result["teachers"]
        ]
        return dict(enumerate(measured[:1]))


def _row(
    row: Mapping[str, Any], paper: papers.Paper, figures: _Figures, kept: Mapping[str, Any]
) -> dict[str, Any]:
    table, published = paper.tables[row["table"]], float(row["value"])
    setting = kept["settings"].get(row["setting"])
    by_seed = figures.of(row)
    ours = comparison.summary(list(by_seed.values())) if by_seed else None
    best = None
    if by_seed and setting is not None and (table.selection or "").startswith("best"):
        place = row["score"].rpartition(".")[0]
        if "/" not in place and not row["score"].endswith(".best"):
            best = comparison.summary(list(figures.of(row, f"{place}.best").values()))
    short = shortened(setting["epochs"], setting["published_epochs"]) if setting is not None else ""
    reasons = [
        *([short] if short else []),
        *([f"settings were changed: {', '.join(kept['changed'])}"] if kept["changed"] else []),
        *([row["doubt"]] if row["doubt"].startswith("suspect") else []),
    ]
    seeds = setting["seeds"] if setting is not None else [0]
    verdict = "waiting"
    if ours is not None:
        verdict = comparison.verdict(ours, published, kept["tolerance"], not reasons)
    return {
        **{k: row[k] for k in ("table", "dataset", "teacher", "student", "method", "metric")},
        "conditions": row["conditions"],
        "our_method": setting["method"] if setting is not None else None,
        "published": published,
        "published_runs": table.runs,
        "published_rule": table.selection or "not published",
        "doubt": row["doubt"],
        "ours": asdict(ours) if ours else None,
        "ours_best": asdict(best) if best else None,
        "difference": ours.mean - published if ours else None,
        "verdict": verdict,
        "why": "; ".join(reasons) or _why(verdict, ours, kept["tolerance"]),
        "shortened": short,
        "runs": [str(figures.directory / row["setting"] / f"seed{k}") for k in by_seed]
        if setting is not None
        else [],
        "given": row["given"],
        "seeds": list(by_seed),
        "by_seed": {str(k): v for k, v in by_seed.items()},
        "waiting": len(seeds) - len(by_seed),
    }


def _why(verdict: str, ours: comparison.Summary | None, tolerance: float) -> str:
    """What an inconclusive figure lacks."""
    if verdict != "inconclusive" or ours is None:
        return ""
    if ours.n < 3:
        return f"n = {ours.n}, and a match needs three runs"
    return f"the interval is wider than ± {tolerance:g} points, or reaches the published figure"


def _groups(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Figures that methods are compared by: of one table, pair, metric and task."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["ours"] is None or row["method"] == "Teacher":
            continue
        task = [f"{k} {v}" for k, v in row["conditions"].items() if k in TASK]
        title = f"{row['table']}: {row['teacher']} -> {row['student']}, {row['dataset']}"
        found.setdefault(", ".join([title, row["metric"], *task]), []).append(row)
    return {title: those for title, those in found.items() if len(those) > 1}


def _variant(row: Mapping[str, Any]) -> str:
    """A method's name, with what tells its variants apart."""
    own = [f"{k} {v}" for k, v in row["conditions"].items() if k not in TASK]
    return ", ".join([row["method"], *own])


def _ranks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for title, those in _groups(rows).items():
        ours = {_variant(r): r["ours"]["mean"] for r in those}
        published = {_variant(r): r["published"] for r in those}
        rank = comparison.kendall(ours, published)
        our_ranks, their_ranks = comparison.ranks(ours), comparison.ranks(published)
        methods = [
            {
                "method": name,
                "ours": ours[name],
                "published": published[name],
                "our_rank": our_ranks[name],
                "published_rank": their_ranks[name],
            }
            for name in sorted(ours, key=lambda name: our_ranks[name])
        ]
        shared = {"title": title, "metric": those[0]["metric"], "methods": methods}
        found.append({**shared, **asdict(rank)})
    return found


def _paired(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every method's difference to plain training, or to the first, over the seeds of both."""
    found = []
    for title, those in _groups(rows).items():
        base = next((r for r in those if r["our_method"] == "vanilla"), those[0])
        for row in those:
            if row is base:
                continue
            first, second = ({int(k): v for k, v in r["by_seed"].items()} for r in (row, base))
            difference = comparison.paired(first, second)
            if difference is not None:
                names = {"title": title, "method": _variant(row), "against": _variant(base)}
                found.append({**names, **asdict(difference), "seeds": list(difference.seeds)})
    return found


def _left_out(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Figures without a training, those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for cell in cells:
        what = f"{cell['table']}: {cell['method']}, {cell['teacher']} -> {cell['student']}"
        by_reason.setdefault(cell["because"], []).append(what)
    return [
        {"what": "; ".join(dict.fromkeys(what)), "because": because}
        for because, what in by_reason.items()
    ]
