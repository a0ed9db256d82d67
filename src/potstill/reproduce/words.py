"""A plan for a person: what is to be run, how long it takes, what is left out and why."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from potstill.display import duration
from potstill.reproduce.carry_out import Estimate
from potstill.reproduce.plan import Plan
from potstill.run import Run


def table(plan: Plan, cost: Estimate) -> Table:
    """A row for each setting, in the order in which they are run."""
    made = Table("run", "epochs", "done", "to do", "each", "in all")
    for column in made.columns[1:]:
        column.justify = "right"
    todo = Counter(setting.name for setting, _ in plan.missing)
    teachers = [s for s in plan.settings.values() if s.teaches]
    for setting in [*teachers, *(s for s in plan.settings.values() if not s.teaches)]:
        count, each = todo[setting.name], cost.seconds.get(setting.name)
        done = sum(Run(plan.place(setting, seed)).finished for seed in setting.seeds)
        made.add_row(
            setting.label,
            setting.shortened or str(setting.epochs),
            str(done),
            str(count),
            "-" if each is None else duration(each),
            "-" if each is None else duration(count * each),
        )
    return made


def remarks(plan: Plan, cost: Estimate, jobs: int) -> list[str]:
    """What the table does not say."""
    missing = plan.missing
    figures = f"{len(plan.rows)} published figure{'s' if len(plan.rows) > 1 else ''}"
    lines = [f"{plan.paper.title}: {figures}; runs go to {plan.out}"]
    tables = {row.cell.table for row in plan.rows}
    for name in tables:
        published = plan.paper.tables[name]
        runs = "not published" if published.runs is None else str(published.runs)
        lines.append(
            f"table {published.number} ({published.title}): published figures are of "
            f"{published.selection or 'an epoch that is not published'}, runs: {runs}; ours are "
            f"of the last epoch, runs: {len(plan.seeds)}"
        )
    given = dict.fromkeys(
        t.weights
        for s in plan.settings.values()
        for t in s.recipe.teachers
        if s.teacher is None and t.weights is not None
    )
    lines += [f"teacher from {path}" for path in given]
    if any(s.shortened for s in plan.settings.values()):
        lines.append("shortened schedules: every figure is marked, and none is a verdict")
    if plan.changed:
        lines.append(f"changed settings, so none is a verdict: {', '.join(plan.changed)}")
    left_out = Counter(because for _, because in plan.left_out)
    lines += [f"left out ({count}): {because}" for because, count in left_out.items()]
    by_fault: dict[str, list[str]] = {}
    for name, fault in cost.faults.items():
        by_fault.setdefault(fault, []).append(plan.settings[name].label)
    lines += [f"not tried: {'; '.join(names)}: {fault}" for fault, names in by_fault.items()]
    if not missing:
        lines.append("nothing is missing")
    else:
        at_once = f", {jobs} at once" if jobs > 1 else ""
        about = f": about {duration(cost.left)}" if cost.seconds else ""
        lines.append(f"{len(missing)} run{'s' if len(missing) > 1 else ''} to do{at_once}{about}")
    return lines
