import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from potstill.data import FolderSet, load
from potstill.data.cub200 import cub200
from potstill.errors import DataError, StorageError
from tests.data.conftest import STORED

NAMES = ["001.Black_footed_Albatross", "200.Common_Yellowthroat", "004.Groove_billed_Ani"]
"""In the order of the class ids, which is not that of the names."""
FILES = {
    "images.txt": f"10 {NAMES[1]}/b 10.jpg\n1 {NAMES[0]}/a.jpg\n2 {NAMES[0]}/b.jpg\n"
    f"3 {NAMES[2]}/a.jpg\n11 {NAMES[2]}/c.jpg\n4 {NAMES[1]}/a.jpg\n9 {NAMES[2]}/b.jpg\n",
    "image_class_labels.txt": "1 1\n2 1\n3 3\n4 2\n9 3\n10 2\n11 3\n",
    "train_test_split.txt": "1 1\n2 0\n3 0\n4 1\n9 1\n10 0\n11 1\n",
    "classes.txt": f"1 {NAMES[0]}\n2 {NAMES[1]}\n3 {NAMES[2]}\n",
}
"""Seven images; neither their ids nor their lines are in the order of the other."""
TRAIN = [(NAMES[0], "a.jpg"), (NAMES[1], "a.jpg"), (NAMES[2], "b.jpg"), (NAMES[2], "c.jpg")]
TEST = [(NAMES[0], "b.jpg"), (NAMES[2], "a.jpg"), (NAMES[1], "b 10.jpg")]


def write(root, **files):
    """The official layout; `files` replaces a file, None leaves it out."""
    for i, (name, file) in enumerate(TRAIN + TEST):
        folder = root / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        x, y = np.meshgrid(np.arange(160.0), np.arange(128.0))
        pixels = np.stack([x, y, 0 * x + 30 * i], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / file, "jpeg", quality=95)
    for name, text in FILES.items():
        put(root / name, files.get(name.removesuffix(".txt"), text))
    return root


def put(path, content):
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def expected(root):
    """(paths, labels) of each split."""
    return {
        part: ([root.joinpath("images", *of) for of in images], labels)
        for part, images, labels in (("train", TRAIN, [0, 1, 2, 2]), ("test", TEST, [0, 2, 1]))
    }


def read(found):
    return {part: (of.paths, of.labels) for part, of in found.items()}


def test_images_are_in_order_of_their_ids_and_classes_in_that_of_theirs(tmp_path):
    found = cub200(write(tmp_path))
    assert list(found) == ["train", "test"]
    assert read(found) == expected(tmp_path)
    assert found["train"].names == found["test"].names == NAMES


