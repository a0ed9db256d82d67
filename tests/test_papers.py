"""Every published figure is a training of ours, or says why it is none."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from potstill import recipe
from potstill.data import DATASETS
from potstill.errors import PotstillError
from potstill.methods import METHODS
from potstill.models import MODELS
from potstill.papers import PAPERS, Absent, Cell, Paper, Training, load
from tests.toys import ToyImages, toy_net

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "src" / "potstill" / "recipes"
SPECS = ROOT.parent / "shared" / "specs"


def each(*names: str) -> pytest.MarkDecorator:
    """A test of each of these papers, all of one paper by one worker, which resolves it once."""
    group = pytest.mark.xdist_group
    return pytest.mark.parametrize("name", [pytest.param(n, marks=group(n)) for n in names])


every_paper = each(*PAPERS)


@cache
def resolved(training: Training) -> recipe.Recipe:
    """The recipe of a training, with weights in place of those that would be trained first."""
    weights = ["teachers.0.weights=x"] if training.teacher else []
    return recipe.load(training.recipe, [*training.overrides, *weights])


@cache
def as_yaml(training: Training) -> str:
    return resolved(training).to_yaml()


def trainings(paper: Paper) -> Iterator[tuple[Cell, Training]]:
    """The figures that something of ours makes, with what makes them."""
    for cell in paper.cells:
        if isinstance(origin := paper.origin(cell), Training):
            yield cell, origin


def said(cell: Cell) -> str:
    return f"table {cell.table}: {cell.teacher} -> {cell.student}, {cell.method} {cell.metric}"


def none_of(faults: Sequence[str]) -> None:
    assert not faults, "\n".join([f"{len(faults)} figures:", *dict.fromkeys(faults)])


# --- every figure


@every_paper
def test_every_figure_is_a_recipe_with_overrides_or_says_why_not(name: str) -> None:
    """What is made loads, of names that exist; a note may say only what the columns of online AFD
    are: another method than the recipe's, without its optimisers and at its temperature.
    """
    paper, faults = load(name), []
    for cell in paper.cells:
        origin = paper.origin(cell)
        if isinstance(origin, Absent):
            if not origin.because:
                faults.append(f"{said(cell)}: no reason")
            continue
        for training in filter(None, (origin, origin.teacher)):
            try:
                found = resolved(training)
            except PotstillError as error:
                faults.append(f"{said(cell)}: {error}")
                continue
            networks = {n.name for n in (*found.students, *found.teachers)}
            if found.method.name not in METHODS or not networks <= MODELS.keys():
                faults.append(f"{said(cell)}: {found.method.name}, {networks}")
            if found.data.name not in DATASETS or found.data.name == "digits":
                faults.append(f"{said(cell)}: {found.data.name}")
            if bool(found.teachers) != bool(training.teacher):
                faults.append(f"{said(cell)}: {training.recipe} and {training.teacher}")
            if found.schedule_epochs != found.epochs:
                faults.append(f"{said(cell)}: milestones of {found.schedule_epochs} epochs")
            notes = [
                note
                for note in found.notes
                if name != "afd-online" or not re.match(r"method\.name=\w+ (drops|keeps) ", note)
            ]
            faults += [f"{said(cell)}: {note}" for note in notes]
    none_of(faults)


BLANK = "the table has no figure there"
NO_METHOD = "a method that Potstill does not have"
ABSENT: dict[str, dict[str, int]] = {
    "stochastic-teacher": {
        "a row with the four figures of MobileNet to VGG 13, so not this pair's": 4,
        "a row with the four figures of ResNet 110 to ResNet 32, so not this pair's": 4,
    },
    "afd-online": {"a mean over the seven pairs of the table, not a figure of one training": 9},
    "mhgd": {NO_METHOD: 4},
    "sakd": {
        BLANK: 79,
        "a size, not the result of a training; `potstill list models` has the sizes": 60,
        "semantic segmentation, which is not image classification": 12,
        "a column whose head and rows are misplaced, so not this pair's (see its doubt)": 9,
        NO_METHOD: 1,
    },
    "refilled": {},
}
FIGURES = {"stochastic-teacher": 132, "afd-online": 215, "mhgd": 82, "sakd": 411, "refilled": 292}


@every_paper
def test_so_many_figures_are_not_trained_here(name: str) -> None:
    paper = load(name)
    origins = [paper.origin(cell) for cell in paper.cells]
    assert len(origins) == FIGURES[name]
    assert Counter(o.because for o in origins if isinstance(o, Absent)) == ABSENT[name]


@every_paper
def test_what_is_trained_has_a_number_to_compare_with(name: str) -> None:
    for cell, _ in trainings(load(name)):
        assert 25 < cell.figure < 100, said(cell)


@pytest.mark.parametrize(
    "name, doubtful",
    [("stochastic-teacher", 12), ("afd-online", 35), ("mhgd", 0), ("sakd", 17), ("refilled", 0)],
)
def test_so_many_figures_are_doubted(name: str, doubtful: int) -> None:
    assert sum(1 for cell in load(name).cells if cell.doubt) == doubtful


@every_paper
def test_the_figures_are_those_of_the_specification(name: str) -> None:
    """In its order. Its `extra` was taken apart: into conditions, a note, a doubt, and in the
    paper on stochastic teachers which of the two networks a figure is of.
    """
    file = SPECS / f"results-{name}.csv"
    if not file.exists():
        pytest.skip(f"{file.name} is not beside the repository")
    with file.open(encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    cells = load(name).cells
    assert len(cells) == len(rows)
    for cell, row in zip(cells, rows, strict=True):
        extra, metric = row["extra"], row["metric"]
        if net := re.search(r"\bnet=(\d)", extra):
            metric = f"net{net[1]}"
        conditions = {}
        if p_end := re.search(r"Pend=([\d.]+)", extra):
            conditions["p_end"] = p_end[1]
        if (share := re.search(r"overlap=(\d+)%", extra)) and "standard KD" not in extra:
            conditions["overlap"] = f"{int(share[1]) / 100:g}"
        if k_hat := re.search(r"K_hat=(\w+)", extra):
            conditions["k_hat"] = k_hat[1].replace("inf", "null")
        if heads := re.search(r"num_head=(\d+)", extra):
            conditions["heads"] = heads[1]
        names = [row[key] for key in ("table", "dataset", "teacher", "student", "method", "value")]
        own = [cell.table, cell.dataset, cell.teacher, cell.student, cell.method, cell.value]
        assert (own, cell.metric, cell.conditions) == (names, metric, conditions)
        assert bool(cell.doubt) == bool(
            re.search(
                r"suspect|ocr-doubtful|student baseline reads|the fuller readme prints", extra
            )
        )


# --- networks, methods and conditions

RENAMED = {  # where the names do not tell
    "MobileNet": "mobilenetv1",
    "MobileNet-1": "mobilenetv1_imagenet",
    "MobileNet-0.75": "mobilenetv1_x0_75_imagenet",
    "MobileNet-0.5": "mobilenetv1_x0_5_imagenet",
    "MobileNet-0.25": "mobilenetv1_x0_25_imagenet",
    "VGG-teacher (VGG16 style)": "vgg_teacher_mhgd",
    "VGG-student": "vgg_student_mhgd",
    "VGG (modified)": "vgg_bn_mhgd",
    "MobileNet-student": "mobilenet_mhgd",
    "ResNet-student": "resnet_mhgd",
    "ResNet n=5": "resnet32x4",  # 6 n + 2 layers of widths 32, 64, 128, 256
    "ResNet n=1": "resnet8x4",
    "none": "none",  # the student of a teacher's own row
}


@every_paper
def test_networks_are_what_the_paper_calls_them(name: str) -> None:
    """ "WRN 28-10" is wrn_28_10; the variants are those of the paper and of the images' size."""
    for table in load(name).tables.values():
        large = {"folder", "cub200"} & set(table.datasets.values())
        for theirs, ours in table.networks.items():
            if theirs in RENAMED:
                assert ours == RENAMED[theirs]
                continue
            plain, _, variant = re.sub(r"_(imagenet|gkd|mhgd)$", r"|\1", ours).partition("|")
            assert plain.replace("_", "") == re.sub(r"[ -]", "", theirs).lower()
            wanted = {"mhgd": "mhgd", "refilled": "gkd"}.get(name, "imagenet" if large else "")
            standard = (name, table.number) == ("refilled", "3")
            assert variant == ("" if standard else wanted), theirs


