"""Files of rows, found and damaged."""

from __future__ import annotations

from pathlib import Path


def rows_of(folder: Path) -> list[Path]:
    """Every segment below a folder, by path."""
    return sorted(folder.rglob("*.rows"))


def flip(path: Path, position: int = -1, mask: int = 0x01) -> None:
    """Change bits of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)
