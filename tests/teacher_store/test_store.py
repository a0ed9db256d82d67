"""A stored teacher teaches as the live one does, is asked once, and is never taken for another."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from potstill import data as datasets
from potstill import engine
from potstill.data.user import UserSet
from potstill.engine import Pace, Training
from potstill.errors import DataError, MethodError, StorageError
from potstill.method import Batch, Method, Outputs, Phase, Terms, Turn, Update
from potstill.methods import METHODS
from potstill.models import build
from potstill.net import Net
from potstill.stochastic_depth import stochastic
from potstill.teacher_store import Counts, Settings, Stored, TeacherStore, stored
from potstill.teacher_store.rows import Column
from potstill.teacher_store.store import AHEAD, CHUNK, fingerprint, key_of
from potstill.training import data_spec
from tests.methods import test_contract as contract
from tests.teacher_store.damage import flip, rows_of
from tests.toys import ToyImages, plan, toy_net

SIZE = CHUNK["cpu"]
"""Images that a teacher is given at a time, and a batch here: the live one is given the same."""
BATCHES = 3
BF16, FP32 = torch.bfloat16, None
STEP = list[dict[str, float]]
OPEN: list[Stored] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No test leaves a file open."""
    yield
    while OPEN:
        OPEN.pop().close()


@functools.cache
def plain_digits() -> datasets.Data:
    return datasets.load("digits", subset=BATCHES * SIZE, padding=1)


def digits(**settings: Any) -> datasets.Data:
    if not settings:
        return plain_digits()
    return datasets.load("digits", **{"subset": BATCHES * SIZE, "padding": 1, **settings})


def network(seed: int = 0, name: str = "resnet8", **more: Any) -> Net:
    torch.manual_seed(seed)
    return build(name, 10, (1, 8, 8), **more)


def build_method(
    name: str = "kd", data: datasets.Data | None = None, batch_size: int = SIZE, **more: Any
) -> Method:
    """On ResNet-8s; a second call gives the same one."""
    teachers = more.pop("teachers", [network(9)])
    students = more.pop("students", [network(1)])
    split = (data or digits()).train
    spec = data_spec(split, batch_size, False, [split.classes] * len(teachers))
    torch.manual_seed(5)
    method = METHODS[name](students, teachers, spec, **more)
    return method.to(memory_format=torch.channels_last)


def keep(
    method: Method,
    root: Path,
    data: datasets.Data | None = None,
    precision: str = "float32",
    compile: bool = False,
    **how: Any,
) -> Stored:
    """The stores of its teachers, as a training gives them to a method."""
    split = (data or digits()).train
    about = {"data": "digits", "training_images": len(split)}
    names = [f"teacher{i}" for i in range(len(method.teachers))]
    made = stored(method, names, split.images, Settings(root, **how), precision, compile, about)
    method.stored = made
    OPEN.append(made)
    return made


def train(
    method: Method,
    store: Stored | None = None,
    data: datasets.Data | None = None,
    epochs: int = 1,
    precision: torch.dtype | None = FP32,
    seed: int = 0,
) -> STEP:
    """The terms of every step."""
    lengths = {p.name: epochs for p in method.phases()}
    pace = Pace(lengths, lengths, {"default": plan()}, seed, precision)
    images = (data or digits()).train
    training = Training(method, images, pace, iter if store is None else store.supply)
    return [{k: v.item() for k, v in m.terms.items()} for m in training.run()]


def given(net: nn.Module) -> list[int]:
    """How many images it is given in each forward from now on."""
    sizes: list[int] = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# --- as the live teacher ------------------------------------------------------------------------

READERS = [("kd", {}), ("at", {}), ("rkd", {}), ("fitnet", {}), ("srrl", {})]
"""Logits; maps; the vector before the classifier; a map in a phase of its own; two of them."""


@pytest.mark.parametrize("name, arguments", READERS, ids=[name for name, _ in READERS])
@pytest.mark.parametrize(
    "precision, bits, exact", [(BF16, 16, True), (FP32, 32, True), (FP32, 16, False)]
)
def test_stored_outputs_teach_as_live_ones_do(
    name: str,
    arguments: dict[str, Any],
    precision: torch.dtype | None,
    bits: int,
    exact: bool,
    tmp_path: Path,
):
    """Bit for bit in bfloat16 and in 32 bits, for a batch is a chunk; else to 11 bits a number.

    Computed and kept as well as read.
    """
    live = train(build_method(name, **arguments), precision=precision)
    counts = []
    for _ in range(2):
        method = build_method(name, **arguments)
        teacher_dtype = "float32" if precision is None else "bfloat16"
        store = keep(method, tmp_path, precision=teacher_dtype, bits=bits)
        found = train(method, store, precision=precision)
        counts.append(store.counts)
        store.close()
        if exact:
            assert found == live
        else:
            for mine, theirs in zip(found, live, strict=True):
                assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-4)
            assert found != live, "16 bits are not 24"
    asked = BATCHES * SIZE
    assert counts[0].computed == counts[1].read == asked
    assert counts[0].read == counts[1].computed == 0
    assert counts[1].compared == SIZE and counts[1].damaged == 0


