"""Before a training: what would silently spoil it, a finding each.

    recipe -> data, networks, method -> real batches -> findings

Every check runs what the training itself will run: its test images through its teachers, its first
batch through every phase's forward and losses, one step of its optimisers. The networks that this
is done to are thrown away, and nothing is kept on the disk.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from potstill import data as datasets
from potstill import display, distributed, engine, training
from potstill.errors import PotstillError, first_line
from potstill.method import Batch, Method, Phase, Progress, Update, of_sum
from potstill.net import Net, affine_between, own_statistics
from potstill.optim import Steps
from potstill.recipe import Network, Recipe
from potstill.seeds import seed_of

Level = Literal["ok", "warn", "fail"]

NORMALIZATIONS: Mapping[str, tuple[float | Sequence[float], float | Sequence[float]]] = {
    "ImageNet's statistics": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 and 0.5": (0.5, 0.5),
    "no normalisation (0 and 1)": (0.0, 1.0),
}
"""What networks are commonly trained with: (mean, std), per channel or of every one."""
TEACHER_SECONDS = 30.0
"""What a teacher's accuracy may cost; a slower teacher is measured on fewer images. Each other
normalisation may cost an eighth of that."""
FEW, LEAST = 1000, 500
"""Images that are enough to see whether another normalisation is better, and if time is short."""
BETTER = 3.0
"""Points by which it must be."""
TOO_MUCH = 100.0
"""How many times the gradients of all other terms one term's may have."""


class Finding(NamedTuple):
    """What one check found, and what to type where it is not as it should be."""

    name: str
    level: Level
    said: str
    fix: str = ""


def examine(recipe: Recipe, out: Path = Path("runs")) -> Iterator[Finding]:
    """Check everything that can be checked before training; findings as they are made.

    `out` is where the run would be written. What cannot be found out is a finding as well.
    """
    yield from _of_recipe(recipe)
    said: list[str] = []
    try:
        job = training.assemble(recipe, said.append)
    except PotstillError as error:
        yield Finding("networks", "fail", _in_one_line(error))
        try:
            data = training.load_data(recipe, training.choose_device(recipe.device))
        except PotstillError:
            return  # the same fault again
        yield from _tried("data", _of_data, data)
        yield Finding("networks", "warn", "nothing that needs the networks was checked")
        return
    failed = False
    for finding in itertools.chain(_of_networks(job, said), _of_job(job, recipe)):
        failed = failed or finding.level == "fail"
        yield finding
    disk = list(_tried("disk", _of_disk, job, out))
    if failed:
        yield Finding("time", "ok", "not estimated: put right what fails first")
    else:
        yield from _tried("time", _of_rehearsal, recipe)
    yield from disk


def _of_job(job: training.Assembled, recipe: Recipe) -> Iterator[Finding]:
    """What is found by running the parts of a training, and its first steps."""
    yield from _tried("data", _of_data, job.data)
    for i in range(len(job.method.teachers)):
        yield from _tried(f"teacher {i}", _of_teacher, job, i)
    yield from _tried("input", _of_inputs, job)
    yield from _tried("start", _of_start, job, recipe)
    before = [_copies(teacher) for teacher in job.method.teachers]
    seen: dict[str, _Examined] = {}
    for i, phase in enumerate(job.training.phases):
        yield from _tried(phase.name, _of_phase, job, recipe, i, seen)
    yield from _tried("frozen", _of_frozen, job, before, seen)
    yield from _tried("optimizers", _of_optimizers, job, seen)
    yield from _tried("schedule", _of_schedule, job)
    yield from _tried("machine", _of_machine, job, recipe)


def _tried(name: str, check: Callable[..., Iterable[Finding]], *given: Any) -> Iterator[Finding]:
    """A check's findings; what it raises is one, so that the others go on."""
    try:
        yield from check(*given)
    except PotstillError as error:
        yield Finding(name, "fail", _in_one_line(error))
    except Exception as error:  # whatever a method or network of one's own may raise
        kind = type(error).__name__
        yield Finding(name, "fail", f"cannot be found out: {kind}: {first_line(error)}")


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- recipe, networks, data


def _of_recipe(recipe: Recipe) -> Iterator[Finding]:
    method = recipe.method.name
    shared = f"seed {recipe.seed}, batches of {recipe.data.batch_size}"
    yield Finding("recipe", "ok", f"method {method} on {recipe.data.name}, {shared}")
    for note in recipe.notes:
        wrong = "is never reached" in note
        fix = "lower the milestones, or raise schedule_epochs with them" if wrong else ""
        yield Finding("recipe", "warn" if wrong else "ok", note, fix)


def _of_networks(job: training.Assembled, said: Sequence[str]) -> Iterator[Finding]:
    method = job.method
    for role, names, nets in (
        ("student", job.names, method.networks),
        ("teacher", job.teacher_names, method.teachers),
    ):
        for i, (name, net) in enumerate(zip(names, nets, strict=True)):
            count = sum(p.numel() for p in net.parameters())
            facts = f"{role} {i}: {name}, {count:,} parameters"
            if broken := _not_finite(net):
                fix = f"{role}s.{i}.weights=PATH of weights that are whole"
                yield Finding("networks", "fail", f"{facts}; {broken}", fix)
            else:
                yield Finding("networks", "ok", facts)
    yield from (Finding("networks", "ok", line) for line in said)


