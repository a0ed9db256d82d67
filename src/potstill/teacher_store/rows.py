"""Rows of bytes by (image, view): files that several processes append to, each to its own.

    segment   count (8) | length of the header (4) | its CRC-32 (4) | header, JSON | to 4096
              then rows: CRC-32 (4) | image (8) | view (8) | value

A segment has one writer, ever. It writes a row's value and checksum first and counts the row
afterwards, so that whoever reads sees whole rows alone, also after a kill. What a disk makes of
them later is found out by the checksum, which is compared whenever a row is read.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from potstill.errors import StorageError
from potstill.files import storage_error

HEADER = 4096
"""Bytes before the first row."""
FIRST, LARGEST = 2**20, 64 * 2**20
"""Bytes that a segment has room for, one row at least: as many as there are already, between. Of a
column so large that its files would be too many, a sixteenth of it."""
SUFFIX, UNFINISHED = ".rows", ".new"
FEW = 10**5
"""Rows that may wait to be sorted."""
_ROW_BITS = 32
_MIX = np.uint64(0x9E3779B97F4A7C15)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Integers = np.ndarray[Any, np.dtype[np.int64]]
Keys = np.ndarray[Any, np.dtype[np.uint64]]


def row_type(value_bytes: int) -> np.dtype[Any]:
    """Of a row whose value takes that many bytes."""
    return np.dtype(
        [("sum", "<u4"), ("index", "<i8"), ("view", "<i8"), ("value", "u1", (value_bytes,))]
    )


class Found(NamedTuple):
    """What was read for n images."""

    value: Bytes
    """(n, value_bytes); what is not `good` means nothing."""
    good: np.ndarray[Any, np.dtype[np.bool_]]
    """(n,) whether a row is there and is what was written."""
    damaged: int
    """Rows that were there and are not what was written."""


class Segment:
    """One file of rows, mapped into memory."""

    def __init__(self, path: Path, header: Mapping[str, Any], mapped: Bytes, size: int) -> None:
        self.path, self.header = path, header
        self._mapped, self._count = mapped, mapped[:8].view("<u8")
        kind = row_type(size)
        self.capacity = (len(mapped) - HEADER) // kind.itemsize
        self.rows = mapped[HEADER : HEADER + self.capacity * kind.itemsize].view(kind)
        self.seen = 0
        """Rows that are in the index already."""

    @property
    def count(self) -> int:
        """Rows written so far. Only these may be touched: the file may end after them."""
        return min(int(self._count[0]), self.capacity)

    @property
    def used(self) -> int:
        """Bytes of the file that mean something."""
        return HEADER + self.count * self.rows.dtype.itemsize

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, Any], value_bytes: int) -> Segment:
        """For reading. Raises StorageError where it is not a segment of this identity."""
        header = read_header(path)
        if {key: header.get(key) for key in identity} != identity:
            raise StorageError(f"{path} is damaged: it belongs to another store; delete it")
        return cls(path, header, _mapped(path, "r"), value_bytes)

    @classmethod
    def create(
        cls, folder: Path, header: Mapping[str, Any], value_bytes: int, room: int
    ) -> tuple[Segment, IO[bytes]]:
        """A new one of this process's own, with `room` for rows in bytes; and its locked file.

        Raises StorageError, also where the disk has no room for all of it.
        """
        kind = row_type(value_bytes)
        capacity = max(1, room // kind.itemsize)
        text = json.dumps(header, sort_keys=True).encode()
        assert len(text) <= HEADER - 16, "a header is a few names"
        # sorted by name, the newest is last
        path = folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}{SUFFIX}"
        start = len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # whoever looks meanwhile sees nothing, not a file without a header
            new = path.with_suffix(UNFINISHED)
            file = open(new, "x+b", buffering=0)  # noqa: SIM115  # its lock lasts as long as it
            try:
                with suppress(OSError):  # not every file system has locks; nobody else knows it
                    _lock(file)
                file.write(bytes(8) + start + text)
                _reserve(file, HEADER + capacity * kind.itemsize)
                new.rename(path)
            except OSError:
                file.close()
                new.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise storage_error(path, "written", error) from error
        return cls(path, header, _mapped(path, "r+"), value_bytes), file

    def append(self, rows: np.ndarray[Any, Any]) -> int:
        """Write whole rows, which must fit; the first one's number."""
        first = self.count
        self.rows[first : first + len(rows)] = rows
        self._count[0] = first + len(rows)  # the valid mark, after data and checksums
        return first


