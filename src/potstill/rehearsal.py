"""What a training will cost: a few of its real steps, and what follows from them."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from potstill import engine, memory
from potstill.evaluate import NearestClassMean, evaluate
from potstill.method import Batch, Phase
from potstill.stopwatch import now
from potstill.training import Assembled, evaluation_batch

WARM_UP = 2
"""Steps before the clock starts: the first ones allocate, and build what is built once."""
FEW = 2
"""Batches of clean images that are tried, of all."""


@dataclass(frozen=True)
class PhaseCost:
    """Of one phase."""

    seconds_per_step: float
    steps: int
    prepare_seconds: float = 0.0
    """What it does once before its first step."""

    @property
    def seconds(self) -> float:
        """The whole phase, without evaluations."""
        return self.steps * self.seconds_per_step + self.prepare_seconds


@dataclass(frozen=True)
class Rehearsal:
    """What a training would take here and now, on this machine and beside whatever else it does."""

    phases: Mapping[str, PhaseCost]
    evaluation_seconds: float
    """All evaluations, the last one on the test images included."""
    peak_bytes: int
    """Of the process so far on a CPU, of this training on a GPU."""

    @property
    def total_seconds(self) -> float:
        """Steps, preparations and evaluations; not the loading of data and networks."""
        return sum(phase.seconds for phase in self.phases.values()) + self.evaluation_seconds


def rehearse(job: Assembled, seconds: float = 2.0) -> Rehearsal:
    """Carry out a few real steps of each phase, for about `seconds` each, and some evaluation.

    The networks of the job are trained a little by it: assemble the real one anew. Later phases
    are tried with what the networks are without the earlier ones.
    """
    training, whole = job.training, job.training.images
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    costs, evaluating = {}, 0.0
    job.method.stored = None  # a training alone writes into a store
    with memory.kept(job.device):
        for index, phase in enumerate(training.phases):
            few = Few(whole)
            training.images = few
            training.skip_to(index)
            step = _step_seconds(job, seconds)
            batches = -(-len(job.data.train) // job.method.data.batch_size)
            costs[phase.name] = PhaseCost(step, training.steps, few.seconds_each * batches)
            evaluating += _evaluation_seconds(job, phase, seconds)
    training.images = whole
    return Rehearsal(costs, evaluating, peak_bytes(job.device))


class Few:
    """A training's images, of which a preparation sees the first few batches."""

    def __init__(self, images: engine.TrainingImages) -> None:
        self.batches = images.batches
        self.images = images
        self.seconds_each = 0.0
        """Of a batch of a preparation."""

    def clean(self, batch_size: int, sharded: bool = False) -> Iterator[Batch]:
        began = time.perf_counter()
        yield from islice(self.images.clean(batch_size, sharded), FEW)
        self.seconds_each = (time.perf_counter() - began) / FEW


def _step_seconds(job: Assembled, seconds: float) -> float:
    """Median time of a step of the phase at hand, after the warm-up."""
    times: list[float] = []
    last = began = time.perf_counter()
    for moment in job.training.run():
        done = now(job.device)
        times.append(done - last)
        last = done
        enough = len(times) > WARM_UP and done - began > seconds
        if enough or moment.step == moment.steps:
            break
    return statistics.median(times[WARM_UP:] or times[-1:])


def _evaluation_seconds(job: Assembled, phase: Phase, seconds: float) -> float:
    """All evaluations of a phase; where others chose, after the last one of the test images too."""
    predictors = (phase.predictors or job.method.predictors)()
    if not predictors:
        return 0.0
    epochs, every = job.pace.epochs[phase.name], job.evaluate_every
    often = len({*range(every, epochs + 1, every), epochs})
    images = often * len(job.held_out)
    if job.data.validation is not None and phase is job.training.phases[-1]:
        images += len(job.data.test)
    if any(isinstance(p, NearestClassMean) for p in predictors.values()):
        images += often * len(job.data.train)  # its means are of all training images
    batch = evaluation_batch(job.held_out)
    few, precision = Few(job.held_out), job.pace.precision
    evaluate(predictors, few, batch, few, precision)  # warms up
    began, done = time.perf_counter(), 0
    while not done or time.perf_counter() - began < seconds / 4:
        evaluate(predictors, few, batch, few, precision)
        done += min(FEW * batch, len(job.held_out))
    return images * (now(job.device) - began) / done


def peak_bytes(device: torch.device) -> int:
    """Of the process so far on a CPU; on a GPU of what torch allocated since its last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
