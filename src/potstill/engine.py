"""The only training loop. It carries out a method's phases and knows no method by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from potstill import distributed
from potstill.errors import DataError, MethodError, did_you_mean
from potstill.method import Batch, Method, Phase, Progress, Update, of_sum
from potstill.net import Net
from potstill.optim import OptimizerPlan
from potstill.seeds import seed_of
from potstill.stopwatch import part

VERSIONS = 4
"""Of a compiled network: with gradients and without, whole batches and the last one."""


class TrainingImages(Protocol):
    """What the loop needs of the training data; `potstill.data.Split` is one."""

    def batches(
        self,
        positions: Tensor,
        generator: torch.Generator,
        batch_size: int,
        start: int = 0,
        drop_last: bool = False,
    ) -> Iterator[Batch]: ...

    def clean(self, batch_size: int, sharded: bool = False) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Pace:
    """How long and how fast: what a recipe adds to a method.

    `epochs` by phase name. `plans` by "phase.update", "update" or "default", the first that
    exists; their milestones and warm-ups count in epochs of a phase that is `lengths` long.
    `precision` is the type that networks are autocast to, None for none; a method's own layers and
    losses are computed in float32.
    """

    epochs: Mapping[str, int]
    lengths: Mapping[str, int]
    plans: Mapping[str, OptimizerPlan]
    seed: int = 0
    precision: torch.dtype | None = None

    def plan(self, phase: str, update: str) -> OptimizerPlan:
        """The optimiser of an update. Raises MethodError where none is given."""
        for key in (f"{phase}.{update}", update, "default"):
            if key in self.plans:
                return self.plans[key]
        raise MethodError(
            f"no optimizer for update '{update}' of phase '{phase}'; give optimizers.default, "
            f"optimizers.{update}, or optimizers with the key '{phase}.{update}'"
        )


class Subnetworks(NamedTuple):
    """What was drawn of a stochastic network in one epoch."""

    distinct: int
    """How many different sub-networks there were."""
    live: float
    """Blocks that were alive, on average."""
    blocks: int
    """Blocks that may be skipped; `live` is of these."""


@dataclass(frozen=True)
class Moment:
    """Where a training stands after a step."""

    phase: str
    epoch: int
    """Epochs done in this phase, the one at hand not counted until its last step."""
    epochs: int
    step: int
    """Steps done in this phase."""
    steps: int
    images: int
    """Images of this step, over all ranks."""
    lr: Mapping[str, float]
    """By update."""
    epoch_done: bool
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """Means over the epoch so far, of all ranks; on the device, so reading one waits for it."""
    subnetworks: Mapping[str, Subnetworks] = field(default_factory=dict)
    """Of an epoch that is done, by network, of those that were drawn."""


def check(method: Method, pace: Pace | None = None) -> None:
    """Refuse a method that would train the wrong thing silently. Raises MethodError."""
    names = {id(p): n for n, p in method.state_dict(keep_vars=True).items()}
    for t, teacher in enumerate(method.teachers):
        loose = [n for n, p in teacher.named_parameters() if p.requires_grad]
        if loose:
            raise MethodError(
                f"teacher {t} has trainable parameters {_few(loose)}; a teacher is frozen: leave "
                "requires_grad as Method.__init__ set it, or make the network a student"
            )
    phases = method.phases()
    _require_unique("phase", [p.name for p in phases], "the method")
    reached: set[int] = set()
    for phase in phases:
        updates = [u for turn in phase.turns for u in turn.updates]
        _require_unique("update", [u.name for u in updates], f"phase '{phase.name}'")
        for update in updates:
            _check_update(update, phase.name, names)
            reached |= {id(p) for p in update.parameters}
    unreached = [
        names[id(p)] for p in method.parameters() if p.requires_grad and id(p) not in reached
    ]
    if unreached:
        raise MethodError(
            f"no update ever trains {_few(unreached)}; add the module to an Update or freeze it"
        )
    if pace is not None:
        _check_pace(method, phases, pace)


def _check_update(update: Update[Any], phase: str, names: Mapping[int, str]) -> None:
    where = f"update '{update.name}' of phase '{phase}'"
    if not update.parameters:
        raise MethodError(f"{where} has no parameters; remove it, or list what it trains")
    if len({id(p) for p in update.parameters}) != len(update.parameters):
        raise MethodError(f"{where} lists a parameter twice; each would be stepped twice")
    for p in update.parameters:
        if id(p) not in names:
            raise MethodError(
                f"{where} trains a parameter of shape {tuple(p.shape)} that is not part of the "
                "method, so it would not be saved; make its module an attribute of the method"
            )
        if not p.requires_grad:
            raise MethodError(f"{where} lists '{names[id(p)]}', which is frozen; leave it out")


def _check_pace(method: Method, phases: Sequence[Phase], pace: Pace) -> None:
    updates = [(p.name, u.name) for p in phases for turn in p.turns for u in turn.updates]
    allowed = {"default", *(u for _, u in updates), *(f"{p}.{u}" for p, u in updates)}
    for key in pace.plans:
        if key not in {*allowed, *method.published_optimizers}:  # its arguments may leave them out
            raise MethodError(
                f"optimizers.{key} fits no update of this method; its keys are "
                f"{sorted(allowed)}{did_you_mean(key, allowed)}"
            )
    for phase, update in updates:
        pace.plan(phase, update)
    for phase in (p.name for p in phases):
        if phase not in pace.epochs or phase not in pace.lengths:
            raise MethodError(f"no length for phase '{phase}'; give epochs.{phase}")


def _require_unique(kind: str, names: Sequence[str], where: str) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise MethodError(f"{where} has several {kind}s named {twice}; give each its own name")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{list(names[:4])}{more}"


def compile_networks(method: Method, students: bool = True) -> None:
    """Compile every network of a method, in place, but for those that draw sub-networks.

    Or the teachers alone.

    Raises MethodError where that cannot work.
    """
    import torch._dynamo.config as dynamo_config  # loads the compiler: seconds
    import torch._functorch.config as functorch_config

    if method.needs_input_gradient:
        raise MethodError(
            f"{type(method).__name__} differentiates the teacher with respect to its input, and a "
            "compiled network cannot be differentiated twice; set compile=false"
        )
    if method.teachers:
        # code with a teacher's weights as constants would serve the same parameters with others
        torch.compiler.reset()
    # a turn may differentiate one forward several times; donated buffers are freed by the first
    functorch_config.donated_buffer = False
    # or what was compiled for one network's taps would serve another network of that architecture
    dynamo_config.skip_nnmodule_hook_guards = False
    # all networks share the code of Net.forward, of which the compiler keeps so many versions; the
    # next one would silently run as it is
    wanted = VERSIONS * len(method.by_name)
    dynamo_config.recompile_limit += wanted
    dynamo_config.accumulated_recompile_limit += wanted
    for net in method.by_name.values():
        teaches = any(net is teacher for teacher in method.teachers)
        # what runs of a sub-network is another graph in every step
        if net.samples or not (students or teaches):
            continue
        net.compile()
        if teaches:
            _freeze(net)


def _freeze(net: Net) -> None:
    """Make a compiled network's weights constants of its code: BatchNorm goes into convolutions.

    For teachers alone: a student that runs without gradients would go on with its weights of that
    moment. `torch.compile(options=...)` does not reach the tracing, which has to know it too.
    """
    import torch._inductor.config as inductor_config

    compiled = net._compiled_call_impl
    assert compiled is not None, "it is compiled"

    def call(*args: Any, **named: Any) -> Any:
        with inductor_config.patch(freezing=True):
            return compiled(*args, **named)

    net._compiled_call_impl = call


def require_storable(method: Method) -> None:
    """Refuse to store and replay teachers' outputs where an image's are not always the same.

    Raises MethodError with the reason, and what would allow it.
    """
    name, never = type(method).__name__, {"draw": "never"}
    for t, teacher in enumerate(method.teachers):
        if teacher.samples:
            raise MethodError(
                f"the outputs of teacher {t} cannot be stored: it is another sub-network at every "
                "step, and a stored output would be one of them for ever; leave the store off, or "
                f"set teachers.{t}.stochastic={_inline({**(teacher.stochastic or {}), **never})}"
            )
    if method.teachers and method.teacher_statistics == "batch":
        raise MethodError(
            f"the outputs of {name}'s teachers cannot be stored: they depend on the other images "
            'of the batch; leave the store off, or set method.teacher_statistics="running"'
        )
    if method.needs_input_gradient:
        raise MethodError(
            f"the outputs of {name}'s teachers cannot be stored: it differentiates them with "
            "respect to the image; leave the store off"
        )


def _inline(settings: Mapping[str, Any]) -> str:
    """ "{p_end: 0.9, draw: never}", as in a recipe."""
    return f"{{{', '.join(f'{k}: {v}' for k, v in settings.items())}}}"


def train_step(
    phase: Phase,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batch: Batch,
    progress: Progress,
    seed: int,
) -> dict[str, Tensor]:
    """One batch through every turn of a phase; the named terms, detached.

    Terms are named "term", or "update.term" in a phase with several updates.
    """
    several = sum(len(turn.updates) for turn in phase.turns) > 1
    all_terms: dict[str, Tensor] = {}
    out: Any = None
    for t, turn in enumerate(phase.turns):
        with part("student"):
            out = forward_turn(phase, t, batch, progress, seed, out)
        gradients = []
        for u, update in enumerate(turn.updates):
            with part("loss"):
                terms = update.loss(out)
            if not terms:
                raise MethodError(
                    f"update '{update.name}' has no term; give one of its weights a value above 0"
                )
            for name, term in terms.items():
                if term.dim():  # its sum over images would train, with a gradient B times too large
                    raise MethodError(
                        f"term '{name}' of update '{update.name}' has shape {tuple(term.shape)}; a "
                        "term is a scalar: take the mean over images in the loss"
                    )
            final = turn is phase.turns[-1] and u == len(turn.updates) - 1
            with part("backward"):
                if (final or update.last) and update.gradients is of_sum:  # frees activations
                    found = of_sum(terms, update.parameters, progress, retain_graph=False)
                else:
                    found = update.gradients(terms, update.parameters, progress)
            gradients.append(found)
            for name, term in terms.items():
                all_terms[f"{update.name}.{name}" if several else name] = term.detach()
        with part("optimizer"):
            for update, found in zip(turn.updates, gradients, strict=True):
                _step(optimizers[update.name], update.parameters, found)
        if turn.after_step is not None:
            with torch.no_grad():
                turn.after_step(out)
    return all_terms


def forward_turn(
    phase: Phase, t: int, batch: Batch, progress: Progress, seed: int, previous: Any
) -> Any:
    """The forward of a phase's turn `t`, given the turn before it; its random draws are the step's.

    Raises MethodError where BatchNorm finds one value a channel.
    """
    torch.manual_seed(seed_of(seed, phase.name, progress.epoch, progress.step, t))
    try:
        return phase.turns[t].forward(batch, progress, previous)
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise MethodError(
            "BatchNorm found one value a channel, which has no variance, in a batch of "
            f"{len(batch.label)} image(s); set data.drop_last=true, or another data.batch_size (or "
            "draw: batch, where a stochastic network draws for each image and one was left)"
        ) from error


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        # fused kernels walk parameter, gradient and momentum in memory order: formats must agree
        p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
    optimizer.step()
    for p in parameters:
        p.grad = None


class _Length(NamedTuple):
    """Of a phase."""

    images: int
    """Of one epoch."""
    steps_per_epoch: int
    steps: int


class Training:
    """A training under way: iterate `run()` to carry it on, a step at a time.

    `state()` between two steps, given to `restore()` of a new Training on the same method, data and
    pace, continues it bit for bit on the same machine.
    """

    def __init__(
        self,
        method: Method,
        images: TrainingImages,
        pace: Pace,
        supply: Callable[[Iterable[Batch]], Iterator[Batch]] = iter,
    ) -> None:
        """`supply` is given the batches of an epoch or a preparation, and gives them on."""
        self.method, self.images, self.pace, self.supply = method, images, pace, supply
        self.phases = list(method.phases())
        check(method, pace)
        for net in (*method.nets, *method.teachers):
            net.precision = pace.precision
        self.stochastic = {name: net for name, net in method.by_name.items() if net.samples}
        self.lengths = [self._length_of(phase) for phase in self.phases]
        self.phase_index = 0
        self.step = 0
        self.sums: dict[str, Tensor] = {}
        self.summed = 0
        self._begin_phase()

    @property
    def phase(self) -> Phase:
        """The phase at hand."""
        return self.phases[self.phase_index]

    @property
    def steps(self) -> int:
        """Steps of the phase at hand."""
        return self.lengths[self.phase_index].steps

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return sum(length.steps for length in self.lengths)

    @property
    def done_steps(self) -> int:
        """Steps done, in all phases."""
        return sum(length.steps for length in self.lengths[: self.phase_index]) + self.step

    @property
    def finished(self) -> bool:
        """Whether every phase has run to its end."""
        return self.phase_index == len(self.phases) - 1 and self.step == self.steps

    def skip_to(self, phase: int) -> None:
        """Begin a phase without those before it: to try it, not to train."""
        self.phase_index, self.step = phase, 0
        self._begin_phase()

    def run(self) -> Iterator[Moment]:
        """Carry on to the end, yielding after each step."""
        while True:
            if self.step == 0 and self.phase.prepare is not None:
                self._prepare(self.phase.prepare)
            while self.step < self.steps:
                yield from self._run_epoch()
            if self.phase_index == len(self.phases) - 1:
                return
            self.skip_to(self.phase_index + 1)

    def _prepare(self, prepare: Callable[[Iterable[Batch]], None]) -> None:
        torch.manual_seed(seed_of(self.pace.seed, self.phase.name, "prepare"))
        self.method.eval()
        with torch.no_grad():
            prepare(self.supply(self.images.clean(self.method.data.batch_size)))
        distributed.broadcast_(self.method)

    def _begin_phase(self) -> None:
        self.plans = {
            u.name: self.pace.plan(self.phase.name, u.name)
            for turn in self.phase.turns
            for u in turn.updates
        }
        self.optimizers = {
            u.name: self.plans[u.name].make(u.parameters)
            for turn in self.phase.turns
            for u in turn.updates
        }
        self.base_lr = {name: o.param_groups[0]["lr"] for name, o in self.optimizers.items()}

    def _length_of(self, phase: Phase) -> _Length:
        data, count = self.method.data, len(self._positions(phase, 0))
        rest = count % data.batch_size
        per_epoch = count // data.batch_size + (rest > 0 and not data.drop_last)
        world = distributed.world_size()
        if per_epoch == 0:
            raise DataError(
                f"data.batch_size is {data.batch_size} and an epoch of phase '{phase.name}' has "
                f"{count} images, so with data.drop_last there is no step; make the batch smaller"
            )
        if data.batch_size % world or (rest % world and not data.drop_last):
            raise DataError(
                f"{world} ranks cannot share batches of {data.batch_size} images with a last one "
                f"of {rest}; choose data.batch_size divisible by {world}, or data.drop_last=true"
            )
        return _Length(count, per_epoch, per_epoch * self.pace.epochs[phase.name])

    def _positions(self, phase: Phase, epoch: int) -> Tensor:
        """Positions of one epoch: the same for every rank, method and machine."""
        data = self.method.data
        generator = torch.Generator().manual_seed(
            seed_of(self.pace.seed, "order", self.phases.index(phase), epoch)
        )
        if phase.order is None:
            return torch.randperm(len(data.indices), generator=generator)
        return phase.order(data, epoch, generator)

    def first_batch(self) -> Batch:
        """The very first batch of the phase at hand, augmented as it will be."""
        return next(self._batches(0))

    def _batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Of an epoch of the phase at hand, from its batch `start` on."""
        phase, data, images = self.phase, self.method.data, self.lengths[self.phase_index].images
        positions = self._positions(phase, epoch)
        if len(positions) != images:
            raise MethodError(
                f"epoch {epoch} of phase '{phase.name}' has {len(positions)} images and epoch 0 "
                f"has {images}; a phase's order must give the same number every epoch"
            )
        views = torch.Generator().manual_seed(
            seed_of(self.pace.seed, "views", self.phase_index, epoch)
        )
        size, drop_last = data.batch_size, data.drop_last
        return self.supply(self.images.batches(positions, views, size, start, drop_last))

    def _run_epoch(self) -> Iterator[Moment]:
        phase, length = self.phase, self.lengths[self.phase_index]
        epoch, start = divmod(self.step, length.steps_per_epoch)
        batches = self._batches(epoch, start)
        if start == 0:
            self.sums, self.summed = {}, 0
        for net in self.stochastic.values():
            net.sampled = False
        self.method.train()
        while True:
            with part("data"):
                batch = next(batches, None)
            if batch is None:
                break
            progress = Progress(epoch, self.step, self.steps, phase.epochs)
            lr = self.set_rates()
            self.seed_draws(self.step)
            try:
                terms = train_step(phase, self.optimizers, batch, progress, self.pace.seed)
            finally:
                for net in self.stochastic.values():
                    net.seed(None)
            for name, term in self._shared(terms).items():
                total = self.sums.setdefault(name, torch.zeros_like(term, dtype=torch.float64))
                total += term
            self.summed += 1
            self.step += 1
            done = self.step == (epoch + 1) * length.steps_per_epoch
            means = {name: total / self.summed for name, total in self.sums.items()}
            yield Moment(
                phase.name,
                epoch + done,
                self.pace.epochs[phase.name],
                self.step,
                self.steps,
                len(batch.label) * distributed.world_size(),
                lr,
                done,
                means,
                self._subnetworks(epoch) if done else {},
            )
            self.method.train()  # the caller may have evaluated in between
        if self.step != (epoch + 1) * length.steps_per_epoch:
            raise DataError(
                f"epoch {epoch} ended after step {self.step}, not "
                f"{(epoch + 1) * length.steps_per_epoch}: the data gave fewer batches than it has"
            )

    def seed_draws(self, step: int) -> None:
        """Seed every stochastic network for a step of the phase at hand."""
        for name, net in self.stochastic.items():
            net.seed(self._draw_seed(name, step))

    def _draw_seed(self, name: str, step: int) -> int:
        """Of the sub-network that a network is in a step: all its turns run the same one."""
        return seed_of(self.pace.seed, "sub-network", self.phase.name, step, name)

    def _subnetworks(self, epoch: int) -> dict[str, Subnetworks]:
        """What an epoch drew, drawn again: it follows from the counters."""
        size, steps = self.method.data.batch_size, self.lengths[self.phase_index].steps_per_epoch
        last = self.lengths[self.phase_index].images - size * (steps - 1)
        found = {}
        for name, net in self.stochastic.items():
            if not net.sampled:
                continue  # a phase that does not run it
            drawn = []
            for step in range(steps):
                net.seed(self._draw_seed(name, epoch * steps + step))
                drawn.append(net.drawn(min(size, last) if step == steps - 1 else size))
            net.seed(None)
            rows = torch.cat([d.view(-1, d.shape[-1]) for d in drawn])
            live = rows.sum(1).double().mean().item()
            distinct = {row.tobytes() for row in np.packbits(rows.numpy(), axis=1)}
            found[name] = Subnetworks(len(distinct), live, rows.shape[1])
        return found

    def _shared(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms' means over ranks; BatchNorm's averages become their means as well.

        Every rank then holds one model and one record: rank 0's checkpoint is everybody's.
        """
        if distributed.world_size() == 1:
            return dict(terms)
        statistics = distributed.statistics(self.method)
        means = distributed.averaged([*statistics, *terms.values()])
        for own, mean in zip(statistics, means, strict=False):
            own.copy_(mean)
        return dict(zip(terms, means[len(statistics) :], strict=True))

    def set_rates(self) -> dict[str, float]:
        """Give every optimiser the rate of the step at hand; by update.

        One whose schedule starts anew there forgets its state.
        """
        rates, length = {}, self.pace.lengths[self.phase.name]
        for name, optimizer in self.optimizers.items():
            plan = self.plans[name]
            if plan.starts_anew(self.step, self.steps, length):
                optimizer.state.clear()
            rates[name] = self.base_lr[name] * plan.factor(self.step, self.steps, length)
            for group in optimizer.param_groups:
                group["lr"] = rates[name]
        return rates

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that continues the training: tensors, and plain values for JSON."""
        tensors = {f"method/{k}": v for k, v in self.method.state_dict().items()}
        plain: dict[str, Any] = {
            "phase": self.phase_index,
            "step": self.step,
            "summed": self.summed,
            "terms": list(self.sums),  # their order; the tensor file sorts
            "optimizers": {},
        }
        tensors |= {f"sums/{k}": v for k, v in self.sums.items()}
        for name, optimizer in self.optimizers.items():
            rest = plain["optimizers"].setdefault(name, {})
            for i, p in enumerate(_parameters_of(optimizer)):
                for key, value in optimizer.state.get(p, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizers/{name}/{i}/{key}"] = value
                    else:
                        rest[f"{i}/{key}"] = value
        return tensors, plain

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self.phase_index, self.step = plain["phase"], plain["step"]
        self._begin_phase()
        own = {k[len("method/") :]: v for k, v in tensors.items() if k.startswith("method/")}
        self.method.load_state_dict(own)  # copies, so every tensor keeps its memory format
        device = next(self.method.parameters()).device
        self.sums = {k: tensors[f"sums/{k}"].to(device) for k in plain["terms"]}
        self.summed = plain["summed"]
        for name, optimizer in self.optimizers.items():
            for i, p in enumerate(_parameters_of(optimizer)):
                prefix = f"optimizers/{name}/{i}/"
                defaults = optimizer.defaults
                counts_there = bool(defaults.get("fused") or defaults.get("capturable"))
                state = {
                    k[len(prefix) :]: _like(p, v, counts_there)
                    for k, v in tensors.items()
                    if k.startswith(prefix)
                }
                state |= {
                    k.partition("/")[2]: v
                    for k, v in plain["optimizers"].get(name, {}).items()
                    if k.startswith(f"{i}/")
                }
                if state:
                    optimizer.state[p] = state


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _like(p: nn.Parameter, value: Tensor, counts_there: bool) -> Tensor:
    """A stored optimiser tensor, on the parameter's device and in its memory format.

    Files hold contiguous tensors, and a fused optimiser steps silently wrong where the formats of
    state and parameter differ. Step counters lie on the parameter's device where `counts_there`
    (fused and capturable optimisers), else on the CPU.
    """
    if value.shape != p.shape:
        return value.to(p.device) if counts_there else value.clone()
    return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
