"""Runs are grouped, named, compared and warned of as a reader would by hand."""

import doctest
import json
import sys
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from potstill import recipe, report, training
from potstill.cli import app
from potstill.errors import MissingExtra, PotstillError, StorageError
from potstill.report import collect, figures, tables
from potstill.report.text import as_json
from tests.report_runs import BINS, ENVIRONMENT, make, outcome


def names(collected):
    return [group.name for group in collected.groups]


def three(root, name, *top1, **settings):
    for seed, value in enumerate(top1):
        make(
            root / name.rpartition("/")[2] / f"seed{seed}", value, name=name, seed=seed, **settings
        )


def terminal(collected, width=200):
    console = Console(file=StringIO(), width=width)
    report.print_report(collected, console)
    return console.file.getvalue()


def warned(collected, words):
    return [warning for warning in collected.warnings if words in warning]


# --- what is collected


def test_a_folder_and_a_run_inside_it_count_once(tmp_path):
    three(tmp_path, "digits/kd", 70.0, 71.0)
    found = collect([tmp_path, tmp_path / "kd" / "seed1", tmp_path / "kd" / ".." / "kd"])
    (group,) = found.groups
    assert [run.seed for run in group.runs] == [0, 1]
    assert not found.repeated


def test_runs_are_found_at_any_depth_and_sorted_by_seed(tmp_path):
    for seed in (10, 2, 0):
        make(tmp_path / "a" / "b" / f"seed{seed}", 70.0 + seed, seed=seed)
    (group,) = collect([tmp_path]).groups
    assert group.accuracies == {0: 70.0, 2: 72.0, 10: 80.0}
    assert list(group.accuracies) == [0, 2, 10]


def test_where_a_run_is_made_does_not_divide_a_group(tmp_path):
    make(tmp_path / "a", 70.0)
    make(tmp_path / "b", 71.0, "device=cpu", "data.workers=3", "data.root=elsewhere", seed=1)
    make(tmp_path / "c", 72.0, "data.batch_size=16", seed=2)
    assert [len(group.runs) for group in collect([tmp_path]).groups] == [2, 1]


def test_no_run_says_what_makes_one(tmp_path):
    with pytest.raises(PotstillError, match=r"no run in .*recipe\.yaml; potstill train RECIPE"):
        collect([tmp_path])
    with pytest.raises(PotstillError, match="nowhere: there is no such folder"):
        collect([tmp_path / "nowhere"])


def test_an_unfinished_run_is_shown_with_how_far_it_is(tmp_path):
    make(tmp_path / "a", 72.0)
    make(tmp_path / "b", 72.0, seed=1, done=1)
    found = collect([tmp_path])
    (group,) = found.groups
    assert group.accuracies == {0: 72.0}, "in no mean"
    assert "epoch 1 of 4" in terminal(found)
    assert "student 36.00 on test" in terminal(found), "half of 72 after a quarter of the epochs"
    assert warned(found, "b has not finished: epoch 1 of 4")


def test_unfinished_runs_alone_are_a_report_too(tmp_path):
    make(tmp_path / "a", 72.0, done=0)
    found = collect([tmp_path])
    assert "epoch 0 of 4" in report.markdown(found)
    assert as_json(found)["groups"][0]["predictors"] == {}


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("result.json", "{", "result.json is damaged"),
        ("result.json", '{"scores": {}}', "lacks 'best_epoch'"),
        ("recipe.yaml", "students: [", "recipe.yaml"),
        ("env.json", "[", "env.json is damaged"),
        ("metrics.jsonl", "?\n", "metrics.jsonl, line 1"),
        ("metrics.jsonl", "{}\n", "lacks 'scores'"),
    ],
)
def test_a_damaged_run_is_told_and_left_out(tmp_path, file, text, said):
    three(tmp_path, "digits/kd", 70.0, 71.0)
    (tmp_path / "kd" / "seed1" / file).write_text(text)
    found = collect([tmp_path])
    assert found.groups[0].accuracies == {0: 70.0}
    (warning,) = warned(found, "seed1 is damaged and left out")
    assert said in warning


def test_a_seed_counts_once(tmp_path):
    make(tmp_path / "a", 70.0)
    make(tmp_path / "b", 80.0)
    found = collect([tmp_path])
    assert found.groups[0].accuracies == {0: 70.0}
    assert warned(found, "has the same settings and seed 0")


