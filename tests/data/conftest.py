"""Every test decodes into a cache of its own and sees no POTSTILL_DATA but its own."""

import os
from pathlib import Path

import pytest

STORED = Path(os.environ.get("POTSTILL_DATA") or Path(__file__).parents[3] / "shared" / "data")
CACHE = os.environ.get("POTSTILL_CACHE", "")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("POTSTILL_DATA", raising=False)


@pytest.fixture
def real_cifar100(own_cache, monkeypatch):
    """Its folder; decoding it takes seconds, so it is kept in the developer's own cache."""
    if not (STORED / "cifar100").is_dir():
        pytest.skip(f"no real CIFAR-100 in '{STORED}'; set POTSTILL_DATA")
    monkeypatch.setenv("POTSTILL_CACHE", CACHE)
    return STORED
