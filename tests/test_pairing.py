"""Which stages meet: in order, by size, as named; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from potstill.errors import MethodError, TapError
from potstill.method import Method
from potstill.models import build
from potstill.net import Net
from potstill.pairing import last_map, map_shape, stage_pairs
from tests.toys import ToyImages, toy_net

SHAPE = (3, 32, 32)


class Paired(Method):
    """Nothing but two networks."""


def method(student: Net | None = None, teacher: Net | None = None) -> Method:
    return Paired([student or toy_net(0)], [teacher or toy_net(1)], ToyImages().spec())


def sized(*sizes: int, channels: int = 2) -> Net:
    """Stages of the given heights and widths."""
    parts: list[nn.Module] = []
    for size in sizes:
        parts += [nn.AdaptiveAvgPool2d(size), nn.Conv2d(3 if not parts else channels, channels, 1)]
    module = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))
    return Net(module, {f"stage{i + 1}": f"{2 * i + 1}" for i in range(len(sizes))}, (3, 32, 32))


def found(student: Net, teacher: Net, **arguments: Any) -> list[tuple[str, str]]:
    return [(p.student, p.teacher) for p in stage_pairs(method(student, teacher), **arguments)]


def test_as_many_stages_meet_in_their_order():
    """Whatever their sizes: so RepDistiller zips ResNet-50 and MobileNetV2."""
    pairs = found(sized(16, 8, 4), sized(32, 16, 8))
    assert pairs == [("stage1", "stage1"), ("stage2", "stage2"), ("stage3", "stage3")]


def test_by_size_equal_maps_meet():
    pairs = found(sized(16, 8, 4), sized(32, 16, 8), by="size")
    assert pairs == [("stage1", "stage2"), ("stage2", "stage3")]


def test_other_numbers_of_stages_meet_by_size():
    """ResNet-34 and a WRN: 32, 16, 8 meet, the teacher's 4 x 4 is left."""
    pairs = found(sized(32, 16, 8), sized(32, 16, 8, 4))
    assert pairs == [("stage1", "stage1"), ("stage2", "stage2"), ("stage3", "stage3")]


def test_of_several_maps_of_one_size_the_deepest_meet_and_none_twice():
    """VGG's last two stages are both 4 x 4."""
    assert found(sized(8, 4), sized(16, 8, 4, 4), by="size") == [
        ("stage1", "stage2"),
        ("stage2", "stage4"),
    ]
    assert found(sized(4, 4, 4), sized(8, 4), by="size") == [("stage3", "stage2")]


def test_pairs_never_cross():
    """A network that grows its maps again: 8 meets 8, and then nothing before it is left for 16."""
    assert found(sized(16, 8), sized(8, 16), by="size") == [("stage2", "stage1")]


def test_shapes_go_with_the_names():
    (pair,) = stage_pairs(method(sized(8), sized(8, channels=3)))
    assert pair.shape == (2, 8, 8)
    assert pair.teacher_shape == (3, 8, 8)


def test_forms_are_read_where_the_network_has_them():
    """ResNets end a stage after a ReLU; a WRN's raw sum goes on into the next BatchNorm."""
    student, teacher = build("wrn_16_1"), build("resnet8")
    pairs = found(student, teacher, form="post", teacher_form="pre")
    assert pairs == [(f"stage{i}:post", f"stage{i}:pre") for i in (1, 2, 3)]
    assert found(teacher, student, form="post") == [(f"stage{i}",) * 2 for i in (1, 2, 3)]


def test_taps_given_alone_have_the_same_names_in_the_teachers_form():
    assert found(toy_net(0), toy_net(1), taps=["stage2"]) == [("stage2", "stage2")]
    assert found(toy_net(0), toy_net(1), taps=["stage2", "stem"], teacher_form="pre") == [
        ("stage2", "stage2:pre"),
        ("stem", "stem"),
    ]


def test_taps_of_the_teacher_alone_meet_the_students_stages():
    pairs = found(sized(16, 8), sized(16, 8, 4), teacher_taps=["stage2", "stage3"])
    assert pairs == [("stage1", "stage2"), ("stage2", "stage3")]


def test_given_taps_may_have_any_sizes():
    assert found(sized(32), sized(4), taps=["stage1"], by="size") == [("stage1", "stage1")]