def network_of(name: str, cell: Cell) -> str:
    """Whose accuracy a figure is, by the paper's name: of a mean or an ensemble, the student."""
    second = {"stochastic-teacher": "net1", "afd-online": "net2"}.get(name)
    if "teacher" in cell.method.lower() or cell.metric == second:
        return cell.teacher
    return cell.student


@every_paper
def test_the_networks_of_a_training_are_those_of_the_figure(name: str) -> None:
    paper, faults = load(name), []
    for cell, training in trainings(paper):
        ours = paper.tables[cell.table].networks
        found, teacher = resolved(training), training.teacher
        students, teachers = ([n.name for n in those] for those in (found.students, found.teachers))
        scored = re.search(r"student(\d)\.", training.score)
        if teacher:
            made = [n.name for n in resolved(teacher).students]
            good = (students, teachers, made) == (
                [ours[cell.student]],
                [ours[cell.teacher]],
                [ours[cell.teacher]],
            )
        elif len(students) == 1:
            good = students == [ours[network_of(name, cell)]]
        else:
            pair = [ours[cell.student], ours[cell.teacher]]
            good = sorted(students) == sorted(pair) or students == pair[:1] * 3
            good = good and (len(students) == 3) == (name == "afd-online" and cell.table == "5")
            if scored:
                good = good and students[int(scored[1])] == ours[network_of(name, cell)]
                # of two alike, the first is the paper's first
                number = {"net1": "0", "net2": "1"}.get(cell.metric, scored[1])
                good = good and scored[1] == number
        if not good or found.data.name != paper.tables[cell.table].datasets[cell.dataset]:
            faults.append(f"{said(cell)}: {students}, {teachers}, {training.score}")
    none_of(faults)


