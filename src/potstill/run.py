"""A run: the folder that repeats, resumes and reports one training.

    recipe.yaml                 the resolved recipe
    env.json                    versions, hardware and command line that started it
    metrics.jsonl               one JSON object a line, appended while training
    checkpoints/000001200/      tensors.safetensors, state.json, manifest.json; the newest two
    student.safetensors         one file per predictor
    result.json                 written last, with the sha256 of every predictor

A checkpoint is whole or absent: its files are flushed to the disk, the manifest with their
hashes last, and then the folder is renamed into place.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from potstill import files
from potstill.errors import PotstillError, StorageError, did_you_mean

RECIPE, ENVIRONMENT, METRICS, RESULT = "recipe.yaml", "env.json", "metrics.jsonl", "result.json"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT = 1  # of a checkpoint


class RunWarning(UserWarning):
    """Something in a run's folder was damaged and could be worked around."""


@dataclass(frozen=True)
class Checkpoint:
    """A training as it was after `step` steps."""

    step: int
    tensors: dict[str, Tensor]  # contiguous, on the CPU
    state: dict[str, Any]
    metrics_bytes: int  # length of metrics.jsonl at that moment


class Run:
    """One training's folder, or the same in memory when `directory` is None.

    Made by `Run.create` or `Run.open`. In memory everything works alike, but checkpoints are
    not kept.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._memory: dict[str, bytearray] = {}
        self._predictors: dict[str, str] = {}  # sha256 of those saved by this process, by file
        self.students: list[nn.Module] = []
        """The trained modules from images to logits, where this process trained them."""

    @classmethod
    def create(
        cls, directory: str | Path | None, recipe: str, environment: Mapping[str, Any]
    ) -> Run:
        """A new run. Raises PotstillError when the folder holds one, StorageError on the disk's."""
        run = cls(None if directory is None else Path(directory))
        if run.directory is not None:
            cls.require_absent(run.directory)
            try:
                run.directory.mkdir(parents=True, exist_ok=True)
                files.sync_folder(run.directory.parent)
            except OSError as error:
                raise files.storage_error(run.directory, "made", error) from error
        run._write(ENVIRONMENT, files.encode_json(environment, indent=2).encode() + b"\n")
        # The recipe marks a run, so it comes last: a creation cut short can simply be repeated.
        run._write(RECIPE, recipe.encode())
        run._write(METRICS, b"")
        return run

    @staticmethod
    def require_absent(directory: str | Path) -> None:
        """Raises PotstillError when the folder already holds a run."""
        for name in (RECIPE, METRICS, CHECKPOINTS, RESULT):
            if os.path.exists(os.path.join(directory, name)):
                raise PotstillError(
                    f"{directory} already holds a run ({name}): continue it with --resume, or "
                    "choose another folder with --out"
                )

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """An existing run. Raises PotstillError when the folder is not one."""
        directory = Path(directory)
        if not (directory / RECIPE).is_file():
            what = f"it has no {RECIPE}" if directory.is_dir() else "there is no such folder"
            inside = sorted(str(found.parent) for found in directory.glob(f"*/{RECIPE}"))
            hint = f"; runs inside it: {', '.join(inside)}" if inside else "; check the path"
            raise PotstillError(f"{directory} is not a run: {what}{hint}")
        return cls(directory)

    @property
    def student(self) -> nn.Module:
        """The trained student. Raises PotstillError for a run that this process only opened."""
        if not self.students:
            raise PotstillError("this run was not trained here; load_predictor() reads its weights")
        return self.students[0]

    @property
    def recipe(self) -> str:
        """The resolved recipe, as text."""
        try:
            return self._read(RECIPE).decode()
        except UnicodeDecodeError as error:
            raise StorageError(f"{self._path(RECIPE)} is damaged: {error}") from error

    @property
    def environment(self) -> dict[str, Any]:
        """What `create` was given: versions, hardware, settings."""
        return self._read_object(ENVIRONMENT)

    @contextmanager
    def locked(self, wanted: bool = True) -> Iterator[None]:
        """Nobody else trains into this folder meanwhile. Raises PotstillError where somebody does.

        The system lets go of the lock when the process ends, however it ends.
        """
        if self.directory is None or not wanted:
            yield
            return
        with locked(
            self.directory / LOCK,
            f"another process is training into {self.directory}; wait for it, or choose another "
            "folder with --out",
        ):
            yield

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, flushed to the disk. Raises StorageError.

        NaN and infinities are kept (`files.encode_json`). What a killed process left of its
        last line is cut off first; a line that cannot be written whole is taken back.
        """
        line = files.encode_json(record).encode() + b"\n"
        if self.directory is None:
            self._memory[METRICS] += line
            return
        try:
            # Unbuffered: a buffer would try to write the rest of a failed line when it is closed.
            with open(self.directory / METRICS, "a+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    file.seek(0)
                    end = len(_whole_lines(file.read()))
                    file.truncate(end)
                try:
                    while line:
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise files.storage_error(self.directory / METRICS, "written", error) from error

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Every record appended so far, read again; a half-written last line is left out.

        Raises StorageError naming the file and the line when another one is damaged.
        """
        records = []
        for number, line in enumerate(_whole_lines(self._read_metrics()).splitlines(), 1):
            try:
                records.append(files.decode_json(line))
            except ValueError as error:
                where = f"{self._path(METRICS)}, line {number},"
                raise StorageError(f"{where} is damaged ({error}); delete that line") from error
        return records

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Keep a training as it is after `step` steps, and delete all but the newest two.

        `state` holds what JSON holds; its floats come back bit for bit. Checkpoints of later steps
        belong to a course that was rewound and are deleted too.
        Raises StorageError; the checkpoints that were there are then untouched.
        """
        if self.directory is None:
            return
        folder = self.directory / CHECKPOINTS
        target = folder / f"{step:09d}"
        temporary = folder / f".tmp-{step}-{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            hashes = {
                TENSORS: files.save_tensors(temporary / TENSORS, tensors, {}),
                STATE: files.write_json(temporary / STATE, state),
            }
            manifest = {
                "format": FORMAT,
                "step": step,
                "metrics_bytes": len(_whole_lines(self._read_metrics())),
                "files": {
                    name: {"sha256": sha256, "bytes": (temporary / name).stat().st_size}
                    for name, sha256 in hashes.items()
                },
            }
            files.write_json(temporary / MANIFEST, {**manifest, "sha256": _digest(manifest)})
            if target.exists():
                # A folder cannot replace a full one. `latest_checkpoint` also reads the .old
                # one, so that a kill between the two renames loses nothing.
                retired = target.with_suffix(".old")
                shutil.rmtree(retired, ignore_errors=True)
                os.rename(target, retired)
            os.rename(temporary, target)
            files.sync_folder(folder)
        except (OSError, StorageError) as error:
            if isinstance(error, OSError):
                error = files.storage_error(target, "written", error)
            raise StorageError(
                f"the checkpoint of step {step} was not saved: {error}. "
                "Earlier checkpoints are untouched: --resume continues from them"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _prune(folder, step)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None when there is none at all.

        Damaged ones are passed over with a RunWarning naming the file. Raises StorageError when
        there are checkpoints and none is whole.
        """
        if self.directory is None:
            return None
        faults: list[str] = []
        for folder in sorted(_checkpoints(self.directory / CHECKPOINTS), key=_age):
            try:
                checkpoint = _read_checkpoint(folder)
            except StorageError as error:
                faults.append(str(error))
                continue
            for fault in faults:
                warnings.warn(
                    f"{fault}. Using the checkpoint of step {checkpoint.step} instead",
                    RunWarning,
                    stacklevel=2,
                )
            return checkpoint
        if faults:
            raise StorageError("\n".join(["no checkpoint is whole, start a new run:", *faults]))
        return None

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Cut metrics.jsonl back to what it was at a checkpoint, or at the start for None.

        Raises StorageError.
        """
        if self.directory is None:
            return
        path = self.directory / METRICS
        have = len(self._read_metrics())
        if checkpoint is None:
            checkpoint = Checkpoint(0, {}, {}, 0)
        if have < checkpoint.metrics_bytes:
            # Extending it would fill it with zeros; the training itself needs none of it.
            warnings.warn(
                f"{path} has {have} bytes, fewer than the {checkpoint.metrics_bytes} at step "
                f"{checkpoint.step}: records are missing; the training goes on without them",
                RunWarning,
                stacklevel=2,
            )
            return
        try:
            with open(path, "r+b") as file:
                file.truncate(checkpoint.metrics_bytes)
                os.fsync(file.fileno())
        except OSError as error:
            raise files.storage_error(path, "cut", error) from error

    def save_predictor(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> None:
        """Write <name>.safetensors; `metadata` values are stored as JSON. Raises StorageError."""
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise PotstillError(f'"{name}" cannot name a predictor: use letters, digits, . _ -')
        encoded = {key: files.encode_json(value) for key, value in metadata.items()}
        file = f"{name}.safetensors"
        self._predictors[file] = self._write(file, files.encode_tensors(tensors, encoded))

    def load_predictor(self, name: str = "student") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata of a predictor, verified against the hash in result.json.

        Raises PotstillError for a name that the run does not have, StorageError for a damaged file.
        """
        recorded = {**(self.result or {}).get("files", {}), **self._predictors}
        names = [file.removesuffix(".safetensors") for file in recorded]
        if name not in names:
            if not self.finished:
                raise PotstillError(f"{self._path('')} has not finished: continue it with --resume")
            hint = did_you_mean(name, names) if name != "student" else ""  # that nobody named
            several = f" (RUN:{names[0]} names one)" if len(names) > 1 else ""
            has = f"{', '.join(names)}{several}"
            raise PotstillError(f'no predictor "{name}"; this run has {has}{hint}')
        file = f"{name}.safetensors"
        data = self._read(file, recorded[file])
        tensors, metadata = files.decode_tensors(data, self._path(file))
        return tensors, {key: files.decode_json(value) for key, value in metadata.items()}

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json: `result`, and under "files" the sha256 of every predictor's file."""
        found = dict(self._predictors)
        if self.directory is not None:  # a resumed run may have saved some before it was killed
            for path in sorted(self.directory.glob("*.safetensors")):
                found.setdefault(path.name, files.sha256_of(path))
            for path in self.directory.glob(".tmp-*"):  # left by a process that was killed
                path.unlink(missing_ok=True)
        text = files.encode_json({**result, "files": found}, indent=2)
        self._write(RESULT, text.encode() + b"\n")

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None for a run that has not finished."""
        return self._read_object(RESULT) if self.finished else None

    @property
    def finished(self) -> bool:
        """Whether result.json is there."""
        if self.directory is None:
            return RESULT in self._memory
        return (self.directory / RESULT).exists()

    def _path(self, name: str) -> str:
        return (
            f"in-memory {name or 'run'}" if self.directory is None else str(self.directory / name)
        )

    def _write(self, name: str, data: bytes) -> str:
        if self.directory is not None:
            return files.write_bytes(self.directory / name, data)
        self._memory[name] = bytearray(data)
        return hashlib.sha256(data).hexdigest()

    def _read(self, name: str, expected_sha256: str | None = None) -> bytes:
        if self.directory is not None:
            return files.read_bytes(self.directory / name, expected_sha256)
        return bytes(self._memory[name])

    def _read_metrics(self) -> bytes:
        if self.directory is not None and not (self.directory / METRICS).exists():
            return b""  # killed while it was created, or deleted by hand
        return self._read(METRICS)

    def _read_object(self, name: str) -> dict[str, Any]:
        try:
            value = files.decode_json(self._read(name))
        except ValueError as error:
            raise StorageError(f"{self._path(name)} is damaged: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise StorageError(f"{self._path(name)} is damaged: not a JSON object")
        return value


def describe_environment(device: str | torch.device = "cpu", **settings: Any) -> dict[str, Any]:
    """What a run depends on beside its recipe, for env.json.

    `settings` are added as they are; `differences` knows precision, compile and world_size.
    """
    device = torch.device(device)
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "potstill": _version("potstill"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": _version("numpy"),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type + name,
        "git": _git_commit(),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        **settings,
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What keeps a resumed run from repeating bit for bit, one sentence each.

    Takes two results of `describe_environment`; what neither recorded is not compared.
    """
    labels = {
        "potstill": "the Potstill version",
        "torch": "the PyTorch version",
        "threads": "the number of PyTorch threads",
        "device": "the device",
        "cpu": "the CPU model",
        "precision": "the precision",
        "compile": "the compile setting",
        "world_size": "the number of ranks",
    }
    return [
        f"{label} was {old.get(key, 'not recorded')} and is now {new.get(key, 'not recorded')}."
        for key, label in labels.items()
        if old.get(key) != new.get(key)
    ]


