"""What tests of several files are given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from potstill import cli


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
