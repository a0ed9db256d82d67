"""From a recipe, or from plain modules, to a finished run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from potstill import data as datasets
from potstill import distributed, engine
from potstill.errors import NetworkError, PotstillError
from potstill.evaluate import Scores, evaluate
from potstill.method import DataSpec, Method
from potstill.methods import METHODS
from potstill.models import weights as model_weights
from potstill.net import Net, Predictor, own_statistics
from potstill.optim import OPTIMIZERS, SCHEDULES, OptimizerPlan
from potstill.recipe import Recipe, loads, phase_epochs
from potstill.run import Run, describe_environment, differences
from potstill.seeds import seed_of

CHECKPOINT_SECONDS = 300.0


class Watcher(Protocol):
    """Who is told how a training goes: a terminal, a log, nobody."""

    def say(self, line: str) -> None: ...

    def step(self, done: int, total: int, moment: engine.Moment) -> None: ...

    def epoch(self, record: Mapping[str, Any]) -> None: ...


class Silence:
    """A watcher that ignores everything."""

    def say(self, line: str) -> None:
        pass

    def step(self, done: int, total: int, moment: engine.Moment) -> None:
        pass

    def epoch(self, record: Mapping[str, Any]) -> None:
        pass


class Interrupted(PotstillError):
    """Ctrl-C or a request to terminate; the state is saved."""

    exit_code = 130


@dataclass(frozen=True)
class Assembled:
    """Everything one training needs, built and checked, before its first step."""

    training: engine.Training
    data: datasets.Data
    device: torch.device
    compile: bool
    names: Sequence[str]
    """The students' architectures, or where their classes come from; likewise the teachers'."""
    teacher_names: Sequence[str]
    evaluate_every: int = 1

    @property
    def method(self) -> Method:
        """What is trained."""
        return self.training.method

    @property
    def pace(self) -> engine.Pace:
        """How long and how fast."""
        return self.training.pace

    @property
    def held_out(self) -> datasets.Split:
        """What every epoch is evaluated on: the validation split, or the test set without one."""
        return self.data.validation or self.data.test

    @property
    def held_out_name(self) -> str:
        """ "validation" or "test"."""
        return "validation" if self.data.validation else "test"

    @property
    def environment(self) -> dict[str, Any]:
        """What the run depends on beside its recipe."""
        precision = str(self.pace.precision or torch.float32).removeprefix("torch.")
        return describe_environment(
            self.device,
            precision=precision,
            compile=self.compile,
            world_size=distributed.world_size(),
        )


def assemble(recipe: Recipe) -> Assembled:
    """Build data, networks and method of a recipe. Raises PotstillError for what does not fit."""
    device = choose_device(recipe.device)
    data = load_data(recipe, device)
    students = []
    for i, network in enumerate(recipe.students):
        torch.manual_seed(seed_of(recipe.seed, "student", i))
        students.append(build_network(network, data, f"students.{i}")[0])
    taught = [build_network(n, data, f"teachers.{i}") for i, n in enumerate(recipe.teachers)]
    return put_together(recipe, data, students, taught, device)


def load_data(recipe: Recipe, device: torch.device) -> datasets.Data:
    """The data set of a recipe."""
    settings = recipe.data.model_dump(exclude={"name", "batch_size", "drop_last"})
    return datasets.load(recipe.data.name, **settings, device=device)


def put_together(
    recipe: Recipe,
    data: datasets.Data,
    students: Sequence[Net],
    taught: Sequence[tuple[Net, Sequence[int]]],
    device: torch.device,
) -> Assembled:
    """Method and pace from networks that are built; `taught` are teachers with their class ids."""
    teachers, teacher_classes = [n for n, _ in taught], [c for _, c in taught]
    spec = data_spec(data.train, recipe.data.batch_size, recipe.data.drop_last, teacher_classes)
    torch.manual_seed(seed_of(recipe.seed, "method"))
    arguments = recipe.method.model_dump(exclude={"name"})
    method = METHODS[recipe.method.name](students, teachers, spec, **arguments)
    _place(method, device, recipe.channels_last)
    published = {p.name: p.epochs for p in method.phases()}
    pace = engine.Pace(
        phase_epochs(published, recipe.epochs),
        phase_epochs(published, recipe.schedule_epochs, "schedule_epochs"),
        {key: _plan(o) for key, o in recipe.optimizers.items()},
        recipe.seed,
        choose_precision(recipe.precision, device),
    )
    return Assembled(
        engine.Training(method, data.train, pace),
        data,
        device,
        recipe.compile,
        [n.name for n in recipe.students],
        [n.name for n in recipe.teachers],
        recipe.evaluate_every,
    )


def build_network(network: Any, data: datasets.Data, key: str) -> tuple[Net, Sequence[int]]:
    """A recipe's network and the original ids of its classes, in label order."""
    name, source = network.name, network.weights
    found = model_weights.read(source) if source is not None else None
    if found is None and Path(name).exists():
        found = model_weights.read(name)
        if found.model is None:
            raise NetworkError(f"{key}.name={name} does not say its architecture; give the name")
        name = found.model
    split, own = data.train, network.normalize
    net = model_weights.network(
        name,
        found,
        len(split.classes),
        split.input_shape,
        split.mean,
        split.std,
        (own.mean, own.std) if own is not None else None,
    )
    if found is not None and found.classes is not None:
        return net, found.classes
    if net.num_classes != len(split.classes):
        raise NetworkError(
            f"{key} ({name}) has {net.num_classes} classes, but the data set {data.name} has "
            f"{len(split.classes)}; give a network that was trained on these classes"
        )
    return net, split.classes


