"""The README and CONTRIBUTING are true: their commands exist and their snippets run."""

from __future__ import annotations

import doctest
import functools
import importlib
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from potstill import recipe
from potstill.listing import entries
from potstill.reproduce.plan import Plan, make

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language, without the indentation of a list."""
    text = (ROOT / page).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.S | re.M)
    return [re.sub(rf"^{indent}", "", body, flags=re.M) for indent, body in found]


def commands(page: str) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {words[1] for words in commands("README.md") if words[0] == "make"}
    targets |= set(re.findall(r"`make (\w+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert targets >= {"demo", "test", "check", "slow"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_every_potstill_command_is_understood(tmp_path: Path) -> None:
    """Recipes and overrides load; options exist. Files they name are made up."""
    weights = tmp_path / "RUN"
    weights.touch()
    seen = set()
    for words in (w for page in PAGES for w in commands(str(page)) if page.name != "results.md"):
        if not words[0].endswith("potstill"):
            continue
        seen.add(words[1])
        command = words[1:3] if words[1] == "store" else words[1:2]  # it has commands of its own
        help_text = run_potstill(*command, "--help")
        for option in (w for w in words if w.startswith("--")):
            assert option in help_text, words
        if words[1] == "train":
            overrides = [w.replace("RUN", str(weights)) for w in words[3:] if "=" in w]
            recipe.load(words[2], overrides)
        if words[1] == "reproduce":
            plan = reproduce_words(words, str(weights))
            assert plan.rows, words
    commands_of_pages = "demo train doctor bench store reproduce report eval cross-task"
    assert seen == {*commands_of_pages.split(), "list", "schema", "show"}


def reproduce_words(words: list[str], weights: str) -> Plan:
    """The plan that a command asks for."""
    options = {"--table": "table", "--pair": "pair"}
    given: dict[str, Any] = {options[w]: v for w, v in pairwise(words) if w in options}
    if "--methods" in words:
        given["methods"] = words[words.index("--methods") + 1].split(",")
    if "--weights" in words:
        given["weights"] = [weights]
    overrides = [w for w in words[3:] if "=" in w]
    return make(words[2], Path("unused"), overrides=overrides, **given)


@functools.cache  # pages repeat commands
def run_potstill(*words: str) -> str:
    command = [sys.executable, "-m", "potstill", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_the_readme_recipe_is_the_shipped_one(tmp_path: Path) -> None:
    (text,) = blocks("README.md", "yaml")
    given = recipe.loads(text, ["teachers.0.weights=x.pth"])
    shipped = recipe.load("cifar100/kd-resnet56-resnet20", ["teachers.0.weights=x.pth"])
    assert given == shipped


def test_the_readme_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    pairs = list(zip((x.reshape(-1, 8, 8) * 15).astype("uint8"), y, strict=True))
    names: dict[str, Any] = {"train": pairs[:200], "test": pairs[200:300]}
    for code in blocks("README.md", "python"):
        exec(compile(code, "README.md", "exec"), names)
    assert 0 <= names["run"].result["scores"]["student"]["top1"] <= 100
    shapes = {k: tuple(v) for k, v in names["net"].shapes.items()}
    assert f"{names['net'].shapes}" in (ROOT / "README.md").read_text(), shapes


def test_the_snippets_about_networks_run() -> None:
    """... and give the values that stand behind them."""
    names: dict[str, Any] = {}
    checked = 0
    for code in blocks("docs/networks.md", "python"):
        exec(compile(code, "networks.md", "exec"), names)
        for expression, value in re.findall(r"^(\S.*?)  # ([({t].*)$", code, re.M):
            value, more, _ = value.partition(", ...")
            if value[0] in "({" or value.startswith("torch.Size"):
                assert repr(eval(expression, names)).startswith(value), expression
                assert more or repr(eval(expression, names)) == value, expression
                checked += 1
    assert checked == 4


def test_the_method_of_contributing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 1's file, as printed, under step 2's name, is held to the contract's tests."""
    from potstill.methods import METHODS
    from tests.methods import test_contract

    (code,) = blocks("CONTRIBUTING.md", "python")
    module = ModuleType("hint")
    monkeypatch.setitem(sys.modules, "hint", module)
    exec(compile(code, "hint.py", "exec"), module.__dict__)
    monkeypatch.setitem(METHODS, "hint", module.Hint)
    monkeypatch.setitem(test_contract.ALL, "hint", module.Hint)
    monkeypatch.setitem(test_contract.CASES, "hint", test_contract.Case())
    test_contract.test_loss_is_pure("hint")
    test_contract.test_gradient_reaches_every_module("hint")
    test_contract.test_teacher_is_untouched("hint")
    test_contract.test_overfits_a_tiny_problem("hint")
    words = ["method={name: hint, beta: 3.0}", "teachers.0.weights=x.pth"]
    assert recipe.load("digits/kd", words).method.model_dump() == {"name": "hint", "beta": 3.0}
    assert "hint" in [e["name"] for e in entries("methods")]


@pytest.mark.parametrize(
    "name", ["net", "recipe", "notebook", "discover", "anatomy", "listing", "errors"]
)
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"potstill.{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


def test_nothing_of_this_machine_is_in_the_repository() -> None:
    """No absolute path of a developer's machine, in any tracked file."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split():
        text = (ROOT / name).read_bytes()
        assert not re.search(rb"/(work|home|root|Users)/[a-z]", text), name
