"""Processes of their own, forked from one that has imported everything and computed nothing.

To import PyTorch, scikit-learn and the compiler takes a process seconds; a fork takes none of it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any

import pytest

from potstill import cli

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "sklearn.datasets", "torch._dynamo", "tests.ranks_worker", "tests.resume_worker"]
)


class Forked:
    """`target(*arguments)` in a process with one thread, held as subprocess.Popen holds one."""

    def __init__(
        self,
        target: Callable[..., None],
        *arguments: Any,
        env: Mapping[str, object] | None = None,
        cwd: Path = ROOT,
    ) -> None:
        """`env` is added to this process's environment. The target has to be importable."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setenv("OMP_NUM_THREADS", "1")  # read when the server imports PyTorch
            forkserver.ensure_running()
        self.files = [tempfile.TemporaryFile() for _ in ("output", "errors")]  # noqa: SIM115
        self.process = CONTEXT.Process(
            target=_begin,
            args=(
                [reduction.DupFd(file.fileno()) for file in self.files],
                {**os.environ, **{k: str(v) for k, v in (env or {}).items()}},
                cwd,
                target,
                arguments,
            ),
            daemon=True,  # ends with the tests
        )
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """Negative for a signal, None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Output and errors, once it has ended."""
        self.process.join(timeout)
        if self.returncode is None:
            self.process.kill()
            raise TimeoutError(f"it ran for more than {timeout} seconds")
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return texts[0], texts[1]


def _begin(
    files: list[Any],
    environment: Mapping[str, str],
    cwd: Path,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(file.detach(), number)
    os.environ.clear()
    os.environ.update({**environment, "OMP_NUM_THREADS": "1"})
    os.chdir(cwd)
    target(*arguments)


def potstill(*words: str) -> None:
    """What `python -m potstill WORDS` does."""
    sys.argv = ["potstill", *words]
    cli.main()
