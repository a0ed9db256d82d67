"""Packages that Potstill can do without: imported when they are asked for, with the reason if not.

A package may be there and still fail, and not only by ImportError: torchvision beside a torch of
another build raises RuntimeError. So every optional import goes through `require`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from potstill.errors import MissingExtra, first_line


def require(module: str, extra: str, why: str) -> ModuleType:
    """A module of an optional package.

    `extra` is the one of Potstill's that brings the package. `why` is what needs it, and begins
    the message: "timm:resnet18", "an HTML report".

    Raises MissingExtra, which says whether the package is absent or broken, and what to do.
    """
    package = module.partition(".")[0]
    before = set(sys.modules)
    try:
        return importlib.import_module(module)
    except Exception as error:
        _drop_orphans(set(sys.modules) - before)
        fault = _fault(error, package, extra)
        raise MissingExtra(f"{why} needs {package}, which {fault}") from error


def _drop_orphans(names: set[str]) -> None:
    """Forget the modules whose package failed.

    Python drops the package alone. A second attempt would find its parts imported but not bound to
    it, and fail for that instead of the reason.
    """
    for name in names:
        parts = name.split(".")
        if any(".".join(parts[:n]) not in sys.modules for n in range(1, len(parts))):
            del sys.modules[name]


def _fault(error: Exception, package: str, extra: str) -> str:
    lacking = error.name if isinstance(error, ModuleNotFoundError) else None
    if lacking == package:
        return f"is not installed; pip install 'potstill[{extra}]'"
    reason = first_line(error)
    if lacking != "torchvision" and "torchvision" in f"{package} {reason}":
        remedy = _matching_torchvision()
    elif lacking is not None:
        remedy = f"pip install 'potstill[{extra}]' brings what it needs"
    else:
        remedy = f"install it anew: pip install --force-reinstall --no-deps {package}"
    return f"is installed but cannot be imported: {reason}; {remedy}"


def _matching_torchvision() -> str:
    import torch

    return (
        f"torchvision must be built for the torch that is here, {torch.__version__}; install both "
        "together, from the same index"
    )
