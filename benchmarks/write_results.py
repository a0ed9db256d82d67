"""Write sections of docs/results.md from files of runs and benchmarks: no figure is typed by hand.

    python benchmarks/write_results.py [--short RUN ...] [--features RUN ...] [--demo DIR] \
        [--speed FILE ...] [--compiling FILE] [--fidelity FILE] [--taps FILE] [--methods FILE ...] \
        [--tiny FILE ...] [--svd FILE ...] [--online RUN ...] [--together FILE ...] \
        [--stochastic RUN ...] [--skipping FILE ...] [--cross-task RUN ...] \
        [--reproduced DIR]

Sections whose files are not given stay as they are. A run's small files (recipe.yaml, env.json,
metrics.jsonl, result.json, cross_task.json) are kept under benchmarks/results/runs/, its weights
are not; those of `potstill reproduce`, with reproduce.json, under benchmarks/results/reproduce/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from potstill import recipe, report
from potstill.display import duration
from potstill.report.page import command_of
from potstill.run import Run

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
TITLE = """# Results, as measured

Each section is written by `benchmarks/write_results.py` from the files of the runs named in it.
Accuracies are top-1 on the test set after the **last** epoch, in percent; the best epoch beside
them was chosen on the test set and is not a result. Speeds are of whole runs, evaluation included,
on a machine that other work shared, heavily at times.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hardware(environment: Mapping[str, Any]) -> str:
    """Where it ran, in one line."""
    keys = ("cpu", "cores", "threads", "device", "precision", "torch", "python")
    return ", ".join(f"{k} {environment[k]}" for k in keys if k in environment)


def finished(directory: Path) -> tuple[Run, dict[str, Any]]:
    """A run and its result."""
    run = Run.open(directory)
    assert run.result is not None, f"{directory} has not finished"
    return run, run.result


def under(settings: recipe.Recipe) -> str:
    """What a run's name adds for a stochastic teacher: ", p_end 0.9"."""
    depths = [teacher.stochastic for teacher in settings.teachers]
    return "".join(f", p_end {depth.p_end:g}" for depth in depths if depth is not None)


def of_runs(
    heading: str, remarks: Sequence[str], rows: str, places: set[str], commands: Sequence[str]
) -> list[str]:
    """A section on runs: remarks, their table, where they ran, and the commands."""
    return [
        f"## {heading}\n",
        *remarks,
        rows + "\n",
        "\n".join(f"On: {place}." for place in sorted(places)) + "\n",
        "```bash\n" + "\n".join(commands) + "\n```\n",
    ]


def trainings(heading: str, directories: Sequence[Path], text: str = "") -> list[str]:
    """Single runs, one row each, and a remark."""
    rows, commands, places = [], [], set()
    for directory in directories:
        run, result = finished(directory)
        settings = recipe.loads(run.recipe, finished=True)
        best = result["best_epoch"]["student"]
        teacher = result["teachers"].get("teacher0")
        rows.append(
            [
                f"`{settings.method.name}` {settings.students[0].name}{under(settings)}",
                f"{teacher['top1']:.2f}" if teacher else "-",
                f"{result['scores']['student']['top1']:.2f}",
                f"{best['top1']:.2f} (epoch {best['epoch']})",
                f"{result['scores']['student']['top5']:.2f}",
                "1",
                f"{result['images_per_second']:,.0f}",
                duration(result["seconds"]),
            ]
        )
        commands.append(command_of(run))
        places.add(hardware(run.environment))
    head = ["run", "teacher", "last epoch", "best epoch", "top-5", "n", "images/s", "time"]
    return of_runs(heading, [text] if text else [], table(head, rows), places, commands)


def demo(directory: Path) -> list[str]:
    """The table that `potstill demo` prints."""
    kinds = {"teacher": "teacher", "student alone": "vanilla", "kd": "kd", "at": "at"}
    runs = {
        name: [Run.open(p) for p in sorted((directory / folder).iterdir())]
        for name, folder in kinds.items()
    }
    rows = [report.cells(row) for row in report.rows(runs)]
    return [
        "## The demo: handwritten digits\n",
        "Teachers see every training image, students 100 of them.\n",
        table(report.HEAD, rows) + "\n",
        f"On: {hardware(runs['kd'][0].environment)}.\n",
        "```bash\npotstill demo\n```\n",
    ]


