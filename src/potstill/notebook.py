"""From plain modules and datasets to a finished run: `potstill.distill`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from potstill import data as datasets
from potstill import display, models, training
from potstill.depth import settings_of
from potstill.errors import PotstillError
from potstill.method import Method
from potstill.methods import METHODS
from potstill.net import Net, Predictor, shared_copy
from potstill.recipe import Recipe, loads, resolve
from potstill.run import Run
from potstill.seeds import seed_of

Network = nn.Module | str | Path | Mapping[str, Any]
"""A module, an architecture's name, a run's directory, or a recipe's {name:, weights:, ...}."""


def distill(
    teacher: Network | Sequence[Network] | None,
    student: Network | Sequence[Network],
    train: Any,
    test: Any = None,
    method: str = "kd",
    *,
    epochs: int | Mapping[str, int] | None = None,
    batch_size: int = 64,
    optimizers: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    precision: str = "auto",
    compile: bool | Literal["teachers"] = False,
    store: bool | Mapping[str, Any] = False,
    device: str = "auto",
    quiet: bool = False,
    **arguments: Any,
) -> Run:
    """Train a student under a teacher; the finished run, with the trained module in `run.student`.

    `teacher` and `student` are plain modules that return logits (with the taps that `Net.discover`
    proposes; wrap one in `Net` to name them yourself), names of architectures, or run directories;
    several in a list; teacher None for methods without one. `train` and `test` are datasets of
    (image, label) - uint8 or PIL images are normalised here, float tensors are taken as your
    transforms made them - or `train` alone is a name such as "cifar100", or a folder with train/
    and test/ in it. `data` holds further settings: {"padding": 4, "flip": True, "subset": 5000} ...

    `epochs` are of the whole training, None for the published length. `optimizers` are as in a
    recipe, their milestones and warm-ups in epochs of this training; None for RepDistiller's, whose
    rate drops to a tenth at 15, 18 and 21 of every 24 epochs, and not in a shorter first phase.
    `arguments` are the method's own. With `out` the run is a directory that `resume` continues;
    without, nothing is written, but for the teacher's outputs where `store` keeps them (True, or
    settings as in a recipe). A student module is trained in place; a teacher is not changed.
    `run.student` is the student module, or, for methods that predict with more than it (SimKD,
    NORM), a module from images to logits that contains it. `run.students` are all modules that
    predict: where networks teach each other, every student, and their ensemble last.

    >>> from sklearn.datasets import load_digits
    >>> x, y = load_digits(return_X_y=True)
    >>> images = (x.reshape(-1, 8, 8) * 15).astype("uint8")
    >>> pairs = list(zip(images, y))
    >>> import potstill
    >>> student = potstill.build("resnet8", num_classes=10, input_shape=(1, 8, 8))
    >>> run = distill(None, student, pairs[:900], pairs[900:], "vanilla", epochs=1, quiet=True)
    >>> run.result["scores"]["student"]["images"]
    897

    Raises PotstillError, before any training, for whatever does not fit.
    """
    teachers, students = _several(teacher), _several(student)
    named = isinstance(train, (str, Path))
    recipe = resolve(
        {
            "students": [_described(n) for n in students],
            "teachers": [_described(n) for n in teachers],
            "method": {"name": method, **arguments},
            "data": {
                **(_data_by_name(train, test) if named else {"name": _origin(train)}),
                "batch_size": batch_size,
                **(data or {}),
            },
            "optimizers": optimizers or _default_optimizers(method),
            "epochs": epochs,
            "schedule_epochs": {} if optimizers is None else None,
            "seed": seed,
            "precision": precision,
            "store": dict(store) if isinstance(store, Mapping) else store,
            "compile": compile,
            "device": device,
        },
        source="distill",
        allow_code=True,
    )
    place = Path(out) if out is not None else None
    going_on = resume and place is not None and (place / "recipe.yaml").is_file()
    on = training.choose_device(recipe.device)
    found = training.load_data(recipe, on) if named else _own_data(recipe, train, test, on)
    kept = _modes([n for n in teachers if isinstance(n, nn.Module)])
    kept += _flags([n for n in students if isinstance(n, nn.Module)])
    learning: list[tuple[Net, Sequence[int] | None]] = []
    taught: list[tuple[Net, Sequence[int] | None]] = []
    try:
        for i, given in enumerate(students):
            torch.manual_seed(seed_of(seed, "student", i))
            learning.append(_net(given, recipe.students[i], found, f"student {i}"))
        for i, given in enumerate(teachers):
            taught.append(_net(given, recipe.teachers[i], found, f"teacher {i}"))
        job = training.put_together(recipe, found, learning, taught, on)
        if going_on and place is not None:
            run = Run.open(place)
            if loads(run.recipe, allow_code=True) != recipe:
                raise PotstillError(f"{place} was started with other settings; choose another out")
        else:
            run = Run.create(place, recipe.to_yaml(), job.environment)
        checkpoint = run.latest_checkpoint()
        if run.finished and checkpoint is not None:  # the modules given are as trained then
            job.training.restore(checkpoint.tensors, checkpoint.state)
        else:
            with display.watcher(Console(), quiet=quiet) as watcher:
                for note in recipe.notes:
                    watcher.say(f"note: {note}")
                training.carry_out(job, run, watcher)
        predicting = [_trained(p) for p in job.method.predictors().values()]
        for (given, _), whole in zip(learning, job.method.networks, strict=True):
            if whole is not given:  # trained as part of another network, in a copy
                given.module.load_state_dict(whole.module.state_dict())
                predicting = [given.module if m is whole.module else m for m in predicting]
        run.students = predicting
    finally:
        for thing, name, value in kept:
            setattr(thing, name, value)
        for net, _ in (*learning, *taught):
            net.take_out()
            net._compiled_call_impl = None  # it may be changed, or learn, before it teaches again
            if not any(net is given for given in (*students, *teachers)):
                net.close()
    return run


