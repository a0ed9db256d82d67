"""Folders of runs into groups of one setting each, and what a reader must be warned of."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from potstill import files
from potstill.comparison import Paired, paired
from potstill.data import DATASETS
from potstill.errors import PotstillError, first_line
from potstill.methods import METHODS
from potstill.recipe import ELSEWHERE, Recipe, loads, phase_epochs
from potstill.run import RECIPE, Run, differences

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

REPRODUCED = "reproduce.json"
NEEDED = ("scores", "best_epoch", "teachers", "parameters", "seconds", "images_per_second")
CHANCES = 2.0  # times chance, below which a teacher knows next to nothing
APART = ("seed", *ELSEWHERE)
"""Settings in which the runs of one group may differ: they leave the training the same."""


@dataclass(frozen=True)
class Training:
    """One run as its files tell it; `result` is None while it has not finished."""

    directory: Path
    recipe: Recipe
    text: str
    """The recipe's YAML as it was written."""
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None
    cross_task: Mapping[str, Mapping[str, Any]]
    """What `potstill cross-task` found, by student; "" where the run has one."""

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def settings(self) -> dict[str, Any]:
        """What the recipe sets, by dotted key, without `APART`."""
        found = flat(self.recipe.model_dump(mode="json"))
        return {k: v for k, v in found.items() if v not in (None, []) and k not in APART}

    @property
    def planned(self) -> dict[str, int]:
        """Epochs of each phase."""
        return phase_epochs(METHODS[self.recipe.method.name].lengths, self.recipe.epochs)

    @property
    def schedule(self) -> dict[str, int]:
        """Epochs of each phase in which milestones are counted, before a run was shortened."""
        lengths = METHODS[self.recipe.method.name].lengths
        return phase_epochs(lengths, self.recipe.schedule_epochs, "schedule_epochs")

    @property
    def progress(self) -> str:
        """ "epoch 3 of 5"."""
        return f"epoch {len(self.metrics)} of {sum(self.planned.values())}"

    @property
    def accuracy(self) -> float:
        """Test top-1 after the last epoch in percent, the mean where there are several students."""
        assert self.result is not None
        return over_students({k: s["top1"] for k, s in self.result["scores"].items()})

    @property
    def splits(self) -> set[str]:
        """What was evaluated after each epoch: "test", "validation"."""
        return {r["split"] for r in self.metrics}


@dataclass(frozen=True)
class Group:
    """Runs of one setting, by seed."""

    name: str
    runs: Sequence[Training]
    """The finished ones, one a seed."""
    unfinished: Sequence[Training] = ()

    @property
    def every(self) -> list[Training]:
        """Finished and unfinished."""
        return [*self.runs, *self.unfinished]

    @property
    def recipe(self) -> Recipe:
        return self.every[0].recipe

    @property
    def settings(self) -> dict[str, Any]:
        return self.every[0].settings

    @property
    def accuracies(self) -> dict[int, float]:
        """`Training.accuracy` by seed."""
        return {run.seed: run.accuracy for run in self.runs}


@dataclass(frozen=True)
class Difference:
    """A group minus the one that it is compared with, paired by seed; see `Collected.differences`.

    `paired` is None where they share no seed.
    """

    group: Group
    baseline: Group
    paired: Paired | None
    beside: Sequence[str]
    """Settings other than the method's and the teachers' in which they differ."""