def speed(files: Sequence[Path]) -> list[str]:
    """Whole runs beside a plain loop and beside what bare steps take."""
    parts = [
        "## Speed: kd ResNet-56 to ResNet-20 on CIFAR-100\n",
        "Images a second, medians of rounds in turns in one process, batch 64. A whole epoch has "
        "evaluation on the 10,000 test images and, but for the loop, a checkpoint. The plain loop "
        "is that of `potstill bench --against loop`; the bare steps are the limit of the machine: "
        "one batch that lies ready, no data work, evaluation or checkpoint. First steps compile "
        "what is compiled and fill the store; the loop's follow those that chose its workers.\n",
    ]
    commands = []
    for path in files:
        found = json.loads(path.read_text())
        rows = [
            [
                name,
                f"{median(speeds):.0f}",
                f"{median(found['step_images_per_second'][name]):.0f}",
                f"{found['first_seconds'][name]:.0f}",
            ]
            for name, speeds in found["images_per_second"].items()
        ]
        head = ["", "images/s, whole epochs", "of the steps alone", "s, first steps"]
        ratios = [
            [name, f"{r['median']:.3f}", "{:.3f} to {:.3f}".format(*r["range"])]
            for name, r in found["ratios"].items()
        ]
        compiled = found["environment"]["compile"]
        split = next(iter(found["split"].values()))
        parts += [
            f"### `compile={compiled}`\n",
            table(head, rows) + "\n",
            table(["ratio by round", "median", f"range, n = {found['n']}"], ratios) + "\n",
            "Milliseconds of a step:\n",
            table(
                ["", *split],
                [
                    [name, *(f"{1000 * seconds:.2f}" for seconds in of.values())]
                    for name, of in found["split"].items()
                ],
            )
            + "\n",
            f"On: {hardware(found['environment'])}. Rounds of {found['steps']} steps; the loop "
            f"with {found['loop_workers'] or 'no'} worker processes; of the outputs that the full "
            f"store was asked for {100 * found['hit_rate']:.0f} % were there.\n",
        ]
        commands.append(
            f"python benchmarks/speed.py --weights FILE --rounds {found['n']} --steps "
            f"{found['steps']} --compile {compiled} --out {path.as_posix()}"
        )
    return [*parts, "```bash\n" + "\n".join(commands) + "\n```\n"]


def compiling(path: Path) -> list[str]:
    """What torch.compile brings each network."""
    found = json.loads(path.read_text())
    rows = []
    for name, row in found["models"].items():
        cells = [f"`{name}`"]
        for role in ("student", "teacher"):
            low, high = row["speedup"][role]["range"]
            cells += [
                f"{1000 * row['seconds'][f'{role}, eager']:.1f}",
                f"{row['speedup'][role]['median']:.2f} ({low:.2f} to {high:.2f})",
            ]
        took = row["first_seconds"]
        cells.append(f"{took['student, compiled'] + took['teacher, compiled']:.0f}")
        rows.append(cells)
    head = ["network", "ms, student", "times", "ms, teacher", "times", "s, first"]
    return [
        "## Compiling: a student's step and a teacher's forward\n",
        f"Batches of {found['batch_size']} images of 32x32, medians of {found['n']} rounds in "
        'turns, milliseconds as it is; "times" is how much faster when compiled. The first '
        "compiled calls took so many seconds, less where kernels of earlier runs were on the disk."
        "\n",
        table(head, rows) + "\n",
        f"On: {hardware(found['environment'])}.\n",
        "```bash\n"
        f"python benchmarks/compile_cost.py {' '.join(found['models'])} --rounds {found['n']} "
        f"--steps {found['steps']} --out {path.as_posix()}\n```\n",
    ]


