"""From a recipe, or from plain modules, to a finished run."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from potstill import anatomy, distributed, engine, memory, teacher_store
from potstill import data as datasets
from potstill.errors import MethodError, NetworkError, PotstillError
from potstill.evaluate import Predictions, Scores, agreement, evaluate, predict, reliability, scores
from potstill.method import DataSpec, Method, Phase
from potstill.methods import METHODS
from potstill.models import is_name
from potstill.models import weights as model_weights
from potstill.models.outside import PREFIXES
from potstill.net import Net, Predictor, own_statistics
from potstill.optim import OPTIMIZERS, SCHEDULES, OptimizerPlan
from potstill.recipe import ELSEWHERE, PRETRAINED, Recipe, loads, phase_epochs
from potstill.run import Run, describe_environment, differences
from potstill.seeds import seed_of
from potstill.stochastic_depth import stochastic

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
    compile: bool | Literal["teachers"]
    names: Sequence[str]
    """The students' architectures, or where their classes come from; likewise the teachers'."""
    teacher_names: Sequence[str]
    evaluate_every: int = 1
    store: teacher_store.Stored | None = None
    """Kept outputs of the teachers, where a recipe asks for them."""

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
    def precision(self) -> str:
        """What networks are autocast to: "bfloat16" or "float32"."""
        return _type_name(self.pace.precision)

    def compile_networks(self) -> None:
        """Compile what the recipe says, if anything. Raises MethodError where that cannot work."""
        if self.compile:
            engine.compile_networks(self.method, students=self.compile is True)

    @property
    def environment(self) -> dict[str, Any]:
        """What the run depends on beside its recipe."""
        return describe_environment(
            self.device,
            precision=self.precision,
            compile=self.compile,
            world_size=distributed.world_size(),
        )


def assemble(recipe: Recipe, report: Callable[[str], None] | None = None) -> Assembled:
    """Build data, networks and method of a recipe. Raises PotstillError for what does not fit.

    `report` is told what was taken from other programs' weights.
    """
    device = choose_device(recipe.device)
    data = load_data(recipe, device)
    students = []
    for i, network in enumerate(recipe.students):
        torch.manual_seed(seed_of(recipe.seed, "student", i))
        students.append(build_network(network, data, f"students.{i}", report))
    taught = [
        build_network(network, data, f"teachers.{i}", report)
        for i, network in enumerate(recipe.teachers)
    ]
    return put_together(recipe, data, students, taught, device)


def _type_name(precision: torch.dtype | None) -> str:
    """ "bfloat16" or "float32"."""
    return str(precision or torch.float32).removeprefix("torch.")


def load_data(recipe: Recipe, device: torch.device) -> datasets.Data:
    """The data set of a recipe."""
    settings = recipe.data.model_dump(exclude={"name", "batch_size", "drop_last"})
    return datasets.load(recipe.data.name, **settings, device=device)


def put_together(
    recipe: Recipe,
    data: datasets.Data,
    learning: Sequence[tuple[Net, Sequence[int] | None]],
    taught: Sequence[tuple[Net, Sequence[int] | None]],
    device: torch.device,
) -> Assembled:
    """Method and pace from networks that are built: students and teachers, with their class ids.

    None for a network with another number of classes whose ids nobody knows.
    """
    for i, (net, classes) in enumerate(learning):
        if classes is None or list(classes) != list(data.train.classes):
            raise NetworkError(
                f"students.{i} has weights of {net.num_classes} classes that are not those "
                f"of data.name={data.name}; start a student from weights of the same classes"
            )
    students = [n for n, _ in learning]
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
        None
        if recipe.precision == "auto" and method.needs_input_gradient  # bf16 turns these
        else choose_precision(recipe.precision, device),
    )
    store = _store(recipe, method, data, pace, [n.name for n in recipe.teachers])
    return Assembled(
        engine.Training(method, data.train, pace, iter if store is None else store.supply),
        data,
        device,
        recipe.compile,
        [n.name for n in recipe.students],
        [n.name for n in recipe.teachers],
        recipe.evaluate_every,
        store,
    )


def _store(
    recipe: Recipe,
    method: Method,
    data: datasets.Data,
    pace: engine.Pace,
    names: Sequence[str],
) -> teacher_store.Stored | None:
    """The stores that a recipe asks for, given to its method; refused where that would be wrong."""
    if recipe.store is None or not method.teachers:
        return None
    engine.require_storable(method)
    settings, images = recipe.store, data.train.images
    root = settings.root and Path(settings.root).expanduser()
    how = teacher_store.Settings(
        root or teacher_store.default_root(), settings.top_k, settings.bits, settings.gb
    )
    about = {"data": data.name, "training_images": len(data.train)}
    store = teacher_store.stored(
        method, names, images, how, _type_name(pace.precision), bool(recipe.compile), about
    )
    views = len(images.codes) if images.pool is None else images.pool.shape[1]
    store.require_room(len(data.train), views, sum(pace.epochs.values()))
    method.stored = store
    return store


def build_network(
    network: Any, data: datasets.Data, key: str, report: Callable[[str], None] | None = None
) -> tuple[Net, Sequence[int] | None]:
    """A recipe's network and the original ids of its classes, in label order.

    A network keeps the head of its weights. None for a teacher's classes that nobody knows, because
    there are more or fewer of them than the data have.
    """
    name, source, teaches = network.name, network.weights, key.startswith("teachers")
    outside = name.startswith(PREFIXES)
    pretrained = source == PRETRAINED or (source is None and teaches and outside)
    found = model_weights.read(source) if source is not None and not pretrained else None
    if found is None and not is_name(name):
        found = model_weights.read(name)
        name = model_weights.require_architecture(found, f"give {key}.name")
    split, own = data.train, network.normalize
    # data that normalise themselves reach every network as they are
    unstated = (split.mean, split.std) if isinstance(split.images, datasets.UserSet) else None
    normalize = (own.mean, own.std) if own is not None else unstated
    count, images = len(split.classes), (split.input_shape, split.mean, split.std)
    depth = None if network.stochastic is None else network.stochastic.model_dump()
    if pretrained:
        head = None if teaches else count
        net = model_weights.published(name, head, *images, normalize, report)
        net = net if depth is None else stochastic(net, **depth)
    else:
        net = model_weights.network(name, found, count, *images, normalize, report, depth)
    trained_as = None if found is None else found.stochastic
    if report is not None and depth is not None and trained_as not in (None, depth):
        report(f"{key} ({name}): trained with {_depth_in_words(trained_as)}")
    net.architecture = name
    if network.classes is not None:
        return net, _as_told(network.classes, net, found, key)
    if found is not None and found.classes is not None:
        if fault := other_meaning(found, data):
            if report is not None:
                report(f"{key} ({name}): {fault}, so none of its classes is taken to be the data's")
            return net, None
        return net, found.classes
    if net.num_classes != count or (teaches and not taken_for_the_tasks(data)):
        return net, None
    if teaches and report is not None and (pretrained or count < len(data.every_name)):
        report(f"{key} ({name}): its {count} classes are taken to be the data's, in their order")
    return net, split.classes


def taken_for_the_tasks(data: datasets.Data) -> bool:
    """Whether a teacher with as many classes as the task is taken to know these very ones.

    Not where the task was chosen by what it shares with a teacher's, which has as many anyway.
    """
    return data.overlap is None or data.overlap == 1


def _as_told(
    classes: Sequence[int], net: Net, found: model_weights.Weights | None, key: str
) -> Sequence[int]:
    """The class ids that a recipe says, which must be as many as there are, and those of a run."""
    if len(classes) != net.num_classes:
        raise NetworkError(
            f"{key}.classes names {len(classes)} classes, and the network has {net.num_classes}"
        )
    if found is not None and found.classes not in (None, list(classes)):
        raise NetworkError(
            f"{key}.classes are not those that {found.source} was trained on; leave them out"
        )
    return classes


def other_meaning(found: model_weights.Weights, data: datasets.Data) -> str:
    """Where a class id of the weights is another class, or none, in the data set; or ""."""
    theirs = dict(zip(found.classes or (), found.about.get("class_names") or (), strict=False))
    ours = dict(enumerate(data.every_name))
    elsewhere = found.about.get("data")
    if elsewhere not in (None, data.name) and all(
        str(name).isdecimal() for name in theirs.values()
    ):
        return f"trained on {elsewhere}, whose classes have no names but numbers"
    for number, name in sorted(theirs.items()):
        if name != ours.get(number):
            here = f"'{ours[number]}'" if number in ours else "none"
            return (
                f"trained on {found.about.get('data')}, where class {number} is '{name}'; in "
                f"{data.name} it is {here}"
            )
    return ""


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
    teacher_classes: Sequence[Sequence[int] | None],
) -> DataSpec:
    """What a method may know of a training split."""
    return DataSpec(
        list(split.classes),
        [None if c is None else list(c) for c in teacher_classes],
        split.indices.cpu(),
        split.labels.cpu(),
        len(split.images),
        batch_size,
        drop_last,
        split.input_shape,
        split.mean,
        split.std,
    )


def _place(method: Method, device: torch.device, channels_last: bool) -> None:
    """Move to the device and lay out convolutions' weights; the same weights on every rank."""
    for role, nets in (("student", method.nets), ("teacher", method.teachers)):
        for i, net in enumerate(nets):
            types = {p.dtype for p in net.parameters() if p.is_floating_point()}
            if types - {torch.float32}:
                found = ", ".join(sorted(map(str, types)))
                raise NetworkError(
                    f"{role} {i} has weights in {found}; call .float() on it first, and "
                    "choose precision=bf16 for the arithmetic"
                )
            if not channels_last:
                net.channels_last = False
            net.to(memory_format=net.memory_format)  # type: ignore[call-overload]
    method.to(device)
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
    if not resume:
        Run.require_absent(place)  # before any work is done
    if there:
        run = Run.open(place)
        _require_same_recipe(run, recipe)
        if run.finished:
            watcher.say(f"{place} has finished already")
            return run
    watcher.say(f"run: {place}")
    job = assemble(recipe, watcher.say)
    if not there:
        if distributed.rank() == 0:
            Run.create(place, recipe.to_yaml(), job.environment)
        distributed.barrier()
        run = Run.open(place)
    carry_out(job, run, watcher)
    return run


