import io
import json
import shutil
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from potstill.data import Resident, load
from potstill.data.parquet import read_parquet
from potstill.data.tiny_imagenet import tiny_imagenet
from potstill.data.user import statistics
from potstill.errors import DataError, StorageError
from tests.data.conftest import CACHE, STORED

WNIDS = ["n03", "n01", "n02"]
"""In the order of wnids.txt, which is not the order of the class ids."""
ROWS = {
    "train": [("n03", "RGB"), ("n01", "L"), ("n02", "RGB"), ("n02", "CMYK"), ("n01", "RGB")],
    "val": [("n02", "L"), ("n03", "RGB"), ("n01", "RGB")],
}
"""Class and mode of each image."""


def jpeg(seed, mode="RGB", size=64):
    """Two flat halves, which survive JPEG, of colours that the seed decides."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 3), dtype=np.uint8)
    half = np.broadcast_to(colours[:, None, None], (2, size // 2, size, 3)).reshape(size, size, 3)
    file = io.BytesIO()
    Image.fromarray(half).convert(mode).save(file, "jpeg", quality=95)
    return file.getvalue()


def images(part):
    """File name, class and JPEG of every image of a part."""
    return [
        (f"{name}_{i}.JPEG" if part == "train" else f"val_{i}.JPEG", name, jpeg(10 * i, mode))
        for i, (name, mode) in enumerate(ROWS[part])
    ]


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


def write_official(root):
    boxes = dict.fromkeys(WNIDS, "")
    for file, name, content in images("train"):
        put(root / "train" / name / "images" / file, content)
        boxes[name] += f"{file}\t0\t10\t63\t58\n"
    for name, rows in boxes.items():
        put(root / "train" / name / f"{name}_boxes.txt", rows)
    annotations = ""
    for file, name, content in reversed(images("val")):
        put(root / "val" / "images" / file, content)
        annotations += f"{file}\t{name}\t0\t32\t44\t62\n"
    put(root / "val" / "val_annotations.txt", annotations)
    put(root / "test" / "images" / "test_0.JPEG", jpeg(0))
    put(root / "wnids.txt", "".join(f"{name}\n" for name in WNIDS))
    put(root / "words.txt", "".join(f"{name}\ta word\n" for name in WNIDS))
    return root


def write_parquet(folder, valid="valid", names=("n01", "n02", "n03"), **cells):
    """`cells` replaces a part's list of (class id, JPEG)."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        rows = cells.get(part) or [(sorted(WNIDS).index(n), c) for _, n, c in images(part)]
        image = [{"bytes": content, "path": None} for _, content in rows]
        table = pa.table({"image": image, "label": [label for label, _ in rows]})
        if names:
            hub = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(hub)})
        stem = "train" if part == "train" else valid
        pq.write_table(table, folder / f"{stem}-00000-of-00001-1359597a978bc4fa.parquet")


def write_folders(root, within=""):
    for part in ("train", "val"):
        for file, name, content in images(part):
            put(root / part / name / within / file, content)


def sort_official(root):
    """What the scripts do that everybody passes on: move the images, leave the annotations."""
    write_official(root)
    for file, name, _ in images("val"):
        (root / "val" / name).mkdir(exist_ok=True)
        (root / "val" / "images" / file).rename(root / "val" / name / file)
    (root / "val" / "images").rmdir()


FORMS = {
    "the unzipped folder": write_official,
    "the folder that holds it": lambda at: write_official(at / "tiny-imagenet-200"),
    "the folder after its validation images were sorted": sort_official,
    "parquet": write_parquet,
    "a clone of the hub's": lambda at: write_parquet(at / "data"),
    "parquet called validation": lambda at: write_parquet(at / "tiny-imagenet", "validation"),
    "parquet called val": lambda at: write_parquet(at / "tiny-imagenet-3" / "data", "val"),
    "class folders": write_folders,
    "class folders with images below": lambda at: write_folders(at, "images"),
}