def fidelity(path: Path) -> list[str]:
    """What a store changes."""
    found = json.loads(path.read_text())
    rows = [
        [f"`{name}`", *(f"{terms[t]:.1e}" if terms[t] else "0" for t in ("ce", "kd"))]
        for name, terms in found["largest_relative_difference"].items()
    ]
    test, accuracy = found["paired_t_test"], found["accuracy"]
    means = {name: sum(values) / len(values) for name, values in accuracy.items()}
    equal = "equal bit for bit" if found["bf16_weights_equal"] else "not equal"
    settings = " ".join(f"'{s}'" if " " in s else s for s in found["settings"])
    return [
        "## The teacher store: what reading changes\n",
        f"kd ResNet-56 to ResNet-20 on CIFAR-100. Largest relative difference of each term over "
        f"{found['batches']} batches of {found['batch_size']}, the same weights and images with "
        "live and with stored outputs:\n",
        table(["kept", "ce", "kd"], rows) + "\n",
        f"Final accuracy of {found['n']} seeds ({settings}), float32, live "
        f"{means['live']:.2f} %, stored in 16 bits {means['stored']:.2f} %: paired by seed "
        f"{test['mean']:+.2f} ± {test['half_width']:.2f} points (95 % t-interval), p = "
        f"{test['p']:.2f} of a two-sided paired t-test, n = {found['n']}. In bf16 the weights with "
        f"and without a store are {equal}.\n",
        f"On: {hardware(found['environment'])}.\n",
        "```bash\n"
        f"python benchmarks/store_fidelity.py --weights FILE --batches {found['batches']} --seeds "
        f"{found['n']} --out {path.as_posix()}\n```\n",
    ]


def taps(path: Path) -> list[str]:
    """What capturing every tap costs."""
    found = json.loads(path.read_text())
    rows = [
        [
            f"`{name}`",
            str(model["taps"]),
            f"{1000 * model['seconds']['without']:.0f}",
            f"{model['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*model["ratio_quartiles"]),
        ]
        for name, model in found["models"].items()
    ]
    head = ["network", "taps", "ms without taps", "time with / without", "quartiles"]
    return [
        f"## Taps: forward and backward with all captured, batch {found['batch_size']}\n",
        f"Medians and quartiles of {found['n']} rounds in turns.\n",
        table(head, rows) + "\n",
        f"On: {hardware(found['environment'])}.\n",
        f"```bash\npython benchmarks/tap_cost.py --out {path.as_posix()}\n```\n",
    ]


def methods(heading: str, text: str, files: Sequence[Path]) -> list[str]:
    """What every method costs beside plain training."""
    parts = [f"## {heading}\n", text]
    head = ["method", "phase", "images/s", "of vanilla's", "quartiles", "n", "peak MiB", "loss"]
    line = "python benchmarks/method_cost.py --teacher ... --precision {} --steps {} --out {}"
    lines = []
    for path in files:
        found = json.loads(path.read_text())
        setting, rows = found["setting"], []
        for name, row in found["methods"].items():
            for phase, cost in row["phases"].items():
                assert cost["finite"], (name, phase)
                rows.append(
                    [
                        f"`{name}`",
                        phase,
                        f"{cost['images_per_second']:.0f}",
                        f"{cost['ratio']:.3f}",
                        "{:.3f} to {:.3f}".format(*cost["ratio_quartiles"]),
                        str(cost["n"]),
                        f"{row['peak_bytes'] / 2**20:.0f}",
                        "fell" if cost["falling"] else "did not fall",
                    ]
                )
        parts += [
            table(head, rows) + "\n",
            f"On: {hardware(found['environment'])}.\n",
        ]
        command = line.format(setting["precision"], found["n"], path.as_posix())
        if setting["data"] != "cifar100":
            command += f" --data {setting['data']} --images {setting['images']}"
            command += f" --pair {' '.join(setting['pair'])}"
            command += f" --methods {' '.join(found['methods'])}"
        lines.append(command)
    parts.append("```bash\n" + "\n".join(lines) + "\n```\n")
    return parts


