"""The machine: what it computes with, time and memory of the whole training, room on the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from potstill import display, engine, training
from potstill.doctor.finding import Finding, in_one_line
from potstill.errors import PotstillError
from potstill.files import existing, in_bytes
from potstill.recipe import Recipe


def of_machine(job: training.Assembled, recipe: Recipe) -> Iterator[Finding]:
    """Device, precision and compilation."""
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
    how = "of the teachers" if job.compile == "teachers" else "on"
    compiled = f"{how}; compiling is not tried here" if job.compile else "off"
    yield Finding(
        "machine",
        "ok",
        f"{device}, {torch.get_num_threads()} threads, {job.precision} ({why}), compile {compiled}"
        "; a run repeats bit for bit where these and the versions stay",
    )


def of_store(job: training.Assembled) -> Iterator[Finding]:
    """Whether teachers' outputs are kept, or could be."""
    if not job.method.teachers:
        return
    if job.store is not None:
        needed, room = job.store.needed_bytes, job.store.stores[0].how.gb * 1e9
        where = ", ".join(str(store.folder) for store in job.store.stores)
        outputs = ", ".join(job.store.stores[0].outputs)  # of all teachers alike
        yield Finding(
            "store",
            "ok",
            f"on: {outputs}, at most {in_bytes(needed)} of {in_bytes(room)} in {where}; the time "
            "below is without it",
        )
        return
    try:
        engine.require_storable(job.method)
    except PotstillError as error:
        yield Finding("store", "ok", f"off: {in_one_line(error)}")
        return
    yield Finding(
        "store", "ok", "off; store=true keeps the teachers' outputs, and later runs read them"
    )


def of_rehearsal(recipe: Recipe) -> Iterator[Finding]:
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


def of_out(job: training.Assembled, out: Path) -> Iterator[Finding]:
    """Whether a run can be written to `out`, and fits there."""
    place = existing(out)
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
