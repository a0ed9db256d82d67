"""The public surface: what `import potstill` gives, and what it must not load."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import potstill

PUBLIC = [
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


def test_the_public_names_are_these():
    """A change of this list is a change of the library's promise: say so in the changelog."""
    assert potstill.__all__ == PUBLIC
    assert sorted(PUBLIC, key=lambda n: (not n.isupper(), n[0].islower(), n)) == PUBLIC
    assert dir(potstill) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_imported_from_its_home(name: str):
    thing = getattr(potstill, name)
    if name not in ("METHODS", "MODELS"):
        assert thing.__name__ == name
        assert getattr(sys.modules[thing.__module__], name) is thing
    assert getattr(potstill, name) is thing
    scope: dict[str, object] = {}
    exec(f"from potstill import {name}", scope)
    assert scope[name] is thing


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'potstill' has no attribute 'distil'$"):
        _ = potstill.distil


HEAVY = ("torch", "numpy", "datasets", "sklearn", "plotly", "torchvision", "timm", "rich", "typer")


def test_importing_potstill_loads_nothing_heavy():
    code = f"""
import sys
import potstill
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
assert potstill.PotstillError and "torch" not in sys.modules
assert not [name for name in sys.modules if name.startswith("potstill.me")]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_version_is_the_installed_one():
    assert potstill.__version__ == importlib.metadata.version("potstill")
