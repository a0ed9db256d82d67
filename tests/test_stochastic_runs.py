"""Networks of stochastic depth, from a recipe to the files of a run and back."""

from __future__ import annotations

import copy
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import potstill
from potstill import cli, display, training
from potstill import data as datasets
from potstill.depth import Depth
from potstill.errors import MethodError, NetworkError, RecipeError
from potstill.files import save_tensors
from potstill.models import build
from potstill.models import weights as model_weights
from potstill.recipe import Recipe, load, loads, resolve
from potstill.run import Run
from tests.methods.test_stochastic_teachers import drawn, features, survival
from tests.test_notebook import SHAPE, go, images
from tests.test_resume import end_of

close = torch.testing.assert_close


class Listener(training.Silence):
    """Keeps what is said; where a step is named, Ctrl-C comes right after it."""

    def __init__(self, after: int | None = None) -> None:
        self.lines: list[str] = []
        self.after = after

    def say(self, line: str) -> None:
        self.lines.append(line)

    def step(self, done: int, total: int, moment: Any) -> None:
        if done == self.after:
            signal.raise_signal(signal.SIGINT)

    def epoch(self, record: Any) -> None:
        self.lines.append(display.epoch_line(record))


def skipping(name: str = "resnet8", p_end: float = 0.5, **more: Any) -> dict[str, Any]:
    """A network of a recipe, with a stochastic depth."""
    depth = {k: more.pop(k) for k in ("scope", "draw") if k in more}
    return {"name": name, "stochastic": {"p_end": p_end, **depth}, **more}


def recipe(method: Any, *students: Any, teachers: Any = (), **changes: Any) -> Recipe:
    """Two epochs of 40 digits: steps of 16, 16 and 8 images."""
    return resolve(
        {
            "students": list(students or ("resnet8",)),
            "teachers": list(teachers),
            "method": method,
            "data": {"name": "digits", "subset": 40, "batch_size": 16},
            "optimizers": {"default": {"name": "sgd", "lr": 0.05, "momentum": 0.9}},
            "epochs": 2,
            "precision": "fp32",
            "evaluate_every": 2,
            **changes,
        }
    )


def trained(settings: Recipe, place: Path, listener: Listener | None = None) -> Run:
    return training.train(settings, place, listener or Listener())


def stopped_and_resumed(settings: Recipe, place: Path, after: int) -> Run:
    with pytest.raises(training.Interrupted, match=rf"saved after step {after} of 6"):
        training.train(settings, place, Listener(after))
    return training.train(settings, place, Listener(), resume=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a ResNet-8 without stochastic depth."""
    return trained(recipe("vanilla"), tmp_path_factory.mktemp("plain") / "run").directory


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a ResNet-8 of which block l survives with 1 - l / 6."""
    return trained(recipe("vanilla", skipping()), tmp_path_factory.mktemp("half") / "run").directory


# --- what was drawn


def subnetworks(
    name: str,
    epoch: int,
    chances: list[float],
    draw: str = "batch",
    phase: str = "distill",
) -> dict[str, Any]:
    """What three steps of an epoch drew, counted one by one: 8 images in the last of them."""
    rows: list[tuple[bool, ...]] = []
    for step in range(3):
        each = None if draw == "batch" else 8 if step == 2 else 16
        found = drawn(chances, (0, phase, 3 * epoch + step, name), each).view(-1, len(chances))
        kept = [place for place, p in enumerate(chances) if p < 1]
        rows += [tuple(row[place].item() for place in kept) for row in found]
    return {
        "distinct": len(set(rows)),
        "live": pytest.approx(sum(map(sum, rows)) / len(rows), rel=1e-12),
        "blocks": len(kept),
    }


def test_an_override_is_enough_and_metrics_say_what_was_drawn(tmp_path: Path):
    short = ("data.subset=40", "data.batch_size=16", "epochs=2")
    settings = load("digits/vanilla", ["students.0.stochastic.p_end=0.7", *short])
    metrics = trained(settings, tmp_path / "run").metrics
    assert [record["subnetworks"] for record in metrics] == [
        {"student": subnetworks("student", epoch, [0.9, 0.8, 0.7])} for epoch in (0, 1)
    ]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["subnetworks"] for line in lines] == [
        record["subnetworks"] for record in metrics
    ]


