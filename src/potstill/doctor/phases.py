"""Phases: their terms and gradients, their first step, what it moves, optimisers and schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from potstill import distributed, engine, training
from potstill.doctor.finding import Finding, few, in_one_line
from potstill.doctor.teachers import FEW, some
from potstill.errors import PotstillError
from potstill.method import Batch, Method, Phase, Progress, Update, of_sum
from potstill.optim import Steps
from potstill.recipe import Recipe

TOO_MUCH = 100.0
"""How many times the gradients of all other terms one term's may have."""


class Pulse(NamedTuple):
    """One term on one batch."""

    value: float
    gradient: float
    """Norm of its gradient, with respect to the students' weights where its update has some."""
    moves: bool
    """Whether anything that its update trains has a gradient that is not 0."""


@dataclass(frozen=True)
class Examined:
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
    made.set_rates()
    if made.phase.prepare is not None:
        job.method.eval()
        with torch.no_grad():
            made.phase.prepare(some(job.data.train, FEW).clean(job.method.data.batch_size))
    return made.phase


def of_phase(
    job: training.Assembled, recipe: Recipe, i: int, seen: dict[str, Examined]
) -> Iterator[Finding]:
    """The terms of phase `i` and its first step; `seen` is given its updates."""
    made, phase = job.training, _enter(job, i)
    batch = made.first_batch()
    start = Progress(0, 0, made.steps, phase.epochs)
    middle = Progress(made.pace.epochs[phase.name] // 2, made.steps // 2, made.steps, phase.epochs)
    yield from _last_batch(job, i, batch, start)
    first, weights = _measure(job, recipe, phase, batch, start)
    made.seed_draws(0)
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
            found = Examined(pulses, weights, still & later_still, update.gradients is not of_sum)
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
    job.training.seed_draws(0)
    for t, turn in enumerate(phase.turns):
        out = engine.forward_turn(phase, t, batch, progress, job.pace.seed, out)
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
    name: str, recipe: Recipe, found: Examined, after: Mapping[str, Pulse], where: str
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
    job.training.seed_draws(0)
    try:
        with torch.no_grad():
            for t in range(len(phase.turns)):
                out = engine.forward_turn(phase, t, one, progress, job.pace.seed, out)
    except PotstillError as error:
        message = f"{said}, which stops the training: {in_one_line(error)}"
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


def copies(net: nn.Module) -> dict[str, Tensor]:
    """A network's tensors as they are now."""
    return {name: x.detach().clone() for name, x in net.state_dict().items()}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also NaN equals itself here."""
    return torch.equal(*(x.detach().flatten().view(torch.uint8) for x in (a, b)))


def of_frozen(
    job: training.Assembled, before: Sequence[Mapping[str, Tensor]], seen: Mapping[str, Examined]
) -> Iterator[Finding]:
    """Whether the teachers are frozen, and what they were `before` the phases were tried."""
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


def of_optimizers(job: training.Assembled, seen: Mapping[str, Examined]) -> Iterator[Finding]:
    """What every update trains, with which optimiser; what only decays or is not trained."""
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
                    f"{said}; no term has a gradient for {few(sorted(idle))}, so all that happens "
                    f"to them is weight decay ({decay:g})",
                    f"optimizers.{update.name}.weight_decay=0, or a loss that reaches them",
                )
            else:
                yield Finding("optimizers", "ok", said)
    frozen = [n for n, p in method.named_parameters() if id(p) not in reached]
    if frozen:
        yield Finding("optimizers", "ok", f"no update trains {few(frozen)}: frozen")


def of_schedule(job: training.Assembled) -> Iterator[Finding]:
    """Length and rates of every phase."""
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