def read_header(path: Path) -> dict[str, Any]:
    """Of a segment's file. Raises StorageError where it is not whole."""
    try:
        with open(path, "rb") as file:
            start = file.read(HEADER)
    except OSError as error:
        raise storage_error(path, "read", error) from error
    length = int.from_bytes(start[8:12], "little")
    text = start[16 : 16 + length]
    if len(start) < HEADER or zlib.crc32(text) != int.from_bytes(start[12:16], "little"):
        raise StorageError(f"{path} is damaged: its header is not what was written; delete it")
    header: dict[str, Any] = json.loads(text)
    return header


class Column:
    """One output of one teacher: rows by (image, view), in the segments of a folder.

    `identity` is in every segment's header and must be equal there. Nothing is written before the
    first `append`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], value_bytes: int) -> None:
        self.folder, self.identity, self.value_bytes = folder, dict(identity), value_bytes
        self.salt = zlib.crc32(json.dumps(self.identity, sort_keys=True).encode())
        """Begins every checksum, so that rows of another column are never taken for its own."""
        self.about: dict[str, Any] = {}
        """What this process's segments say beside the identity."""
        self.segments: list[Segment] = []
        self.faults: dict[Path, str] = {}
        """Segments that cannot be read, and why."""
        self._keys = np.empty(0, np.uint64)
        self._places = np.empty(0, np.int64)
        self._recent: dict[int, int] = {}
        self._own: Segment | None = None
        self._file: IO[bytes] | None = None
        self.refresh()

    def __len__(self) -> int:
        """Different (image, view) that it has."""
        self._fold()
        return len(self._keys)

    def refresh(self) -> None:
        """Take in what other processes have written since."""
        known = {segment.path for segment in self.segments}
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path in known or path in self.faults:
                continue
            try:
                self.segments.append(Segment.open(path, self.identity, self.value_bytes))
            except StorageError as error:
                self.faults[path] = str(error)
        keys, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for number, segment in enumerate(self.segments):
            count = segment.count
            new = segment.rows[segment.seen : count]
            rows = np.arange(segment.seen, count, dtype=np.int64)
            keys.append(key_of(new["index"], new["view"]))
            places.append((number << _ROW_BITS) + rows)
            segment.seen = count
        self._merge(np.concatenate(keys), np.concatenate(places))
        self._fold()

    def _fold(self) -> None:
        """Move what this process has appended into the sorted index, which is smaller."""
        n = len(self._recent)
        keys, places = self._recent.keys(), self._recent.values()
        self._merge(np.fromiter(keys, np.uint64, n), np.fromiter(places, np.int64, n))
        self._recent = {}

    def _merge(self, keys: Keys, places: Integers) -> None:
        """Take rows into the sorted index; of several for one image and view the last counts."""
        if not len(keys):
            return
        every, where = np.append(self._keys, keys), np.append(self._places, places)
        order = np.argsort(every, kind="stable")
        every, where = every[order], where[order]
        last = np.append(every[1:] != every[:-1], True)
        self._keys, self._places = every[last], where[last]

    def find(self, index: Integers, view: Integers) -> Integers:
        """Places of rows, -1 where there is none. (n,), (n,) -> (n,)"""
        keys = key_of(index, view)
        places = np.full(len(keys), -1, np.int64)
        if len(self._keys):
            at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            places = np.where(self._keys[at] == keys, self._places[at], -1)
        if self._recent:
            later = [self._recent.get(key, -1) for key in keys.tolist()]
            places = np.where(np.array(later) >= 0, later, places)
        return places

    def read(self, index: Integers, view: Integers) -> Found:
        """The values of n images, compared with their checksums. (n,), (n,) -> n rows"""
        places, n = self.find(index, view), len(index)
        value, good, damaged = np.zeros((n, self.value_bytes), np.uint8), np.zeros(n, bool), 0
        for number in np.unique(places[places >= 0] >> _ROW_BITS):
            at = np.flatnonzero((places >= 0) & (places >> _ROW_BITS == number))
            rows = self.segments[number].rows[places[at] & (2**_ROW_BITS - 1)]
            ours = (rows["index"] == index[at]) & (rows["view"] == view[at])
            whole = rows["sum"] == self._sums(rows)
            value[at], good[at] = rows["value"], whole & ours
            damaged += int((~whole).sum())
        return Found(value, good, damaged)

    def append(self, index: Integers, view: Integers, value: Bytes) -> None:
        """Keep the values of n images. Raises StorageError. (n,), (n,), (n, value_bytes)"""
        rows = np.empty(len(index), row_type(self.value_bytes))
        rows["index"], rows["view"], rows["value"] = index, view, value
        rows["sum"] = self._sums(rows)
        keys = key_of(index, view).tolist()
        while len(rows):
            if self._own is None or self._own.count == self._own.capacity:
                self._begin_segment()
            assert self._own is not None
            part = rows[: self._own.capacity - self._own.count]
            first, number = self._own.append(part), self.segments.index(self._own)
            self._own.seen = first + len(part)
            for offset, key in enumerate(keys[: len(part)]):
                self._recent[key] = (number << _ROW_BITS) + first + offset
            rows, keys = rows[len(part) :], keys[len(part) :]
        if len(self._recent) > FEW:
            self._fold()

    def _begin_segment(self) -> None:
        self.close()
        header = {**self.identity, "identity": sorted(self.identity), **self.about}
        header["bytes"] = self.value_bytes
        there = sum(segment.used for segment in self.segments)
        room = max(FIRST, min(there, max(LARGEST, there // 16)))
        self._own, self._file = Segment.create(self.folder, header, self.value_bytes, room)
        self.segments.append(self._own)

    def close(self) -> None:
        """Give back what this process's segment has not used."""
        if self._own is not None and self._file is not None:
            # who has it mapped touches counted rows alone
            self._file.truncate(self._own.used)
            self._file.close()
        self._own = self._file = None

    def damaged(self) -> Iterator[tuple[Path, int, int]]:
        """Each readable segment with its rows, and how many of them are not what was written."""
        for segment in self.segments:
            count, wrong = segment.count, 0
            for start in range(0, count, 4096):
                rows = np.array(segment.rows[start : min(start + 4096, count)])
                wrong += int((rows["sum"] != self._sums(rows)).sum())
            yield segment.path, count, wrong

    def _sums(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """CRC-32 of each row but for its first field. (n,) -> (n,)"""
        size, salt = rows.dtype.itemsize, self.salt
        data = memoryview(np.ascontiguousarray(rows).tobytes())
        starts = range(0, len(rows) * size, size)
        return np.array([zlib.crc32(data[s + 4 : s + size], salt) for s in starts], np.uint32)


def key_of(index: Integers, view: Integers) -> Keys:
    """One number for (image, view), by which rows are looked up; a row says what it really is of.

    Different pairs have different numbers where views are few; where they are seeds of 62 bits, two
    rows may share one, and then one of them is computed anew.
    """
    return index.astype(np.uint64) * _MIX + view.astype(np.uint64)


def tidy(folder: Path, value_bytes: int) -> None:
    """Give back what writers that were killed left behind; not what living ones have."""
    for path in folder.glob(f"*{SUFFIX}"):
        trim(path, value_bytes)
    for path in folder.glob(f"*{UNFINISHED}"):
        with suppress(OSError), open(path, "r+b") as file:
            _lock(file)
            path.unlink()


def trim(path: Path, value_bytes: int) -> None:
    """Give back what a writer that was killed left unused in a segment; not while one lives."""
    with suppress(OSError), open(path, "r+b") as file:  # its writer lives, or it is not ours
        _lock(file)
        count = int.from_bytes(file.read(8), "little")
        size = HEADER + count * row_type(value_bytes).itemsize
        if size < os.fstat(file.fileno()).st_size:
            file.truncate(size)


def _mapped(path: Path, mode: Literal["r", "r+"]) -> Bytes:
    """A file's bytes. Raises StorageError."""
    try:
        return np.memmap(path, np.uint8, mode)
    except OSError as error:
        raise storage_error(path, "read", error) from error


def _lock(file: IO[bytes]) -> None:
    """Raises OSError where another process holds it, or there are no locks."""
    try:
        import fcntl
    except ImportError as error:
        raise OSError(errno.ENOTSUP, "no locks") from error
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _reserve(file: IO[bytes], size: int) -> None:
    """Make a file that long, on the disk too: a full one met in a mapped page ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    at = file.seek(0, os.SEEK_END)
    while at < size:
        at += file.write(bytes(min(2**20, size - at)))
