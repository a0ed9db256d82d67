import pytest
import torch

from potstill.data import DATASETS, load
from potstill.data.digits import MEAN, STD, digits
from potstill.data.user import statistics
from potstill.errors import DataError


def test_digits_are_all_there_in_two_like_halves():
    """1,797 images, half of each class."""
    data = load("digits")
    assert len(data.train) + len(data.test) == 1797
    counts = [torch.bincount(s.labels) for s in (data.train, data.test)]
    assert int((counts[0] - counts[1]).abs().max()) <= 1
    assert data.train.input_shape == (1, 8, 8)
    assert data.class_names == [str(c) for c in range(10)]
    assert int(data.train.images._stored.max()) == 255


def test_the_digits_statistics_are_those_of_the_training_half():
    mean, std = statistics(digits()[0].pixels)
    assert mean == pytest.approx(MEAN, abs=1e-4) and std == pytest.approx(STD, abs=1e-4)


def test_a_window_of_classes_renumbers_labels_and_nothing_else():
    everything = load("digits").train
    task = load("digits", classes=[7, 2]).train
    assert task.classes == [2, 7]
    assert set(task.labels.tolist()) == {0, 1}
    original = everything.labels[task.indices]
    assert torch.tensor([2, 7])[task.labels].equal(original)
    assert len(task.images) == len(everything)
    assert load("digits", classes=[7, 2]).class_names == ["2", "7"]


def test_an_overlap_is_a_window_of_half_the_classes():
    """Of ten digits five a task: 60 % are 2, 3, 4 of the first one's 0 to 4, and then 5 and 6."""
    for overlap, classes in ((1.0, [0, 1, 2, 3, 4]), (0.6, [2, 3, 4, 5, 6]), (0, [5, 6, 7, 8, 9])):
        data, given = load("digits", overlap=overlap), load("digits", classes=classes)
        for split, same in ((data.train, given.train), (data.test, given.test)):
            assert split.classes == classes == same.classes
            assert split.indices.equal(same.indices) and split.labels.equal(same.labels)


def test_cifar100s_labels_are_ranks_of_ids_so_a_class_has_another_one_in_another_task(
    real_cifar100,
):
    """Id 31 is 20 in the teacher's task and 6 at 60 %: 4, 7, 14, 15, 19 and 26 are before it."""
    first, task = (load("cifar100", root=real_cifar100, overlap=r) for r in (1.0, 0.6))
    assert first.train.classes.index(31) == 20 and task.train.classes.index(31) == 6
    assert task.train.classes[:6] == [4, 7, 14, 15, 19, 26]
    assert len(task.train) == 25_000 and len(task.test) == 5_000
    ids = [torch.tensor(d.train.classes)[d.train.labels] for d in (first, task)]
    a, b = ((d.train.indices[i == 31]) for d, i in zip((first, task), ids, strict=True))
    assert len(a) == 500 and a.equal(b)


def test_a_split_has_windows_in_the_order_that_is_asked_for():
    """Class 7 first: its images have label 0, and keep their places in the stored set."""
    whole = load("digits", classes=[2, 5, 7]).whole_test
    assert whole.classes == list(range(10)) and whole.labels.equal(load("digits").test.labels)
    window = whole.window([7, 2])
    assert window.classes == [7, 2] and window.images is whole.images
    assert window.indices.tolist() == [
        i for i, c in enumerate(whole.labels.tolist()) if c in (2, 7)
    ]
    assert torch.tensor([7, 2])[window.labels].equal(whole.labels[window.indices])
    with pytest.raises(DataError, match=r"there is no class 10 among the 10 here"):
        whole.window([3, 10])


def test_an_image_looks_the_same_in_every_task():
    everything, task = load("digits", views=2), load("digits", views=2, classes=[7, 2])
    index = task.train.indices
    views = task.train.images.pool[index, 0]
    a, b = (next(iter(d.train.images.load([(index, views)]))) for d in (everything, task))
    assert a.equal(b) and task.train.images.pool.equal(everything.train.images.pool)


def test_validation_is_taken_before_the_subset():
    whole, small = (load("digits", validation=0.2, subset=n) for n in (None, 50))
    assert whole.validation.indices.equal(small.validation.indices)
    assert len(small.train) == 50
    assert not set(small.train.indices.tolist()) & set(small.validation.indices.tolist())
    assert set(small.train.indices.tolist()) < set(whole.train.indices.tolist())
    assert torch.bincount(small.train.labels).tolist() == [5] * 10


def test_what_is_not_given_is_the_sets_own():
    info = DATASETS["digits"]
    images = load("digits").train.images
    assert len(images.codes) == 9 and (images.mean, images.std) == (info.mean, info.std)
    images = load("digits", padding=2, flip=True, mean=[0.5], std=[0.5], views=4).train.images
    assert len(images.codes) == 50 and images.mean == (0.5,) and images.pool.shape[1] == 4


def test_test_and_validation_images_are_clean():
    data = load("digits", validation=0.1)
    (a,) = data.validation.clean(1000)
    assert a.view.unique().tolist() == [data.train.images.clean_view]
    assert len(data.test.images.codes) == 1


@pytest.mark.parametrize("info", DATASETS.values(), ids=DATASETS)
def test_every_data_set_is_described(info):
    assert info.description and len(info.mean) == len(info.std)
    assert info.input_shape is None or len(info.mean) == info.input_shape[0]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("cifar10", {}, r"no data set 'cifar10'; allowed: cifar100.*did you mean \"cifar100\""),
        ("digits", {"root": "x"}, r"data\.root is given"),
        ("digits", {"image_size": 32}, r"data\.image_size is 32, the images .* 8x8"),
        ("digits", {"subset": 5000}, r"data\.subset is 5000"),
        ("digits", {"validation": 1.5}, r"data\.validation is 1\.5"),
        ("digits", {"classes": [10]}, r"data\.classes has \[10\]"),
        (
            "digits",
            {"classes": [1], "overlap": 1.0},
            r"^data\.classes and data\.overlap both choose",
        ),
        ("digits", {"overlap": 0.5}, r"^data\.overlap is 0\.5, no whole number of the 5 classes"),
        ("digits", {"mean": [0.5] * 3}, r"data\.mean has 3 values"),
    ],
)
def test_settings_that_do_not_fit_are_named(name, settings, words):
    with pytest.raises(DataError, match=words):
        load(name, **settings)
