"""Files that are whole or absent, and known by their sha256: bytes, JSON and tensors.

A file is written beside its place and renamed into it, so that a reader, a kill or a full disk
never meets half of one. Nothing here writes or reads pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from potstill.errors import StorageError

_REASONS = {  # what the system said, and what to do about it
    errno.ENOSPC: ("no space left on the device", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EFBIG: ("the file is too large for a limit", "raise `ulimit -f` or use another disk"),
    errno.EACCES: ("permission denied", "change the permissions or choose another folder"),
    errno.EPERM: ("the operation is not permitted", "change the owner or choose another folder"),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.ENOENT: ("there is no such file or folder", "check the path"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "check the path"),
    errno.EISDIR: ("it is a folder, not a file", "check the path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EMFILE: ("too many files are open", "raise `ulimit -n`"),
    errno.EIO: ("the device failed to read or write", "check the disk and its connection"),
}


def storage_error(path: str | Path, verb: str, error: OSError) -> StorageError:
    """A StorageError that says in words why `path` cannot be `verb` (written, read, made)."""
    said = os.strerror(error.errno) if error.errno else str(error)
    reason, remedy = _REASONS.get(error.errno or 0, (said, "check the disk and the path"))
    return StorageError(f"{path} cannot be {verb}: {reason}; {remedy}")


def in_bytes(count: float) -> str:
    """In words.

    >>> in_bytes(512), in_bytes(3_200_000), in_bytes(150e9)
    ('512 B', '3.2 MB', '150 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE mounts cannot sync a folder; the file in it is synced all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, data: bytes) -> str:
    """Write a file whole or not at all, flushed to the disk; returns its sha256 in hex.

    Raises StorageError, leaving what was there before and no temporary file.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, "written", error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return hashlib.sha256(data).hexdigest()


def read_bytes(path: str | Path, expected_sha256: str | None = None) -> bytes:
    """The content of a file. Raises StorageError when it is missing or its sha256 is another."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise storage_error(path, "read", error) from error
    if expected_sha256 is not None and hashlib.sha256(data).hexdigest() != expected_sha256:
        raise _damaged(path, "its sha256 is not the one recorded when it was written")
    return data


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file in hex, read in pieces. Raises StorageError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise storage_error(path, "read", error) from error


def encode_json(value: Any, indent: int | None = None) -> str:
    """Strict ASCII JSON that `decode_json` gives back: floats bit for bit, NaN and infinities too.

    JSON has no word for those three, so they become the strings "NaN", "Infinity", "-Infinity";
    a text that happens to be one of them gets a backslash in front. Tuples become lists.
    Raises TypeError, saying where, for anything else that JSON cannot hold.
    """
    return json.dumps(_to_json(value, "value"), indent=indent, allow_nan=False)


def decode_json(text: str | bytes) -> Any:
    """The value that `encode_json` was given. Raises ValueError when the text is not JSON."""
    return _from_json(json.loads(text))


def write_json(path: str | Path, value: Any) -> str:
    """Write a value as indented JSON, like `write_bytes`; returns the sha256 in hex."""
    return write_bytes(path, (encode_json(value, indent=2) + "\n").encode())


def read_json(path: str | Path, expected_sha256: str | None = None) -> Any:
    """The value in a JSON file. Raises StorageError when it is missing or damaged."""
    data = read_bytes(path, expected_sha256)
    try:
        return decode_json(data)
    except ValueError as error:
        raise _damaged(path, f"not JSON ({error})") from error


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file as bytes; equal contents give equal bytes.

    Every tensor is stored contiguous and by itself: tied weights are stored once per name, and
    the memory format is not kept, so a reader copies values into tensors that have the right one.
    Raises StorageError naming a tensor that the format cannot hold.
    """
    plain, storages = {}, set[int]()
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise StorageError("a tensor cannot be called __metadata__ in safetensors; rename it")
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.layout}, on {tensor.device}"
            raise StorageError(f'tensor "{name}" cannot be stored in safetensors: {kind}')
        # A conjugate or negated view is a flag that safetensors drops without a word.
        stored = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
        storage = stored.untyped_storage().data_ptr()
        plain[name] = stored.clone() if storage in storages else stored
        storages.add(storage)
    try:
        data = safetensors.torch.save(plain)
    except KeyError as error:
        names = [name for name, tensor in plain.items() if tensor.dtype == error.args[0]]
        raise StorageError(f"safetensors has no {error.args[0]}; convert {names}") from error
    # safetensors orders metadata at random, which would change the hash of equal contents.
    start = 8 + int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8:start])}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def decode_tensors(
    data: bytes, source: str | Path = "bytes"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file; `source` names it in errors.

    Raises StorageError when the bytes are not a whole safetensors file.
    """
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception as error:  # SafetensorError, KeyError (dtype), AssertionError, ValueError ...
        raise _damaged(source, f"not a whole safetensors file ({error})") from error
    return tensors, header.get("__metadata__") or {}


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> str:
    """Write a safetensors file, see `encode_tensors` and `write_bytes`; returns the sha256."""
    return write_bytes(path, encode_tensors(tensors, metadata))


def load_tensors(
    path: str | Path, expected_sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file.

    Raises StorageError when it is missing, truncated, or not what the sha256 says.
    """
    return decode_tensors(read_bytes(path, expected_sha256), path)


def _damaged(path: str | Path, how: str) -> StorageError:
    return StorageError(f"{path} is damaged: {how}; restore it from a copy or make it again")


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        # json.dumps would turn the key 1 into "1" without a word, and a resume would miss it.
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: JSON keys are strings, not {key!r}; use str(key)")
        return {key: _to_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str) and value.lstrip("\\") in _NOT_FINITE:
        return "\\" + value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{where}: JSON cannot hold a {type(value).__name__}; use a plain number")


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, str) and value.lstrip("\\") in _NOT_FINITE:
        return value[1:] if value.startswith("\\") else _NOT_FINITE[value]
    return value