@pytest.mark.parametrize(
    ("scope", "draw", "chances"),
    [
        ("full", "image", [5 / 6, 4 / 6, 1 / 2]),
        ("identity_only", "batch", [5 / 6, 1, 1]),  # stages 2 and 3 change channels and size
        ("last_half", "image", [1, 4 / 6, 1 / 2]),  # 2 l > 3
    ],
)
def test_only_blocks_in_the_scope_are_counted(
    scope: str, draw: str, chances: list[float], plain: Path, tmp_path: Path
):
    teacher = skipping(scope=scope, draw=draw, weights=str(plain))
    student = skipping(p_end=0.7, draw=draw)
    run = trained(recipe("kd", student, teachers=[teacher]), tmp_path / "run")
    assert [record["subnetworks"] for record in run.metrics] == [
        {
            "student": subnetworks("student", epoch, [0.9, 0.8, 0.7], draw),
            "teacher0": subnetworks("teacher0", epoch, chances, draw),
        }
        for epoch in (0, 1)
    ]


@pytest.mark.parametrize(
    "network", ["resnet8", skipping(draw="never"), skipping(p_end=1)], ids=["plain", "never", "1"]
)
def test_networks_that_drop_nothing_have_no_record(network: Any, tmp_path: Path):
    run = trained(recipe("vanilla", network), tmp_path / "run")
    assert not any("subnetworks" in record for record in run.metrics)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_phase_that_does_not_run_the_teacher_has_no_record_of_it(
    alpha: float, plain: Path, tmp_path: Path
):
    """FSP's second phase is plain training, unless it has a KD term."""
    settings = recipe(
        {"name": "fsp", "alpha": alpha},
        teachers=[skipping(weights=str(plain))],
        epochs={"init": 2, "distill": 1},
    )
    run = trained(settings, tmp_path / "run")
    found = [(record["phase"], record.get("subnetworks")) for record in run.metrics]
    assert found == [
        ("init", {"teacher0": subnetworks("teacher0", 0, [5 / 6, 4 / 6, 0.5], phase="init")}),
        ("init", {"teacher0": subnetworks("teacher0", 1, [5 / 6, 4 / 6, 0.5], phase="init")}),
        (
            "distill",
            {"teacher0": subnetworks("teacher0", 0, [5 / 6, 4 / 6, 0.5])} if alpha else None,
        ),
    ]


def test_the_same_seed_repeats_a_run_and_another_does_not(plain: Path, tmp_path: Path):
    runs = []
    for place, seed in (("one", 1), ("again", 1), ("other", 2)):
        settings = recipe(
            "kd", skipping(draw="image"), teachers=[skipping(weights=str(plain))], seed=seed
        )
        runs.append(end_of(trained(settings, tmp_path / place)))
    one, again, other = runs
    assert all(torch.equal(tensor, again[0][key]) for key, tensor in one[0].items())
    assert one[1:] == again[1:]
    assert one[1][2][0]["subnetworks"] != other[1][2][0]["subnetworks"]


# --- what is saved


def test_a_runs_weights_are_measured_at_the_expected_depth_wherever(half: Path):
    run = Run.open(half)
    assert run.result is not None
    scores = run.result["scores"]["student"]
    test = datasets.load("digits").test
    batch = next(test.clean(len(test.labels)))
    tensors, about = run.load_predictor()
    assert about["stochastic"] == {"p_end": 0.5, "scope": "full", "draw": "batch"}
    module: Any = build("resnet8", 10, SHAPE).module
    module.load_state_dict(tensors)
    with torch.no_grad():
        logits = features(module.eval(), batch.image, survival(3, 0.5))["logits"]
        alive = features(module, batch.image, [1.0] * 3)["logits"]
    right = [(z.argmax(1) == batch.label).float().mean().item() * 100 for z in (logits, alive)]
    assert scores["top1"] == pytest.approx(right[0])
    loss = torch.nn.functional.cross_entropy(logits, batch.label).item()
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)
    assert right[0] != right[1]
    same = pytest.approx(scores, rel=1e-6)
    assert training.evaluate_run(half)["student"]._asdict() == same
    assert training.evaluate_weights(None, half, None, None)["resnet8"]._asdict() == same
    net = model_weights.network(
        "resnet8", model_weights.read(half), 10, SHAPE, test.mean, test.std
    ).eval()
    with torch.no_grad():
        close(net.logits(batch.image), logits)


@pytest.mark.parametrize("words", [[], ["--weights"]], ids=["run", "weights"])
def test_potstill_eval_repeats_the_result(words: list[str], half: Path):
    result = Run.open(half).result
    assert result is not None
    answer = CliRunner().invoke(cli.app, ["eval", *words, str(half), "--json"])
    assert answer.exit_code == 0, answer.output
    (scores,) = json.loads(answer.output).values()
    assert scores == pytest.approx(result["scores"]["student"], rel=1e-6)


def test_a_plain_runs_metadata_say_that_it_is_plain(plain: Path):
    _, about = Run.open(plain).load_predictor()
    assert about["stochastic"] is None


def kinds(network: Any, student: Any = "resnet8") -> tuple[Any, Any, list[str]]:
    """What a teacher and a student are once they are built, and what is said of it."""
    lines: list[str] = []
    job = training.assemble(recipe("kd", student, teachers=[network]), lines.append)
    return job.method.teachers[0].stochastic, job.method.student.stochastic, lines


