"""Runs that store and read a teacher's outputs, from a recipe to the files and the commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from potstill import recipe as recipes
from potstill import training
from potstill.data.user import UserSet
from potstill.errors import DataError, MethodError, RecipeError, StorageError
from potstill.recipe import Recipe
from potstill.run import Run
from potstill.teacher_store.rows import Column, read_header
from tests.teacher_store.damage import flip, rows_of

SUBSET, EPOCHS = 96, 2
WORDS = [f"data.subset={SUBSET}", f"epochs={EPOCHS}", "precision=fp32", "device=cpu"]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("teacher") / "run"
    words = ["data.subset=96", "epochs=4", "precision=fp32"]
    training.train(recipes.load("digits/vanilla", words), place, training.Silence())
    return place


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kd(teacher: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe with its store in an empty folder."""

    def made(*more: str, name: str = "digits/kd") -> Recipe:
        words = [*WORDS, f"teachers=[{teacher}]", "store=true", f"store.root={tmp_path / 'store'}"]
        return recipes.load(name, [*words, *more])

    return made


class Notes(training.Silence):
    """A watcher that keeps what it is told, and may stop a training."""

    def __init__(self, stop: int | None = None) -> None:
        self.lines: list[str] = []
        self.stop = stop

    def say(self, line: str) -> None:
        self.lines.append(line)

    def step(self, done: int, total: int, moment: Any) -> None:
        if done == self.stop:
            os.kill(os.getpid(), 2)


def run(recipe: Recipe, place: Path, watcher: Notes | None = None, resume: bool = False) -> Run:
    return training.train(recipe, place, watcher or training.Silence(), resume)


def weights(run: Run) -> dict[str, Tensor]:
    return load_file(run.directory / "student.safetensors")


def assert_same_end(one: Run, other: Run) -> None:
    """Every bit of the weights, and of what every epoch recorded but its time."""
    mine, theirs = weights(one), weights(other)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine | theirs)
    records = [
        [{k: v for k, v in record.items() if k != "time"} for record in each.metrics]
        for each in (one, other)
    ]
    assert records[0] == records[1]


def did(run: Run) -> list[dict[str, int]]:
    return [record["time"]["store"] for record in run.metrics]


def counts(read: int = 0, computed: int = 0, damaged: int = 0, compared: int = 0) -> dict[str, int]:
    return {"read": read, "computed": computed, "damaged": damaged, "compared": compared}


# --- trainings ----------------------------------------------------------------------------------


def test_a_second_run_reads_what_the_first_one_computed(kd: Any, tmp_path: Path):
    """The same bits in the end; each epoch says what was read; nothing is left reserved."""
    notes = Notes()
    first = run(kd(), tmp_path / "a", notes)
    one, two = did(first)
    assert one == counts(computed=SUBSET)
    assert two["read"] + two["computed"] == SUBSET and 0 < two["read"] < SUBSET
    assert 0 < two["compared"] <= two["read"] and two["damaged"] == 0
    (folder,) = (tmp_path / "store").iterdir()
    said = f": logits in {folder}"
    assert [line for line in notes.lines if line.endswith(said) and "store of " in line]
    (path,) = rows_of(folder)
    assert path.stat().st_size == 4096 + 40 * (SUBSET + two["computed"])

    second = run(kd(), tmp_path / "b")
    assert did(second) == [counts(read=SUBSET, compared=64)] * EPOCHS
    assert_same_end(first, second)
    assert rows_of(folder) == [path]


