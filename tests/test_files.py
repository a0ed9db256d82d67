"""Files are whole or absent, and known by their sha256."""

import hashlib
import json
import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill import files
from potstill.errors import StorageError


def flip(path, position, mask=0x01):
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def in_subprocess(code, folder):
    """Run code, in a folder, in a Python of its own; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_hash_returned_is_that_of_the_file(tmp_path):
    path = tmp_path / "a.bin"
    assert files.write_bytes(path, b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert files.sha256_of(path) == hashlib.sha256(b"abc").hexdigest()
    assert files.read_bytes(path, files.sha256_of(path)) == b"abc"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_file_has_the_permissions_that_open_would_give_it(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    files.write_bytes(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    """A real limit on the size of files, which the system enforces in the middle of the write."""
    files.write_bytes(tmp_path / "a.bin", b"old")
    code = """
import resource
from potstill import files
from potstill.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    files.write_bytes("a.bin", bytes(5000))
except StorageError as error:
    print(error.exit_code, error)
"""
    said = in_subprocess(code, tmp_path)
    assert said.startswith("3 a.bin cannot be written: the file is too large")
    assert "ulimit -f" in said
    assert os.listdir(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_a_full_disk_is_said_in_words():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError) as full, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    error = files.storage_error("student.safetensors", "written", full.value)
    assert str(error).startswith("student.safetensors cannot be written: no space left")


def test_a_folder_without_permission_is_said_in_words(tmp_path):
    """In a process of another user, since root may write anywhere."""
    code = """
import os
from potstill import files
from potstill.errors import StorageError
os.chmod(".", 0o555)
if os.geteuid() == 0:
    os.setuid(65534)
try:
    files.write_bytes("a.bin", b"x")
except StorageError as error:
    print(error)
