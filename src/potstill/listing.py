"""Everything that has a name, described for `potstill list`."""

from __future__ import annotations

import inspect
from typing import Any


def entries(what: str) -> list[dict[str, Any]]:
    """One object for each method, model, data set or recipe; each has "name" and "description"."""
    return {"methods": _methods, "models": _models, "datasets": _datasets, "recipes": _recipes}[
        what
    ]()


def _methods() -> list[dict[str, Any]]:
    from potstill.methods import METHODS

    own = ("self", "students", "teachers", "data")
    return [
        {
            "name": name,
            "description": inspect.getdoc(method).partition("\n")[0],  # type: ignore[union-attr]
            "students": list(method.students_needed),
            "teachers": list(method.teachers_needed),
            "epochs": method.epochs,
            "arguments": {
                p.name: p.default
                for p in inspect.signature(method.__init__).parameters.values()
                if p.name not in own
            },
        }
        for name, method in METHODS.items()
    ]


def _models() -> list[dict[str, Any]]:
    from potstill.models import MODELS, build

    found = []
    for name, architecture in MODELS.items():
        net = build(name)
        count = sum(p.numel() for p in net.parameters())
        found.append(
            {
                "name": name,
                "description": f"{architecture.description}; {count:,} parameters at 100 classes",
                "parameters": count,
                "input_shape": list(architecture.input_shape),
                "taps": {tap: list(net.shapes[tap]) for tap in architecture.taps},
            }
        )
    return found


def _datasets() -> list[dict[str, Any]]:
    from dataclasses import asdict

    from potstill.data import DATASETS

    return [{"name": name, **asdict(info)} for name, info in DATASETS.items()]


def _recipes() -> list[dict[str, Any]]:
    from potstill.recipe import shipped

    return [{"name": n, "description": d} for n, d in shipped().items()]
