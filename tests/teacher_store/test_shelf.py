"""What is said of stores on the disk is what is there, and what is removed is what was named."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.data.split import pool_of
from potstill.errors import PotstillError
from potstill.files import write_json
from potstill.teacher_store import as_objects, default_root, describe, find, prune, verify
from potstill.teacher_store.rows import Column
from potstill.teacher_store.shelf import Output, Shelved
from potstill.teacher_store.store import key_of
from tests.teacher_store.damage import flip, rows_of

SIZE, IMAGES, CODES, VIEWS = 20, 10, range(0, 9), 4
"""A set of 20 images, of which a training has the first 10, in 4 views of 9."""
LOGITS = {"shape": [3], "type": "bfloat16", "layout": "contiguous"}


def shelve(
    root: Path,
    rows: list[tuple[int, int]],
    name: str = "resnet56",
    output: str = "logits",
    views: int | None = VIEWS,
    **about: object,
) -> Path:
    """A store as a training leaves it, with six bytes for each (image, view)."""
    identity = {"precision": "bfloat16", "device": "cpu", "compile": False, **about}
    key = key_of(identity)
    folder = root / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "store.json", {"name": name, **identity})
    column = Column(folder / f"{output}-x", {"store": key, "output": output, **LOGITS}, 6)
    column.about = {"data": "digits", "training_images": IMAGES, "size": SIZE}
    column.about |= {"codes": [CODES.start, CODES.stop], "views": views}
    index, view = (np.array(given, np.int64) for given in zip(*rows, strict=True))
    column.append(index, view, np.ones((len(rows), 6), np.uint8))
    column.close()
    return folder


def pooled(images: int, views: int) -> list[tuple[int, int]]:
    """Of the first images, as many views of each one's pool."""
    pool = pool_of(SIZE, CODES, VIEWS)
    return [(i, int(pool[i, v])) for i in range(images) for v in range(views)]


def only(root: Path) -> Shelved:
    (store,) = find(root)
    return store


def output_of(root: Path) -> Output:
    (output,) = only(root).outputs
    return output


# --- how full, and what to expect ---------------------------------------------------------------


def test_a_share_is_of_the_pools_of_the_images_that_are_trained(tmp_path: Path):
    """All four views of 5 of 10 images: a half. Views of a pool that are equal count as two."""
    shelve(tmp_path, pooled(5, 4))
    output = output_of(tmp_path)
    assert (output.views, output.images, output.name, output.kept) == (4, 10, "logits", "bfloat16")
    assert output.share == 20 / 40
    assert len(output.column) == len({*pooled(5, 4)}) < 20


def test_views_of_no_pool_count_for_nothing_where_there_is_one(tmp_path: Path):
    pool = pool_of(SIZE, CODES, VIEWS)
    others = [(i, v) for i in range(SIZE) for v in CODES if v not in pool[i]]
    shelve(tmp_path, others)
    assert output_of(tmp_path).share == 0


def test_without_a_pool_every_code_is_a_view(tmp_path: Path):
    """9 codes of 10 images; 30 rows of them are a third, and more than all is all."""
    shelve(tmp_path, [(i, v) for i in range(10) for v in range(3)], views=None)
    assert output_of(tmp_path).views == 9
    assert output_of(tmp_path).share == 30 / 90
    shelve(tmp_path, [(i, v) for i in range(SIZE) for v in CODES], views=None)
    assert output_of(tmp_path).share == 1


def test_a_hit_rate_by_hand(tmp_path: Path):
    """Two views, none there: an image is new in its first epoch, in the second with 1/2, in the
    third with 1/4, so of 3 draws 1.75 miss: 1 - 1.75 / 3. With a half there, half as many.
    """
    shelve(tmp_path, [(0, 0)], views=2)
    output = output_of(tmp_path)
    output.__dict__["share"] = 0.0
    assert output.hit_rate(1) == 0
    assert output.hit_rate(3) == pytest.approx(1 - 1.75 / 3)
    output.__dict__["share"] = 0.5
    assert output.hit_rate(1) == 0.5
    assert output.hit_rate(3) == pytest.approx(1 - 0.875 / 3)
    output.__dict__["share"] = 1.0
    assert output.hit_rate(3) == 1


def test_one_view_is_met_again_in_every_epoch_but_the_first(tmp_path: Path):
    shelve(tmp_path, [(19, 0)], views=1)
    output = output_of(tmp_path)
    output.__dict__["share"] = 0.0
    assert output.hit_rate(1) == 0 and output.hit_rate(4) == pytest.approx(3 / 4)