def test_another_seed_method_and_pool_share_a_store(kd: Any, tmp_path: Path):
    run(kd("data.views=1"), tmp_path / "a")
    for number, words in enumerate((["seed=1"], ["method={name: kd, alpha: 0.5, gamma: 0.5}"])):
        again = run(kd("data.views=1", *words), tmp_path / f"b{number}")
        assert did(again) == [counts(read=SUBSET, compared=64)] * EPOCHS
    maps = run(kd("data.views=1", "method={name: at, beta: 1.0}"), tmp_path / "c")
    assert did(maps)[0]["computed"] == SUBSET and did(maps)[1]["read"] == SUBSET
    (folder,) = (tmp_path / "store").iterdir()
    outputs = sorted(path.name.partition("-")[0] for path in folder.iterdir() if path.is_dir())
    assert outputs == ["logits", "stage1", "stage2", "stage3"]
    (logits,) = folder.glob("logits-*")
    assert sum(path.stat().st_size - 4096 for path in rows_of(logits)) == 40 * SUBSET


def test_a_run_with_a_store_ends_where_one_without_ends_but_for_rounding(kd: Any, tmp_path: Path):
    live = run(kd("store=false"), tmp_path / "a")
    assert "store" not in live.metrics[0]["time"]
    assert not (tmp_path / "store").exists()
    kept = run(kd(), tmp_path / "b")
    for name, mine in weights(kept).items():
        theirs = weights(live)[name]
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=2e-3)
    assert not all(torch.equal(mine, weights(live)[name]) for name, mine in weights(kept).items())


@pytest.mark.parametrize("stop", [1, 4])
def test_interrupted_and_resumed_equals_straight(stop: int, kd: Any, tmp_path: Path):
    """In the first epoch of three steps, and in the second; each with a store of its own."""
    straight = run(kd(f"store.root={tmp_path / 'one'}"), tmp_path / "straight")
    other = kd(f"store.root={tmp_path / 'two'}")
    with pytest.raises(training.Interrupted):
        run(other, tmp_path / "stopped", Notes(stop))
    again = run(other, tmp_path / "stopped", Notes(), resume=True)
    assert_same_end(straight, again)


def test_a_run_goes_on_with_its_store_elsewhere(kd: Any, tmp_path: Path):
    """Where it lies, and how large it may be, is no part of what a run is."""
    straight = run(kd(), tmp_path / "straight")
    with pytest.raises(training.Interrupted):
        run(kd(), tmp_path / "stopped", Notes(2))
    moved = kd(f"store.root={tmp_path / 'elsewhere'}", "store.gb=1")
    assert_same_end(straight, run(moved, tmp_path / "stopped", resume=True))
    assert rows_of(tmp_path / "elsewhere")


def test_vanilla_is_trained_as_without_a_store(tmp_path: Path):
    words = [*WORDS, f"store.root={tmp_path / 'store'}"]
    with_store = run(recipes.load("digits/vanilla", words), tmp_path / "a")
    assert recipes.load("digits/vanilla", words).store is not None
    without = run(recipes.load("digits/vanilla", WORDS), tmp_path / "b")
    assert_same_end(with_store, without)
    assert "store" not in with_store.metrics[0]["time"] and not (tmp_path / "store").exists()


