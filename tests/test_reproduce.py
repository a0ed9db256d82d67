"""A paper's figures again: the plan, the runs, and what finished runs say of the figures."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from potstill import papers, reproduce
from potstill.errors import PotstillError, RecipeError, StorageError
from potstill.reproduce.outcome import figure, record
from potstill.reproduce.plan import Plan
from potstill.run import Run
from tests import forked

PAIR = "resnet56:resnet20"
SMALL = ("data.name=digits", "data.subset=64", "data.batch_size=32", "evaluate_every=100")


def planned(out: Path, methods: str = "vanilla,kd", **settings: Any) -> Plan:
    settings = {"table": "2", "methods": methods.split(","), **settings}
    return reproduce.make("sakd", out, pair=PAIR, **settings)


def labels(plan: Plan) -> list[str]:
    return [f"{setting.label}, seed {seed}" for setting, seed in plan.runs]


# --- the plan


def test_teachers_come_first_and_then_all_methods_with_one_seed(tmp_path: Path) -> None:
    assert labels(planned(tmp_path, "vanilla,kd,sakd", seeds=2)) == [
        "teacher resnet56, seed 0",
        "Vanilla, resnet20, seed 0",
        "KD, resnet56 -> resnet20, seed 0",
        "SAKD(Ours), resnet56 -> resnet20, seed 0",
        "Vanilla, resnet20, seed 1",
        "KD, resnet56 -> resnet20, seed 1",
        "SAKD(Ours), resnet56 -> resnet20, seed 1",
    ]


def test_what_two_figures_need_is_trained_once(tmp_path: Path) -> None:
    """Both tables have the pair; the row of the teacher is the training that teaches."""
    plan = planned(tmp_path, "teacher,kd", table=None)
    assert len(plan.rows) == 4 and {row.cell.table for row in plan.rows} == {
        "accuracy (mixed caption)",
        "same architecture",
    }
    assert labels(plan) == ["teacher resnet56, seed 0", "KD, resnet56 -> resnet20, seed 0"]
    assert {row.setting for row in plan.rows} == set(plan.settings)


def test_figures_beside_those_asked_for_are_left_out_and_said(tmp_path: Path) -> None:
    """The table has fifteen rows of the pair, those of MGD and SemCKD without a figure."""
    plan = planned(tmp_path, "vanilla,kd,mgd")
    reasons = {cell.method: because for cell, because in plan.left_out}
    assert len(plan.rows) == 2 and len(reasons) == 13
    assert reasons.pop("MGD") == "the table has no figure there"
    assert set(reasons.values()) == {"not among the methods that were asked for"}
    whole = reproduce.make("sakd", tmp_path, pair=PAIR, table="2")
    assert {cell.method for cell, _ in whole.left_out} == {"MGD", "SemCKD"}


def test_a_student_is_taught_by_the_run_that_the_plan_makes(tmp_path: Path) -> None:
    plan = planned(tmp_path, "kd", seeds=2)
    teacher, student = plan.settings.values()
    assert student.recipe.teachers[0].weights == str(tmp_path / teacher.name / "seed0")
    assert (student.teacher, teacher.teacher, teacher.seeds) == (teacher.name, None, (0,))
    assert [s.name for s in teacher.recipe.students] == ["resnet56"]


def test_weights_that_are_given_take_the_teachers_place(tmp_path: Path) -> None:
    file = tmp_path / "teacher.pth"
    file.write_bytes(b"weights")
    for given in (str(file), f"resnet56={file}"):
        plan = planned(tmp_path / "out", "teacher,vanilla,kd", weights=[given])
        assert [s.recipe.method.name for s in plan.settings.values()] == ["vanilla", "kd"]
        assert plan.settings[[*plan.settings][1]].recipe.teachers[0].weights == str(file)
        assert [row.given for row in plan.rows] == [str(file), None, None]


def test_a_folder_is_named_by_what_determines_its_runs(tmp_path: Path) -> None:
    """Not by where the data or the weights lie; by the weights themselves, and every setting."""

    def named(content: bytes = b"a", file: str = "one.pth", *overrides: str, **more: Any) -> str:
        (tmp_path / file).write_bytes(content)
        given = {"weights": [str(tmp_path / file)], "overrides": overrides, **more}
        (name,) = planned(tmp_path, "kd", **given).settings
        return name

    first = named()
    assert first.startswith("kd-resnet56-resnet20-")
    assert named(b"a", "two.pth", "data.root=somewhere", "device=cpu", "data.workers=1") == first
    others = [
        named(b"b"),
        named(b"a", "one.pth", "data.subset=10"),
        named(b"a", "one.pth", "compile=true"),
        named(epochs=10),
    ]
    assert len({first, *others}) == 5
    assert named(seeds=3) == first


def test_a_shortened_schedule_is_marked_and_scales_milestones(tmp_path: Path) -> None:
    plan = planned(tmp_path, "vanilla,sakd", epochs=24)
    assert {s.shortened for s in plan.settings.values()} == {"24 of 240 epochs"}
    for setting in plan.settings.values():
        schedule = setting.recipe.optimizers["default"].schedule
        assert (setting.recipe.epochs, schedule.milestones) == (24, [150, 180, 210])
        assert setting.recipe.schedule_epochs == 240  # what milestones are counted in
    assert {s.shortened for s in planned(tmp_path).settings.values()} == {""}


def test_epochs_are_shared_among_phases(tmp_path: Path) -> None:
    plan = reproduce.make(
        "mhgd", tmp_path, table="1", pair="WRN-22-4:WRN-10-4", methods=["mhgd"], epochs=12
    )
    assert [s.shortened for s in plan.settings.values()] == ["12 of 200 epochs", "12 of 120 epochs"]


def test_overrides_that_change_what_is_trained_are_told_apart(tmp_path: Path) -> None:
    plan = planned(tmp_path, overrides=["data.subset=9", "data.root=x", "device=cpu"])
    assert plan.changed == ("data.subset=9",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"table": "9"}, "sakd has no table '9'; it has 0 (settings)"),
        ({"pair": "resnet56"}, "--pair is 'resnet56'; write TEACHER:STUDENT"),
        ({"pair": "resnet56:resnet21"}, 'did you mean "resnet56:resnet20"?'),
        ({"methods": ["skd"]}, "no figure here is of the method skd"),
        ({"table": "segmentation"}, "semantic segmentation, which is not image classification"),
        ({"overrides": ["seed=1"]}, "seed=1: every recipe has its own; use --seeds"),
        ({"overrides": ["epochs=1"]}, "epochs=1: every recipe has its own; use --epochs"),
        ({"overrides": ["data.subst=1"]}, "did you mean"),
        ({"weights": ["x.pth"], "methods": ["kd"]}, "write --weights NETWORK=FILE"),
        ({"weights": ["vgg8=x.pth"], "methods": ["kd"]}, "no teacher here is a vgg8"),
        ({"weights": ["resnet56=x.pth"], "methods": ["kd"]}, "there is no x.pth"),
    ],
)
def test_what_fits_no_figure_is_refused(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((PotstillError, RecipeError, StorageError)) as raised:
        reproduce.make("sakd", tmp_path, **given)
    assert message in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_one_file_is_not_taken_for_differently_trained_teachers(tmp_path: Path) -> None:
    """KD has the plain WRN-28-10 in Table 1, and KD+stochastic one of p_end 0.5."""
    (tmp_path / "x.pth").write_bytes(b"weights")
    given = {"table": "1", "pair": "wrn_28_10:resnet32", "weights": [str(tmp_path / "x.pth")]}
    with pytest.raises(PotstillError, match="trained in 2 ways"):
        reproduce.make("stochastic-teacher", tmp_path / "out", **given)
    plan = reproduce.make("stochastic-teacher", tmp_path / "out", methods=["KD"], **given)
    assert [s.recipe.method.name for s in plan.settings.values()] == ["kd"]


def test_a_wrong_paper_names_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(PotstillError, match='did you mean "sakd"'):
        reproduce.make("sakdd", tmp_path)


# --- what finished runs say


def finish(plan: Plan, top1: Mapping[str, Sequence[float]], teacher: float | None = None) -> None:
    """Runs of a plan that have ended with these accuracies, by method and seed."""
    plan.out.mkdir(parents=True, exist_ok=True)
    record(plan, ["potstill", "reproduce", "sakd"])
    for setting in plan.settings.values():
        for seed, value in enumerate(top1.get(setting.recipe.method.name, [])):
            scores = {"student": {"top1": value, "top5": 90.0, "loss": 1.0, "images": 10000}}
            run = Run.create(plan.place(setting, seed), setting.recipe.to_yaml(), {})
            taught = {} if teacher is None or not setting.recipe.teachers else {"top1": teacher}
            best = {"student": {"top1": value + 1, "phase": "distill", "epoch": 1, "split": "test"}}
            run.finish(
                {
                    "scores": scores,
                    "best_epoch": best,
                    "earlier": {},
                    "teachers": {"teacher0": taught} if taught else {},
                }
            )


def by_method(found: Mapping[str, Any]) -> dict[str, Any]:
    return {row["method"]: row for row in found["rows"]}


@pytest.fixture
def teacher_file(tmp_path: Path) -> str:
    file = tmp_path / "teacher.pth"
    file.write_bytes(b"weights")
    return str(file)


def test_a_verdict_by_hand(tmp_path: Path, teacher_file: str) -> None:
    """KD's figure is 70.57: 70.5, 70.6, 70.7 have mean 70.6, std 0.1 and half-width
    4.302653 x 0.1 / sqrt(3) = 0.2484. Vanilla's is 69.40, its three runs are at 68.4 and a little.
    SAKD has two runs of three, AT none.
    """
    plan = planned(tmp_path / "out", "vanilla,kd,at,sakd", seeds=3, weights=[teacher_file])
    runs = {"kd": [70.5, 70.6, 70.7], "vanilla": [68.4, 68.5, 68.3], "sakd": [71.0, 71.2]}
    finish(plan, runs)
    found = reproduce.outcome(plan.out)
    rows = by_method(found)
    kd = rows["KD"]
    assert kd["ours"]["mean"] == pytest.approx(70.6)
    assert kd["ours"]["half_width"] == pytest.approx(0.248414, abs=1e-6)
    assert kd["difference"] == pytest.approx(0.03) and kd["published"] == 70.57
    assert (kd["verdict"], kd["waiting"], kd["seeds"]) == ("matches", 0, [0, 1, 2])
    assert kd["published_rule"] == "best epoch, test"
    assert kd["ours_best"]["mean"] == pytest.approx(71.6)
    assert rows["Vanilla"]["verdict"] == "below"
    assert (rows["SAKD(Ours)"]["verdict"], rows["SAKD(Ours)"]["waiting"]) == ("inconclusive", 1)
    assert "n = 2" in rows["SAKD(Ours)"]["why"]
    at = rows["AT"]
    assert (at["verdict"], at["ours"], at["waiting"]) == ("waiting", None, 3)
    assert found["shortened"] is None and found["changed"] == []


def test_ranks_and_paired_differences_by_hand(tmp_path: Path, teacher_file: str) -> None:
    """Published: SAKD, KD, Vanilla in order; ours KD, SAKD, Vanilla: one of three pairs is turned
    round, tau = (2 - 1) / 3. KD - Vanilla by seed: 2, 2, 2; SAKD has seed 0 and 1: 1 and 2.
    """
    plan = planned(tmp_path / "out", "vanilla,kd,sakd", seeds=3, weights=[teacher_file])
    finish(plan, {"kd": [71.0, 72.0, 73.0], "vanilla": [69.0, 70.0, 71.0], "sakd": [70.0, 72.0]})
    found = reproduce.outcome(plan.out)
    (ranks,) = found["ranks"]
    assert ranks["tau"] == pytest.approx(1 / 3) and ranks["n"] == 3
    assert [(m["method"], m["our_rank"], m["published_rank"]) for m in ranks["methods"]] == [
        ("KD", 1, 2),
        ("SAKD(Ours)", 2, 1),
        ("Vanilla", 3, 3),
    ]
    kd, sakd = found["paired"]
    assert (kd["method"], kd["against"], kd["seeds"]) == ("KD", "Vanilla", [0, 1, 2])
    assert (kd["mean"], kd["half_width"]) == (pytest.approx(2.0), pytest.approx(0.0))
    assert (sakd["mean"], sakd["n"], sakd["seeds"]) == (pytest.approx(1.5), 2, [0, 1])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"epochs": 24}, "24 of 240 epochs"),
        ({"overrides": ["data.subset=9"]}, "settings were changed: data.subset=9"),
    ],
)
def test_other_settings_are_not_comparable(
    settings: dict[str, Any], why: str, tmp_path: Path, teacher_file: str
) -> None:
    plan = planned(tmp_path / "out", "kd", seeds=3, weights=[teacher_file], **settings)
    finish(plan, {"kd": [70.5, 70.6, 70.7]})
    (row,) = reproduce.outcome(plan.out)["rows"]
    assert (row["verdict"], row["why"]) == ("not comparable", why)


def test_overrides_of_the_machine_stay_comparable(tmp_path: Path, teacher_file: str) -> None:
    overrides = ["device=cpu", "precision=fp32", "data.root=x", "compile=teachers", "store=true"]
    plan = planned(tmp_path / "o", "kd", seeds=3, weights=[teacher_file], overrides=overrides)
    finish(plan, {"kd": [70.5, 70.6, 70.7]})
    (row,) = reproduce.outcome(plan.out)["rows"]
    assert row["verdict"] == "matches"


@pytest.mark.parametrize("override", ["store.top_k=5", "store={top_k: 5}"])
def test_a_teacher_of_which_a_part_is_kept_is_another_one(
    tmp_path: Path, teacher_file: str, override: str
) -> None:
    plan = planned(tmp_path / "o", "kd", seeds=3, weights=[teacher_file], overrides=[override])
    assert plan.changed == (override,)


def test_where_a_store_is_does_not_change_a_run_s_folder(tmp_path: Path, teacher_file: str) -> None:
    """And without one it is named as before there were any."""

    def folder(*overrides: str) -> str:
        given = {"weights": [teacher_file], "overrides": list(overrides)}
        (row,) = planned(tmp_path / "o", "kd", seeds=1, **given).rows
        return row.setting

    assert folder("store.root=x") == folder("store.root=y") == folder("store=true")
    assert folder("store.top_k=5") != folder("store=true") != folder() == folder("store=false")


def test_a_suspect_figure_is_not_comparable(tmp_path: Path, teacher_file: str) -> None:
    cell = next(c for c in papers.load("sakd").cells if c.doubt.startswith("suspect"))
    doubtful = [c.doubt for c in papers.load("sakd").select(cell.table, methods=[cell.method])]
    assert any(doubtful)  # and this is how it is judged:
    plan = planned(tmp_path / "out", "kd", seeds=3, weights=[teacher_file])
    finish(plan, {"kd": [70.5, 70.6, 70.7]})
    kept = json.loads((plan.out / "reproduce.json").read_text())
    kept["rows"][0]["doubt"] = "suspect: one row too high"
    (plan.out / "reproduce.json").write_text(json.dumps(kept))
    (row,) = reproduce.outcome(plan.out)["rows"]
    assert (row["verdict"], row["why"]) == ("not comparable", "suspect: one row too high")


def test_a_given_teacher_is_its_rows_only_run(tmp_path: Path, teacher_file: str) -> None:
    plan = planned(tmp_path / "out", "teacher,kd", seeds=3, weights=[teacher_file])
    finish(plan, {"kd": [70.5, 70.6, 70.7]}, teacher=73.04)
    row = by_method(reproduce.outcome(plan.out))["Teacher"]
    assert row["ours"] == {"mean": 73.04, "std": None, "n": 1, "half_width": None}
    assert (row["verdict"], row["waiting"]) == ("inconclusive", 0)


def test_the_teacher_is_no_rival(tmp_path: Path) -> None:
    plan = planned(tmp_path / "out", "teacher,vanilla,kd")
    finish(plan, {"kd": [70.5], "vanilla": [69.0]})
    (ranks,) = reproduce.outcome(plan.out)["ranks"]
    assert {m["method"] for m in ranks["methods"]} == {"Vanilla", "KD"}


def test_another_folder_has_no_outcome(tmp_path: Path) -> None:
    with pytest.raises(PotstillError, match="not a folder of reproduce"):
        reproduce.outcome(tmp_path)


RESULT = {
    "scores": {
        "student0": {"top1": 60.0, "top5": 80.0},
        "student1": {"top1": 70.0, "top5": 90.0},
        "ensemble": {"top1": 75.0, "top5": 95.0},
    },
    "best_epoch": {"student0": {"top1": 61.0}, "student1": {"top1": 72.0}},
    "earlier": {"embed": {"scores": {"ncm": {"top1": 30.0}}}},
}


@pytest.mark.parametrize(
    ("score", "value"),
    [
        ("student1.top1", 70.0),
        ("students.top1", 65.0),
        ("students.top5", 85.0),
        ("ensemble.top1", 75.0),
        ("student0.best", 61.0),
        ("students.best", 66.5),
        ("embed/ncm.top1", 30.0),
    ],
)
def test_figures_of_a_run_by_hand(score: str, value: float) -> None:
    assert figure(RESULT, score) == value


@pytest.mark.parametrize("score", ["student.top1", "student0.top9", "init/ncm.top1"])
def test_a_figure_that_a_run_does_not_have_is_named(score: str) -> None:
    with pytest.raises(PotstillError, match=f"a run has no {score}"):
        figure(RESULT, score)


# --- the runs


def small(out: Path, methods: str = "vanilla,kd", **settings: Any) -> Plan:
    settings.setdefault("seeds", 2)
    return planned(out, methods, epochs=1, overrides=SMALL, **settings)


def carried_out(plan: Plan, jobs: int = 1) -> str:
    console = Console(width=120, record=True, quiet=False, force_terminal=False)
    try:
        reproduce.carry_out(plan, jobs, console, ["potstill", "reproduce"])
    finally:
        text = console.export_text()
    return text


def state(out: Path) -> dict[str, tuple[int, bytes]]:
    found = sorted(out.rglob("result.json"))
    return {str(f.relative_to(out)): (f.stat().st_mtime_ns, f.read_bytes()) for f in found}


def test_runs_are_made_once_and_left_alone_when_done(tmp_path: Path) -> None:
    plan = small(tmp_path)
    said = carried_out(plan)
    assert said.count("student ") == 5 and "[5/5] KD, resnet56 -> resnet20, seed 1" in said
    assert plan.missing == []
    before = state(tmp_path)
    assert len(before) == 5
    assert carried_out(small(tmp_path)) == ""
    assert state(tmp_path) == before
    assert len(small(tmp_path, seeds=3).missing) == 2  # of the third seed alone


def test_several_processes_train_what_one_does(tmp_path: Path) -> None:
    """Bit for bit, on as many threads."""
    one, two = small(tmp_path / "one", seeds=1), small(tmp_path / "two", seeds=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        carried_out(one)
    finally:
        torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"], before = "1", os.environ.get("OMP_NUM_THREADS")
    try:
        carried_out(two, jobs=2)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    for setting, seed in one.runs:
        first, second = (Run.open(p.place(setting, seed)) for p in (one, two))
        weights, others = (r.load_predictor()[0] for r in (first, second))
        assert all(torch.equal(weights[k], others[k]) for k in weights)
        assert (first.result or {})["scores"] == (second.result or {})["scores"]
    assert (tmp_path / "two" / "recipes").is_dir() and any((tmp_path / "two" / "logs").iterdir())


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_is_told_and_the_others_go_on(jobs: int, tmp_path: Path) -> None:
    """CRD wants 16,384 images of other classes; 64 are there."""
    plan = small(tmp_path, "vanilla,crd,kd", seeds=1)
    with pytest.raises(reproduce.RunsFailed) as raised:
        carried_out(plan, jobs)
    assert "1 run has failed" in str(raised.value) and "negatives" in str(raised.value)
    assert [s.recipe.method.name for s, _ in plan.missing] == ["crd"]
    rows = by_method(reproduce.outcome(tmp_path))
    assert rows["CRD"]["verdict"] == "waiting" and rows["KD"]["verdict"] == "not comparable"


def test_without_its_teacher_a_student_is_not_trained(tmp_path: Path) -> None:
    plan = small(tmp_path, "kd", seeds=1)
    (tmp_path / plan.runs[0][0].name).mkdir(parents=True)
    (tmp_path / plan.runs[0][0].name / "seed0").write_text("a file in the way")
    with pytest.raises(reproduce.RunsFailed, match="its teacher's run failed"):
        carried_out(plan)


def test_an_estimate_covers_what_is_missing(tmp_path: Path) -> None:
    plan = small(tmp_path, "vanilla,crd,kd", seeds=2)
    cost = reproduce.estimate(plan, 1, seconds=0.01)
    names = {s.recipe.method.name: s.name for s in plan.settings.values() if not s.teaches}
    assert set(cost.faults) == {names["crd"]}
    assert set(cost.seconds) == {*plan.settings} - {names["crd"]}
    each = cost.seconds
    teacher = next(s.name for s in plan.settings.values() if s.teaches)
    total = each[teacher] + 2 * (each[names["vanilla"]] + each[names["kd"]])
    assert cost.left == pytest.approx(total)
    halved = reproduce.estimate(plan, 2, seconds=0.01)
    assert halved.left == pytest.approx(
        (sum(halved.seconds.values()) * 2 - halved.seconds[teacher]) / 2
    )
    said = "\n".join(reproduce.remarks(plan, cost, 1))
    assert "7 runs to do" in said and "not tried: CRD" in said
    assert not any(tmp_path.iterdir())


# --- as a process that is killed, or not alone

COMMAND = ["reproduce", "sakd", "--pair", PAIR, "--table", "2", "--methods", "vanilla,kd"]


def started(out: Path, *words: str) -> forked.Forked:
    return forked.Forked(forked.potstill, *COMMAND, "--out", str(out), *words)


def wait_for(condition: Any, process: forked.Forked) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until and process.returncode is None, process.communicate()
        time.sleep(0.02)


LONG = ("--seeds", "1", "--epochs", "6", *SMALL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_a_stopped_reproduce_goes_on_without_repeating(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Stopped when the teacher has finished and its students are to come; then the same again."""
    words = (*LONG, "--jobs", "2")
    process = started(tmp_path, *words)
    wait_for(lambda: len(state(tmp_path)) >= 1, process)  # the teacher
    process.send_signal(number)
    _, errors = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 130, errors
        assert "the same command goes on from there" in errors
    before = state(tmp_path)
    assert before
    until = time.monotonic() + 120
    while True:  # runs that outlive a kill hold the folder until they end
        again = started(tmp_path, *words)
        output, errors = again.communicate(timeout=300)
        if again.returncode == 0:
            break
        assert "another reproduce is at work" in errors and time.monotonic() < until, errors
        time.sleep(0.2)
    after = state(tmp_path)
    assert len(after) == 3 and {k: after[k] for k in before} == before
    assert "report.md" in output and (tmp_path / "report.md").exists()


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    endless = ("--seeds", "1", "--epochs", "20000", *SMALL)
    first = started(tmp_path, *endless)
    wait_for(lambda: (tmp_path / "reproduce.json").exists(), first)
    second = started(tmp_path, *endless)
    _, errors = second.communicate()
    assert second.returncode == 2 and "Traceback" not in errors
    assert f"another reproduce is at work in {tmp_path}" in errors
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate()
    assert first.returncode == 130, errors


def test_a_dry_run_writes_nothing_and_tells_the_plan(tmp_path: Path) -> None:
    process = started(tmp_path / "out", "--seeds", "2", "--epochs", "1", "--dry-run", *SMALL)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not (tmp_path / "out").exists()
    for text in ("teacher resnet56", "1 of 240 epochs", "5 runs to do", "best epoch, test"):
        assert text in output, output