@pytest.mark.parametrize("epochs", [1, 2, 5, 20])
def test_a_hit_rate_is_what_trainings_find(epochs: int, tmp_path: Path):
    """400 simulated ones of 100 images, 9 views, of which a third is there: within 1 %."""
    there = [(i, v) for i in range(10) for v in range(3)]
    shelve(tmp_path, there, views=None)
    expected = output_of(tmp_path).hit_rate(epochs)
    draw = torch.Generator().manual_seed(0)
    hits = asked = 0
    for _ in range(400):
        known = torch.zeros(100, 9, dtype=torch.bool)
        known[:, :3] = True
        for _ in range(epochs):
            views = torch.randint(9, (100,), generator=draw)
            hits += int(known[torch.arange(100), views].sum())
            asked += 100
            known[torch.arange(100), views] = True
    assert hits / asked == pytest.approx(expected, abs=0.01)


def test_a_description_for_people(tmp_path: Path):
    """The one view of 5 of 10 images: a half, and over two epochs 1 - 1/2 * 1 / 2 = 75 %."""
    folder = shelve(tmp_path / "a", pooled(10, 4))
    first, second, third = describe(find(tmp_path / "a"), 1)
    assert first.startswith(f"{folder.name}: resnet56, bfloat16, cpu, ") and first.endswith("B")
    rows = len({*pooled(10, 4)})
    assert (
        second == f"  logits (bfloat16): {rows} outputs, 100.0 % of 4 views of 10 images of digits"
    )
    assert third == "    a run like the last finds 100.0 % in its first epoch"
    pool = pool_of(SIZE, CODES, 1)
    half = [(i, int(pool[i, 0])) for i in range(5)]
    other = shelve(tmp_path / "b", half, views=1, compile=True)
    first, second, third = describe(find(tmp_path / "b"), 2)
    assert first.startswith(f"{other.name}: resnet56, bfloat16, cpu, compiled, ")
    assert second == "  logits (bfloat16): 5 outputs, 50.0 % of 1 view of 10 images of digits"
    assert third == "    a run like the last finds 50.0 % in its first epoch, 75.0 % over 2 epochs"


def test_an_object_for_programs_has_all_of_it(tmp_path: Path):
    folder = shelve(tmp_path, pooled(5, 4))
    (found,) = json.loads(json.dumps(as_objects(find(tmp_path), 3)))
    assert found["name"] == folder.name and found["folder"] == str(folder)
    assert found["teacher"] == "resnet56" and found["faults"] == []
    assert found["identity"] == {"precision": "bfloat16", "device": "cpu", "compile": False}
    assert found["bytes"] == sum(p.stat().st_blocks * 512 for p in folder.rglob("*.*"))
    assert found["outputs"] == [
        {
            "output": "logits",
            "kept": "bfloat16",
            "entries": len({*pooled(5, 4)}),
            "views": 4,
            "training_images": 10,
            "data": "digits",
            "share": 0.5,
            "hit_rate": output_of(tmp_path).hit_rate(3),
            "epochs": 3,
        }
    ]


def test_the_newest_training_is_the_one_that_is_told(tmp_path: Path):
    shelve(tmp_path, pooled(10, 4))
    shelve(tmp_path, [(0, 0)], views=None)
    assert output_of(tmp_path).views == 9


# --- which ones ---------------------------------------------------------------------------------


def test_stores_are_found_by_name(tmp_path: Path):
    one, two = (shelve(tmp_path, [(0, 0)], name).name for name in ("resnet56", "wrn_40_2"))
    (tmp_path / "something else").mkdir()
    assert [store.folder.name for store in find(tmp_path)] == sorted([one, two])
    assert [store.folder.name for store in find(tmp_path, [two])] == [two]
    with pytest.raises(PotstillError) as refused:
        find(tmp_path, [two[:-1]])
    assert str(refused.value) == (
        f"there is no store '{two[:-1]}' in {tmp_path}; did you mean \"{two}\"? it has {one}, {two}"
    )
    with pytest.raises(PotstillError, match=r"there is no store 'x' in .*; it has none$"):
        find(tmp_path / "nowhere", ["x"])
    assert find(tmp_path / "nowhere") == []


def test_stores_are_below_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "teachers"


# --- damage and removal -------------------------------------------------------------------------


def test_verifying_reads_every_row_of_every_file(tmp_path: Path):
    folder = shelve(tmp_path, pooled(5, 4))
    shelve(tmp_path, pooled(10, 1))
    shelve(tmp_path, [(0, 0), (1, 1)], output="embed")
    counts = [(count, wrong) for _, count, wrong in verify(only(tmp_path))]
    assert counts == [(2, 0), (20, 0), (10, 0)]
    embed, *logits = rows_of(folder)
    flip(logits[0]), flip(logits[0], 4096), flip(embed)
    counts = [(count, wrong) for _, count, wrong in verify(only(tmp_path))]
    assert counts == [(2, 1), (20, 2), (10, 0)]