def expected(part):
    """(class name, pixels) of every image; grey is the same in each channel."""
    found = []
    for _, name, content in images(part):
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        if pixels.ndim == 2:
            pixels = np.stack([pixels] * 3, axis=-1)
        elif pixels.shape[2] == 4:  # Pillow's CMYK has no key: the complement
            pixels = 255 - pixels[..., :3]
        found.append((name, pixels.tolist()))
    return sorted(found)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_ids(form, tmp_path):
    FORMS[form](tmp_path)
    for part, found in zip(("train", "val"), tiny_imagenet(tmp_path), strict=True):
        assert found.names == ["n01", "n02", "n03"]
        assert found.pixels.dtype == torch.uint8
        pairs = zip(found.labels.tolist(), found.pixels.tolist(), strict=True)
        assert sorted((found.names[c], image) for c, image in pairs) == expected(part)


def test_the_environment_says_where_it_is(tmp_path, monkeypatch):
    write_official(tmp_path / "tiny-imagenet-200")
    monkeypatch.setenv("POTSTILL_DATA", str(tmp_path))
    data = load("tiny-imagenet")
    assert (len(data.train), len(data.test), data.validation) == (5, 3, None)
    assert isinstance(data.train.images, Resident)
    assert data.train.input_shape == (3, 64, 64)
    assert len(data.train.images.codes) == 2 * 17**2  # 8 pixels of padding, mirrored or not
    data = load("tiny-imagenet", classes=[2, 1], views=4)
    assert data.class_names == ["n02", "n03"] and len(data.train) == 3
    assert data.train.images.pool.shape == (5, 4)
    with pytest.raises(DataError, match=r"data\.image_size is 32, the images .* are 64x64"):
        load("tiny-imagenet", image_size=32)


def test_the_whole_set_is_preferred_to_a_part_and_no_part_is_guessed(tmp_path):
    write_parquet(tmp_path / "tiny-imagenet-1", names=["a", "b", "c"])
    assert tiny_imagenet(tmp_path)[0].names == ["a", "b", "c"]
    write_parquet(tmp_path / "tiny-imagenet-2")
    with pytest.raises(StorageError, match=r"holds tiny-imagenet-1, tiny-imagenet-2; set data\.r"):
        tiny_imagenet(tmp_path)
    write_official(tmp_path / "tiny-imagenet-200")
    assert tiny_imagenet(tmp_path)[0].names == ["n01", "n02", "n03"]


def test_the_second_time_nothing_is_decoded(tmp_path, monkeypatch):
    write_official(tmp_path / "official")
    write_parquet(tmp_path / "hub")
    first = [tiny_imagenet(tmp_path / form)[0] for form in ("official", "hub")]
    monkeypatch.setattr(Image, "open", None)
    for form, before in zip(("official", "hub"), first, strict=True):
        again = tiny_imagenet(tmp_path / form)[0]
        assert again.pixels.equal(before.pixels) and again.labels.equal(before.labels)


def test_images_are_decoded_into_place(tmp_path):
    """400 images are 4.9 MB; a list of them and a stack would be twice that."""
    rows = [(0, jpeg(i)) for i in range(400)]
    write_parquet(tmp_path, train=rows)
    (path,) = tmp_path.glob("train-*")
    read_parquet([path])  # imports
    tracemalloc.start()
    read_parquet([path])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 400 * 64 * 64 * 3


def cut(path, line):
    """Remove a line, counted from 0, of a text file."""
    lines = path.read_text().splitlines(keepends=True)
    del lines[line]
    path.write_text("".join(lines))


def add(path, line):
    path.write_text(path.read_text() + line)


