import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.data import FolderSet, Resident, load
from potstill.data.folder import listing, read_rgb, shown
from potstill.errors import DataError, StorageError


def write(root, size=(120, 100), parts=("train", "test"), classes=("ant", "bee"), n=3):
    """Images of random bytes; size is (width, height)."""
    made = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = made.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def read(split, order=None, seed=0, **settings):
    order = torch.arange(len(split)) if order is None else order
    batches = split.batches(order, torch.Generator().manual_seed(seed), 4, **settings)
    return list(batches)


def test_small_images_of_one_size_become_resident(tmp_path):
    data = load("folder", root=write(tmp_path, (10, 8)), mean=[0.0] * 3, std=[1 / 255] * 3)
    assert isinstance(data.train.images, Resident)
    assert data.train.input_shape == (3, 8, 10)
    assert data.class_names == ["ant", "bee"]
    (clean,) = data.test.clean(6)
    stored = np.asarray(Image.open(tmp_path / "test" / "bee" / "0.png"))
    torch.testing.assert_close(
        clean.image[3].permute(1, 2, 0), torch.tensor(stored).float(), atol=1e-3, rtol=0
    )
    assert clean.label.tolist() == [0, 0, 0, 1, 1, 1]


def test_large_images_and_other_sizes_are_decoded_as_needed(tmp_path):
    large = load("folder", root=write(tmp_path / "large"), workers=0)
    assert isinstance(large.train.images, FolderSet)
    assert large.train.input_shape == (3, 224, 224)
    small = write(tmp_path / "small", (10, 10))
    assert isinstance(load("folder", root=small, image_size=10).train.images, Resident)
    assert isinstance(load("folder", root=small, image_size=12).train.images, FolderSet)
    Image.new("RGB", (11, 10)).save(small / "test" / "ant" / "other.png")
    assert isinstance(load("folder", root=small).train.images, FolderSet)


@pytest.mark.parametrize("views", [None, 2])
def test_workers_order_and_re_entry_do_not_change_a_pixel(tmp_path, views):
    root = write(tmp_path)
    settings = {"root": root, "image_size": 16, "views": views}
    here = load("folder", workers=0, **settings).train
    there = load("folder", workers=2, **settings).train
    batches = read(here)
    for other in (read(there), read(there, start=1)):
        for a, b in zip(batches[-len(other) :], other, strict=True):
            assert all(x.equal(y) for x, y in zip(a, b, strict=True))
    backwards = read(here, order=torch.arange(5, -1, -1))
    assert (
        torch.cat([b.image for b in backwards]).flip(0).equal(torch.cat([b.image for b in batches]))
    )
    assert batches[0].image.is_contiguous(memory_format=torch.channels_last)
    assert not read(here, seed=1)[0].image.equal(batches[0].image)


def test_a_pool_of_views_repeats(tmp_path):
    train = load("folder", root=write(tmp_path), image_size=8, views=2, workers=0).train
    codes = torch.stack([torch.cat([b.view for b in read(train, seed=s)]) for s in range(12)])
    assert [len(set(c)) for c in codes.T.tolist()] == [2] * 6


def test_reading_leaves_the_global_generator_alone(tmp_path):
    train = load("folder", root=write(tmp_path), image_size=8, workers=0).train
    before = torch.get_rng_state()
    read(train)
    assert torch.get_rng_state().equal(before)


def gradient_image(w, h):
    """Red rises from left to right over 0..250, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 250, w), np.linspace(0, 250, h))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_the_clean_view_is_the_centre():
    """Of a 256 x 512 image at 224: 224 of 256 columns, the middle 224 of 512 rows, unresized."""
    image = gradient_image(256, 512)
    expected = np.asarray(image)[144:368, 16:240]
    assert np.array_equal(shown(image, 0, 224, True), expected)


def test_a_training_view_shows_a_part_of_the_right_area_and_ratio():
    """Corner colours of a gradient tell which part a view shows."""
    image = gradient_image(500, 500)
    areas, ratios, mirrored = [], [], 0
    for view in range(1, 300):
        part = shown(image, view, 64, True).astype(float)
        wide = part[:, -1, 0].mean() - part[:, 0, 0].mean()
        high = part[-1, :, 1].mean() - part[0, :, 1].mean()
        mirrored += wide < 0
        areas.append(abs(wide) * high / 250**2)
        ratios.append(abs(wide) / high)
    assert 0.06 < min(areas) < 0.12 and 0.9 < max(areas) <= 1
    assert abs(np.mean(areas) - 0.54) < 0.05
    assert 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.4
    assert 120 < mirrored < 180
    assert all(
        shown(image, v, 8, False)[0, 0, 0] <= shown(image, v, 8, False)[0, -1, 0]
        for v in range(1, 50)
    )


def test_a_very_long_image_still_gives_a_view():
    assert shown(gradient_image(1000, 4), 5, 8, True).shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    ending = "tif" if mode == "CMYK" else "png"
    path = tmp_path / f"image.{ending}"
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    image = read_rgb(path)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_with_transparency_reads_without_a_warning(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "p.png", transparency=bytes([7, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_rgb(tmp_path / "p.png").getpixel((0, 0)) == (10, 20, 30)


def test_16_bits_are_refused_and_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(StorageError, match=r"deep\.png' has more than 8 bits"):
        read_rgb(tmp_path / "deep.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_damaged_later_is_named_during_training(tmp_path, workers):
    train = load("folder", root=write(tmp_path), image_size=8, workers=workers).train
    path = tmp_path / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(StorageError, match=r"^'.*train/bee/1\.png' cannot be read as an image"):
        read(train)


def test_validation_may_have_its_own_folder(tmp_path):
    root = write(tmp_path, (8, 8), parts=("train", "val", "test"))
    data = load("folder", root=root)
    assert len(data.validation) == 6 and data.validation.images is not data.train.images
    with pytest.raises(DataError, match=r"data\.validation is 0\.5 and there is a folder"):
        load("folder", root=root, validation=0.5)


def test_val_alone_is_the_test_set(tmp_path):
    data = load("folder", root=write(tmp_path, (8, 8), parts=("train", "val")))
    assert len(data.test) == 6 and data.validation is None


def write_annotated(root, rows="val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n"):
    """Tiny-ImageNet's official layout, with two classes; `rows` are the annotations."""
    for name in ("n01", "n02"):
        (root / "train" / name / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(root / "train" / name / "images" / f"{name}_0.JPEG")
    for part in ("val", "test"):
        (root / part / "images").mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64)).save(root / part / "images" / f"{part}_{i}.JPEG")
    (root / "val" / "val_annotations.txt").write_text(rows)
    return root


