"""What a CPU's memory costs between two steps."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of glibc's mallopt(3)."""
LARGEST = 2**31 - 1
"""Bytes: all that may be free before memory is handed back."""
BLOCK = 32 * 2**20
"""Bytes: from here on a block is the system's own affair, at the most that glibc allows."""


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Within, the C library keeps what a step frees for the next one; then it hands all back.

    Otherwise glibc returns the top of the heap whenever 64 MiB there are free, which the
    activations of two networks are, and the next step finds every page missing. Nothing happens on
    a GPU, with another C library, or where the environment tunes glibc (MALLOC_...).
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    ours = device.type == "cpu" and not any(name.startswith("MALLOC_") for name in os.environ)
    if not (ours and hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    assert library is not None
    library.mallopt(MMAP_THRESHOLD, BLOCK)
    library.mallopt(TRIM_THRESHOLD, LARGEST)
    try:
        yield
    finally:
        library.mallopt(TRIM_THRESHOLD, 2 * BLOCK)
        library.malloc_trim(0)
