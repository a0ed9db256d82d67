import os
import warnings

import pytest
import torch

from potstill.data import cache
from potstill.data.cache import Decoded, cached, key_of
from potstill.errors import StorageError


class Decoder:
    """Counts how often it decodes."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        pixels = torch.arange(24, dtype=torch.uint8).view(2, 2, 2, 3)
        return Decoded(pixels, torch.tensor([1, 0]), ["a", "b"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def same(a, b):
    return a.pixels.equal(b.pixels) and a.labels.equal(b.labels) and a.names == b.names


def test_the_second_time_nothing_is_decoded(folder):
    decode = Decoder()
    first = cached("set", decode)
    assert same(cached("set", decode), first) and decode.calls == 1
    assert [p.name for p in folder.iterdir()] == ["set.safetensors"]


def flip_a_pixel(entry):
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)


def truncate(entry):
    entry.write_bytes(entry.read_bytes()[:-5])


def rename_a_class(entry):
    entry.write_bytes(entry.read_bytes().replace(rb"[\"a\"", rb"[\"c\""))


@pytest.mark.parametrize(
    "damage", [flip_a_pixel, truncate, rename_a_class, lambda entry: entry.write_bytes(b"")]
)
def test_a_damaged_entry_is_rebuilt(folder, damage):
    decode = Decoder()
    first = cached("set", decode)
    entry = folder / "set.safetensors"
    whole = entry.read_bytes()
    damage(entry)
    assert entry.read_bytes() != whole
    assert same(cached("set", decode), first) and decode.calls == 2
    assert same(cached("set", decode), first) and decode.calls == 2


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(cache, "_warned", False)
    decode = Decoder()
    with pytest.warns(UserWarning, match="cannot be kept in .*POTSTILL_CACHE"):
        first = cached("set", decode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(cached("set", decode), first) and decode.calls == 2


def test_a_failed_write_leaves_nothing_behind(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_warned", True)
    monkeypatch.setattr(os, "replace", full)
    cached("set", Decoder())
    assert list(folder.iterdir()) == []


def test_the_key_follows_contents_and_order(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    assert key_of([a, b]) == key_of([a, b]) != key_of([b, a])
    assert key_of([a]) != key_of([a], "more")
    moved = tmp_path / "c"
    moved.write_text("1")
    assert key_of([moved]) == key_of([a])
    with pytest.raises(StorageError, match=r"cannot read '.*absent'"):
        key_of([tmp_path / "absent"])