def test_stores_are_below_the_cache_unless_a_recipe_says_where(
    kd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    run(kd("store.root=null", "epochs=1"), tmp_path / "a")
    assert rows_of(tmp_path / "cache" / "teachers") and not (tmp_path / "store").exists()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run(kd("store.root=~/kept", "epochs=1"), tmp_path / "b")
    assert rows_of(tmp_path / "home" / "kept")


# --- damage -------------------------------------------------------------------------------------


def test_a_corrupted_byte_is_told_by_the_next_run_which_ends_with_the_same_weights(
    kd: Any, tmp_path: Path
):
    first = run(kd(), tmp_path / "a")
    (path,) = rows_of(tmp_path / "store")
    for row in (0, 7):
        flip(path, 4096 + 40 * row + 30)
    notes = Notes()
    second = run(kd(), tmp_path / "b", notes)
    assert_same_end(first, second)
    assert did(second)[0] == counts(read=SUBSET - 2, computed=2, damaged=2, compared=64)
    told = [line for line in notes.lines if line.startswith("note: ")]
    assert told == [
        "note: 2 stored outputs were damaged on the disk and were computed anew; `potstill store "
        "verify` says where"
    ]
    notes = Notes()
    assert did(run(kd(), tmp_path / "c", notes))[0] == counts(read=SUBSET, compared=64)
    assert not [line for line in notes.lines if line.startswith("note: ")]


def test_every_row_damaged_is_every_row_computed(kd: Any, tmp_path: Path):
    """Without one to compare; a damaged header is told by its file, and costs as much."""
    first = run(kd(), tmp_path / "a")
    (path,) = rows_of(tmp_path / "store")
    size = (path.stat().st_size - 4096) // 40
    for row in range(size):
        flip(path, 4096 + 40 * row + 20 + row % 20)
    second = run(kd(), tmp_path / "b")
    assert did(second)[0] == counts(computed=SUBSET, damaged=SUBSET)
    assert_same_end(first, second)
    for each in rows_of(tmp_path / "store"):
        flip(each, 16)
    notes = Notes()
    third = run(kd(), tmp_path / "c", notes)
    assert did(third)[0] == counts(computed=SUBSET)
    assert_same_end(first, third)
    told = {line for line in notes.lines if line.startswith("note: ")}
    assert len(told) == 2 and all("its header is not what was written" in line for line in told)


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, error, said",
    [
        (["store.top_k=10"], MethodError, r"store\.top_k is 10; the teacher has 10 classes"),
        (["method=sakd"], MethodError, r"of SAKD's teachers cannot be stored.*leave the store off"),
        (["method=jacobian"], MethodError, r"with respect to the image; leave the store off"),
        (["store.gb=1e-6"], StorageError, r"and store\.gb is 1e-06; .*or leave the store off"),
        (["store.gb=5e-6", "epochs=60"], StorageError, r"set data\.views=1, raise it"),
        (["teachers.0.stochastic={p_end: 0.9}"], MethodError, r"another sub-network.*draw: never"),
    ],
)
def test_a_recipe_that_would_store_what_it_must_not_is_refused(
    words: list[str], error: type[Exception], said: str, kd: Any, tmp_path: Path
):
    with pytest.raises(error, match=said):
        training.assemble(kd(*words))
    assert not (tmp_path / "store").exists()


def test_a_dataset_of_float_tensors_is_refused(kd: Any):
    """Which come from code of one's own."""
    recipe = kd()
    data = training.load_data(recipe, torch.device("cpu"))
    job = training.assemble(kd("store=false"))
    split = data.train
    images = UserSet(
        [(torch.zeros(1, 8, 8), 0)] * split.images.size,
        torch.zeros(split.images.size, dtype=torch.int64),
        (1, 8, 8),
    )
    object.__setattr__(split, "images", images)
    nets = [[(net, split.classes)] for net in (job.method.student, job.method.teachers[0])]
    with pytest.raises(DataError, match="a dataset that augments itself"):
        training.put_together(recipe, data, *nets, torch.device("cpu"))


# --- recipes ------------------------------------------------------------------------------------


def test_true_false_and_a_mapping_are_what_they_say():
    assert recipes.load("digits/vanilla", []).store is None
    for text, expected in (
        ("true", {"root": None, "top_k": None, "bits": 16, "gb": 20.0}),
        ("{}", {"root": None, "top_k": None, "bits": 16, "gb": 20.0}),
        ("{top_k: 5}", {"root": None, "top_k": 5, "bits": 16, "gb": 20.0}),
        ("{bits: 32, gb: 1}", {"root": None, "top_k": None, "bits": 32, "gb": 1.0}),
    ):
        store = recipes.load("digits/vanilla", [f"store={text}"]).store
        assert store is not None and store.model_dump() == expected
    for text in ("false", "null"):
        assert recipes.load("digits/vanilla", [f"store={text}"]).store is None
    assert recipes.load("digits/vanilla", ["store.top_k=5"]).store.top_k == 5
    assert recipes.load("digits/vanilla", ["store=true", "store.bits=32"]).store.bits == 32
    assert recipes.load("digits/vanilla", ["store=false", "store.bits=32"]).store.bits == 32