def online(heading: str, directories: Sequence[Path], text: str) -> list[str]:
    """Runs of networks that teach each other: every network, their mean, and the ensemble."""
    rows, commands, places = [], [], set()
    for directory in directories:
        run, result = finished(directory)
        settings = recipe.loads(run.recipe, finished=True)
        top1, ensemble = report.students(result), result["scores"].get("ensemble")
        rows.append(
            [
                f"`{settings.method.name}` {', '.join(n.name for n in settings.students)}",
                ", ".join(f"{value:.2f}" for value in top1),
                f"{sum(top1) / len(top1):.2f}",
                "-" if ensemble is None else f"{ensemble['top1']:.2f}",
                "1",
                f"{result['images_per_second']:,.0f}",
                duration(result["seconds"]),
            ]
        )
        commands.append(command_of(run))
        places.add(hardware(run.environment))
    head = ["run", "each network", "mean", "ensemble", "n", "images/s", "time"]
    return of_runs(heading, [text], table(head, rows), places, commands)


def cross_task(heading: str, directories: Sequence[Path], text: str) -> list[str]:
    """Runs beside a teacher of other classes, with what `potstill cross-task` made of them."""
    rows, commands, places = [], [], set()
    for directory in directories:
        run, result = finished(directory)
        settings = recipe.loads(run.recipe, finished=True)
        found = json.loads((directory / "cross_task.json").read_text())
        variant = getattr(settings.method, "variant", None)
        embed, joint, weights = result["earlier"].get("embed"), found["joint"], found["weights"]
        rows.append(
            [
                f"`{settings.method.name}`{f' {variant}' if variant else ''}",
                str(result["epochs"]),
                f"{100 * (settings.data.overlap or 0):.0f} %",
                f"{found['accuracy']['top1']:.2f}",
                f"{embed['scores']['ncm']['top1']:.2f}" if embed else "-",
                f"{found['ncm']['top1']:.2f}",
                f"{joint['teacher_classes']:.2f}",
                f"{joint['student_classes']:.2f}",
                f"{joint['harmonic_mean']:.2f}",
                "-" if weights["auc"] is None else f"{weights['auc']:.3f}",
                "-" if weights["test_auc"] is None else f"{weights['test_auc']:.3f}",
                "1",
                f"{result['images_per_second']:,.0f}",
            ]
        )
        taught, place = found["teacher"]["accuracy"], directory.name
        commands.append(command_of(run))
        commands.append(f"potstill cross-task runs/{place} --teacher {found['teacher']['source']}")
        places.add(hardware(run.environment))
    head = ["run", "epochs", "overlap", "accuracy", "NCM after `embed`", "NCM", "joint: teacher's"]
    head += ["joint: student's", "harmonic", "AUC", "AUC, test", "n", "images/s"]
    teacher = (
        f"Teacher: {taught['top1']:.2f} % on {taught['images']:,} test images of its classes.\n"
    )
    lines = [CROSS_TEACHER, *commands]
    return of_runs(heading, [text, teacher], table(head, rows), places, lines)


def together(heading: str, text: str, files: Sequence[Path]) -> list[str]:
    """What networks that teach each other cost beside as many plain runs."""
    parts, lines = [f"## {heading}\n", text], []
    head = ["networks", "method", "images/s", "steps", "quartiles", "whole run", "peak MiB", "loss"]
    for path in files:
        found = json.loads(path.read_text())
        rows = []
        for networks, measured in found["networks"].items():
            for name, row in measured.items():
                assert row["finite"], (networks, name)
                rows.append(
                    [
                        networks.replace(",", ", "),
                        name,
                        f"{row['images_per_second']:.0f}",
                        f"{row['ratio']:.3f}",
                        "{:.3f} to {:.3f}".format(*row["ratio_quartiles"]),
                        f"{row['whole_run_ratio']:.3f}",
                        f"{row['peak_bytes'] / 2**20:.0f}",
                        "fell" if row["falling"] else "did not fall",
                    ]
                )
        parts += [
            table(head, rows) + "\n",
            f"n {found['n']}. On: {hardware(found['environment'])}.\n",
        ]
        command = f"python benchmarks/online_cost.py --precision {found['setting']['precision']}"
        lines.append(f"{command} --steps {found['n']} --out {path.as_posix()}")
    return [*parts, "```bash\n" + "\n".join(lines) + "\n```\n"]