def _require_same_recipe(run: Run, recipe: Recipe) -> None:
    """Where the data lie, and on which device they are trained, may change."""
    there = loads(run.recipe, source=f"{run.directory}/recipe.yaml", allow_code=True)
    old, new = _flat(there.model_dump()), _flat(recipe.model_dump())
    changes = [
        f"{k} is {old.get(k)} there and {new.get(k)} here"
        for k in {**old, **new}
        if old.get(k) != new.get(k) and k not in ELSEWHERE
    ]
    if not changes:
        return
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


def carry_out(job: Assembled, run: Run, watcher: Watcher) -> None:
    """Train to the end, from the run's newest checkpoint if it has one, and write the result.

    Saves after every epoch, every five minutes, and on Ctrl-C, which raises Interrupted.
    """
    main = distributed.rank() == 0
    with run.locked(main):
        _introduce(job, watcher)
        teachers, same_images = _check_teachers(job, watcher)
        _resume(job, run, watcher)
        job.compile_networks()
        try:
            with _stop_requests() as requested, memory.kept(job.device):
                tested = _train(job, run, watcher, requested)
        finally:
            if job.store is not None:
                job.store.close()
        # the split that chose nothing: with a validation split the test set is touched here alone
        if tested is None or job.data.validation is not None:
            tested = _predict(job, job.data.test, job.training.phases[-1])
        measured = _measure(tested, same_images)
        if main:
            for name, predictor in job.method.predictors().items():
                run.save_predictor(name, predictor.state_dict(), _about(job, predictor))
            run.finish(_result(job, run.metrics, teachers, measured))
        distributed.barrier()  # every rank may read it now