def _plan(optimizer: Any) -> OptimizerPlan:
    arguments = optimizer.model_dump(exclude={"name", "schedule", "warmup", "fresh_at_milestones"})
    schedule = optimizer.schedule.model_dump(exclude={"name"})
    return OptimizerPlan(
        lambda parameters: OPTIMIZERS[optimizer.name](parameters, **arguments),
        SCHEDULES[optimizer.schedule.name](**schedule),
        optimizer.warmup,
        optimizer.fresh_at_milestones,
    )


def data_spec(
    split: datasets.Split,
    batch_size: int,
    drop_last: bool,
    teacher_classes: Sequence[Sequence[int]],
) -> DataSpec:
    """What a method may know of a training split."""
    return DataSpec(
        list(split.classes),
        [list(c) for c in teacher_classes],
        split.indices,
        split.labels,
        len(split.images),
        batch_size,
        drop_last,
        split.input_shape,
        split.mean,
        split.std,
    )


def _place(method: Method, device: torch.device, channels_last: bool) -> None:
    """Move to the device and lay out convolutions' weights; the same weights on every rank."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    method.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    distributed.broadcast_(method)


def choose_device(name: str) -> torch.device:
    """The device that a recipe names; "auto" is this rank's GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PotstillError(f"device={name}, but PyTorch finds no CUDA device; use device=auto")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The type forwards are autocast to, None for plain float32; "auto" is bf16 where native."""
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else bool(torch.cpu.get_capabilities().get("avx512_bf16"))
        or bool(torch.cpu.get_capabilities().get("amx_bf16"))
    )
    return torch.bfloat16 if name == "bf16" or (name == "auto" and native) else None


def train(recipe: Recipe, place: Path, watcher: Watcher, resume: bool = False) -> Run:
    """Train a recipe into the directory `place`; the finished run.

    With `resume` a run that is there already continues, or is returned if it has finished.
    Raises PotstillError if one is there and `resume` is off, or if it has another recipe.
    """
    there = (place / "recipe.yaml").is_file()
    distributed.barrier()  # every rank has looked before rank 0 makes it
    if there and not resume:
        Run.create(place, "", {})  # refuses, in words, before any work is done
    if there:
        run = Run.open(place)
        _require_same_recipe(run, recipe)
        if run.finished:
            watcher.say(f"{place} has finished already")
            return run
    watcher.say(f"run: {place}")
    job = assemble(recipe)
    if not there:
        if distributed.rank() == 0:
            Run.create(place, recipe.to_yaml(), job.environment)
        distributed.barrier()
        run = Run.open(place)
    carry_out(job, run, watcher)
    return run


def _require_same_recipe(run: Run, recipe: Recipe) -> None:
    there = loads(run.recipe, source=f"{run.directory}/recipe.yaml", allow_code=True)
    if there == recipe:
        return
    old, new = _flat(there.model_dump()), _flat(recipe.model_dump())
    changes = [
        f"{k} is {old.get(k)} there and {new.get(k)} here"
        for k in {**old, **new}
        if old.get(k) != new.get(k)
    ]
    raise PotstillError(
        f"{run.directory} was started with another recipe: {'; '.join(changes)}; choose another "
        "directory (--out), or the same settings"
    )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted keys."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {key: value}
    parts = (_flat(part, f"{key}.{name}".lstrip(".")) for name, part in value.items())
    return {k: v for part in parts for k, v in part.items()}