def test_a_run_of_today_is_read(tmp_path):
    overrides = ["epochs=1", "data.subset=64"]
    training.train(recipe.load("digits/vanilla", overrides), tmp_path / "a", training.Silence())
    found = collect([tmp_path])
    (line,) = tables.of_predictors(found.groups[0])
    assert line.top1.mean == found.groups[0].runs[0].result["scores"]["student"]["top1"]
    assert {plot.key for plot in figures.plots(found)} >= {"curves", "terms", "cost"}


# --- names


def test_the_example_runs():
    failed, attempted = doctest.testmod(sys.modules["potstill.report.groups"])
    assert attempted and not failed


def test_a_name_is_the_method_and_its_networks(tmp_path):
    make(tmp_path / "a", 70.0)
    make(tmp_path / "b", 70.0, name="digits/vanilla")
    make(tmp_path / "c", 70.0, "method=dml", "students=[resnet8, resnet8]", name="digits/vanilla")
    assert names(collect([tmp_path])) == [
        "kd resnet20 -> resnet8",
        "vanilla resnet8",
        "dml 2 x resnet8",
    ]


def test_names_say_what_differs_and_no_more(tmp_path):
    make(tmp_path / "a", 70.0)
    make(tmp_path / "b", 70.0, "method.temperature=2", "epochs=10")
    make(tmp_path / "c", 70.0, "teachers.0.stochastic.p_end=0.9")
    assert names(collect([tmp_path])) == [
        "kd resnet20 -> resnet8, method.temperature 4, epochs 4",
        "kd resnet20 -> resnet8, method.temperature 2, epochs 10",
        "kd resnet20 -> resnet8, method.temperature 4, epochs 4, teachers.0.stochastic.p_end 0.9",
    ], "not the stochastic teacher's scope and draw, which say no more"


def test_many_differences_make_no_long_name(tmp_path):
    make(tmp_path / "a", 70.0)
    given = [f"optimizers.default.{s}" for s in ("lr=1", "momentum=0.5", "weight_decay=0.1")]
    make(tmp_path / "b", 70.0, *given, "method.temperature=2")
    assert names(collect([tmp_path])) == [
        "kd resnet20 -> resnet8, method.temperature 4",
        "kd resnet20 -> resnet8, method.temperature 2",
    ]


def test_names_differ_even_where_values_are_cut_short(tmp_path):
    for i, start in enumerate("xy"):
        make(tmp_path / start, 70.0 + i, f"teachers.0.weights={start}{'a' * 60}.pth")
    first, second = names(collect([tmp_path]))
    assert second == f"{first} (#2)"


# --- numbers


def test_tables_have_the_numbers_of_a_pocket_calculator(tmp_path):
    """70, 71, 72: mean 71, std 1, half width 4.303 / sqrt(3) = 2.48. 73, 75, 77: 75, 2, 4.97.

    Differences 3, 4, 5: mean 4 and the same half width; t = 4 sqrt(3), p = 0.020.
    """
    three(tmp_path, "digits/vanilla", 70.0, 71.0, 72.0)
    three(tmp_path, "digits/kd", 73.0, 75.0, 77.0)
    text = report.markdown([tmp_path])
    best = "75.00 (epoch 4, chosen on the test set, not a result)"
    name = "kd resnet20 -> resnet8 | student"
    assert f"| {name} | 75.00 | 2.00 | 4.97 | 3 | 95.00 | {best} | 90.00 |" in text
    assert f"| {name} | 81.00 (with teacher0) | 5.00 |" in text
    assert "| vanilla resnet8 | student | 71.00 | 1.00 | 2.48 | 3 | 91.00 |" in text
    assert (
        "| kd resnet20 -> resnet8 | vanilla resnet8 | +4.00 | 2.48 | 3 | 0.020 | nothing |" in text
    )
    assert f"| {name} | 980 | 1,000,000 | 1.60 | 501 | 0:24 |" in text


def test_a_narrow_terminal_has_the_same(tmp_path):
    three(tmp_path, "digits/vanilla", 70.0, 71.0, 72.0)
    three(tmp_path, "digits/kd", 73.0, 75.0, 77.0, best=78.0)
    text = terminal(collect([tmp_path]), width=80)
    words = text.split()
    for number in ("75.00", "2.00", "4.97", "95.00", "78.00*", "90.00", "81.00", "980", "501"):
        assert number in words, number
    for number in ("1,000,000", "+4.00", "2.48", "0.020", "nothing"):
        assert number in words, number
    assert "* chosen on the test set, not a result" in text
    assert max(map(len, text.splitlines())) <= 80