ON_ONLINE = """\
The settings of Chung et al. (arXiv:2002.01775) shortened from 300 epochs to five, milestones with
them; the two networks start from seeds of their own, the first as the one of `vanilla` does. One
seed: no claim of order. Images/s count an image once, whatever the number of networks.
"""
ON_TOGETHER = """\
One epoch of 3,200 images, batch 64, every network's cross-entropy falling or not; then steps in
turns with as many plain trainings, one a network. The ratio is the time of the plain ones over that
of all together: 1 is what separate runs take. A whole run's is of 50,000 training and 10,000 test
images an epoch, the ensemble evaluated too. By counting passes (forward 1, backward 2), two equal
networks can reach 6/7 of it in `dml`, whose first network predicts twice, three 9/11; and 3/5 in
`afd_online`, which goes backwards through each network twice. In `one` the low layers are shared.
"""


def reproduced(heading: str, directory: Path) -> list[str]:
    """What `potstill reproduce` found, as `potstill report` tells it."""
    found = report.collect([directory])
    (outcome,) = found.reproduced
    runs = [run for group in found.finished for run in group.runs]
    hours = sum((run.result or {})["seconds"] for run in runs) / 3600
    waiting = sum(row["waiting"] for row in outcome["rows"])
    rest = f"; {waiting} of those planned were not reached" if waiting else ""
    times = f"{len(runs)} runs, {hours:.1f} hours of one core in all{rest}."
    tables = report.markdown(found).replace("\n## ", "\n### ").removeprefix("## ")
    place = directory.as_posix()
    return [
        f"## {heading}\n",
        ON_REPRODUCED,
        f"{times}\n",
        f"### {tables}",
        "\n".join(f"On: {p}." for p in sorted({hardware(run.environment) for run in runs})) + "\n",
        "```bash\n"
        + f"{outcome['command']}\npotstill report {place} --html report.html"
        + "\n```\n",
    ]


ON_REPRODUCED = """\
The SAKD table's pair by `potstill reproduce`: full CIFAR-100, the given teacher, the published
settings shortened from 240 epochs to one, milestones with them, two runs at once on a thread each
while other work shared the processor, interrupted and continued. A student is hardly trained in
one epoch: what stands here is which method makes the first steps faster, and no verdict on any
figure. The page with the plots is made by the last command.
"""


def skipping(files: Sequence[Path]) -> list[str]:
    """What a stochastic teacher's forward costs beside the plain one's."""
    head = ["teacher", "p_end", "one draw a", "alive", "ms plain", "time / plain", "quartiles"]
    heading = "## Stochastic depth: a teacher's forward beside the plain one's\n"
    parts, lines = [heading, ON_SKIPPING], []
    for path in files:
        found = json.loads(path.read_text())
        rows = [
            [
                f"`{name}`",
                *key.split(", "),
                f"{row['alive']:.3f}",
                f"{1000 * model['plain_seconds']:.0f}",
                f"{row['ratio']:.3f}",
                "{:.3f} to {:.3f}".format(*row["ratio_quartiles"]),
            ]
            for name, model in found["models"].items()
            for key, row in model["teachers"].items()
        ]
        place = hardware(found["environment"])
        parts += [
            table(head, rows) + "\n",
            f"Batch {found['batch_size']}, n {found['n']}. On: {place}.\n",
        ]
        precision = {"bfloat16": "bf16", "float32": "fp32"}[found["environment"]["precision"]]
        lines.append(
            f"python benchmarks/stochastic_cost.py --precision {precision} --rounds {found['n']} "
            f"--out {path.as_posix()}"
        )
    return [*parts, "```bash\n" + "\n".join(lines) + "\n```\n"]


