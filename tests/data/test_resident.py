import pytest
import torch
import torch.nn.functional as F

from potstill.data.resident import Resident, view_table
from potstill.errors import DataError

NINE = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3, 1)


def raw(pixels, **settings):
    """A resident set whose normalised values are the pixels themselves."""
    c = pixels.shape[-1]
    return Resident(pixels, mean=(0.0,) * c, std=(1 / 255,) * c, **settings)


def image(images, index, view):
    (found,) = images.load([(torch.tensor([index]), torch.tensor([view]))])
    return found[0]


def test_a_view_by_hand():
    """1..9 padded by one: code 0 shows the corner at (-1, -1); code 9 mirrors it."""
    images = raw(NINE, padding=1, flip=True)
    assert image(images, 0, 0).tolist() == [[[0, 0, 0], [0, 1, 2], [0, 4, 5]]]
    assert image(images, 0, 9).tolist() == [[[0, 0, 0], [2, 1, 0], [5, 4, 0]]]
    assert image(images, 0, images.clean_view).tolist() == [[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]


@pytest.mark.parametrize(("pad_mode", "torch_mode"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize(("h", "w", "c", "p"), [(3, 3, 1, 1), (3, 3, 1, 2), (4, 5, 3, 2)])
def test_every_view_is_a_crop_of_the_padded_image(pad_mode, torch_mode, h, w, c, p):
    pixels = torch.randint(0, 256, (2, h, w, c), dtype=torch.uint8)
    images = raw(pixels, padding=p, pad_mode=pad_mode, flip=True)
    assert images.codes == range(2 * (2 * p + 1) ** 2)
    padded = F.pad(pixels[1].permute(2, 0, 1).float(), (p,) * 4, mode=torch_mode)
    code = 0
    for flip in (False, True):
        for dy in range(2 * p + 1):
            for dx in range(2 * p + 1):
                crop = padded[:, dy : dy + h, dx : dx + w]
                torch.testing.assert_close(image(images, 1, code), crop.flip(2) if flip else crop)
                code += 1


def test_padding_is_black_before_normalisation():
    """(0 - mean) / std = (0 - 0.5) / 0.25 = -2, and pixel 255 gives (1 - 0.5) / 0.25 = 2."""
    white = torch.full((1, 2, 2, 1), 255, dtype=torch.uint8)
    images = Resident(white, mean=(0.5,), std=(0.25,), padding=1)
    torch.testing.assert_close(image(images, 0, 0), torch.tensor([[[-2.0, -2.0], [-2.0, 2.0]]]))


def test_each_channel_has_its_own_statistics():
    """Pixels 51, 102, 153 are 0.2, 0.4, 0.6: (0.2 - 0.1) / 0.1 = 1, and so on."""
    pixels = torch.tensor([51, 102, 153], dtype=torch.uint8).expand(1, 2, 2, 3)
    images = Resident(pixels, mean=(0.1, 0.4, 0.0), std=(0.1, 1.0, 0.5))
    expected = torch.tensor([1.0, 0.0, 1.2])[:, None, None].expand(3, 2, 2)
    torch.testing.assert_close(image(images, 0, 0), expected)


def test_a_batch_is_channels_last_float():
    images = raw(torch.zeros(2, 4, 6, 3, dtype=torch.uint8))
    (batch,) = images.load([(torch.tensor([0, 1]), torch.tensor([0, 0]))])
    assert batch.shape == (2, 3, 4, 6) and batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_without_padding_and_flip_there_is_one_view():
    assert raw(NINE).codes == range(1)
    assert raw(NINE, flip=True).codes == range(2)


def test_fresh_views_are_uniform():
    """Chi-square of 3 * 10^5 draws over 162 codes: 161 degrees of freedom, 99.9 % below 222."""
    images = raw(torch.zeros(1, 32, 32, 1, dtype=torch.uint8), padding=4, flip=True)
    n = 300_000
    drawn = images.draw(torch.zeros(n, dtype=torch.int64), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=162)
    assert len(counts) == 162
    assert float(((counts - n / 162) ** 2 / (n / 162)).sum()) < 222


def test_a_pool_limits_each_image_to_its_own_views():
    images = raw(torch.zeros(3000, 8, 8, 1, dtype=torch.uint8), padding=2, flip=True, views=4)
    everyone = torch.arange(3000)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([images.draw(everyone, generator) for _ in range(50)])
    assert max(len(set(codes)) for codes in drawn.T.tolist()) == 4
    assert len(set(drawn[:, :500].flatten().tolist())) == 50  # together they use every view


def test_the_pool_belongs_to_the_position_in_the_whole_set():
    settings = {"padding": 2, "flip": True, "views": 1}
    one, two = (raw(torch.zeros(100, 8, 8, 1, dtype=torch.uint8), **settings) for _ in range(2))
    some = torch.tensor([3, 50, 99])
    first = one.draw(torch.arange(100), torch.Generator().manual_seed(0))
    assert two.draw(some, torch.Generator().manual_seed(7)).equal(first[some])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"padding": -1}, "data.padding"),
        ({"padding": 3, "pad_mode": "reflect"}, "reaches 2 pixels"),
        ({"pad_mode": "edge"}, "allowed: zero, reflect"),
        ({"views": 0}, "data.views"),
    ],
)
def test_impossible_settings_are_named(settings, words):
    with pytest.raises(DataError, match=words):
        raw(NINE, **settings)


def test_statistics_must_fit_the_channels():
    with pytest.raises(DataError, match=r"data\.mean has 3 values, the images have 1"):
        Resident(NINE, mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(DataError, match=r"data\.std"):
        Resident(NINE, mean=(0.0,), std=(0.0,))


def test_the_table_of_the_clean_view_is_the_identity():
    assert view_table(2, 3, 1, "zero", False)[4].tolist() == list(range(6))