def _not_finite(net: nn.Module) -> str:
    """Which tensors of a network hold NaN or infinity, in words; or ""."""
    names = [
        name
        for name, x in net.state_dict().items()
        if x.is_floating_point() and not x.isfinite().all()
    ]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"numbers that are not finite in {', '.join(names[:3])}{more}" if names else ""


def _of_data(data: datasets.Data) -> Iterator[Finding]:
    train, count = data.train, len(data.train.classes)
    held = f", {len(data.validation):,} held out" if data.validation else ""
    per_class = torch.bincount(train.labels, minlength=count).cpu()
    low, high = int(per_class.min()), int(per_class.max())
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    sizes = (
        f"{data.name}: {len(train):,} training images{held}, {len(data.test):,} test images, "
        f"{count} classes of {each} training images"
    )
    absent = [data.class_names[c] for c in (per_class == 0).nonzero().flatten().tolist()]
    if absent:
        some = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
        yield Finding(
            "data",
            "warn",
            f"{sizes}; no training image of {len(absent)} of them: {some}",
            "a larger data.subset, or data.classes=[...] without them",
        )
    else:
        yield Finding("data", "ok", sizes)
    if data.validation is None:
        yield Finding(
            "data",
            "ok",
            "no validation split: every evaluation is of the test set, and chooses nothing; to "
            "choose hyper-parameters, hold some out with data.validation=0.1",
        )
    elif data.validation.images is train.images:
        shared = int(torch.isin(data.validation.indices, train.indices).sum())
        if shared:
            yield Finding("data", "fail", f"{shared:,} validation images are trained on")


# --- teachers


@dataclass(frozen=True)
class Judgement:
    """What a network makes of test images of its own classes."""

    confusion: Tensor
    """(K, K) images: row the label, column the prediction."""
    finite: bool
    """Whether every logit is a number."""

    @property
    def images(self) -> int:
        """How many there were."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Percent that are right."""
        return 100 * float(self.confusion.diagonal().sum()) / self.images

    def relabelled(self) -> tuple[float, list[int]]:
        """Percent right under the best one-to-one renaming of the outputs, and the label of each.

        The assignment problem on the confusion matrix.
        """
        from scipy.optimize import linear_sum_assignment

        outputs, labels = linear_sum_assignment(self.confusion.T.numpy(), maximize=True)
        right = float(self.confusion[labels, outputs].sum())
        return 100 * right / self.images, labels.tolist()


@torch.no_grad()
def judge(logits: Callable[[Tensor], Tensor], images: datasets.Split) -> Judgement:
    """Confusion of a network (image -> logits) on images of its own classes."""
    count = len(images.classes)
    confusion, finite = torch.zeros(count * count, dtype=torch.int64), True
    for batch in images.clean(training.evaluation_batch(images)):
        found = logits(batch.image)
        cells = batch.label * count + found.argmax(dim=1)
        confusion += torch.bincount(cells, minlength=count * count).cpu()
        finite = finite and bool(found.isfinite().all())
    return Judgement(confusion.view(count, count), finite)


def near_chance(top1: float, classes: int) -> bool:
    """Less than twice as good as guessing, or a fifth of the way up, where guessing is good."""
    chance = 100 / classes
    return top1 < min(2 * chance, chance + (100 - chance) / 5)


def in_other_order(top1: float, relabelled: float, classes: int) -> bool:
    """Whether a renaming of the outputs explains an accuracy.

    Also what an untrained network says goes with the classes a little: renamed, 10 classes reach
    about 25 %, and 100 classes 4 %. So a renaming must reach the cube root of chance.
    """
    return relabelled > top1 + 10 and relabelled > 100 * (1 / classes) ** (1 / 3)


def some(images: datasets.Split, count: int) -> datasets.Split:
    """At most `count` of the images, always the same ones, of all classes alike."""
    if count >= len(images):
        return images
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    at = drawn.sort().values.to(images.indices.device)
    return datasets.Split(images.images, images.indices[at], images.labels[at], images.classes)


@torch.no_grad()
def _affordable(net: Net, images: datasets.Split, seconds: float) -> int:
    """How many images a network can judge in that time, at least `LEAST`."""
    batch = next(images.clean(training.evaluation_batch(images))).image
    for _ in range(2):  # the first one is slower
        began = time.monotonic()
        float(net.logits(batch).sum())
    return max(LEAST, int(seconds * len(batch) / (time.monotonic() - began)))


