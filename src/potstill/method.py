"""The contract between a distillation method and everything else.

A method says *what* happens: `phases()` names turns, a turn is one forward and the updates that
read it, an update is one optimiser's step. How long and how fast is the recipe's business, and
the engine that carries it out knows no method by name.

    Batch -> Turn.forward -> Outputs -> Update.loss -> Terms -> Update.gradients -> step

Losses are pure functions of `Outputs`. Randomness lives in `forward`; state changes (memory
banks, averages) in `after_step`, never in a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from potstill import distributed, stopwatch
from potstill.batchnorm import batch_statistics
from potstill.errors import MethodError
from potstill.net import Captured, Net

Terms = Mapping[str, Tensor]
Out = TypeVar("Out")


class Batch(NamedTuple):
    """One training or test batch of B images, on the device of the networks."""

    image: Tensor
    """(B, C, H, W) float, augmented, normalised with the data's mean and std."""
    label: Tensor
    """(B,) int64, index in the student's task."""
    index: Tensor  # type: ignore[assignment]  # a field, not tuple.index
    """(B,) int64, position in the WHOLE stored set: subsets and class windows never renumber it."""
    view: Tensor
    """(B,) int64, code of the augmentation; (index, view) determines the pixels."""


class DataSpec(NamedTuple):
    """What a method may know of the training data when it is built."""

    classes: Sequence[int]
    """Original class ids of the student's task, in label order."""
    teacher_classes: Sequence[Sequence[int] | None]
    """The same for each teacher; None where it has other classes and nobody knows which."""
    indices: Tensor
    """(n,) int64, positions of the training images in the whole stored set."""
    labels: Tensor
    """(n,) int64, labels in the student's task, parallel to `indices`."""
    size: int
    """Images in the whole stored set; every entry of `Batch.index` is below it."""
    batch_size: int
    """Images per step, summed over all ranks."""
    drop_last: bool
    input_shape: tuple[int, int, int]
    """(C, H, W) of an image."""
    mean: tuple[float, ...]
    """Per channel, in units of pixel / 255; likewise std."""
    std: tuple[float, ...]

    @property
    def rest(self) -> int:
        """Images of the incomplete batch that ends an epoch of all; 0 where it is dropped."""
        return 0 if self.drop_last else len(self.indices) % self.batch_size


@dataclass(frozen=True)
class Progress:
    """How far a phase has come, before the step at hand."""

    epoch: int
    """Epochs done in this phase."""
    step: int
    """Steps done in this phase."""
    steps: int
    """Steps of this phase in all."""
    default_epochs: int
    """The phase's published length, in epochs."""

    @property
    def fraction(self) -> float:
        """Share of the phase that is done, 0 at the first step: schedules and ramps read this."""
        return self.step / self.steps

    @property
    def published_epoch(self) -> float:
        """Epochs done on the scale of the published length; whole ones are exact."""
        return self.step * self.default_epochs / self.steps


@dataclass(frozen=True, eq=False)
class Outputs:
    """What one forward of a method produced; subclass it to carry connectors' outputs."""

    batch: Batch
    progress: Progress
    students: Sequence[Captured]
    teachers: Sequence[Captured]


def of_sum(
    terms: Terms,
    parameters: Sequence[nn.Parameter],
    progress: Progress,
    retain_graph: bool = True,
) -> list[Tensor]:
    """Gradient of the sum of all terms, averaged over ranks: what nearly every update uses."""
    return distributed.gradient(torch.stack(list(terms.values())).sum(), parameters, retain_graph)


@dataclass(frozen=True, eq=False)
class Update(Generic[Out]):
    """One optimiser's step: which loss, and exactly which parameters it moves.

    `gradients` may be replaced by a function that combines the terms' gradients in its own way
    (clipping one task's gradient against another's); take each of them with
    `potstill.distributed.gradient`, which averages over ranks before any norm can be taken.

    `last` says that no later update of the step goes back through what this one's loss was computed
    from, so that activations are freed on the way back. The step's last update is so anyway.
    """

    name: str
    loss: Callable[[Out], Terms]
    parameters: Sequence[nn.Parameter]
    gradients: Callable[[Terms, Sequence[nn.Parameter], Progress], list[Tensor]] = of_sum
    last: bool = False