def _train(
    job: Assembled, run: Run, watcher: Watcher, requested: Sequence[int]
) -> Mapping[str, Predictions] | None:
    """What the last epoch's evaluation saw; None where a resumed run has no step left."""
    training, main = job.training, distributed.rank() == 0
    predicted: Mapping[str, Predictions] | None = None
    saved = began = time.monotonic()
    images = 0
    for moment in training.run():
        images += moment.images
        watcher.step(training.done_steps, training.total_steps, moment)
        if moment.epoch_done:
            _require_finite(moment)
            due = moment.epoch % job.evaluate_every == 0 or moment.step == moment.steps
            # on the way in the precision of the training, which is faster; what counts in full
            precision = None if moment.step == moment.steps else job.pace.precision
            predicted = _predict(job, job.held_out, training.phase, precision) if due else {}
            found = {name: scores(p) for name, p in predicted.items()}
            seconds = time.monotonic() - began
            record = _record(job, moment, training.done_steps, found, images, seconds)
            if job.store is not None:
                record["time"]["store"] = _since(job.store, watcher)
            began, images = time.monotonic(), 0
            watcher.epoch(record)
            if main:
                run.append(record)
        late = time.monotonic() - saved > CHECKPOINT_SECONDS
        if main and (moment.epoch_done or late or requested):
            run.save_checkpoint(training.done_steps, *training.state())
            saved = time.monotonic()
            if requested and not training.finished:
                raise Interrupted(_stopped(run, training))
    return predicted