"""
    said = in_subprocess(code, tmp_path)
    assert "a.bin cannot be written: permission denied" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent/a.bin", "no such file or folder"),
        ("file/a.bin", "a part of the path is a file"),
        ("folder", "it is a folder"),
    ],
)
def test_a_path_that_cannot_be_is_said_in_words(tmp_path, path, reason):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=reason):
        files.write_bytes(tmp_path / path, b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_file_system_that_cannot_sync_a_folder_is_accepted():
    """/proc answers EINVAL, as some network mounts do."""
    descriptor = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(descriptor)
    os.close(descriptor)
    files.sync_folder("/proc")


def test_a_missing_or_changed_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.bin"
    for read in (files.read_bytes, files.sha256_of, files.read_json, files.load_tensors):
        with pytest.raises(StorageError, match=r"a\.bin cannot be read: there is no such file"):
            read(path)
    files.write_bytes(path, b"abc")
    with pytest.raises(StorageError, match=r"a\.bin is damaged"):
        files.read_bytes(path, "0" * 64)


# JSON


@settings(deadline=None)  # the machine may be busy
@given(st.floats())
def test_a_float_survives_json_bit_for_bit(number):
    (again,) = files.decode_json(files.encode_json([number]))
    if math.isnan(number):
        assert math.isnan(again)
    else:
        assert struct.pack("d", again) == struct.pack("d", number)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(deadline=None)  # the machine may be busy
@given(values)
def test_what_json_holds_comes_back_equal(value):
    assert files.decode_json(files.encode_json(value)) == value


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "\\NaN", "\\\\NaN", "nan", "\\"])
def test_a_text_that_looks_like_a_number_stays_a_text(text):
    assert files.decode_json(files.encode_json(text)) == text


def test_json_with_nan_is_still_json_to_others():
    def refuse(word):
        raise AssertionError(word)

    text = files.encode_json({"loss": math.nan, "best": math.inf, "worst": -math.inf})
    others = json.loads(text, parse_constant=refuse)
    assert others == {"loss": "NaN", "best": "Infinity", "worst": "-Infinity"}


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [0, torch.zeros(1)]}, r"value\.a\[1\]: JSON cannot hold a Tensor"),
        ({"a": {1: 2}}, r"value\.a: JSON keys are strings, not 1"),
        ({1, 2}, "value: JSON cannot hold a set"),
    ],
)
def test_what_json_would_lose_is_refused_with_its_place(value, where):
    with pytest.raises(TypeError, match=where):
        files.encode_json(value)


def test_damaged_json_is_refused_by_name(tmp_path):
    path = tmp_path / "state.json"
    files.write_json(path, {"epoch": 3})
    assert files.read_json(path) == {"epoch": 3}
    for damage in (path.read_bytes()[:-4], b"\xff", b""):
        path.write_bytes(damage)
        with pytest.raises(StorageError, match=r"state\.json is damaged: not JSON"):
            files.read_json(path)


# tensors


def round_trip(tmp_path, tensors, metadata=None):
    path = tmp_path / "t.safetensors"
    sha256 = files.save_tensors(path, tensors, metadata or {})
    assert sha256 == files.sha256_of(path)
    loaded, read = files.load_tensors(path, sha256)
    assert read == (metadata or {})
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].is_contiguous()
        assert torch.equal(loaded[name], tensor.detach())
    return loaded


def test_every_kind_of_tensor_comes_back(tmp_path):
    round_trip(
        tmp_path,
        {
            "scalar": torch.tensor(3.5),
            "count": torch.tensor(2**62),
            "mask": torch.tensor([True, False]),
            "half": torch.randn(3).bfloat16(),
            "empty": torch.zeros(0, 3),
            "also empty": torch.zeros(0, 3),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "double": torch.randn(2, 2, dtype=torch.float64),
            "complex": torch.randn(2, dtype=torch.complex64),
            "parameter": torch.nn.Parameter(torch.randn(2)),
        },
    )
    assert round_trip(tmp_path, {}) == {}


def test_channels_last_transposed_and_expanded_tensors_come_back_contiguous(tmp_path):
    image = torch.randn(2, 3, 4, 5)
    round_trip(
        tmp_path,
        {
            "channels_last": image.to(memory_format=torch.channels_last),
            "transposed": image.transpose(1, 3),
            "expanded": torch.randn(1).expand(4),
            "strided": torch.arange(10)[::3],
        },
    )


def test_tensors_that_share_memory_come_back_apart(tmp_path):
    whole = torch.randn(6)
    loaded = round_trip(
        tmp_path,
        {
            "head": whole,
            "tied": whole,
            "left": whole[:3],
            "grid": whole.view(2, 3),
            "none": whole[:0],
        },
    )
    loaded["head"].zero_()
    assert torch.equal(loaded["tied"], whole)


def test_lazy_conjugates_and_negatives_keep_their_sign(tmp_path):
    """conj() only sets a flag on the tensor, which safetensors itself drops without a word."""
    number = torch.tensor([1.0 + 2.0j])
    round_trip(tmp_path, {"conj": number.conj(), "neg": number.conj().imag})


def test_odd_names_and_metadata_come_back(tmp_path):
    odd = ["", " ", 'a"b', "a\\b", "a\nb", "a\x00b", "é😀", "../up", "a.b.c", "x" * 1000]
    tensors = {name: torch.full((1,), i) for i, name in enumerate(odd)}
    round_trip(tmp_path, tensors, {name: name for name in odd})


def test_a_reserved_name_and_unstorable_tensors_are_refused_by_name(tmp_path):
    for name, tensor in {
        "__metadata__": torch.zeros(1),
        "sparse": torch.zeros(1).to_sparse(),
        "absent": torch.zeros(1, device="meta"),
        "wide": torch.zeros(1, dtype=torch.complex128),
    }.items():
        with pytest.raises(StorageError, match=name):
            files.save_tensors(tmp_path / "t.safetensors", {name: tensor}, {})
    assert os.listdir(tmp_path) == []


def test_equal_contents_give_equal_hashes():
    """safetensors alone writes metadata in random order."""
    tensors = {"a": torch.zeros(2), "b": torch.ones(2)}
    metadata = {str(i): str(i) for i in range(20)}
    backwards = dict(reversed(metadata.items()))
    assert files.encode_tensors(tensors, metadata) == files.encode_tensors(tensors, backwards)


def test_one_flipped_byte_anywhere_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    sha256 = files.save_tensors(path, {"a": torch.randn(4)}, {"k": "v"})
    for position in range(path.stat().st_size):
        flip(path, position)
        with pytest.raises(StorageError, match=r"t\.safetensors is damaged"):
            files.load_tensors(path, sha256)
        flip(path, position)
    files.load_tensors(path, sha256)


def test_a_file_without_recorded_hash_loads_or_is_refused_but_never_crashes(tmp_path):
    path = tmp_path / "t.safetensors"
    files.save_tensors(path, {"a": torch.randn(4), "e": torch.zeros(0)}, {"k": "v"})
    whole = path.read_bytes()
    damages = [whole[:n] for n in range(len(whole))]
    damages += [
        whole[:n] + bytes([whole[n] ^ mask]) + whole[n + 1 :]
        for n in range(150)
        for mask in (1, 32)
    ]
    damages += [whole + b"x", b"PK\x03\x04" + bytes(100), b"\x00" * 100]
    refused = 0
    for damage in damages:
        try:
            files.decode_tensors(damage, "t.safetensors")
        except StorageError as error:
            assert "t.safetensors is damaged" in str(error)
            refused += 1
    assert refused > len(whole)


def test_the_bytes_are_safetensors_and_not_pickle():
    data = files.encode_tensors({"a": torch.zeros(1)}, {"k": "odd length"})
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0  # the format asks for aligned tensors
    assert json.loads(data[8 : 8 + size])["a"]["dtype"] == "F32"