def test_the_official_layout_of_tiny_imagenet(tmp_path):
    data = load("folder", root=write_annotated(tmp_path))
    assert isinstance(data.train.images, Resident)
    assert data.test.labels.tolist() == [1, 0]
    assert data.class_names == ["n01", "n02"]


def test_corrected_annotations_count_though_no_image_changed(tmp_path):
    """The decoded images are cached; their labels must not be those of the first reading."""
    root = write_annotated(tmp_path)
    load("folder", root=root)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\nval_1.JPEG\tn02\n")
    assert load("folder", root=root).test.labels.tolist() == [0, 1]


def test_annotations_left_behind_by_a_sort_into_class_folders_are_not_read(tmp_path):
    root = write_annotated(tmp_path)
    for i, name in enumerate(("n02", "n01")):
        (root / "val" / name).mkdir()
        (root / "val" / "images" / f"val_{i}.JPEG").rename(root / "val" / name / f"val_{i}.JPEG")
    (root / "val" / "images").rmdir()
    data = load("folder", root=root)
    assert [p.name for p in listing(root / "val").paths] == ["val_1.JPEG", "val_0.JPEG"]
    assert data.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("val_0.JPEG\tn01\nval_1.JPEG n02\n", r"line 2: expected an image's file, its class"),
        ("val_0.JPEG\tn01\nval_5.JPEG\tn02\n", r"line 2: no image '.*val/images/val_5\.JPEG'"),
        ("val_0.JPEG\tn01\nval_0.JPEG\tn02\n", r"line 2: 'val_0\.JPEG' has a class already"),
        ("", r"val_annotations\.txt' lists no image"),
    ],
)
def test_faults_of_annotations_name_the_line(tmp_path, rows, words):
    with pytest.raises(StorageError, match=words):
        load("folder", root=write_annotated(tmp_path, rows))


def test_hidden_folders_and_other_files_are_not_classes(tmp_path):
    root = write(tmp_path)
    (root / "train" / ".cache").mkdir()
    (root / "train" / "readme.txt").write_text("x")
    (root / "train" / "ant" / "notes.txt").write_text("x")
    found = listing(root / "train")
    assert found.names == ["ant", "bee"] and len(found.paths) == 6


def test_faults_of_a_folder_name_the_path(tmp_path):
    with pytest.raises(DataError, match=r"data\.root is needed"):
        load("folder")
    with pytest.raises(StorageError, match=r"no folder '.*absent/train'"):
        load("folder", root=tmp_path / "absent")
    with pytest.raises(StorageError, match=r"no folder of test images below '.*alone'"):
        load("folder", root=write(tmp_path / "alone", parts=("train",)))
    root = write(tmp_path / "classes")
    (root / "test" / "cow").mkdir()
    with pytest.raises(DataError, match=r"class folder '.*test/cow' holds no image"):
        load("folder", root=root)
    Image.new("RGB", (8, 8)).save(root / "test" / "cow" / "0.png")
    with pytest.raises(DataError, match=r"same class folders.*\['cow'\]"):
        load("folder", root=root)
    root = write(tmp_path / "torn", (8, 8))
    (root / "train" / "ant" / "1.png").write_bytes(b"not an image")
    with pytest.raises(StorageError, match=r"train/ant/1\.png' cannot be read as an image"):
        load("folder", root=root)
    (tmp_path / "none" / "train").mkdir(parents=True)
    write(tmp_path / "none", parts=("test",))
    with pytest.raises(DataError, match=r"none/train' has no class folders"):
        load("folder", root=tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"padding": 2}, r"data\.padding and data\.pad_mode"),
        ({"image_size": 0}, r"data\.image_size is 0"),
        ({"workers": -1}, r"data\.workers is -1"),
    ],
)
def test_settings_that_do_not_fit_a_folder_are_named(tmp_path, settings, words):
    with pytest.raises(DataError, match=words):
        load("folder", root=write(tmp_path), **settings)