CROSS_TASK = {"RKD": "rkd", "AML": "aml", "Overhaul": "ofd", "Jacobian": "jacobian"}
METHOD: dict[str, dict[str, str]] = {
    "stochastic-teacher": {"independent": "vanilla", "KD": "kd", "AT": "at", "ML": "dml"},
    "afd-online": {
        "vanilla": "vanilla",
        "pre-trained teacher": "vanilla",
        "L1": "l1",
        "L1+KD": "l1_kd",
        "DML": "dml",
        "ONE": "one",
        "KD (online ensemble)": "ensemble_kd",
    },
    "mhgd": {"Soft-logits": "kd", "KD-SVD": "kdsvd", "KD-SVDF": "kdsvdf"},
    "sakd": {"SAKD(Ours)": "sakd", "AFD": "afd_attention"},
    "refilled": {**CROSS_TASK, "FitNet": "fitnet", "KD": "kd", "AT": "at"},
}


def method_of(name: str, cell: Cell) -> tuple[str, dict[str, Any]]:
    """What a figure's method is called here, and the arguments that make it that one."""
    base, _, variant = cell.method.partition("+stochastic" if "stoch" in name else "_")
    if name == "afd-online" and cell.method.startswith("AFD"):
        return "afd_online", {
            "alpha": 0 if "w/o KD" in cell.method else 1,
            "adversarial": "w/o adv" not in cell.method,
            "temperature": 3,
        }
    if cell.method == "L1+KD (offline)":
        return ("vanilla", {}) if cell.metric == "net2" else ("l1_kd", {"temperature": 3})
    if name == "refilled" and base.startswith("REFILLED"):
        stage1 = base.endswith("stage 1")
        return "refilled", {"variant": "emb" if stage1 else variant.lower() or "full"}
    if base in ("Teacher", "Student", "Vanilla"):
        return "vanilla", {}
    ours = METHOD[name].get(base, base.lower())
    arguments: dict[str, Any] = {}
    if name == "afd-online" and ours != "vanilla" and ours != "l1":
        arguments = {"temperature": 3}
    if cell.method == "Soft-logits":
        arguments = {"gamma": 0.7, "alpha": 0.3, "temperature": 4, "t_squared": False}
    if ours == "kd" and name in ("sakd", "stochastic-teacher"):
        arguments = {"gamma": 0.1, "alpha": 0.9, "temperature": 4, "t_squared": True}
    if ours == "at":
        four = (name, cell.table) == ("sakd", "ImageNet") or name == "refilled"
        taps = None if four else ["stage1", "stage2", "stage3"]
        arguments = {"beta": 1000, "gamma": 1, "alpha": 0, "taps": taps}
    if ours == "dml" and name == "stochastic-teacher":
        arguments = {"mode": "synchronous", "temperature": 1, "alpha": 1}
    if ours == "sakd":
        large = cell.table == "ImageNet"
        arguments = {"beta": 100 if large else 200, "alpha": 0.9, "temperature": 4}
        taps = [f"stage{i}" for i in (1, 2, 3, 4)] if large else None
        arguments |= {"connectors": not large, "taps": taps}
    return ours, arguments


