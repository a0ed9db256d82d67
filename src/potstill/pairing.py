"""Which features of the student are compared with which of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from potstill.errors import MethodError, TapError, by
from potstill.method import Method
from potstill.net import Net

Role = Literal["student", "teacher"] | int
"""The student, the teacher, or one of several students by number."""
Form = Literal["", "pre", "post"]
Shape = tuple[int, int, int]


class Pair(NamedTuple):
    """A student's feature map and the teacher's that it is compared with."""

    student: str
    """Its tap; likewise the teacher's."""
    teacher: str
    shape: Shape
    """(C, H, W) of the student's map."""
    teacher_shape: Shape


def network(method: Method, role: Role) -> Net:
    """The first student, the first teacher, or the student of that number."""
    if role == "teacher":
        return method.teachers[0]
    return method.nets[0 if role == "student" else role]


def called(role: Role) -> str:
    """A role in words: "the student", "student 1"."""
    return f"student {role}" if isinstance(role, int) else f"the {role}"


def feature_shape(method: Method, role: Role, tap: str, argument: str) -> torch.Size:
    """Shape of a feature without the batch axis.

    Raises TapError, with the taps that exist, naming the role and the argument that chooses it.
    """
    try:
        return network(method, role).shape_of(tap)
    except TapError as error:
        raise TapError(f"{called(role)}: {error}; choose {_example(argument)}") from None


def map_shape(method: Method, role: Role, tap: str, argument: str) -> Shape:
    """(C, H, W) of a feature map. Raises TapError as above, MethodError for what is no map."""
    shape = feature_shape(method, role, tap, argument)
    if len(shape) != 3:
        raise MethodError(
            f"{type(method).__name__} needs feature maps (C, H, W), but '{tap}' of {called(role)} "
            f"is {tuple(shape)}; choose {_example(argument)} before the pooling"
        )
    return (shape[0], shape[1], shape[2])


def last_map(method: Method, role: Role, tap: str | None, argument: str) -> tuple[str, Shape]:
    """Name and (C, H, W) of the last feature map, the one that is pooled, or of the tap given."""
    if tap is None:
        net = network(method, role)
        found = ("last",) if "last" in net.shapes else net.stages("post")
        if not found:
            raise nothing_to_compare(method, role, argument)
        tap = found[-1]
    return tap, map_shape(method, role, tap, argument)


def nothing_to_compare(
    method: Method, role: Role, argument: str, given: bool = False
) -> MethodError:
    """What to raise where a network has no stages, or an empty list of taps was `given`."""
    name, shapes = type(method).__name__, network(method, role).shapes
    if given:
        return MethodError(f"{name} compares feature maps, and {argument} is empty")
    maps = sorted(tap for tap, shape in shapes.items() if len(shape) == 3)
    if maps:
        return MethodError(
            f"{name} compares feature maps, and no stages of {called(role)} are known; choose "
            f"{_example(argument)} among {maps}"
        )
    other = "reads the vector 'embed': rkd, crd" if method.teachers else "needs none: dml"
    return MethodError(
        f"{name} compares feature maps (C, H, W), and {called(role)} has none among its taps "
        f"{sorted(shapes)}; name one with Net(..., taps=...), or use a method that {other}"
    )


def stage_pairs(
    method: Method,
    taps: Sequence[str] | None = None,
    teacher_taps: Sequence[str] | None = None,
    *,
    form: Form = "",
    teacher_form: Form = "",
    by: Literal["order", "size"] = "order",
    fewest: int = 1,
) -> list[Pair]:
    """Feature maps to compare, in forward order: the taps given, or else the stages.

    Stages are read before ("pre") or after ("post") their activation where a form says so and the
    network has it. By order, the first stage meets the first and so on, if there are as many on
    both sides; else, and always by size, maps meet that are equally high and wide, the deepest
    first. Where `taps` are given alone, the teacher's have the same names; in the teacher's form,
    if that is another one than the student's.

    Raises TapError and MethodError for taps that do not exist, are no maps, cannot be paired or are
    fewer than `fewest`, and for a pair that is named twice.
    """
    name, (student, teacher) = type(method).__name__, (method.student, method.teachers[0])
    if taps is None and teacher_taps is None:
        own, theirs = student.stages(form), teacher.stages(teacher_form)
        given = False
    else:
        own = tuple(student.stages(form) if taps is None else taps)
        suffix = "" if form == teacher_form else f":{teacher_form}"
        named = [f"{tap}{suffix}" for tap in own]
        same = [f if f in teacher.shapes else tap for f, tap in zip(named, own, strict=True)]
        theirs = tuple(same if teacher_taps is None else teacher_taps)
        given = True
        if len(own) != len(theirs):
            raise MethodError(
                f"{name} pairs taps with teacher_taps, but there are {len(own)} and "
                f"{len(theirs)}; name as many on both sides"
            )
    for role, names, argument in (("student", own, "taps"), ("teacher", theirs, "teacher_taps")):
        if not names:
            raise nothing_to_compare(method, role, argument, given)  # type: ignore[arg-type]
    shapes = [map_shape(method, "student", tap, "taps") for tap in own]
    teacher_shapes = [map_shape(method, "teacher", tap, "teacher_taps") for tap in theirs]
    if given or (by == "order" and len(own) == len(theirs)):
        chosen = list(zip(range(len(own)), range(len(own)), strict=True))
    else:
        chosen = _equal_sizes(shapes, teacher_shapes)
    if not chosen:
        raise MethodError(
            f"{name}: no stage of the student ({_listed(own, shapes)}) is as high and wide as one "
            f"of the teacher ({_listed(theirs, teacher_shapes)}); pair them with taps=[...] and "
            "teacher_taps=[...]"
        )
    if len(chosen) < fewest:
        i, j = chosen[0]
        raise MethodError(
            f"{name} relates consecutive feature maps, but there is only '{own[i]}' of the student "
            f"with '{theirs[j]}' of the teacher; name {fewest} or more with taps=[...] and "
            "teacher_taps=[...]"
        )
    pairs = [Pair(own[i], theirs[j], shapes[i], teacher_shapes[j]) for i, j in chosen]
    twice = next((pair for pair in pairs if pairs.count(pair) > 1), None)
    if twice is not None:
        raise MethodError(
            f"{name} compares '{twice.student}' of the student with '{twice.teacher}' of the "
            "teacher twice; name each pair once in taps=[...] and teacher_taps=[...]"
        )
    return pairs


def _equal_sizes(own: Sequence[Shape], theirs: Sequence[Shape]) -> list[tuple[int, int]]:
    """Positions of maps of one size, in order on both sides, found from the deepest on."""
    pairs: list[tuple[int, int]] = []
    free = len(theirs)
    for i in reversed(range(len(own))):
        match = next((j for j in reversed(range(free)) if theirs[j][1:] == own[i][1:]), None)
        if match is not None:
            pairs.insert(0, (i, match))
            free = match
    return pairs


def _example(argument: str) -> str:
    return f"{argument}=[...]" if argument.endswith("taps") else f"{argument}=..."


def _listed(names: Sequence[str], shapes: Sequence[Shape]) -> str:
    return ", ".join(f"{n} {by(s)}" for n, s in zip(names, shapes, strict=True))