@dataclass(frozen=True)
class Collected:
    """Everything that a report is of."""

    groups: Sequence[Group]
    damaged: Sequence[str] = ()
    """Of each run that cannot be read: what is wrong with it."""
    repeated: Sequence[str] = ()
    """Of each run left out because its group has one of that seed: which, and for which."""
    reproduced: Sequence[Mapping[str, Any]] = ()
    """What `potstill.reproduce.outcome` says of each folder made by `potstill reproduce`."""

    @property
    def finished(self) -> list[Group]:
        """The groups with a finished run."""
        return [g for g in self.groups if g.runs]

    @property
    def differences(self) -> list[Difference]:
        """Each group beside vanilla, or the first one, of those with its data and students."""
        found = []
        for alike in _partition(self.finished, _task).values():
            alone = [g for g in alike if g.recipe.method.name == "vanilla"]
            for group in alike:
                baseline = min(alone or alike[:1], key=lambda g: _unlike(group, g))
                if group not in alone and group is not baseline:
                    pairs = paired(group.accuracies, baseline.accuracies)
                    found.append(Difference(group, baseline, pairs, _beside(group, baseline)))
        return found

    @property
    def warnings(self) -> list[str]:
        """What makes figures worth less than they look, a sentence each."""
        found = [*self.damaged, *self.repeated]
        found += [
            f"{run.directory} has not finished: {run.progress}, in no table"
            for group in self.groups
            for run in group.unfinished
        ]
        told: dict[str, list[str]] = {}
        for group in self.finished:
            for text in _warnings(group):
                told.setdefault(text, []).append(group.name)
        every = len(self.finished)
        for text, names in told.items():
            whose = f"all {every} groups" if len(names) == every > 2 else "; ".join(names)
            found.append(f"{text}: {whose}")
        return [*found, *_seeds_not_shared(self.differences)]


def collect(paths: Sequence[str | Path]) -> Collected:
    """The runs at these paths or anywhere below them, each once.

    Raises PotstillError for a path that does not exist, and where there is no run at all.
    """
    places, reproduced = _places(paths, RECIPE), _places(paths, REPRODUCED)
    if not places and not reproduced:
        raise PotstillError(
            f"no run in {', '.join(map(str, paths))}: nothing there has a {RECIPE}; "
            "potstill train RECIPE --out DIR makes one"
        )
    read, damaged = [], []
    for place in places:
        try:
            read.append(_read(place))
        except (PotstillError, KeyError, TypeError) as error:
            said = first_line(error) if isinstance(error, PotstillError) else f"lacks {error}"
            damaged.append(f"{place} is damaged and left out: {said}")
    groups, repeated = _grouped(read)
    outcomes = []
    if reproduced:
        from potstill.reproduce import outcome

        outcomes = [outcome(place) for place in reproduced]
    return Collected(groups, damaged, repeated, outcomes)


def over_students(values: Mapping[str, float]) -> float:
    """The mean of the students' values, without ensembles; of all where none is a student's."""
    own = [value for name, value in values.items() if name.startswith("student")]
    return statistics.fmean(own or values.values())


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and lists of mappings as one mapping with dotted keys.

    >>> flat({"students": [{"name": "resnet20"}], "data": {"classes": [1, 2]}})
    {'students.0.name': 'resnet20', 'data.classes': [1, 2]}
    """
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {key: value}
    parts = (flat(part, f"{key}.{name}".lstrip(".")) for name, part in value.items())
    return {k: v for part in parts for k, v in part.items()}


def shown(value: Any, width: int = 40) -> str:
    """A setting's value as text; of a long one the end, which tells paths apart."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = json.dumps(value) if isinstance(value, bool | list) else text
    return text if len(text) <= width else f"...{text[-width:]}"


def _places(paths: Sequence[str | Path], name: str) -> list[Path]:
    """Folders at or below the paths that hold a file of this name, each once."""
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise PotstillError(f"{path}: there is no such folder; check the path")
        for folder, below, inside in os.walk(path):
            below.sort()
            if name in inside:
                place = Path(folder)
                found.setdefault(place.resolve(), place)
    return list(found.values())


