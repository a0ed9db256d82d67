"""How fast a training is: whole epochs, a step by parts, and beside a plain loop."""

import json
import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from potstill import bench, recipe, stopwatch
from potstill.bench.contest import Timing, contest
from potstill.bench.loop import PlainLoop, _Augmented
from potstill.bench.report import as_object
from potstill.data import load
from potstill.errors import PotstillError

CPU = torch.device("cpu")
DIGITS = {
    "students": ["resnet8"],
    "method": "vanilla",
    "data": {"name": "digits", "subset": 192, "batch_size": 64},
    "optimizers": {"default": {"name": "sgd", "lr": 0.05, "momentum": 0.9}},
    "epochs": 2,
}


def digits(*overrides: str) -> recipe.Recipe:
    return recipe.resolve(DIGITS, list(overrides))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a ResNet-8 for digits."""
    from potstill import files
    from potstill.models import build

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    files.save_tensors(path, build("resnet8", 10, (1, 8, 8)).state_dict(), {})
    return str(path)


def taught(teacher: str, *overrides: str) -> recipe.Recipe:
    return digits("method=kd", f"teachers=[{{name: resnet8, weights: {teacher}}}]", *overrides)


# --- figures by hand


def test_images_a_second_of_whole_epochs_by_hand():
    """Two of ten batches of 10 images in 0.2 s, the others at 0.1 s, an ending of 1 s: 2 s."""
    timing = Timing(10, 100, [0.2, 0.4], [0.1, 0.2], [1.0, 0.0])
    assert timing.steps_per_second == [100.0, 50.0]
    assert timing.images_per_second == [50.0, 50.0]


class Clocked:
    """A contestant that only notes what it is asked for."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.images, self.batch_size, self.notes = name, 100, 10, notes

    def begin(self) -> None:
        self.notes.append(f"{self.name}:")

    def steps(self, count: int) -> None:
        self.notes.append(f"{self.name}{count}")

    def end_epoch(self) -> float:
        self.notes.append(f"{self.name}.")
        return 1.0


def test_contestants_take_turns_and_each_is_first_once():
    notes: list[str] = []
    found = contest([Clocked("a", notes), Clocked("b", notes)], 2, 5, CPU)
    assert notes == ["a:", "a5", "a.", "b:", "b5", "b.", "b:", "b5", "b.", "a:", "a5", "a."]
    assert [len(t.step_seconds) for t in found.values()] == [2, 2]
    assert found["a"].ending_seconds == [1.0, 1.0]


def test_the_ratio_is_of_rounds_not_of_medians():
    """Rounds of 100/50, 60/20 and 90/45 images/s: ratios 2, 3, 2, median 2."""

    class Job:
        environment: ClassVar = {"cpu": "some"}
        training = SimpleNamespace(phases=[SimpleNamespace(name="distill")])

    class One:
        name, job, workers = "ours", Job(), 0

    loop = One()
    loop.name = "loop"
    own = Timing(1, 2, [2 / 100, 2 / 60, 2 / 90], [0.1] * 3, [0.0] * 3)
    other = Timing(1, 2, [2 / 50, 2 / 20, 2 / 45], [0.1] * 3, [0.0] * 3)
    split = {"data": 0.1, "rest": 0.3}
    found = as_object(One(), loop, {"ours": own, "loop": other}, split, 5, 0.5, 2.0, 7)
    assert found["ratio"] == pytest.approx(2.0)
    assert found["ratio_range"] == pytest.approx([2.0, 3.0])
    assert found["images_per_second"] == pytest.approx(90)
    assert found["reference_images_per_second"] == pytest.approx(45)
    assert (found["n"], found["peak_memory_bytes"], found["hit_rate"]) == (3, 5, 0.5)
    text = "\n".join(bench.table(found))
    assert "n = 3 rounds of 7 steps" in text
    assert re.search(r"data +100\.00 ms +25\.0 %", text)
    assert (
        "2.00 times the plain loop (2.00 to 3.00), which makes 45 images/s with no worker" in text
    )
    assert "stored outputs: 50.0 % were there" in text


# --- ours