@every_paper
def test_the_method_of_a_training_is_that_of_the_figure(name: str) -> None:
    """And teachers are trained alone."""
    faults = []
    for cell, training in trainings(load(name)):
        method, arguments = method_of(name, cell)
        own = resolved(training).method.model_dump()
        if own["name"] != method or {k: own[k] for k in arguments} != arguments:
            faults.append(f"{said(cell)}: {own}")
        if training.teacher and resolved(training.teacher).method.name != "vanilla":
            faults.append(f"{said(cell)}: {training.teacher}")
    none_of(faults)


@every_paper
def test_conditions_arrive_in_the_recipe(name: str) -> None:
    """And nothing is stochastic, or of half the classes, where none says so."""
    faults = []
    for cell, training in trainings(load(name)):
        found, conditions = resolved(training), dict(cell.conditions)
        teacher = resolved(training.teacher) if training.teacher else None
        p_end, overlap = conditions.pop("p_end", None), conditions.pop("overlap", None)
        depths = [n.stochastic and n.stochastic.model_dump() for n in found.students]
        scope = "identity_only" if "partial" in cell.method else "full"
        depth = p_end and {"p_end": float(p_end), "scope": scope, "draw": "batch"}
        good = True
        if teacher:
            taught = [n.stochastic and n.stochastic.model_dump() for n in found.teachers]
            made = [n.stochastic and n.stochastic.model_dump() for n in teacher.students]
            good = (depths, taught, made) == ([None], [depth], [depth])
        else:
            good = depths == [depth] * len(depths)
        good = good and found.data.overlap == (None if overlap is None else float(overlap))
        if teacher:
            good = good and teacher.data.overlap == (None if overlap is None else 1)
        if "k_hat" in conditions:
            wanted = conditions.pop("k_hat")
            own = found.method.model_dump()["k_hat"]
            good = good and own == (None if wanted == "null" else int(wanted))
        if (heads := conditions.pop("heads", "0")) != "0":
            good = good and found.method.model_dump()["heads"] == int(heads)
        elif found.method.name == "mhgd":
            good = good and found.method.model_dump()["heads"] == 8
        if not good or conditions:
            faults.append(f"{said(cell)} {dict(cell.conditions)}: {training.overrides}")
    none_of(faults)


@cache
def predictors(method: str, students: int, teachers: int) -> dict[str, set[str]]:
    """What predicts at the end of each phase, and under "" in the end, of toy networks."""
    nets = [toy_net(i) for i in range(students + teachers)]
    spec = ToyImages().spec(teachers)
    arguments = {"crd": {"negatives": 16}}.get(method, {})
    built = METHODS[method](nets[:students], nets[students:], spec, **arguments)
    ends = {p.name: set((p.predictors or built.predictors)()) for p in built.phases()}
    return {**ends, "": set(built.predictors())}


@every_paper
def test_the_score_of_a_figure_is_measured_in_its_training(name: str) -> None:
    faults = []
    for cell, origin in trainings(load(name)):
        for training in filter(None, (origin, origin.teacher)):
            found = resolved(training)
            there = predictors(found.method.name, len(found.students), len(found.teachers))
            phase, _, score = training.score.rpartition("/")
            predictor, _, measure = score.partition(".")
            known = there[phase] | ({"students"} if "student0" in there[phase] else set())
            if predictor not in known or measure not in ("top1", "top5", "best"):
                faults.append(f"{said(cell)}: {training.score}, of {known}")
    none_of(faults)


def test_what_is_read_off_a_run_is_what_the_metric_says() -> None:
    found = {
        (name, cell.metric, training.score)
        for name in PAPERS
        for cell, training in trainings(load(name))
    }
    assert found == {
        ("stochastic-teacher", "net1", "student.top1"),  # alone
        ("stochastic-teacher", "net2", "student.top1"),
        ("stochastic-teacher", "net1", "student0.top1"),
        ("stochastic-teacher", "net2", "student1.top1"),
        ("afd-online", "net1", "student.top1"),
        ("afd-online", "net2", "student.top1"),
        ("afd-online", "net1", "student0.top1"),
        ("afd-online", "net2", "student1.top1"),
        ("afd-online", "avg2", "students.top1"),
        ("afd-online", "avg3", "students.top1"),
        ("afd-online", "ens", "ensemble.top1"),
        ("mhgd", "top1", "student.top1"),
        ("mhgd", "top1_last", "student.top1"),
        ("mhgd", "top1_best", "student.best"),
        ("mhgd", "top1_last", "student1.top1"),  # DML, whose teacher is the first
        ("mhgd", "top1_best", "student1.best"),
        ("sakd", "top1", "student.top1"),
        ("sakd", "top5", "student.top5"),
        ("refilled", "mean accuracy (%)", "student.top1"),
        ("refilled", "test accuracy (%)", "student.top1"),
        ("refilled", "NCM accuracy after stage 1 (%)", "embed/ncm.top1"),
    }


