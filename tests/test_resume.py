"""Killed and resumed equals never killed: every bit of weights, optimiser state and metrics."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.run import Run
from tests import forked, resume_worker


def worker(folder: Path, settings: dict[str, Any]) -> int | None:
    """The exit status of a process that trains, negative for a signal."""
    process = forked.Forked(resume_worker.work, folder, settings)
    process.communicate()
    return process.returncode


def end_of(run: Run) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Final state as saved, and metrics and result without what a clock measured."""
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    metrics = [{k: v for k, v in record.items() if k != "time"} for record in run.metrics]
    result = run.result
    assert result is not None
    timed = ("seconds", "images_per_second")
    for cost in result["cost"].values():
        assert cost.pop("latency_ms") > 0
    return (
        checkpoint.tensors,
        (checkpoint.step, checkpoint.state, metrics),
        {k: v for k, v in result.items() if k not in timed},
    )


KILLS: list[list[Any]] = [
    # mid-epoch and again later; then inside saves: a checkpoint renames its three files into place,
    # tensors, state and manifest, and then its folder
    [5, 11],
    [{"rename": 6}, {"rename": 4}],
    [{"rename": 11}, 11],
    # before there is any checkpoint, when metrics.jsonl has a line already
    [{"rename": 1}, 9],
]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("method", ["kd", "two_optimizers"])
def test_killed_and_resumed_equals_straight(
    method: str, optimizer: str, fused: bool, tmp_path: Path
) -> None:
    """SIGKILL twice in a run, at steps or inside saves; then to the end. channels_last."""
    case = 4 * (method == "kd") + 2 * (optimizer == "sgd") + fused
    kills = KILLS[case % len(KILLS)]
    settings = {"method": method, "optimizer": optimizer, "fused": fused}
    settings["every_step"] = case in (0, 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        straight = resume_worker.train(tmp_path / "straight", {**settings, "every_step": False})
    finally:
        torch.set_num_threads(threads)
    for kill in kills:
        status = worker(tmp_path / "killed", {**settings, "kill": kill})
        assert status == -signal.SIGKILL, f"{kill} did not kill"
    assert worker(tmp_path / "killed", settings) == 0

    tensors, plain, result = end_of(straight)
    again, plain_again, result_again = end_of(Run.open(tmp_path / "killed"))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(t, again[k]) for k, t in tensors.items())
    assert plain == plain_again
    assert result == result_again  # the weights' sha256 too
    assert result["calibration"]["student"] and "teacher0" in result["agreement"]["student"]
    assert any(k.startswith("optimizers/") for k in tensors)


def start_training(out: Path) -> forked.Forked:
    words = ["train", "digits/vanilla", "epochs=400", "evaluate_every=50", "--out", str(out)]
    return forked.Forked(forked.potstill, *words)


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists() and path.stat().st_size:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} never came")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_training_saves_first(number: signal.Signals, tmp_path: Path) -> None:
    process = start_training(tmp_path / "run")
    wait_for(tmp_path / "run" / "metrics.jsonl")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved after step" in errors and "--resume" in errors and "Traceback" not in errors
    checkpoint = Run.open(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    assert f"saved after step {checkpoint.step} of" in errors


def test_resume_without_a_path_finds_the_run(tmp_path: Path) -> None:
    """In the folder where it was started, with the same words and --resume, or --resume alone."""
    recipe = ["digits/vanilla", "epochs=2"]

    def run(*words: str) -> tuple[int | None, str, str]:
        """Exit code, output and errors."""
        process = forked.Forked(forked.potstill, "train", *words, cwd=tmp_path)
        output, errors = process.communicate()
        return process.returncode, output, errors

    assert run(*recipe)[0] == 0
    (place,) = tmp_path.glob("runs/*/seed0")
    (place / "result.json").unlink()  # as if it had been killed at the very end
    code, _, errors = run(*recipe)
    assert code == 2 and "--resume" in errors
    assert "resumed after step 8 of 8" in run("--resume")[1]
    assert "finished already" in run(*recipe, "--resume")[1]
    assert run("--resume")[0] == 2
