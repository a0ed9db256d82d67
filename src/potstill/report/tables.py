"""What runs found, as a report's tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.comparison import CONFIDENCE, Summary, summary
from potstill.display import duration
from potstill.report import verdicts
from potstill.report.groups import Collected, Difference, Group, over_students
from potstill.report.sheet import MISSING, NOT_A_RESULT, Cell, Sheet, half_width, number, signed


@dataclass(frozen=True)
class Line:
    """What the runs of a group found for one predictor."""

    group: Group
    predictor: str
    top1: Summary
    """Of the last epoch, in percent; likewise top5."""
    top5: Summary | None
    best: Summary | None = None
    """Mean of the runs' best epochs, with the epochs, and the splits that chose them."""
    best_epochs: Sequence[int] = ()
    best_splits: Sequence[str] = ()
    measures: Mapping[str, float] | None = None
    """Means over the runs that have them: ece, agreement, parameters, flops, latency ..."""


def of_predictors(group: Group) -> list[Line]:
    """A line for each predictor of a group's finished runs.

    And one for the mean of the students, where there are several, and one for each score that an
    earlier phase ended with.
    """
    results = [run.result or {} for run in group.runs]
    scores = results[0]["scores"]
    lines = [_of_predictor(group, name, results) for name in scores]
    if (count := sum(name.startswith("student") for name in scores)) > 1:
        top1, top5 = (
            summary([over_students({k: s[top] for k, s in r["scores"].items()}) for r in results])
            for top in ("top1", "top5")
        )
        lines.append(Line(group, f"mean of {count} students", top1, top5))
    for phase, last in results[0].get("earlier", {}).items():
        if not all(phase in r.get("earlier", {}) for r in results):
            continue  # of an earlier version
        for name in last["scores"]:
            found = [r["earlier"][phase]["scores"][name] for r in results]
            top1, top5 = (summary([s[top] for s in found]) for top in ("top1", "top5"))
            lines.append(Line(group, f"{name} after {phase}", top1, top5))
    return lines


def _of_predictor(group: Group, name: str, results: Sequence[Mapping[str, Any]]) -> Line:
    scores, best = ([r[key][name] for r in results] for key in ("scores", "best_epoch"))
    measured = {
        "ece": [s.get("ece") for s in scores],
        "parameters": [r["parameters"].get(name) for r in results],
        "flops": [_cost(r, name, "flops") for r in results],
        "latency": [_cost(r, name, "latency_ms") for r in results],
    }
    for r in results:
        for other, percent in r.get("agreement", {}).get(name, {}).items():
            measured.setdefault(f"agreement {other}", []).append(percent)
    return Line(
        group,
        name,
        summary([s["top1"] for s in scores]),
        summary([s["top5"] for s in scores]),
        summary([b["top1"] for b in best]),
        [b["epoch"] for b in best],
        sorted({b["split"] for b in best}),
        {
            key: statistics.mean(found)  # of integers an integer, where it is one
            for key, values in measured.items()
            if (found := [v for v in values if v is not None])
        },
    )


def _cost(result: Mapping[str, Any], name: str, key: str) -> Any:
    return result.get("cost", {}).get(name, {}).get(key)


def every(collected: Collected) -> list[Sheet]:
    """Every table, the empty ones left out."""
    lines = [line for group in collected.finished for line in of_predictors(group)]
    found = [accuracy(lines), predictions(lines), cost(lines), differences(collected.differences)]
    found += [unfinished(collected), cross_task(collected)]
    for outcome in collected.reproduced:
        found += verdicts.alone(outcome)
    return [sheet for sheet in found if sheet.rows]


def accuracy(lines: Sequence[Line]) -> Sheet:
    """Test accuracy of the last epoch, with what belongs beside it."""
    notes = [
        "Top-1 and top-5 on the test set after the last epoch, in percent: mean over n seeds, "
        f"sample standard deviation, half width of the {CONFIDENCE:.0%} t-interval."
    ]
    return _sheet("Accuracy", {**_NAMES, **_ACCURACY}, lines, notes)


def predictions(lines: Sequence[Line]) -> Sheet:
    """How predictions are beside being right; without rows where nothing was recorded."""
    notes = [
        "Agreement: test images whose first choice is the same. ECE: expected calibration error, "
        "in 15 bins of confidence."
    ]
    found = [x for x in lines if any(_told(cell(x)) for cell in _PREDICTIONS.values())]
    return _sheet("Predictions", {**_NAMES, **_PREDICTIONS}, found, notes)


def cost(lines: Sequence[Line]) -> Sheet:
    """Size and speed."""
    notes = [
        "A multiply-add is two FLOPs; latency is of one image; images/s is the median over "
        "runs, evaluation included; time is the sum of all runs."
    ]
    timed = [line for line in lines if line.measures is not None]
    return _sheet("Cost", {**_NAMES, **_COST}, timed, notes)


def complete(lines: Sequence[Line]) -> Sheet:
    """Accuracy and cost in one table."""
    return _sheet("Results", {**_NAMES, **_MEASURES}, lines, accuracy(lines).notes)


def absent(lines: Sequence[Line]) -> list[str]:
    """Columns for which these runs recorded nothing."""
    return [h for h, cell in _MEASURES.items() if not any(_told(cell(x)) for x in lines)]


def _sheet(
    title: str, columns: Mapping[str, Column], lines: Sequence[Line], notes: Sequence[str]
) -> Sheet:
    cells = {head: [cell(line) for line in lines] for head, cell in columns.items()}
    kept = [head for head, column in cells.items() if any(map(_told, column))]
    return Sheet(title, kept, [*zip(*(cells[head] for head in kept), strict=True)], notes)


