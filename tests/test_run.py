"""A run's folder survives kills, full disks and flipped bytes."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from potstill.errors import PotstillError, StorageError
from potstill.run import Run, RunWarning, describe_environment, differences


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", "seed: 0\n", {"torch": "2"})


@pytest.fixture(params=["disk", "memory"])
def any_run(request, tmp_path):
    directory = tmp_path / "run" if request.param == "disk" else None
    return Run.create(directory, "seed: 0  # é\r\n", {"torch": "2"})


def save(run, *steps):
    """At each step, one record and a checkpoint in which everything tells the step."""
    for step in steps:
        run.append({"step": step})
        run.save_checkpoint(step, {"w": torch.full((3,), float(step))}, {"step": step})


def whole(checkpoint, step):
    """Whether a checkpoint is the one of that step, in all its parts."""
    return (
        checkpoint.step == step
        and checkpoint.state == {"step": step}
        and torch.equal(checkpoint.tensors["w"], torch.full((3,), float(step)))
    )


def checkpoints(run):
    return sorted(os.listdir(run.directory / "checkpoints"))


def flip(path, position=-1, mask=0x01):
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def in_subprocess(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# the folder


def test_a_run_gives_back_what_it_was_given(any_run):
    assert any_run.recipe == "seed: 0  # é\r\n"
    assert any_run.environment == {"torch": "2"}
    assert any_run.metrics == []
    assert any_run.result is None
    assert not any_run.finished
    assert any_run.latest_checkpoint() is None

    any_run.append({"epoch": 1, "loss": 0.1 + 0.2, "diverged": math.inf})
    any_run.append({"epoch": 2, "shape": (1, 2)})
    assert any_run.metrics == [
        {"epoch": 1, "loss": 0.1 + 0.2, "diverged": math.inf},
        {"epoch": 2, "shape": [1, 2]},
    ]
    weights = {"w": torch.randn(3), "n": torch.tensor(7)}
    kept = weights["w"].clone()
    any_run.save_predictor("student", weights, {"classes": ["cat", "NaN"], "mean": [0.5]})
    weights["w"].zero_()
    any_run.finish({"top1": 76.25, "nan": math.nan})
    assert any_run.finished
    assert any_run.result["top1"] == 76.25
    assert math.isnan(any_run.result["nan"])
    assert list(any_run.result["files"]) == ["student.safetensors"]
    tensors, metadata = any_run.load_predictor()
    assert torch.equal(tensors["w"], kept)
    assert metadata == {"classes": ["cat", "NaN"], "mean": [0.5]}


def test_an_opened_run_is_the_same_run(run):
    save(run, 1)
    run.save_predictor("peer0", {"w": torch.ones(1)}, {})
    run.finish({"top1": 1.0})
    again = Run.open(run.directory)
    assert (again.recipe, again.environment, again.metrics) == (
        run.recipe,
        run.environment,
        run.metrics,
    )
    assert again.result == run.result
    assert whole(again.latest_checkpoint(), 1)
    assert torch.equal(again.load_predictor("peer0")[0]["w"], torch.ones(1))


def test_a_run_in_memory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run.create(None, "seed: 0", {})
    save(run, 1)
    run.save_predictor("student", {"w": torch.ones(1)}, {})
    run.finish({})
    assert run.latest_checkpoint() is None
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_a_run_is_refused_and_untouched(run):
    run.append({"epoch": 1})
    with pytest.raises(PotstillError, match=r"already holds a run.*--resume.*--out") as refused:
        Run.create(run.directory, "other", {})
    assert refused.value.exit_code == 2
    assert run.recipe == "seed: 0\n"
    assert run.metrics == [{"epoch": 1}]


def test_a_creation_that_was_killed_before_the_recipe_can_be_repeated(tmp_path):
    (tmp_path / "env.json").write_text("{}")
    assert Run.create(tmp_path, "seed: 1", {}).recipe == "seed: 1"


def test_a_folder_that_is_no_run_is_refused_with_the_runs_inside(tmp_path):
    Run.create(tmp_path / "seed0", "", {})
    with pytest.raises(PotstillError, match=r"not a run: it has no recipe\.yaml.*seed0"):
        Run.open(tmp_path)
    with pytest.raises(PotstillError, match="there is no such folder"):
        Run.open(tmp_path / "absent")


def test_a_folder_that_cannot_be_made_is_an_error_of_storage(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made: a part of the path is a file"):
        Run.create(tmp_path / "file" / "run", "", {})


# metrics


def test_a_half_written_last_line_is_ignored_and_then_cut_off(run):
    run.append({"epoch": 1})
    with open(run.directory / "metrics.jsonl", "ab") as file:
        file.write(b'{"epoch": 2, "lo')
    again = Run.open(run.directory)
    assert again.metrics == [{"epoch": 1}]
    again.append({"epoch": 2})
    assert again.metrics == [{"epoch": 1}, {"epoch": 2}]


def test_a_damaged_line_before_the_last_is_an_error_with_its_number(run):
    run.append({"epoch": 1})
    run.append({"epoch": 2})
    flip(run.directory / "metrics.jsonl", 0)
    with pytest.raises(StorageError, match=r"metrics\.jsonl, line 1, is damaged"):
        _ = run.metrics


def test_a_record_that_does_not_fit_on_the_disk_is_taken_back(run):
    """A real limit on file sizes, so that the system writes part of the line and then refuses."""
    run.append({"epoch": 1})
    code = """