# --- settings

Plan = tuple[float, float, bool, float, list[float], float, Any, int]


def plan(found: recipe.Recipe) -> Plan:
    """lr, momentum, Nesterov, decay, milestones, factor, epochs, batch."""
    sgd: Any = found.optimizers["default"]
    assert (sgd.name, sgd.schedule.name) == ("sgd", "steps")
    steps = sgd.schedule
    return (
        sgd.lr,
        sgd.momentum,
        sgd.nesterov,
        sgd.weight_decay,
        steps.milestones,
        steps.factor,
        found.epochs,
        found.data.batch_size,
    )


def published(name: str, cell: Cell, method: str, teaches: bool) -> Plan:
    """What the specifications say, or our choice where they leave one; by hand."""
    number = load(name).tables[cell.table].number
    if name == "stochastic-teacher":  # Zhang et al., CVPR 2018
        return (0.1, 0.9, True, 5e-4, [60, 120, 180], 0.1, 200, 64)
    if name == "afd-online":
        if number == "6":
            return (0.1, 0.9, False, 1e-4, [30, 60], 0.1, 90, 256)
        return (0.1, 0.9, False, 1e-4, [150, 225], 0.1, 300, 128)
    if name == "refilled":
        phases: Any = {"embed": 200, "distill": 1 if number == "4" else 200}
        epochs = phases if method == "refilled" else 200
        if number == "3":  # Heo et al., ICCV 2019
            return (0.1, 0.9, True, 5e-4, [100, 150], 0.1, epochs, 128)
        batch = 128 if teaches else 256
        return (0.1, 0.9, True, 5e-4, [50, 100, 150], 0.2, epochs, batch)
    if name == "mhgd":
        first = {"fsp": {"init": 40}, "ab": {"init": 40}, "mhgd": {"heads": 20}}.get(method, {})
        if number == "5":
            first = {"heads": 40} if method == "mhgd" else first
            epochs = {**first, "distill": 100} if first else 100
            return (0.1, 0.9, True, 5e-4, [30, 60, 80], 0.1, epochs, 128)
        if teaches and "VGG" not in cell.teacher:
            return (0.1, 0.9, True, 5e-4, [60, 120, 160], 0.2, 200, 128)
        if teaches or cell.student == "VGG-student":
            epochs = {**first, "distill": 200} if first else 200
            return (0.01, 0.9, True, 5e-4, [100, 150], 0.1, epochs, 128)
        epochs = {**first, "distill": 100} if first else 100
        return (0.1, 0.9, True, 5e-4, [30, 60, 80], 0.2, epochs, 128)
    if number == "4":  # SAKD's, of ImageNet
        return (0.1, 0.9, True, 1e-4, [30, 60, 90], 0.1, 100, 256)
    rate = 0.01 if cell.student == "MobileNetV2" and not teaches else 0.05
    if method == "sakd":
        return (rate, 0.8, True, 5e-4, [150, 180, 210], 0.1, 240, 64)
    if method == "reviewkd":
        rate = 0.01 if rate == 0.01 else 0.1
        return (rate, 0.9, True, 5e-4, [151, 181, 211], 0.1, 240, 128)
    if method == "norm":
        return (rate, 0.9, False, 5e-4, [151, 181, 211], 0.1, 241, 64)
    return (rate, 0.9, False, 5e-4, [150, 180, 210], 0.1, 240, 64)


@every_paper
def test_the_schedule_of_every_training_is_the_published_one(name: str) -> None:
    faults = []
    for cell, training in trainings(load(name)):
        alone = "teacher" in cell.method.lower()
        for made, teaches in ((training, alone), (training.teacher, True)):
            if made is None:
                continue
            found = resolved(made)
            wanted = published(name, cell, found.method.name, teaches)
            if plan(found) != wanted:
                faults.append(f"{said(cell)}: {plan(found)}, not {wanted}")
    none_of(faults)