TAUGHT = [n for n in METHODS if contract.CASES[n].teachers and n != "jacobian"]


def test_the_methods_that_cannot_be_stored_are_these():
    """Three as they were published, and one always."""
    refused = []
    for name in [*TAUGHT, "jacobian"]:
        try:
            engine.require_storable(contract.build(name))
        except MethodError:
            refused.append(name)
    assert refused == ["ofd", "reviewkd", "sakd", "jacobian"]


@pytest.mark.parametrize("name", TAUGHT)
def test_what_a_method_reads_is_all_that_its_losses_take(name: str, tmp_path: Path):
    """The first step of each phase with nothing but what it `reads`, computed and then read."""

    def first_steps(root: Path | None) -> STEP:
        method = contract.build(name, dtype=torch.float64)
        method.teacher_statistics = "running"
        engine.require_storable(method)
        store, images = None, ToyImages(dtype=torch.float64)
        if root is not None:
            store = toy_store(method, root)
        supply = iter if store is None else store.supply
        training = Training(method, images, contract.pace_of(method, 1), supply)
        found = []
        for number in range(len(training.phases)):
            training.skip_to(number)
            moment = next(training.run())
            found.append({k: v.item() for k, v in moment.terms.items()})
        if store is not None:
            assert store.counts.read or store.counts.computed
            store.close()
        return found

    live, cold, warm = first_steps(None), first_steps(tmp_path), first_steps(tmp_path)
    assert len(live) == len(cold)
    for mine, theirs in zip(cold, live, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    assert cold == warm


def toy_store(method: Method, root: Path) -> Stored:
    """Of the toy images, whose pixels have no name; whole, for networks in float64."""
    how, about = Settings(root, bits=32), {"size": 64, "codes": [0, 2], "views": None}
    (teacher,) = method.teachers
    made = Stored([TeacherStore("t", teacher, method.reads, {"of": "toys"}, how)], about)
    method.stored = made
    OPEN.append(made)
    return made


class Committee(Method):
    """The student learns the mean of its teachers' logits."""

    teachers_needed = (1, None)

    def loss(self, out: Outputs) -> Terms:
        mean = torch.stack([t.logits for t in out.teachers]).mean(0)
        return {"mean": (out.students[0].logits - mean).square().mean()}


def committee(*teachers: Net) -> Method:
    split = digits().train
    spec = data_spec(split, SIZE, False, [split.classes] * len(teachers))
    return Committee([network(1)], teachers, spec).to(memory_format=torch.channels_last)


def test_each_of_several_teachers_has_a_store(tmp_path: Path):
    live = train(committee(network(8), network(9, "resnet14")), precision=BF16)
    asked = 2 * BATCHES * SIZE
    for counts in (Counts(computed=asked), Counts(read=asked, compared=2 * SIZE)):
        method = committee(network(8), network(9, "resnet14"))
        store = keep(method, tmp_path, precision="bfloat16")
        assert train(method, store, precision=BF16) == live
        assert store.counts == counts
        store.close()
    assert [name[:9] for name in folders(tmp_path)] == ["teacher0-", "teacher1-"]


def test_a_second_teacher_reads_its_own_rows_where_the_first_ones_are_lost(tmp_path: Path):
    """One of the two stores deleted: half is computed, half is read, and all is as it was."""
    first, second = network(8), network(9, "resnet14")
    method = committee(first, second)
    store = keep(method, tmp_path)
    live = train(method, store)
    store.close()
    shutil.rmtree(store.stores[0].folder)
    method = committee(first, second)
    store = keep(method, tmp_path)
    assert train(method, store) == live
    half = BATCHES * SIZE
    assert store.counts == Counts(read=half, computed=half, compared=SIZE)


def test_twice_the_same_teacher_is_no_trouble(tmp_path: Path):
    """Under one name they have one folder, to which both write."""
    method = committee(network(9), network(9))
    split = digits().train
    how, about = Settings(tmp_path), {"data": "digits", "training_images": len(split)}
    store = stored(method, ["t", "t"], split.images, how, "float32", False, about)
    OPEN.append(store)
    method.stored = store
    first = train(method, store)
    store.close()
    assert len(folders(tmp_path)) == 1
    method = committee(network(9), network(9))
    store = stored(method, ["t", "t"], split.images, how, "float32", False, about)
    OPEN.append(store)
    method.stored = store
    assert train(method, store) == first
    assert store.counts == Counts(read=2 * BATCHES * SIZE, compared=2 * SIZE)


def test_a_teacher_that_nobody_asks_is_not_stored(tmp_path: Path):
    """vanilla has none; what there is, is trained."""
    data = digits()
    spec = data_spec(data.train, SIZE, False, [])
    method = METHODS["vanilla"]([network(1)], [], spec).to(memory_format=torch.channels_last)
    other = copy.deepcopy(method)
    store = keep(method, tmp_path)
    assert train(method, store) == train(other)
    assert store.counts == Counts() and not [*tmp_path.iterdir()]


def test_the_highest_logits_are_stored_as_they_are(tmp_path: Path):
    """At T = 1 a KL divergence sees probabilities alone, so all but one of ten are all."""
    live = train(build_method(temperature=1.0))
    method = build_method(temperature=1.0)
    store = keep(method, tmp_path, top_k=9, bits=32)
    for mine, theirs in zip(train(method, store), live, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    few = build_method(temperature=1.0)
    store = keep(few, tmp_path, top_k=2, bits=32)
    (mine, *_), (theirs, *_) = train(few, store), live
    assert mine["ce"] == pytest.approx(theirs["ce"])
    assert mine["kd"] != pytest.approx(theirs["kd"], rel=1e-4)
    assert mine["kd"] == pytest.approx(theirs["kd"], rel=0.5)
    assert len(folders(tmp_path)) == 1 and len(rows_of(tmp_path)) == 2


# --- when a teacher is asked --------------------------------------------------------------------


def test_a_teacher_is_given_chunks_of_one_size_and_each_image_once(tmp_path: Path):
    """192 images in batches of 20: the first eight batches have 160, of which 128 fill chunks as
    batches need them, and so on: 3 chunks; and two of the first batch, for the types and to see
    that it says the same again."""
    method = build_method(batch_size=20)
    sizes, store = given(method.teachers[0]), keep(method, tmp_path)
    train(method, store)
    assert set(sizes) == {SIZE} and store.counts.computed == BATCHES * SIZE
    assert len(sizes) - 2 in (3, 4)
    store.close()
    method = build_method(batch_size=20)
    sizes, store = given(method.teachers[0]), keep(method, tmp_path)
    train(method, store)
    assert sizes == [SIZE] * 3, "the first batch twice, and one chunk to compare"
    assert store.counts == Counts(read=BATCHES * SIZE, compared=SIZE)


def test_what_a_teacher_says_does_not_depend_on_what_is_missing(tmp_path: Path):
    """Every third row is lost; what is computed anew is what was there, to the last bit."""
    method = build_method(batch_size=20)
    store = keep(method, tmp_path, bits=32)
    first = train(method, store)
    store.close()
    (path,) = rows_of(tmp_path)
    data = bytearray(path.read_bytes())
    row = 4 + 8 + 8 + 4 * 10
    for number in range(0, BATCHES * SIZE, 3):
        data[4096 + row * number] ^= 1
    path.write_bytes(data)
    method = build_method(batch_size=20)
    store = keep(method, tmp_path, bits=32)
    assert train(method, store) == first
    assert store.counts == Counts(read=2 * SIZE, computed=SIZE, damaged=SIZE, compared=SIZE)


class LaterTaught(Method):
    """A phase of the student alone, then one with the teacher."""

    lengths = {"alone": 1, "taught": 1}  # noqa: RUF012

    def alone(self, batch: Batch, progress: Any, previous: Any) -> Any:
        return self.student(batch.image).logits

    def both(self, batch: Batch, progress: Any, previous: Any) -> Any:
        (teacher,) = self.teach(batch)
        return self.student(batch.image).logits - teacher.logits

    def phases(self) -> list[Phase]:
        def turn(name: str, forward: Any) -> Turn[Any]:
            update = Update(name, lambda out: {"size": out.square().mean()}, self.trainable())
            return Turn(forward, [update])

        taught = [turn("first", self.both), turn("second", self.both)]
        return [Phase("alone", [turn("u", self.alone)], 1), Phase("taught", taught, 1)]


def test_a_teacher_is_not_asked_in_a_phase_that_does_without(tmp_path: Path):
    """And once for a batch, however often a step asks for its outputs."""
    data = digits()
    spec = data_spec(data.train, SIZE, False, [data.train.classes])
    method = LaterTaught([network(1)], [network(9)], spec).to(memory_format=torch.channels_last)
    store = keep(method, tmp_path)
    sizes = given(method.teachers[0])
    lengths = {"alone": 1, "taught": 1}
    pace = Pace(lengths, lengths, {"default": plan()}, 0, FP32)
    for moment in Training(method, data.train, pace, store.supply).run():
        if moment.phase == "alone":
            assert not sizes and not folders(tmp_path)
    assert store.counts == Counts(computed=BATCHES * SIZE)
    assert len(sizes) == BATCHES + 2


def test_a_batch_that_was_not_supplied_is_taught_live(tmp_path: Path):
    """One that comes from elsewhere, one that was changed, one of an epoch that is over."""
    data, method = digits(), build_method()
    store, sizes = keep(method, tmp_path), given(method.teachers[0])
    (only, *_) = data.train.clean(7)
    assert store(only) is None and not sizes
    with torch.no_grad():
        live = method.teachers[0](only.image).logits
    assert torch.equal(method.teach(only)[0].logits, live)
    supplied = store.supply(data.train.clean(7))
    first = next(supplied)
    found = store(first)
    assert found is not None and store(first) is found
    assert store(only) is None
    assert store(first._replace(view=first.view.clone())) is None
    second = next(supplied)
    assert store(first) is None and store(second) is not None
    assert folders(tmp_path)


def test_stored_features_are_those_that_a_method_reads(tmp_path: Path):
    data, method = digits(), build_method("rkd")
    store = keep(method, tmp_path, bits=32)
    batch = next(store.supply(data.train.clean(SIZE)))
    (found,) = method.teach(batch)
    assert list(found.features) == ["embed"] and store.stores[0].outputs == ["logits", "embed"]
    live = method.teachers[0](batch.image)
    assert torch.equal(found["embed"], live["embed"]) and torch.equal(found.logits, live.logits)
    assert not found.logits.requires_grad


def test_maps_have_the_layout_that_the_network_gives_them(tmp_path: Path):
    data, method = digits(), build_method("at")
    store = keep(method, tmp_path, precision="bfloat16")
    method.teachers[0].precision = BF16
    with torch.no_grad():
        live = method.teachers[0](next(data.train.clean(SIZE)).image)
    for _ in range(2):
        batch = next(store.supply(data.train.clean(SIZE)))
        (found,) = method.teach(batch)
        assert found.features
        for name, value in found.features.items():
            theirs = live.features[name]
            assert torch.equal(value, theirs) and value.dtype == theirs.dtype == BF16
            assert value.stride() == theirs.stride()


def test_a_second_method_seed_and_pool_read_the_rows_of_the_first(tmp_path: Path):
    """All nine views of each image are kept; what a run draws of them is its own affair."""
    whole = digits()
    method = build_method()
    store = keep(method, tmp_path)
    with torch.no_grad():
        for view in whole.train.images.codes:
            chunks = whole.train.indices.split(SIZE)
            given = [(at, torch.full_like(at, view)) for at in chunks]
            images = whole.train.images.load(given)
            batches = [
                Batch(image, at, at, views)
                for image, (at, views) in zip(images, given, strict=True)
            ]
            for batch in store.supply(batches):
                method.teach(batch)
    assert store.counts.computed == 9 * BATCHES * SIZE
    store.close()
    for name, settings, seed in (("kd", {}, 1), ("kd", {"views": 2}, 0), ("rkd", {"views": 4}, 3)):
        data = digits(**settings)
        other = build_method(name, data, gamma=0.5) if name == "kd" else build_method(name, data)
        reads = keep(other, tmp_path, data)
        train(other, reads, data, seed=seed, epochs=2)
        asked = 2 * BATCHES * SIZE
        if name == "kd":
            assert reads.counts == Counts(read=asked, compared=2 * SIZE)
        else:  # its vectors are new, and only they
            assert reads.counts.read + reads.counts.computed == asked
        reads.close()
    assert len(folders(tmp_path)) == 1
    assert sum(path.parent.name.startswith("logits") for path in rows_of(tmp_path)) == 1


def test_an_epoch_reads_what_another_run_has_written_since(tmp_path: Path):
    """Both find the store empty; what one computes, the other reads from its next epoch on."""
    data = digits(views=1)
    one, other = (build_method(data=data) for _ in range(2))
    first, second = keep(one, tmp_path, data), keep(other, tmp_path, data)
    for store in (first, second):
        assert store(next(store.supply(data.train.clean(SIZE)))) is not None
    train(one, first, data)
    before = dataclasses.replace(second.counts)
    train(other, second, data)
    assert second.counts.computed == before.computed
    assert second.counts.read == before.read + BATCHES * SIZE


def test_the_room_that_a_killed_run_reserved_is_given_back_by_the_next(tmp_path: Path):
    """Its lock ends with it; that of one that lives does not."""
    method = build_method()
    store = keep(method, tmp_path)
    train(method, store)
    (path,) = rows_of(tmp_path)
    reserved = path.stat().st_size
    alive = build_method()
    train(alive, keep(alive, tmp_path))
    assert path.stat().st_size == reserved > 10**6
    (column,) = store.stores[0].columns.values()
    assert column._file is not None
    column._file.close()
    column._file = column._own = None
    after = build_method()
    train(after, keep(after, tmp_path))
    assert path.stat().st_size == 4096 + 40 * BATCHES * SIZE


# --- damage and change --------------------------------------------------------------------------


def test_damaged_rows_are_counted_and_computed_anew(tmp_path: Path):
    method = build_method()
    store = keep(method, tmp_path)
    first = train(method, store)
    store.close()
    (path,) = rows_of(tmp_path)
    for row in (0, 1, 100):
        flip(path, 4096 + 40 * row + 39)  # 4 + 8 + 8 + 2 * 10 bytes a row
    for damaged in (3, 0):
        method = build_method()
        store = keep(method, tmp_path)
        assert train(method, store) == first
        assert store.counts == Counts(
            read=BATCHES * SIZE - damaged, computed=damaged, damaged=damaged, compared=SIZE
        )
        store.close()


def test_a_file_that_cannot_be_read_is_told_and_done_without(tmp_path: Path):
    method = build_method()
    store = keep(method, tmp_path)
    first = train(method, store)
    store.close()
    assert store.new_faults() == []
    (path,) = rows_of(tmp_path)
    flip(path, 20)
    method = build_method()
    store = keep(method, tmp_path)
    assert train(method, store) == first
    assert store.counts == Counts(computed=BATCHES * SIZE)
    told = f"{path} is damaged: its header is not what was written; delete it"
    assert store.new_faults() == [told]
    assert store.new_faults() == []  # once is enough


class Mood(nn.Module):
    """Multiplies by a number in a list, which no fingerprint sees."""

    def __init__(self, module: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.module, self.held = module, [factor]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.module(x)
        return found * self.held[0]


def moody(factor: float = 1.0) -> Net:
    return Net(Mood(network(9).module, factor), input_shape=(1, 8, 8))


def weights(method: Method) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in method.named_parameters()}


@pytest.mark.parametrize("factor", [-1.0, 1.02, 0.98, 0.0, float("nan"), float("inf")])
def test_an_output_that_is_no_longer_what_the_teacher_says_stops_the_training(
    factor: float, tmp_path: Path
):
    """In the next epoch, before any of its steps: no student learns from it."""
    method = build_method(teachers=[moody()])
    store = keep(method, tmp_path, bits=32)
    steps = 0
    with pytest.raises(StorageError) as stopped:
        lengths = {"distill": 2}
        pace = Pace(lengths, lengths, {"default": plan()}, 0, FP32)
        for moment in Training(method, digits(views=1).train, pace, store.supply).run():
            steps += 1
            if moment.epoch_done:
                method.teachers[0].module.held[0] = factor  # type: ignore[index, operator]
                before = weights(method)
    assert steps == BATCHES
    contract.assert_same(before, weights(method))
    name = store.stores[0].folder.name
    assert re.fullmatch(
        r"the stored 'logits' of teacher0 is not what it says now: it differs by \S+ of its size, "
        r"and 0\.01 is allowed\. Something changed that the store (\S+) does not know of; delete "
        r"it with `potstill store prune (\S+)`, or set store=false",
        str(stopped.value),
    )
    assert str(stopped.value).count(name) == 2
    assert stopped.value.exit_code == 3


def test_a_change_within_another_machines_rounding_is_let_pass(tmp_path: Path):
    """0.2 % of its size; and in a new run as in a new epoch."""
    method = build_method(teachers=[moody()])
    store = keep(method, tmp_path)
    train(method, store)
    store.close()
    for factor, well in ((1.002, True), (1.03, False)):
        method = build_method(teachers=[moody(factor)])
        store = keep(method, tmp_path)
        with contextlib.nullcontext() if well else pytest.raises(StorageError):
            train(method, store)
        store.close()
    assert len(folders(tmp_path)) == 1


def test_a_changed_map_is_noticed_where_the_logits_are_as_they_were(tmp_path: Path):
    """Channels of a map, reversed, and reversed again before the rest of the network."""

    class Turned(nn.Module):
        held = (False,)

        def forward(self, x: Tensor) -> Tensor:
            return x.flip(1) if self.held[0] else x

    def teacher(turn: bool) -> Net:
        net = network(9)
        parts = [Turned(), Turned()]
        for part in parts:
            part.held = (turn,)
        net.module.layer2 = nn.Sequential(net.module.layer2, *parts)  # type: ignore[union-attr]
        return Net(net.module, {"map": "layer2.1"}, (1, 8, 8))

    def made(turn: bool) -> Method:
        taps = {"taps": ["stage2"], "teacher_taps": ["map"]}
        return build_method("at", teachers=[teacher(turn)], **taps)

    method = made(False)
    store = keep(method, tmp_path)
    train(method, store)
    store.close()
    method = made(True)
    store = keep(method, tmp_path)
    with pytest.raises(StorageError, match="the stored 'map' of teacher0 is not what it says now"):
        train(method, store)


# --- whose outputs they are ---------------------------------------------------------------------


def name_of(
    teacher: Net | None = None, data: datasets.Data | None = None, name: str = "kd", **more: Any
) -> str:
    """The folder of a teacher's store."""
    method = build_method(name, data, teachers=[teacher or network(9)])
    (store,) = stored(
        method,
        ["t"],
        (data or digits()).train.images,
        Settings(Path("nowhere")),
        more.get("precision", "float32"),
        more.get("compile", False),
        {},
    ).stores
    return store.folder.name


def changed(change: Callable[[Net], Any]) -> Net:
    net = network(9)
    with torch.no_grad():
        change(net)
    return net


def test_everything_that_its_contents_depend_on_names_a_store():
    """All of these are different from the plain one and from each other."""
    plain = name_of()
    assert re.fullmatch(r"t-[0-9a-f]{12}", plain)
    layers = {
        "one weight": changed(lambda net: net.module.conv1.weight[0, 0, 0, 0].add_(1e-7)),
        "one statistic": changed(lambda net: net.module.bn1.running_var[0].mul_(1.0001)),
        "an epsilon": changed(lambda net: setattr(net.module.bn1, "eps", 1e-4)),
        "a slope": changed(lambda net: setattr(net.module, "relu", nn.LeakyReLU(0.1))),
        "normalize": network(9, normalize=((1.1,), (0.1,))),
        "its scale": network(9, normalize=((1.2,), (0.1,))),
        "its shift": network(9, normalize=((1.1,), (0.2,))),
        "layout": changed(lambda net: setattr(net, "channels_last", False)),
        "stochastic": stochastic(network(9), p_end=0.9, draw="never"),
        "its settings": stochastic(network(9), p_end=0.8, draw="never"),
    }
    pixels = {
        "mean": digits(mean=[0.3], std=[0.3754]),
        "std": digits(mean=[0.3042], std=[0.4]),
        "padding": digits(padding=2),
        "no padding": digits(padding=0),
        "pad_mode": digits(pad_mode="reflect"),
        "flip": digits(flip=True),
    }
    names = {"plain": plain}
    names |= {what: name_of(teacher) for what, teacher in layers.items()}
    names |= {what: name_of(data=data) for what, data in pixels.items()}
    names |= {"precision": name_of(precision="bfloat16"), "compile": name_of(compile=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9")
        names["torch"] = name_of()
    assert len({*names.values()}) == len(names), names
    assert name_of() == plain


def test_what_its_contents_do_not_depend_on_does_not():
    plain = name_of()
    assert name_of(data=digits(views=4)) == plain
    assert name_of(data=digits(views=4, subset=40)) == plain
    assert name_of(data=digits(classes=list(range(10)), validation=0.1)) == plain
    assert name_of(name="rkd") == plain
    assert name_of(copy.deepcopy(network(9))) == plain
    moved = network(9).to(memory_format=torch.channels_last)
    assert name_of(moved) == plain
    counted = changed(lambda net: net.module.bn1.num_batches_tracked.add_(5))
    assert name_of(counted) == plain
    tapped = network(9)
    tapped.add_taps({"more": "layer1"})
    assert name_of(tapped) == plain


def test_one_tap_name_at_another_place_is_another_output(tmp_path: Path):
    """Of the same shape. The store is the teacher's; what it keeps of it is by place."""
    for place in ("conv1", "layer1"):
        net = Net(network(9).module, {"map": place}, (1, 8, 8))
        method = build_method("at", teachers=[net], taps=["stage1"], teacher_taps=["map"])
        store = keep(method, tmp_path)
        train(method, store)
        assert store.counts == Counts(computed=BATCHES * SIZE)
        store.close()
    (folder,) = tmp_path.iterdir()
    assert sum(path.name.startswith("map-") for path in folder.iterdir()) == 2


@pytest.mark.parametrize("how", [{"bits": 32}, {"top_k": 3}, {"bits": 32, "top_k": 3}])
def test_how_much_is_kept_is_another_output_of_the_same_store(how: dict[str, int], tmp_path: Path):
    for settings in ({}, how, {}):
        method = build_method()
        store = keep(method, tmp_path, **settings)
        train(method, store)
        store.close()
    assert store.counts.read == BATCHES * SIZE
    (folder,) = tmp_path.iterdir()
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2


def test_names_are_short_and_plain():
    identity = {"b": 1, "a": [1.5, None]}
    assert key_of(identity) == key_of({"a": [1.5, None], "b": 1})
    assert key_of(identity) != key_of({"b": 1, "a": [1.5, 0]})
    method = build_method()
    name, wanted = "../runs/ä b:student/seed0" + "x" * 50, set()
    for given in (name, "...", ""):
        made = stored(method, [given], digits().train.images, Settings(Path("r")), "f", False, {})
        (store,) = made.stores
        assert store.folder.parent == Path("r") and len(store.folder.name) <= 53
        wanted.add(store.folder.name.rpartition("-")[0])
    assert "teacher" in wanted and not any("/" in name or name.startswith(".") for name in wanted)


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 10, 11])
def test_as_many_logits_as_there_are_classes_are_not_the_highest(top_k: int, tmp_path: Path):
    words = rf"store\.top_k is {top_k}; the teacher has 10 classes: give 1 to 9, or null to keep"
    with pytest.raises(MethodError, match=words):
        keep(build_method(), tmp_path, top_k=top_k)


def test_images_that_augment_themselves_cannot_be_stored(tmp_path: Path):
    images = TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    user = UserSet(images, torch.zeros(4, dtype=torch.int64), (1, 8, 8))
    with pytest.raises(DataError, match=r"not for a dataset that augments itself.*leave the store"):
        stored(build_method(), ["t"], user, Settings(tmp_path), "float32", False, {})


def test_images_whose_views_never_come_twice_cannot_be_stored(tmp_path: Path):
    """Crops of any size have 2^62 seeds; with data.views they can."""
    for part, number in itertools.product(("train", "test"), range(2)):
        folder = tmp_path / "set" / part / f"class{number}"
        folder.mkdir(parents=True)
        pixels = np.full((80, 90, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(folder / "0.png")
    settings = {"root": tmp_path / "set", "image_size": 16, "workers": 0}

    def method(data: datasets.Data) -> Method:
        spec = data_spec(data.train, 2, False, [data.train.classes])
        nets = [build("resnet8", 2, (3, 16, 16)) for _ in range(2)]
        return METHODS["kd"](nets[:1], nets[1:], spec)

    data = datasets.load("folder", **settings)
    with pytest.raises(DataError, match=r"no view comes twice.*set data\.views=16, or leave the"):
        keep(method(data), tmp_path / "store", data)
    data = datasets.load("folder", views=2, **settings)
    counts = []
    for _ in range(2):
        made = method(data)
        with torch.no_grad():
            for p in made.teachers[0].parameters():
                p.fill_(0.01)
        store = keep(made, tmp_path / "store", data)
        train(made, store, data, epochs=6)
        store.close()
        counts.append(store.counts)
    assert counts[1].read == 12 and counts[0].read + counts[0].computed == 12
    assert 2 <= counts[0].computed <= 4


def test_too_little_room_is_refused_with_the_number_of_views_that_fit(tmp_path: Path):
    """A row of ten numbers in 16 bits has 4 + 8 + 8 + 20 = 40 bytes. Of 1000 images, each drawn
    10^6 times in one of 9 views, all 9 come: 360 kB. In 100 kB fit 9 * 100 / 360 = 2.5 views.
    """
    store = keep(build_method(), tmp_path, gb=100e-6)
    assert store.stores[0].row_bytes() == 40
    words = (
        "the stored outputs of teacher0 (logits) would take 360 kB, and store.gb is 0.0001; set "
        "data.views=2, raise it, or leave the store off"
    )
    with pytest.raises(StorageError, match=f"^{re.escape(words)}$"):
        store.require_room(1000, 9, 10**6)
    keep(build_method(), tmp_path, gb=361e-6).require_room(1000, 9, 10**6)


@pytest.mark.parametrize(
    "views, times, rows, fewer",
    [(9, 1, 1000, 0), (1, 50, 1000, 0), (2, 2, 1500, 1), (9, 10**6, 9000, 8)],
)
def test_room_is_needed_for_the_views_that_are_drawn(
    views: int, times: int, rows: int, fewer: int, tmp_path: Path
):
    """Of 1000 images. Drawn once, each has one view, whatever the pool, so that no smaller one
    helps; drawn twice of 2, it has 1 1/2 on average.
    """
    room = 40 * rows * 1e-9
    keep(build_method(), tmp_path, gb=1.001 * room).require_room(1000, views, times)
    with pytest.raises(StorageError) as refused:
        keep(build_method(), tmp_path, gb=0.999 * room).require_room(1000, views, times)
    if fewer:
        assert f"; set data.views={fewer}, raise it" in str(refused.value)
        keep(build_method(), tmp_path, gb=0.999 * room).require_room(1000, fewer, times)
    else:
        assert "; raise it, or leave the store off" in str(refused.value)


def test_a_row_has_room_for_all_that_is_kept_of_an_image(tmp_path: Path):
    """In 32 bits, 4 bytes for each number, and 20 before each of two outputs."""
    method = build_method("at", taps=["stage1"], teacher_taps=["stage1"])
    store = keep(method, tmp_path, bits=32)
    channels, h, w = method.teachers[0].shapes["stage1"]
    assert store.stores[0].row_bytes() == (20 + 4 * 10) + (20 + 4 * channels * h * w)
    train(method, store)
    store.close()
    size = sum(path.stat().st_size - 4096 for path in rows_of(tmp_path))
    assert size == BATCHES * SIZE * store.stores[0].row_bytes()


def test_a_disk_without_room_is_refused_before_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is kept already is room: 40 bytes a row, of 192 images in 9 views 69 kB."""
    usage = type("usage", (), {"free": 30_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    words = r"would take 69\.1 kB, and 30 kB are free at .*; set data\.views=3, choose another disk"
    with pytest.raises(StorageError, match=words):
        keep(build_method(), tmp_path / "not" / "yet").require_room(192, 9, 1000)
    method = build_method()
    store = keep(method, tmp_path)
    train(method, store, epochs=12)
    store.close()
    keep(build_method(), tmp_path).require_room(192, 9, 1000)


def test_a_store_that_cannot_be_made_is_an_error_of_storage(tmp_path: Path):
    (tmp_path / "file").write_text("")
    method = build_method()
    store = keep(method, tmp_path / "file")
    with pytest.raises(StorageError, match="cannot be made: a part of the path is a file"):
        train(method, store)


def test_an_output_too_large_for_16_bits_is_refused_before_it_is_kept(tmp_path: Path):
    method = build_method(teachers=[moody(1e9)])
    store = keep(method, tmp_path)
    with pytest.raises(MethodError, match=r"'logits' has numbers up to .*set store\.bits=32"):
        train(method, store)
    assert not rows_of(tmp_path)
    method = build_method(teachers=[moody(1e9)])
    store = keep(method, tmp_path, bits=32)
    assert train(method, store) == train(build_method(teachers=[moody(1e9)]))


def test_a_fingerprint_is_of_layers_and_numbers_not_of_an_object():
    one, other = toy_net(0), toy_net(0)
    assert fingerprint(one) == fingerprint(other)
    other.module.relu = nn.GELU()  # type: ignore[assignment]
    assert fingerprint(one) != fingerprint(other)


# --- what a review found --------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["replaced", "in place"])
def test_images_that_a_method_has_changed_are_the_teachers_to_judge(change: str, tmp_path: Path):
    """(index, view) does not say what they are any more; nothing is read for them, or kept."""
    method = build_method()
    store = keep(method, tmp_path, bits=32)
    (batch,) = list(itertools.islice(store.supply(digits(views=1).train.clean(SIZE)), 1))
    if change == "replaced":
        batch = batch._replace(image=batch.image.flip(0))
    else:
        batch.image.mul_(0.5)
    assert store(batch) is None
    assert not rows_of(tmp_path)
    with torch.no_grad():
        expected = method.teachers[0](batch.image).logits
    torch.testing.assert_close(method.teach(batch)[0].logits, expected)


def test_stored_outputs_that_come_late_in_an_epoch_are_compared_too(tmp_path: Path):
    """None of the images that are known at first is stored; the last ones are."""
    method = build_method(teachers=[moody()])
    store = keep(method, tmp_path, bits=32)
    whole = list(datasets.load("digits", views=1).train.clean(20))
    for batch in store.supply(whole[-1:]):
        store(batch)
    store.close()
    assert len(whole) * 20 > AHEAD
    method.teachers[0].module.held[0] = -1.0  # type: ignore[index, operator]
    store = keep(method, tmp_path, bits=32)
    with pytest.raises(StorageError, match="is not what it says now"):
        for batch in store.supply(whole):
            store(batch)
    assert store.counts.compared == 0


class Noisy(nn.Module):
    """Adds noise in eval mode too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.module(x)
        return found + torch.randn_like(found)


def test_a_teacher_that_says_other_things_each_time_is_refused(tmp_path: Path):
    method = build_method(teachers=[Net(Noisy(network(9).module), input_shape=(1, 8, 8))])
    store = keep(method, tmp_path)
    with pytest.raises(MethodError, match="it says another 'logits' of the same images each time"):
        train(method, store)
    assert not rows_of(tmp_path)


def test_what_is_no_weight_is_of_the_fingerprint_too():
    """A buffer that is not saved, a plain number, the code of a module of one's own."""
    base = fingerprint(moody())
    assert fingerprint(moody()) == base
    other = moody()
    other.module.register_buffer("table", torch.ones(2), persistent=False)  # type: ignore[operator]
    with_buffer = fingerprint(other)
    other.module.table.mul_(2)  # type: ignore[operator, union-attr]
    numbered = moody()
    numbered.module.scale = 2.0  # type: ignore[assignment]
    elsewhere = Net(Noisy(network(9).module), input_shape=(1, 8, 8))
    found = [base, with_buffer, fingerprint(other), fingerprint(numbered), fingerprint(elsewhere)]
    assert len(set(found)) == len(found)


def test_a_disk_that_becomes_full_costs_the_store_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The losses are as ever, and it is told once."""
    method = build_method()
    expected = train(method, keep(method, tmp_path / "room"))
    method = build_method()
    store = keep(method, tmp_path / "none")

    def full(*given: object) -> None:
        raise StorageError("rows cannot be written: no space left on the device")

    monkeypatch.setattr(Column, "append", full)
    assert train(method, store) == expected
    assert store.new_faults() == [
        "rows cannot be written: no space left on the device. The training goes on, and keeps no "
        "more outputs"
    ]
    assert store.new_faults() == []


def test_a_method_that_does_not_say_what_it_reads_is_told(tmp_path: Path):
    method = build_method()
    store = keep(method, tmp_path)
    batch = next(iter(store.supply(digits(views=1).train.clean(SIZE))))
    (captured,) = method.teach(batch)
    with pytest.raises(MethodError, match="takes 'embed' of its teacher, which its `reads`"):
        captured["embed"]
