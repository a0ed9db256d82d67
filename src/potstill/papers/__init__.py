"""Published figures, and the settings of the tables that they stand in.

    papers/NAME.csv     one row a figure: where it stands, what it is, and why it is doubted
    papers/NAME.yaml    what trains a figure: for each table its methods' recipes and overrides, the
                        teacher, the selection rule and the number of runs, as far as they are known

Every row is either a `Training`, which a recipe and overrides make, or a reason why it is none.
Reading a paper loads no torch.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from potstill import recipe
from potstill.errors import PotstillError, did_you_mean

_FOLDER = Path(__file__).parent
PAPERS = ("stochastic-teacher", "afd-online", "mhgd", "sakd", "refilled")


@dataclass(frozen=True)
class Cell:
    """One published figure."""

    table: str
    dataset: str
    teacher: str
    """As the paper calls it, like all names here; in an online pair the second network."""
    student: str
    method: str
    metric: str
    value: str
    """As printed: a number of percent, but for sizes."""
    conditions: Mapping[str, str]
    """Settings that tell this figure from others of its row: {"p_end": "0.9"}."""
    note: str
    doubt: str
    """Why the figure may not be what was published, or meant; "" where nobody doubts it."""

    @property
    def figure(self) -> float:
        """The value as a number. Raises ValueError for a size."""
        return float(self.value)


@dataclass(frozen=True)
class Training:
    """What makes a figure: a recipe with overrides, and what is read off the finished run."""

    recipe: str
    overrides: tuple[str, ...]
    score: str
    """PREDICTOR.MEASURE: "student.top1"; "students" is the mean over all of them, and "embed/" in
    front the end of that earlier phase."""
    teacher: Training | None
    """What makes the teacher, where there is one."""


@dataclass(frozen=True)
class Absent:
    """Why no training of ours makes a figure."""

    because: str


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Source(_Part):
    """How to make figures: a recipe and overrides, in which {student} and so on are filled in."""

    recipe: str
    overrides: list[str] = []
    score: str | None = None
    """In place of the table's for the metric."""
    teacher: _Source | Literal[False] | None = None
    """In place of the table's; false where the method has none."""


class _Case(_Part):
    """Of the figures that agree with all of `where`: more overrides, or why there are none."""

    where: dict[str, str | list[str]]
    """By column, or condition: one value, or several."""
    overrides: list[str] = []
    """Of the student's training."""
    teacher: list[str] = []
    """Of the teacher's."""
    because: str | None = None


class Table(_Part):
    """One published table."""

    number: str
    """What it is asked for by: the paper's number, or ours where it has none."""
    title: str
    selection: str | None
    """Which epoch the figures are of, and on which images it was chosen; null: not published."""
    runs: int | None
    """How many runs a figure is the mean of; null: not published."""
    settings: str
    """Where the settings come from, and which are not recoverable."""
    datasets: dict[str, str]
    """Names of ours by the paper's; likewise networks."""
    networks: dict[str, str]
    scores: dict[str, str]
    """What is read off a run, by metric."""
    methods: dict[str, _Source | dict[str, _Source]]
    """By the paper's name; where one needs different runs for different metrics, by metric."""
    teacher: _Source | None = None
    cases: list[_Case] = []


class _Settings(_Part):
    title: str
    reference: str
    tables: dict[str, Table]


