"""Rows are read as they were written, or not at all: by whom, and after whatever happened."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.errors import StorageError
from potstill.teacher_store import rows
from potstill.teacher_store.rows import (
    HEADER,
    Column,
    Segment,
    key_of,
    read_header,
    row_type,
    tidy,
    trim,
)
from tests.teacher_store.damage import flip
from tests.teacher_store.rows_worker import (
    IDENTITY,
    KILLED_SIZE,
    SIZE,
    numbers,
    value_of,
    values_of,
)

ROOT = Path(__file__).parents[2]
ROW = 4 + 8 + 8 + SIZE
OPEN: list[Column] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No test leaves a file open."""
    yield
    while OPEN:
        OPEN.pop().close()


def column(folder: Path, size: int = SIZE, **identity: Any) -> Column:
    OPEN.append(Column(folder, {**IDENTITY, **identity}, size))
    return OPEN[-1]


def fill(into: Column, *pairs: tuple[int, int]) -> Column:
    """What `value_of` says, for each (image, view), in one call."""
    index, view = (numbers(*given) for given in zip(*pairs, strict=True))
    into.append(index, view, values_of(index, view, into.value_bytes))
    return into


def written(folder: Path, *pairs: tuple[int, int], size: int = SIZE) -> Path:
    """The only file, of a writer that has finished."""
    fill(column(folder, size), *pairs).close()
    (path,) = folder.iterdir()
    return path


def read(found: Column, *pairs: tuple[int, int]) -> list[bool]:
    """Which are there; what is there must be right."""
    index, view = (numbers(*given) for given in zip(*pairs, strict=True))
    value, good, damaged = found.read(index, view)
    right = values_of(index, view, found.value_bytes)
    assert (value[good] == right[good]).all(), "a wrong value was called good"
    assert damaged <= (~good).sum()
    return good.tolist()


# --- what is written is read --------------------------------------------------------------------


def test_a_file_is_the_bytes_that_its_docstring_says(tmp_path: Path):
    """One row of two bytes: 4 + 8 + 8 + 2 = 22 behind the header; the sum goes on from the salt."""
    one = column(tmp_path, size=2)
    one.append(numbers(5), numbers(7), np.array([[1, 2]], np.uint8))
    one.close()
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    assert len(data) == 4096 + 22
    assert int.from_bytes(data[:8], "little") == 1
    length = int.from_bytes(data[8:12], "little")
    header = data[16 : 16 + length]
    assert int.from_bytes(data[12:16], "little") == zlib.crc32(header)
    assert json.loads(header) == {**IDENTITY, "identity": ["output", "store"], "bytes": 2}
    row = (5).to_bytes(8, "little") + (7).to_bytes(8, "little") + b"\1\2"
    salt = zlib.crc32(json.dumps(IDENTITY, sort_keys=True).encode())
    assert data[4096:] == zlib.crc32(row, salt).to_bytes(4, "little") + row


def test_what_was_appended_is_read_back_by_this_and_by_another_column(tmp_path: Path):
    pairs = [(0, 0), (3, 1), (3, 2), (10**6, 8)]
    mine = column(tmp_path)
    assert read(mine, *pairs) == [False] * 4
    fill(mine, *pairs)
    assert read(mine, *pairs, (3, 0), (1, 1)) == [True] * 4 + [False] * 2
    other = column(tmp_path)
    assert read(other, *reversed(pairs)) == [True] * 4
    assert len(mine) == len(other) == 4
    fill(mine, (7, 7))
    assert read(other, (7, 7)) == [False]
    other.refresh()
    assert read(other, (7, 7)) == [True]


def test_nothing_is_written_before_the_first_append(tmp_path: Path):
    empty = column(tmp_path / "there")
    assert len(empty) == 0 and read(empty, (0, 0)) == [False]
    empty.append(numbers(), numbers(), np.empty((0, SIZE), np.uint8))
    empty.close()
    assert not (tmp_path / "there").exists()


def test_codes_of_62_bits_are_views(tmp_path: Path):
    last = 2**62 - 1
    pairs = [(0, last), (1, last), (2**40, last - 1), (0, 1)]
    fill(column(tmp_path), *pairs)
    assert read(column(tmp_path), *pairs, (0, last - 1)) == [True] * 4 + [False]


