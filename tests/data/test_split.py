import pytest
import torch

from potstill.data.resident import Resident
from potstill.data.split import Split, shares, steps
from potstill.errors import DataError


def split(n=20, keep=None, **settings):
    """A set whose image i is 4x4 random bytes of its own; label i % 3; a window on `keep`."""
    pixels = torch.randint(
        1, 256, (n, 4, 4, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    settings = {"padding": 1, "flip": True} | settings
    images = Resident(pixels, mean=(0.0,), std=(1.0,), **settings)
    indices = torch.arange(n) if keep is None else torch.tensor(keep)
    return Split(images, indices, indices % 3, [0, 1, 2])


def epoch(of, seed=0, order=None, **settings):
    order = torch.arange(len(of)) if order is None else order
    settings = {"batch_size": 6} | settings
    return list(of.batches(order, torch.Generator().manual_seed(seed), **settings))


def equal(a, b):
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


def test_a_batch_says_which_images_it_shows():
    of = split(keep=[2, 3, 5, 7, 11])
    batches = epoch(of, order=torch.tensor([4, 0, 1]), batch_size=2)
    assert [b.index.tolist() for b in batches] == [[11, 2], [3]]
    assert [b.label.tolist() for b in batches] == [[2, 2], [0]]
    assert of.input_shape == (1, 4, 4) and len(of) == 5


def test_index_and_view_determine_the_pixels():
    """What two orders, seeds and windows show of the same (index, view) is the same."""
    seen = {}
    again = 0
    for of in (split(keep=range(10)), split(), split(keep=[0, 4, 8])):
        for seed in range(20):
            shuffled = torch.randperm(len(of), generator=torch.Generator().manual_seed(seed))
            for batch in epoch(of, seed, shuffled, batch_size=3):
                for image, _, index, view in zip(*batch, strict=True):
                    key = (int(index), int(view))
                    again += key in seen
                    assert seen.setdefault(key, image).equal(image)
    assert again > 100


def test_a_view_depends_on_the_seed_and_not_on_the_order():
    of = split()
    backwards = epoch(of, order=torch.arange(19, -1, -1), batch_size=20)[0]
    forwards = epoch(of, batch_size=20)[0]
    assert backwards.view.flip(0).equal(forwards.view)
    assert not epoch(of, seed=1, batch_size=20)[0].view.equal(forwards.view)


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_re_entering_an_epoch_gives_its_tail(start):
    of = split()
    tail = epoch(of)[start:]
    entered = epoch(of, start=start)
    assert len(entered) == len(tail) == 4 - start
    assert all(equal(a, b) for a, b in zip(entered, tail, strict=True))


def test_the_views_are_drawn_before_the_first_batch_is_asked_for():
    of = split()
    generator = torch.Generator().manual_seed(0)
    batches = of.batches(torch.arange(20), generator, 20)
    torch.rand(5, generator=generator)
    assert next(batches).view.equal(epoch(of, batch_size=20)[0].view)


def test_drop_last_leaves_only_whole_batches():
    of = split()
    assert [len(b.image) for b in epoch(of)] == [6, 6, 6, 2]
    assert [len(b.image) for b in epoch(of, drop_last=True)] == [6, 6, 6]
    assert steps(20, 6) == 4
    assert steps(20, 6, drop_last=True) == 3


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("start", [0, 2])
def test_the_ranks_shares_make_up_the_batch(world, start):
    """20 images in batches of 6, 6, 6, 2."""
    whole = shares(20, 6, start, False, 0, 1)
    ranks = [shares(20, 6, start, False, r, world) for r in range(world)]
    every = list(range(20))
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert [i for part in parts for i in every[part]] == every[step]


def test_two_ranks_see_the_images_of_one(monkeypatch):
    of = split()
    one = epoch(of)
    halves = []
    for r in range(2):
        monkeypatch.setattr("potstill.data.split.rank", lambda r=r: r)
        monkeypatch.setattr("potstill.data.split.world_size", lambda: 2)
        halves.append((epoch(of), list(of.clean(6, sharded=True))))
    for whole, a, b in zip(one, halves[0][0], halves[1][0], strict=True):
        assert equal(whole, [torch.cat(pair) for pair in zip(a, b, strict=True)])
    clean = [b.index for pair in zip(halves[0][1], halves[1][1], strict=True) for b in pair]
    assert torch.cat(clean).tolist() == list(range(20))


def test_clean_shows_every_image_once_unmoved():
    of = split(keep=[1, 4, 6])
    batches = list(of.clean(2))
    assert [b.index.tolist() for b in batches] == [[1, 4], [6]]
    plain = Resident((of.images._stored[:, :-1]).view(20, 4, 4, 1), mean=(0.0,), std=(1.0,))
    (expected,) = plain.load([(of.indices, torch.zeros(3, dtype=torch.int64))])
    assert torch.cat([b.image for b in batches]).equal(expected)


def test_no_batch_is_an_error_that_says_what_to_change():
    with pytest.raises(DataError, match=r"batch_size is 32 .* 20 images.*drop_last=false"):
        epoch(split(), batch_size=32, drop_last=True)
    with pytest.raises(DataError, match=r"batch_size is 0"):
        steps(20, 0)
