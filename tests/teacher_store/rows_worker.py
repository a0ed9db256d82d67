"""Writers of rows in processes of their own, for test_rows.py.

    python -m tests.teacher_store.rows_worker write FOLDER FIRST COUNT
    python -m tests.teacher_store.rows_worker kill FOLDER TIMES

`write` says "ready", waits for a line, and appends images FIRST to FIRST + COUNT - 1, a few at a
time, reading back some of all that is there. `kill` starts a writer TIMES times and kills each with
SIGKILL after some milliseconds.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from potstill.teacher_store.rows import Bytes, Column, Integers

IDENTITY = {"store": "0123", "output": "logits"}
SIZE = 48
KILLED_SIZE = 20_000
"""Bytes of a value that takes a while to write."""


def value_of(index: int, view: int, size: int = SIZE) -> bytes:
    """What every process agrees on."""
    return hashlib.shake_128(f"{index} {view}".encode()).digest(size)


def values_of(index: Integers, view: Integers, size: int = SIZE) -> Bytes:
    """(n,), (n,) -> (n, size)"""
    pairs = zip(index.tolist(), view.tolist(), strict=True)
    return np.array([np.frombuffer(value_of(i, v, size), np.uint8) for i, v in pairs])


def numbers(*given: int) -> Integers:
    """int64 of plain ones."""
    return np.array(given, np.int64)


def write(folder: Path, first: int, count: int) -> None:
    """Fails where anything that is read is not what somebody wrote."""
    column, draw = Column(folder, IDENTITY, SIZE), random.Random(first)
    print("ready", flush=True)
    sys.stdin.readline()
    at = first
    while at < first + count:
        index = np.arange(at, min(at + draw.randint(1, 9), first + count))
        view = index % 3
        column.append(index, view, values_of(index, view))
        at += len(index)
        column.refresh()
        index = np.arange(0, 2 * count, 7)
        found = column.read(index, index % 3)
        assert found.damaged == 0 and not column.faults, (found.damaged, column.faults)
        assert (found.value[found.good] == values_of(index, index % 3)[found.good]).all()
    column.close()


def kill(folder: Path, times: int) -> None:
    """Each writer's images begin at another thousand."""
    draw = random.Random(0)
    for number in range(times):
        child = os.fork()
        if not child:
            column = Column(folder, IDENTITY, KILLED_SIZE)
            for index in np.arange(1000 * number, 1000 * number + 1000).reshape(-1, 4):
                view = index % 3
                column.append(index, view, values_of(index, view, KILLED_SIZE))
            os._exit(0)
        time.sleep(draw.uniform(0.002, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    {"write": write, "kill": kill}[what](Path(where), *map(int, rest))
