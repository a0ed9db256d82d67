"""What a training's teachers say of (image, view), read from the disk or computed and kept there.

    ROOT/resnet56-1f0c5a9d2e77/store.json        whose outputs these are
                               logits-9d31b2c4/  one folder an output, see `rows`

A store's name follows from everything that its contents depend on: the teacher's weights and
layers, its normalisation, the pixels and how views are made of them, precision, `compile`, kind of
device and PyTorch. Where one of them changes, another store is read, or a new one begun.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from potstill import files
from potstill.data.split import ImageSet
from potstill.errors import DataError, MethodError, StorageError
from potstill.method import Batch, Method
from potstill.net import Captured, Net, in_full
from potstill.teacher_store.rows import SUFFIX, Bytes, Column, Integers, row_type, tidy
from potstill.teacher_store.values import TopK, Value, Whole, kept_in

FORMAT = 1
"""Part of a store's name: raise it when what is kept would no longer be computed so."""
ABOUT = "store.json"
CHUNK = {"cpu": 64, "cuda": 256}
"""Images that a teacher is given at a time, always as many: what it says of one then does not
depend on which others are missing, and nothing is compiled twice."""
AHEAD = 512
"""Images, in whole batches, whose missing outputs are computed together."""
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 0.01, torch.float64: 0.01}
"""Relative difference, in the Euclidean norm over one image's output, by which a stored output may
differ from the live one. On one machine there is none but the rounding of what is kept; another
one's arithmetic, or a compiler's, stays below."""


class Settings(NamedTuple):
    """What a recipe says of the store."""

    root: Path
    top_k: int | None = None
    """Logits kept of each image; None: all."""
    bits: int = 16
    """Of each number: 16 keeps what was computed in half precision as it is; 32 keeps all so."""
    gb: float = 20.0
    """What the outputs that a training needs may take on the disk."""


@dataclass
class Counts:
    """What a store did for a training. An image and view is one output of one teacher."""

    read: int = 0
    computed: int = 0
    damaged: int = 0
    """Rows that were not what was written, and were computed anew."""
    compared: int = 0
    """Stored outputs that were compared with the teacher's."""


class TeacherStore:
    """The kept outputs of one teacher: columns by name ("logits" and the taps a method reads)."""

    def __init__(
        self,
        name: str,
        teacher: Net,
        reads: Iterable[str],
        identity: Mapping[str, Any],
        how: Settings,
    ) -> None:
        self.name, self.teacher, self.how = name, teacher, how
        self.identity = dict(identity)
        self.key = key_of(self.identity)
        self.folder = how.root / f"{_plain(name)}-{self.key}"
        # whatever a method reads, all others read logits, which are the smallest
        self.outputs = ["logits", *sorted(set(reads) - {"logits"})]
        self.columns: dict[str, Column] = {}
        self.values: dict[str, Value] = {}
        if how.top_k is not None and not 1 <= how.top_k < teacher.num_classes:
            raise MethodError(
                f"store.top_k is {how.top_k}; the teacher has {teacher.num_classes} classes: give "
                f"1 to {teacher.num_classes - 1}, or null to keep all logits"
            )

    def row_bytes(self) -> int:
        """On the disk, of one image in one view."""
        half = torch.float32 if self.how.bits == 32 else torch.float16
        return sum(row_type(self._value(name, half).bytes).itemsize for name in self.outputs)

    def _value(self, name: str, dtype: torch.dtype) -> Value:
        if name == "logits" and self.how.top_k is not None:
            return TopK(self.how.top_k, self.teacher.num_classes, dtype)
        count = (self.teacher.num_classes,)
        shape = count if name == "logits" else tuple(self.teacher.shape_of(name))
        return Whole(name, shape, dtype, self.teacher.channels_last)

    def open(self, example: Captured, about: Mapping[str, Any]) -> None:
        """Find the columns, for outputs of the types that `example` has. Raises StorageError."""
        _describe(self.folder, self.name, self.identity)
        for name in self.outputs:
            self.values[name] = value = self._value(
                name, kept_in(_of(example, name), self.how.bits, self.identity.get("precision"))
            )
            place = self.teacher.taps.get(name)
            identity = {"store": self.key, "output": name, "place": place, **value.identity}
            folder = self.folder / f"{_plain(name)}-{key_of(identity)[:8]}"
            tidy(folder, value.bytes)
            self.columns[name] = Column(folder, identity, value.bytes)
            self.columns[name].about = dict(about)

    def compute(self, image: Tensor) -> Captured:
        """What the teacher says of up to a chunk of images, as if there were a whole one."""
        n, size = len(image), CHUNK[image.device.type]
        if n < size:
            image = torch.cat([image, image[-1:].expand(size - n, -1, -1, -1)])
        with torch.no_grad():
            found = self.teacher(image.contiguous(memory_format=self.teacher.memory_format))
        return Captured(found.logits[:n], {k: found.features[k][:n] for k in self.outputs[1:]})

    def encode(self, found: Captured) -> dict[str, Bytes]:
        """Bytes by output. n images -> each (n, bytes)"""
        return {name: v.encode(_of(found, name)) for name, v in self.values.items()}

    def decode(self, rows: Mapping[str, Bytes], device: torch.device) -> Captured:
        """What `encode` was given, to the precision that is kept."""
        found = {name: v.decode(rows[name], device) for name, v in self.values.items()}
        return Kept(in_full(found.pop("logits")), found)

    def compare(self, image: Tensor, rows: Mapping[str, Bytes]) -> None:
        """Raise StorageError where stored outputs are not what the teacher says of the images."""
        live = self.decode(self.encode(self.compute(image)), image.device)
        kept = self.decode(rows, image.device)
        for name in self.outputs:
            allowed = TOLERANCE[self.values[name].dtype]
            a, b = (_of(x, name).flatten(1).double() for x in (kept, live))
            if isinstance(self.values[name], TopK):  # of two that are equal, either may be kept
                a, b = a.softmax(1), b.softmax(1)
            apart = _apart(a, b)
            if not apart <= allowed:  # nor NaN
                raise StorageError(
                    f"the stored '{name}' of {self.name} is not what it says now: it differs by "
                    f"{apart:.3g} of its size, and {allowed:g} is allowed. Something changed that "
                    f"the store {self.folder.name} does not know of; delete it with `potstill "
                    f"store prune {self.folder.name}`, or set store=false"
                )


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest distance of two rows, of the size of the second. (n, D), (n, D)"""
    apart: float = ((a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-6)).max().item()
    return apart


class Kept(Captured):
    """What was kept of a teacher's outputs: what its method says that it reads."""

    def __getitem__(self, name: str) -> Tensor:
        """A feature by tap name, in full. Raises MethodError for one that is not kept."""
        if name not in self.features:
            raise MethodError(
                f"the method takes '{name}' of its teacher, which its `reads` does not name, so it "
                f"is not kept; it names {sorted(self.features) or 'logits alone'}"
            )
        return super().__getitem__(name)


