"""Where a named data set may lie: a folder that is given, POTSTILL_DATA, or the hub's copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from potstill.data.cache import Decoded
from potstill.errors import StorageError, first_line

TIMEOUT = 5.0
"""Seconds that the hub has for its first answer."""

Pair = tuple[Decoded, Decoded]
"""Training and test images."""
Reader = Callable[[Path], Callable[[], Pair] | None]
"""How to read what a folder holds; None where that is not the data set."""


def find(
    title: str,
    root: Path | None,
    reader: Reader,
    *,
    looked_for: str,
    repo: str,
    files: str,
    such_as: str = "",
) -> Pair:
    """A data set from `root`, else POTSTILL_DATA, else the hub's dataset `repo`.

    `looked_for` says what would be recognised, `files` is a pattern of the hub's files. Raises
    StorageError, naming every place that was looked at, where none of them holds it.
    """
    if root is not None:
        if (read := reader(root)) is None:
            raise StorageError(
                f"no {title} in data.root '{root}'; looked there for {looked_for}. Correct "
                "data.root, or leave it out to use POTSTILL_DATA or a download"
            )
        return read()
    variable = os.environ.get("POTSTILL_DATA")
    if variable and (read := reader(Path(variable).expanduser())) is not None:
        return read()
    fault = "no parquet files there"
    read = None
    try:
        read = reader(_from_hub(repo, files, reader))
    except Exception as raised:  # each version of the hub's client has its own
        fault = f"{type(raised).__name__}: {first_line(raised)}"
    if read is not None:
        return read()
    looked = f"in POTSTILL_DATA '{variable}'" if variable else "POTSTILL_DATA (not set)"
    raise StorageError(
        f"{title} was not found.\n  - data.root: not given\n  - {looked}: {looked_for}\n"
        f"  - the Hugging Face hub, {repo}: {fault}\n"
        f"Set data.root=FOLDER or POTSTILL_DATA=FOLDER to one that holds it{such_as}, or go "
        "online once"
    )


def _from_hub(repo: str, files: str, reader: Reader) -> Path:
    """Folder with the hub's parquet files: the local copy, or else a download."""
    import huggingface_hub as hub

    def fetch(local: bool) -> Path:
        return Path(
            hub.snapshot_download(
                repo, repo_type="dataset", allow_patterns=files, local_files_only=local
            )
        )

    try:
        if reader(found := fetch(local=True)) is not None:
            return found
    except FileNotFoundError:
        pass
    hub.HfApi().dataset_info(repo, timeout=TIMEOUT)  # fails at once where a download would retry
    return fetch(local=False)
