"""YAML 1.2 as recipes use it: plain mappings, lists and scalars, every oddity a fault in words."""

from __future__ import annotations

import re
from typing import Any

import yaml

_CORE = "tag:yaml.org,2002:"
# YAML 1.2's scalars. PyYAML's own are 1.1's, where 5e-4 is text, 010 is 8, `no` is false and 1:30
# is 90. The loader and the dumper must agree, or text that looks like a number would be unquoted.
_RESOLVERS: list[tuple[str, str, str]] = [
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
]


class Loader(yaml.SafeLoader):
    """Plain mappings, lists and scalars only; duplicate keys are collected as faults."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012  # starts empty, not with PyYAML's own

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.faults: list[str] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            what = f"the alias *{event.anchor}"
        elif event.tag is not None:
            what = f"the tag {event.tag.replace(_CORE, '!!')}"
        else:
            return super().compose_node(parent, index)
        raise yaml.MarkedYAMLError(
            problem=f"{what} is not allowed in a recipe; write the value itself, in quotes if it "
            "is text",
            problem_mark=event.start_mark,
        )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != f"{_CORE}str":
                raise yaml.MarkedYAMLError(
                    problem="a key must be text; put it in quotes", problem_mark=key.start_mark
                )
            if key.value in seen:
                self.faults.append(
                    f"line {line}: {key.value} is given again, after line {seen[key.value]}; "
                    "keep one"
                )
            seen[key.value] = line
        return {k.value: self.construct_object(v, deep=True) for k, v in node.value}


class Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: Any = {}  # noqa: RUF012  # starts empty, not with PyYAML's own

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            _CORE + _tag,
            re.compile(f"(?:{_pattern})$"),
            ["" if c == "\0" else c for c in _first],
        )


_PROBLEMS = (  # what PyYAML says, and what a person can do about it
    ("<stream end>", "the text ends inside [...] or {...}; close the bracket"),
    ("expected ',' or", "a comma or a closing bracket is missing before this place"),
    ("unexpected end of stream", "the text ends inside quotes; close them"),
    ("<block end>", "this line does not belong to what is above it; check the indentation"),
    (r"'\t' that cannot start", "a tab; indent with spaces"),
    ("cannot start any token", "text cannot begin with this character; put the text in quotes"),
    ("mapping values are not allowed", "a second ': ' on the line; put the text in quotes"),
    ("could not find expected ':'", "a key without ': '; write key: value"),
    ("another document", "a second document (---); a recipe is a single one"),
    ("expected alphabetic or numeric", "text cannot begin with * or &; put it in quotes"),
)


def parse(text: str) -> tuple[Any, list[str]]:
    """The value of YAML text, and what is wrong with it."""
    try:
        loader = Loader(text)
        return loader.get_single_data(), loader.faults
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = next((w for p, w in _PROBLEMS if p in (error.problem or "")), error.problem)
        return None, [f"{place}{problem}"]
    except yaml.reader.ReaderError as error:
        code = f"U+{error.character:04X}"
        return None, [f"character {error.position + 1} ({code}) is not allowed in YAML; remove it"]
    except RecursionError:
        return None, ["mappings and lists are nested too deeply"]
    except ValueError:  # from int(), which refuses thousands of digits
        return None, ["a number has too many digits"]