@pytest.mark.parametrize("how", ["weights", "name"])
def test_weights_bring_their_depth_along_unless_the_recipe_says_another(how: str, half: Path):
    own = {"p_end": 0.5, "scope": "full", "draw": "batch"}
    bare = {"name": "resnet8", "weights": str(half)} if how == "weights" else {"name": str(half)}
    assert kinds(bare) == (own, None, [])
    assert kinds({**bare, "stochastic": {"p_end": 0.5}}) == (own, None, [])
    other = {"p_end": 0.9, "scope": "last_half", "draw": "image"}
    assert kinds({**bare, "stochastic": other}) == (
        other,
        None,
        [
            "teachers.0 (resnet8): trained with stochastic depth, p_end 0.5, a new sub-network "
            "every batch"
        ],
    )


def test_a_student_that_starts_from_stochastic_weights_goes_on_so(half: Path, plain: Path):
    own = {"p_end": 0.5, "scope": "full", "draw": "batch"}
    teacher, student = ({"name": "resnet8", "weights": str(place)} for place in (plain, half))
    assert kinds(teacher, student) == (None, own, [])


def test_plain_resnet_weights_become_stochastic_without_a_word(plain: Path, tmp_path: Path):
    """Of a run of ours, and of a file that says nothing; at p_end 1 it predicts what it did."""
    tensors, _ = Run.open(plain).load_predictor()
    torch.save(tensors, tmp_path / "resnet8.pth")
    depth = {"p_end": 0.5, "scope": "full", "draw": "batch"}
    assert kinds(skipping(weights=str(plain))) == (depth, None, [])
    found, _, lines = kinds(skipping(weights=str(tmp_path / "resnet8.pth")))
    assert found == depth
    assert lines == [f"{tmp_path}/resnet8.pth: 56 of 56 tensors"]
    assert Run.open(plain).result["scores"]["student"] == result_of_teacher(plain, 1, tmp_path)


def result_of_teacher(weights: Path, p_end: float, place: Path) -> dict[str, Any]:
    teacher = skipping(p_end=p_end, weights=str(weights))
    run = trained(recipe("kd", teachers=[teacher], epochs=1), place / f"taught{p_end}")
    assert run.result is not None
    return run.result["teachers"]["teacher0"]


