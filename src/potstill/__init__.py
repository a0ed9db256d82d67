"""Potstill: knowledge distillation of image models, offline, online and cross-task.

>>> import potstill
>>> run = potstill.distill(teacher, student, train, test, method="kd", epochs=30)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.errors import PotstillError
    from potstill.method import Batch, DataSpec, Method, Outputs, Phase, Progress, Turn, Update
    from potstill.methods import METHODS
    from potstill.models import MODELS, build
    from potstill.net import Captured, Net
    from potstill.notebook import distill
    from potstill.run import Run
    from potstill.stochastic_depth import stochastic

__version__ = "0.1.0"

_HOMES = {
    "Batch": "method",
    "Captured": "net",
    "DataSpec": "method",
    "METHODS": "methods",
    "MODELS": "models",
    "Method": "method",
    "Net": "net",
    "Outputs": "method",
    "Phase": "method",
    "PotstillError": "errors",
    "Progress": "method",
    "Run": "run",
    "Turn": "method",
    "Update": "method",
    "build": "models",
    "distill": "notebook",
    "stochastic": "stochastic_depth",
}

__all__ = [
    "METHODS",
    "MODELS",
    "Batch",
    "Captured",
    "DataSpec",
    "Method",
    "Net",
    "Outputs",
    "Phase",
    "PotstillError",
    "Progress",
    "Run",
    "Turn",
    "Update",
    "build",
    "distill",
    "stochastic",
]


def __getattr__(name: str) -> Any:  # importing potstill must not load torch (PEP 562)
    if name in _HOMES:
        globals()[name] = getattr(import_module(f"potstill.{_HOMES[name]}"), name)
        return globals()[name]
    raise AttributeError(f"module 'potstill' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