def test_a_row_is_never_taken_for_another_image_of_the_same_number(tmp_path: Path):
    """Two multipliers make 2 * 0x9E3779B97F4A7C15 = 2^64 + 0x3C6EF372FE94F82A.

    So (0, v) and (2, v - 0x3C6EF372FE94F82A) have one number: the later row hides the first, which
    is then missing, not damaged.
    """
    apart = 0x3C6EF372FE94F82A
    one, other = (0, 2**62 - 1), (2, 2**62 - 1 - apart)
    index, view = numbers(0, 2), numbers(one[1], other[1])
    assert len({*key_of(index, view).tolist()}) == 1
    both = fill(fill(column(tmp_path), one), other)
    assert read(both, one, other) == [False, True]
    assert both.read(index, view).damaged == 0
    assert read(column(tmp_path), one, other) == [False, True]
    assert [wrong for _, _, wrong in both.damaged()] == [0]


def test_of_several_rows_of_one_image_and_view_the_last_counts(tmp_path: Path):
    """In one call, in two calls, in two segments, and as another process sees them."""
    mine = column(tmp_path)
    at = numbers(4, 4)
    mine.append(at, at, np.stack([np.full(SIZE, 1, np.uint8), np.full(SIZE, 2, np.uint8)]))
    assert mine.read(numbers(4), numbers(4)).value[0, 0] == 2
    for number in (3, 4):
        mine.append(numbers(4), numbers(4), np.full((1, SIZE), number, np.uint8))
        for seen in (mine, column(tmp_path)):
            assert seen.read(numbers(4), numbers(4)).value[0, 0] == number
            assert len(seen) == 1
        mine.close()
    mine.refresh()
    assert mine.read(numbers(4), numbers(4)).value[0, 0] == 4


@pytest.mark.parametrize("few", [0, 5, 10**5])
def test_rows_are_found_whether_they_are_sorted_yet_or_not(
    few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rows, "FEW", few)
    mine = column(tmp_path)
    pairs = [(i * 7919 % 1000, i % 3) for i in range(100)]
    for start in range(0, 100, 3):
        fill(mine, *pairs[start : start + 3])
        assert read(mine, *pairs) == [i < start + 3 for i in range(100)]
    assert len(mine) == 100


def test_segments_grow_with_what_is_there_and_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A row of 1000 bytes, a header of 4096. Room is 10 000 first; then 4096 + 10 * 1000 = 14 096,
    14 rows; then 14 096 + 18 096 = 32 192, of which 30 000 are allowed, 30 rows."""
    monkeypatch.setattr(rows, "FIRST", 10_000)
    monkeypatch.setattr(rows, "LARGEST", 30_000)
    mine = column(tmp_path, size=980)
    pairs = [(i, i % 9) for i in range(90)]
    fill(mine, *pairs[:17])
    assert [s.count for s in mine.segments] == [10, 7]
    fill(mine, *pairs[17:])
    assert [s.capacity for s in mine.segments] == [10, 14, 30, 30, 30]
    assert [s.count for s in mine.segments] == [10, 14, 30, 30, 6]
    assert read(mine, *reversed(pairs)) == [True] * 90
    mine.close()
    sizes = sorted(p.stat().st_size for p in tmp_path.iterdir())
    assert sizes == [4096 + 1000 * n for n in (6, 10, 14, 30, 30)]
    assert read(column(tmp_path, size=980), *pairs) == [True] * 90


def test_a_row_larger_than_the_largest_segment_has_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rows, "FIRST", 10)
    monkeypatch.setattr(rows, "LARGEST", 10)
    fill(column(tmp_path), (0, 0), (1, 0))
    assert len([*tmp_path.iterdir()]) == 2
    assert read(column(tmp_path), (0, 0), (1, 0)) == [True, True]


def test_a_closed_column_gives_back_what_it_has_not_used_and_may_go_on(tmp_path: Path):
    mine = fill(column(tmp_path), (0, 0), (1, 1))
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size >= 2**20 - ROW
    early = column(tmp_path)
    mine.close()
    mine.close()
    assert path.stat().st_size == HEADER + 2 * ROW
    assert read(mine, (0, 0), (1, 1)) == read(early, (0, 0), (1, 1)) == [True, True]
    fill(mine, (2, 2))
    assert read(mine, (0, 0), (2, 2)) == read(column(tmp_path), (0, 0), (2, 2)) == [True, True]


# --- the valid mark -----------------------------------------------------------------------------


class Dies:
    """Rows whose writing is where the process ends."""

    dtype = row_type(SIZE)

    def __setitem__(self, at: Any, value: Any) -> None:
        raise KeyboardInterrupt


def test_a_row_that_is_written_and_not_counted_is_not_seen(tmp_path: Path):
    mine = fill(column(tmp_path), (0, 0))
    segment = mine.segments[0]
    segment.rows[1] = segment.rows[0]
    segment.rows["index"][1] = 1
    assert len(column(tmp_path)) == 1
    assert [n for _, n, _ in column(tmp_path).damaged()] == [1]


def test_a_row_is_counted_after_it_is_written(tmp_path: Path):
    mine = fill(column(tmp_path), (0, 0))
    mine.segments[0].rows = Dies()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        fill(mine, (1, 0))
    assert [count for _, count, _ in column(tmp_path).damaged()] == [1]


def test_a_file_has_its_name_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another process looks while it is made: there is nothing yet, and nothing is damaged."""
    seen = []
    lock, reserve = rows._lock, rows._reserve

    def looking(step: Any) -> Any:
        def looks(*given: Any) -> None:
            other = column(tmp_path)
            seen.append((len(other.segments), other.faults))
            step(*given)
            other.refresh()
            seen.append((len(other.segments), other.faults))

        return looks

    monkeypatch.setattr(rows, "_lock", looking(lock))
    monkeypatch.setattr(rows, "_reserve", looking(reserve))
    fill(column(tmp_path), (0, 0))
    assert seen == [(0, {})] * 4
    assert read(column(tmp_path), (0, 0)) == [True]
    assert [path.suffix for path in tmp_path.iterdir()] == [rows.SUFFIX]