def carry_out(job: Assembled, run: Run, watcher: Watcher) -> dict[str, Any]:
    """Train to the end, from the run's newest checkpoint if it has one; the result.

    Saves after every epoch, every five minutes, and on Ctrl-C, which raises Interrupted.
    """
    training = job.training
    main, total = distributed.rank() == 0, training.total_steps
    _introduce(job, watcher)
    teachers = _check_teachers(job, watcher)
    _resume(job, run, watcher)
    if job.compile:
        engine.compile_networks(job.method)
    saved = began = time.monotonic()
    images = 0
    with run.locked(main), _stop_requests() as requested:
        for moment in training.run():
            images += moment.images
            watcher.step(training.done_steps, total, moment)
            if moment.epoch_done:
                due = moment.epoch % job.evaluate_every == 0 or training.finished
                scores = evaluate(job.method.predictors(), job.held_out) if due else {}
                seconds = time.monotonic() - began
                record = _record(job, moment, training.done_steps, scores, images, seconds)
                began, images = time.monotonic(), 0
                watcher.epoch(record)
                if main:
                    run.append(record)
            late = time.monotonic() - saved > CHECKPOINT_SECONDS
            if main and (moment.epoch_done or late or requested):
                run.save_checkpoint(training.done_steps, *training.state())
                saved = time.monotonic()
                if requested and not training.finished:
                    raise Interrupted(
                        f"interrupted, and saved after step {training.done_steps} of {total}; "
                        "continue with --resume"
                    )
    result = _result(job, run.metrics, teachers)
    if main:
        for name, predictor in job.method.predictors().items():
            run.save_predictor(name, predictor.state_dict(), _about(job, predictor))
        run.finish(result)
    distributed.barrier()  # every rank may read it now
    return result


def _introduce(job: Assembled, watcher: Watcher) -> None:
    data, pace = job.data, job.pace
    for role, names, nets in (
        ("student", job.names, job.method.students),
        ("teacher", job.teacher_names, job.method.teachers),
    ):
        for i, (name, net) in enumerate(zip(names, nets, strict=True)):
            watcher.say(f"{role} {i}: {name}, {_parameters(net):,} parameters")
    held = f", {len(data.validation):,} validation" if data.validation else ""
    watcher.say(f"data: {data.name}, {len(data.train):,} training{held}, {len(data.test):,} test")
    precision = str(pace.precision or torch.float32).removeprefix("torch.")
    ranks = f", {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
    watcher.say(f"on {job.device}, {precision}{', compiled' if job.compile else ''}{ranks}")
    for phase in job.training.phases:
        watcher.say(f"phase {phase.name}: {pace.epochs[phase.name]} epochs")


def _check_teachers(job: Assembled, watcher: Watcher) -> dict[str, Scores]:
    """Test accuracy of every teacher that knows the student's classes: said before training."""
    own = list(job.data.train.classes)
    predictors: dict[str, nn.Module] = {}
    for i, (teacher, classes) in enumerate(
        zip(job.method.teachers, job.method.data.teacher_classes, strict=True)
    ):
        if list(classes) == own:
            predictors[f"teacher{i}"] = teacher.predictor()
        else:
            watcher.say(f"teacher {i}: trained on other classes, so its accuracy is not measured")
    scores = evaluate(predictors, job.data.test) if predictors else {}
    for name, score in scores.items():
        i = int(name.removeprefix("teacher"))
        watcher.say(f"teacher {i} ({job.teacher_names[i]}): {in_words(score)}")
    return scores


def in_words(score: Scores) -> str:
    """Scores for a person: "73.04 % top-1, 93.10 % top-5 on 10,000 images"."""
    return f"{score.top1:.2f} % top-1, {score.top5:.2f} % top-5 on {score.images:,} images"


def _resume(job: Assembled, run: Run, watcher: Watcher) -> None:
    training, checkpoint = job.training, run.latest_checkpoint()
    if checkpoint is None:
        return
    for difference in differences(run.environment, job.environment):
        watcher.say(f"note: {difference} This run will not repeat bit for bit.")
    if distributed.rank() == 0:
        run.rewind(checkpoint)
    distributed.barrier()
    training.restore(checkpoint.tensors, checkpoint.state)
    watcher.say(f"resumed after step {training.done_steps} of {training.total_steps}")