def test_every_begin_goes_back_to_the_same_first_batches():
    """Else the outputs of a store would not all be there after the warm-up."""
    ours = bench.Ours(digits("data.subset=256"))
    seen: list[torch.Tensor] = []
    ours.job.method.register_forward_pre_hook(lambda m, args: seen.append(args[0].index))
    for _ in range(2):
        ours.begin()
        ours.steps(1)
    ours.close()
    assert len(seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    assert not torch.equal(seen[0], seen[1])


def test_a_store_is_full_once_it_is_warm_and_leaves_nothing_behind(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    ours = bench.Ours(taught(teacher, "store=true"))
    ours.begin()
    assert ours.hit_rate() < 0.1
    ours.begin()
    assert ours.hit_rate() == 1.0
    assert list(tmp_path.glob("potstill-bench-*/teachers/*/store.json"))
    ours.close()
    assert not list(tmp_path.glob("potstill-bench-*"))
    alone = bench.Ours(digits())
    assert alone.hit_rate() is None
    alone.close()


def test_a_step_is_split_into_all_its_parts(teacher):
    ours = bench.Ours(taught(teacher))
    split = ours.split(1)
    ours.close()
    assert list(split) == [*stopwatch.PARTS, "rest"]
    assert all(seconds > 0 for seconds in split.values())


def test_more_steps_than_an_epoch_has_are_refused():
    ours = bench.Ours(digits())
    ours.begin()
    with pytest.raises(PotstillError, match="an epoch has 3 batches, and --steps 2 comes after"):
        ours.steps(2)
    ours.close()


# --- the plain loop


def test_the_plain_loop_sees_what_ours_sees_but_for_the_draw():
    """Clean images are equal; augmented ones are crops of the padded image, mirrored or not."""
    data = load("digits", subset=50)
    clean = next(data.test.clean(20))
    plain = _Augmented(data.test.first(20), False)
    for row in range(20):
        image, label, index, _ = plain[row]
        torch.testing.assert_close(image, clean.image[row].contiguous(), atol=1e-6, rtol=0)
        assert (label, index) == (clean.label[row], clean.index[row])
    every = _Augmented(data.train, True)
    codes = torch.arange(len(data.train.images.codes))
    index = data.train.indices[:1].expand(len(codes))
    (views,) = data.train.images.load([(index, codes)])
    torch.manual_seed(0)
    drawn = {int((views - every[0][0]).abs().amax((1, 2, 3)).argmin()) for _ in range(200)}
    assert drawn == set(codes.tolist())
    apart = [(views - every[0][0]).abs().amax((1, 2, 3)).min().item() for _ in range(20)]
    assert max(apart) < 1e-6


def test_the_plain_loop_trains_what_the_recipe_trains(teacher):
    """On the same batches its weights are those of the engine, in float32."""
    settings = taught(teacher, "precision=fp32", "data.padding=0")
    ours, loop = bench.Ours(settings), PlainLoop(settings, workers=0)
    batches = list(islice(ours.job.training._batches(0), 2))
    loop._batches = lambda images, shuffle: iter(batches)  # the draw alone is another one
    ours.begin()
    loop.begin()
    ours.close()
    a, b = (dict(c.job.method.student.named_parameters()) for c in (ours, loop))
    for name, p in a.items():
        torch.testing.assert_close(b[name], p, atol=1e-5, rtol=1e-4)
    assert not loop.job.method.student.channels_last
    assert loop.job.method.stored is None


def test_what_is_not_plain_is_refused(tmp_path):
    online = {**DIGITS, "students": ["resnet8", "resnet8"], "method": "afd_online"}
    optimizers = {name: {"name": "adam", "lr": 0.01} for name in ("features", "discriminators")}
    online["optimizers"] = {**DIGITS["optimizers"], **optimizers}
    with pytest.raises(PotstillError, match="AFDOnline takes more than one gradient in a step"):
        PlainLoop(recipe.resolve(online), workers=0)


# --- the command


def test_bench_prints_a_table_and_one_json_object(potstill, tmp_path):
    (tmp_path / "recipe.yaml").write_text(digits().to_yaml())
    words = ["bench", "recipe.yaml", "--rounds", 2, "--steps", 1, "--against", "loop"]
    code, output, errors = potstill(*words)
    assert (code, errors) == (0, "")
    assert "images/s of whole epochs, evaluation and checkpoint included" in output
    assert "times the plain loop" in output
    code, output, _ = potstill(*words, "--json")
    found = json.loads(output)
    assert code == 0
    assert found["n"] == 2
    assert found["ratio"] > 0
    assert found["peak_memory_bytes"] > 10**7
    wanted = "images_per_second reference_images_per_second ratio split peak_memory_bytes n"
    assert {*wanted.split()} <= found.keys()
    assert not Path("runs").exists()


def test_bench_alone_has_no_ratio(potstill, tmp_path):
    (tmp_path / "recipe.yaml").write_text(digits().to_yaml())
    code, output, _ = potstill("bench", "recipe.yaml", "--rounds", 1, "--steps", 1, "--json")
    found = json.loads(output)
    assert (code, found["ratio"], found["reference_images_per_second"]) == (0, None, None)
    code, output, _ = potstill("bench", "recipe.yaml", "--rounds", 1, "--steps", 1)
    assert "plain loop" not in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe.yaml", "--steps", 99], "an epoch has 3 batches, and --steps 99 comes after"),
        (["recipe.yaml", "epoch=3"], "epoch is unknown"),
        (["nothing.yaml"], "no such file"),
        (["recipe.yaml", "--against", "loops"], "loops"),
        (["recipe.yaml", "--rounds", 0], "--rounds"),
    ],
)
def test_what_does_not_fit_is_one_message(potstill, tmp_path, words, said):
    (tmp_path / "recipe.yaml").write_text(digits().to_yaml())
    code, _, errors = potstill("bench", *words)
    assert code in (2, 3)
    assert said in errors


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["method=kdsvd"], "KDSVD takes more than one gradient in a step; leave out --against"),
        (["data.pad_mode=reflect"], "the plain loop pads with black; set data.pad_mode=zero"),
    ],
)
def test_what_the_plain_loop_would_do_otherwise_is_refused(teacher, more, said):
    ours = bench.Ours(taught(teacher, *more))
    with pytest.raises(PotstillError, match=said):
        bench.measure(ours, taught(teacher, *more), 1, 1)
    ours.close()


def test_of_several_phases_the_last_is_measured_and_told(teacher):
    ours = bench.Ours(taught(teacher, "method=ab"))
    found = bench.measure(ours, None, 1, 1)
    ours.close()
    assert (found["phase"], found["phases"]) == ("distill", 2)
    assert "of the last of 2 phases, distill" in bench.table(found)