def test_one_run_has_no_interval_and_says_so(tmp_path):
    make(tmp_path / "a", 70.0)
    found = collect([tmp_path])
    assert "| 70.00 | - (n = 1: no interval) | 1 |" in report.markdown(found)
    assert warned(found, "n = 1, so there is no interval: kd resnet20 -> resnet8")


def test_several_students_have_a_mean(tmp_path):
    own = ["method=dml", "students=[resnet8, resnet8]"]
    predictors = ("student0", "student1", "ensemble")
    make(tmp_path / "a", (60.0, 62.0, 70.0), *own, name="digits/vanilla", predictors=predictors)
    found = collect([tmp_path])
    assert found.groups[0].accuracies == {0: 61.0}, "without the ensemble"
    assert "| dml 2 x resnet8 | mean of 2 students | 61.00 |" in report.markdown(found)


def test_runs_of_older_versions_have_fewer_columns(tmp_path):
    make(tmp_path / "a", 70.0, newer=False)
    found = collect([tmp_path])
    text = report.markdown(found)
    assert "70.00" in text and "ECE" not in text and "FLOPs |" not in text
    assert tables.absent(tables.of_predictors(found.groups[0])) == [
        "std", "agreement %", "ECE %", "FLOPs", "latency ms",
    ]  # fmt: skip
    assert {plot.key for plot in figures.plots(found)} == {"curves", "terms", "cost"}


def test_the_baseline_is_vanilla_that_trains_as_long(tmp_path):
    make(tmp_path / "a", 73.0)
    make(tmp_path / "b", 70.0, "epochs=8", name="digits/vanilla")
    make(tmp_path / "c", 69.0, "data.batch_size=16", name="digits/vanilla")
    make(tmp_path / "d", 50.0, "students=[resnet14]", name="digits/vanilla")
    (difference,) = collect([tmp_path]).differences
    assert difference.baseline.name.startswith("vanilla resnet8, data.batch_size 16")
    assert difference.paired.mean == 4.0
    assert [s.partition(" ")[0] for s in difference.beside] == ["data.batch_size"]


def test_without_vanilla_the_first_is_the_baseline(tmp_path):
    three(tmp_path, "digits/at", 70.0)
    three(tmp_path, "digits/kd", 73.0)
    (difference,) = collect([tmp_path]).differences
    assert (difference.baseline.recipe.method.name, difference.paired.mean) == ("at", 3.0)


# --- warnings


def test_differences_are_over_shared_seeds_and_say_so(tmp_path):
    three(tmp_path, "digits/vanilla", 70.0, 71.0)
    for seed, top1 in ((1, 73.0), (2, 99.0)):
        make(tmp_path / f"kd{seed}", top1, seed=seed)
    found = collect([tmp_path])
    (difference,) = found.differences
    assert (difference.paired.mean, difference.paired.seeds) == (2.0, (1,))
    assert warned(
        found, "has seeds 1, 2 and vanilla resnet8 seeds 0, 1: their difference is over seed 1"
    )


@pytest.mark.parametrize(
    "key, value",
    [("torch", "2.12.0"), ("threads", 2), ("device", "cuda"), ("precision", "bfloat16")],
)
def test_another_environment_within_a_group_is_told(tmp_path, key, value):
    make(tmp_path / "a", 70.0)
    make(tmp_path / "b", 70.0, seed=1, environment={key: value})
    (warning,) = warned(collect([tmp_path]), "not one environment (seed 0, then seed 1)")
    assert f"was {ENVIRONMENT[key]} and is now {value}" in warning


def test_best_epochs_on_test_are_no_result_and_on_validation_are(tmp_path):
    make(tmp_path / "a", 70.0, best=75.0)
    make(tmp_path / "b", 70.0, "data.validation=0.1", split="validation", best=76.0)
    found = collect([tmp_path])
    (warning,) = warned(found, "chosen on the test set")
    assert found.groups[0].name in warning and found.groups[1].name not in warning
    assert "76.00 (epoch 4, on validation)" in report.markdown(found)