@pytest.mark.parametrize("words", [[], ["store=true"], ["store={top_k: 5, root: /x, gb: 0.5}"]])
def test_a_recipe_with_a_store_reads_again_as_it_was_written(words: list[str]):
    recipe = recipes.load("digits/vanilla", words)
    again = recipes.loads(recipe.to_yaml())
    assert again == recipe and again.store == recipe.store


@pytest.mark.parametrize(
    "words, said",
    [
        (["store={topk: 5}"], ['store.topk is unknown; did you mean "top_k"?']),
        (["stores=true"], ['stores is unknown; did you mean "store"?']),
        (["store=5"], ["store must be "]),
        (["store=off"], ["store must be "]),
        (["store.bits=8"], ["store.bits must be 16 or 32, not 8"]),
        (["store.top_k=0"], ["store.top_k must be a whole number (at least 1), or null"]),
        (["store.top_k=1.5"], ["store.top_k must be a whole number (at least 1), or null"]),
        (["store.gb=0"], ["store.gb must be a number (above 0)"]),
        (["store.gb=lots", "store.root=3"], ["store.root must be text", "store.gb must be a "]),
    ],
)
def test_what_is_wrong_with_a_store_is_told_by_its_key(words: list[str], said: list[str]):
    with pytest.raises(RecipeError) as refused:
        recipes.load("digits/vanilla", words)
    faults = refused.value.faults
    assert [f[: len(s)] for f, s in zip(faults, said, strict=True)] == said


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture
def commanded(teacher: Path, potstill: Command, monkeypatch: Any, tmp_path: Path) -> Command:
    """Commands whose cache is empty, after a run of two epochs over one view of each image."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    words = [*WORDS, f"teachers=[{teacher}]", "store=true", "data.views=1"]
    code, output, _ = potstill("train", "digits/kd", *words, "--out", tmp_path / "run")
    assert code == 0 and "store of " in output
    return potstill


def test_the_commands_tell_check_and_remove(commanded: Command, tmp_path: Path):
    root = tmp_path / "cache" / "teachers"
    (folder,) = root.iterdir()
    (path,) = rows_of(root)

    code, output, _ = commanded("store", "info", "--epochs", 4)
    first, second, third = output.splitlines()
    assert code == 0 and first.startswith(f"{folder.name}: ") and ", float32, cpu, " in first
    assert second == (
        f"  logits (float16): {SUBSET} outputs, 100.0 % of 1 view of {SUBSET} images of digits"
    )
    said = "    a run like the last finds 100.0 % in its first epoch, 100.0 % over 4 epochs"
    assert third == said
    code, output, _ = commanded("store", "info", "--json", folder.name)
    (found,) = json.loads(output)
    assert code == 0 and found["name"] == folder.name
    assert found["identity"]["images"]["shape"] == [1, 8, 8]
    assert found["outputs"][0]["entries"] == SUBSET and found["outputs"][0]["epochs"] == 240

    assert commanded("store", "verify")[:2] == (0, f"{folder.name}: {SUBSET} rows read\n")
    flip(path, 4096 + 30), flip(path, -1)
    code, output, _ = commanded("store", "verify")
    assert code == 3
    lines = output.splitlines()
    assert lines[:2] == [
        f"{path}: 2 of {SUBSET} rows are damaged",
        f"{folder.name}: {SUBSET} rows read",
    ]
    assert "potstill store prune --damaged" in " ".join(lines[2:])
    code, output, _ = commanded("store", "prune", "--damaged")
    assert code == 0 and output.splitlines()[0] == f"deleted: {path}"
    assert re.fullmatch(r"\S+ kB freed", output.splitlines()[1])
    assert commanded("store", "verify")[:2] == (0, f"{folder.name}: 0 rows read\n")
    code, output, _ = commanded("store", "info")
    assert code == 0 and len(output.splitlines()) == 1

    code, output, _ = commanded("store", "prune", folder.name)
    assert code == 0 and output.startswith(f"deleted: {folder}\n")
    assert [*root.iterdir()] == []
    assert "store=true in a recipe begins one" in commanded("store", "info")[1]
    assert commanded("store", "info", "--json")[1].strip() == "[]"
    assert commanded("store", "verify")[:2] == (0, "")


def test_a_damaged_header_is_damage_too(commanded: Command, tmp_path: Path):
    root = tmp_path / "cache" / "teachers"
    (path,) = rows_of(root)
    flip(path, 20)
    code, output, _ = commanded("store", "verify")
    assert code == 3 and f"{path} is damaged: its header is not what was written" in output
    assert "fault: " in commanded("store", "info")[1]
    assert commanded("store", "prune", "--damaged")[0] == 0 and not rows_of(root)


def test_nothing_is_pruned_by_a_slip(commanded: Command, tmp_path: Path):
    root = tmp_path / "cache" / "teachers"
    (folder,) = root.iterdir()
    code, _, errors = commanded("store", "prune")
    assert code == 2 and "give --days N, --damaged or --all" in errors
    for words in (["info"], ["verify"], ["prune"], ["prune", "--all"]):
        code, _, errors = commanded("store", *words, folder.name[:-1])
        assert code == 2 and f'did you mean "{folder.name}"?' in errors.replace("\n", " ")
    assert commanded("store", "prune", "--days", 1)[:2] == (0, "0 B freed\n")
    assert commanded("store", "prune", "--damaged")[:2] == (0, "0 B freed\n")
    assert commanded("store", "prune", "--days", -1)[0] == 2
    assert commanded("store", "prune", "--all", "--root", tmp_path / "nowhere")[0] == 0
    assert rows_of(root)
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 90000,) * 2)
    assert commanded("store", "prune", "--days", 1)[0] == 0
    assert not folder.exists()


def test_stores_are_looked_for_where_a_recipe_put_them(commanded: Command, tmp_path: Path):
    root = tmp_path / "cache" / "teachers"
    shutil.move(root, tmp_path / "other")
    assert "no store in" in commanded("store", "info")[1]
    assert f"{SUBSET} outputs" in commanded("store", "info", "--root", tmp_path / "other")[1]
    assert commanded("store", "prune", "--all", "--root", tmp_path / "other")[0] == 0
    assert [*(tmp_path / "other").iterdir()] == []


def test_a_wrong_word_is_told(potstill: Command):
    assert potstill("store", "inform")[0] == 2
    assert potstill("store", "info", "--epochs", 0)[0] == 2


def test_a_stale_store_stops_a_run_with_exit_code_3(
    commanded: Command, teacher: Path, tmp_path: Path
):
    """Values of other images with right checksums, as if something had changed unseen."""
    (path,) = rows_of(tmp_path / "cache" / "teachers")
    header = read_header(path)
    column = Column(path.parent, {k: header[k] for k in header["identity"]}, header["bytes"])
    column.about = {k: header[k] for k in ("data", "training_images", "size", "codes", "views")}
    (segment,) = column.segments
    rows = segment.rows[: segment.count]
    value = rows["value"].copy()
    column.append(rows["index"].copy(), rows["view"].copy(), value[::-1].copy())
    column.close()
    words = [*WORDS, f"teachers=[{teacher}]", "store=true", "data.views=1"]
    code, _, errors = commanded("train", "digits/kd", *words, "--out", tmp_path / "again")
    said = " ".join(errors.split())
    assert code == 3 and "is not what it says now" in said
    assert f"potstill store prune {path.parents[1].name}" in said
    assert Run.open(tmp_path / "again").metrics == []


def test_every_epoch_of_a_long_run_is_counted(kd: Any, tmp_path: Path):
    """Four epochs of one view: one is computed, three are read, and one file has all of it."""
    first = run(kd("data.views=1", "epochs=4"), tmp_path / "a")
    read = counts(read=SUBSET, compared=64)
    assert did(first) == [counts(computed=SUBSET), read, read, read]
    assert len(rows_of(tmp_path / "store")) == 1