def _since(store: teacher_store.Stored, watcher: Watcher) -> dict[str, int]:
    """What a store did in an epoch; what it found damaged is said."""
    counts = store.take_counts()
    for fault in store.new_faults():
        watcher.say(f"note: {fault}")
    if counts.damaged:
        watcher.say(
            f"note: {counts.damaged} stored outputs were damaged on the disk and were computed "
            "anew; `potstill store verify` says where"
        )
    return dataclasses.asdict(counts)


def _stopped(run: Run, training: engine.Training) -> str:
    steps = f"after step {training.done_steps} of {training.total_steps}"
    if run.directory is None:
        return f"interrupted {steps}; nothing is kept, because the run has no directory (out=...)"
    return f"interrupted, and saved {steps}; continue with --resume"


def _predict(
    job: Assembled, images: datasets.Split, phase: Phase, precision: torch.dtype | None = None
) -> dict[str, Predictions]:
    """Of what predicts in a phase."""
    predictors = (phase.predictors or job.method.predictors)()
    return predict(predictors, images, evaluation_batch(images), job.data.train, precision)


def _measure(
    tested: Mapping[str, Predictions], teachers: Mapping[str, Predictions]
) -> dict[str, Any]:
    """Scores, calibration and agreement for result.json, over all ranks.

    Agreement is each predictor's with every teacher that was measured on the same images; where
    there is none, each student's with those after it.
    """
    agreements: dict[str, dict[str, float]] = {}
    if teachers:
        for name, p in tested.items():
            agreements[name] = {t: agreement(p, other) for t, other in teachers.items()}
    else:
        for a, b in combinations((name for name in tested if name.startswith("student")), 2):
            agreements.setdefault(a, {})[b] = agreement(tested[a], tested[b])
    return {
        "scores": {name: scores(p)._asdict() for name, p in tested.items()},
        "calibration": {name: reliability(p) for name, p in tested.items()},
        "agreement": agreements,
    }


