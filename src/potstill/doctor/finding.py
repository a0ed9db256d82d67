"""A finding, and how findings are shown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.text import Text

Level = Literal["ok", "warn", "fail"]

_STYLES: Mapping[Level, str] = {"ok": "green", "warn": "bold yellow", "fail": "bold red"}
_NAMES = 20
"""Columns that names take."""


class Finding(NamedTuple):
    """What one check found, and what to type where it is not as it should be."""

    name: str
    level: Level
    said: str
    fix: str = ""


def show(finding: Finding, console: Console) -> None:
    """Print a finding: level, name, what was found; below, what to do."""
    console.print(Text("\n").join(lines(finding, console.width)), soft_wrap=True)


def lines(finding: Finding, width: int) -> list[Text]:
    """A finding, wrapped. The level is a word in front, and coloured as well."""
    before = f"{finding.level:<5} {finding.name:<{_NAMES}} "
    margin = " " * len(before)
    found = _wrapped(finding.said, before, margin, width)
    if finding.fix:
        found += _wrapped(finding.fix, f"{margin}-> ", f"{margin}   ", width)
    first = Text(found[0])
    first.stylize(_STYLES[finding.level], 0, len(finding.level))
    return [first, *map(Text, found[1:])]


def _wrapped(text: str, before: str, margin: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, len(margin) + 40),
        initial_indent=before,
        subsequent_indent=margin,
        break_long_words=False,  # what is to be typed stays whole
        break_on_hyphens=False,
    )


def summary(findings: Sequence[Finding]) -> str:
    """ "12 ok, 1 warning, 0 failures"."""
    count = {level: sum(f.level == level for f in findings) for level in ("ok", "warn", "fail")}
    warned, failed = count["warn"], count["fail"]
    return (
        f"{count['ok']} ok, {warned} warning{'' if warned == 1 else 's'}, "
        f"{failed} failure{'' if failed == 1 else 's'}"
    )


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing fails."""
    return all(f.level != "fail" for f in findings)


def as_object(recipe: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """All of it for JSON."""
    return {
        "recipe": recipe,
        "findings": [f._asdict() for f in findings],
        "ok": healthy(findings),
    }


def in_one_line(error: Exception) -> str:
    """An error's message."""
    return " ".join(str(error).split())


def few(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
