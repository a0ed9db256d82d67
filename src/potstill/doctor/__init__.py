"""Before a training: what would silently spoil it, a finding each.

    recipe -> data, networks, method -> real batches -> findings

Every check runs what the training itself will run: its test images through its teachers, its first
batch through every phase's forward and losses, one step of its optimisers. The networks that this
is done to are thrown away, and nothing is kept on the disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from potstill import training
from potstill.doctor.finding import Finding, as_object, healthy, in_one_line, show, summary
from potstill.doctor.inputs import of_data, of_inputs, of_networks, of_recipe, of_start
from potstill.doctor.machine import of_machine, of_out, of_rehearsal, of_store
from potstill.doctor.phases import Examined, copies, of_frozen, of_optimizers, of_phase, of_schedule
from potstill.doctor.teachers import of_teacher
from potstill.errors import PotstillError, first_line
from potstill.recipe import Recipe

__all__ = ["Finding", "as_object", "examine", "healthy", "show", "summary"]


def examine(recipe: Recipe, out: Path = Path("runs")) -> Iterator[Finding]:
    """Check everything that can be checked before training; findings as they are made.

    `out` is where the run would be written. What cannot be found out is a finding as well.
    """
    yield from of_recipe(recipe)
    said: list[str] = []
    try:
        job = training.assemble(recipe, said.append)
    except PotstillError as error:
        yield Finding("networks", "fail", in_one_line(error))
        try:
            data = training.load_data(recipe, training.choose_device(recipe.device))
        except PotstillError:
            return  # the same fault again
        yield from _tried("data", of_data, data)
        yield Finding("networks", "warn", "nothing that needs the networks was checked")
        return
    job.method.stored, job.training.supply = None, iter  # a training alone writes into a store
    failed = False
    for finding in itertools.chain(of_networks(job, said), _of_job(job, recipe)):
        failed = failed or finding.level == "fail"
        yield finding
    disk = list(_tried("disk", of_out, job, out))
    if failed:
        yield Finding("time", "ok", "not estimated: put right what fails first")
    else:
        yield from _tried("time", of_rehearsal, recipe)
    yield from disk


def _of_job(job: training.Assembled, recipe: Recipe) -> Iterator[Finding]:
    """What is found by running the parts of a training, and its first steps."""
    yield from _tried("data", of_data, job.data)
    for i in range(len(job.method.teachers)):
        yield from _tried(f"teacher {i}", of_teacher, job, i)
    yield from _tried("input", of_inputs, job)
    yield from _tried("start", of_start, job, recipe)
    before = [copies(teacher) for teacher in job.method.teachers]
    seen: dict[str, Examined] = {}
    for i, phase in enumerate(job.training.phases):
        yield from _tried(phase.name, of_phase, job, recipe, i, seen)
    yield from _tried("frozen", of_frozen, job, before, seen)
    yield from _tried("optimizers", of_optimizers, job, seen)
    yield from _tried("schedule", of_schedule, job)
    yield from _tried("machine", of_machine, job, recipe)
    yield from _tried("store", of_store, job)


def _tried(name: str, check: Callable[..., Iterable[Finding]], *given: Any) -> Iterator[Finding]:
    """A check's findings; what it raises is one, so that the others go on."""
    try:
        yield from check(*given)
    except PotstillError as error:
        yield Finding(name, "fail", in_one_line(error))
    except Exception as error:  # whatever a method or network of one's own may raise
        kind = type(error).__name__
        yield Finding(name, "fail", f"cannot be found out: {kind}: {first_line(error)}")