ON_STOCHASTIC = """\
The published settings shortened from 240 epochs to five, milestones with them. The teacher is the
same ResNet-56, trained without dropping: with p_end 0.9 it is another sub-network at every step.
Its accuracy is that of the expected depth. One seed: no claim of order.
"""
CROSS_TEACHER = (
    "potstill train cifar100/gkd-vanilla-wrn_40_2 students.0=wrn_40_1_gkd epochs=20 "
    "--out runs/cross-teacher"
)
ON_CROSS = """\
The published settings on 5,000 of the student's 25,000 training images (100 a class), batch 64 in
place of 256, five epochs a phase in place of 200, milestones with them; `vanilla` in five epochs
and in ten, as many as both phases together. The teacher learnt its own 50 classes from all of their
images in 20 epochs. NCM is the nearest class mean, with means of the training images; joint
accuracy is over the classes of both tasks, by our own construction (docs/cross-task.md). The AUC is
the teacher's alone, so it is the same in all rows of an overlap. One seed: no claim of order.
"""
ON_SKIPPING = """\
Rounds of forwards in turns on one batch, the stochastic teacher drawn anew each time; medians of
the rounds' ratios, with quartiles. "Alive" is the share of blocks that survives on average: what
the time would be if blocks were everything and cost the same. With p_end 1 nothing is dropped:
these rows say how noisy the machine was, and what the shortcuts cost that MobileNetV1 is given.
"""
ON_FEATURES = """\
`mhgd` learns its heads in two epochs before the ten. The time counts them.
"""
ON_CIFAR = """\
Each method's shipped recipe, with these networks (`refilled`, `aml` and `jacobian`: those of their
own tables). Images/s are medians of steps taken in turns with plain training (`vanilla`) in one
process; the ratio is of those pairs, with quartiles. Peak memory is the whole
process's (of the GPU, on a GPU), the data set included. All terms were finite; the loss fell where
the sum of terms and the cross-entropy were lower in the end. `crd` has 4,096 negatives: the slice
is too small for 16,384. `semckd` has beta 50, because its 400 diverges with this teacher; `norm`'s
weight, which falls in the end, stays 1 (`ramp` off). How far `vanilla` is from 1 beside itself
says how noisy the machine was. Rows were measured at different times: compare ratios, not images/s.
"""
ON_TINY = """\
The same at 64x64, on 2,000 images of 50 classes, with a teacher trained for three epochs of 5,000:
it shows that every phase runs with finite losses, not how good students are. A phase is 15 steps
here, in which plain training at these rates hardly moves the cross-entropy. The teacher:
`potstill train cifar100/vanilla-wrn_22_4_mhgd data.name=tiny-imagenet data.subset=5000 epochs=3`.
"""


def svd(files: Sequence[Path]) -> list[str]:
    """What the compression to singular vectors costs beside torch.linalg.svd."""
    parts = [
        "## Singular vectors: forward and backward of a batch\n",
        "`right_singular_vectors` (four of each image) beside `torch.linalg.svd` and its own\n"
        "backward, in turns: medians in milliseconds, and the ratio with quartiles, of noise\n"
        "after a ReLU. With one channel in eight dead, torch's gradient is not finite in maps\n"
        "that have at least as many positions as channels.\n",
    ]
    head = ["map", "ms", "torch's ms", "torch's / ours", "quartiles", "dead: ours, torch's finite"]
    lines = []
    for path in files:
        found = json.loads(path.read_text())
        rows = [
            [
                name,
                f"{1000 * row['seconds']['ours']:.1f}",
                f"{1000 * row['seconds']['torch']:.1f}",
                f"{row['ratio']:.2f}",
                "{:.2f} to {:.2f}".format(*row["ratio_quartiles"]),
                f"{row['finite_with_dead_channels']['ours']:.0%}, "
                f"{row['finite_with_dead_channels']['torch']:.0%}",
            ]
            for name, row in found["maps"].items()
        ]
        for net in ("WRN", "VGG"):
            of_net = [row["seconds"] for name, row in found["maps"].items() if name[:3] == net]
            mine, other = (sum(row[way] for row in of_net) for way in ("ours", "torch"))
            total = [f"{1000 * mine:.1f}", f"{1000 * other:.1f}", f"{other / mine:.2f}"]
            rows.append([f"{net}, all {len(of_net)}, a step", *total, "", ""])
        parts += [
            table(head, rows) + "\n",
            f"Batch {found['batch_size']}, n {found['n']}. On: {hardware(found['environment'])}.\n",
        ]
        lines.append(f"python benchmarks/svd_cost.py --out {path.as_posix()}")
    return [*parts, "```bash\n" + "\n".join(lines) + "\n```\n"]