@pytest.mark.parametrize("side", ["taps", "teacher_taps"])
def test_an_unknown_tap_is_refused_with_those_that_exist(side: str):
    names = {"taps": ["stage1"], "teacher_taps": ["stage1"], side: ["stage4"]}
    with pytest.raises(TapError) as error:
        stage_pairs(method(), **names)
    assert str(error.value) == (
        f"the {'student' if side == 'taps' else 'teacher'}: "
        "no feature 'stage4'; this network has ['embed', 'last', 'stage1', 'stage1:pre', "
        "'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean \"stage3\"?; "
        f"choose {side}=[...]"
    )


@pytest.mark.parametrize(
    ("taps", "teacher_taps", "said"),
    [
        (
            ["stage1", "stage2"],
            ["stage1"],
            "Paired pairs taps with teacher_taps, but there are 2 and 1; name as many on both "
            "sides",
        ),
        ([], [], "Paired compares feature maps, and taps is empty"),
        ([], None, "Paired compares feature maps, and taps is empty"),
        (
            ["stage1", "embed"],
            None,
            "Paired needs feature maps (C, H, W), but 'embed' of the student is (8,); choose "
            "taps=[...] before the pooling",
        ),
    ],
)
def test_lists_that_cannot_be_paired_are_refused(taps: Any, teacher_taps: Any, said: str):
    with pytest.raises(MethodError) as error:
        stage_pairs(method(), taps, teacher_taps)
    assert str(error.value) == said


def test_stages_without_a_common_size_are_refused_with_their_shapes():
    with pytest.raises(MethodError) as error:
        stage_pairs(method(sized(32, 16), sized(8, 4)), by="size")
    assert str(error.value) == (
        "Paired: no stage of the student (stage1 2x32x32, stage2 2x16x16) is as high and wide as "
        "one of the teacher (stage1 2x8x8, stage2 2x4x4); pair them with taps=[...] and "
        "teacher_taps=[...]"
    )


def test_a_network_without_stages_is_refused_with_what_it_has():
    bare = Net(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {}, (3, 8, 8))
    with pytest.raises(MethodError) as error:
        stage_pairs(method(teacher=bare))
    assert str(error.value) == (
        "Paired compares feature maps (C, H, W), and the teacher has none among its taps "
        "['embed']; name one with Net(..., taps=...), or use a method that reads the vector "
        "'embed': rkd, crd"
    )


def test_stages_that_are_not_known_are_refused_with_the_maps_there_are():
    some = Net(toy_net().module, {"end": "layer3"}, (3, 8, 8))
    with pytest.raises(MethodError) as error:
        stage_pairs(method(some))
    assert str(error.value) == (
        "Paired compares feature maps, and no stages of the student are known; choose "
        "taps=[...] among ['end']"
    )


def test_the_last_map_is_the_one_that_is_pooled():
    """MobileNetV2's 1280 channels come after its last stage; networks of others have stages."""
    both = method(build("mobilenetv2"), sized(16, 8))
    assert last_map(both, "student", None, "tap") == ("last", (1280, 2, 2))
    assert last_map(both, "teacher", None, "teacher_tap") == ("stage2", (2, 8, 8))
    assert last_map(both, "student", "stage1", "tap") == ("stage1", (12, 16, 16))


def test_a_network_without_maps_has_no_last_one():
    bare = Net(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {}, (3, 8, 8))
    with pytest.raises(MethodError, match="and the student has none among its taps"):
        last_map(method(bare), "student", None, "tap")


def test_a_vector_is_no_map():
    with pytest.raises(MethodError) as error:
        map_shape(method(), "teacher", "embed", "teacher_tap")
    assert str(error.value) == (
        "Paired needs feature maps (C, H, W), but 'embed' of the teacher is (8,); choose "
        "teacher_tap=... before the pooling"
    )


def test_taps_given_alone_are_read_alike_on_both_sides():
    """In the teacher's form only where that is another than the student's, as OFD has it."""
    toys = method()
    for form in ("", "pre"):
        pairs = stage_pairs(toys, ["stage2"], form=form, teacher_form=form)
        assert [(p.student, p.teacher) for p in pairs] == [("stage2", "stage2")]
    (pair,) = stage_pairs(toys, ["stage2"], teacher_form="pre")
    assert (pair.student, pair.teacher) == ("stage2", "stage2:pre")


def test_a_pair_is_compared_once():
    toys = method()
    pairs = stage_pairs(toys, ["stage1", "stage2"], ["stage1", "stage1"])
    assert [p.teacher for p in pairs] == ["stage1", "stage1"]
    with pytest.raises(MethodError) as error:
        stage_pairs(toys, ["stage1", "stage1"], fewest=2)
    assert str(error.value) == (
        "Paired compares 'stage1' of the student with 'stage1' of the teacher twice; name each "
        "pair once in taps=[...] and teacher_taps=[...]"
    )