@contextmanager
def locked(path: Path, message: str) -> Iterator[IO[str]]:
    """A file that one process alone has open in this way; PotstillError(message) for the others.

    Processes that inherit the open file hold it too. The system lets go of it when they have ended,
    however they end. Not every system has such locks: where there are none, nobody is kept out.
    """
    with open(path, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise PotstillError(message) from error
        yield file


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(files.encode_json(manifest).encode()).hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.exists():
        return []
    try:  # not glob: a folder that cannot be read must not look like one without checkpoints
        return [path for path in folder.iterdir() if re.fullmatch(r"\d{9,}(\.old)?", path.name)]
    except OSError as error:
        raise files.storage_error(folder, "read", error) from error


def _age(checkpoint: Path) -> tuple[int, bool]:
    """Sorts the newest first; of one step, the one that was replaced comes after."""
    return -int(checkpoint.stem), checkpoint.suffix == ".old"


def _read_checkpoint(folder: Path) -> Checkpoint:
    manifest = files.read_json(folder / MANIFEST)
    recorded = manifest.pop("sha256", None) if isinstance(manifest, dict) else None
    if recorded is None or recorded != _digest(manifest):
        raise StorageError(f"{folder / MANIFEST} is damaged: it is not what was written")
    if manifest["format"] != FORMAT:
        raise StorageError(
            f"{folder} has checkpoint format {manifest['format']}, this version reads {FORMAT}: "
            "use the version of Potstill in env.json"
        )
    if manifest["step"] != int(folder.stem):
        raise StorageError(f"{folder} holds step {manifest['step']}: give it back its name")
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    tensors, _ = files.load_tensors(folder / TENSORS, hashes[TENSORS])
    state = files.read_json(folder / STATE, hashes[STATE])
    return Checkpoint(manifest["step"], tensors, state, manifest["metrics_bytes"])


def _prune(folder: Path, step: int) -> None:
    """Keep the checkpoint of `step` and the one before; leave what is not ours alone."""
    found = _checkpoints(folder)
    before = max((int(path.stem) for path in found if int(path.stem) < step), default=step)
    keep = {f"{step:09d}", f"{before:09d}"}
    for path in [*found, *folder.glob(".tmp-*")]:
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