def merged(there: str, sections: Sequence[str]) -> str:
    """A document with some sections replaced, new ones at its end."""
    _, *old = there.split("\n## ")
    kept = {part.partition("\n")[0]: f"## {part.strip()}\n" for part in old}
    new = {part.partition("\n")[0].removeprefix("## "): f"{part.strip()}\n" for part in sections}
    return "\n".join([TITLE, *(kept | new).values()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", type=Path, nargs="+", help="runs of vanilla and kd")
    parser.add_argument("--features", type=Path, nargs="+", help="runs of feature methods")
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--speed", type=Path, nargs="+")
    parser.add_argument("--compiling", type=Path, help="of compile_cost.py")
    parser.add_argument("--fidelity", type=Path, help="of store_fidelity.py")
    parser.add_argument("--taps", type=Path)
    parser.add_argument("--methods", type=Path, nargs="+")
    parser.add_argument("--tiny", type=Path, nargs="+", help="of method_cost.py on 64x64 images")
    parser.add_argument("--svd", type=Path, nargs="+")
    parser.add_argument("--online", type=Path, nargs="+", help="runs of several networks")
    parser.add_argument("--stochastic", type=Path, nargs="+", help="runs with stochastic teachers")
    parser.add_argument("--skipping", type=Path, nargs="+", help="of stochastic_cost.py")
    parser.add_argument("--cross-task", type=Path, nargs="+", help="runs, after cross-task")
    parser.add_argument("--reproduced", type=Path, help="a folder of potstill reproduce")
    parser.add_argument("--together", type=Path, nargs="+", help="of online_cost.py")
    options = parser.parse_args()
    cost = "Methods: one epoch of 5,000 images, ResNet-56 to ResNet-20"
    tiny = "Methods: one epoch of Tiny-ImageNet-50, WRN-22-4 to WRN-10-4"
    features = "Feature methods: ResNet-20 on CIFAR-100 in 10 one-cycle epochs"
    pair = "Online: two ResNet-20 on CIFAR-100 in 5 epochs"
    costs = "Online: what K networks cost beside K plain runs"
    across = "Cross-task: WRN-40-1 teaches WRN-16-1 other classes of CIFAR-100"
    drawn = "Stochastic teachers: ResNet-20 on CIFAR-100 in 5 epochs"
    table_again = "Reproduce: SAKD's table, ResNet-56 to ResNet-20, in one epoch"
    budget = "ResNet-20 on CIFAR-100 in 10 one-cycle epochs"
    made = [
        *([trainings(budget, options.short)] if options.short else []),
        *([trainings(features, options.features, ON_FEATURES)] if options.features else []),
        *([demo(options.demo)] if options.demo else []),
        *([speed(options.speed)] if options.speed else []),
        *([compiling(options.compiling)] if options.compiling else []),
        *([fidelity(options.fidelity)] if options.fidelity else []),
        *([taps(options.taps)] if options.taps else []),
        *([methods(cost, ON_CIFAR, options.methods)] if options.methods else []),
        *([methods(tiny, ON_TINY, options.tiny)] if options.tiny else []),
        *([svd(options.svd)] if options.svd else []),
        *([online(pair, options.online, ON_ONLINE)] if options.online else []),
        *([trainings(drawn, options.stochastic, ON_STOCHASTIC)] if options.stochastic else []),
        *([skipping(options.skipping)] if options.skipping else []),
        *([cross_task(across, options.cross_task, ON_CROSS)] if options.cross_task else []),
        *([together(costs, ON_TOGETHER, options.together)] if options.together else []),
        *([reproduced(table_again, options.reproduced)] if options.reproduced else []),
    ]
    RESULTS.write_text(merged(RESULTS.read_text(), ["\n".join(parts) for parts in made]))