def _of_teacher(job: training.Assembled, i: int) -> Iterator[Finding]:
    teacher, classes = job.method.teachers[i], job.method.data.teacher_classes[i]
    name, key, of = f"teacher {i}", f"teachers.{i}", job.teacher_names[i]
    test = training.test_images(job.data, classes)
    if classes is None or test is None:
        why = (
            f"which classes its {teacher.num_classes} outputs are is not known"
            if classes is None
            else "there is no test image of its classes"
        )
        yield Finding(
            name,
            "warn",
            f"{of}: {why}, so its accuracy is not measured",
            f"{key}.classes=[...] with their ids, if the data set has these classes",
        )
        return
    affordable = _affordable(teacher, test, TEACHER_SECONDS)
    images, few = some(test, affordable), some(test, min(FEW, max(LEAST, affordable // 8)))
    found = judge(teacher.logits, images)
    yield _accuracy(found, name, key, of)
    if teacher.samples:
        drawn = judge(lambda image: teacher(image).logits, few)
        yield Finding(
            name,
            "ok",
            f"{of} as drawn, as it teaches: {drawn.top1:.2f} % top-1 on {drawn.images:,} test "
            "images; the figure above is at its expected depth",
        )
    yield _labels(job, i, found, classes)
    yield from _normalization(job, i, few)


def _accuracy(found: Judgement, name: str, key: str, of: str) -> Finding:
    count = len(found.confusion)
    said = f"{of}: {found.top1:.2f} % top-1 on {found.images:,} test images"
    if not found.finite:
        return Finding(
            name,
            "fail",
            f"{said}; some of its logits are not finite",
            f"{key}.weights=PATH of other weights",
        )
    if near_chance(found.top1, count):
        return Finding(
            name,
            "fail",
            f"{said}, near chance ({100 / count:.3g} %): untrained, of other classes, or "
            "trained on images that are normalised otherwise",
            f"check {key}.weights, {key}.normalize and {key}.classes",
        )
    return Finding(name, "ok", said)


def _labels(job: training.Assembled, i: int, found: Judgement, classes: Sequence[int]) -> Finding:
    """Whether its outputs mean what they are taken for, and the student's the same."""
    own, name, key = list(job.data.train.classes), f"teacher {i} classes", f"teachers.{i}"
    relabelled, labels = found.relabelled()
    if in_other_order(found.top1, relabelled, len(classes)):
        ids = ",".join(str(classes[label]) for label in labels)
        logits = "logits" in job.method.reads
        then = (
            "; but the method compares logits one by one, so put the rows of its last layer in "
            "order, or choose a method that reads features"
            if logits
            else ""
        )
        return Finding(
            name,
            "fail",
            f"its classes are in another order: renamed one by one, {relabelled:.2f} % of the "
            f"{found.images:,} test images are right, not {found.top1:.2f} %",
            f"{key}.classes=[{ids}]{then}",
        )
    if list(classes) == own:
        unsure = ", as far as is known" if near_chance(found.top1, len(own)) else ""
        return Finding(name, "ok", f"the student's {len(own)}, in the same order{unsure}")
    shared = len({*classes} & {*own})
    order = ", in another order" if shared == len(own) == len(classes) else ""
    return Finding(
        name, "ok", f"{len(classes)} of its own; {shared} of the student's {len(own)}{order}"
    )


def _normalization(job: training.Assembled, i: int, few: datasets.Split) -> Iterator[Finding]:
    """Whether the teacher does better on images that are normalised in another usual way."""
    teacher, name = job.method.teachers[i], f"teacher {i} normalize"
    if isinstance(few.images, datasets.UserSet):
        yield Finding(name, "ok", "the data set normalises its own images; nothing else was tried")
        return
    data = (few.mean, few.std)
    own = own_statistics(teacher, *data)
    given = judge(teacher.logits, few).top1
    tried = {}
    for what, (mean, std) in alternatives(*data).items():
        if not all(map(_equal, own, (mean, std))):
            change = _instead(data, own, (mean, std))
            found = judge(lambda x, change=change: teacher.logits(change(x)), few)  # type: ignore[misc]
            tried[what] = found.top1, mean, std
    what, (top1, mean, std) = max(tried.items(), key=lambda item: item[1][0])
    said = f"mean {_numbers(own[0])}, std {_numbers(own[1])}"
    if top1 > given + BETTER:
        keys = f"teachers.{i}.normalize"
        yield Finding(
            name,
            "warn",
            f"{said}: {given:.2f} % of {len(few):,} test images are right, and {top1:.2f} % with "
            f"{what}",
            f"{keys}.mean={_numbers(mean)} {keys}.std={_numbers(std)}",
        )
    else:
        yield Finding(name, "ok", f"{said}; none of {len(tried)} other usual ones is better")


def alternatives(
    mean: Sequence[float], std: Sequence[float]
) -> dict[str, tuple[list[float], list[float]]]:
    """The data's own statistics and `NORMALIZATIONS`, for images of as many channels.

    >>> [*alternatives([0.3], [0.2])]
    ["the data's statistics", '0.5 and 0.5', 'no normalisation (0 and 1)']
    """
    found = {"the data's statistics": (list(mean), list(std))}
    for name, (m, s) in NORMALIZATIONS.items():
        means = [m] * len(mean) if isinstance(m, float) else list(m)
        stds = [s] * len(mean) if isinstance(s, float) else list(s)
        if len(means) == len(mean):
            found[name] = means, stds
    return found


_Statistics = tuple[Sequence[float], Sequence[float]]


def _instead(data: _Statistics, own: _Statistics, other: _Statistics) -> Callable[[Tensor], Tensor]:
    """What makes images of the data such that a network that expects `own` is given `other`."""
    steps = [affine_between(*data, *other), affine_between(*own, *data)]

    def change(image: Tensor) -> Tensor:
        for step in steps:
            if step is not None:
                scale, shift = (image.new_tensor(x).view(1, -1, 1, 1) for x in step)
                image = image * scale + shift
        return image

    return change


def _equal(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-5) for x, y in zip(a, b, strict=True))


def _numbers(values: Sequence[float], digits: int = 4) -> str:
    """As an override has them: "[0.5,0.5,0.5]"."""
    return f"[{','.join(f'{round(x, 6) + 0.0:.{digits}g}' for x in values)}]"


# --- what the networks see, and how a student starts


def _first_batch(job: training.Assembled, i: int) -> Batch:
    """The very first batch of a phase, augmented as it will be."""
    made, phase = job.training, job.training.phases[i]
    views = torch.Generator().manual_seed(seed_of(made.pace.seed, "views", i, 0))
    positions = made._positions(phase, 0)
    data = job.method.data
    return next(
        iter(made.images.batches(positions, views, data.batch_size, drop_last=data.drop_last))
    )


def _of_inputs(job: training.Assembled) -> Iterator[Finding]:
    batch, split = _first_batch(job, 0), job.data.train
    for name, net in job.method.by_name.items():
        seen = batch.image
        if net.scale is not None and net.shift is not None:
            seen = seen * net.scale + net.shift
        mean, std = (x.tolist() for x in (seen.mean((0, 2, 3)), seen.std((0, 2, 3))))
        said = f"{name} sees a batch of mean {_numbers(mean, 2)} and std {_numbers(std, 2)}"
        if max(map(abs, mean)) <= 1 and min(std) >= 0.3 and max(std) <= 3:
            yield Finding("input", "ok", said)
            continue
        yield Finding(
            "input",
            "warn",
            f"{said}: that looks like images that are not normalised, or twice",
            _normalized(batch, split, None if net.scale is None else _key(name)),
        )


def _normalized(batch: Batch, split: datasets.Split, network: str | None) -> str:
    """What would make a batch's channels of mean 0 and deviation 1."""
    if network is not None:
        return f"{network}.normalize=null, or the mean and std that it was trained with"
    if isinstance(split.images, datasets.UserSet):
        return "normalise the images where the data set makes them"
    std, mean = (batch.image.new_tensor(x).view(-1, 1, 1) for x in (split.std, split.mean))
    pixels = batch.image * std + mean
    means, stds = (x.tolist() for x in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))))
    return f"data.mean={_numbers(means)} data.std={_numbers(stds)}"


