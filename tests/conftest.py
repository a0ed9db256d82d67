"""What tests of several files are given."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from potstill import cli

# torch.compile then believes /proc/cpuinfo; to try each instruction set out takes it eight seconds
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


@pytest.fixture
def potstill(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in an empty folder; (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["potstill", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output, errors = capfd.readouterr()
        assert "Traceback" not in errors
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), output, errors

    return run


@pytest.fixture
def ready_kernels() -> Iterator[None]:
    """What is compiled calls PyTorch's kernels; to generate others takes g++ a second for each."""
    from torch._inductor import config  # loads the compiler: seconds

    with config.patch(fallback_by_default=True):
        yield