@dataclass(frozen=True, eq=False)
class Turn(Generic[Out]):
    """One forward, then the updates that read it.

    All gradients of a turn are taken at the same parameters, then all its optimisers step, in
    order. `forward` is given the previous turn's outputs, None in the first turn of a step.
    """

    forward: Callable[[Batch, Progress, Out | None], Out]
    updates: Sequence[Update[Out]]
    after_step: Callable[[Out], None] | None = None


@dataclass(frozen=True, eq=False)
class Phase:
    """A stretch of training with its own turns and fresh optimisers.

    `order(data, epoch, generator)` gives the positions in `data.indices` of one epoch, (m,) int64
    with the same m every epoch; the default is a permutation of all. `prepare` sees the clean
    training images once, in index order, before the first step, in eval mode and without
    gradients; what it computes belongs in buffers, because it is not run again on resume.
    `predictors` is what is evaluated while the phase runs: by default the method's own, and {}
    where nothing predicts yet.
    """

    name: str
    turns: Sequence[Turn[Any]]
    epochs: int
    order: Callable[[DataSpec, int, torch.Generator], Tensor] | None = None
    prepare: Callable[[Iterable[Batch]], None] | None = None
    predictors: Callable[[], Mapping[str, nn.Module]] | None = None


class Method(nn.Module):
    """Base of every distillation method.

    Students are submodules. Teachers are a plain tuple: frozen, in eval mode, never saved and
    never switched to train mode. A subclass takes `students`, `teachers`, `data` and its own plain
    typed arguments, whose defaults are the paper's; recipes are checked against that signature.
    """

    students_needed: ClassVar[tuple[int, int | None]] = (1, 1)
    """Fewest and most students; None for no upper limit."""
    teachers_needed: ClassVar[tuple[int, int | None]] = (1, 1)
    lengths: ClassVar[Mapping[str, int]] = {"distill": 240}
    """Published length of each phase, in epochs, by name, in order."""
    published_optimizers: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Of updates that the default optimiser would train wrongly: what a recipe that does not name
    them is given, by update. Milestones are in epochs of the last phase's published length."""
    needs_input_gradient: ClassVar[bool] = False
    """Whether a loss differentiates the teacher with respect to the image."""

    stored: Callable[[Batch], Sequence[Captured] | None] | None = None
    """What replaces the teachers for a batch whose outputs it has; see `potstill.teacher_store`."""
    teacher_statistics: Literal["running", "batch"] = "running"
    """What the teachers' BatchNorm layers normalise by; their averages stay as they are."""

    students: nn.ModuleList
    teachers: tuple[Net, ...]

    def __init__(
        self,
        students: Sequence[Net],
        teachers: Sequence[Net],
        data: DataSpec,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for role, given, (low, high) in (
            ("student", students, self.students_needed),
            ("teacher", teachers, self.teachers_needed),
        ):
            if fault := wrong_count(role, len(given), low, high):
                raise MethodError(f"{name}: {fault}")
        own: dict[int, int] = {}
        for i, student in enumerate(students):
            for p in student.parameters():
                if own.setdefault(id(p), i) != i:
                    raise MethodError(
                        f"{name}: students {own[id(p)]} and {i} share weights; each learns on its "
                        "own: pass copy.deepcopy(...) of one of them"
                    )
        for t, teacher in enumerate(teachers):
            for p in teacher.parameters():
                if id(p) in own:
                    raise MethodError(
                        f"{name}: teacher {t} shares weights with student {own[id(p)]}, and a "
                        "teacher is frozen; pass copy.deepcopy(...) of one of them"
                    )
            teacher.requires_grad_(False).eval()
        self.students = nn.ModuleList(students)
        self.teachers = tuple(teachers)
        self.data = data

    @property
    def nets(self) -> list[Net]:
        """The students, typed: what is run."""
        return list(self.students)  # type: ignore[arg-type]

    @property
    def networks(self) -> Sequence[Net]:
        """The students as they were given; not `nets` where these are made of their parts."""
        return self.nets

    @property
    def by_name(self) -> Mapping[str, Net]:
        """Every network that is run: "student", or "student0" and so on; "teacher0" and so on."""
        students, one = self.nets, len(self.students) == 1
        names = ["student"] if one else [f"student{k}" for k in range(len(students))]
        names += [f"teacher{t}" for t in range(len(self.teachers))]
        return dict(zip(names, [*students, *self.teachers], strict=True))

    @property
    def student(self) -> Net:
        """The first student: the only one for most methods."""
        return self.nets[0]

    @property
    def reads(self) -> frozenset[str]:
        """What the losses take from the teachers: "logits", "embed" or tap names."""
        return frozenset({"logits"}) if self.teachers else frozenset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Method:
        for teacher in self.teachers:  # .to(), .double() and .cuda() move them too
            teacher._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def teach(self, batch: Batch) -> list[Captured]:
        """Outputs of every teacher: the one place where teachers run. No gradient reaches them.

        Stored ones have the logits and what the method says that it `reads`.
        """
        with ExitStack() as stack:
            stack.enter_context(stopwatch.part("teacher"))
            if self.stored is not None and (known := self.stored(batch)) is not None:
                return list(known)
            stack.enter_context(torch.set_grad_enabled(self.needs_input_gradient))
            if self.teacher_statistics == "batch":
                for teacher in self.teachers:
                    stack.enter_context(batch_statistics(teacher))
            return [teacher(batch.image) for teacher in self.teachers]

    def forward(self, batch: Batch, progress: Progress, previous: Outputs | None = None) -> Outputs:
        """Run every network once on the batch."""
        return Outputs(batch, progress, [s(batch.image) for s in self.students], self.teach(batch))

    def loss(self, out: Any) -> Terms:
        """Named scalars as they enter the sum; pure: it reads `out` and changes nothing."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(out) or phases()")

    def trainable(self) -> list[nn.Parameter]:
        """Every parameter of the method that requires a gradient: students and learnable extras."""
        return [p for p in self.parameters() if p.requires_grad]

    def phases(self) -> Sequence[Phase]:
        """The training, in order; by default one phase "distill" with one update "student".

        They have the names and the lengths that the class states in `lengths`.
        """
        update = Update("student", self.loss, self.trainable())
        return [Phase("distill", [Turn(self.__call__, [update])], self.lengths["distill"])]

    def predictors(self) -> Mapping[str, nn.Module]:
        """What is evaluated, saved and exported, by name: modules from image to logits."""
        if len(self.students) == 1:
            return {"student": self.student.predictor()}
        return {f"student{i}": s.predictor() for i, s in enumerate(self.nets)}


def require_arguments(method: Method, *arguments: tuple[str, Any, bool, str]) -> None:
    """Raise MethodError for the first of (name, value, fits, what would) that does not fit."""
    for name, value, fits, allowed in arguments:
        if not fits:
            raise MethodError(f"{type(method).__name__}: {name} is {value!r}; give {allowed}")


def wrong_count(role: str, given: int, low: int, high: int | None) -> str:
    """Why `given` networks are not in [low, high], in words; an empty string where they are."""
    if given >= low and (high is None or given <= high):
        return ""
    if high == 0:
        return f"takes no {role}, {given} given; remove it"
    wanted = f"{low}" if high == low else f"{low} or more" if high is None else f"{low} to {high}"
    return f"takes {wanted} {role}{'' if wanted == '1' else 's'}, {given} given"
