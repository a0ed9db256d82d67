import io
import json
import pickle
import struct
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from potstill.data import load
from potstill.data.cifar100 import cifar100
from potstill.errors import StorageError

NAMES = ["apple", "bear", "can"]
LABELS = {"train": [2, 0, 1, 1, 2, 0], "test": [1, 0, 2]}


def pixels(part):
    """(N, 32, 32, 3) uint8, the same in every form; image i of a split starts with the byte i."""
    n = len(LABELS[part])
    made = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    made[:, 0, 0, 0] = np.arange(n)
    return made


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_parquet(folder, image="img", label="fine_label", names=NAMES, encode=png):
    folder.mkdir(parents=True, exist_ok=True)
    hub = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
    for part, labels in LABELS.items():
        cells = [{"bytes": encode(i), "path": None} for i in pixels(part)]
        table = pa.table({image: cells, label: labels})
        if names:
            table = table.replace_schema_metadata({"huggingface": json.dumps(hub)})
        pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")


def python2_split(part):
    """The pickle that Python 2 wrote of {'data': array, 'fine_labels': [...]}, opcode by opcode."""
    rows = pixels(part).transpose(0, 3, 1, 2).reshape(len(LABELS[part]), -1)
    raw = rows.tobytes()
    text = lambda s: b"U" + bytes([len(s)]) + s  # noqa: E731
    integer = lambda i: b"K" + bytes([i])  # noqa: E731
    return b"".join(
        [
            b"\x80\x02}(",
            text(b"data"),
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n",
            integer(0) + b"\x85" + text(b"b") + b"\x87R(",
            integer(1) + integer(len(rows)) + b"M" + struct.pack("<H", 3072) + b"\x86",
            b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R(",
            integer(3) + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff" + integer(0) + b"tb",
            b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb",
            text(b"fine_labels"),
            b"](" + b"".join(integer(c) for c in LABELS[part]) + b"e",
            b"u.",
        ]
    )


def write_pickles(folder, python=2):
    folder.mkdir(parents=True)
    for part, labels in LABELS.items():
        content = {
            "data": pixels(part).transpose(0, 3, 1, 2).reshape(len(labels), -1),
            "fine_labels": labels,
        }
        written = python2_split(part) if python == 2 else pickle.dumps(content, protocol=2)
        (folder / part).write_bytes(written)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES}, protocol=2))


def write_folders(folder):
    for part, labels in LABELS.items():
        for i, (image, label) in enumerate(zip(pixels(part), labels, strict=True)):
            path = folder / part / NAMES[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))


FORMS = {
    "the folder that holds cifar100": lambda at: write_parquet(at / "cifar100"),
    "the folder of parquet files": write_parquet,
    "other column names": lambda at: write_parquet(at, "image", "label"),
    "the folder that holds the pickles": lambda at: write_pickles(at / "cifar-100-python"),
    "the folder of pickles, from Python 3": lambda at: write_pickles(at / "own", python=3),
    "folders of images": write_folders,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form, tmp_path):
    FORMS[form](tmp_path)
    root = tmp_path / "own" if "Python 3" in form else tmp_path
    for part, found in zip(("train", "test"), cifar100(root), strict=True):
        first = found.pixels[:, 0, 0, 0].long()  # folders come in another order
        back = torch.argsort(first)
        assert found.pixels[back].numpy().tolist() == pixels(part).tolist()
        assert found.labels[back].tolist() == LABELS[part]
        assert found.names == NAMES


def test_the_environment_says_where_it_is(tmp_path, monkeypatch):
    write_parquet(tmp_path / "cifar100")
    monkeypatch.setenv("POTSTILL_DATA", str(tmp_path))
    data = load("cifar100")
    assert (len(data.train), len(data.test), data.class_names) == (6, 3, NAMES)


def test_without_names_in_the_file_a_class_is_called_by_its_id(tmp_path):
    write_parquet(tmp_path, names=None)
    assert cifar100(tmp_path)[0].names == ["0", "1", "2"]