import resource
from potstill.run import Run
from potstill.errors import StorageError
run = Run.open(".")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    run.append({"text": "x" * 200})
except StorageError as error:
    print(error.exit_code, error)
"""
    assert "metrics.jsonl cannot be written: the file is too large" in in_subprocess(
        code, run.directory
    )
    assert (run.directory / "metrics.jsonl").read_text() == '{"epoch": 1}\n'


def test_rewind_cuts_the_metrics_back_to_the_checkpoint(run):
    save(run, 1, 2)
    run.append({"step": 3})
    again = Run.open(run.directory)
    again.rewind(again.latest_checkpoint())
    assert again.metrics == [{"step": 1}, {"step": 2}]
    again.append({"step": 3})
    assert again.metrics == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("left", ["some", "none"])
def test_rewind_does_not_fill_lost_metrics_with_zeros(run, left):
    save(run, 1, 2)
    path = run.directory / "metrics.jsonl"
    path.write_text('{"step": 1}\n') if left == "some" else path.unlink()
    with pytest.warns(RunWarning, match="records are missing"):
        run.rewind(run.latest_checkpoint())
    assert run.metrics == ([{"step": 1}] if left == "some" else [])
    save(run, 3)
    assert run.metrics[-1] == {"step": 3}


# checkpoints


def test_the_newest_two_checkpoints_are_kept(run):
    assert run.latest_checkpoint() is None
    save(run, 1, 20, 300)
    assert checkpoints(run) == ["000000020", "000000300"]
    assert whole(run.latest_checkpoint(), 300)
    save(run, 10**9)  # ten digits
    assert whole(run.latest_checkpoint(), 10**9)


def test_the_state_comes_back_bit_for_bit(run):
    """A Python float is written with as many digits as tell it from its neighbours."""
    numbers = [0.1, 1 / 3, 5e-324, math.nextafter(1.0, 2.0), -0.0, math.inf]
    state = {"numbers": numbers, "rng": list(range(5)), "deep": {"none": None, "on": True}}
    run.save_checkpoint(1, {}, state)
    again = run.latest_checkpoint().state
    assert again == state
    assert [n.hex() for n in again["numbers"]] == [n.hex() for n in numbers]


def test_tied_and_channels_last_weights_are_kept(run):
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    run.save_checkpoint(1, {"a": image, "tied": image, 'odd "name"\n': torch.tensor(1)}, {})
    tensors = run.latest_checkpoint().tensors
    assert torch.equal(tensors["a"], image)
    assert torch.equal(tensors["tied"], image)
    assert tensors['odd "name"\n'] == 1


def test_a_step_can_be_saved_again(run):
    save(run, 1, 2)
    run.save_checkpoint(2, {"w": torch.zeros(1)}, {"again": True})
    assert checkpoints(run) == ["000000001", "000000002"]
    assert run.latest_checkpoint().state == {"again": True}


def test_a_kill_while_a_step_is_saved_again_keeps_the_first(run):
    """The folder is moved aside for the moment in which the new one takes its place."""
    save(run, 7)
    folder = run.directory / "checkpoints"
    os.rename(folder / "000000007", folder / "000000007.old")
    assert whole(run.latest_checkpoint(), 7)
    shutil.copytree(folder / "000000007.old", folder / "000000007")
    flip(folder / "000000007" / "state.json")
    with pytest.warns(RunWarning, match=r"state\.json"):
        assert whole(run.latest_checkpoint(), 7)
    save(run, 7)
    assert checkpoints(run) == ["000000007"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_one_flipped_byte_anywhere_falls_back_to_the_checkpoint_before(run, name):
    save(run, 1, 2)
    path = run.directory / "checkpoints" / "000000002" / name
    for position in range(0, path.stat().st_size, 3):
        flip(path, position)
        with pytest.warns(RunWarning, match=f"000000002/{re.escape(name)} is damaged"):
            assert whole(run.latest_checkpoint(), 1)
        flip(path, position)
    assert whole(run.latest_checkpoint(), 2)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_missing_or_truncated_file_falls_back_too(run, name):
    save(run, 1, 2)
    path = run.directory / "checkpoints" / "000000002" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(RunWarning, match=name):
        assert whole(run.latest_checkpoint(), 1)
    path.unlink()
    with pytest.warns(RunWarning, match=name):
        assert whole(run.latest_checkpoint(), 1)


def test_a_checkpoint_under_another_step_or_format_is_passed_over(run, monkeypatch):
    save(run, 1, 2)
    folder = run.directory / "checkpoints"
    os.rename(folder / "000000002", folder / "000000003")
    with pytest.warns(RunWarning, match="holds step 2"):
        assert whole(run.latest_checkpoint(), 1)
    os.rename(folder / "000000003", folder / "000000002")
    monkeypatch.setattr("potstill.run.FORMAT", 2)
    save(run, 3)
    monkeypatch.undo()
    with pytest.warns(RunWarning, match="format 2, this version reads 1"):
        assert whole(run.latest_checkpoint(), 2)


def test_when_every_checkpoint_is_damaged_that_is_an_error_naming_them(run):
    save(run, 1, 2)
    flip(run.directory / "checkpoints" / "000000001" / "state.json")
    flip(run.directory / "checkpoints" / "000000002" / "manifest.json")
    with pytest.raises(StorageError, match=r"(?s)000000002/manifest.*000000001/state") as error:
        run.latest_checkpoint()
    assert error.value.exit_code == 3


def test_damaged_newer_checkpoints_do_not_push_out_the_good_ones(run):
    """After a fallback the training is at an earlier step than the damaged folders."""
    save(run, 1, 2, 3)
    for step in (2, 3):
        flip(run.directory / "checkpoints" / f"{step:09d}" / "state.json")
    with pytest.raises(StorageError):
        run.latest_checkpoint()
    save(run, 1)
    assert checkpoints(run) == ["000000001"]
    assert whole(run.latest_checkpoint(), 1)


def test_what_is_not_ours_stays_and_what_a_kill_left_goes(run):
    folder = run.directory / "checkpoints"
    (folder / ".tmp-5-999").mkdir(parents=True)
    (folder / "notes").mkdir()
    save(run, 1)
    assert checkpoints(run) == ["000000001", "notes"]


def test_a_state_that_json_cannot_hold_is_refused_and_leaves_nothing(run):
    save(run, 1)
    with pytest.raises(TypeError, match=r"value\.best: JSON cannot hold a Tensor"):
        run.save_checkpoint(2, {}, {"best": torch.zeros(1)})
    assert checkpoints(run) == ["000000001"]


def test_a_disk_that_is_full_leaves_the_earlier_checkpoints(run):
    """A real limit on file sizes: the system refuses in the middle of the tensors."""
    save(run, 1, 2)
    code = """