def _of(found: Captured, name: str) -> Tensor:
    return found.logits if name == "logits" else found.features[name]


@dataclass
class _Entry:
    """A batch that is at hand or comes soon, and what is known of it."""

    batch: Batch
    index: Integers
    view: Integers
    version: int
    """Of the images: a method may not have changed them in place."""
    rows: list[dict[str, Bytes]] = field(default_factory=list)
    """By teacher and output."""
    good: list[dict[str, np.ndarray[Any, np.dtype[np.bool_]]]] = field(default_factory=list)
    """Which images' rows are there, likewise."""
    known: list[Integers] = field(default_factory=list)
    """By teacher, the images whose outputs were on the disk."""
    missing: list[Integers] = field(default_factory=list)
    """By teacher, the images whose outputs are still to compute."""
    ahead: int = 0
    """Outputs that were missing and have been computed."""
    captured: list[Captured] | None = None


class Stored:
    """The stores of a method's teachers, and the batches whose outputs are asked for."""

    def __init__(self, stores: Sequence[TeacherStore], about: Mapping[str, Any]) -> None:
        self.stores, self.about = list(stores), dict(about)
        self.counts = Counts()
        self.needed_bytes = 0.0
        """What a training keeps at most, as `require_room` found."""
        self._told: set[Path] = set()
        self._news: list[str] = []
        self._window: deque[_Entry] = deque()
        self._opened = self._fresh = False
        self._unchecked: set[int] = set()
        """Teachers of which nothing stored has been met since `supply` was called."""
        self._full = False

    def supply(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, of which it knows some that come later."""
        source, window = iter(batches), deque[_Entry]()
        self._fresh, self._unchecked = True, {*range(len(self.stores))}
        while True:
            while (
                not window or sum(len(e.index) for e in window) + len(window[-1].index) <= AHEAD
            ) and (batch := next(source, None)) is not None:
                index, view = batch.index.cpu().numpy(), batch.view.cpu().numpy()
                window.append(_Entry(batch, index, view, batch.image._version))
            if not window:
                return
            self._window = window
            yield window[0].batch
            window.popleft()

    def __call__(self, batch: Batch) -> list[Captured] | None:
        """Outputs of every teacher for the batch that `supply` gave last; None for another one.

        Those that are missing are computed, for several batches together, and kept. In every
        `supply` the first ones that are there are compared with what the teachers say. Raises
        StorageError where they differ, MethodError where a teacher says other things each time.
        """
        now = self._window[0] if self._window else None
        same = now is not None and all(
            getattr(batch, part) is getattr(now.batch, part) for part in ("image", "index", "view")
        )
        if now is None or not same or batch.image._version != now.version:
            return None  # other images, or images that were changed
        if now.captured is None:
            if self._fresh:
                self._begin(batch)
            for entry in self._window:
                if not entry.rows:
                    self._look_up(entry)
            self._fresh = False
            if self._unchecked:
                self._compare()
            absent = sum(map(len, now.missing))
            self.counts.computed += absent + now.ahead
            self.counts.read += len(now.index) * len(self.stores) - absent - now.ahead
            for t, store in enumerate(self.stores):
                while len(now.missing[t]):
                    self._compute(t, store)
            now.captured = [
                store.decode(rows, batch.image.device)
                for store, rows in zip(self.stores, now.rows, strict=True)
            ]
        return now.captured

    def close(self) -> None:
        """Give back what was reserved on the disk and not used."""
        for column in self._columns():
            column.close()

    def take_counts(self) -> Counts:
        """What was done since this was asked last."""
        taken, self.counts = self.counts, Counts()
        return taken

    def new_faults(self) -> list[str]:
        """Files that cannot be read or written, in words; each is told once."""
        found = {path: fault for c in self._columns() for path, fault in c.faults.items()}
        new = [fault for path, fault in found.items() if path not in self._told]
        self._told |= found.keys()
        written, self._news = self._news, []
        return new + written

    def require_room(self, images: int, views: int, times: float) -> None:
        """Raise StorageError where what a training would keep is too much.

        It trains on `images`, of which each is drawn `times` times in one of `views` views.
        """

        def distinct(views: int) -> float:
            never: float = (1 - 1 / views) ** times
            return images * views * (1 - never)

        how = self.stores[0].how
        row = sum(store.row_bytes() for store in self.stores)
        self.needed_bytes = size = distinct(views) * row
        kept = sum(
            path.stat().st_size
            for store in self.stores
            for path in store.folder.rglob(f"*{SUFFIX}")
        )
        free = shutil.disk_usage(files.existing(how.root)).free
        names = ", ".join(f"{s.name} ({', '.join(s.outputs)})" for s in self.stores)
        what = f"the stored outputs of {names} would take {files.in_bytes(size)}"
        rows = min(how.gb * 1e9, kept + free) / row
        fewer = bisect_right(range(1, views), rows, key=distinct)
        remedy = f"set data.views={fewer}, " if fewer else ""
        if size > how.gb * 1e9:
            raise StorageError(
                f"{what}, and store.gb is {how.gb:g}; {remedy}raise it, or leave the store off"
            )
        if size > kept + free:
            raise StorageError(
                f"{what}, and {files.in_bytes(free)} are free at {how.root}; {remedy}choose "
                "another disk with store.root, or leave the store off"
            )

    def _columns(self) -> Iterator[Column]:
        for store in self.stores:
            yield from store.columns.values()

    def _begin(self, batch: Batch) -> None:
        """Find the files, or take in what others have added to them."""
        if self._opened:
            for column in self._columns():
                column.refresh()
            return
        few = batch.image[: CHUNK[batch.image.device.type]]
        for t, store in enumerate(self.stores):
            found, again = store.compute(few), store.compute(few)
            for name in store.outputs:
                a, b = (_of(x, name).flatten(1).double() for x in (found, again))
                if _apart(a, b) > TOLERANCE[torch.bfloat16]:
                    raise MethodError(
                        f"the outputs of teacher {t} cannot be stored: it says another '{name}' of "
                        "the same images each time; leave the store off"
                    )
            store.open(found, self.about)
        self._opened = True

    def _look_up(self, entry: _Entry) -> None:
        for store in self.stores:
            found = {n: column.read(entry.index, entry.view) for n, column in store.columns.items()}
            entry.rows.append({name: f.value for name, f in found.items()})
            entry.good.append({name: f.good for name, f in found.items()})
            whole = np.logical_and.reduce([f.good for f in found.values()])
            entry.known.append(np.flatnonzero(whole))
            entry.missing.append(np.flatnonzero(~whole))
            self.counts.damaged += sum(f.damaged for f in found.values())

    def _compute(self, t: int, store: TeacherStore) -> None:
        """The next chunk of images that a teacher has not been asked about."""
        parts, room = [], CHUNK[self._window[0].batch.image.device.type]
        for entry in self._window:
            if len(taken := entry.missing[t][:room]):
                parts.append((entry, taken))
                entry.missing[t] = entry.missing[t][room:]
                entry.ahead += len(taken)
                room -= len(taken)
            if not room:
                break
        images = [
            e.batch.image if len(at) == len(e.index) else e.batch.image[at] for e, at in parts
        ]
        found = store.encode(store.compute(torch.cat(images) if len(images) > 1 else images[0]))
        start = 0
        for entry, at in parts:
            for name, column in store.columns.items():
                value = found[name][start : start + len(at)]
                new = ~entry.good[t][name][at]
                entry.rows[t][name][at] = value
                if not self._full:
                    self._keep(column, entry.index[at][new], entry.view[at][new], value[new])
            start += len(at)

    def _keep(self, column: Column, index: Integers, view: Integers, value: Bytes) -> None:
        """Append; where that is impossible, the training goes on without keeping more."""
        try:
            column.append(index, view, value)
        except StorageError as error:
            self._full = True
            self._news.append(f"{error}. The training goes on, and keeps no more outputs")

    def _compare(self) -> None:
        """Compare a chunk of what is stored with what the teachers say."""
        size = CHUNK[self._window[0].batch.image.device.type]
        for t in sorted(self._unchecked):
            store = self.stores[t]
            images: list[Tensor] = []
            rows: dict[str, list[Bytes]] = {name: [] for name in store.outputs}
            room = size
            for entry in self._window:
                known = entry.known[t][:room]
                if len(known):
                    images.append(entry.batch.image[known])
                    for name, value in entry.rows[t].items():
                        rows[name].append(value[known])
                    room -= len(known)
            if images:
                store.compare(torch.cat(images), {n: np.concatenate(p) for n, p in rows.items()})
                self.counts.compared += size - room
                self._unchecked.discard(t)


def stored(
    method: Method,
    names: Sequence[str],
    images: ImageSet,
    how: Settings,
    precision: str,
    compile: bool,
    about: Mapping[str, Any],
) -> Stored:
    """Stores for a method's teachers on a set of images. `names` are what teachers are called.

    `about` goes into every file that is written; `precision` is what teachers are autocast to.
    Raises DataError for images that cannot be told apart by (image, view), or of which no view
    would come twice.
    """
    whose = images.identity
    if whose is None:
        raise DataError(
            "teachers' outputs can be stored for images in files or bytes, not for a dataset that "
            "augments itself: nothing says what its code makes of an image; leave the store off"
        )
    if images.pool is None and len(images.codes) > 2**20:
        raise DataError(
            "these images are cropped at random, so no view comes twice and a stored output would "
            "never be read; set data.views=16, or leave the store off"
        )
    reads = method.reads
    stores = []
    for name, teacher in zip(names, method.teachers, strict=True):
        identity = {
            "format": FORMAT,
            "teacher": fingerprint(teacher),
            "stochastic": None if teacher.stochastic is None else dict(teacher.stochastic),
            "images": dict(whose),
            "precision": precision,
            "channels_last": teacher.channels_last,
            "compile": compile,
            "device": images.device.type,
            "torch": str(torch.__version__),
        }
        stores.append(TeacherStore(name, teacher, reads, identity, how))
    pool = None if images.pool is None else images.pool.shape[1]
    codes = [images.codes.start, images.codes.stop]
    return Stored(stores, {**about, "size": images.size, "codes": codes, "views": pool})


def fingerprint(net: Net) -> str:
    """SHA-256, in hex, of a network's layers, weights, buffers and normalisation.

    Of plain attributes and the code of its modules too, where that is not a library's.
    """
    total = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(net.module)).encode())
    for path, module in net.module.named_modules():
        kind = type(module)
        total.update(f"\x1f{path}\x1f{kind.__module__}.{kind.__qualname__}".encode())
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
        total.update(repr(sorted(plain.items())).encode())
    kinds = {f"{k.__module__}.{k.__qualname__}": k for k in map(type, net.module.modules())}
    for name, kind in sorted(kinds.items()):
        if name.partition(".")[0] not in ("potstill", "torch"):
            with suppress(OSError, TypeError):  # not all code has a source
                total.update(inspect.getsource(kind).encode())
    tensors = {
        **net.module.state_dict(),
        **dict(net.module.named_buffers()),  # those that are not saved too
        "scale of images": net.scale,
        "shift of images": net.shift,
    }
    for name, value in sorted(tensors.items()):
        if isinstance(value, Tensor) and not name.endswith("num_batches_tracked"):
            total.update(f"\x1f{name}\x1f{value.dtype}\x1f{tuple(value.shape)}\x1f".encode())
            total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def key_of(identity: Mapping[str, Any]) -> str:
    """A short name for what is equal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[-40:].strip("_.") or "teacher"


def _describe(folder: Path, name: str, identity: Mapping[str, Any]) -> None:
    """Write down whose outputs these are, once."""
    if (folder / ABOUT).exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.storage_error(folder, "made", error) from error
    files.write_json(folder / ABOUT, {"name": name, **identity})