def evaluation_batch(images: datasets.Split) -> int:
    """As many images as are quick: on a CPU what its caches hold, on a GPU what fills it."""
    cifar_images = 125 if images.labels.device.type == "cpu" else 1000
    return max(16, min(cifar_images, cifar_images * 3 * 32 * 32 // math.prod(images.input_shape)))


def _introduce(job: Assembled, watcher: Watcher) -> None:
    data, pace = job.data, job.pace
    for role, names, nets in (
        ("student", job.names, job.method.networks),
        ("teacher", job.teacher_names, job.method.teachers),
    ):
        for i, (name, net) in enumerate(zip(names, nets, strict=True)):
            watcher.say(f"{role} {i}: {name}, {_parameters(net):,} parameters")
            if net.stochastic is not None:
                drawn = _depth_in_words(net.stochastic) if net.depths else "stochastic depth"
                watcher.say(f"{role} {i}: {drawn}; {_alive(net)}")
    held = f", {len(data.validation):,} validation" if data.validation else ""
    classes, every = len(data.train.classes), len(data.whole_test.classes)
    of_all = f" of {every}" if every > classes else ""
    watcher.say(
        f"data: {data.name}, {classes}{of_all} classes, {len(data.train):,} training{held}, "
        f"{len(data.test):,} test"
    )
    ranks = f", {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
    compiled = {False: "", True: ", compiled", "teachers": ", teachers compiled"}[job.compile]
    watcher.say(f"on {job.device}, {job.precision}{compiled}{ranks}")
    if job.compile and (eager := [n for n, net in job.method.by_name.items() if net.samples]):
        watcher.say(f"not compiled, because their blocks come and go: {', '.join(eager)}")
    for store in job.store.stores if job.store is not None else ():
        watcher.say(f"store of {store.name}: {', '.join(store.outputs)} in {store.folder}")
    for phase in job.training.phases:
        epochs = pace.epochs[phase.name]
        watcher.say(f"phase {phase.name}: {epochs} epoch{'s' if epochs > 1 else ''}")


def _depth_in_words(settings: Mapping[str, Any]) -> str:
    """ "stochastic depth, p_end 0.9, a new sub-network every batch"."""
    scope = {
        "full": "",
        "identity_only": " of the blocks that keep the shape",
        "last_half": " of the last half of the blocks",
    }
    draw = {
        "batch": "a new sub-network every batch",
        "image": "a sub-network for every image",
        "never": "always at the expected depth",
    }
    return (
        f"stochastic depth{scope[settings['scope']]}, p_end {settings['p_end']:g}, "
        f"{draw[settings['draw']]}"
    )


def _alive(net: Net) -> str:
    """ "25 of 27 blocks may be dropped, 23.6 of them are alive on average"."""
    chances = [p for depth in net.depths for p in depth.survival if p < 1]
    if not net.samples:
        return f"none of {len(net.blocks)} blocks is ever dropped"
    return (
        f"{len(chances)} of {len(net.blocks)} blocks may be dropped, {sum(chances):.1f} of them "
        "are alive on average"
    )


class _Drawn(nn.Module):
    """A stochastic network as it teaches: another sub-network for every batch."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image).logits  # type: ignore[no-any-return]


def _check_teachers(
    job: Assembled, watcher: Watcher
) -> tuple[dict[str, Scores], dict[str, Predictions]]:
    """Test accuracy of every teacher whose classes the data set has: said before training.

    On the test images of its own classes, where these are not the student's. A stochastic one is
    measured at its expected depth, and as it teaches. Also the predictions, as deployed, of those
    whose classes are the student's.
    """
    own = list(job.data.train.classes)
    measured: dict[str, Scores] = {}
    same_images: dict[str, Predictions] = {}
    for i, (teacher, classes) in enumerate(
        zip(job.method.teachers, job.method.data.teacher_classes, strict=True)
    ):
        key, name = f"teacher{i}", f"teacher {i} ({job.teacher_names[i]})"
        test, where = test_images(job.data, classes), ""
        if test is None:
            watcher.say(
                f"teacher {i}: keeps the head of its {teacher.num_classes} classes, which are not "
                "known to be the data's, so its accuracy is not measured"
            )
            continue
        if test.classes != own:
            where = " of its own classes"
            watcher.say(
                f"teacher {i}: keeps the head of its {len(test.classes)} classes; "
                f"{len({*test.classes} & {*own})} of the data's {len(own)} are among them"
            )
        predictors: dict[str, nn.Module] = {key: teacher.predictor()}
        said = {key: name}
        if teacher.samples:
            said[key] = f"{name} at its expected depth"
            predictors[f"{key}_drawn"] = _Drawn(teacher)
            said[f"{key}_drawn"] = f"{name} as drawn, as it teaches"
        predicted = predict(predictors, test, evaluation_batch(test))
        for k, predictions in predicted.items():
            measured[k] = scores(predictions)
            watcher.say(f"{said[k]}: {in_words(measured[k])}{where}")
        if not where:
            same_images[key] = predicted[key]
    return measured, same_images


def test_images(data: datasets.Data, classes: Sequence[int] | None) -> datasets.Split | None:
    """Those of a teacher's classes; None where nobody knows these, or the set has none of them."""
    if classes is None or not set(classes) <= set(data.whole_test.classes):
        return None
    found = data.whole_test.window(classes)
    return found if len(found) else None


def in_words(score: Scores) -> str:
    """Scores for a person: "73.04 % top-1, 93.10 % top-5 on 10,000 images"."""
    return f"{score.top1:.2f} % top-1, {score.top5:.2f} % top-5 on {score.images:,} images"


def _resume(job: Assembled, run: Run, watcher: Watcher) -> None:
    training, checkpoint = job.training, run.latest_checkpoint()
    if distributed.rank() == 0:
        run.rewind(checkpoint)
    distributed.barrier()
    if checkpoint is None:
        return
    for difference in differences(run.environment, job.environment):
        watcher.say(f"note: {difference} This run will not repeat bit for bit.")
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
    drawn = moment.subnetworks
    return {
        "phase": moment.phase,
        "epoch": moment.epoch,
        "step": step,
        "lr": dict(moment.lr),
        "terms": {name: term.item() for name, term in moment.terms.items()},
        "split": job.held_out_name,
        "scores": {name: score._asdict() for name, score in scores.items()},
        **({"subnetworks": {n: s._asdict() for n, s in drawn.items()}} if drawn else {}),
        "time": {"seconds": seconds, "images": images},
    }


def _require_finite(moment: engine.Moment) -> None:
    """Stop a training that has diverged: no later step brings it back."""
    wrong = [name for name, term in moment.terms.items() if not math.isfinite(term)]
    if wrong:
        raise MethodError(
            f"epoch {moment.epoch} of phase {moment.phase}: the training has diverged, "
            f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not finite; lower the "
            "learning rate, or the weight of the largest term"
        )


def _result(
    job: Assembled,
    metrics: Sequence[Mapping[str, Any]],
    teachers: Mapping[str, Scores],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """The last epoch's test scores; the best epoch beside them, with the split that chose it."""
    predictors = job.method.predictors()
    final = [r for r in metrics if r["phase"] == metrics[-1]["phase"]]
    earlier = {r["phase"]: r for r in metrics if r["scores"] and r not in final}  # each one's last
    best = {}
    for name in predictors:
        record = max(
            (r for r in final if name in r["scores"]), key=lambda r: r["scores"][name]["top1"]
        )
        best[name] = {
            "top1": record["scores"][name]["top1"],
            "phase": record["phase"],
            "epoch": record["epoch"],
            "split": record["split"],
        }
    seconds = sum(r["time"]["seconds"] for r in metrics)
    return {
        **measured,
        "best_epoch": best,
        "earlier": {
            name: {"scores": r["scores"], "epoch": r["epoch"], "split": r["split"]}
            for name, r in earlier.items()
        },
        "teachers": {name: score._asdict() for name, score in teachers.items()},
        "teacher_classes": {  # of those that were measured on other classes than the student
            f"teacher{i}": list(classes)
            for i, classes in enumerate(job.method.data.teacher_classes)
            if f"teacher{i}" in teachers
            and classes is not None
            and list(classes) != list(job.data.train.classes)
        },
        "stochastic": {
            name: dict(net.stochastic)
            for name, net in job.method.by_name.items()
            if net.stochastic is not None
        },
        "parameters": {name: _parameters(p) for name, p in predictors.items()},
        "cost": {name: _cost(p, job.data.test.input_shape) for name, p in predictors.items()},
        "epochs": len(metrics),
        "steps": metrics[-1]["step"],
        "seconds": seconds,
        "images_per_second": sum(r["time"]["images"] for r in metrics) / seconds,
    }


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _cost(predictor: nn.Module, input_shape: Sequence[int]) -> dict[str, Any]:
    """Of one image: FLOPs, and the median latency in milliseconds; None where it has none.

    A module that is not ours may refuse to be counted, or a batch of one image.
    """

    def measured(measure: Callable[[nn.Module, Sequence[int]], float]) -> float | None:
        try:
            return measure(predictor, input_shape)
        except Exception:  # whatever it is, it must not cost a finished training its result
            return None

    return {
        "flops": measured(anatomy.flops_of),
        "latency_ms": measured(anatomy.latency_of),
        "latency_n": anatomy.REPETITIONS,
    }


def _about(job: Assembled, predictor: nn.Module) -> dict[str, Any]:
    """What a saved predictor needs to be used again: stored beside its weights."""
    split = job.data.train
    mean, std, model, depth = list(split.mean), list(split.std), None, None
    ready = isinstance(split.images, datasets.UserSet)  # normalised by code that is not ours
    if isinstance(predictor, Predictor):  # else it is more than a network
        net: Net = predictor.module  # type: ignore[assignment]
        model, (mean, std) = net.architecture, own_statistics(net, mean, std)
        depth = net.stochastic
    return {
        "model": model,
        "data": job.data.name,
        "classes": list(split.classes),
        "class_names": job.data.class_names,
        "mean": None if ready else mean,
        "std": None if ready else std,
        "input_shape": list(split.input_shape),
        "stochastic": depth,
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


def finished(
    directory: Path, root: Path | None = None, allow_code: bool = False
) -> tuple[Run, Recipe, dict[str, Any]]:
    """A finished run, its recipe and its result. `root` is where the data are now, if moved.

    Raises PotstillError for a run that has not finished, or whose data only its own program had.
    """
    run = Run.open(directory)
    if run.result is None:
        raise PotstillError(f"{directory} has not finished; continue it with --resume")
    source = str(directory / "recipe.yaml")
    recipe = loads(run.recipe, source=source, allow_code=allow_code, finished=True)
    if recipe.data.name not in datasets.DATASETS:
        raise PotstillError(
            f"{directory} was trained on a dataset of its own program ({recipe.data.name}), which "
            "is not kept; load the weights there with Run.open(...).load_predictor()"
        )
    if root is not None:
        data_settings = recipe.data.model_copy(update={"root": str(root)})
        recipe = recipe.model_copy(update={"data": data_settings})
    return run, recipe, run.result


def evaluate_run(
    directory: Path, root: Path | None = None, allow_code: bool = False
) -> dict[str, Scores]:
    """Test scores of a finished run's predictors, read back from its files.

    `root` is where the data are now, if they have moved. Raises StorageError for a damaged file,
    PotstillError for a run that has not finished, or whose data only its own program had.
    """
    run, recipe, result = finished(directory, root, allow_code)
    stored = {name: run.load_predictor(name) for name in result["scores"]}
    device = choose_device("auto")
    weights = {n: model_weights.ours(t, about, str(directory)) for n, (t, about) in stored.items()}
    if all(found.model is not None for found in weights.values()):
        test = load_data(recipe, device).test
        predictors: dict[str, nn.Module] = {
            name: _trained(str(found.model), found, test) for name, found in weights.items()
        }
    else:  # a predictor that is more than a network: its method knows how to build it
        job = assemble(recipe)
        test, predictors = job.data.test, dict(job.method.predictors())
        for name, found in weights.items():
            predictors[name].load_state_dict(dict(found.tensors))
    predictors = {name: p.to(device) for name, p in predictors.items()}
    return evaluate(predictors, test, evaluation_batch(test))


def evaluate_weights(
    model: str | None,
    weights: Path | None,
    dataset: str | None,
    root: Path | None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Scores]:
    """Test scores of trained weights on a named data set, or on the classes of it that they know.

    `model` and `dataset` may be left out where the file says them, as those of our runs do;
    `weights`, where the model is another library's, which publishes them. `report` is told what was
    taken from another program's file.
    """
    found = None if weights is None else model_weights.read(weights)
    if found is not None:
        name = model or model_weights.require_architecture(found, "add --model NAME")
        dataset = dataset or found.about.get("data")
    elif model is None or not model.startswith(PREFIXES):
        raise PotstillError("--weights is missing: a model without weights is not worth measuring")
    else:
        name = model
    if dataset is None:
        raise NetworkError(
            f"{weights or name} does not say what it was trained on; add --data NAME"
        )
    device = choose_device("auto")
    info = datasets.DATASETS.get(dataset)
    any_size = info is not None and info.any_size
    shape = found.input_shape if found is not None and any_size else None
    size = shape[1] if shape is not None else None
    data = datasets.load(dataset, root=root, image_size=size, device=device)
    test, classes = data.test, None if found is None else found.classes
    if found is not None and classes is not None:
        if fault := other_meaning(found, data):
            raise NetworkError(f"{found.source}: {fault}; its outputs are not those classes")
        if report is not None and len(classes) < len(test.classes):
            report(f"of {len(test.classes)} classes, those {len(classes)} that it was trained on")
        test = data.whole_test.window(classes)
        if not len(test):
            raise NetworkError(f"{found.source}: {dataset} has no test image of its classes")
    predictor = _trained(name, found, test, report).to(device)
    return evaluate({name: predictor}, test, evaluation_batch(test))


def _trained(
    name: str,
    found: model_weights.Weights | None,
    test: datasets.Split,
    report: Callable[[str], None] | None = None,
) -> nn.Module:
    """A predictor with trained weights, those of a file or else the published ones.

    Raises NetworkError unless it has as many classes as the data.
    """
    count, images = len(test.classes), (test.input_shape, test.mean, test.std)
    if found is None:
        net = model_weights.published(name, None, *images, report=report)
    else:
        net = model_weights.network(name, found, count, *images, report=report)
    if net.num_classes != count:
        raise NetworkError(
            f"{found.source if found else name} has {net.num_classes} classes, and the data have "
            f"{count}"
        )
    return net.predictor()