import resource, torch
from potstill.run import Run
from potstill.errors import StorageError
run = Run.open(".")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
for step in (2, 3):
    try:
        run.save_checkpoint(step, {"w": torch.zeros(100_000)}, {})
    except StorageError as error:
        print(error.exit_code, error)
"""
    first, second = in_subprocess(code, run.directory).splitlines()
    assert first.startswith("3 the checkpoint of step 2 was not saved")
    assert "the file is too large" in second
    assert "--resume" in second
    assert checkpoints(run) == ["000000001", "000000002"]
    assert whole(run.latest_checkpoint(), 2)


def test_a_kill_at_random_moments_leaves_a_whole_checkpoint(tmp_path):
    """A process forks savers that never pause, each step twice; they are killed mid-way."""
    code = """
import os, sys, torch
from potstill.run import Run
torch.set_num_threads(1)
run = Run.create("run", "", {})
def save(step):
    run.append({"step": step})
    run.save_checkpoint(step, {"w": torch.full((3,), float(step))}, {"step": step})
save(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        step = run.latest_checkpoint().step + 1
        save(step)
        print(os.getpid(), flush=True)
        while True:
            save(step)
            step += 1
            save(step)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""
    draw = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as saver:
        last, interrupted = 1, 0
        for _ in range(12):
            print(file=saver.stdin, flush=True)
            child = int(saver.stdout.readline())
            time.sleep(draw.uniform(0.0, 0.04))
            os.kill(child, signal.SIGKILL)
            assert saver.stdout.readline() == "killed\n"
            run = Run.open(tmp_path / "run")
            interrupted += any(name.startswith(".tmp-") for name in checkpoints(run))
            checkpoint = run.latest_checkpoint()  # a warning here is an error
            assert checkpoint.step > last
            assert whole(checkpoint, checkpoint.step)
            run.rewind(checkpoint)
            assert run.metrics[-1] == {"step": checkpoint.step}
            last = checkpoint.step
        saver.stdin.close()
    assert saver.returncode == 0
    assert interrupted  # some kills did fall into a save


@pytest.mark.parametrize("step", [2, 3])
def test_a_kill_before_each_call_that_changes_the_disk_leaves_a_whole_checkpoint(run, step):
    """Python announces such calls to an audit hook; a fork kills itself at the 1st, 2nd, ... one.

    Saved before: step 2. Saved now: step 2 again, or step 3; afterwards there is one or the other.
    """
    save(run, 1, 2)
    code = f"""
import os, shutil, signal, sys, warnings, torch
from potstill.run import Run
warnings.simplefilter("error")
torch.set_num_threads(1)
CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
moment, killed = 0, True
while killed:
    moment += 1
    shutil.rmtree("../trial", ignore_errors=True)
    shutil.copytree(".", "../trial")
    child = os.fork()
    if child == 0:
        left = moment
        def count(event, arguments):
            global left
            if event in CALLS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        run = Run.open("../trial")
        sys.addaudithook(count)
        run.save_checkpoint({step}, {{"w": torch.zeros(9)}}, {{"new": True}})
        os._exit(0)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    found = Run.open("../trial").latest_checkpoint()
    if found.state == {{"new": True}}:
        assert found.step == {step} and torch.equal(found.tensors["w"], torch.zeros(9)), moment
    else:
        assert found.step == 2 and torch.equal(found.tensors["w"], torch.full((3,), 2.0)), moment
assert found.state == {{"new": True}}
print(moment)
"""
    assert int(in_subprocess(code, run.directory)) > 20


# predictors


def test_a_predictor_with_one_flipped_byte_is_refused(run):
    run.save_predictor("student", {"w": torch.randn(4)}, {"classes": [3, 1]})
    run.finish({})
    path = run.directory / "student.safetensors"
    for position in (0, 9, -1):
        flip(path, position)
        with pytest.raises(StorageError, match=r"student\.safetensors is damaged"):
            Run.open(run.directory).load_predictor()
        flip(path, position)
    assert Run.open(run.directory).load_predictor()[1] == {"classes": [3, 1]}


def test_a_predictor_saved_before_a_kill_is_in_the_result(run):
    run.save_predictor("peer0", {"w": torch.zeros(1)}, {})
    again = Run.open(run.directory)
    with pytest.raises(PotstillError, match="has not finished"):
        again.load_predictor("peer0")
    again.save_predictor("peer1", {"w": torch.ones(1)}, {})
    (run.directory / ".tmp-1-killed").write_bytes(b"")
    again.finish({})
    assert sorted(again.result["files"]) == ["peer0.safetensors", "peer1.safetensors"]
    assert torch.equal(again.load_predictor("peer0")[0]["w"], torch.zeros(1))
    assert not list(run.directory.glob(".tmp-*"))


def test_an_unknown_predictor_is_refused_with_the_known_ones(any_run):
    any_run.save_predictor("student", {}, {})
    any_run.finish({})
    with pytest.raises(PotstillError, match=r'"studnt"; this run has student; did you mean'):
        any_run.load_predictor("studnt")


@pytest.mark.parametrize("name", ["", ".", "../up", "a/b", ".tmp-x", "a b", "x\n"])
def test_a_predictor_name_that_is_no_file_name_is_refused(any_run, name):
    with pytest.raises(PotstillError, match="cannot name a predictor"):
        any_run.save_predictor(name, {}, {})


# environment


def test_the_environment_is_json_and_says_what_it_was_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no repository here
    found = describe_environment("cpu", precision="fp32", compile=False, world_size=1)
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert found["device"] == "cpu"
    assert found["command"] == [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    assert found["git"] is None
    assert found["world_size"] == 1
    monkeypatch.setenv("PATH", "")  # no git at all
    assert describe_environment()["git"] is None


def test_the_environment_has_the_commit_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "m"]):
        subprocess.run(["git", *command], check=True)
    assert re.fullmatch("[0-9a-f]{40}", describe_environment()["git"])


def test_each_difference_that_changes_bits_is_one_sentence():
    old = describe_environment(precision="fp32", compile=False, world_size=1)
    assert differences(old, old) == []
    assert differences(old, {**old, "command": ["x"], "git": "1", "platform": "y"}) == []
    new = {
        **old,
        "potstill": "0",
        "torch": "0",
        "threads": 99,
        "device": "cuda (H200)",
        "cpu": "other",
        "precision": "bf16",
        "compile": True,
        "world_size": 2,
    }
    found = differences(old, new)
    assert len(found) == 8
    assert f"the number of PyTorch threads was {old['threads']} and is now 99." in found
    del old["precision"]
    assert "the precision was not recorded and is now bf16." in differences(old, new)


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    run = Run.create(tmp_path / "run", "", {})
    other = Run.open(tmp_path / "run")
    with run.locked():
        again = pytest.raises(PotstillError, match="another process is training into")
        with again, other.locked():
            pass
        with other.locked(wanted=False):
            pass
    with other.locked():
        pass
    with Run.create(None, "", {}).locked():
        pass