@dataclass(frozen=True)
class Paper:
    """A paper's figures, and what makes them."""

    name: str
    title: str
    reference: str
    tables: Mapping[str, Table]
    cells: Sequence[Cell]

    def origin(self, cell: Cell) -> Training | Absent:
        """What makes a figure of this paper, or why nothing of ours does."""
        table = self.tables[cell.table]
        cases = [case for case in table.cases if _agrees(cell, case.where)]
        for case in cases:
            if case.because is not None:
                return Absent(case.because)
        if cell.method not in table.methods:
            return Absent(f"there is no method {cell.method} here")
        if cell.dataset not in table.datasets:
            return Absent(f"there is no data set {cell.dataset} here")
        for name in (cell.teacher, cell.student):
            if name not in table.networks:
                return Absent(f"there is no network {name} here")
        found = table.methods[cell.method]
        source = found if isinstance(found, _Source) else found.get(cell.metric)
        score = table.scores.get(cell.metric) if source is None else source.score
        score = score or table.scores.get(cell.metric)
        if source is None or score is None:
            return Absent(f"no run of {cell.method} has a {cell.metric}")
        names = {
            "teacher": table.networks[cell.teacher],
            "student": table.networks[cell.student],
            "dataset": table.datasets[cell.dataset],
            **cell.conditions,
        }
        teacher = table.teacher if source.teacher is None else source.teacher
        overrides = [*source.overrides, *(o for case in cases for o in case.overrides)]
        of_teacher = [o for case in cases for o in case.teacher]
        return Training(
            source.recipe.format(**names),
            tuple(_filled(overrides, names)),
            score,
            Training(
                teacher.recipe.format(**names),
                tuple(_filled([*teacher.overrides, *of_teacher], names)),
                "student.top1",
                None,
            )
            if teacher
            else None,
        )

    def select(
        self,
        table: str | None = None,
        pair: str | None = None,
        methods: Iterable[str] | None = None,
    ) -> list[Cell]:
        """The figures of a table, of a pair TEACHER:STUDENT, of some methods; all without these.

        Tables go by name or number, networks by the paper's name or ours, methods by the paper's
        name or ours; case, spaces and punctuation do not count. Raises PotstillError for a name
        that fits no figure.
        """
        cells = list(self.cells)
        if table is not None:
            known = {_plain(k): name for name, t in self.tables.items() for k in (name, t.number)}
            if _plain(table) not in known:
                raise PotstillError(
                    f"{self.name} has no table '{table}'; it has "
                    + ", ".join(f"{t.number} ({name})" for name, t in self.tables.items())
                )
            cells = [c for c in cells if c.table == known[_plain(table)]]
        if pair is not None:
            cells = self._of_pair(cells, pair)
        if methods is not None:
            cells = self._of_methods(cells, list(methods))
        return cells

    def _of_pair(self, cells: Sequence[Cell], pair: str) -> list[Cell]:
        teacher, colon, student = pair.partition(":")
        if not colon:
            raise PotstillError(f"--pair is '{pair}'; write TEACHER:STUDENT, as resnet56:resnet20")

        def ours(cell: Cell, name: str) -> str:
            return self.tables[cell.table].networks.get(name, name)

        def is_it(cell: Cell, given: str, name: str) -> bool:
            return _plain(given) in (_plain(name), _plain(ours(cell, name)))

        found = [c for c in cells if is_it(c, teacher, c.teacher) and is_it(c, student, c.student)]
        if not found:
            there = dict.fromkeys(f"{ours(c, c.teacher)}:{ours(c, c.student)}" for c in cells)
            raise PotstillError(
                f"no figure here is of the pair {pair}{did_you_mean(pair.lower(), there) or ';'} "
                f"pairs: {', '.join(there)}"
            )
        return found

    def _of_methods(self, cells: Sequence[Cell], methods: Sequence[str]) -> list[Cell]:
        kept: set[int] = set()
        for method in methods:
            named = {i for i, c in enumerate(cells) if _plain(c.method) == _plain(method)}
            named = named or {i for i, c in enumerate(cells) if _plain(method) in self._ours(c)}
            if not named:
                there = dict.fromkeys(c.method for c in cells)
                raise PotstillError(
                    f"no figure here is of the method {method}{did_you_mean(method, there) or ';'} "
                    f"methods: {', '.join(there)}"
                )
            kept |= named
        return [c for i, c in enumerate(cells) if i in kept]

    def _ours(self, cell: Cell) -> set[str]:
        """What a figure's method is called here: the recipe's name says it, or an override."""
        origin = self.origin(cell)
        if isinstance(origin, Absent):
            return set()
        for override in origin.overrides:
            if named := re.fullmatch(r"method\.name=(\w+)|method=\{name: (\w+).*", override):
                return {_plain(named[1] or named[2])}
        method = yaml.safe_load(recipe.text_of(origin.recipe))["method"]
        return {_plain(method if isinstance(method, str) else method["name"])}


def _agrees(cell: Cell, where: Mapping[str, str | Sequence[str]]) -> bool:
    for column, wanted in where.items():
        own = cell.conditions.get(column) or getattr(cell, column, "")
        if own not in ([wanted] if isinstance(wanted, str) else wanted):
            return False
    return True


def _filled(overrides: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The overrides with names for {student}, {teacher} ..; other braces are YAML's."""
    return [
        re.sub(r"\{(\w+)\}", lambda m: names.get(m[1], m[0]), override) for override in overrides
    ]


def _plain(name: str) -> str:
    """A name without what nobody remembers: case, spaces, hyphens, remarks in brackets."""
    return re.sub(r"[^a-z0-9+]", "", re.sub(r"\(ours\)", "", name.lower()))


@cache
def load(name: str) -> Paper:
    """A paper by its name. Raises PotstillError for another."""
    if name not in PAPERS:
        hint = did_you_mean(name, PAPERS) or ";"
        raise PotstillError(f"there is no paper '{name}'{hint} papers: {', '.join(PAPERS)}")
    text = (_FOLDER / f"{name}.yaml").read_text("utf-8")
    settings = _Settings.model_validate(yaml.safe_load(text))
    with (_FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        cells = [_cell(row) for row in csv.DictReader(file)]
    return Paper(name, settings.title, settings.reference, settings.tables, cells)


def _cell(row: Mapping[str, Any]) -> Cell:
    conditions = dict(part.split("=") for part in row["conditions"].split(";") if part)
    return Cell(**{**row, "conditions": conditions})