def test_a_shortened_schedule_is_told(tmp_path):
    make(tmp_path / "a", 70.0)
    make(tmp_path / "b", 70.0, "schedule_epochs=4", seed=1)
    full = recipe.load("digits/kd", ["teachers.0.weights=t"]).schedule_epochs
    (warning,) = warned(collect([tmp_path]), "shortened")
    assert warning.startswith(f"shortened, 4 of {full} epochs: kd")


@pytest.mark.parametrize(
    "teacher, words", [(19.0, "near the 10.00 % of chance"), (60.0, "is weaker than its student")]
)
def test_a_teacher_that_knows_little_is_told(tmp_path, teacher, words):
    make(tmp_path / "a", 70.0, teacher=teacher)
    assert warned(collect([tmp_path]), words)


def test_a_good_training_has_no_warning_but_what_it_lacks(tmp_path):
    settings = ("data.validation=0.1", "schedule_epochs=4")
    for seed in range(2):
        make(tmp_path / f"{seed}", 70.0, *settings, split="validation", seed=seed)
    assert collect([tmp_path]).warnings == []


# --- of potstill reproduce


def test_a_folder_of_reproduce_brings_its_verdicts(tmp_path, monkeypatch):
    make(tmp_path / "kd", 70.0)
    (tmp_path / "reproduce.json").write_text("{}")
    asked = []
    stub = SimpleNamespace(outcome=lambda place: asked.append(place) or outcome())
    monkeypatch.setitem(sys.modules, "potstill.reproduce", stub)
    text = report.markdown([tmp_path])
    assert asked == [tmp_path]
    for line in (
        "## crd, Table 2: resnet56 -> resnet20, cifar100",
        "| kd (top-1) | 70.66 | 70.50 (best 70.90) | 0.10 | 0.25 | 3 | -0.16 | "
        "matches (0.16 below, within 0.5) |",
        "Best: the mean of our runs' best epochs, chosen on the test set, not a result.",
        "| fitnet (top-1) | 69.21 | - | - | - | 0 of 3 | - | waiting (no run yet) |",
        "Published: last epoch, test; n = 5.",
        "Shortened: 1 of 240 epochs. These are not the published settings.",
        "Changed: data.subset 1000.",
        "crd: the table and the text differ",
        "Kendall's tau -1.00, p 1.000, n = 2 methods.",
        "| crd | kd | -0.54 | 0.40 | 3 | 0.030 | 0, 1, 2 |",
        "| vgg13 -> MobileNetV2 | not asked for |",
    ):
        assert line in text.replace("\\", ""), line
    assert "Shortened: 1 of 240 epochs" in terminal(collect([tmp_path]))


# --- plots


def plot(collected, key):
    return next(p for p in figures.plots(collected) if p.key == key)


def test_a_curve_is_the_mean_and_its_band_the_range(tmp_path):
    """Top-1 is half of the last epoch's after a quarter of four epochs."""
    three(tmp_path, "digits/kd", 60.0, 80.0)
    band, line = plot(collect([tmp_path]), "curves").variants[0].data
    assert (line["x"], line["y"][0], line["y"][3]) == ([1, 2, 3, 4], 35.0, 70.0)
    assert (band["y"][0], band["y"][-1]) == (40.0, 30.0)
    assert line["legendgroup"].endswith("(n = 2)")


def test_one_run_has_a_line_without_a_band(tmp_path):
    make(tmp_path / "a", 60.0)
    (line,) = plot(collect([tmp_path]), "curves").variants[0].data
    assert line["legendgroup"].endswith("(n = 1)")


def test_a_group_has_one_colour_in_all_plots(tmp_path):
    three(tmp_path, "digits/kd", 60.0, 61.0)
    make(tmp_path / "x", 70.0, "method.temperature=2", drawn=True)
    found = collect([tmp_path])
    for p in figures.plots(found):
        if p.key != "terms":  # whose colours are of terms
            data = [t for v in p.variants for t in v.data if "meta" in t]
            for group, colour in zip(names(found), figures.COLOURS, strict=False):
                own = {t["meta"] for t in data if figures.arrow(group) in t["name"]}
                assert own <= {colour}, p.key


def test_many_groups_begin_with_a_few_lines(tmp_path):
    for i in range(10):
        make(tmp_path / f"{i}", 60.0, f"method.temperature={i + 1}")
    found = collect([tmp_path])
    shown = [trace["visible"] for trace in plot(found, "curves").variants[0].data]
    assert shown == [True] * 8 + [False] * 2
    assert "8 of 10" in plot(found, "curves").caption