@pytest.mark.parametrize("position", [0, 5, 30, -2])
def test_a_description_that_is_not_what_was_written_is_a_fault(position: int, tmp_path: Path):
    """Of its identity: the name is only for people."""
    folder = shelve(tmp_path, pooled(5, 4))
    path = folder / "store.json"
    flip(path, path.read_bytes().index(b"bfloat16") if position == 30 else position)
    (fault,) = only(tmp_path).faults.items()
    assert fault[0] == path and "is damaged" in fault[1]
    assert any("fault: " in line for line in describe(find(tmp_path), 1))
    assert as_objects(find(tmp_path), 1)[0]["faults"] == [fault[1]]
    assert prune(only(tmp_path), damaged=True)[0] == [path], "its rows are whole"
    assert rows_of(folder) and only(tmp_path).outputs
    assert "no such file" in only(tmp_path).faults[path], "until a training writes it again"
    assert prune(only(tmp_path), damaged=True) == ([], 0)
    prune(only(tmp_path))
    assert not folder.exists()


def test_nothing_damaged_is_nothing_pruned(tmp_path: Path):
    folder = shelve(tmp_path, pooled(5, 4))
    assert prune(only(tmp_path), damaged=True) == ([], 0)
    assert len(rows_of(folder)) == 1


def test_damaged_files_are_pruned_and_the_others_stay(tmp_path: Path):
    """One with a wrong row, one with a wrong header, one that is whole."""
    folder = shelve(tmp_path, pooled(5, 4))
    shelve(tmp_path, pooled(10, 1))
    shelve(tmp_path, pooled(10, 2))
    first, second, third = rows_of(folder)
    flip(first), flip(second, 17)
    size = first.stat().st_blocks * 512 + second.stat().st_blocks * 512
    gone, freed = prune(only(tmp_path), damaged=True)
    assert (sorted(gone), freed) == ([first, second], size)
    assert rows_of(folder) == [third] and (folder / "store.json").exists()
    assert not only(tmp_path).faults


def test_an_output_whose_newest_header_is_damaged_is_still_told(tmp_path: Path):
    folder = shelve(tmp_path, pooled(5, 4))
    shelve(tmp_path, pooled(10, 4))
    last = rows_of(folder)[-1]
    flip(last, 17)
    store = only(tmp_path)
    assert list(store.faults) == [last] and store.outputs[0].share == 0.5
    flip(rows_of(folder)[0], 17)
    store = only(tmp_path)
    assert len(store.faults) == 2 and store.outputs == []
    assert len(describe([store], 1)) == 3


def test_a_file_of_another_store_is_a_fault(tmp_path: Path):
    """An older one, that was copied to where it does not belong."""
    (other,) = rows_of(shelve(tmp_path / "a", pooled(5, 4), compile=True))
    folder = shelve(tmp_path / "b", pooled(5, 4))
    (place,) = (path for path in folder.iterdir() if path.is_dir())
    stray = place / other.name
    stray.write_bytes(other.read_bytes())
    store = only(tmp_path / "b")
    assert list(store.faults) == [stray] and "belongs to another store" in store.faults[stray]
    assert [count for _, count, _ in verify(store)] == [20]
    assert prune(store, damaged=True)[0] == [stray]


def test_a_pruned_store_is_gone_and_who_reads_it_reads_on(tmp_path: Path):
    folder = shelve(tmp_path, pooled(5, 4))
    column = only(tmp_path).outputs[0].column
    other = shelve(tmp_path, [(0, 0)], "other")
    found = {store.folder.name: store for store in find(tmp_path)}
    gone, freed = prune(found[folder.name])
    assert gone == [folder] and freed == found[folder.name].bytes > 0
    assert not folder.exists() and other.exists()
    index, view = (np.array(given) for given in zip(*pooled(5, 4), strict=True))
    assert column.read(index, view).good.all()


def test_a_store_was_used_when_something_was_last_written_to_it(tmp_path: Path):
    folder = shelve(tmp_path, pooled(5, 4))
    now = time.time()
    for age, path in ((5, folder / "store.json"), (3, rows_of(folder)[0])):
        os.utime(path, (now - 86400 * age, now - 86400 * age))
    assert only(tmp_path).used == pytest.approx(now - 3 * 86400, abs=1)