def first(name: str, **wanted: str) -> recipe.Recipe:
    """The recipe of a paper's first figure that agrees with all of `wanted`."""
    for cell, training in trainings(load(name)):
        if all(getattr(cell, key) == value for key, value in wanted.items()):
            return resolved(training)
    raise AssertionError(wanted)


@pytest.mark.parametrize("method", ["AFD", "AFD w/o KD (adv only)"])
def test_adam_moves_features_and_discriminators_of_online_afd(method: str) -> None:
    found: Any = first("afd-online", method=method, table="2")
    assert list(found.optimizers) == ["default", "features", "discriminators"]
    for update in ("features", "discriminators"):
        adam = found.optimizers[update]
        assert (adam.name, adam.lr, adam.weight_decay) == ("adam", 2e-5, 0.1)
        assert (adam.schedule.milestones, adam.schedule.factor) == ([75, 150], 0.1)


def test_images_of_mhgds_tables_are_pixels_less_one_half() -> None:
    """Padded by 4 on CIFAR-100 (the set's default) and by 8 on Tiny-ImageNet, where teachers' are
    too; the public code's have mean and std by channel, and reflected borders.
    """
    for cell, training in trainings(load("mhgd")):
        for data in (resolved(t).data for t in (training, training.teacher) if t):
            code = cell.table == "code-readme"
            assert (data.mean, data.std) == ((None, None) if code else ([0.5] * 3, [1.0] * 3))
            assert data.pad_mode == ("reflect" if code else None)
            assert data.padding == (8 if cell.table == "2" else None)
            assert data.name == ("tiny-imagenet" if cell.table == "2" else "cifar100")


@pytest.mark.parametrize(
    "table, method, update, lr, decay",
    [
        ("1", "MHGD", "heads", 0.1, 5e-4),
        ("1", "FSP", "init", 0.01, 5e-4),  # VGG's first rate
        ("3", "AB", "init", 0.1, 5e-4),
        ("3", "MHGD", "heads", 0.1, 5e-4),
        ("code-readme", "AB", "init", 0.1, 5e-4),
        ("code-readme", "MHGD", "heads", 0.1, 1e-3),
    ],
)
def test_first_phases_of_mhgds_tables(
    table: str, method: str, update: str, lr: float, decay: float
) -> None:
    found: Any = first("mhgd", table=table, method=method)
    sgd = found.optimizers[update]
    assert (sgd.lr, sgd.momentum, sgd.nesterov, sgd.weight_decay) == (lr, 0.9, True, decay)
    assert sgd.schedule.name == "constant"


def test_first_phases_of_refilled_are_a_cosine_to_a_hundredth() -> None:
    for cell, training in trainings(load("refilled")):
        if (found := resolved(training)).method.name == "refilled":
            sgd: Any = found.optimizers["embed"]
            assert (sgd.lr, sgd.schedule.name, sgd.schedule.final) == (0.1, "cosine", 0.1), cell


def test_sakd_starts_its_optimiser_afresh_and_reflects_borders() -> None:
    for table, borders in (("same architecture", "reflect"), ("ImageNet", None)):
        found: Any = first("sakd", table=table, method="SAKD(Ours)")
        assert found.optimizers["default"].fresh_at_milestones
        assert found.method.teacher_statistics == "batch"
        assert found.data.pad_mode == borders
    assert (found.data.name, found.data.root, found.data.image_size) == ("folder", None, 224)


def test_selection_and_runs_are_said_or_not_known() -> None:
    test = "best epoch, test"
    found = {
        name: {t.number: (t.selection, t.runs) for t in load(name).tables.values()}
        for name in PAPERS
    }
    assert found == {
        "stochastic-teacher": {str(i): (None, None) for i in range(1, 7)},
        "afd-online": {**{str(i): (None, 5) for i in range(6)}, "6": (None, None)},
        "mhgd": {str(i): (None, 5) for i in range(1, 6)},
        "sakd": {
            **dict.fromkeys("1234", (test, None)),
            "0": (None, None),
            "5": (None, None),
        },
        "refilled": {"1": (test, 1), "2": (test, 1), "3": (None, None), "4": (test, 1)},
    }
    rules = {None, "last epoch, test", test, "best epoch, validation"}
    assert {rule for tables in found.values() for rule, _ in tables.values()} <= rules