def _key(name: str) -> str:
    """ "teacher0" -> "teachers.0"; "student" -> "students.0" """
    role = name.rstrip("0123456789")
    return f"{role}s.{name[len(role) :] or 0}"


def _of_start(job: training.Assembled, recipe: Recipe) -> Iterator[Finding]:
    """Accuracy of a student that has weights, the loss of a fresh one."""
    batch, method, classes = _first_batch(job, 0), job.method, len(job.data.train.classes)
    nets = list(
        zip([n for n in method.by_name if n.startswith("student")], method.nets, strict=True)
    )
    given = recipe.students if len(recipe.students) == len(nets) else [None] * len(nets)
    for (name, net), settings in zip(nets, given, strict=True):
        if settings is not None and _has_weights(settings):
            net.eval()
            found = judge(net.logits, some(job.data.test, FEW))
            said = f"{name}: starts from weights with {found.top1:.2f} % top-1 on {found.images:,} "
            yield Finding("start", "ok", f"{said}test images")
            continue
        net.train()
        with torch.no_grad():
            loss = float(F.cross_entropy(net(batch.image).logits, batch.label))
        chance = math.log(classes)
        said = f"{name}: cross-entropy {loss:.3f} on its first batch; chance is {chance:.3f}"
        if loss <= 2 * chance:
            yield Finding("start", "ok", said)
        else:
            yield Finding(
                "start",
                "warn",
                f"{said}: it starts out sure of wrong answers",
                "check its initialisation and what it is given (see input); else a lower "
                "optimizers.default.lr",
            )


def _has_weights(network: Network) -> bool:
    return network.weights is not None or os.path.exists(network.name)


# --- phases: terms and their gradients


class Pulse(NamedTuple):
    """One term on one batch."""

    value: float
    gradient: float
    """Norm of its gradient, with respect to the students' weights where its update has some."""
    moves: bool
    """Whether anything that its update trains has a gradient that is not 0."""


