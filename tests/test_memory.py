"""Memory that a step frees is there for the next one, and handed back in the end."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from potstill.memory import kept

needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library"
)

STEP = """
import os, torch
from potstill.memory import kept

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

torch.ones(1)
before = resident()
with kept(torch.device("cpu")):
    parts = [torch.ones(6 * 2**20) for _ in range(10)]
    del parts
    print(resident() - before)
print(resident() - before)
"""


def held(**environment: str) -> list[float]:
    """MiB after 240 MiB in ten blocks were freed: within, and afterwards."""
    given = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", STEP], capture_output=True, text=True, check=True, env=given
    )
    return [float(line) for line in done.stdout.splitlines()]


@needs_glibc
def test_what_a_step_frees_is_kept_for_the_next_one_and_handed_back_at_the_end():
    within, afterwards = held()
    assert within > 200
    assert afterwards < 60


@needs_glibc
def test_the_environment_has_the_last_word():
    """Where it says anything of how memory is kept. glibc then gives such blocks back at once."""
    within, _ = held(MALLOC_ARENA_MAX="1")
    assert within < 60


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_it_can_be_entered_twice_and_left_by_an_error(device: str):
    where = torch.device(device)
    with pytest.raises(ValueError, match="inside"), kept(where), kept(where):
        raise ValueError("inside")