def _default_optimizers(method: str) -> dict[str, Any]:
    """RepDistiller's, with milestones in epochs of the method's last phase, as published."""
    *_, length = METHODS.get(method, Method).lengths.values()
    milestones = [share * length / 24 for share in (15, 18, 21)]
    return {
        "default": {
            "name": "sgd",
            "lr": 0.05,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "schedule": {"name": "steps", "milestones": milestones, "factor": 0.1},
        }
    }


def _several(networks: Any) -> list[Any]:
    if networks is None:
        return []
    if isinstance(networks, Sequence) and not isinstance(networks, (str, nn.Module)):
        return list(networks)
    return [networks]


def _origin(value: object) -> str:
    """Where an object's class comes from, in the form that recipes use for one's own code."""
    kind = type(value.module if isinstance(value, Net) else value)
    return f"py:{kind.__module__}:{kind.__qualname__}"


def _described(network: Network) -> dict[str, Any]:
    if isinstance(network, Mapping):
        return dict(network)
    if isinstance(network, (str, Path)):
        return {"name": str(network)}
    return {"name": _origin(network), "stochastic": settings_of(network)}


def _data_by_name(train: str | Path, test: Any) -> dict[str, Any]:
    if test is not None:
        raise PotstillError(f"train={train} has its own test images; leave test out")
    name = str(train)
    return {"name": name} if name in datasets.DATASETS else {"name": "folder", "root": name}


def _own_data(recipe: Recipe, train: Any, test: Any, device: torch.device) -> datasets.Data:
    if test is None:
        raise PotstillError(
            "test is missing: a dataset of (image, label) that train does not share"
        )
    taken = ("mean", "std", "padding", "pad_mode", "flip", "views", "validation", "workers")
    settings = recipe.data.model_dump(exclude_none=True, exclude={"name", "batch_size"})
    settings.pop("drop_last")
    if wrong := sorted(settings.keys() - set(taken)):
        raise PotstillError(
            f"data.{wrong[0]} is for named data sets and folders; your own takes {', '.join(taken)}"
        )
    return datasets.from_dataset(train, test, **settings, device=device)


def _net(
    given: Network, network: Any, data: datasets.Data, key: str
) -> tuple[Net, Sequence[int] | None]:
    """A network as given, tapped, and the class ids it knows; None as in `put_together`."""
    if not isinstance(given, nn.Module):
        return training.build_network(network, data, key)
    net = given if isinstance(given, Net) else models.tapped(given, data.train.input_shape)
    net.architecture = network.name
    if tuple(net.input_shape) != tuple(data.train.input_shape):
        raise PotstillError(
            f"{key} was built for images of {tuple(net.input_shape)}, the data's are "
            f"{tuple(data.train.input_shape)}; give Net input_shape={tuple(data.train.input_shape)}"
        )
    if key.startswith("student") and net.num_classes < len(data.train.classes):
        raise PotstillError(
            f"{key} has {net.num_classes} outputs and the data {len(data.train.classes)} classes; "
            "give it one output a class"
        )
    known = net.num_classes == len(data.train.classes) and training.taken_for_the_tasks(data)
    if key.startswith("teacher") and not known:
        return net, None
    return net, data.train.classes


def _modes(modules: Sequence[nn.Module]) -> list[tuple[Any, str, bool]]:
    """What freezing a teacher changes: attributes to put back."""
    kept: list[tuple[Any, str, bool]] = []
    for module in modules:
        kept += [(m, "training", m.training) for m in module.modules()]
    return kept + _flags(modules)


def _flags(modules: Sequence[nn.Module]) -> list[tuple[Any, str, bool]]:
    """What freezing a part changes: of a student too, whose classifier SimKD leaves alone."""
    return [(p, "requires_grad", p.requires_grad) for m in modules for p in m.parameters()]


def _trained(predictor: nn.Module) -> nn.Module:
    """The student's own module; of a predictor that is more, a copy that shares every tensor.

    The copy keeps the taps that it reads by, which are then removed from the student.
    """
    if isinstance(predictor, Predictor):
        return predictor.module.module  # type: ignore[return-value]
    return shared_copy(predictor)