# --- damage -------------------------------------------------------------------------------------

THREE = ((0, 0), (1, 5), (2, 2**62 - 1))


def test_every_flipped_bit_of_a_file_is_noticed(tmp_path: Path):
    """Header, count and rows. Never a wrong value, and the other rows stay readable.

    The count alone has no checksum: one too small hides rows, one too large shows what is not there
    and is not what was written.
    """
    path = written(tmp_path / "good", *THREE)
    whole, length = path.read_bytes(), len(json.dumps(read_header(path)))
    place = tmp_path / "bad" / path.name
    place.parent.mkdir()
    positions = [*range(16 + length), *range(HEADER, len(whole))]
    for position in positions:
        for bit in range(8) if position >= 8 else (0, 1, 2, 3, 7):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            place.write_bytes(data)
            found = column(place.parent)
            good = read(found, *THREE)
            wrong = sum(n for _, _, n in found.damaged())
            if position < 8:
                assert good == ([i < data[0] for i in range(3)] if position == 0 else [True] * 3)
            elif position < HEADER:
                assert list(found.faults) == [place] and not any(good)
            else:
                number = (position - HEADER) // ROW
                assert good == [i != number for i in range(3)] and wrong == 1
    place.write_bytes(whole)
    assert read(column(place.parent), *THREE) == [True] * 3


def test_what_follows_the_header_means_nothing(tmp_path: Path):
    path = written(tmp_path, *THREE)
    flip(path, HEADER - 1)
    assert read(column(tmp_path), *THREE) == [True] * 3


@pytest.mark.parametrize("field", ["sum", "value"])
def test_a_damaged_row_is_told_and_read_well_when_it_was_appended_anew(field: str, tmp_path: Path):
    path = written(tmp_path, *THREE)
    flip(path, HEADER + ROW + row_type(SIZE).fields[field][1])  # type: ignore[index]
    found = column(tmp_path)
    assert found.read(numbers(0, 1), numbers(0, 5)).damaged == 1
    assert read(found, *THREE) == [True, False, True]
    fill(found, (1, 5))
    assert read(found, *THREE) == [True] * 3
    again = column(tmp_path)
    assert read(again, *THREE) == [True] * 3
    assert again.read(numbers(0, 1), numbers(0, 5)).damaged == 0
    assert sorted(wrong for _, _, wrong in again.damaged()) == [0, 1]