@dataclass(frozen=True)
class _Examined:
    """One update of a phase, at the start and after one step."""

    first: Mapping[str, Pulse]
    weights: Mapping[str, str]
    """By term, the argument of the method that scales it and nothing else."""
    still: set[int]
    """Ids of the parameters without any gradient, neither time."""
    combined: bool
    """Whether the update combines its terms' gradients in a way of its own."""


def _enter(job: training.Assembled, i: int) -> Phase:
    """Begin a phase, with fresh optimisers at their first rates; prepared with a few images."""
    made = job.training
    made.skip_to(i)
    made._set_rates()
    if made.phase.prepare is not None:
        job.method.eval()
        with torch.no_grad():
            made.phase.prepare(some(job.data.train, FEW).clean(job.method.data.batch_size))
    return made.phase


def _seed_draws(job: training.Assembled) -> None:
    for name, net in job.training.stochastic.items():
        net.seed(job.training._draw_seed(name, 0))


def _of_phase(
    job: training.Assembled, recipe: Recipe, i: int, seen: dict[str, _Examined]
) -> Iterator[Finding]:
    made, phase = job.training, _enter(job, i)
    batch = _first_batch(job, i)
    start = Progress(0, 0, made.steps, phase.epochs)
    middle = Progress(made.pace.epochs[phase.name] // 2, made.steps // 2, made.steps, phase.epochs)
    yield from _last_batch(job, i, batch, start)
    first, weights = _measure(job, recipe, phase, batch, start)
    _seed_draws(job)
    engine.train_step(phase, made.optimizers, batch, start, made.pace.seed)
    # what was 0 for want of a step, or of a ramp that rises, is not 0 now
    later, _ = _measure(job, recipe, phase, batch, middle)
    untaught = " (without what the phases before it would have taught)" if i else ""
    if phase.prepare is not None:
        untaught += f" (prepared from {min(FEW, len(job.data.train)):,} images)"
    for turn in phase.turns:
        for update in turn.updates:
            pulses, still = first[update.name]
            after, later_still = later[update.name]
            found = _Examined(pulses, weights, still & later_still, update.gradients is not of_sum)
            seen[f"{phase.name}.{update.name}"] = found
            yield from _of_terms(f"{phase.name}.{update.name}", recipe, found, after, untaught)
    yield from _of_step(job, phase, first, later)


def _measure(
    job: training.Assembled, recipe: Recipe, phase: Phase, batch: Batch, progress: Progress
) -> tuple[dict[str, tuple[dict[str, Pulse], set[int]]], dict[str, str]]:
    """By update, its terms and the parameters that have no gradient; by term, its weight.

    Through the same forwards and losses as a step, drawn from the same seeds; nothing is stepped.
    """
    method = job.method
    owned = {id(p) for net in (*method.nets, *method.networks) for p in net.parameters()}
    found: dict[str, tuple[dict[str, Pulse], set[int]]] = {}
    weights: dict[str, str] = {}
    out: Any = None
    method.train()
    _seed_draws(job)
    for t, turn in enumerate(phase.turns):
        torch.manual_seed(seed_of(job.pace.seed, phase.name, progress.epoch, progress.step, t))
        out = engine._forward(turn, batch, progress, out)
        for update in turn.updates:
            pulses, still = {}, {id(p) for p in update.parameters}
            terms = update.loss(out)
            for name, term in terms.items():
                gradients = distributed.gradient(term, update.parameters)
                norms = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
                moved = (norms != 0).tolist()
                still -= {id(p) for p, m in zip(update.parameters, moved, strict=True) if m}
                students = [id(p) in owned for p in update.parameters]
                part = norms[torch.tensor(students, device=norms.device)]
                norm = (part if len(part) else norms).norm()
                pulses[name] = Pulse(float(term.detach()), float(norm), any(moved))
            found[update.name] = pulses, still
            weights |= _weights(method, recipe, update, out, terms)
    return found, weights


@torch.no_grad()
def _weights(
    method: Method, recipe: Recipe, update: Update[Any], out: Any, terms: Mapping[str, Tensor]
) -> dict[str, str]:
    """The argument that scales a term, and no other: half of it is half of that term.

    Losses are pure functions, so this asks the method itself.
    """
    found = {}
    for key, value in recipe.method.model_dump(exclude={"name"}).items():
        if type(value) not in (int, float) or not value or vars(method).get(key) != value:
            continue
        setattr(method, key, value / 2)
        try:
            halved = update.loss(out)
        except Exception:  # half of it is nothing that the loss can take
            continue
        finally:
            setattr(method, key, value)
        changed = [n for n in terms if n not in halved or not _alike(halved[n], terms[n])]
        if len(changed) == 1 and changed[0] in halved:
            (name,) = changed
            if _alike(2 * halved[name], terms[name]):
                found[name] = key
    return found


def _alike(a: Tensor, b: Tensor) -> bool:
    return math.isclose(float(a), float(b), rel_tol=1e-4)


def _of_terms(
    name: str, recipe: Recipe, found: _Examined, after: Mapping[str, Pulse], where: str
) -> Iterator[Finding]:
    """Of one update: are its terms numbers, does each move something, does one drown the others."""
    said = ", ".join(
        f"{term} {pulse.value:.4g} (gradient {pulse.gradient:.2g})"
        for term, pulse in found.first.items()
    )
    unlike = [
        term
        for term, pulse in found.first.items()
        if not (math.isfinite(pulse.value) and math.isfinite(pulse.gradient))
    ]
    if unlike:
        yield Finding(
            name,
            "fail",
            f"{said}: {', '.join(unlike)} not finite on the first batch",
            "see the networks and teachers above; else precision=fp32, or a lower weight",
        )
        return
    clear = True
    for term, pulse in found.first.items():
        if pulse.moves:
            continue
        if term in after and after[term].moves:
            yield Finding(name, "ok", f"{term} moves nothing at the first step, and does later")
            continue
        clear = False
        key = found.weights.get(term)
        yield Finding(
            name,
            "warn",
            f"{said}: {term} moves nothing, its gradient is 0 at the start and half-way{where}",
            f"leave it out with method.{key}=0, or find out why" if key else "",
        )
    norms = {term: pulse.gradient for term, pulse in found.first.items()}
    largest = max(norms, key=lambda term: norms[term])
    rest = sum(norms.values()) - norms[largest]
    if not found.combined and rest > 0 and norms[largest] > TOO_MUCH * rest:
        clear = False
        times = norms[largest] / rest
        yield Finding(
            name,
            "warn",
            f"{said}: the gradient of {largest} is {times:,.0f} times that of all other terms, "
            f"which hardly count{where}",
            _lower(recipe, largest, found.weights, times),
        )
    if clear:
        rule = (
            "; the method combines these gradients by a rule of its own" if found.combined else ""
        )
        yield Finding(name, "ok", f"{said}{rule}{where}")


def _lower(recipe: Recipe, term: str, weights: Mapping[str, str], times: float) -> str:
    """Which weight to change, and to what."""
    key = weights.get(term)
    if key is None:
        others = " or ".join(f"method.{k}" for t, k in weights.items() if t != term)
        return f"raise {others}" if others else f"lower what weighs {term} among method's arguments"
    value = getattr(recipe.method, key)
    default = type(recipe.method).model_fields[key].default
    if value == default:
        return f"method.{key}={value / times:.1g} would make them equal; {value:g} is published"
    return f"method.{key}={default:g}, its default (it is {value:g})"


def _last_batch(
    job: training.Assembled, i: int, batch: Batch, progress: Progress
) -> Iterator[Finding]:
    """An epoch's last batch of one image, tried out: BatchNorm may find no variance in it."""
    phase, data, images = job.training.phases[i], job.method.data, job.training.lengths[i].images
    size = data.batch_size
    rest = images % size or size
    if rest > 1 or (data.drop_last and size > 1):
        return
    if not any(isinstance(m, _BatchNorm) for m in job.method.modules()):
        return
    fix = "data.batch_size=32"
    if size > 1:
        other = next(b for b in itertools.count(size + 1) if images % b != 1)
        fix = f"data.drop_last=true, or data.batch_size={other}"
    said = f"the last batch of an epoch has one image ({images:,} in batches of {size})"
    one, out = Batch(*(x[:1] for x in batch)), None
    job.method.train()
    _seed_draws(job)
    try:
        with torch.no_grad():
            for turn in phase.turns:
                out = engine._forward(turn, one, progress, out)
    except PotstillError as error:
        message = f"{said}, which stops the training: {_in_one_line(error)}"
        yield Finding(f"{phase.name} last batch", "fail", message, fix)
        return
    yield Finding(
        f"{phase.name} last batch",
        "warn",
        f"{said}, whose BatchNorm statistics are of that one alone",
        fix,
    )


def _of_step(
    job: training.Assembled,
    phase: Phase,
    first: Mapping[str, tuple[Mapping[str, Pulse], set[int]]],
    later: Mapping[str, tuple[Mapping[str, Pulse], set[int]]],
) -> Iterator[Finding]:
    """Whether the first step makes its own batch much worse."""
    before, after = (
        sum(pulse.value for pulses, _ in each.values() for pulse in pulses.values())
        for each in (first, later)
    )
    rates = {n: o.param_groups[0]["lr"] for n, o in job.training.optimizers.items()}
    said = ", ".join(f"{name} at lr {rate:.3g}" for name, rate in rates.items())
    said = f"one step ({said}) takes the loss of its batch from {before:.4g} to {after:.4g}"
    if not math.isfinite(before):
        return  # said already
    if math.isfinite(after) and after <= 10 * abs(before) + 1:
        yield Finding(f"{phase.name} step", "ok", said)
    else:
        yield Finding(
            f"{phase.name} step", "warn", said, "lower optimizers.default.lr, or set its warmup=1"
        )


# --- teachers stay, students move


def _copies(net: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in net.state_dict().items()}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also NaN equals itself here."""
    return torch.equal(*(x.detach().flatten().view(torch.uint8) for x in (a, b)))


def _of_frozen(
    job: training.Assembled, before: Sequence[Mapping[str, Tensor]], seen: Mapping[str, _Examined]
) -> Iterator[Finding]:
    saved = job.method.state_dict(keep_vars=True).items()
    for i, (teacher, old) in enumerate(zip(job.method.teachers, before, strict=True)):
        loose = [n for n, p in teacher.named_parameters() if p.requires_grad]
        modes = [n for n, m in teacher.named_modules() if m.training]
        now = teacher.state_dict()
        moved = [n for n, x in old.items() if not _same_bits(x, now[n])]
        own = {id(x) for x in (*teacher.parameters(), *teacher.buffers())}
        kept = [n for n, x in saved if id(x) in own]
        faults = [
            f"{what}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for what, names in (
                ("it has trainable parameters", loose),
                ("it is in train mode", modes),
                ("one step changed it", moved),
                ("it is saved with the student", kept),
            )
            if names
        ]
        name = f"teacher {i} frozen"
        if faults:
            fix = "a teacher is frozen by Method.__init__; look for what undoes it in the method"
            yield Finding(name, "fail", "; ".join(faults), fix)
        elif seen:
            said = "eval mode, no gradients, bit for bit the same after a training step, not saved"
            yield Finding(name, "ok", said)
        else:
            said = "eval mode, no gradients, not saved; no training step was tried"
            yield Finding(name, "ok", said)


def _of_optimizers(job: training.Assembled, seen: Mapping[str, _Examined]) -> Iterator[Finding]:
    method = job.method
    engine.check(method, job.pace)
    names = {id(p): n for n, p in method.named_parameters()}
    reached: set[int] = set()
    for phase in job.training.phases:
        for update in (u for turn in phase.turns for u in turn.updates):
            key = f"{phase.name}.{update.name}"
            reached |= {id(p) for p in update.parameters}
            optimizer = job.pace.plan(phase.name, update.name).make(update.parameters)
            numbers = sum(p.numel() for p in update.parameters)
            kind, decay = type(optimizer).__name__, optimizer.param_groups[0]["weight_decay"]
            said = f"{key}: {kind} on {len(update.parameters)} tensors of {numbers:,} numbers"
            idle = [names[p] for p in seen[key].still] if key in seen else []
            if decay and idle:
                yield Finding(
                    "optimizers",
                    "warn",
                    f"{said}; no term has a gradient for {_few(sorted(idle))}, so all that happens "
                    f"to them is weight decay ({decay:g})",
                    f"optimizers.{update.name}.weight_decay=0, or a loss that reaches them",
                )
            else:
                yield Finding("optimizers", "ok", said)
    frozen = [n for n, p in method.named_parameters() if id(p) not in reached]
    if frozen:
        yield Finding("optimizers", "ok", f"no update trains {_few(frozen)}: frozen")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _of_schedule(job: training.Assembled) -> Iterator[Finding]:
    made = job.training
    for phase, length in zip(made.phases, made.lengths, strict=True):
        epochs = job.pace.epochs[phase.name]
        said = [
            f"{phase.name}: {epochs:,} epoch{'s' if epochs > 1 else ''}, {length.steps:,} steps"
        ]
        for update in (u for turn in phase.turns for u in turn.updates):
            plan = job.pace.plan(phase.name, update.name)
            base = plan.make(update.parameters).param_groups[0]["lr"]
            at = sorted({round(k * (length.steps - 1) / 200) for k in range(201)})
            lengths = job.pace.lengths[phase.name]
            rates = [base * plan.factor(step, length.steps, lengths) for step in at]
            lr = f"{rates[0]:.3g}"
            if max(rates) > rates[0] * 1.001:
                lr += f" up to {max(rates):.3g}"
            if rates[-1] < max(rates) * 0.999:
                lr += f" down to {rates[-1]:.3g}"
            if isinstance(plan.schedule, Steps):
                passed = plan.schedule.passed(length.steps - 1, length.steps, lengths)
                lr += f" ({passed} of {len(plan.schedule.milestones)} milestones)"
            said.append(f"{update.name} lr {lr}")
        yield Finding("schedule", "ok", ", ".join(said))


# --- machine, time, disk


def _of_machine(job: training.Assembled, recipe: Recipe) -> Iterator[Finding]:
    kind = job.device.type
    device = torch.cuda.get_device_name(job.device) if kind == "cuda" else str(job.device)
    why = "as the recipe says"
    if recipe.precision == "auto":
        if job.method.needs_input_gradient:
            why = "because the method differentiates images"
        elif job.pace.precision is None:
            why = f"because this {kind} has no bf16 of its own"
        else:
            why = f"because this {kind} has bf16"
    compiled = "on; compiling is not tried here" if job.compile else "off"
    yield Finding(
        "machine",
        "ok",
        f"{device}, {torch.get_num_threads()} threads, {job.precision} ({why}), compile {compiled}"
        "; a run repeats bit for bit where these and the versions stay",
    )


def _of_rehearsal(recipe: Recipe) -> Iterator[Finding]:
    """Time and memory of the whole training, from a few steps of a fresh one."""
    from potstill.rehearsal import rehearse

    job = training.assemble(recipe)
    found = rehearse(job)
    size = job.method.data.batch_size
    parts = []
    for name, cost in found.phases.items():
        parts.append(
            f"{name} {display.duration(cost.steps * cost.seconds_per_step)} at "
            f"{size / cost.seconds_per_step:,.0f} images/s"
        )
    parts.append(f"evaluations {display.duration(found.evaluation_seconds)}")
    total = display.duration(found.total_seconds)
    yield Finding("time", "ok", f"about {total} on a machine as busy as now: {', '.join(parts)}")
    yield of_memory(found.peak_bytes, _memory(job.device), job.device.type)


def of_memory(peak: int, there: int, kind: str) -> Finding:
    """Whether a training's peak fits into what the machine has; both in bytes."""
    said = f"about {in_bytes(peak)} of {in_bytes(there)} ({kind})"
    if peak <= 0.8 * there:
        return Finding("memory", "ok", said)
    return Finding("memory", "warn", f"{said}: that is tight", "a smaller data.batch_size")


def _memory(device: torch.device) -> int:
    """Bytes that a training on the device can have at most."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_bytes(count: float) -> str:
    """In words.

    >>> in_bytes(512), in_bytes(3_200_000), in_bytes(150e9)
    ('512 B', '3.2 MB', '150 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def _of_disk(job: training.Assembled, out: Path) -> Iterator[Finding]:
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        said = f"{out} cannot be written: {error.strerror}"
        yield Finding("disk", "fail", said, "--out DIR of another folder")
        return
    yield of_disk(run_bytes(job), shutil.disk_usage(place).free, str(out))


def run_bytes(job: training.Assembled) -> int:
    """What a run holds at most: two checkpoints and one being written, predictors, metrics."""
    method = job.method
    states = 0
    for phase in job.training.phases:
        needed = 0
        for update in (u for turn in phase.turns for u in turn.updates):
            optimizer = job.pace.plan(phase.name, update.name).make(update.parameters)
            copies = int(optimizer.defaults.get("momentum", 2) != 0)
            if "betas" in optimizer.defaults:
                copies = 2
            needed += copies * sum(p.numel() * p.element_size() for p in update.parameters)
        states = max(states, needed)
    checkpoint = _size(method.state_dict()) + states
    predictors = sum(_size(p.state_dict()) for p in method.predictors().values())
    records = 2000 * sum(job.pace.epochs.values())
    return 3 * checkpoint + predictors + records


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())


def of_disk(need: int, free: int, where: str) -> Finding:
    """Whether a run fits on the disk; both in bytes."""
    said = f"a run of at most {in_bytes(need)} in {where}, where {in_bytes(free)} are free"
    fix = "free some space, or --out DIR on another disk"
    if need > free:
        return Finding("disk", "fail", f"{said}: it does not fit", fix)
    if need > free / 2:
        return Finding("disk", "warn", f"{said}: more than half of it", fix)
    return Finding("disk", "ok", said)


# --- on a terminal

_STYLES: Mapping[Level, str] = {"ok": "green", "warn": "bold yellow", "fail": "bold red"}
_NAMES = 20
"""Columns that names take."""


def show(finding: Finding, console: Console) -> None:
    """Print a finding: level, name, what was found; below, what to do."""
    console.print(Text("\n").join(lines(finding, console.width)), soft_wrap=True)


def lines(finding: Finding, width: int) -> list[Text]:
    """A finding, wrapped. The level is a word in front, and coloured as well."""
    before = f"{finding.level:<5} {finding.name:<{_NAMES}} "
    margin = " " * len(before)
    found = _wrapped(finding.said, before, margin, width)
    if finding.fix:
        found += _wrapped(finding.fix, f"{margin}-> ", f"{margin}   ", width)
    first = Text(found[0])
    first.stylize(_STYLES[finding.level], 0, len(finding.level))
    return [first, *map(Text, found[1:])]


def _wrapped(text: str, before: str, margin: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, len(margin) + 40),
        initial_indent=before,
        subsequent_indent=margin,
        break_long_words=False,  # what is to be typed stays whole
        break_on_hyphens=False,
    )


def summary(findings: Sequence[Finding]) -> str:
    """ "12 ok, 1 warning, 0 failures"."""
    count = {level: sum(f.level == level for f in findings) for level in ("ok", "warn", "fail")}
    warned, failed = count["warn"], count["fail"]
    return (
        f"{count['ok']} ok, {warned} warning{'' if warned == 1 else 's'}, "
        f"{failed} failure{'' if failed == 1 else 's'}"
    )


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing fails."""
    return all(f.level != "fail" for f in findings)


def as_object(recipe: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """All of it for JSON."""
    return {
        "recipe": recipe,
        "findings": [f._asdict() for f in findings],
        "ok": healthy(findings),
    }
