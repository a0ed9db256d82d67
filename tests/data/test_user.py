import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from potstill.data import Resident, UserSet, from_dataset
from potstill.errors import DataError

BYTES = torch.randint(
    0, 256, (6, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
LABELS = [0, 1, 0, 1, 0, 1]


def arrays(images):
    return [i.permute(1, 2, 0).numpy() for i in images]


FORMS = {
    "tensors": list(BYTES),
    "arrays": arrays(BYTES),
    "PIL images": [Image.fromarray(a) for a in arrays(BYTES)],
}


@pytest.mark.parametrize("form", FORMS)
def test_bytes_in_any_form_are_the_same_set(form):
    pairs = list(zip(FORMS[form], LABELS, strict=True))
    data = from_dataset(pairs, pairs[:2], mean=[0.0] * 3, std=[1 / 255] * 3)
    assert isinstance(data.train.images, Resident)
    (clean,) = data.train.clean(6)
    torch.testing.assert_close(clean.image, BYTES.float(), atol=1e-3, rtol=0)
    assert clean.label.tolist() == LABELS and len(data.test) == 2
    assert data.class_names == ["0", "1"]


@pytest.mark.parametrize("one", [torch.tensor, np.int64, np.array, int])
def test_a_label_may_be_any_whole_number(one):
    pairs = [(image, one(label)) for image, label in zip(BYTES, LABELS, strict=True)]
    assert from_dataset(pairs, pairs).train.labels.tolist() == LABELS


def test_grey_images_have_one_channel():
    for image in (BYTES[0, 0], BYTES[0, 0].numpy(), Image.fromarray(BYTES[0, 0].numpy())):
        data = from_dataset([(image, 0)], [(image, 0)])
        assert data.train.input_shape == (1, 4, 5)


def test_rows_with_the_hubs_column_names_are_pairs():
    rows = [{"image": Image.fromarray(a), "label": 0} for a in arrays(BYTES)]
    assert len(from_dataset(rows, rows).train) == 6


def test_statistics_come_from_the_training_images():
    """Half black, half white: mean 1/2, deviation 1/2; a constant channel is left unscaled."""
    image = torch.zeros(2, 2, 2, dtype=torch.uint8)
    image[0, 0] = 255
    data = from_dataset([(image, 0)], [(image + 1, 0)])
    assert data.train.mean == pytest.approx((0.5, 0.0))
    assert data.train.std == pytest.approx((0.5, 1.0))
    assert data.test.mean == data.train.mean


def test_bytes_take_our_augmentation_and_a_validation_split():
    pairs = list(zip(BYTES, LABELS, strict=True))
    data = from_dataset(pairs, pairs, padding=1, flip=True, views=3, validation=0.3)
    assert len(data.train.images.codes) == 18
    assert (len(data.train), len(data.validation)) == (4, 2)


class Augmenting:
    """Adds noise from three generators, as a transform would."""

    classes = ("no", "yes")

    def __init__(self, n=8):
        self.n = n
        self.read = 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError
        self.read += 1
        image = torch.full((1, 2, 3), float(i)) + torch.rand(1, 2, 3)
        return image + np.random.rand() + random.random(), i % 2


def drawn(split, seed=0, order=None, **settings):
    order = torch.arange(len(split)) if order is None else order
    batches = split.batches(order, torch.Generator().manual_seed(seed), 3, **settings)
    return list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_augments_itself_replays(workers):
    train = from_dataset(Augmenting(), Augmenting(), workers=workers).train
    assert isinstance(train.images, UserSet)
    epoch = drawn(train)
    torch.rand(3)
    again = drawn(from_dataset(Augmenting(), Augmenting()).train, order=torch.arange(7, -1, -1))
    images = torch.cat([b.image for b in epoch])
    assert torch.cat([b.image for b in again]).flip(0).equal(images)
    assert drawn(train, start=2)[0].image.equal(epoch[2].image)
    assert not drawn(train, seed=1)[0].image.equal(epoch[0].image)
    assert len(images.unique()) == images.numel()  # no image shares another's noise


def test_the_clean_view_is_always_the_same():
    test = from_dataset(Augmenting(), Augmenting()).test
    first, second = (torch.cat([b.image for b in test.clean(3)]) for _ in range(2))
    assert first.equal(second)
    assert len((first % 1).unique()) == first.numel()  # and each image has its own noise


def test_reading_leaves_the_global_generators_alone():
    train = from_dataset(Augmenting(), Augmenting()).train
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    drawn(train)
    from_dataset(Augmenting(), Augmenting())
    assert torch.get_rng_state().equal(states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_floats_are_taken_as_they_are():
    floats = TensorDataset(BYTES.float() - 7, torch.tensor(LABELS))
    data = from_dataset(floats, floats)
    (clean,) = data.train.clean(6)
    assert clean.image.equal(BYTES.float() - 7)
    assert clean.image.is_contiguous(memory_format=torch.channels_last)
    assert (data.train.mean, data.train.std) == ((0.0,) * 3, (1.0,) * 3)


def test_targets_spare_reading_every_image():
    dataset = Augmenting()
    dataset.targets = [i % 2 for i in range(8)]
    data = from_dataset(dataset, Augmenting())
    assert dataset.read == 1 and data.class_names == ["no", "yes"]


def test_targets_that_lie_are_found_out():
    dataset = Augmenting()
    dataset.targets = [0, 0, 1, 1, 0, 0, 1, 1]
    train = from_dataset(dataset, Augmenting()).train
    with pytest.raises(DataError, match=r"label of train\[1\] was 0 and is 1 now"):
        drawn(train)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(BYTES, LABELS, strict=True)


GOOD = list(zip(BYTES, LABELS, strict=True))
FLOATS = [(image.float(), label) for image, label in GOOD]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (Stream(), r"train is a Stream without len\(\).*list\(dataset\)"),
        ([], r"train is empty"),
        ([*GOOD, (BYTES[0, :, :2], 0)], r"train\[6\] is \(2, 5, 3\).*resize"),
        ([*FLOATS, (torch.zeros(3, 9, 9), 0)], r"train\[6\] is a Tensor.*\(3, 4, 5\)"),
        ([*FLOATS, (BYTES[0].numpy(), 0)], r"train\[6\] is a ndarray"),
        (list(BYTES), r"train\[0\] is a Tensor.*expected \(image, label\)"),
        ([(BYTES[0],)], r"expected \(image, label\)"),
        ([(BYTES[0], 0.5)], r"label of train\[0\] is a float: 0\.5"),
        ([(BYTES[0], None)], r"label of train\[0\] is a NoneType"),
        ([(BYTES[0], True)], r"label of train\[0\] is a bool"),
        ([(BYTES[0], torch.tensor([0, 1]))], r"label of train\[0\] is a Tensor"),
        ([(BYTES[0], -1)], r"whole number, 0\.\.K-1"),
        ([(BYTES[0], 0), (BYTES[1], 2)], r"no image of \[1\]; number the classes"),
        ([(BYTES[0].long(), 0)], r"train\[0\] is a Tensor of torch\.int64"),
        ([("cat.png", 0)], r"train\[0\] is a str: 'cat\.png'"),
        ([(Image.new("RGBA", (4, 4)), 0)], r"PIL image in mode RGBA"),
        ([(torch.zeros(4, 4), 0)], r"expected shape \(C, H, W\)"),
    ],
)
def test_faults_name_the_item(train, words):
    test = FLOATS if train and hasattr(train, "__len__") and train[0][0] is FLOATS[0][0] else GOOD
    if isinstance(train, list) and len(train) == 1:
        test = [(train[0][0], 0)] if isinstance(train[0], tuple) else GOOD
    with pytest.raises(DataError, match=words):
        data = from_dataset(train, test)
        drawn(data.train)


def test_the_test_set_must_be_like_the_training_set():
    with pytest.raises(DataError, match=r"training images are .* and test images"):
        from_dataset(GOOD, [(BYTES[0, :, :2], 0)])
    with pytest.raises(DataError, match=r"no image of \[2\]"):
        from_dataset(GOOD, [(BYTES[0], 2)])


@pytest.mark.parametrize(
    "settings", [{"padding": 1}, {"flip": True}, {"views": 4}, {"mean": [0.5] * 3}]
)
def test_floats_refuse_our_augmentation(settings):
    (name,) = settings
    with pytest.raises(DataError, match=rf"^{name} given for float tensors"):
        from_dataset(FLOATS, FLOATS, **settings)
