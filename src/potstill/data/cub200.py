"""CUB-200-2011, birds of 200 species, read from the folder that its authors pack.

C. Wah, S. Branson, P. Welinder, P. Perona, S. Belongie, The Caltech-UCSD Birds-200-2011 Dataset,
California Institute of Technology, CNS-TR-2011-001, 2011.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from potstill.data.folder import Listing
from potstill.errors import DataError, StorageError

FOLDER = "CUB_200_2011"
"""What the authors' archive unpacks to."""
IMAGES, LABELS, SPLIT = FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
CLASSES = "classes.txt"
ID = "0*[1-9][0-9]{0,17}"
PART = r"(?!\.\.?(?:/|$))[^/]+"
"""Of a path; not .., as a list must not reach out of images/."""
FORMS = {
    IMAGES: (f"{PART}/{PART}", "an image id and <class folder>/<file>, below images/"),
    LABELS: (ID, "an image id and a class id, both from 1"),
    SPLIT: ("[01]", "an image id and 1 for training or 0 for test"),
    CLASSES: ("[^/]+", "a class id and its folder"),
}
"""What follows the id in a line of each file: its pattern, and what a whole line has in words."""
AGAIN = f"unpack {FOLDER}.tgz again"


@dataclass(frozen=True)
class _Table:
    """What a file says of each id, and the number of the line where it does."""

    path: Path
    lines: dict[int, int]
    values: dict[int, str]

    def at(self, key: int) -> str:
        return f"'{self.path}', line {self.lines[key]}"


def cub200(root: Path | None) -> dict[str, Listing]:
    """Images of "train" and "test" by image id, from `root`, else POTSTILL_DATA; no download.

    Class ids are the official ones less 1, names their folders; there are as many as the files
    have. Images on disk that no line lists are left out. Raises StorageError where it is not found
    or is incomplete, malformed or damaged, and DataError where its files do not agree, class ids
    have a gap or a split has no image.
    """
    folder = _find(root)
    images, labels, split = (_table(folder / name) for name in FILES)
    for other in (labels, split):
        _same_ids("image", images, other)
    names = _names(images, labels, folder / CLASSES)
    _check_there(folder / "images", images)
    found = {}
    for part, value in (("train", "1"), ("test", "0")):
        ids = [i for i in sorted(images.lines) if split.values[i] == value]
        if not ids:
            raise DataError(f"'{split.path}' has no {part} image, no line ends in {value}; {AGAIN}")
        paths = [folder / "images" / images.values[i] for i in ids]
        found[part] = Listing(paths, [int(labels.values[i]) - 1 for i in ids], names)
    return found


def _find(root: Path | None) -> Path:
    """The folder with the files: the place itself or its sub-folder, whichever has more of them."""
    variable = os.environ.get("POTSTILL_DATA")
    place = root if root is not None or not variable else Path(variable).expanduser()
    if place is not None:
        count = {f: sum((f / n).is_file() for n in FILES) for f in (place, place / FOLDER)}
        if any(count.values()):
            return max(count, key=lambda f: count[f])
    looked_for = f"{', '.join(FILES)} and images/, also in a folder {FOLDER}"
    fetch = f"Fetch {FOLDER}.tgz from its authors (Caltech), unpack it"
    if root is not None:
        raise StorageError(
            f"no CUB-200-2011 in data.root '{root}'; looked there for {looked_for}. {fetch} and "
            "correct data.root, or leave it out to use POTSTILL_DATA"
        )
    looked = f"in POTSTILL_DATA '{variable}'" if variable else "POTSTILL_DATA (not set)"
    raise StorageError(
        f"CUB-200-2011 was not found.\n  - data.root: not given\n  - {looked}: {looked_for}\n"
        f"There is no download. {fetch} and set data.root=FOLDER or POTSTILL_DATA=FOLDER"
    )


def _table(path: Path) -> _Table:
    """One of the files; blank lines do not count."""
    pattern, expected = FORMS[path.name]
    # every blank is taken before the rest, which " .." would else pass as a part
    form = re.compile(rf"({ID})\s+(?=\S)({pattern})")
    found = _Table(path, {}, {})
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as fault:
        raise StorageError(f"no file '{path}'; {AGAIN}") from fault
    except (OSError, UnicodeDecodeError) as fault:
        raise StorageError(f"cannot read '{path}' as text ({fault}); {AGAIN}") from fault
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if not line:
            continue
        if (fields := form.fullmatch(line)) is None:
            raise StorageError(
                f"'{path}', line {number}: expected {expected}; found '{line[:60]}'. Correct it, "
                f"or {AGAIN}"
            )
        if (key := int(fields[1])) in found.lines:
            raise StorageError(
                f"'{path}', line {number}: {key} is in line {found.lines[key]} already; remove one"
            )
        found.lines[key], found.values[key] = number, fields[2]
    if not found.lines:
        raise StorageError(f"'{path}' is empty; {AGAIN}")
    return found


def _same_ids(kind: str, first: _Table, second: _Table) -> None:
    for one, other in ((first, second), (second, first)):
        for key in one.lines:
            if key not in other.lines:
                raise DataError(
                    f"{one.at(key)}: {kind} {key} is not in '{other.path}'; add it, or {AGAIN}"
                )


def _names(images: _Table, labels: _Table, listed: Path) -> list[str]:
    """The folder of each class, by class id; `listed`, where it is there, must have the same."""
    classes = _Table(labels.path, {}, {})
    owners: dict[str, int] = {}
    for i, place in sorted(images.values.items()):
        folder, c = place.split("/")[0], int(labels.values[i])
        if (known := classes.values.setdefault(c, folder)) != folder:
            clash = f"images of class {c} are in '{known}'"
        elif (owner := owners.setdefault(folder, c)) != c:
            clash = f"images in '{folder}' have class {owner}"
        else:
            classes.lines.setdefault(c, labels.lines[i])
            continue
        raise DataError(
            f"{labels.at(i)}: image {i} in '{folder}' ({images.at(i)}) has class {c}, but other "
            f"{clash}; correct a file, or {AGAIN}"
        )
    for expected, c in enumerate(sorted(classes.lines), 1):
        if c != expected:
            raise DataError(
                f"{classes.at(c)}: there is a class {c} and no class {expected}; number them from "
                f"1 without a gap, or {AGAIN}"
            )
    if listed.is_file():
        official = _table(listed)
        _same_ids("class", classes, official)
        for c, name in official.values.items():
            if name != (folder := classes.values[c]):
                raise DataError(
                    f"{official.at(c)}: class {c} is '{name}', but its images are in '{folder}'; "
                    f"correct it, or {AGAIN}"
                )
    return [name for _, name in sorted(classes.values.items())]


def _check_there(folder: Path, images: _Table) -> None:
    """Every image that is listed is on disk, and listed once: no test image is trained on."""
    if not folder.is_dir():
        raise StorageError(f"no folder '{folder}'; {AGAIN}")
    # a listing of each folder: 11,788 questions, one an image, are slow on a network drive
    there = {f.name: {p.name for p in f.iterdir()} for f in folder.iterdir() if f.is_dir()}
    known: dict[str, int] = {}
    for i, place in sorted(images.values.items()):
        if (other := known.setdefault(place, i)) != i:
            raise DataError(
                f"{images.at(i)}: image {i} is '{place}', as image {other} is; remove one of them "
                f"from the three files, or {AGAIN}"
            )
        name, file = place.split("/")
        if file not in there.get(name, ()):
            raise StorageError(f"{images.at(i)}: no image '{folder / place}'; {AGAIN}")
