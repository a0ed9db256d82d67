import pytest
import torch

from potstill.data import DATASETS
from potstill.data.splits import hold_out, overlapping, subset, task_classes, window
from potstill.errors import DataError

LABELS = torch.arange(100) % 4  # 25 of each of 4 classes
NAMES = ["a", "b", "c", "d"]


def per_class(positions):
    return torch.bincount(LABELS[positions], minlength=4).tolist()


def test_hold_out_takes_the_same_share_of_each_class():
    """A fifth of 25 is 5."""
    kept, held = hold_out(LABELS, 0.2)
    assert per_class(held) == [5] * 4
    assert sorted(kept.tolist() + held.tolist()) == list(range(100))
    assert kept.equal(kept.sort().values) and held.equal(held.sort().values)


def test_hold_out_repeats_and_is_not_simply_the_first():
    held = hold_out(LABELS, 0.2)[1]
    assert held.equal(hold_out(LABELS, 0.2)[1])
    assert not held.equal(torch.arange(20))


def test_hold_out_of_a_class_does_not_depend_on_the_others():
    alone = window(LABELS, [1, 3])
    held = alone[hold_out(LABELS[alone], 0.2)[1]]
    everywhere = hold_out(LABELS, 0.2)[1]
    assert held.equal(everywhere[(LABELS[everywhere] % 2) == 1])


def test_a_small_share_takes_one_image_and_none_takes_none():
    assert per_class(hold_out(LABELS, 0.001)[1]) == [1] * 4
    kept, held = hold_out(LABELS, 0)
    assert len(kept) == 100 and len(held) == 0


def test_a_subset_is_spread_over_the_classes():
    assert per_class(subset(LABELS, 40)) == [10] * 4
    assert per_class(subset(LABELS, 42)) == [11, 11, 10, 10]
    assert subset(LABELS, 100).tolist() == list(range(100))


def test_a_rare_class_gives_all_that_it_has():
    """2 images of class 1: half of 10 would be 5."""
    labels = torch.tensor([0] * 20 + [1] * 2)
    chosen = subset(labels, 10)
    assert torch.bincount(labels[chosen]).tolist() == [8, 2]


def test_a_larger_subset_holds_the_smaller():
    small, large = (set(subset(LABELS, n).tolist()) for n in (13, 57))
    assert small < large


def test_classes_of_a_task_are_sorted_ids():
    assert task_classes([3, 1], LABELS, NAMES, LABELS) == [1, 3]
    assert task_classes(None, LABELS, NAMES, LABELS) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: subset(LABELS, 101), r"data\.subset is 101.*100 training images"),
        (lambda: subset(LABELS, 3), r"data\.subset is 3.*4 classes"),
        (lambda: hold_out(LABELS, 1.0), r"data\.validation is 1\.0"),
        (lambda: hold_out(LABELS, -0.1), r"data\.validation is -0\.1"),
        (lambda: hold_out(torch.tensor([0, 0, 1]), 0.5), r"all 1 training images of class 1"),
        (lambda: task_classes([4], LABELS, NAMES, LABELS), r"data\.classes has \[4\].*0 to 3"),
        (lambda: task_classes([-1], LABELS, NAMES, LABELS), r"data\.classes has \[-1\]"),
        (lambda: task_classes([2, 2], LABELS, NAMES, LABELS), r"\[2\] more than once"),
        (lambda: task_classes([], LABELS, NAMES, LABELS), r"data\.classes is empty"),
        (lambda: task_classes(None, LABELS, [*NAMES, "e"], LABELS), r"training image.*4 \(e\)"),
        (lambda: task_classes([1], LABELS, NAMES, LABELS * 0), r"no test image"),
        (lambda: task_classes([1], LABELS, NAMES, LABELS + 1), r"test image has class id 4"),
    ],
)
def test_faults_name_the_key(call, words):
    with pytest.raises(DataError, match=words):
        call()


ORDER = DATASETS["cifar100"].order or ()


def test_the_order_of_cifar_fs_names_every_class_once_and_begins_with_its_training_part():
    """64 for meta-training, 16 for validation, 20 for test, each ascending; id 31 is the 21st."""
    assert sorted(ORDER) == list(range(100))
    for part in (ORDER[:64], ORDER[64:80], ORDER[80:]):
        assert list(part) == sorted(part)
    assert ORDER[64:80] == (4, 7, 14, 15, 19, 26, 27, 32, 40, 47, 48, 55, 71, 73, 87, 89)
    assert ORDER[49] == 75 and ORDER[20] == 31


@pytest.mark.parametrize("shift", [0, 10, 20, 30, 40, 50])
def test_windows_on_cifar100_share_50_40_30_20_10_and_0_classes(shift):
    """C' = q[0:50], C = q[s:s + 50], r = (50 - s) / 50."""
    first, task = overlapping(ORDER, 1.0), overlapping(ORDER, (50 - shift) / 50)
    assert first == list(ORDER[:50]) and task == list(ORDER[shift : shift + 50])
    assert len(set(first) & set(task)) == 50 - shift
    assert shift < 50 or len(set(first) | set(task)) == 100


@pytest.mark.parametrize("count, n", [(200, 100), (10, 5), (5, 2), (3, 1), (2, 1)])
def test_a_task_has_half_of_the_classes_rounded_down(count, n):
    ids = range(count)
    assert overlapping(ids, 1.0) == list(range(n))
    assert overlapping(ids, 0.0) == list(range(n, 2 * n))


def test_a_share_need_only_be_a_whole_number_of_classes_to_rounding():
    """0.1 + 0.2 of 10 is 3.0000000000000004; a third of 3 classes is written as one can."""
    assert overlapping(range(20), 0.1 + 0.2) == list(range(7, 17))
    assert overlapping(range(6), 0.3333333) == [2, 3, 4]


@pytest.mark.parametrize(
    "count, overlap, message",
    [
        (
            50,
            0.5,
            "data.overlap is 0.5, no whole number of the 25 classes of a task; the nearest are "
            "0.48 and 0.52",
        ),
        (
            6,
            0.34,
            "data.overlap is 0.34, no whole number of the 3 classes of a task; the nearest "
            "are 0.333333 and 0.666667",
        ),
        (10, 1.2, "data.overlap is 1.2; give a share from 0 to 1"),
        (10, -0.2, "data.overlap is -0.2; give a share from 0 to 1"),
        (10, float("nan"), "data.overlap is nan; give a share from 0 to 1"),
        (1, 1.0, "data.overlap needs two classes or more, and there are 1"),
    ],
)
def test_a_share_that_cannot_be_is_refused(count, overlap, message):
    with pytest.raises(DataError) as caught:
        overlapping(range(count), overlap)
    assert str(caught.value) == message
