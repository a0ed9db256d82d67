"""Which trainings a choice of published figures takes, each once, and what each is for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from potstill import files, papers
from potstill import recipe as recipes
from potstill.errors import PotstillError, StorageError
from potstill.papers import Absent, Cell, Training
from potstill.recipe import ELSEWHERE, Recipe
from potstill.run import Run

TOLERANCE = 0.5
"""Points between our mean and the published figure that still count as a match."""
NOT_ASKED_FOR = "not among the methods that were asked for"
OF_THE_MACHINE = (
    *ELSEWHERE,
    "precision",
    "compile",
    "channels_last",
    "evaluate_every",
    "store",
    "store.bits",
)
"""Overrides that leave a run comparable: where and how fast it runs, not what is trained."""


def shortened(epochs: int, published: int) -> str:
    """ "10 of 240 epochs", or "" where all are trained."""
    return "" if epochs == published else f"{epochs} of {published} epochs"


@dataclass(frozen=True)
class Setting:
    """One training but for its seed."""

    name: str
    """Its folder."""
    label: str
    """For a person: "KD, resnet56 -> resnet20"."""
    recipe: Recipe
    seeds: tuple[int, ...]
    teacher: str | None
    """Name of the setting that must have finished first, with the first seed."""
    teaches: bool
    epochs: int
    """Of all phases; likewise published."""
    published_epochs: int

    @property
    def shortened(self) -> str:
        """See `shortened`."""
        return shortened(self.epochs, self.published_epochs)


@dataclass(frozen=True)
class Row:
    """A published figure, and what is held against it."""

    cell: Cell
    setting: str | None
    """None where the figure is of a teacher whose weights were given."""
    given: str | None
    """These weights."""
    score: str


@dataclass(frozen=True)
class Plan:
    """What is to be trained, and what it is for."""

    paper: papers.Paper
    out: Path
    settings: Mapping[str, Setting]
    rows: Sequence[Row]
    left_out: Sequence[tuple[Cell, str]]
    """Figures of the same tables and pairs that are not made again, and why."""
    seeds: tuple[int, ...]
    changed: tuple[str, ...]
    """Overrides that make the runs others than the published ones."""
    tolerance: float

    @property
    def runs(self) -> list[tuple[Setting, int]]:
        """Every run: teachers first, then seed by seed all the others."""
        taught = [s for s in self.settings.values() if not s.teaches]
        first = [(s, seed) for s in self.settings.values() if s.teaches for seed in s.seeds]
        return [*first, *((s, seed) for seed in self.seeds for s in taught if seed in s.seeds)]

    def place(self, setting: Setting, seed: int) -> Path:
        """A run's folder."""
        return self.out / setting.name / f"seed{seed}"

    @property
    def missing(self) -> list[tuple[Setting, int]]:
        """The runs that have not finished."""
        return [(s, seed) for s, seed in self.runs if not Run(self.place(s, seed)).finished]