# --- recipes that carry a figure

SILENT = {  # titles without a figure: baselines, and settings that are not of the paper
    "cifar100/l1-kd-offline-resnet32-resnet32",
    "imagenet/afd-online-resnet18-resnet34",
}


@each(*(p for p in PAPERS if p != "sakd"))  # its recipes have the figures of others
def test_a_recipe_that_makes_a_figure_as_it_stands_has_it_in_its_first_line(name: str) -> None:
    """All of them do, but those that train a teacher and have no figure in the tables."""
    paper, shipped, used = load(name), recipe.shipped(), set()
    figures: dict[str, list[str]] = defaultdict(list)
    for cell, training in trainings(paper):
        if cell.metric == "ens" or as_yaml(training) != as_yaml(replace(training, overrides=())):
            continue
        if f"{cell.figure:.2f}" not in figures[training.recipe]:
            figures[training.recipe].append(f"{cell.figure:.2f}")
    for title, values in figures.items():
        if title in SILENT:
            assert "%" not in shipped[title]
            continue
        used.add(title)
        words = {
            f"{' and '.join(values)} % top-1)",
            f"(mean {values[0]} % top-1)",
            f"({values[0]} % at 0 %)",
            f"({values[0]} %)",
        }
        assert any(w in shipped[title] for w in words), (shipped[title], values)
    marked, teach = {
        "stochastic-teacher": ("/stochastic-", {r for r in shipped if "stochastic-vanilla" in r}),
        "afd-online": ("/afd-online-", SILENT),
        "refilled": (
            "/gkd-",
            {"cifar100/gkd-vanilla-wrn_40_2", "cub200/gkd-vanilla-mobilenetv1"},
        ),
        "mhgd": ("_mhgd", set[str]()),
    }[name]
    assert used == {r for r in shipped if marked in r} - teach


def test_recipes_of_stochastic_teachers_have_the_plain_figures_beside_theirs() -> None:
    """After a semicolon; Table 6 has none."""
    paper = load("stochastic-teacher")
    plain, own = defaultdict(list), {}
    for cell, training in trainings(paper):
        if cell.method in ("KD", "AT", "ML"):
            plain[training.recipe].append(f"{cell.figure:.2f}")
        elif "stochastic" in cell.method:
            own[training.recipe] = cell.table
    for title, table in own.items():
        text = (RECIPES / f"{title}.yaml").read_text()
        found = re.search(r"; ([\d. and]+) % without sub-networks", text)
        if "-partial" in title:
            assert table == "6" and found is None
        else:
            assert found and found[1] == " and ".join(plain[title])


@every_paper
def test_a_recipe_writes_how_its_teacher_is_trained_and_that_is_how(name: str) -> None:
    """Where its comment has a command: the network is the teacher, and nobody teaches it."""
    for title in sorted({training.recipe for _, training in trainings(load(name))}):
        text = (RECIPES / f"{title}.yaml").read_text()
        if not (written := re.search(r"#   potstill train ((?:.|\\\n#)*?)\n[^#]", text)):
            continue
        source, *overrides = written[1].replace("\\\n#", " ").split()
        made = recipe.load(source, [word for word in overrides if "=" in word])
        (teacher,) = recipe.load(title, ["teachers.0.weights=x"]).teachers
        (student,) = made.students
        assert (student.name, student.stochastic) == (teacher.name, teacher.stochastic)
        assert not made.teachers


# --- selection


def test_a_table_goes_by_its_number_or_its_name() -> None:
    paper = load("sakd")
    by_name, by_number = paper.select("ImageNet"), paper.select("4")
    assert by_name == by_number and len(by_name) == 24
    assert paper.select("Same Architecture") == paper.select("2")
    assert load("mhgd").select("code-readme") == load("mhgd").select("5")
    assert load("mhgd").select() == load("mhgd").cells


def test_a_pair_goes_by_the_papers_names_or_ours() -> None:
    paper = load("stochastic-teacher")
    theirs = paper.select("1", pair="WRN 28-10:ResNet 32")
    assert len(theirs) == 4 and {c.note for c in theirs} == {"row 3"}
    for pair in ("wrn_28_10:resnet32", "wrn 28-10:resnet32", "WRN2810:ResNet-32"):
        assert paper.select("1", pair=pair) == theirs
    assert {c.table for c in paper.select(pair="wrn_28_10:resnet32")} == {*"123456"}
    assert load("refilled").select("1", "mobilenetv1_imagenet:mobilenetv1_x0_5_imagenet")


