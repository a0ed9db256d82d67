"""All stores of a folder: what they hold, whether it is whole, and their removal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from potstill import files
from potstill.data.cache import cache_folder
from potstill.data.split import pool_of
from potstill.errors import PotstillError, StorageError, did_you_mean
from potstill.teacher_store.rows import SUFFIX, Column, read_header
from potstill.teacher_store.store import ABOUT, key_of


def default_root() -> Path:
    """Where stores are, unless a recipe says otherwise: below POTSTILL_CACHE."""
    return cache_folder() / "teachers"


@dataclass(frozen=True)
class Output:
    """One output in a store."""

    name: str
    kept: str
    """How: "bfloat16", or "bfloat16, top 10"."""
    column: Column
    training: dict[str, Any]
    """What the newest file says of the training that wrote it."""

    @property
    def views(self) -> int:
        """That such a training draws from, for each image."""
        start, stop = self.training["codes"]
        return int(self.training["views"] or stop - start)

    @property
    def images(self) -> int:
        """Of such a training."""
        return int(self.training["training_images"])

    @cached_property
    def share(self) -> float:
        """Of the views of that training's images, those that are there."""
        every = self.views * self.images
        if self.training["views"] is None:
            return min(1.0, len(self.column) / every)  # clean views of other images may be there
        size = self.training["size"]
        pool = pool_of(size, range(*self.training["codes"]), self.views)
        index = np.repeat(np.arange(size), self.views)
        there: int = (self.column.find(index, pool.flatten().numpy()) >= 0).sum()
        return min(1.0, there / every)

    def hit_rate(self, epochs: int) -> float:
        """Of what a training of so many epochs asks for, the share expected to be there already.

        Of one like the newest, which draws a view of each image anew in every epoch; what it
        computes itself and meets again counts.
        """
        stays: float = 1 - 1 / self.views
        later: float = (1 - stays**epochs) / (epochs * (1 - stays))
        expected: float = 1 - (1 - self.share) * later
        return expected


@dataclass(frozen=True)
class Shelved:
    """One store on the disk."""

    folder: Path
    about: dict[str, Any]
    """Whose outputs they are; empty where that cannot be read."""
    outputs: list[Output]
    faults: dict[Path, str]
    """Files that cannot be read, and why."""
    bytes: int
    used: float
    """When it was last written to, in seconds since the epoch."""


def find(root: Path, names: Sequence[str] = ()) -> list[Shelved]:
    """The stores below `root`, or some by name. Raises PotstillError for a name it has not."""
    # of one that was deleted while a training wrote into it, rows alone may be there
    marks = [*root.glob(f"*/{ABOUT}"), *(p.parent for p in root.glob(f"*/*/*{SUFFIX}"))]
    there = sorted({mark.parent for mark in marks})
    known = {folder.name: folder for folder in there}
    for name in names:
        if name not in known:
            raise PotstillError(
                f"there is no store '{name}' in {root}{did_you_mean(name, known) or ';'} "
                f"it has {', '.join(known) or 'none'}"
            )
    return [_read(folder) for folder in there if not names or folder.name in names]


def _read(folder: Path) -> Shelved:
    outputs: list[Output] = []
    faults: dict[Path, str] = {}
    about: dict[str, Any] = {}
    try:
        about = files.read_json(folder / ABOUT)
        identity = {key: value for key, value in about.items() if key != "name"}
        if not folder.name.endswith(key_of(identity)):
            raise StorageError(f"{folder / ABOUT} is damaged: it is not what was written")
    except StorageError as error:
        faults[folder / ABOUT] = str(error)
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        headers = []
        for path in sorted(place.glob(f"*{SUFFIX}")):
            try:
                headers.append(read_header(path))
            except StorageError as error:
                faults[path] = str(error)
        if headers:
            outputs.append(_output(place, headers[-1]))
            faults |= outputs[-1].column.faults
    size, used = 0, 0.0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a training may be at work
            known = path.stat()
            if path.is_file():
                size, used = size + known.st_blocks * 512, max(used, known.st_mtime)
    return Shelved(folder, about, outputs, faults, size, used)


def _output(place: Path, header: dict[str, Any]) -> Output:
    identity = {key: header[key] for key in header["identity"]}
    kept = header["type"] + (f", top {header['top_k']}" if "top_k" in header else "")
    return Output(header["output"], kept, Column(place, identity, header["bytes"]), header)


def verify(store: Shelved) -> Iterator[tuple[Path, int, int]]:
    """Every readable file with its rows, and how many of them are not what was written."""
    for output in store.outputs:
        yield from output.column.damaged()


def prune(store: Shelved, damaged: bool = False) -> tuple[list[Path], int]:
    """Delete a store, or its `damaged` files alone; what was deleted, and the bytes.

    Runs that read it go on: what they have mapped stays until they end. Raises StorageError.
    """
    try:
        if not damaged:
            shutil.rmtree(store.folder)
            return [store.folder], store.bytes
        wrong = [*store.faults, *(path for path, _, bad in verify(store) if bad)]
        wrong, freed = [path for path in wrong if path.exists()], 0
        for path in wrong:
            freed += path.stat().st_blocks * 512
            path.unlink(missing_ok=True)
        return wrong, freed
    except OSError as error:
        raise files.storage_error(error.filename or store.folder, "deleted", error) from error


def describe(stores: Sequence[Shelved], epochs: int) -> list[str]:
    """What stores hold, for a person; `epochs` are those of the run whose hit rate is told."""
    lines = []
    for store in stores:
        about = store.about
        said = [about.get(key, "unknown") for key in ("name", "precision", "device")]
        said += ["compiled"] if about.get("compile") else []
        lines.append(f"{store.folder.name}: {', '.join(said)}, {files.in_bytes(store.bytes)}")
        for output in store.outputs:
            views = "1 view" if output.views == 1 else f"{output.views} views"
            share, later = 100 * output.share, 100 * output.hit_rate(epochs)
            over = f", {later:.1f} % over {epochs} epochs" if epochs > 1 else ""
            lines += [
                f"  {output.name} ({output.kept}): {len(output.column):,} outputs, {share:.1f} % "
                f"of {views} of {output.images:,} images of {output.training['data']}",
                f"    a run like the last finds {share:.1f} % in its first epoch{over}",
            ]
        lines += [f"  fault: {fault}" for fault in store.faults.values()]
    return lines


def as_objects(stores: Sequence[Shelved], epochs: int) -> list[dict[str, Any]]:
    """What `describe` tells, for JSON."""
    return [
        {
            "name": store.folder.name,
            "folder": str(store.folder),
            "bytes": store.bytes,
            "teacher": store.about.get("name"),
            "identity": {k: v for k, v in store.about.items() if k != "name"},
            "faults": list(store.faults.values()),
            "outputs": [
                {
                    "output": output.name,
                    "kept": output.kept,
                    "entries": len(output.column),
                    "views": output.views,
                    "training_images": output.images,
                    "data": output.training["data"],
                    "share": output.share,
                    "hit_rate": output.hit_rate(epochs),
                    "epochs": epochs,
                }
                for output in store.outputs
            ],
        }
        for store in stores
    ]