def make(
    paper: str,
    out: Path,
    *,
    table: str | None = None,
    pair: str | None = None,
    methods: Sequence[str] | None = None,
    seeds: int = 1,
    epochs: int | None = None,
    weights: Sequence[str] = (),
    overrides: Sequence[str] = (),
    tolerance: float = TOLERANCE,
) -> Plan:
    """The plan for a paper's figures, or for those of a table, of a pair, of some methods.

    `epochs` shortens every training, milestones, warm-ups and ramps with it. `weights` are of
    teachers that need no training: FILE where the figures have one teacher, or NETWORK=FILE; a
    run's folder will do. `overrides` are for every recipe.

    Raises PotstillError for what fits no figure, RecipeError for settings that fit no recipe.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key in ("seed", "epochs"):
            option = {"seed": "--seeds", "epochs": "--epochs"}[key]
            raise PotstillError(f"{override}: every recipe has its own; use {option}")
    published = papers.load(paper)
    trainings: list[tuple[Cell, Training]] = []
    left_out = []
    chosen = published.select(table, pair, methods)
    for cell in chosen:
        origin = published.origin(cell)
        if isinstance(origin, Absent):
            left_out.append((cell, origin.because))
        else:
            trainings.append((cell, origin))
    if not trainings:
        reasons = "; ".join(dict.fromkeys(because for _, because in left_out))
        raise PotstillError(f"no training here makes these figures: {reasons}")
    if methods is not None:
        beside = {(cell.table, cell.teacher, cell.student) for cell in chosen}
        left_out += [
            (cell, NOT_ASKED_FOR)
            for cell in published.select(table, pair)
            if cell not in chosen and (cell.table, cell.teacher, cell.student) in beside
        ]
    maker = _Maker(out, epochs, overrides, _weights(weights, trainings))
    rows = [maker.row(cell, training, tuple(range(seeds))) for cell, training in trainings]
    keys = {o: o.partition("=")[0] for o in overrides}
    changed = tuple(
        o
        for o, key in keys.items()
        if key not in OF_THE_MACHINE or (key == "store" and "top_k" in o)
    )
    return Plan(
        published, out, maker.settings, rows, left_out, tuple(range(seeds)), changed, tolerance
    )


def _weights(given: Sequence[str], trainings: Sequence[tuple[Cell, Training]]) -> dict[str, str]:
    """Weights by network. Raises PotstillError where it cannot be told whose they are."""
    needed = {t.teacher for _, t in trainings if t.teacher is not None}
    networks = sorted({_network(t) for t in needed})
    found = {}
    for text in given:
        network, equals, path = text.partition("=")
        if not equals or os.path.exists(text):
            if len(networks) != 1:
                raise PotstillError(
                    f"--weights {text}: these figures have {len(networks)} teachers "
                    f"({', '.join(networks) or 'none'}); write --weights NETWORK=FILE"
                )
            network, path = networks[0], text
        if network not in networks:
            raise PotstillError(
                f"--weights {text}: no teacher here is a {network}; teachers: "
                f"{', '.join(networks) or 'none'}"
            )
        if (ways := len({t for t in needed if _network(t) == network})) > 1:
            raise PotstillError(
                f"--weights {text}: the {network} of these figures is trained in {ways} ways, and "
                "one file is one of them; choose figures of one by --table, --pair and --methods"
            )
        if not os.path.exists(path) and not os.path.isdir(path.rpartition(":")[0]):
            raise StorageError(f"--weights {text}: there is no {path}; check the path")
        found[network] = path
    return found


@cache
def _network(teacher: Training) -> str:
    return recipes.load(teacher.recipe, teacher.overrides).students[0].name


class _Maker:
    """Collects settings, so that what several figures need is trained once."""

    def __init__(
        self, out: Path, epochs: int | None, overrides: Sequence[str], weights: Mapping[str, str]
    ) -> None:
        self.out, self.epochs, self.overrides, self.weights = out, epochs, overrides, weights
        self.settings: dict[str, Setting] = {}
        self.identities = {path: _identity(path) for path in weights.values()}

    def row(self, cell: Cell, training: Training, seeds: tuple[int, ...]) -> Row:
        """A figure with the setting that it needs, which is made, and that of its teacher."""
        if training.teacher is None:
            if cell.method == "Teacher" and (path := self.weights.get(_network(training))):
                return Row(cell, None, path, training.score)
            return Row(cell, self._setting(cell, training, seeds), None, training.score)
        network, teacher = _network(training.teacher), None
        path = self.weights.get(network)
        if path is None:
            teacher = self._setting(cell, training.teacher, (0,), teaches=True)
            path = str(self.out / teacher / "seed0")
            self.identities[path] = teacher
        name = self._setting(cell, training, seeds, path=path, teacher=teacher)
        return Row(cell, name, None, training.score)

    def _setting(
        self,
        cell: Cell,
        training: Training,
        seeds: tuple[int, ...],
        teaches: bool = False,
        path: str | None = None,
        teacher: str | None = None,
    ) -> str:
        words = list(training.overrides)
        if path is not None:
            words.append(f"teachers.0.weights={json.dumps(path)}")
        published = _epochs(recipes.load(training.recipe, words))
        if self.epochs is not None:
            words.append(f"epochs={self.epochs}")
        recipe = recipes.load(training.recipe, [*words, *self.overrides])
        name = self._name(recipe)
        there = self.settings.get(name)
        teaches = teaches or (there is not None and there.teaches)
        self.settings[name] = Setting(
            name,
            _label(cell, recipe, teaches) if there is None or teaches else there.label,
            recipe,
            tuple(sorted({*seeds, *(there.seeds if there is not None else ())})),
            teacher,
            teaches,
            _epochs(recipe),
            published,
        )
        return name

    def _name(self, recipe: Recipe) -> str:
        """The same for the same training, wherever its data and its teacher's weights lie."""
        plain = recipe.model_dump(mode="json")
        for key in ("seed", *ELSEWHERE):
            part, _, last = key.rpartition(".")
            of = plain[part] if part else plain
            if of is not None:
                del of[last]
        if plain["store"] is None:  # named as before there were stores
            del plain["store"]
        for teacher in plain["teachers"]:
            teacher["weights"] = self.identities.get(teacher["weights"], teacher["weights"])
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]
        networks = [*recipe.teachers, *recipe.students]
        parts = [recipe.method.name, *(os.path.basename(n.name) for n in networks), digest]
        return "-".join(parts)


def _epochs(recipe: Recipe) -> int:
    return sum(recipes.phase_epochs(recipes.lengths(recipe), recipe.epochs).values())


def _label(cell: Cell, recipe: Recipe, teaches: bool) -> str:
    students = " + ".join(n.name for n in recipe.students)
    if teaches:
        return f"teacher {students}"
    pair = " -> ".join([*(n.name for n in recipe.teachers), students])
    return ", ".join([cell.method, pair, *(f"{k} {v}" for k, v in cell.conditions.items())])


def _identity(path: str) -> str:
    """What weights are, wherever they lie: the sha256 of a file, or of what a run ended with."""
    if os.path.isfile(path):
        return files.sha256_of(path)
    folder = path if os.path.isdir(path) else path.rpartition(":")[0]
    run = Run.open(folder)
    if run.result is None:
        raise PotstillError(f"{folder} has not finished; continue it with --resume")
    ended = json.dumps([run.result["files"], path[len(folder) :]], sort_keys=True)
    return hashlib.sha256(ended.encode()).hexdigest()