@pytest.mark.parametrize("field", ["index", "view"])
def test_a_row_that_says_it_is_another_images_is_not_that_ones(field: str, tmp_path: Path):
    """Bit 3 of (1, 5): it is looked up as (9, 5) or (1, 13), and is neither."""
    path = written(tmp_path, *THREE)
    flip(path, HEADER + ROW + row_type(SIZE).fields[field][1], 8)  # type: ignore[index]
    found = column(tmp_path)
    other = (9, 5) if field == "index" else (1, 13)
    assert read(found, (1, 5), other) == [False, False]
    assert found.read(numbers(other[0]), numbers(other[1])).damaged == 1


def test_whole_rows_of_another_column_are_damage(tmp_path: Path):
    """Of a store with another name: not one bit of them is wrong but whose they are."""
    ours, theirs = written(tmp_path / "a", *THREE), tmp_path / "b"
    fill(Column(theirs, {**IDENTITY, "store": "4567"}, SIZE), *THREE).close()
    (other,) = theirs.iterdir()
    ours.write_bytes(ours.read_bytes()[:HEADER] + other.read_bytes()[HEADER:])
    found = column(tmp_path / "a")
    assert read(found, *THREE) == [False] * 3
    assert [wrong for _, _, wrong in found.damaged()] == [3]


def test_a_file_of_another_column_is_a_fault_and_is_not_read(tmp_path: Path):
    path = written(tmp_path, *THREE)
    found = column(tmp_path, output="embed")
    assert read(found, *THREE) == [False] * 3
    assert found.faults == {
        path: f"{path} is damaged: it belongs to another store; delete it",
    }
    fill(found, (1, 5))
    assert read(found, *THREE) == [False, True, False]


@pytest.mark.parametrize("size", [0, 7, 100, HEADER - 1])
def test_a_file_cut_within_its_header_is_a_fault(size: int, tmp_path: Path):
    path = written(tmp_path, *THREE)
    os.truncate(path, size)
    found = column(tmp_path)
    assert read(found, *THREE) == [False] * 3
    assert only_fault(found, path, "its header is not what was written")


@pytest.mark.parametrize("kept", [0, 1, ROW - 1, ROW, 2 * ROW + 3])
def test_a_file_cut_within_its_rows_has_those_before(kept: int, tmp_path: Path):
    path = written(tmp_path, *THREE)
    os.truncate(path, HEADER + kept)
    found = column(tmp_path)
    assert read(found, *THREE) == [i < kept // ROW for i in range(3)]
    fill(found, *THREE)
    assert read(column(tmp_path), *THREE) == [True] * 3


def only_fault(found: Column, path: Path, words: str) -> bool:
    return list(found.faults) == [path] and words in found.faults[path]


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path):
    path = tmp_path / f"0{rows.SUFFIX}"
    path.mkdir()
    assert only_fault(column(tmp_path), path, "cannot be read: it is a folder")
    trim(path, SIZE)
    trim(tmp_path / "pruned meanwhile", SIZE)


# --- several processes --------------------------------------------------------------------------


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.teacher_store.rows_worker", *map(str, words)]
    pipe = subprocess.PIPE
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True)