@pytest.mark.parametrize("name", ["vgg8", "mobilenetv1"])
def test_a_network_without_shortcuts_is_pre_trained_with_them_and_teaches(
    name: str, tmp_path: Path
):
    short: dict[str, Any] = {
        "epochs": 1,
        "data": {"name": "digits", "subset": 32, "batch_size": 16},
    }
    first = trained(recipe("vanilla", skipping(name), **short), tmp_path / "first")
    assert first.result is not None
    teacher = {"name": name, "weights": str(first.directory)}
    run = trained(recipe("kd", teachers=[teacher], **short), tmp_path / "second")
    assert run.result is not None
    assert run.result["teachers"]["teacher0"] == first.result["scores"]["student"]
    (record,) = run.metrics
    blocks = {"vgg8": 5, "mobilenetv1": 13}[name]
    assert record["subnetworks"]["teacher0"]["blocks"] == blocks
    again = training.evaluate_run(first.directory)["student"]._asdict()
    assert again == pytest.approx(first.result["scores"]["student"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    # layers 1 to 4, or 1 to 5, change the shape: a shortcut of 5 tensors each, but its counter
    [("vgg8", "VGG", 16), ("mobilenetv1", "MobileNetV1", 21)],
)
def test_plain_weights_of_a_network_without_shortcuts_are_refused(
    name: str, kind: str, more: int, tmp_path: Path
):
    place = tmp_path / f"{name}.pth"
    torch.save(build(name, 10, SHAPE).state_dict(), place)
    with pytest.raises(NetworkError) as caught:
        training.assemble(recipe("kd", teachers=[skipping(name, weights=str(place))]))
    added = ", ".join(
        f"layer1.0.shortcut.{part}"
        for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean")
    )
    assert str(caught.value) == (
        f"{place} does not fit this {kind}:\n"
        f"  only in the network: {added}, and {more} more\n"
        "this network's blocks were given shortcuts, which plain weights were trained without: "
        "train it so first, with method vanilla and this network as the student"
    )


@pytest.mark.parametrize("name", ["vgg8", "mobilenetv1"])
def test_plain_weights_do_not_pass_where_shortcuts_have_none(name: str, tmp_path: Path):
    """With identities alone no tensor is missing, and the function is another all the same."""
    tensors, about = build(name, 10, SHAPE).state_dict(), {"model": f'"{name}"'}
    save_tensors(tmp_path / "plain.safetensors", tensors, about)
    depth = {"p_end": 0.5, "scope": "identity_only", "draw": "batch"}
    teacher = {"name": name, "stochastic": depth, "weights": str(tmp_path / "plain.safetensors")}
    with pytest.raises(NetworkError) as caught:
        training.assemble(recipe("kd", teachers=[teacher]))
    assert str(caught.value) == (
        f"{tmp_path}/plain.safetensors does not say that it was trained with stochastic depth; "
        "this network's blocks were given shortcuts, which plain weights were trained without: "
        "train it so first, with method vanilla and this network as the student"
    )
    save_tensors(tmp_path / "own.safetensors", tensors, {**about, "stochastic": json.dumps(depth)})
    assert kinds({**teacher, "weights": str(tmp_path / "own.safetensors")})[0] == depth


@pytest.mark.parametrize(
    ("there", "here"),
    [("resnet14", "resnet8"), ("resnet8", "resnet14"), ("wrn_16_1", "vgg8")],
    ids=["too many layers", "too few", "all others"],
)
def test_weights_of_another_network_have_no_advice_on_shortcuts(there, here, tmp_path: Path):
    place = tmp_path / f"{there}.pth"
    torch.save(build(there, 10, SHAPE).state_dict(), place)
    with pytest.raises(NetworkError) as caught:
        training.assemble(recipe("kd", teachers=[skipping(here, weights=str(place))]))
    assert "shortcuts" not in str(caught.value)
    assert str(caught.value).splitlines()[-1].startswith(f"these weights fit {there}")


@pytest.mark.parametrize("words", ['"yes"', "yes", "[0.5]", '{"p_end": 0.5, "rate": 1}', "0.5"])
def test_what_another_program_calls_stochastic_is_nothing_to_us(words: str, tmp_path: Path):
    place = tmp_path / "resnet8.safetensors"
    save_tensors(place, build("resnet8", 10, SHAPE).state_dict(), {"stochastic": words})
    assert kinds({"name": "resnet8", "weights": str(place)})[0] is None


def test_weights_that_were_trained_with_another_scope_are_refused(tmp_path: Path):
    """VGG-8's layers 1 to 4 widen: the 4 shortcuts of 6 tensors are nothing to its last block."""
    place, depth = tmp_path / "vgg8.safetensors", {"p_end": 0.5, "scope": "full", "draw": "batch"}
    tensors = potstill.stochastic(build("vgg8", 10, SHAPE), 0.5).state_dict()
    save_tensors(place, tensors, {"model": '"vgg8"', "stochastic": json.dumps(depth)})
    teacher = skipping("vgg8", scope="identity_only", weights=str(place))
    with pytest.raises(NetworkError) as caught:
        training.assemble(recipe("kd", teachers=[teacher]))
    first, names, *rest = str(caught.value).splitlines()
    assert first == f"{place} does not fit this VGG:"
    assert re.fullmatch(
        r"  only in the file: (layer[1-4]\.0\.shortcut\.\S+, ){4}and 20 more", names
    )
    assert rest == [
        "these weights are of a network with stochastic.scope=full, and this is one with "
        "identity_only; give the same, or leave stochastic out"
    ]
    assert kinds({"name": "vgg8", "weights": str(place)}) == (depth, None, [])


def test_a_stochastic_teacher_is_measured_at_its_expected_depth_and_as_it_teaches(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before the first step, on the 898 test images, 125 at a time: eight sub-networks."""
    draws: list[Tensor] = []
    original = Depth.drawn

    def noted(depth: Depth, images: int) -> Tensor:
        draws.append(original(depth, images))
        return draws[-1]

    monkeypatch.setattr(Depth, "drawn", noted)
    listener, settings = Listener(), recipe("kd", teachers=[skipping(weights=str(plain))])
    run = trained(settings, tmp_path / "run", listener)
    module: Any = build("resnet8", 10, SHAPE).module
    module.load_state_dict(Run.open(plain).load_predictor()[0])
    module.eval()
    right = {"teacher0": 0, "teacher0_drawn": 0}
    different = set()
    for batch, alive in zip(datasets.load("digits").test.clean(125), draws, strict=False):
        for name, b in (("teacher0", survival(3, 0.5)), ("teacher0_drawn", alive.tolist())):
            with torch.no_grad():
                logits = features(module, batch.image, b)["logits"]
            right[name] += (logits.argmax(1) == batch.label).sum().item()
        different.add(tuple(alive.tolist()))
    assert len(different) > 1
    assert run.result is not None
    for name, count in right.items():
        assert run.result["teachers"][name]["top1"] == pytest.approx(100 * count / 898)
    assert right["teacher0"] != right["teacher0_drawn"]
    said = [line for line in listener.lines if line.startswith("teacher 0 (")]
    words = ("at its expected depth", "as drawn, as it teaches")
    scores = run.result["teachers"].values()
    assert said == [
        f"teacher 0 (resnet8) {how}: {score['top1']:.2f} % top-1, {score['top5']:.2f} % top-5 on "
        "898 images"
        for how, score in zip(words, scores, strict=True)
    ]


@pytest.mark.parametrize("depth", [{"draw": "never"}, {"p_end": 1}], ids=["never", "1"])
def test_a_teacher_that_drops_nothing_is_measured_once(
    depth: dict[str, Any], plain: Path, tmp_path: Path
):
    listener, settings = Listener(), recipe("kd", teachers=[skipping(**depth, weights=str(plain))])
    run = trained(settings, tmp_path / "run", listener)
    assert run.result is not None
    assert [*run.result["teachers"]] == ["teacher0"]
    assert len([line for line in listener.lines if line.startswith("teacher 0 (resnet8): ")]) == 1


def test_a_result_says_which_depths_its_networks_had(plain: Path, half: Path, tmp_path: Path):
    """Also of a teacher that brought its own."""
    student = skipping(p_end=0.7, scope="last_half", draw="image")
    run = trained(recipe("kd", student, teachers=[{"name": str(half)}]), tmp_path / "run")
    assert run.result is not None
    assert run.result["stochastic"] == {
        "student": {"p_end": 0.7, "scope": "last_half", "draw": "image"},
        "teacher0": {"p_end": 0.5, "scope": "full", "draw": "batch"},
    }
    assert Run.open(plain).result["stochastic"] == {}


# --- resumed


# in an epoch, at its end, in the next
@pytest.mark.parametrize(("after", "draw"), [(1, "image"), (3, "batch"), (5, "batch")])
def test_kd_with_a_stochastic_teacher_resumes_bit_for_bit(
    after: int, draw: str, plain: Path, tmp_path: Path
):
    settings = recipe("kd", teachers=[skipping(draw=draw, weights=str(plain))])
    straight = end_of(trained(settings, tmp_path / "straight"))
    resumed = end_of(stopped_and_resumed(settings, tmp_path / "resumed", after))
    assert straight[0].keys() == resumed[0].keys()
    assert all(torch.equal(tensor, resumed[0][key]) for key, tensor in straight[0].items())
    assert straight[1:] == resumed[1:]
    assert all("teacher0" in record["subnetworks"] for record in straight[1][2])


@pytest.mark.parametrize(
    ("mode", "draw"), [("alternating", "batch"), ("alternating", "image"), ("synchronous", "image")]
)
def test_mutual_learning_of_stochastic_students_resumes_bit_for_bit(
    mode: str, draw: str, tmp_path: Path
):
    settings = recipe({"name": "dml", "mode": mode}, *[skipping(draw=draw)] * 2)
    straight = end_of(trained(settings, tmp_path / "straight"))
    resumed = end_of(stopped_and_resumed(settings, tmp_path / "resumed", 4))
    assert straight[0].keys() == resumed[0].keys()
    assert all(torch.equal(tensor, resumed[0][key]) for key, tensor in straight[0].items())
    assert straight[1:] == resumed[1:]
    assert all({"student0", "student1"} == set(r["subnetworks"]) for r in straight[1][2])


def test_a_recipe_from_before_stochastic_depth_resumes(tmp_path: Path):
    settings = recipe("vanilla")
    with pytest.raises(training.Interrupted):
        training.train(settings, tmp_path / "run", Listener(4))
    file = tmp_path / "run" / "recipe.yaml"
    text = file.read_text()
    file.write_text(text.replace(", stochastic: null", ""))
    assert "stochastic" not in file.read_text() != text
    run = training.train(settings, tmp_path / "run", Listener(), resume=True)
    assert [record["step"] for record in run.metrics] == [3, 6]


def test_a_run_is_not_resumed_with_another_depth(tmp_path: Path):
    with pytest.raises(training.Interrupted):
        training.train(recipe("vanilla", skipping()), tmp_path / "run", Listener(4))
    with pytest.raises(potstill.PotstillError) as caught:
        training.train(
            recipe("vanilla", skipping(p_end=0.7)), tmp_path / "run", Listener(), resume=True
        )
    assert str(caught.value) == (
        f"{tmp_path}/run was started with another recipe: students.0.stochastic.p_end is 0.5 there "
        "and 0.7 here; choose another directory (--out), or the same settings"
    )


# --- recipes


MAPPING = "must be a mapping such as {p_end: ..., scope: ..., draw: ...}, not"
NUMBER = "a number (above 0, at most 1)"


@pytest.mark.parametrize(
    ("value", "faults"),
    [
        ("{p_end: 0}", [f"p_end must be {NUMBER}, not 0"]),
        ("{p_end: 2}", [f"p_end must be {NUMBER}, not 2"]),
        ("{p_end: -0.5}", [f"p_end must be {NUMBER}, not -0.5"]),
        ("{p_end: high}", [f'p_end must be {NUMBER}, not "high"']),
        ("{p_end: null}", [f"p_end must be {NUMBER}, not null"]),
        ("{p_end: .nan}", [f"p_end must be {NUMBER}, not NaN"]),
        ("{}", [f"p_end is missing; give {NUMBER}"]),
        ("{scope: full}", [f"p_end is missing; give {NUMBER}"]),
        (
            "{p_end: 1, scop: full}",
            ['scop is unknown; did you mean "scope"? allowed: p_end, scope, draw'],
        ),
        (
            "{p_end: 0.5, scope: fulll, draw: images}",
            [
                'scope must be full, identity_only or last_half, not "fulll"',
                'draw must be batch, image or never, not "images"',
            ],
        ),
        ("0.7", [f"{MAPPING} 0.7"]),
        ("full", [f'{MAPPING} "full"']),
        ("[0.7]", [f"{MAPPING} [0.7]"]),
    ],
)
@pytest.mark.parametrize("role", ["students", "teachers"])
def test_a_fault_of_a_depth_is_told_in_plain_words(role: str, value: str, faults: list[str]):
    key = f"{role}.0.stochastic"
    with pytest.raises(RecipeError) as caught:
        load("digits/kd", ["teachers.0.weights=x.pth", f"{key}={value}"])
    dot = "" if value in ("0.7", "full", "[0.7]") else "."
    assert caught.value.faults == [f"{key}{dot or ' '}{fault}" for fault in faults]


def test_an_override_of_one_key_needs_p_end_too():
    with pytest.raises(RecipeError) as caught:
        load("digits/vanilla", ["students.0.stochastic.draw=never"])
    assert caught.value.faults == [f"students.0.stochastic.p_end is missing; give {NUMBER}"]


def test_a_depth_survives_writing_and_reading():
    given = recipe("vanilla", skipping(p_end=0.7, draw="image"))
    text = given.to_yaml()
    assert "stochastic: {p_end: 0.7, scope: full, draw: image}" in text
    again = loads(text)
    assert again == given
    assert again.students[0].stochastic.model_dump() == {
        "p_end": 0.7,
        "scope": "full",
        "draw": "image",
    }
    assert loads(text, ["students.0.stochastic=null"]) == recipe("vanilla")
    whole = loads(text, ["students.0.stochastic.p_end=1"]).students[0].stochastic
    assert (whole.p_end, whole.draw) == (1.0, "image")


# --- potstill.distill


def weights_of(net: Any) -> list[Tensor]:
    return [value.clone() for value in net.state_dict().values()]


def test_a_module_made_stochastic_teaches_and_stays_as_it_was(tmp_path: Path):
    net = build("resnet8", 4, SHAPE)
    teacher = potstill.stochastic(net, 0.7)
    modes = [(m, m.training) for made in (net, teacher) for m in made.modules()]
    before = weights_of(net), weights_of(teacher), copy.deepcopy(dict(teacher.taps))
    student = build("resnet8", 4, SHAPE)
    same = potstill.Net(copy.deepcopy(student.module), student.taps, SHAPE)
    run = go(teacher, student, images(), images(seed=1), out=tmp_path / "run")
    assert all(map(torch.equal, before[0], weights_of(net)))
    assert all(map(torch.equal, before[1], weights_of(teacher)))
    assert before[2] == teacher.taps
    assert all(module.training == mode for module, mode in modes)
    assert all(p.requires_grad for p in teacher.parameters())
    assert run.student is student.module
    (there,) = loads(run.recipe, allow_code=True).teachers
    assert there.stochastic.model_dump() == {"p_end": 0.7, "scope": "full", "draw": "batch"}
    (alone,) = loads(run.recipe, allow_code=True).students
    assert alone.stochastic is None
    assert [set(record["subnetworks"]) for record in run.metrics] == [{"teacher0"}] * 2
    again = go(teacher, same, images(), images(seed=1))
    assert [r["terms"] for r in again.metrics] == [r["terms"] for r in run.metrics]


def test_a_stochastic_student_of_ones_own_predicts_at_the_expected_depth():
    student = potstill.stochastic(build("resnet8", 4, SHAPE), 0.5)
    run = go(None, student, images(), images(seed=1), "vanilla")
    assert run.student is student.module
    x = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = run.student.eval()(x)
        close(own, features(run.student, x, survival(3, 0.5))["logits"])
        close(own, student.eval().logits(x))
    assert set(run.metrics[-1]["subnetworks"]) == {"student"}
    about = run.load_predictor()[1]
    assert about["stochastic"] == {"p_end": 0.5, "scope": "full", "draw": "batch"}


def test_what_was_trained_stochastic_teaches_so_as_a_plain_module(tmp_path: Path):
    """`run.student` is a module, whose blocks still come and go where a run runs it."""
    first = go(None, skipping(), images(), images(seed=1), "vanilla")
    run = go(first.student, "resnet8", images(), images(seed=1), out=tmp_path / "run")
    depth = {"p_end": 0.5, "scope": "full", "draw": "batch"}
    (teacher,) = loads(run.recipe, allow_code=True).teachers
    assert teacher.stochastic.model_dump() == depth
    assert run.result["stochastic"] == {"teacher0": depth}
    assert [set(record["subnetworks"]) for record in run.metrics] == [{"teacher0"}] * 2


def test_a_mapping_names_a_stochastic_network(tmp_path: Path):
    """Pre-trained so, then the teacher of a stochastic student: each brings its own depth."""
    first = go(None, skipping(), images(), images(seed=1), "vanilla", out=tmp_path / "first")
    teacher = {"name": "resnet8", "weights": str(first.directory), "stochastic": {"p_end": 0.9}}
    run = go(teacher, skipping(p_end=0.7, draw="image"), images(), images(seed=1))
    found = loads(run.recipe, allow_code=True)
    assert found.teachers[0].stochastic.p_end == 0.9
    assert found.students[0].stochastic.draw == "image"
    depths = [m.depth.survival for m in run.student.modules() if hasattr(m, "depth")]
    assert depths == [pytest.approx((0.9, 0.8, 0.7))] * 3
    assert set(run.metrics[0]["subnetworks"]) == {"student", "teacher0"}
    brought = go(str(first.directory), "resnet8", images(), images(seed=1))
    assert set(brought.metrics[0]["subnetworks"]) == {"teacher0"}


# --- what is said


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        (
            {"p_end": 0.9},
            "stochastic depth, p_end 0.9, a new sub-network every batch; 3 of 3 blocks may be "
            "dropped, 2.8 of them are alive on average",  # 3 - 0.1 (1 + 2 + 3) / 3
        ),
        (
            {"p_end": 0.4, "scope": "identity_only", "draw": "image"},
            "stochastic depth of the blocks that keep the shape, p_end 0.4, a sub-network for "
            "every image; 1 of 3 blocks may be dropped, 0.8 of them are alive on average",
        ),
        (
            {"p_end": 0.25, "scope": "last_half"},
            "stochastic depth of the last half of the blocks, p_end 0.25, a new sub-network every "
            "batch; 2 of 3 blocks may be dropped, 0.8 of them are alive on average",  # 1/2 + 1/4
        ),
        (
            {"p_end": 0.5, "draw": "never"},
            "stochastic depth, p_end 0.5, always at the expected depth; none of 3 blocks is ever "
            "dropped",
        ),
        ({"p_end": 1}, "stochastic depth; none of 3 blocks is ever dropped"),
    ],
    ids=["full", "identity_only", "last_half", "never", "1"],
)
def test_a_run_begins_by_saying_what_may_be_dropped(
    depth: dict[str, Any], words: str, plain: Path, tmp_path: Path
):
    listener = Listener()
    both = {"name": "resnet8", "stochastic": depth}
    settings = recipe("kd", both, teachers=[{**both, "weights": str(plain)}], epochs=1)
    trained(settings, tmp_path / "run", listener)
    assert listener.lines[:7] == [
        f"run: {tmp_path}/run",
        "student 0: resnet8, 77,754 parameters",
        f"student 0: {words}",
        "teacher 0: resnet8, 77,754 parameters",
        f"teacher 0: {words}",
        "data: digits, 10 classes, 40 training, 898 test",
        "on cpu, float32",
    ]


def test_a_plain_network_is_introduced_in_one_line(tmp_path: Path):
    listener = Listener()
    trained(recipe("vanilla", epochs=1), tmp_path / "run", listener)
    assert not [line for line in listener.lines if "stochastic" in line or "sub-network" in line]


def compiled_lines(networks: dict[str, Any], place: Path) -> list[str]:
    """What is said of a compiled run, which ends before anything is compiled."""
    listener = Listener()

    class Enough(Exception):
        pass

    def stop(line: str) -> None:
        listener.lines.append(line)
        if line.startswith("phase"):
            raise Enough

    listener.say = stop  # type: ignore[method-assign]
    with pytest.raises(Enough):
        trained(recipe("kd", **networks, compile=True), place, listener)
    return [line for line in listener.lines if line.startswith(("on ", "not "))]


def test_a_compiled_run_says_what_is_not(plain: Path, tmp_path: Path):
    teacher = skipping(weights=str(plain))
    on = "on cpu, float32, compiled"
    why = "not compiled, because their blocks come and go:"
    assert compiled_lines({"teachers": [teacher]}, tmp_path / "a") == [on, f"{why} teacher0"]
    for i, depth in enumerate(({"p_end": 1}, {"draw": "never"})):
        whole = {"teachers": [skipping(weights=str(plain), **depth)]}
        assert compiled_lines(whole, tmp_path / str(i)) == [on]


def test_both_names_are_said_of_two_that_are_not_compiled(plain: Path, tmp_path: Path):
    listener, settings = Listener(), recipe("dml", skipping(), skipping(), compile=True, epochs=1)
    trained(settings, tmp_path / "run", listener)
    said = [line for line in listener.lines if line.startswith("not compiled")]
    assert said == ["not compiled, because their blocks come and go: student0, student1"]


def test_an_epochs_line_has_what_was_drawn():
    record = {
        "phase": "distill",
        "epoch": 2,
        "terms": {"ce": 1.25},
        "split": "test",
        "scores": {},
        "subnetworks": {
            "student": {"distinct": 1, "live": 3.0, "blocks": 3},
            "teacher0": {"distinct": 1200, "live": 25.06, "blocks": 27},
        },
        "time": {"seconds": 2.0, "images": 100},
    }
    assert display.epoch_line(record) == (
        "distill epoch 2 · ce 1.2500 · student drew 1 sub-network, 3.0 of 3 blocks alive · "
        "teacher0 drew 1,200 sub-networks, 25.1 of 27 blocks alive · 50 images/s"
    )


def test_a_runs_epochs_say_what_was_drawn(tmp_path: Path):
    listener = Listener()
    run = trained(recipe("vanilla", skipping(p_end=0.7)), tmp_path / "run", listener)
    for record in run.metrics:
        found = record["subnetworks"]["student"]
        plural = "s" if found["distinct"] > 1 else ""
        words = f"student drew {found['distinct']} sub-network{plural}, {found['live']:.1f} of 3"
        assert [
            line
            for line in listener.lines
            if f"epoch {record['epoch']} ·" in line and words in line
        ]


# --- methods that take networks apart


def test_three_stochastic_branches_are_measured_saved_and_read_back(tmp_path: Path):
    """ONE's students share the first one's low blocks: 2 of them, and 3 last ones."""
    settings = recipe("one", skipping(), skipping(), skipping())
    run = trained(settings, tmp_path / "run")
    names = ["student0", "student1", "student2", "ensemble"]
    assert run.result is not None
    assert [*run.result["scores"]] == names
    for record in run.metrics:
        assert record["subnetworks"]["student"]["blocks"] == 5
    for _ in range(2):  # twice the same: nothing is drawn
        again = training.evaluate_run(run.directory)
        assert {n: s._asdict() for n, s in again.items()} == run.result["scores"]
    test = datasets.load("digits").test
    batch = next(test.clean(len(test.labels)))
    for k in range(3):
        found = model_weights.read(f"{run.directory}:student{k}")
        assert found.stochastic == {"p_end": 0.5, "scope": "full", "draw": "batch"}
        module: Any = build("resnet8", 10, SHAPE).module
        module.load_state_dict(found.tensors)
        with torch.no_grad():
            logits = features(module.eval(), batch.image, survival(3, 0.5))["logits"]
        right = (logits.argmax(1) == batch.label).float().mean().item() * 100
        assert run.result["scores"][f"student{k}"]["top1"] == pytest.approx(right)


@pytest.mark.parametrize("other", [{"p_end": 0.7}, {"draw": "image"}, {"draw": "never"}, None])
def test_branches_of_other_depths_cannot_share_low_layers(other: dict[str, Any] | None):
    """Nobody could say how the shared blocks are drawn."""
    second = "resnet8" if other is None else skipping(**other)
    with pytest.raises(MethodError) as caught:
        training.assemble(recipe("one", skipping(), second))
    assert str(caught.value) == (
        "ONE: student 1 has another stochastic depth than student 0, and students share their low "
        "layers; give the same to each"
    )


@pytest.mark.parametrize(
    ("method", "draw"),
    [("simkd", "batch"), ("norm", "image"), ({"name": "norm", "merge": True}, "batch")],
    ids=["simkd", "norm", "merged"],
)
def test_what_is_deployed_of_a_stochastic_student_is_measured_the_same_every_time(
    method: Any, draw: str, plain: Path, tmp_path: Path
):
    teacher = {"name": "resnet8", "weights": str(plain)}
    settings = recipe(method, skipping(draw=draw), teachers=[teacher], epochs=1)
    run = trained(settings, tmp_path / "run")
    assert run.result is not None
    for _ in range(2):
        found = training.evaluate_run(run.directory)["student"]._asdict()
        assert found == pytest.approx(run.result["scores"]["student"], rel=1e-5)
