"""What a training begins with: recipe, networks, data, what networks see, how students start."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from potstill import data as datasets
from potstill import training
from potstill.doctor.finding import Finding, few
from potstill.doctor.teachers import FEW, judge, numbers, some
from potstill.method import Batch
from potstill.recipe import Network, Recipe


def of_recipe(recipe: Recipe) -> Iterator[Finding]:
    """What the recipe says that is to be trained, and its notes."""
    method = recipe.method.name
    shared = f"seed {recipe.seed}, batches of {recipe.data.batch_size}"
    yield Finding("recipe", "ok", f"method {method} on {recipe.data.name}, {shared}")
    for note in recipe.notes:
        wrong = "is never reached" in note
        fix = "lower the milestones, or raise schedule_epochs with them" if wrong else ""
        yield Finding("recipe", "warn" if wrong else "ok", note, fix)


def of_networks(job: training.Assembled, said: Sequence[str]) -> Iterator[Finding]:
    """Every network, whether its numbers are finite, and what assembling them `said`."""
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
    return f"numbers that are not finite in {few(names)}" if names else ""


def of_data(data: datasets.Data) -> Iterator[Finding]:
    """Size of the splits; a class without images, an image that is trained on and held out."""
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


def of_inputs(job: training.Assembled) -> Iterator[Finding]:
    """What every network sees of the first batch, after its own normalisation."""
    batch, split = job.training.first_batch(), job.data.train
    for name, net in job.method.by_name.items():
        seen = batch.image
        if net.scale is not None and net.shift is not None:
            seen = seen * net.scale + net.shift
        mean, std = (x.tolist() for x in (seen.mean((0, 2, 3)), seen.std((0, 2, 3))))
        said = f"{name} sees a batch of mean {numbers(mean, 2)} and std {numbers(std, 2)}"
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
    return f"data.mean={numbers(means)} data.std={numbers(stds)}"


def _key(name: str) -> str:
    """ "teacher0" -> "teachers.0"; "student" -> "students.0" """
    role = name.rstrip("0123456789")
    return f"{role}s.{name[len(role) :] or 0}"


def of_start(job: training.Assembled, recipe: Recipe) -> Iterator[Finding]:
    """Accuracy of a student that has weights, the loss of a fresh one."""
    batch, method, classes = job.training.first_batch(), job.method, len(job.data.train.classes)
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