def test_two_writers_at_once_leave_both_their_rows_and_nothing_half_read(tmp_path: Path):
    """Images 0 to 599 and 300 to 899, a few at a time: each third is both's, with the same values.

    This process reads meanwhile.
    """
    writers = [start("write", tmp_path, 300 * k, 600) for k in range(2)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    index = np.arange(900)
    found = column(tmp_path)
    while any(writer.poll() is None for writer in writers):
        found.refresh()
        value, good, damaged = found.read(index, index % 3)
        assert damaged == 0 and not found.faults
        assert (value[good] == values_of(index, index % 3)[good]).all()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    again = column(tmp_path)
    assert len(again) == 900 and again.read(index, index % 3).good.all()
    assert [n for _, n, _ in again.damaged()] == [600, 600]
    found.refresh()
    assert found.read(index, index % 3).good.all()


def test_a_killed_writer_leaves_whole_rows_and_its_unused_room_is_given_back(tmp_path: Path):
    """Sixteen writers, each killed with SIGKILL at some moment of its work."""
    killer = start("kill", tmp_path, 16)
    killer.communicate()
    assert killer.returncode == 0
    found = column(tmp_path, KILLED_SIZE)
    counts = []
    for path, count, wrong in found.damaged():
        counts.append(count)
        assert wrong == 0
        size = path.stat().st_size
        trim(path, KILLED_SIZE)
        assert path.stat().st_size == HEADER + count * row_type(KILLED_SIZE).itemsize <= size
    assert len(counts) >= 8 and sum(counts) > 100, "the writers were killed too early"
    assert not found.faults and len(found) == sum(counts)
    for number in range(16):
        index = np.arange(1000 * number, 1000 * number + 1000)
        good = found.read(index, index % 3).good
        assert good[: int(good.sum())].all(), "rows are in order, up to some row"


def test_room_is_not_taken_from_a_writer_that_lives(tmp_path: Path):
    mine = fill(column(tmp_path), (0, 0))
    (path,) = tmp_path.iterdir()
    size = path.stat().st_size
    trim(path, SIZE)
    assert path.stat().st_size == size
    fill(mine, (1, 0))
    mine.close()
    trim(path, SIZE)
    assert path.stat().st_size == HEADER + 2 * ROW
    assert read(column(tmp_path), (0, 0), (1, 0)) == [True, True]


def test_trimming_leaves_a_file_whose_count_is_wrong_as_it_is(tmp_path: Path):
    """Too large a count must not make it longer."""
    path = written(tmp_path, *THREE)
    flip(path, 1)
    trim(path, SIZE)
    assert path.stat().st_size == HEADER + 3 * ROW


def test_a_full_disk_is_an_error_of_storage_and_leaves_no_file(tmp_path: Path):
    """A real limit, of 300 000 bytes a file, where a segment would reserve a million."""
    mine = column(tmp_path / "there")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot be written: the file is too large"):
            fill(mine, (0, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [*(tmp_path / "there").iterdir()] == []
    fill(mine, (0, 0))
    assert read(column(tmp_path / "there"), (0, 0)) == [True]


def test_a_folder_that_cannot_be_made_is_an_error_of_storage(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written: a part of the path is a file"):
        fill(column(tmp_path / "file" / "there"), (0, 0))


def test_a_system_without_preallocation_writes_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(os, "posix_fallocate")
    fill(column(tmp_path), (0, 0))
    (path,) = tmp_path.iterdir()
    capacity = 2**20 // ROW
    assert path.stat().st_size == HEADER + capacity * ROW
    assert path.stat().st_blocks * 512 >= capacity * ROW
    assert read(column(tmp_path), (0, 0)) == [True]


def test_a_segment_is_opened_with_the_identity_of_its_writer(tmp_path: Path):
    path = written(tmp_path, *THREE)
    segment = Segment.open(path, IDENTITY, SIZE)
    assert segment.count == 3 and segment.used == path.stat().st_size
    assert bytes(segment.rows["value"][1]) == value_of(1, 5)
    with pytest.raises(StorageError, match="belongs to another store"):
        Segment.open(path, {**IDENTITY, "output": "embed"}, SIZE)


def test_a_file_system_without_locks_keeps_rows_and_takes_no_room_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nobody can tell there whether a writer lives."""

    def no_locks(file: Any) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(rows, "_lock", no_locks)
    mine = fill(column(tmp_path), (0, 0))
    (path,) = tmp_path.iterdir()
    size = path.stat().st_size
    tidy(tmp_path, SIZE)
    assert path.stat().st_size == size
    fill(mine, (1, 0))
    assert read(column(tmp_path), (0, 0), (1, 0)) == [True, True]


def test_what_killed_writers_have_begun_is_taken_away_and_what_living_ones_have_is_not(
    tmp_path: Path,
):
    begun, living = tmp_path / "1.new", tmp_path / "2.new"
    begun.write_bytes(bytes(100))
    with open(living, "wb") as file:
        rows._lock(file)
        tidy(tmp_path, SIZE)
        assert [p.name for p in tmp_path.iterdir()] == ["2.new"]
    tidy(tmp_path, SIZE)
    assert not list(tmp_path.iterdir())


def test_a_large_column_has_larger_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sixteenth of what is there, where that is more than the largest of a small one."""
    monkeypatch.setattr(rows, "FIRST", ROW)
    monkeypatch.setattr(rows, "LARGEST", 2 * ROW)
    mine = column(tmp_path)
    for number in range(4000):
        fill(mine, (number, 0))
    assert len(mine.segments) < 100
    assert mine.segments[-1].capacity > 2
