"""Write docs/results.md from finished runs and benchmark files: no figure is typed in by hand.

    python benchmarks/write_results.py --demo runs/demo --overhead FILE [FILE ...] \
        --taps FILE -- RUN [RUN ...] > docs/results.md
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill import recipe, report
from potstill.display import duration
from potstill.run import Run

TITLE = """# Results, as measured

Written by `{command}`.
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


def command_of(run: Run) -> str:
    """The command line that started a run."""
    program, *words = run.environment["command"]
    return shlex.join([Path(program).name, *words])


def trainings(directories: Sequence[Path]) -> list[str]:
    """Single runs, one row each."""
    rows, commands, places = [], [], set()
    for directory in directories:
        run = Run.open(directory)
        result = run.result
        assert result is not None, f"{directory} has not finished"
        settings = recipe.loads(run.recipe)
        best = result["best_epoch"]["student"]
        teacher = result["teachers"].get("teacher0")
        rows.append(
            [
                f"`{settings.method.name}` {settings.students[0].name}",
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
    return [
        "## ResNet-20 on CIFAR-100 in 10 one-cycle epochs\n",
        table(head, rows) + "\n",
        "\n".join(f"On: {place}." for place in sorted(places)) + "\n",
        "```bash\n" + "\n".join(commands) + "\n```\n",
    ]


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


def overhead(files: Sequence[Path]) -> list[str]:
    """What the engine costs beside a bare loop."""
    rows = []
    for path in files:
        found = json.loads(path.read_text())
        (low, high), (step_low, step_high) = found["ratio_range"], found["ratio_of_steps_range"]
        rows.append(
            [
                found["environment"]["precision"],
                f"{found['images_per_second']:.0f}",
                f"{found['reference_images_per_second']:.0f}",
                f"{found['ratio']:.3f} ({low:.3f} to {high:.3f})",
                f"{found['ratio_of_steps']:.3f} ({step_low:.3f} to {step_high:.3f})",
                str(found["n"]),
            ]
        )
        place = hardware(found["environment"])
    head = ["precision", "whole run", "bare loop", "ratio", "ratio of steps alone", "n"]
    return [
        "## Overhead: kd ResNet-56 to ResNet-20, batch 64, CIFAR-100\n",
        "Images a second, medians. The bare loop has no data work, evaluation or checkpoints.\n",
        table(head, rows) + "\n",
        f"On: {place}.\n",
        "```bash\npython benchmarks/engine_overhead.py --out benchmarks/results/FILE.json\n```\n",
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--overhead", type=Path, nargs="+", required=True)
    parser.add_argument("--taps", type=Path, required=True)
    options = parser.parse_args()
    words = ["--demo", str(options.demo), "--overhead", *map(str, options.overhead)]
    words += ["--taps", str(options.taps), "--"]
    line = shlex.join(["python", "benchmarks/write_results.py", *words, *map(str, options.runs)])
    parts = [TITLE.format(command=line), *trainings(options.runs), *demo(options.demo)]
    parts += [*overhead(options.overhead), *taps(options.taps)]
    print("\n".join(parts).rstrip())
