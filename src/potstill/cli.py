"""The command line. Heavy imports wait until a command needs them: --help answers at once."""

from __future__ import annotations

import json
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.errors import PotstillError

if TYPE_CHECKING:
    from potstill.recipe import Recipe
    from potstill.run import Run

app = typer.Typer(
    name="potstill",
    help="Knowledge distillation of image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXIT_STORAGE = 3


def main() -> None:
    """Run a command; a user's mistake is one message and an exit code, never a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except PotstillError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", EXIT_STORAGE)


def _fail(message: str, code: int) -> None:
    print(f"potstill: {message}", file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # a rank that ends where others had ended before may be aborted by the destructors of
        # torch's process groups, also of one that it has left, and its exit code would be lost
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _show_warning(message: Warning | str, *rest: Any, **named: Any) -> None:
    print(f"potstill: warning: {message}", file=sys.stderr)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
) -> None:
    """Teacher, plain student and distilled students on real images that come along."""
    from rich.console import Console

    from potstill import demo

    demo.demonstrate(out, seeds, Console())


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe (potstill list recipes), or a .yaml.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="epochs=10 data.root=DIR")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs with consecutive seeds.")] = 1,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let the recipe import py:module:factory.")
    ] = False,
) -> None:
    """Train one recipe, from its newest checkpoint with --resume.

    potstill train cifar100/kd-resnet56-resnet20 teachers.0.weights=PATH epochs=10
    """
    from rich.console import Console

    from potstill import display, distributed, report, training
    from potstill import recipe as recipes

    overrides = list(overrides or [])
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        overrides, recipe = [recipe, *overrides], None
    if recipe is None:
        if not resume or overrides or seeds > 1:
            raise PotstillError(
                "name a recipe: potstill train RECIPE [key=value ...]; potstill list recipes shows "
                "them, and --resume alone continues the newest unfinished run"
            )
        out = out or _newest_unfinished(Path("runs"))
        loaded = recipes.load(out / "recipe.yaml", allow_code=allow_code)
    else:
        loaded = recipes.load(recipe, overrides, allow_code=allow_code)
    with distributed.together():
        console = Console(quiet=distributed.rank() > 0)
        for note in loaded.notes:
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        runs = []
        for seed in range(loaded.seed, loaded.seed + seeds):
            one = loaded.model_copy(update={"seed": seed})
            if out is None:
                place = _default_directory(recipe or "", one)
            else:
                place = out / f"seed{seed}" if seeds > 1 else out
            with display.watcher(console, quiet=distributed.rank() > 0) as watcher:
                run = training.train(one, place, watcher, resume)
            _print_result(run, place, console)
            runs.append(run)
        if seeds > 1:
            swapped = any(override.startswith("method") for override in overrides)
            named = f"{recipe} {loaded.method.name}" if swapped else str(recipe)
            console.print(report.table(report.rows({named: runs})))


def _default_directory(recipe: str, resolved: Recipe) -> Path:
    """The same for the same settings, so that --resume finds it."""
    import hashlib

    settings = resolved.model_copy(update={"seed": 0}).to_yaml()
    settings = settings.replace("store: null\n", "")  # named as before there were stores
    digest = hashlib.sha256(settings.encode()).hexdigest()[:6]
    slug = recipe.removesuffix(".yaml").strip("./").replace("/", "-")
    return Path("runs") / f"{slug}-{digest}" / f"seed{resolved.seed}"


def _newest_unfinished(root: Path) -> Path:
    found = [
        p.parent
        for p in sorted(root.glob("**/recipe.yaml"), key=lambda p: p.stat().st_mtime)
        if not (p.parent / "result.json").exists()
    ]
    if not found:
        raise PotstillError(f"no unfinished run under {root}/; name a recipe or --out DIR")
    return found[-1]


def _print_result(run: Run, place: Path, console: Any) -> None:
    from potstill import report

    result = run.result or {}
    for name, score in result["scores"].items():
        best = result["best_epoch"][name]
        line = (
            f"{name}: {score['top1']:.2f} % top-1 on the test set after the last epoch "
            f"(best epoch on {best['split']}: {best['top1']:.2f} %, epoch {best['epoch']}"
        )
        chosen = ", chosen on the test set, not a result" if best["split"] == "test" else ""
        console.print(f"{line}{chosen})", highlight=False, soft_wrap=True)
    for phase, last in result.get("earlier", {}).items():
        for name, score in last["scores"].items():
            line = f"{name}: {score['top1']:.2f} % top-1 on the {last['split']} set after {phase}"
            console.print(line, highlight=False, soft_wrap=True)
    if len(students := report.students(result)) > 1:
        mean = sum(students) / len(students)
        console.print(f"mean of {len(students)} students: {mean:.2f} % top-1", highlight=False)
    console.print(
        f"{result['images_per_second']:,.0f} images/s, {result['seconds']:,.0f} s; run: {place}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def doctor(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (potstill list recipes), or a .yaml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="epochs=10 data.root=DIR")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the run would go.")] = Path("runs"),
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let the recipe import py:module:factory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a recipe before it is trained, on real batches; exit code 1 if something fails.

    potstill doctor cifar100/kd-resnet56-resnet20 teachers.0.weights=PATH
    """
    from rich.console import Console

    from potstill import doctor
    from potstill import recipe as recipes

    loaded = recipes.load(recipe, list(overrides or []), allow_code=allow_code)
    console, findings = Console(quiet=as_json), []
    with console.status("checking"):
        for finding in doctor.examine(loaded, out):
            findings.append(finding)
            doctor.show(finding, console)
    console.print(doctor.summary(findings), highlight=False)
    if as_json:
        print(json.dumps(doctor.as_object(recipe, findings), indent=2))
    if not doctor.healthy(findings):
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A finished run's directory.")] = None,
    model: Annotated[str | None, typer.Option(help="An architecture, with --weights.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A .pth, .safetensors or run.")] = None,
    data: Annotated[str | None, typer.Option(help="A data set by name, with --weights.")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the data are.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let a run's recipe import py:module:factory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Accuracy of a run's predictors, or of a model with weights, on the test images.

    potstill eval RUN, or potstill eval --model resnet56 --weights FILE --data cifar100
    """
    from potstill import training

    if (run is None) == (model is None and weights is None):
        raise PotstillError("give a run's directory, or --model and --weights")
    if run is not None:
        if data is not None:
            raise PotstillError("a run is measured on its own data: leave --data out")
        if not run.exists() and Path(str(run).rpartition(":")[0] or "?").is_dir():
            raise PotstillError(
                f"{run} is one predictor: potstill eval --weights {run}, or the run for all of them"
            )
        scores = training.evaluate_run(run, root, allow_code)
    else:
        scores = training.evaluate_weights(
            model, weights, data, root, lambda line: print(line, file=sys.stderr)
        )
    if as_json:
        print(json.dumps({name: score._asdict() for name, score in scores.items()}, indent=2))
    else:
        for name, score in scores.items():
            print(f"{name}: {training.in_words(score)}")


class Weighting(StrEnum):
    """How `potstill cross-task` weighs images."""

    minmax = "minmax"
    raw = "raw"


@app.command("cross-task")
def cross_task(
    run: Annotated[str, typer.Argument(help="A finished run's directory, or RUN:student1.")],
    teacher: Annotated[
        str | None, typer.Option(help="A run or weights, if not the run's own teacher.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where the data are.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are weighed together.")] = 256,
    weighting: Annotated[
        Weighting, typer.Option(help="By the batch's least and greatest loss, or by each alone.")
    ] = Weighting.minmax,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let a run's recipe import py:module:factory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a student is worth beside a teacher of other classes.

    Nearest class mean, joint accuracy over the classes of both, instance
    weights with AUC; kept as cross_task.json and instance_weights.csv.
    """
    from potstill import cross_task

    found = cross_task.examine(run, teacher, root, batch_size, weighting.value, allow_code)
    print(json.dumps(found, indent=2) if as_json else "\n".join(cross_task.describe(found)))


@app.command()
def reproduce(
    paper: Annotated[str, typer.Argument(help="A paper (potstill list papers).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Of every recipe: data.root=DIR")
    ] = None,
    table: Annotated[str | None, typer.Option(help="One table, by number or name.")] = None,
    pair: Annotated[
        str | None, typer.Option(metavar="TEACHER:STUDENT", help="resnet56:resnet20")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Some methods: vanilla,kd,sakd")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each; a match needs three.")] = 3,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="A shortened schedule, marked everywhere.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="[NETWORK=]FILE", help="A teacher's, in place of training it."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each a process.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan alone.")] = False,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Points that are a match.")] = 0.5,
    out: Annotated[
        Path | None, typer.Option(help="Where the runs go: runs/reproduce/PAPER.")
    ] = None,
) -> None:
    """Train a paper's table again, and say how far it agrees.

    Plans the runs, teachers first, and tells how long they will take; runs what
    is missing, continues what was interrupted, and leaves alone what is done.

    potstill reproduce sakd --pair resnet56:resnet20 --methods vanilla,kd,sakd --epochs 10
    """
    import shlex

    from rich.console import Console

    from potstill import files, report, reproduce
    from potstill.errors import MissingExtra

    console, command = Console(), ["potstill", *sys.argv[1:]]
    plan = reproduce.make(
        paper,
        out or Path("runs/reproduce") / paper,
        table=table,
        pair=pair,
        methods=None if methods is None else [m.strip() for m in methods.split(",")],
        seeds=seeds,
        epochs=epochs,
        weights=weights or (),
        overrides=overrides or (),
        tolerance=tolerance,
    )
    if not dry_run:
        reproduce.require_alone(plan)  # before it is disturbed by measuring
    with console.status("measuring a few steps") as status:
        cost = reproduce.estimate(plan, jobs, lambda line: status.update(line))
    console.print(reproduce.table(plan, cost))
    for line in reproduce.remarks(plan, cost, jobs):
        console.print(line, markup=False, highlight=False)
    if dry_run:
        return
    if cost.faults and not cost.seconds:
        raise PotstillError(f"none of these runs can start: {next(iter(cost.faults.values()))}")
    fault = None
    try:
        reproduce.carry_out(plan, jobs, console, command)
    except reproduce.RunsFailed as error:
        fault = error
    found = report.collect([plan.out])
    report.print_report(found, console)
    written = [plan.out / "report.md"]
    files.write_bytes(written[0], report.markdown(found).encode())
    try:
        report.write_html(found, plan.out / "report.html", shlex.join(command))
        written.append(plan.out / "report.html")
    except MissingExtra as error:
        print(f"no page: {error}")
    print(f"written: {', '.join(map(str, written))}")
    if fault is not None:
        raise fault


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Runs, or folders with runs in them.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with plots too.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to a file too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Runs side by side: accuracy with intervals, differences by seed, cost.

    Runs of one recipe are one group over its seeds; what makes figures worth
    less than they look is a warning. --html needs the extra report.
    """
    import shlex

    from rich.console import Console

    from potstill import files, report
    from potstill.report.text import as_json as as_object

    found = report.collect(runs)
    if html is not None:
        report.write_html(found, html, shlex.join(["potstill", *sys.argv[1:]]))
    if markdown is not None:
        files.write_bytes(markdown, report.markdown(found).encode())
    if as_json:
        print(files.encode_json(as_object(found), indent=2))
        return
    report.print_report(found, Console())
    for file in filter(None, (html, markdown)):
        print(f"written: {file}")


class Listable(StrEnum):
    """What `potstill list` can list."""

    methods = "methods"
    models = "models"
    datasets = "datasets"
    papers = "papers"
    recipes = "recipes"


@app.command("list")
def list_(
    what: Annotated[Listable, typer.Argument()],
    as_json: Annotated[bool, typer.Option("--json", help="An array of objects.")] = False,
) -> None:
    """What there is by name.

    A multiply-add counts as two FLOPs; convolutions and linear layers only.
    """
    from potstill import listing

    entries = listing.entries(what.value)
    if as_json:
        print(json.dumps(entries, indent=2))
    else:
        print("\n".join(listing.table(what.value, entries)))


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="A network (potstill list models).")],
    input_: Annotated[
        str | None, typer.Option("--input", metavar="CxHxW", help="Size of the images: 3x64x64.")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="How many the network tells apart.")] = 100,
    everything: Annotated[bool, typer.Option("--all", help="Every layer, none folded.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object, with every layer.")] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let py:module:function run.")
    ] = False,
) -> None:
    """A network's layers, with its taps where they are read, and its size.

    A multiply-add counts as two FLOPs; convolutions and linear layers only.
    """
    from dataclasses import asdict

    from potstill import anatomy, listing

    if model.startswith("py:") and not allow_code:
        raise PotstillError(
            f"{model} runs Python code of your own; add --allow-code if you trust it"
        )
    found = anatomy.examine(model, classes, None if input_ is None else _size(input_))
    if as_json:
        layers = [asdict(layer) for layer in found.layers]
        print(json.dumps({**listing.as_object(found), "layers": layers}, indent=2))
    else:
        print("\n".join(anatomy.describe(found, everything)))


def _size(text: str) -> tuple[int, ...]:
    """ "3x64x64" -> (3, 64, 64)"""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise PotstillError(f"--input is '{text}'; write channels, height and width: 3x64x64")
    return tuple(map(int, parts))


class Rival(StrEnum):
    """What `potstill bench --against` can measure beside a recipe."""

    loop = "loop"


@app.command()
def bench(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (potstill list recipes), or a .yaml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="compile=teachers store=true")
    ] = None,
    against: Annotated[
        Rival | None, typer.Option(help="The same as a plain loop, measured in turns.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each, in turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of a round.")] = 40,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let the recipe import py:module:factory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Images/s of a recipe's whole epochs, and where a step's time goes.

    potstill bench cifar100/kd-resnet56-resnet20 teachers.0.weights=PATH --against loop
    """
    from rich.console import Console

    from potstill import bench, files
    from potstill import recipe as recipes

    loaded = recipes.load(recipe, list(overrides or []), allow_code=allow_code)
    console = Console(stderr=True)
    ours = bench.Ours(loaded)
    try:
        with console.status("measuring") as status:
            result = bench.measure(
                ours, loaded if against else None, rounds, steps, lambda line: status.update(line)
            )
    finally:
        ours.close()
    if as_json:
        print(files.encode_json(result, indent=2))
    else:
        print("\n".join(bench.table(result)))


store = typer.Typer(
    help="Kept outputs of teachers: what there is, whether it is whole, and its removal.",
    no_args_is_help=True,
)
app.add_typer(store, name="store")

Names = Annotated[
    list[str] | None, typer.Argument(metavar="STORE", help="Some by name; without, all.")
]
StoreRoot = Annotated[
    Path | None, typer.Option(help="Where they are: store.root of recipes, else below the cache.")
]


@store.command()
def info(
    names: Names = None,
    root: StoreRoot = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of the run whose hit rate is told.")] = 240,
    as_json: Annotated[bool, typer.Option("--json", help="An array of objects.")] = False,
) -> None:
    """How full each store is, and the hit rate to expect of the next run like the last."""
    from potstill import teacher_store

    root = root or teacher_store.default_root()
    found = teacher_store.find(root, names or ())
    if as_json:
        print(json.dumps(teacher_store.as_objects(found, epochs), indent=2))
    elif not found:
        print(f"no store in {root}; store=true in a recipe begins one")
    else:
        print("\n".join(teacher_store.describe(found, epochs)))


@store.command()
def verify(names: Names = None, root: StoreRoot = None) -> None:
    """Compare every row with its checksum; exit code 3 if one is damaged."""
    from potstill import teacher_store

    root, wrong = root or teacher_store.default_root(), 0
    for found in teacher_store.find(root, names or ()):
        rows = 0
        for path, count, damaged in teacher_store.verify(found):
            rows += count
            if damaged:
                wrong += 1
                print(f"{path}: {damaged:,} of {count:,} rows are damaged")
        for fault in found.faults.values():
            wrong += 1
            print(fault)
        print(f"{found.folder.name}: {rows:,} rows read")
    if wrong:
        print(
            "what is damaged is computed anew when it is needed; `potstill store prune --damaged` "
            "deletes these files"
        )
        raise typer.Exit(EXIT_STORAGE)


@store.command()
def prune(
    names: Names = None,
    root: StoreRoot = None,
    every: Annotated[bool, typer.Option("--all", help="Every store.")] = False,
    days: Annotated[
        float | None, typer.Option(min=0, help="Those not written to for so many days.")
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Only files with damaged rows.")
    ] = False,
) -> None:
    """Delete stores: some by name, those of long ago, or --all; or their damaged files alone."""
    import time

    from potstill import files, teacher_store

    if not (names or every or days is not None or damaged):
        raise PotstillError("name the stores to delete, or give --days N, --damaged or --all")
    total = 0
    for found in teacher_store.find(root or teacher_store.default_root(), names or ()):
        if days is not None and time.time() - found.used < days * 86400:
            continue
        gone, freed = teacher_store.prune(found, damaged)
        total += freed
        for path in gone:
            print(f"deleted: {path}")
    print(f"{files.in_bytes(total)} freed")


@app.command()
def schema() -> None:
    """The JSON schema of a recipe, for editors and checks."""
    from potstill import recipe

    print(json.dumps(recipe.schema(), indent=2))