def test_methods_go_by_the_papers_names_or_ours() -> None:
    paper = load("afd-online")
    theirs = paper.select("4", methods=["KD (online ensemble)"])
    assert len(theirs) == 24
    ours = paper.select("4", methods=["ensemble_kd"])
    assert ours == [c for c in theirs if "average" not in c.student]  # nothing of ours makes these
    assert {c.method for c in paper.select("3", methods=["dml", "AFD"])} == {"DML", "AFD"}
    assert {c.method for c in load("sakd").select(methods=["sakd"])} == {"SAKD(Ours)"}
    assert {c.method for c in load("mhgd").select("1", methods=["kdsvd"])} == {"KD-SVD"}


@pytest.mark.parametrize(
    "table, pair, methods, hint",
    [
        ("9", None, None, r"mhgd has no table '9'; it has 1 \(1\), .*5 \(code-readme\)$"),
        (None, "WRN-22-4", None, "write TEACHER:STUDENT, as resnet56:resnet20"),
        ("3", "wrn_22_4_mhgd:resnt_mhgd", None, 'did you mean "wrn_22_4_mhgd:resnet_mhgd"'),
        ("1", None, ["MHGDD"], 'no figure here is of the method MHGDD; did you mean "MHGD"'),
        ("1", None, ["MHGD", "crd"], "of the method crd; methods: Student, Soft-logits"),
    ],
)
def test_a_name_that_fits_no_figure_is_told_what_would(
    table: str | None, pair: str | None, methods: list[str] | None, hint: str
) -> None:
    with pytest.raises(PotstillError, match=hint):
        load("mhgd").select(table, pair, methods)


def test_a_paper_that_is_not_there_is_told_which_are() -> None:
    with pytest.raises(PotstillError, match="no paper 'mghd'; did you mean \"mhgd\""):
        load("mghd")


def test_numbers_of_tables_are_unique() -> None:
    for name in PAPERS:
        tables = load(name).tables
        assert len({t.number for t in tables.values()}) == len(tables)
        assert {c.table for c in load(name).cells} == tables.keys()


def test_reading_a_paper_loads_no_torch() -> None:
    words = (
        "import sys; from potstill.papers import load; load('sakd'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- the page

PAGE = ROOT / "docs" / "papers.md"


def section(name: str) -> str:
    """A paper's part of the page, from its YAML and CSV."""
    paper = load(name)
    lines = [f"## {paper.title}", "", f"`{name}`: {paper.reference}.", ""]
    lines += [
        "| table | what | figures | trained here | epoch | runs |",
        "|---|---|---|---|---|---|",
    ]
    texts = defaultdict(list)
    for key, table in paper.tables.items():
        cells = paper.select(key)
        made = sum(isinstance(paper.origin(c), Training) for c in cells)
        rule, runs = table.selection or "not published", table.runs or "not published"
        number = f"{table.number}" if key == table.number else f"{table.number}, `{key}`"
        lines.append(f"| {number} | {table.title} | {len(cells)} | {made} | {rule} | {runs} |")
        texts[table.settings].append(table.number)
    for text, numbers in texts.items():
        which = f"Table{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
        lines += ["", textwrap.fill(f"*{which}.* {text}", 110, break_on_hyphens=False)]
    reasons = Counter(o.because for c in paper.cells if isinstance(o := paper.origin(c), Absent))
    lines += ["", "Not trained here:" if reasons else "All figures are trained here."]
    lines += [*([""] if reasons else []), *(f"- {why}: {n}" for why, n in reasons.items())]
    if doubts := sum(1 for c in paper.cells if c.doubt):
        lines += ["", f"{doubts} figures are doubted; `doubt` says why."]
    return "\n".join(lines) + "\n"


def test_the_page_has_every_paper_as_it_is() -> None:
    """`python -m tests.test_papers` writes it."""
    beginning, *sections = re.split(r"^(?=## )", PAGE.read_text("utf-8"), flags=re.M)
    assert [s.rstrip() for s in sections] == [section(name).rstrip() for name in PAPERS]
    assert not re.search(r"\d", re.sub(r"`[^`]*`", "", beginning)), "no figures by hand"


if __name__ == "__main__":
    beginning = PAGE.read_text("utf-8").partition("## ")[0]
    PAGE.write_text(beginning + "\n".join(section(name) for name in PAPERS), "utf-8")