def _record(
    job: Assembled,
    moment: engine.Moment,
    step: int,
    scores: Mapping[str, Scores],
    images: int,
    seconds: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl. All but "time" is the same in every repetition."""
    return {
        "phase": moment.phase,
        "epoch": moment.epoch,
        "step": step,
        "lr": dict(moment.lr),
        "terms": {name: term.item() for name, term in moment.terms.items()},
        "split": job.held_out_name,
        "scores": {name: score._asdict() for name, score in scores.items()},
        "time": {"seconds": seconds, "images": images},
    }


def _result(
    job: Assembled, metrics: Sequence[Mapping[str, Any]], teachers: Mapping[str, Scores]
) -> dict[str, Any]:
    """The last epoch's test scores; the best epoch beside them, with the split that chose it."""
    predictors = job.method.predictors()
    if job.held_out_name == "test":
        last = metrics[-1]["scores"]
    else:
        last = {n: s._asdict() for n, s in evaluate(predictors, job.data.test).items()}
    best = {}
    for name in predictors:
        record = max(
            (r for r in metrics if name in r["scores"]), key=lambda r: r["scores"][name]["top1"]
        )
        best[name] = {
            "top1": record["scores"][name]["top1"],
            "phase": record["phase"],
            "epoch": record["epoch"],
            "split": record["split"],
        }
    seconds = sum(r["time"]["seconds"] for r in metrics)
    return {
        "scores": last,
        "best_epoch": best,
        "teachers": {name: score._asdict() for name, score in teachers.items()},
        "parameters": {name: _parameters(p) for name, p in predictors.items()},
        "epochs": len(metrics),
        "steps": metrics[-1]["step"],
        "seconds": seconds,
        "images_per_second": sum(r["time"]["images"] for r in metrics) / seconds,
    }


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _about(job: Assembled, predictor: nn.Module) -> dict[str, Any]:
    """What a saved predictor needs to be used again: stored beside its weights."""
    split = job.data.train
    mean, std, model = list(split.mean), list(split.std), None
    for name, student in zip(job.names, job.method.nets, strict=True):
        if isinstance(predictor, Predictor) and predictor.module is student:
            model, (mean, std) = name, own_statistics(student, mean, std)
    return {
        "model": model,
        "data": job.data.name,
        "classes": list(split.classes),
        "class_names": job.data.class_names,
        "mean": mean,
        "std": std,
        "input_shape": list(split.input_shape),
    }


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM, to be acted on between two steps; a second Ctrl-C is immediate.

    Among several ranks, rank 0 alone acts: it saves what all of them share and leaves, and the
    others end with it. There a second signal is the launcher's, not an impatient user's.
    """
    requested: list[int] = []
    alone = distributed.world_size() == 1

    def note(number: int, frame: Any) -> None:
        if requested and number == signal.SIGINT and alone:
            raise KeyboardInterrupt
        requested.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    except RuntimeError:
        if requested and not alone:  # rank 0 has left in the middle of a collective
            raise Interrupted("stopped together with rank 0") from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluate_run(directory: Path) -> dict[str, Scores]:
    """Test scores of a finished run's predictors, read back from its files.

    Raises StorageError for a damaged file, PotstillError for a run that has not finished.
    """
    run = Run.open(directory)
    recipe = loads(run.recipe, source=str(directory / "recipe.yaml"), allow_code=True)
    if run.result is None:
        raise PotstillError(f"{directory} has not finished; continue it with --resume")
    stored = {name: run.load_predictor(name) for name in run.result["scores"]}
    device = choose_device("auto")
    data = load_data(recipe, device)
    if all(about["model"] is not None for _, about in stored.values()):
        predictors = {
            name: model_weights.network(
                about["model"],
                model_weights.ours(tensors, about, str(directory)),
                len(about["classes"]),
                data.test.input_shape,
                data.test.mean,
                data.test.std,
            ).predictor()
            for name, (tensors, about) in stored.items()
        }
    else:  # a predictor that is more than a network: its method knows how to build it
        predictors = dict(assemble(recipe).method.predictors())
        for name, (tensors, _) in stored.items():
            predictors[name].load_state_dict(tensors)
    return evaluate({name: p.to(device) for name, p in predictors.items()}, data.test)


def evaluate_weights(
    model: str | None, weights: Path | None, dataset: str, root: Path | None
) -> dict[str, Scores]:
    """Test scores of trained weights on a named data set; `model` may be left out for our files."""
    if weights is None:
        raise PotstillError("--weights is missing: a model without weights is not worth measuring")
    found = model_weights.read(weights)
    name = model or found.model
    if name is None:
        raise NetworkError(f"{weights} does not say its architecture; add --model NAME")
    device = choose_device("auto")
    split = datasets.load(dataset, root=root, device=device).test
    net = model_weights.network(
        name, found, len(split.classes), split.input_shape, split.mean, split.std
    )
    if net.num_classes != len(split.classes):
        raise NetworkError(
            f"{weights} has {net.num_classes} classes, and {dataset} has {len(split.classes)}"
        )
    return evaluate({name: net.predictor().to(device)}, split)