def test_bins_of_several_seeds_are_pooled_by_their_images():
    """1 image at 0.5 and 3 at 0.9 make 4 at 0.8."""
    rows = [[1, 0.5, 0.0], [3, 0.9, 1.0], [0, None, None]]
    assert figures._pooled(rows) == (4, pytest.approx(0.8), 0.75)
    assert figures._pooled(rows[2:]) == (0, 0.0, 0.0)


def test_empty_bins_are_not_drawn(tmp_path):
    make(tmp_path / "a", 70.0)
    ideal, found = plot(collect([tmp_path]), "reliability").variants[0].data
    assert len(found["x"]) == sum(1 for n, _, _ in BINS if n) == 8
    assert ideal["x"] == [0, 1]


def test_lambda_is_drawn_in_shares_of_each_kind(tmp_path):
    run = make(tmp_path / "a", 70.0)
    spread = {"edges": [0.5, 0.75, 1.0], "images": {"seen": [1, 3], "unseen": [2, 0]}}
    worth = {"accuracy": {"top1": 70.0}, "ncm": {"top1": 60.0}}
    weights = {"weighting": "minmax", "auc": 0.9, "test_auc": 0.8, **spread}
    (run.directory / "cross_task.json").write_text(json.dumps(worth | {"weights": weights}))
    found = collect([tmp_path])
    seen, unseen = plot(found, "weights").variants[0].data
    assert (seen["x"], seen["y"], unseen["y"]) == ([0.625, 0.875], [25.0, 75.0], [100.0, 0.0])
    assert "| 0 | 70.00 | 60.00 | - | 0.900 | 0.800 |" in report.markdown(found)


# --- the command


def invoke(*words):
    from typer.testing import CliRunner

    return CliRunner().invoke(app, ["report", *map(str, words)], catch_exceptions=False)


def test_the_command_prints_and_writes(tmp_path):
    make(tmp_path / "runs" / "a", 70.0)
    done = invoke(tmp_path / "runs", "--markdown", tmp_path / "x.md", "--html", tmp_path / "x.html")
    assert "70.00" in done.stdout and "warning: n = 1" in done.stdout
    assert (tmp_path / "x.md").read_text() == report.markdown([tmp_path / "runs"])
    assert "<!doctype html>" in (tmp_path / "x.html").read_text()
    assert "written: " in done.stdout
    found = json.loads(invoke(tmp_path / "runs", "--json").stdout)
    assert found["groups"][0]["predictors"]["student"]["top1"]["mean"] == 70.0


def test_a_page_needs_its_packages_and_says_which(tmp_path, monkeypatch):
    make(tmp_path / "a", 70.0)
    for package in ("plotly", "jinja2"):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, package, None)
            for part in [m for m in sys.modules if m.startswith(f"{package}.")]:
                context.delitem(sys.modules, part)
            with pytest.raises(MissingExtra, match=rf"an HTML report needs {package}"):
                report.write_html([tmp_path], tmp_path / "x.html")
            assert report.markdown([tmp_path]) and terminal(collect([tmp_path]))
    assert not (tmp_path / "x.html").exists()


def test_a_page_replaces_one_and_needs_its_folder(tmp_path):
    make(tmp_path / "a", 70.0)
    (tmp_path / "x.html").write_text("old")
    report.write_html([tmp_path / "a"], tmp_path / "x.html", made="today")
    assert "made today" in (tmp_path / "x.html").read_text()
    with pytest.raises(StorageError, match=r"there is no folder .*nowhere; make it first"):
        report.write_html([tmp_path / "a"], tmp_path / "nowhere" / "x.html")


def test_what_people_write_is_text_in_the_page(tmp_path):
    bad = "</script><script>alert(1)</script>"
    run = ["__main__.py", "train", bad]
    make(tmp_path / "a", 70.0, f"teachers.0.weights=</script>{bad}", environment={"command": run})
    make(tmp_path / "b", 70.0, "teachers.0.weights=plain", environment={"cpu": bad})
    found = collect([tmp_path])
    assert "alert" in found.groups[0].name
    report.write_html(found, tmp_path / "x.html", command=bad, made=bad)
    text = (tmp_path / "x.html").read_text()
    assert "alert(1)" in text and "<script>alert" not in text
    assert text.count("</script>") == 3, "the figures', plotly.js's and the page's own"
    assert "<script" not in report.markdown(found).replace("\\<", "")