def _read(place: Path) -> Training:
    run = Run.open(place)
    recipe = loads(run.recipe, source=f"{place}/{RECIPE}", allow_code=True, finished=True)
    result = run.result
    if result is not None:
        _ = [result[key] for key in NEEDED]
        _ = [result["best_epoch"][name]["split"] for name in result["scores"]]
    worth = {
        path.name.removeprefix("cross_task").removesuffix(".json").lstrip("."): files.read_json(
            path
        )
        for path in sorted(place.glob("cross_task*.json"))
    }
    metrics = run.metrics
    _ = [record[key] for record in metrics for key in ("scores", "terms", "split")]
    return Training(place, recipe, run.recipe, run.environment, metrics, result, worth)


def _grouped(runs: Iterable[Training]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first runs, and what was left out."""
    kinds = list(_partition(runs, lambda r: json.dumps(sorted(r.settings.items()))).values())
    groups, repeated = [], []
    names = _names([kind[0] for kind in kinds])
    for name, kind in zip(names, kinds, strict=True):
        kept: dict[int, Training] = {}
        for run in (r for r in kind if r.result is not None):
            if (same := kept.setdefault(run.seed, run)) is not run:
                repeated.append(
                    f"{run.directory} is left out: {same.directory} has the same settings and "
                    f"seed {run.seed}, and a seed counts once"
                )
        unfinished = [r for r in kind if r.result is None]
        groups.append(Group(name, [kept[s] for s in sorted(kept)], unfinished))
    return groups, repeated


def _partition(things: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    parts: dict[K, list[T]] = {}
    for thing in things:
        parts.setdefault(key(thing), []).append(thing)
    return parts


# --- names


def _names(firsts: Sequence[Training]) -> list[str]:
    """A short name for each group, and the settings that differ where two would have the same."""
    names = [_short(run.recipe) for run in firsts]
    settings = [run.settings for run in firsts]
    for alike in _partition(range(len(names)), names.__getitem__).values():
        if len(alike) == 1:
            continue
        keys = _telling([settings[i] for i in alike])
        for i in alike:
            own = [f"{k} {shown(settings[i][k])}" for k in keys if k in settings[i]]
            names[i] = ", ".join([names[i], *own])
    for alike in _partition(range(len(names)), names.__getitem__).values():
        for number, i in enumerate(alike[1:], 2):  # whose values differ where they were cut short
            names[i] += f" (#{number})"
    return names


def _short(recipe: Recipe) -> str:
    """ "kd resnet56 -> resnet20"."""
    students, teachers = (_together(n.name for n in s) for s in (recipe.students, recipe.teachers))
    return " ".join([recipe.method.name, *([teachers, "->"] if teachers else []), students])


def _together(names: Iterable[str]) -> str:
    """ "2 x resnet20 + resnet32"; of a path the last two parts."""
    short = [
        "/".join(Path(n).parts[-2:]) if os.sep in n and ":" not in n.partition(os.sep)[0] else n
        for n in names
    ]
    counts = {name: short.count(name) for name in short}
    return " + ".join(name if n == 1 else f"{n} x {name}" for name, n in counts.items())


def _telling(settings: Sequence[Mapping[str, Any]], few: int = 3) -> list[str]:
    """Keys in which settings differ; of more than a few, those that already tell them apart.

    Of a part that only some have, as p_end, scope and draw of a stochastic teacher, the first key
    that divides the settings as it does.
    """
    keys: dict[tuple[Any, ...], str] = {}
    for key in dict.fromkeys(k for s in settings for k in s):
        if _kinds(settings, [key]) > 1:
            part = key if all(key in s for s in settings) else key.rpartition(".")[0]
            keys.setdefault((part, _division(settings, [key])), key)
    told = [*keys.values()]
    if len(told) <= few:
        return told
    chosen: list[str] = []
    while _kinds(settings, chosen) < len(settings):
        chosen.append(max(told, key=lambda k: _kinds(settings, [*chosen, k])))
    return chosen


def _division(settings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[int, ...]:
    """For each of the settings, the first that has the same values of these keys."""
    values = [json.dumps([s.get(k) for k in keys]) for s in settings]
    return tuple(map(values.index, values))


def _kinds(settings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    return len(set(_division(settings, keys)))


# --- comparisons and warnings


def _task(group: Group) -> str:
    """Groups of one task and student can be compared."""
    data, students = group.recipe.data, sorted({n.name for n in group.recipe.students})
    return json.dumps([data.name, data.classes, data.overlap, students])


def _beside(group: Group, other: Group) -> list[str]:
    """ "10 epochs against 5": settings that are not the method's, the teachers' or the students'.

    Nor those of an optimiser that only one of the methods has.
    """
    one, two = group.every[0], other.every[0]
    lengths = [
        f"{text} {sum(a.values())} against {sum(b.values())}"
        for text, a, b in (
            ("epochs", one.planned, two.planned),
            ("schedule_epochs", one.schedule, two.schedule),
        )
        if sum(a.values()) != sum(b.values())
    ]
    a, b = one.settings, two.settings
    own = {f"optimizers.{name}." for name in {*one.recipe.optimizers} ^ {*two.recipe.optimizers}}
    said = ("method.", "teachers.", "students.", "epochs", "schedule_epochs", *own)
    return lengths + [
        f"{k} {shown(a.get(k, 'not set'))} against {shown(b.get(k, 'not set'))}"
        for k in dict.fromkeys([*a, *b])
        if a.get(k) != b.get(k) and not k.startswith(said)
    ]


def _unlike(group: Group, other: Group) -> tuple[bool, int]:
    """How little a group is the other but for its method: first of all it trains as long."""
    lengths = [sum(g.every[0].planned.values()) for g in (group, other)]
    return lengths[0] != lengths[1], len(_beside(group, other))


def _warnings(group: Group) -> Iterator[str]:
    """Without the group's name, so that what several groups share is said once."""
    first = group.runs[0]
    if len(group.runs) == 1:
        yield "n = 1, so there is no interval"
    results = [run.result or {} for run in group.runs]
    if any(best["split"] == "test" for r in results for best in r["best_epoch"].values()):
        yield "the best epoch was chosen on the test set and is not a result"
    planned, schedule = sum(first.planned.values()), sum(first.schedule.values())
    if planned < schedule:
        yield f"shortened, {planned} of {schedule} epochs"
    for run in group.runs[1:]:
        for difference in differences(first.environment, run.environment):
            seeds = f"seed {first.seed}, then seed {run.seed}"
            yield f"one group, not one environment ({seeds}): {difference.rstrip('.')}"
    best = max(run.accuracy for run in group.runs)
    for name, score in results[0]["teachers"].items():
        elsewhere = results[0].get("teacher_classes", {}).get(name.removesuffix("_drawn"))
        classes, top1 = len(elsewhere) if elsewhere else _classes(first.recipe), score["top1"]
        if classes and top1 < CHANCES * 100 / classes:
            yield (
                f"{name} has {top1:.2f} % top-1, near the {100 / classes:.2f} % of chance; are "
                "these its weights, and its classes in this order?"
            )
        elif top1 < best and not elsewhere:
            yield f"{name} ({top1:.2f} %) is weaker than its student ({best:.2f} %)"


def _classes(recipe: Recipe) -> int | None:
    """How many the student tells apart, where the recipe or the data set says so."""
    info = DATASETS.get(recipe.data.name)
    if recipe.data.classes is not None or info is None or info.classes is None:
        return None if recipe.data.classes is None else len(recipe.data.classes)
    return info.classes if recipe.data.overlap is None else info.classes // 2


def _seeds_not_shared(found: Iterable[Difference]) -> Iterator[str]:
    for d in found:
        ours, theirs = sorted(d.group.accuracies), sorted(d.baseline.accuracies)
        if ours != theirs:
            shared = _seeds(d.paired.seeds) if d.paired else "no seed at all"
            yield (
                f"{d.group.name} has {_seeds(ours)} and {d.baseline.name} {_seeds(theirs)}: their "
                f"difference is over {shared}"
            )


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