def test_a_root_without_it_is_an_error_at_once(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    write_parquet(tmp_path / "there")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("POTSTILL_DATA", str(tmp_path / "there"))
    with pytest.raises(StorageError, match=r"no CIFAR-100 in data.root '.*empty'"):
        cifar100(tmp_path / "empty")


def test_other_images_in_the_environments_folder_are_not_taken_for_it(tmp_path, monkeypatch):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / part / "cat" / "0.png")
    monkeypatch.setenv("POTSTILL_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="CIFAR-100 was not found"):
        cifar100(None)


def test_offline_the_error_names_every_place(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("POTSTILL_DATA", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        load("cifar100")
    assert time.monotonic() - began < 30  # a hang, not a speed
    for part in ("data.root", "POTSTILL_DATA", str(tmp_path), "uoft-cs/cifar100", "*.parquet",
                 "cifar-100-python", "train/<class>", "go online"):  # fmt: skip
        assert part in str(caught.value)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    write_pickles(tmp_path / "bad")
    content = {"data": Malicious(), "fine_labels": []}
    (tmp_path / "bad" / "train").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(StorageError, match=r"bad/train' was refused.*would run code"):
        cifar100(tmp_path / "bad")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 10, 200, -20])
def test_a_truncated_pickle_is_named(tmp_path, keep):
    write_pickles(tmp_path / "cut")
    path = tmp_path / "cut" / "train"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match=r"cut/train' is truncated or damaged"):
        cifar100(tmp_path / "cut")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0]}, "1 labels for 2 images"),
        ({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [3]}, "from 0 to 2"),
        ({"data": np.zeros((1, 9), np.uint8), "fine_labels": [0]}, r"expected uint8 \(N, 3072\)"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "no list 'fine_labels'"),
        ([1, 2], "no ndarray 'data'"),
    ],
)
def test_a_pickle_that_is_not_cifar100_is_named(tmp_path, content, words):
    write_pickles(tmp_path / "odd")
    (tmp_path / "odd" / "train").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(StorageError, match=f"odd/train'.*{words}"):
        cifar100(tmp_path / "odd")


def test_a_truncated_parquet_file_is_named(tmp_path):
    write_parquet(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"test-00000-of-00001.parquet' is truncated"):
        cifar100(tmp_path)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    write_parquet(tmp_path, encode=lambda image: png(image)[:300])
    with pytest.raises(StorageError, match=r"train-.*parquet', row 0: the image cannot be decoded"):
        cifar100(tmp_path)


def test_labels_beyond_the_names_are_an_error(tmp_path):
    write_parquet(tmp_path, names=["apple", "bear"])
    with pytest.raises(StorageError, match=r"labels run from 0 to 2.*2 classes"):
        cifar100(tmp_path)


def test_images_of_another_size_are_not_cifar100(tmp_path):
    write_parquet(tmp_path, encode=lambda image: png(image[:16, :16]))
    with pytest.raises(StorageError, match="holds 16x16 images, CIFAR-100 has 32x32"):
        cifar100(tmp_path)


def test_columns_that_are_missing_are_named(tmp_path):
    write_parquet(tmp_path, image="picture")
    with pytest.raises(StorageError, match=r"has columns \['picture', 'fine_label'\]; needed"):
        cifar100(tmp_path)


def test_the_real_one(real_cifar100):
    """50,000 and 10,000 images, 500 and 100 of each class; means known from its use."""
    data = load("cifar100", root=real_cifar100, classes=[7, 3], validation=0.1, subset=100)
    train, test = data.train.images, data.test.images
    assert (len(train), len(test)) == (50_000, 10_000)
    assert (len(data.train), len(data.validation), len(data.test)) == (100, 100, 200)
    assert data.train.input_shape == (3, 32, 32)
    mean = train._stored[:, :-1].float().mean((0, 1))
    torch.testing.assert_close(mean, torch.tensor([129.3, 124.1, 112.4]), atol=0.1, rtol=0)
    assert data.class_names == ["bear", "beetle"]
