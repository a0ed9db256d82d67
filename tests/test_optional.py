"""Optional packages: absent, broken, and lacking something themselves."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from potstill.errors import MissingExtra
from potstill.optional import require

Write = Callable[[Mapping[str, str]], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """A function that writes packages, as {file: code}, to where Python finds them first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(files: Mapping[str, str]) -> None:
        for name, code in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(code)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def said(module: str, extra: str = "spirits", why: str = "a dram") -> str:
    """The message, which must be one line, and the same when it is asked for again."""
    before = set(sys.modules)
    messages = []
    for _ in range(2):
        with pytest.raises(MissingExtra) as error:
            require(module, extra, why)
        messages.append(str(error.value))
        assert set(sys.modules) == before
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


def test_a_package_that_is_there_is_given(write: Write):
    write({"mash/__init__.py": "", "mash/tun.py": "grist = 3"})
    assert require("mash", "spirits", "a dram") is sys.modules["mash"]
    assert require("mash.tun", "spirits", "a dram").grist == 3


def test_an_absent_package_is_said_to_be_absent_with_the_command_that_brings_it(write: Write):
    assert said("mash") == (
        "a dram needs mash, which is not installed; pip install 'potstill[spirits]'"
    )
    assert said("mash.tun") == said("mash")


def test_an_absent_part_is_not_an_absent_package(write: Write):
    """An older release of it, most likely."""
    write({"mash/__init__.py": ""})
    require("mash", "spirits", "a dram")
    assert said("mash.tun").startswith(
        "a dram needs mash, which is installed but cannot be imported: No module named 'mash.tun'; "
    )


def test_a_package_that_lacks_another_is_told_apart_from_an_absent_one(write: Write):
    write({"mash/__init__.py": "import barley"})
    assert said("mash") == (
        "a dram needs mash, which is installed but cannot be imported: No module named 'barley'; "
        "pip install 'potstill[spirits]' brings what it needs"
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('the grist is wet\\nmore lines')", "the grist is wet"),
        ("raise OSError('libmash.so: cannot open')", "libmash.so: cannot open"),
        ("import sys; sys.yeast", "module 'sys' has no attribute 'yeast'"),
        ("raise ImportError('cannot import name x')", "cannot import name x"),
        ("raise ValueError", "ValueError"),
        ("1 +", "invalid syntax (__init__.py, line 1)"),
    ],
)
def test_a_broken_package_is_said_to_be_broken_with_its_first_line(
    code: str, reason: str, write: Write
):
    write({"mash/__init__.py": code})
    assert said("mash") == (
        f"a dram needs mash, which is installed but cannot be imported: {reason}; "
        "install it anew: pip install --force-reinstall --no-deps mash"
    )


def test_parts_of_a_failed_package_do_not_change_the_second_message(write: Write):
    """mash.tun imports, mash fails. A tun left behind would not be bound to the second mash, whose
    fault would then be "partially initialized module 'mash' has no attribute 'tun'".
    """
    write(
        {
            "mash/__init__.py": "import mash.tun\nmash.tun.stir()",
            "mash/tun.py": "def stir():\n    raise RuntimeError('no water')",
        }
    )
    assert "cannot be imported: no water; " in said("mash")


def test_parts_of_a_failed_part_are_forgotten_and_the_rest_kept(write: Write):
    write(
        {
            "mash/__init__.py": "",
            "mash/malt.py": "",
            "mash/tun/__init__.py": "import mash.tun.rake\nimport absent",
            "mash/tun/rake.py": "",
        }
    )
    require("mash.malt", "spirits", "a dram")
    assert "No module named 'absent'" in said("mash.tun")
    assert "mash.malt" in sys.modules


NMS = "operator torchvision::nms does not exist"
BROKEN = {
    "torchvision/__init__.py": f"import torchvision.ops\nraise RuntimeError('{NMS}\\nmore lines')",
    "torchvision/ops.py": "",
}


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torchvision is here is forgotten for a test."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("without_torchvision")
def test_a_torchvision_of_another_build_is_explained(write: Write):
    write(BROKEN)
    assert said("torchvision", "vision", "tv:resnet18") == (
        "tv:resnet18 needs torchvision, which is installed but cannot be imported: "
        f"{NMS}; torchvision must be built for the torch that is here, {torch.__version__}; "
        "install both together, from the same index"
    )


@pytest.mark.usefixtures("without_torchvision")
def test_a_torchvision_that_fails_in_other_words_is_explained_as_well(write: Write):
    write({"torchvision/__init__.py": "raise OSError('libcudart.so.13: cannot open')"})
    assert "libcudart.so.13: cannot open; torchvision must be built for " in said("torchvision")


@pytest.mark.usefixtures("without_torchvision")
def test_a_package_that_fails_because_of_torchvision_is_named_with_the_real_reason(write: Write):
    parts = {"mash/__init__.py": "from . import layers", "mash/layers.py": "import torchvision"}
    write(BROKEN | parts)
    message = said("mash", "timm", "timm:resnet18")
    assert message.startswith(
        f"timm:resnet18 needs mash, which is installed but cannot be imported: {NMS}; "
        f"torchvision must be built for the torch that is here, {torch.__version__}; "
    )


def test_a_package_that_lacks_torchvision_is_not_told_of_builds(write: Write):
    write({"mash/__init__.py": "raise ModuleNotFoundError('No torchvision', name='torchvision')"})
    assert said("mash", "timm").endswith(
        ": No torchvision; pip install 'potstill[timm]' brings what it needs"
    )
