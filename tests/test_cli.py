"""The command line as a user meets it: what it prints, and what wrong input gets."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from potstill import cli, recipe
from potstill.files import save_tensors
from potstill.run import Run

Potstill = Callable[..., tuple[int, str, str]]


SHORT = ("digits/vanilla", "epochs=2", "data.subset=40")


@pytest.fixture
def trained(potstill: Potstill) -> Path:
    code, _, errors = potstill("train", *SHORT, "--out", "run")
    assert code == 0, errors
    return Path("run").absolute()


def test_train_says_what_happens_and_leaves_a_run(potstill: Potstill) -> None:
    code, output, _ = potstill("train", *SHORT, "--out", "run")
    assert code == 0
    assert "student 0: resnet8, 77,754 parameters" in output
    assert "data: digits, 10 classes, 40 training, 898 test" in output
    assert "distill epoch 2 · ce " in output
    assert "after the last epoch" in output and "chosen on the test set, not a result" in output
    assert {p.name for p in Path("run").iterdir()} == {
        "recipe.yaml",
        "env.json",
        "metrics.jsonl",
        "result.json",
        "student.safetensors",
        "checkpoints",
        ".lock",
    }


def test_eval_repeats_the_result(potstill: Potstill, trained: Path) -> None:
    """The file that was saved gives the very accuracy that training printed."""
    code, output, _ = potstill("eval", trained, "--json")
    assert code == 0
    result = Run.open(trained).result
    assert result is not None
    assert json.loads(output)["student"] == pytest.approx(result["scores"]["student"], rel=1e-6)
    code, output, _ = potstill("eval", "--weights", trained, "--data", "digits")
    assert code == 0 and f"{result['scores']['student']['top1']:.2f} % top-1" in output


def test_a_training_that_diverges_is_stopped_and_says_so(potstill: Potstill) -> None:
    """At the end of its epoch, before anything of it is saved as a result."""
    code, _, errors = potstill("train", *SHORT, "optimizers.default.lr=1e30", "--out", "run")
    assert code == 2
    assert "epoch 1 of phase distill: the training has diverged, ce is not finite" in errors
    assert Run.open("run").result is None


def test_one_image_that_has_no_variance_is_told(potstill: Potstill) -> None:
    """100 images in batches of 33 leave one, of which vgg8 makes maps of one pixel."""
    short = ("digits/vanilla", "students=[vgg8]", "epochs=1", "data.subset=100")
    code, _, errors = potstill("train", *short, "data.batch_size=33", "--out", "run")
    assert code == 2
    assert "BatchNorm found one value a channel, which has no variance, in a batch of 1" in errors


@pytest.mark.parametrize(
    ("method", "alone"),
    [("simkd", False), ("norm", False), ("{name: norm, merge: true}", True)],
    ids=["simkd", "norm", "merged"],
)
def test_eval_repeats_the_result_of_what_is_deployed(
    potstill: Potstill, trained: Path, method: str, alone: bool
) -> None:
    """Also where it is more than the student; one that has merged is a plain network again."""
    given = ("teachers.0.name=resnet8", f"teachers.0.weights={trained}", "epochs=1")
    code, output, _ = potstill(
        "train", "digits/kd", *given, f"method={method}", "--out", "deployed"
    )
    assert code == 0
    run = Run.open("deployed")
    assert run.result is not None
    scores = run.result["scores"]["student"]
    code, output, _ = potstill("eval", "deployed", "--json")
    assert code == 0
    assert json.loads(output)["student"] == pytest.approx(scores, rel=1e-5)
    code, output, errors = potstill("eval", "--weights", "deployed", "--data", "digits")
    if alone:
        assert code == 0 and f"{scores['top1']:.2f} % top-1" in output
    else:
        assert code == 2 and "deployed is no single network, but an ensemble or a" in errors


def test_a_run_teaches(potstill: Potstill, trained: Path) -> None:
    """Weights by a run's directory: the teacher's accuracy comes before the first epoch."""
    code, output, _ = potstill(
        "train", "digits/kd", "epochs=1", "teachers.0.name=resnet8", f"teachers.0.weights={trained}"
    )
    assert code == 0
    result = Run.open(trained).result
    assert result is not None
    said = f"teacher 0 (resnet8): {result['scores']['student']['top1']:.2f} % top-1"
    assert output.index(said) < output.index("distill epoch 1")
    (kd,) = Path("runs").glob("digits-kd-*/seed0")
    saved, _ = Run.open(kd).load_predictor("student")
    own, _ = Run.open(trained).load_predictor("student")
    assert saved.keys() == own.keys()  # the student alone: no teacher in its file


def test_a_checkpoint_path_names_a_network(potstill: Potstill, trained: Path) -> None:
    code, output, _ = potstill("train", "digits/kd", "epochs=1", f"teachers=[{trained}]")
    assert code == 0 and "teacher 0" in output


def test_several_seeds_end_in_a_table(potstill: Potstill) -> None:
    code, output, _ = potstill("train", *SHORT, "--seeds", "2", "--out", "runs")
    assert code == 0
    assert (Path("runs") / "seed0" / "result.json").exists()
    assert (Path("runs") / "seed1" / "result.json").exists()
    top1 = [Run.open(f"runs/seed{s}").result["scores"]["student"]["top1"] for s in (0, 1)]  # type: ignore[index]
    assert f"{sum(top1) / 2:.2f}" in output and "top-1 std" in output
    code, output, _ = potstill("train", *SHORT, "--seeds", "2", "--out", "runs", "--resume")
    assert code == 0 and output.count("finished already") == 2


PAIR = ("digits/vanilla", "method.name=dml", "students=[resnet8, resnet8]", "data.subset=40")


def test_networks_that_teach_each_other_are_all_shown_with_their_mean(potstill: Potstill) -> None:
    code, shown, errors = potstill("train", *PAIR, "epochs=2", "--out", "run")
    assert code == 0, errors
    result = Run.open(Path("run")).result
    assert result is not None
    for name, score in result["scores"].items():
        assert f"{name} {score['top1']:.2f} % test" in shown
        assert f"{name}: {score['top1']:.2f} % top-1 on the test set" in shown
    mean = (result["scores"]["student0"]["top1"] + result["scores"]["student1"]["top1"]) / 2
    assert f"mean of 2 students: {mean:.2f} % top-1" in shown
    assert "student 0: resnet8" in shown and "student 1: resnet8" in shown
    code, taught, errors = potstill(
        "train", "digits/kd", "teachers=[{name: run:student1}]", *SHORT[1:], "--out", "next"
    )
    assert code == 0, errors
    assert f"teacher 0 (run:student1): {result['scores']['student1']['top1']:.2f} %" in taught
    code, _, errors = potstill("train", "digits/kd", "teachers=[run]", *SHORT[1:])
    assert code == 2 and "this run has student0, student1, ensemble (RUN:student0" in errors
    code, _, errors = potstill("train", "digits/kd", "teachers=[run:ensemble]", *SHORT[1:])
    assert code == 2 and "run:ensemble is no single network, but an ensemble or" in errors


def test_seeds_of_a_pair_end_in_a_table_with_every_network(potstill: Potstill) -> None:
    code, shown, errors = potstill("train", *PAIR, "epochs=1", "--seeds", "2")
    assert code == 0, errors
    table = shown.rpartition("top-1 mean")[2]
    results = [Run.open(p.parent).result for p in Path("runs").glob("*/seed*/result.json")]
    means = [statistics.fmean(r["scores"][f"student{k}"]["top1"] for k in (0, 1)) for r in results]
    rows = [line.split("│")[1:4] for line in table.splitlines() if "digits/vanilla dml" in line]
    assert [name.strip().removeprefix("digits/vanilla dml ") for name, _, _ in rows] == [
        "student0",
        "student1",
        "ensemble",
        "mean of 2 students",
    ]
    assert [text.strip() for text in rows[-1][1:]] == [
        f"{statistics.fmean(means):.2f}",
        f"{statistics.stdev(means):.2f}",
    ]
    one = next(Path("runs").glob("*/seed0"))
    code, _, errors = potstill("eval", f"{one}:student1")
    assert code == 2 and f"potstill eval --weights {one}:student1" in errors
    code, shown, _ = potstill("eval", "--weights", f"{one}:student1")
    assert code == 0 and "resnet8: " in shown


def test_a_note_is_one_line_where_the_output_is_no_terminal(potstill: Potstill) -> None:
    _, shown, _ = potstill(*("train", *PAIR), "method.name=afd_online", "epochs=1", "--out", "run")
    assert (
        "note: optimizers.discriminators is not given: afd_online's published adam, lr 2e-05\n"
        in shown
    )


def test_a_validation_split_is_watched_and_the_test_set_is_touched_once(potstill: Potstill) -> None:
    code, output, _ = potstill("train", *SHORT, "data.validation=0.2", "--out", "run")
    assert code == 0 and "% validation" in output and "% test ·" not in output
    assert "not a result" not in output
    result = Run.open("run").result
    assert result is not None
    assert result["scores"]["student"]["images"] == 898
    assert result["best_epoch"]["student"]["split"] == "validation"


@pytest.mark.parametrize("what", ["methods", "models", "datasets", "recipes"])
def test_list_names_everything(potstill: Potstill, what: str) -> None:
    code, output, _ = potstill("list", what, "--json")
    entries = json.loads(output)
    assert code == 0 and all(e["name"] and e["description"] for e in entries)
    expected = {
        "methods": "kd",
        "models": "resnet56",
        "datasets": "cifar100",
        "recipes": "cifar100/kd-resnet56-resnet20",
    }
    assert expected[what] in [e["name"] for e in entries]
    code, output, _ = potstill("list", what)
    assert code == 0 and all(e["name"] in output for e in entries)


def test_schema_is_json(potstill: Potstill) -> None:
    code, output, _ = potstill("schema")
    assert code == 0 and "temperature" in output and json.loads(output)["properties"]["students"]


def test_own_networks_need_permission(potstill: Potstill) -> None:
    Path("mine.py").write_text(
        "from torch import nn\n"
        "def small(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "def other(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(65, num_classes))\n"
    )
    code, _, errors = potstill("train", *SHORT, "students.0.name=py:mine:small")
    assert code == 2 and "--allow-code" in errors
    code, output, errors = potstill("train", *SHORT, "students.0=py:mine:small", "--allow-code")
    assert code == 0, errors
    assert "650 parameters" in output
    code, _, errors = potstill("train", *SHORT, "students.0=py:mine:other", "--allow-code")
    assert code == 2 and "cannot take images of (1, 8, 8)" in errors
    code, _, errors = potstill("train", *SHORT, "students.0=py:mine:none", "--allow-code")
    assert code == 2 and "py:mine:none cannot be made" in errors


WRONG = {
    "unknown recipe": (("digits/vanila",), 2, 'did you mean "digits/vanilla"?'),
    "unknown key": ((*SHORT, "data.batchsize=3"), 2, 'did you mean "batch_size"?'),
    "wrong type": ((*SHORT, "seed=abc"), 2, "seed must be a whole number"),
    "negative epochs": ((*SHORT, "epochs=-3"), 2, "epochs must be"),
    "several at once": ((*SHORT, "epochs=-3", "seed=x", "nonsense=1"), 2, "3 faults"),
    "missing recipe file": (("gone.yaml",), 3, "gone.yaml"),
    "missing weights": (("digits/kd", "teachers.0.weights=gone.pth"), 3, "no weights at gone.pth"),
    "weights not given": (("digits/kd",), 2, "teachers.0.weights=PATH"),
    "teacher for vanilla": ((*SHORT, "teachers=[resnet8]"), 2, "vanilla takes no teacher"),
    "unknown phase": ((*SHORT, "epochs.warmup=3"), 2, "epochs.warmup is no phase"),
    "unknown update": (
        (*SHORT, "optimizers.studnet={name: sgd, lr: 0.1}"),
        2,
        'did you mean "student"?',
    ),
    "subset too large": ((*SHORT, "data.subset=5000"), 2, "data.subset"),
    "no such device": ((*SHORT, "device=cuda:7"), 2, "device"),
    "data not there": (("cifar100/vanilla-resnet20", "data.root=gone"), 3, "gone"),
    "no recipe": ((), 2, "name a recipe"),
    "nothing to resume": (("--resume",), 2, "no unfinished run"),
}


@pytest.mark.parametrize("words, code, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_message(
    potstill: Potstill, words: tuple[str, ...], code: int, message: str
) -> None:
    """Before any training, no traceback, no run left behind."""
    given, output, errors = potstill("train", *words)
    assert (given, message in errors) == (code, True), errors
    assert "epoch 1" not in output
    assert not list(Path().glob("**/recipe.yaml"))


def test_a_tap_that_does_not_exist_is_named(potstill: Potstill, trained: Path) -> None:
    code, _, errors = potstill(
        "train", "digits/at", f"teachers=[{trained}]", "method.taps=[stage1, stage9]"
    )
    assert code == 2
    assert "no feature 'stage9'; this network has ['embed', 'last', 'stage1'" in errors


def test_a_teacher_of_other_classes_is_refused(potstill: Potstill, tmp_path: Path) -> None:
    from potstill.models import build

    torch.save(build("resnet8", 7, (1, 8, 8)).state_dict(), tmp_path / "seven.pth")
    code, _, errors = potstill(
        "train", "digits/kd", "teachers.0.name=resnet8", "teachers.0.weights=seven.pth"
    )
    assert code == 2 and "7 classes" in errors and "has 10" in errors


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("it-ran",)


def test_pickled_code_in_weights_does_not_run(potstill: Potstill) -> None:
    torch.save({"state_dict": Payload()}, "evil.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Payload()))
    evaluation = ("eval", "--model", "resnet8", "--data", "digits", "--weights")
    code, _, errors = potstill(*evaluation, "evil.pth")
    assert code == 2 and "reading it would run code" in errors and "posix.mkdir" in errors
    code, _, errors = potstill(*evaluation, "plain.pth")
    assert code in (2, 3) and "plain.pth" in errors
    assert not Path("it-ran").exists()


def test_a_truncated_parquet_is_named(potstill: Potstill) -> None:
    Path("cifar100").mkdir()
    for split in ("train", "test"):
        Path(f"cifar100/{split}-00000-of-00001.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    code, _, errors = potstill("train", "cifar100/vanilla-resnet20", "data.root=.")
    assert code == 3 and ".parquet" in errors


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.filterwarnings("default::potstill.run.RunWarning")
def test_a_flipped_byte_is_noticed_and_the_last_good_state_loads(
    potstill: Potstill, trained: Path
) -> None:
    newest, older = sorted((trained / "checkpoints").iterdir(), reverse=True)
    (trained / "result.json").unlink()
    flip_a_byte(newest / "tensors.safetensors")
    code, output, errors = potstill("train", *SHORT, "--out", trained, "--resume")
    assert code == 0
    assert "damaged" in errors and f"resumed after step {int(older.name)} of" in output
    flip_a_byte(trained / "student.safetensors")
    code, _, errors = potstill("eval", trained)
    assert code == 3 and "student.safetensors" in errors and "damaged" in errors


def test_a_run_is_not_overwritten_or_mixed(potstill: Potstill, trained: Path) -> None:
    code, _, errors = potstill("train", *SHORT, "--out", trained)
    assert code == 2 and "--resume" in errors and "--out" in errors
    code, _, errors = potstill("train", *SHORT, "seed=4", "--out", trained, "--resume")
    assert code == 2 and "seed is 0 there and 4 here" in errors


def test_a_full_disk_is_one_message_and_the_last_good_state_loads(
    potstill: Potstill, trained: Path
) -> None:
    """A real limit on the size of files, put on a process that resumes: the next save fails."""
    (trained / "result.json").unlink()
    newest, older = sorted((trained / "checkpoints").iterdir(), reverse=True)
    flip_a_byte(newest / "manifest.json")
    command = [sys.executable, "-m", "potstill", "train", *SHORT, "--out", str(trained), "--resume"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "was not saved" in done.stderr and "Traceback" not in done.stderr
    checkpoint = Run.open(trained).latest_checkpoint
    with pytest.warns(UserWarning, match="damaged"):
        found = checkpoint()
    assert found is not None and found.step == int(older.name)


def test_help_is_quick_to_import() -> None:
    """--help must not load what only training needs."""
    code = (
        "import sys; sys.argv = ['potstill', '--help']\n"
        "from potstill.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'datasets', 'sklearn', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_damaged_zip_is_a_damaged_file(potstill: Potstill) -> None:
    with zipfile.ZipFile("half.pth", "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02")
    code, _, errors = potstill("eval", "--model", "resnet8", "--weights", "half.pth")
    assert code in (2, 3) and "half.pth" in errors


def test_the_metadata_of_weights_do_not_run_code(potstill: Potstill, trained: Path) -> None:
    """A file that names py:module:function as its architecture; only a recipe or a person may."""
    Path("evil.py").write_text("import os\nos.mkdir('it-ran')\ndef make(num_classes): ...\n")
    tensors, about = Run.open(trained).load_predictor("student")
    metadata = {k: json.dumps(v) for k, v in {**about, "model": "py:evil:make"}.items()}
    save_tensors("w.safetensors", tensors, metadata)
    for words in (
        ("eval", "--weights", "w.safetensors", "--data", "digits"),
        ("train", "digits/kd", "teachers=[w.safetensors]"),
        ("train", *SHORT, "students=[w.safetensors]"),
    ):
        code, _, errors = potstill(*words)
        assert code == 2 and "does not say its architecture" in errors
    assert not Path("it-ran").exists()
    code, _, errors = potstill(
        "eval", "--model", "resnet8", "--weights", "w.safetensors", "--data", "digits"
    )
    assert code == 0, errors


def images_of(folder: str, names: list[str]) -> None:
    from PIL import Image

    for part in ("train", "test"):
        for i, name in enumerate(names):
            place = Path(folder) / part / name
            place.mkdir(parents=True)
            for k in range(6):
                Image.new("L", (8, 8), 40 * i + k).save(place / f"{k}.png")


def test_a_folder_of_a_models_name_does_not_replace_the_model(potstill: Potstill) -> None:
    """A run called resnet8 beside the recipe's resnet8: the name is the architecture's."""
    for place in ("resnet8", "second"):
        code, _, errors = potstill("train", *SHORT, "--out", place)
        assert code == 0, errors
    scores = [Run.open(Path(p)).result["scores"] for p in ("resnet8", "second")]
    assert scores[0] == scores[1]


def test_classes_are_compared_by_name(potstill: Potstill) -> None:
    """A teacher of as many other classes, or of the same in another order, is one of another task:
    refused where logits are compared, and not measured.
    """
    images_of("one", ["ant", "bee", "cat"])
    images_of("two", ["ant", "cow", "dog"])
    data = ("data={name: folder, root: one, batch_size: 4, mean: [0.5, 0.5, 0.5], std: [1, 1, 1]}",)
    code, output, errors = potstill("train", "digits/vanilla", *data, "epochs=1", "--out", "t")
    assert code == 0, errors
    assert "data: folder, 3 classes, 18 training, 18 test" in output
    teacher = ("teachers=[t]", *data)
    code, _, errors = potstill("train", "digits/kd", *teacher, "epochs=1", "--out", "s")
    assert code == 0, errors
    other = (*teacher, "data.root=two", "epochs=1")
    code, output, errors = potstill("train", "digits/kd", *other, "--out", "u")
    assert code == 2 and "KD compares logits class by class, and which classes teacher 0" in errors
    said = (
        "teachers.0 (resnet8): trained on folder, where class 1 is 'bee'; in folder it is 'cow', "
        "so none of its classes is taken to be the data's"
    )
    assert said in output
    code, output, errors = potstill("train", "digits/kd", *other, "method=rkd", "--out", "v")
    assert code == 0 and said in output, errors
    assert "are not known to be the data's, so its accuracy is not measured" in output
    code, _, errors = potstill("eval", "--weights", "t", "--data", "folder", "--root", "two")
    assert code == 2 and "class 1 is 'bee'; in folder it is 'cow'; its outputs are not" in errors
    code, _, errors = potstill("train", *SHORT, "students=[t]")
    assert code == 2


def test_a_student_starts_from_weights_of_its_own_classes(potstill: Potstill) -> None:
    fewer = ("data.classes=[0, 1, 2]", "data.subset=30")
    code, _, errors = potstill("train", "digits/vanilla", "epochs=1", *fewer, "--out", "three")
    assert code == 0, errors
    code, _, errors = potstill("train", *SHORT, "students=[three]")
    assert code == 2 and "students.0 has weights of 3 classes" in errors


def test_a_teacher_of_other_channels_is_refused(potstill: Potstill, trained: Path) -> None:
    images_of("one", ["ant", "bee", "cat"])
    own = ("data.name=folder", "data.root=one", "data.subset=null")
    code, _, errors = potstill("train", "digits/at", f"teachers=[{trained}]", *own)
    assert code == 2 and "channels" in errors


def test_resume_goes_on_where_the_data_have_moved(potstill: Potstill, trained: Path) -> None:
    (trained / "result.json").unlink()
    code, output, _ = potstill("train", *SHORT, "device=cpu", "--out", trained, "--resume")
    assert code == 0 and "resumed after step" in output


def test_a_run_is_measured_on_its_own_data(potstill: Potstill, trained: Path) -> None:
    code, _, errors = potstill("eval", trained, "--data", "cifar100")
    assert code == 2 and "leave --data out" in errors
    assert potstill("eval")[0] == 2


def test_show_draws_a_network(potstill: Potstill) -> None:
    code, output, errors = potstill("show", "resnet20", "--input", "1x16x16", "--classes", "10")
    assert (code, errors) == (0, "")
    assert "\x1b" not in output and max(map(len, output.splitlines())) <= 100
    (mark,) = [line for line in output.splitlines() if "-> stage1 (post)" in line]
    assert mark.split()[:3] == ["layer1", "Sequential", "16x16x16"]
    assert "input       1x16x16, 10 classes" in output and "  2 .. " not in output
    assert "layer3.1.conv1" not in output and "    conv1" in output
    code, whole, _ = potstill("show", "resnet20", "--all")
    assert code == 0 and len(whole.splitlines()) > len(output.splitlines()) + 30


def test_show_as_json_has_every_layer(potstill: Potstill) -> None:
    code, output, _ = potstill("show", "vgg13", "--classes", "50", "--json")
    found = json.loads(output)
    assert code == 0 and found["classes"] == 50 and found["name"] == "vgg13"
    assert found["taps"]["stage1:pre"]["shape"] == [128, 16, 16]
    (layer,) = [layer for layer in found["layers"] if layer["path"] == "layer2.1.bn"]
    assert (layer["type"], layer["output"], layer["parameters"]) == (
        "BatchNorm2d",
        [128, 16, 16],
        256,
    )
    assert len(found["layers"]) == 51
    code, output, _ = potstill("list", "models", "--json")
    (entry,) = [e for e in json.loads(output) if e["name"] == "vgg13"]
    assert entry.keys() == found.keys() - {"layers"}
    assert entry["taps"] == found["taps"] and entry["parameters"] == found["parameters"] + 50 * 513


def test_show_runs_own_code_only_when_it_may(potstill: Potstill) -> None:
    Path("shown.py").write_text(
        "from torch import nn\n"
        "def small(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))\n"
    )
    code, output, errors = potstill("show", "py:shown:small", "--input", "3x4x4")
    assert code == 2 and "--allow-code" in errors and output == ""
    code, output, errors = potstill("show", "py:shown:small", "--input", "3x4x4", "--allow-code")
    assert code == 0, errors
    assert "Linear 48->100" in output and "-> embed" in output


@pytest.mark.parametrize(
    "words, message",
    [
        (("resnet_20",), 'did you mean "resnet20"?'),
        (("vgg13", "--input", "3x4x4"), "vgg13 cannot take images of (3, 4, 4)"),
        (("vgg13", "--input", "32x32"), "--input is '32x32'"),
        (("vgg13", "--input", "3x0x32"), "write channels, height and width: 3x64x64"),
        (("vgg13", "--input", "3x-1x32"), "--input is '3x-1x32'"),
        (("vgg13", "--classes", "0"), "--classes"),
    ],
)
def test_show_says_what_is_wrong(potstill: Potstill, words: tuple[str, ...], message: str) -> None:
    code, output, errors = potstill("show", *words)
    assert (code, output, message in errors) == (2, "", True), errors


def test_a_default_folder_is_named_as_before_there_were_stores() -> None:
    plain = recipe.load("digits/vanilla")
    before = plain.to_yaml().replace("store: null\n", "")
    assert before != plain.to_yaml()
    digest = hashlib.sha256(before.encode()).hexdigest()[:6]
    place = cli._default_directory("digits/vanilla", plain)
    assert place == Path("runs") / f"digits-vanilla-{digest}" / "seed0"
    kept = recipe.load("digits/vanilla", ["store=true"])
    assert cli._default_directory("digits/vanilla", kept) != place
