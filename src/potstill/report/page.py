"""A report as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from potstill import optional
from potstill.report import figures, tables, verdicts
from potstill.report.groups import Collected, Training
from potstill.report.sheet import Sheet

WHY = "an HTML report"


def require() -> tuple[Any, Any]:
    """jinja2 and plotly's offline part. Raises MissingExtra."""
    jinja2 = optional.require("jinja2", "report", WHY)
    return jinja2, optional.require("plotly.offline", "report", WHY)


def render(collected: Collected, made: str, command: str | None = None) -> str:
    """The page's HTML; `made` says when, `command` what made it. Raises MissingExtra."""
    jinja2, plotly = require()
    folder = resources.files("potstill.report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
    )
    environment.filters["arrow"] = figures.arrow
    lines = [line for group in collected.finished for line in tables.of_predictors(group)]
    plots = figures.plots(collected)
    looks = {g.name: figures.Look(g.name, i) for i, g in enumerate(collected.groups)}
    text: str = environment.get_template("page.html").render(
        collected=collected,
        title=_title(collected),
        made=made,
        command=command,
        results=tables.complete(lines),
        absent=tables.absent(lines),
        beside=[s for s in _beside(collected) if s.rows],
        reproduced=[(o, verdicts.standing(o), verdicts.sheets(o)) for o in collected.reproduced],
        plots=plots,
        figures={p.key: p.as_object() for p in plots},
        looks=looks,
        environment=_environment([r for g in collected.groups for r in g.every]),
        command_of=command_of,
        style=(folder / "page.css").read_text("utf-8"),
        script=(folder / "page.js").read_text("utf-8"),
        plotly=plotly.get_plotlyjs(),
    )
    return text


def command_of(run: Training) -> str:
    """The command line that started a run."""
    program, *words = run.environment.get("command", ["not recorded"])
    name = Path(program).name
    return shlex.join(["potstill" if name == "__main__.py" else name, *words])


def _title(collected: Collected) -> str:
    if collected.reproduced:
        return "; ".join(o["title"] for o in collected.reproduced)
    data = dict.fromkeys(g.recipe.data.name for g in collected.groups)
    methods = dict.fromkeys(g.recipe.method.name for g in collected.groups)
    few = ", ".join(methods) if len(methods) <= 6 else f"{len(methods)} methods"
    return f"{few} on {', '.join(data)}"


def _beside(collected: Collected) -> list[Sheet]:
    return [
        tables.differences(collected.differences),
        tables.cross_task(collected),
        tables.unfinished(collected),
    ]


def _environment(runs: Sequence[Training]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Each entry of env.json but the command: its values, and the runs of each, most runs first."""
    keys = dict.fromkeys(k for run in runs for k in run.environment if k != "command")
    found = []
    for key in keys:
        values: dict[str, list[str]] = {}
        for run in runs:
            value = str(run.environment.get(key, "not recorded"))
            values.setdefault(value, []).append(str(run.directory))
        found.append((key, sorted(values.items(), key=lambda item: -len(item[1]))))
    return found