@pytest.mark.parametrize("within", [".", "CUB_200_2011"])
def test_a_place_is_the_folder_or_holds_it(within, tmp_path, monkeypatch):
    folder = write(tmp_path / "data" / within)
    assert read(cub200(tmp_path / "data")) == expected(folder)
    monkeypatch.setenv("POTSTILL_DATA", str(tmp_path / "data"))
    assert read(cub200(None)) == expected(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("POTSTILL_DATA", "~/data")
    assert read(cub200(None)) == expected(folder)


def test_data_root_comes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_DATA", str(write(tmp_path / "there")))
    assert read(cub200(write(tmp_path / "here"))) == expected(tmp_path / "here")


def test_another_sets_images_txt_beside_the_folder_is_not_read(tmp_path):
    folder = write(tmp_path / "CUB_200_2011")
    put(tmp_path / "images.txt", "a list of something else\n")
    assert read(cub200(tmp_path)) == expected(folder)


def test_where_nothing_is_found_the_error_names_every_place(tmp_path, monkeypatch):
    files = (
        "images.txt, image_class_labels.txt, train_test_split.txt and images/, also in a folder "
        "CUB_200_2011"
    )
    fetch = "Fetch CUB_200_2011.tgz from its authors (Caltech), unpack it and "
    nowhere = (
        "CUB-200-2011 was not found.\n  - data.root: not given\n  - {}: {}\nThere is no download. "
        f"{fetch}set data.root=FOLDER or POTSTILL_DATA=FOLDER"
    )
    with pytest.raises(StorageError) as caught:
        cub200(None)
    assert str(caught.value) == nowhere.format("POTSTILL_DATA (not set)", files)
    (tmp_path / "images").mkdir()
    monkeypatch.setenv("POTSTILL_DATA", str(tmp_path))
    with pytest.raises(StorageError) as caught:
        cub200(None)
    assert str(caught.value) == nowhere.format(f"in POTSTILL_DATA '{tmp_path}'", files)
    write(tmp_path / "CUB_200_2011")
    with pytest.raises(StorageError) as caught:
        cub200(tmp_path / "empty")
    assert str(caught.value) == (
        f"no CUB-200-2011 in data.root '{tmp_path}/empty'; looked there for {files}. {fetch}"
        "correct data.root, or leave it out to use POTSTILL_DATA"
    )


def test_tabs_blank_lines_and_the_line_ends_of_windows_change_nothing(tmp_path):
    loose = {
        name.removesuffix(".txt"): "\r\n" + text.replace(" ", "\t ", 1).replace("\n", " \r\n\r\n")
        for name, text in FILES.items()
    }
    assert read(cub200(write(tmp_path, **loose))) == expected(tmp_path)


def test_without_the_file_of_classes_the_folders_name_them(tmp_path):
    assert cub200(write(tmp_path, classes=None))["test"].names == NAMES


def test_images_that_no_line_lists_are_left_out(tmp_path):
    root = write(tmp_path)
    for name in (NAMES[0], "005.Crested_Auklet"):
        (root / "images" / name).mkdir(exist_ok=True)
        shutil.copy(root / "images" / NAMES[0] / "a.jpg", root / "images" / name / "own.jpg")
    put(root / "images" / "readme.txt", "x")
    assert read(cub200(root)) == expected(root)


def test_a_class_may_lack_test_images_and_a_task_leave_one_without_training_images(tmp_path):
    root = write(tmp_path, train_test_split="1 0\n2 0\n3 1\n4 1\n9 1\n10 0\n11 1\n")
    assert {part: of.labels for part, of in cub200(root).items()} == {
        "train": [2, 1, 2, 2],
        "test": [0, 0, 1],
    }
    with pytest.raises(DataError, match=r"no training image of 1 of 3 classes: 0 \(001\.Bl"):
        load("cub200", root=root)
    data = load("cub200", root=root, classes=[1, 2])
    assert (len(data.train), data.test.labels.tolist()) == (4, [0])


LABELS, SPLIT = "image_class_labels.txt", "train_test_split.txt"
AGAIN = "unpack CUB_200_2011.tgz again"
PLACE = "expected an image id and <class folder>/<file>, below images/; found"
ELEVEN = f"{PLACE} '11 {NAMES[2]}"
CLASS = "expected an image id and a class id, both from 1; found"
PART = "expected an image id and 1 for training or 0 for test; found"
NAMED = "expected a class id and its folder; found"


def changed(name, old, new):
    """A damage: one occurrence of a text in one of the files becomes another."""

    def damage(root):
        text = FILES[name]
        assert text.count(old) == 1
        put(root / name, text.replace(old, new))

    return damage


def became(name, content):
    """A damage: all of a file is replaced; None removes it."""
    return lambda root: put(root / name, content)


MALFORMED = {
    "one field": ("images.txt", "1 001", "1\n7 001", 2, f"{PLACE} '1'"),
    "no class folder": ("images.txt", f"4 {NAMES[1]}/a", "4 a", 6, f"{PLACE} '4 a.jpg'"),
    "a folder in the folder": ("images.txt", "/c.jpg", "/c/c.jpg", 5, f"{ELEVEN}/c/c.jpg'"),
    "no file": ("images.txt", "/c.jpg", "/", 5, f"{ELEVEN}/'"),
    "an absolute path": ("images.txt", f"1 {NAMES[0]}/", "1 /etc/", 2, f"{PLACE} '1 /etc/a.jpg'"),
    "an absolute file": ("images.txt", f"1 {NAMES[0]}/", "1 /", 2, f"{PLACE} '1 /a.jpg'"),
    "a folder above": ("images.txt", f"1 {NAMES[0]}/", "1 ../", 2, f"{PLACE} '1 ../a.jpg'"),
    "two blanks": ("images.txt", f"1 {NAMES[0]}/", "1  ../", 2, f"{PLACE} '1  ../a.jpg'"),
    "a path that leads out": ("images.txt", "/c.jpg", "/../../c", 5, f"{ELEVEN}/../../c'"),
    "the folder itself": ("images.txt", "/c.jpg", "/..", 5, f"{ELEVEN}/..'"),
    "a dot": ("images.txt", f"1 {NAMES[0]}/", "1 ./", 2, f"{PLACE} '1 ./a.jpg'"),
    "a long line": ("images.txt", "9 004", "9" * 99 + " 004", 7, f"{PLACE} '{'9' * 60}'"),
    "no number": ("images.txt", "9 004", "nine 004", 7, f"{PLACE} 'nine {NAMES[2]}/b.jpg'"),
    "image id 0": (LABELS, "1 1\n2", "0 1\n2", 1, f"{CLASS} '0 1'"),
    "a negative image id": (SPLIT, "3 0", "-3 0", 3, f"{PART} '-3 0'"),
    "a fraction": (SPLIT, "3 0", "3.0 0", 3, f"{PART} '3.0 0'"),
    "class id 0": (LABELS, "4 2", "4 0", 4, f"{CLASS} '4 0'"),
    "a negative class id": (LABELS, "4 2", "4 -2", 4, f"{CLASS} '4 -2'"),
    "a class that is no number": (LABELS, "4 2", "4 two", 4, f"{CLASS} '4 two'"),
    "digits of another script": (LABELS, "4 2", "4 \u0662", 4, f"{CLASS} '4 \u0662'"),
    "three fields": (LABELS, "4 2", "4 2 1", 4, f"{CLASS} '4 2 1'"),
    "one label field": (LABELS, "4 2", "42", 4, f"{CLASS} '42'"),
    "split 2": (SPLIT, "9 1", "9 2", 5, f"{PART} '9 2'"),
    "split 10": (SPLIT, "9 1", "9 10", 5, f"{PART} '9 10'"),
    "a split in words": (SPLIT, "9 1", "9 train", 5, f"{PART} '9 train'"),
    "a class without a folder": ("classes.txt", "2 200", "2\n7 200", 2, f"{NAMED} '2'"),
    "class 0": ("classes.txt", "1 001", "0 001", 1, f"{NAMED} '0 {NAMES[0]}'"),
}
"""File, text, what replaces it, line, what is wrong with the line."""


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_line_that_is_malformed_is_shown(fault, tmp_path):
    name, old, new, line, wrong = MALFORMED[fault]
    changed(name, old, new)(write(tmp_path))
    with pytest.raises(StorageError) as caught:
        cub200(tmp_path)
    assert str(caught.value) == f"'{tmp_path}/{name}', line {line}: {wrong}. Correct it, or {AGAIN}"


FAULTS = {
    **{
        f"no {name}": (became(name, None), StorageError, f"no file '{{at}}/{name}'; {AGAIN}")
        for name in ("images.txt", LABELS, SPLIT)
    },
    **{
        f"nothing in {name}": (
            became(name, " \n"),
            StorageError,
            f"'{{at}}/{name}' is empty; {AGAIN}",
        )
        for name in FILES
    },
    **{
        f"{name} is no text": (
            became(name, b"\xff\xfe\x00"),
            StorageError,
            f"cannot read '{{at}}/{name}' as text ('utf-8' codec can't decode byte 0xff in "
            f"position 0: invalid start byte); {AGAIN}",
        )
        for name in FILES
    },
    "an image twice": (
        changed("images.txt", "9 004", f"3 {NAMES[2]}/d.jpg\n9 004"),
        StorageError,
        "'{at}/images.txt', line 7: 3 is in line 4 already; remove one",
    ),
    "a label twice, once with a zero before it": (
        changed(LABELS, "11 3", "11 3\n02 1"),
        StorageError,
        "'{at}/image_class_labels.txt', line 8: 2 is in line 2 already; remove one",
    ),
    "a split twice": (
        changed(SPLIT, "4 1", "4 1\n4 1"),
        StorageError,
        "'{at}/train_test_split.txt', line 5: 4 is in line 4 already; remove one",
    ),
    "a class twice": (
        changed("classes.txt", "2 200", "1 200"),
        StorageError,
        "'{at}/classes.txt', line 2: 1 is in line 1 already; remove one",
    ),
    "an image without a class": (
        changed(LABELS, "9 3\n", ""),
        DataError,
        f"'{{at}}/images.txt', line 7: image 9 is not in '{{at}}/{LABELS}'; add it, or {AGAIN}",
    ),
    "an image without a split": (
        changed(SPLIT, "9 1\n", ""),
        DataError,
        f"'{{at}}/images.txt', line 7: image 9 is not in '{{at}}/{SPLIT}'; add it, or {AGAIN}",
    ),
    "a class without an image": (
        changed(LABELS, "9 3", "8 3\n9 3"),
        DataError,
        f"'{{at}}/{LABELS}', line 5: image 8 is not in '{{at}}/images.txt'; add it, or {AGAIN}",
    ),
    "a split without an image": (
        changed(SPLIT, "9 1", "8 0\n9 1"),
        DataError,
        f"'{{at}}/{SPLIT}', line 5: image 8 is not in '{{at}}/images.txt'; add it, or {AGAIN}",
    ),
    "a class in two folders": (
        changed(LABELS, "9 3", "9 1"),
        DataError,
        f"'{{at}}/{LABELS}', line 5: image 9 in '{NAMES[2]}' ('{{at}}/images.txt', line 7) has "
        f"class 1, but other images of class 1 are in '{NAMES[0]}'; correct a file, or {AGAIN}",
    ),
    "two classes in a folder": (
        changed(LABELS, "9 3", "9 4"),
        DataError,
        f"'{{at}}/{LABELS}', line 5: image 9 in '{NAMES[2]}' ('{{at}}/images.txt', line 7) has "
        f"class 4, but other images in '{NAMES[2]}' have class 3; correct a file, or {AGAIN}",
    ),
    "class ids with a gap": (
        became(LABELS, "1 1\n2 1\n3 4\n4 2\n9 4\n10 2\n11 4\n"),
        DataError,
        f"'{{at}}/{LABELS}', line 3: there is a class 4 and no class 3; number them from 1 without "
        f"a gap, or {AGAIN}",
    ),
    "class ids that begin at 2": (
        became(LABELS, "1 4\n2 4\n3 3\n4 2\n9 3\n10 2\n11 3\n"),
        DataError,
        f"'{{at}}/{LABELS}', line 4: there is a class 2 and no class 1; number them from 1 without "
        f"a gap, or {AGAIN}",
    ),
    "a class that the file of classes lacks": (
        changed("classes.txt", f"2 {NAMES[1]}\n", ""),
        DataError,
        f"'{{at}}/{LABELS}', line 4: class 2 is not in '{{at}}/classes.txt'; add it, or {AGAIN}",
    ),
    "a class of the file of classes that no image has": (
        changed("classes.txt", "3 004", "4 005.Crested_Auklet\n3 004"),
        DataError,
        f"'{{at}}/classes.txt', line 3: class 4 is not in '{{at}}/{LABELS}'; add it, or {AGAIN}",
    ),
    "a class of another name": (
        changed("classes.txt", "2 200", "2 201"),
        DataError,
        f"'{{at}}/classes.txt', line 2: class 2 is '201.Common_Yellowthroat', but its images are "
        f"in '{NAMES[1]}'; correct it, or {AGAIN}",
    ),
    "no training image": (
        became(SPLIT, FILES[SPLIT].replace(" 1\n", " 0\n")),
        DataError,
        f"'{{at}}/{SPLIT}' has no train image, no line ends in 1; {AGAIN}",
    ),
    "no test image": (
        became(SPLIT, FILES[SPLIT].replace(" 0\n", " 1\n")),
        DataError,
        f"'{{at}}/{SPLIT}' has no test image, no line ends in 0; {AGAIN}",
    ),
    "an image that is missing": (
        lambda at: (at / "images" / NAMES[1] / "b 10.jpg").unlink(),
        StorageError,
        f"'{{at}}/images.txt', line 1: no image '{{at}}/images/{NAMES[1]}/b 10.jpg'; {AGAIN}",
    ),
    "a class folder that is missing": (
        lambda at: shutil.rmtree(at / "images" / NAMES[2]),
        StorageError,
        f"'{{at}}/images.txt', line 4: no image '{{at}}/images/{NAMES[2]}/a.jpg'; {AGAIN}",
    ),
    "images that were not unpacked": (
        lambda at: shutil.rmtree(at / "images"),
        StorageError,
        f"no folder '{{at}}/images'; {AGAIN}",
    ),
}
"""What is done to the folder, the error's kind and its message."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_folder_is_named(fault, tmp_path):
    damage, kind, message = FAULTS[fault]
    damage(write(tmp_path))
    with pytest.raises(kind) as caught:
        cub200(tmp_path)
    assert type(caught.value) is kind
    assert str(caught.value) == message.replace("{at}", str(tmp_path))


def raw(root, **settings):
    """The data with pixels as they are, 0..255."""
    grey = {"mean": [0.0] * 3, "std": [1 / 255] * 3}
    return load("cub200", root=root, workers=0, **{"image_size": 64, **grey, **settings})


def test_the_data_set_of_that_name(tmp_path):
    data = load("cub200", root=write(tmp_path), image_size=64, workers=0)
    assert (len(data.train), len(data.test), data.validation) == (4, 3, None)
    assert isinstance(data.train.images, FolderSet)
    assert data.train.input_shape == data.test.input_shape == (3, 64, 64)
    assert data.train.classes == data.test.classes == [0, 1, 2]
    assert (data.name, data.class_names) == ("cub200", NAMES)
    assert data.train.labels.tolist() == [0, 1, 2, 2]
    assert data.test.labels.tolist() == [0, 2, 1]
    assert load("cub200", root=tmp_path, workers=0).train.input_shape == (3, 224, 224)


def test_a_task_keeps_the_original_ids(tmp_path):
    data = load("cub200", root=write(tmp_path), image_size=64, workers=0, classes=[2, 1])
    assert data.train.classes == data.test.classes == [1, 2]
    assert data.class_names == NAMES[1:]
    assert data.train.indices.tolist() == [1, 2, 3] and data.train.labels.tolist() == [0, 1, 1]
    assert data.test.indices.tolist() == [1, 2] and data.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_clean_view_is_the_centre_of_the_image(part, tmp_path):
    """Of 160 x 128 pixels at 112, the middle 112 x 112, unresized; at 64, the same part resized.

    128 * 224 / 256 = 112, so the part begins at column (160 - 112) / 2 = 24 and row 8.
    """
    root = write(tmp_path)
    images = [Image.open(p) for p in expected(root)[part][0]]
    (whole,) = getattr(raw(root, image_size=112), part).clean(10)
    (small,) = getattr(raw(root), part).clean(10)
    for i, image in enumerate(images):
        close(whole.image[i], np.asarray(image)[8:120, 24:136])
        close(small.image[i], image.resize((64, 64), Image.Resampling.BILINEAR, (24, 8, 136, 120)))
        # on the gradient itself: column x of 64 has its middle at 24 + 1.75 (x + 1/2) - 1/2
        across = small.image[i, 0, 20:40].mean(0) - (23.5 + 1.75 * (torch.arange(64) + 0.5))
        assert across[2:-2].abs().max() < 3


def close(image, pixels):
    stored = torch.from_numpy(np.array(pixels)).float()
    torch.testing.assert_close(image.permute(1, 2, 0), stored, atol=1e-3, rtol=0)


def test_real_images_in_the_official_layout(tmp_path):
    """Sixteen JPEGs of four classes of Tiny-ImageNet, one of them grey; the second of each class
    is a test image."""
    stored = STORED / "tiny-imagenet-50" / "valid-00000-of-00001.parquet"
    if not stored.is_file():
        pytest.skip(f"no real tiny-imagenet-50 in '{STORED}'; set POTSTILL_DATA")
    file = pq.ParquetFile(stored)
    described = json.loads(file.schema_arrow.metadata[b"huggingface"])
    wnids = described["info"]["features"]["label"]["names"]
    cells = {}
    for row in file.read_row_group(0).to_pylist():
        cells.setdefault(row["label"], []).append(row["image"]["bytes"])
    files = dict.fromkeys(FILES, "")
    modes, images = set(), {"train": [], "test": []}
    for c, label in enumerate((5, 14, 27, 42), 1):
        name = f"{c:03}.{wnids[label]}"
        files["classes.txt"] += f"{c} {name}\n"
        (tmp_path / "images" / name).mkdir(parents=True)
        for j, content in enumerate(cells[label][:4]):
            i = 4 * c + j
            put(tmp_path / "images" / name / f"{i}.jpg", content)
            files["images.txt"] += f"{i} {name}/{i}.jpg\n"
            files[LABELS] += f"{i} {c}\n"
            files[SPLIT] += f"{i} {int(j != 1)}\n"
            image = Image.open(io.BytesIO(content))
            modes.add(image.mode)
            images["test" if j == 1 else "train"].append(image.convert("RGB"))
    for name, text in files.items():
        put(tmp_path / name, text)
    data = raw(tmp_path)
    assert data.class_names == [n.split()[1] for n in files["classes.txt"].splitlines()]
    assert data.train.labels.tolist() == [c for c in range(4) for _ in range(3)]
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    for part, of in images.items():
        (clean,) = getattr(data, part).clean(16)
        assert len(of) == len(clean.image)
        for shown, image in zip(clean.image, of, strict=True):
            close(shown, image.resize((64, 64), Image.Resampling.BILINEAR, (4, 4, 60, 60)))
    assert modes == {"L", "RGB"}


def test_an_image_that_is_listed_twice_could_be_trained_on_and_tested(tmp_path):
    """Image 2, of the test set, is made image 1's file, of the training set."""
    place, line = f"{NAMES[0]}/a.jpg", f"2 {NAMES[0]}/b.jpg\n"
    root = write(tmp_path, images=FILES["images.txt"].replace(line, f"2 {place}\n"))
    with pytest.raises(DataError) as caught:
        cub200(root)
    assert str(caught.value) == (
        f"'{tmp_path / 'images.txt'}', line 3: image 2 is '{place}', as image 1 is; remove one of "
        "them from the three files, or unpack CUB_200_2011.tgz again"
    )