def _told(cell: Cell) -> bool:
    return cell.text != MISSING or bool(cell.note)


def _best(line: Line) -> Cell:
    if line.best is None:
        return Cell(MISSING)
    note = NOT_A_RESULT if "test" in line.best_splits else f"on {', '.join(line.best_splits)}"
    epochs = f"epoch {_range(line.best_epochs)}"
    return Cell(f"{line.best.mean:.2f}", line.best.mean, f"{epochs}, {note}")


def _teacher(line: Line) -> Cell:
    """Every teacher's accuracy, of a stochastic one at its expected depth."""
    result = line.group.runs[0].result or {}
    found = {k: s["top1"] for k, s in result["teachers"].items() if not k.endswith("_drawn")}
    if not found:
        return Cell(MISSING)
    note = "of its own classes" if result.get("teacher_classes") else ""
    return Cell(" / ".join(f"{v:.2f}" for v in found.values()), max(found.values()), note)


def _agreement(line: Line) -> Cell:
    found = {
        key.removeprefix("agreement "): value
        for key, value in (line.measures or {}).items()
        if key.startswith("agreement ")
    }
    if not found:
        return Cell(MISSING)
    other = next(iter(found))
    return number(found[other], 2, f"with {', '.join(found)}" if len(found) == 1 else _each(found))


def _each(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def _measure(key: str, digits: int) -> Column:
    return lambda line: number((line.measures or {}).get(key), digits)


def _over_runs(key: str, together: Callable[[Iterable[float]], float]) -> Callable[[Line], float]:
    return lambda line: together([(run.result or {})[key] for run in line.group.runs])


_speed, _seconds = _over_runs("images_per_second", statistics.median), _over_runs("seconds", sum)

Column = Callable[[Line], Cell]

_NAMES: Mapping[str, Column] = {
    "group": lambda line: Cell(line.group.name),
    "predictor": lambda line: Cell(line.predictor),
}
_ACCURACY: Mapping[str, Column] = {
    "top-1": lambda line: number(line.top1.mean),
    "std": lambda line: number(line.top1.std),
    "±": lambda line: half_width(line.top1.half_width, line.top1.n),
    "n": lambda line: number(line.top1.n, 0),
    "top-5": lambda line: number(None if line.top5 is None else line.top5.mean),
    "best epoch": _best,
    "teacher": _teacher,
}
_PREDICTIONS: Mapping[str, Column] = {
    "agreement %": _agreement,
    "ECE %": _measure("ece", 2),
}
_COST: Mapping[str, Column] = {
    "parameters": _measure("parameters", 0),
    "FLOPs": _measure("flops", 0),
    "latency ms": _measure("latency", 2),
    "images/s": lambda line: number(_speed(line), 0),
    "time": lambda line: Cell(duration(_seconds(line)), _seconds(line)),
}
_MEASURES = {**_ACCURACY, **_PREDICTIONS, **_COST}


def differences(found: Sequence[Difference]) -> Sheet:
    """Groups beside their baselines, by shared seed."""
    rows = []
    for d in found:
        p = d.paired
        more = len(d.beside) - 3
        beside = [*d.beside[:3], *([f"{more} more settings"] if more > 0 else [])]
        rows.append(
            [
                Cell(d.group.name),
                Cell(d.baseline.name),
                signed(None if p is None else p.mean),
                Cell(MISSING) if p is None else half_width(p.half_width, p.n),
                number(None if p is None else p.n, 0),
                number(None if p is None else p.p, 3),
                Cell("; ".join(beside) or "nothing"),
            ]
        )
    notes = [
        "Group minus baseline in points of top-1, paired by seed: mean over shared seeds, half "
        f"width of the {CONFIDENCE:.0%} t-interval, p of the paired t-test."
    ]
    head = ["group", "baseline", "difference", "±", "n", "p", "also differs in"]
    return Sheet("Differences", head, rows, notes)


def unfinished(collected: Collected) -> Sheet:
    """Runs that are under way or were interrupted, and how far they are."""
    rows = []
    for group in collected.groups:
        for run in group.unfinished:
            evaluated = [r["scores"] for r in run.metrics if r["scores"]]
            now = {name: s["top1"] for name, s in evaluated[-1].items()} if evaluated else {}
            text = f"{_each(now)} on {run.metrics[-1]['split']}" if now else MISSING
            row = [group.name, str(run.seed), run.progress, text, str(run.directory)]
            rows.append([*map(Cell, row)])
    head = ["group", "seed", "progress", "top-1 so far", "run"]
    return Sheet("Unfinished runs", head, rows, ["--resume continues them."])


def cross_task(collected: Collected) -> Sheet:
    """What `potstill cross-task` found."""
    rows = []
    for group in collected.groups:
        for run in group.every:
            for student, found in run.cross_task.items():
                weights = found.get("weights", {})
                rows.append(
                    [
                        Cell(f"{group.name} {student}".strip()),
                        number(run.seed, 0),
                        number(found["accuracy"]["top1"]),
                        number(found["ncm"]["top1"]),
                        number(found.get("joint", {}).get("harmonic_mean")),
                        number(weights.get("auc"), 3),
                        number(weights.get("test_auc"), 3),
                    ]
                )
    head = ["group", "seed", "top-1", "nearest class mean", "joint accuracy", "AUC", "test AUC"]
    notes = [
        "Joint accuracy is over the classes of teacher and student, the harmonic mean of both "
        "tasks, our own construction. AUC: how well lambda tells classes that the teacher knows."
    ]
    return Sheet("Beside a teacher of other classes", head, rows, notes)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