ANNOTATIONS = "val/val_annotations.txt"
FAULTS = {
    "a class folder without a line": (
        lambda at: cut(at / "wnids.txt", 0),
        DataError,
        r"class folder '.*/train/n03' has no line in '.*/wnids\.txt', which lists 2 classes; move",
    ),
    "a class without a folder": (
        lambda at: add(at / "wnids.txt", "n04\n"),
        StorageError,
        r"wnids\.txt', line 4: class 'n04' has no folder '.*/train/n04'; unzip",
    ),
    "a folder that is missing": (
        lambda at: shutil.rmtree(at / "val"),
        StorageError,
        r"no folder '.*/val'; unzip the data again",
    ),
    "a class folder without images": (
        lambda at: (at / "train/n03/images/n03_0.JPEG").unlink(),
        DataError,
        r"class folder '.*/train/n03' holds no image",
    ),
    "a training image that is missing": (
        lambda at: (at / "train/n01/images/n01_4.JPEG").unlink(),
        StorageError,
        r"train/n01/n01_boxes\.txt', line 2: no image 'n01_4\.JPEG' in '.*/train/n01'; unzip",
    ),
    "an annotation of another class": (
        lambda at: (
            add(at / ANNOTATIONS, "val_0.JPEG\tn09\n") or cut(at / ANNOTATIONS, 2)
        ),  # val_0's own line
        DataError,
        r"val_annotations\.txt', line 3: 'n09' is none of the 3 training classes; correct it",
    ),
    "an annotation without a class": (
        lambda at: add(at / ANNOTATIONS, "\nval_7.JPEG n01 0 1 2 3\n"),
        StorageError,
        r"line 5: expected an image's file, its class and its box, between tabs; found 'val_7\.J",
    ),
    "an annotation cut off in the class": (
        lambda at: add(at / ANNOTATIONS, "val_7.JPEG\t"),
        StorageError,
        r"line 4: expected an image's file, its class and its box",
    ),
    "an image that is annotated twice": (
        lambda at: add(at / ANNOTATIONS, "val_1.JPEG\tn01\t0\t0\t9\t9\n"),
        StorageError,
        r"line 4: 'val_1\.JPEG' has a class already; remove one",
    ),
    "a validation image that is missing": (
        lambda at: (at / "val/images/val_1.JPEG").unlink(),
        StorageError,
        r"val_annotations\.txt', line 2: no image '.*/val/images/val_1\.JPEG'; unzip",
    ),
    "an image without an annotation": (
        lambda at: put(at / "val/images/val_9.JPEG", jpeg(9)),
        DataError,
        r"val_annotations\.txt' has no line for \['val_9\.JPEG'\] in '.*/val/images'; unzip",
    ),
    "a class without a validation image": (
        lambda at: cut(at / ANNOTATIONS, 0) or (at / "val/images/val_2.JPEG").unlink(),
        DataError,
        r"'.*train' and '.*val' must have the same class folders; only one of them has \['n01'\]",
    ),
    "no annotation at all": (
        lambda at: put(at / ANNOTATIONS, "\n"),
        StorageError,
        r"val_annotations\.txt' lists no image",
    ),
    "annotations that are no text": (
        lambda at: put(at / ANNOTATIONS, b"\xff\xfe\x00"),
        StorageError,
        r"cannot read '.*val_annotations\.txt' as text",
    ),
    "an image that is damaged": (
        lambda at: put(at / "val/images/val_1.JPEG", jpeg(1)[:300]),
        StorageError,
        r"val/images/val_1\.JPEG' cannot be read as an image",
    ),
    "an image of another size": (
        lambda at: put(at / "train/n02/images/n02_3.JPEG", jpeg(1, size=32)),
        StorageError,
        r"n02_3\.JPEG': the image is 32x32, the first one is 64x64; all must have one size",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_official_folder_is_named(fault, tmp_path):
    damage, kind, words = FAULTS[fault]
    damage(write_official(tmp_path))
    with pytest.raises(kind, match=words):
        tiny_imagenet(tmp_path)


def test_sorted_validation_folders_must_be_the_training_classes(tmp_path):
    write_folders(tmp_path)
    put(tmp_path / "val" / "n04" / "val_7.JPEG", jpeg(7))
    with pytest.raises(DataError, match=r"same class folders; only one of them has \['n04'\]"):
        tiny_imagenet(tmp_path)


def test_parquet_files_of_two_copies_are_not_mixed(tmp_path):
    write_parquet(tmp_path)
    write_parquet(tmp_path / "other", names=["n03", "n01", "n02"])
    (valid,) = (tmp_path / "other").glob("valid-*")
    valid.rename(next(tmp_path.glob("valid-*")))
    with pytest.raises(DataError, match=r"must name the same classes in the same order; they have"):
        tiny_imagenet(tmp_path)


def test_without_names_in_the_files_a_class_is_called_by_its_id(tmp_path):
    write_parquet(tmp_path, names=None, val=[(0, jpeg(0)), (1, jpeg(1))])
    assert tiny_imagenet(tmp_path)[0].names == ["0", "1", "2"]
    assert load("tiny-imagenet", root=tmp_path).class_names == ["0", "1", "2"]


def test_parquet_images_of_another_size_are_named(tmp_path):
    write_parquet(tmp_path / "one", val=[(0, jpeg(0)), (1, jpeg(1, size=32))])
    with pytest.raises(StorageError, match=r"valid-.*parquet', row 1: the image is 32x32, the fi"):
        tiny_imagenet(tmp_path / "one")
    write_parquet(tmp_path / "all", val=[(0, jpeg(0, size=32))])
    with pytest.raises(StorageError, match="holds 32x32 images, Tiny-ImageNet has 64x64"):
        tiny_imagenet(tmp_path / "all")


def test_a_parquet_image_that_cannot_be_decoded_is_named(tmp_path):
    write_parquet(tmp_path, train=[(0, jpeg(0)), (1, jpeg(1)[:300])])
    with pytest.raises(StorageError, match=r"train-.*parquet', row 1: the image cannot be decoded"):
        tiny_imagenet(tmp_path)


def test_a_root_without_it_is_an_error_at_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "there")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("POTSTILL_DATA", str(tmp_path / "there"))
    with pytest.raises(StorageError, match=r"no Tiny-ImageNet in data\.root '.*empty'; looked"):
        tiny_imagenet(tmp_path / "empty")


def test_offline_the_error_names_every_place_and_other_images_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for part in ("train", "val"):
        put(tmp_path / part / "cat" / "0.jpg", jpeg(0, size=32))
    monkeypatch.setenv("POTSTILL_DATA", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        load("tiny-imagenet")
    assert time.monotonic() - began < 30  # a hang, not a speed
    for part in ("Tiny-ImageNet was not found", "data.root", "POTSTILL_DATA", str(tmp_path),
                 "zh-plus/tiny-imagenet", "wnids.txt", "valid-*.parquet", "train/<class>",
                 "tiny-imagenet-200.zip", "go online"):  # fmt: skip
        assert part in str(caught.value)


def test_the_hubs_copy_on_this_machine_is_read_without_a_network(tmp_path, monkeypatch):
    write_parquet(tmp_path / "data")

    def snapshot(repository, *, local_files_only, **_):
        assert repository == "zh-plus/tiny-imagenet" and local_files_only
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert tiny_imagenet(None)[0].names == ["n01", "n02", "n03"]


@pytest.fixture
def real_part(own_cache, monkeypatch):
    """The folder with 50 of the classes; kept in the developer's own cache once decoded."""
    folder = STORED / "tiny-imagenet-50"
    if not folder.is_dir():
        pytest.skip(f"no real tiny-imagenet-50 in '{STORED}'; set POTSTILL_DATA")
    monkeypatch.setenv("POTSTILL_CACHE", CACHE)
    return folder


def test_the_real_one(real_part):
    """50 classes of 500 and 50 images; grey is 2 in 100; the set's statistics within 0.004."""
    settings = {"root": real_part, "classes": [3, 40], "validation": 0.1, "subset": 100}
    data = load("tiny-imagenet", **settings)
    train = data.train.images
    assert (len(train), len(data.test.images)) == (25_000, 2_500)
    assert (len(data.train), len(data.validation), len(data.test)) == (100, 100, 100)
    assert data.train.input_shape == (3, 64, 64)
    assert data.class_names == ["n01882714", "n04398044"]
    stored = train._stored[:, :-1].view(-1, 64, 64, 3)
    mean, std = statistics(stored)
    assert mean == pytest.approx(train.mean, abs=0.004)
    assert std == pytest.approx(train.std, abs=0.004)
    grey = (stored[..., :1] == stored).all(3).flatten(1).all(1)
    assert 499 <= int(grey.sum()) < 600  # 499 grey files; some in colour show none
