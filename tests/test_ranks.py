"""Two ranks with half the batch each train as one rank does, on CPU with gloo.

Networks without BatchNorm, float64: what differs is only the order of additions.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from potstill.files import load_tensors
from potstill.run import Run
from tests import forked, ranks_worker
from tests.methods.test_contract import ALL

pytestmark = pytest.mark.xdist_group("ranks")  # one worker, so that the folder is made once


def places(world: int) -> list[dict[str, str]]:
    """torchrun's variables for each of `world` ranks, by which they find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {k: str(v) for k, v in {**shared, "RANK": r, "LOCAL_RANK": r}.items()} for r in range(world)
    ]


def fork_ranks(world: int, target: Callable[..., None], *arguments: object) -> list[forked.Forked]:
    """The same call in `world` processes that find each other."""
    return [forked.Forked(target, *arguments, env=place) for place in places(world)]


def start_ranks(*words: str) -> list[subprocess.Popen[str]]:
    """`python -m potstill` in two processes, whole ones: how they end is part of what is tested."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "potstill", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", **place},
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in places(2)
    ]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A folder for each world size, filled by ranks_worker.py."""
    folders = {world: tmp_path_factory.mktemp(f"world{world}") for world in (1, 2)}
    ranks = [
        rank
        for world in (1, 2)
        for rank in fork_ranks(world, ranks_worker.everything, folders[world])
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
    return folders


@pytest.mark.parametrize("name", list(ALL))
def test_two_ranks_equal_one(name: str, trained: dict[int, Path]) -> None:
    """Every weight, buffer, optimiser state and logged term, to 1e-10."""
    one, _ = load_tensors(trained[1] / f"{name}.0.safetensors")
    two, _ = load_tensors(trained[2] / f"{name}.0.safetensors")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-10, msg=key)
    (records, scores), (records2, scores2) = (
        json.loads((trained[w] / f"{name}.0.json").read_text()) for w in (1, 2)
    )
    for a, b in zip(records, records2, strict=True):
        assert a == pytest.approx(b, abs=1e-10, rel=0)
    for predictor, score in scores.items():
        assert score == pytest.approx(scores2[predictor], abs=1e-9, rel=0)


@pytest.mark.parametrize("name", list(ALL))
def test_every_rank_holds_the_same(name: str, trained: dict[int, Path]) -> None:
    """Bit for bit: rank 0's checkpoint is everybody's."""
    one, other = (load_tensors(trained[2] / f"{name}.{r}.safetensors")[0] for r in (0, 1))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    records = [(trained[2] / f"{name}.{r}.json").read_text() for r in (0, 1)]
    assert records[0] == records[1]


def test_gradients_that_autograd_shares_are_averaged_once(trained: dict[int, Path]) -> None:
    """The mean of x and 2x is 1.5x; two gathered copies of 2 ranks' rows are 4 of one weight."""
    for rank in (0, 1):
        found = json.loads((trained[2] / f"shared.{rank}.json").read_text())
        assert found["one"] == found["other"] == [1.5, 3.0, 4.5]
        assert found["expanded"] == [1.0, 1.0, 1.0]
        assert found["twice"] == [4.0]
    alone = json.loads((trained[1] / "shared.0.json").read_text())
    assert alone["one"] == [1.0, 2.0, 3.0] and alone["twice"] == [2.0]


def test_calibration_and_agreement_are_of_the_images_of_all_ranks(
    trained: dict[int, Path],
) -> None:
    alone, *shared = (
        json.loads((trained[world] / f"bins.{rank}.json").read_text())
        for world, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert sum(alone[:45:3]) == 61 and 0 < alone[-1] < 100
    for found in shared:
        assert found == pytest.approx(alone, abs=1e-10, rel=0)


def test_torchrun_trains_one_run(tmp_path: Path) -> None:
    """`torchrun -m potstill train`: one directory, one voice, BatchNorm statistics shared."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "potstill", "train", "digits/vanilla", "epochs=2", "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distill epoch 2 ·") == 1
    assert json.loads((out / "env.json").read_text())["world_size"] == 2
    result = json.loads((out / "result.json").read_text())
    assert result["scores"]["student"]["images"] == 898
    assert sum(images for images, _, _ in result["calibration"]["student"]) == 898


def test_several_ranks_save_before_they_stop(tmp_path: Path) -> None:
    """As a terminal does on Ctrl-C: the signal goes to every process of the group."""
    out = tmp_path / "run"
    words = ["train", "digits/vanilla", "epochs=2000", "evaluate_every=500", "--out", str(out)]
    ranks = start_ranks(*words)
    for _ in range(600):
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size:
            break
        if any(process.poll() is not None for process in ranks):
            break  # the errors are told below
        time.sleep(0.1)
    for process in ranks:
        process.send_signal(signal.SIGINT)
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [130, 130], errors
    assert not any("Traceback" in e for e in errors), errors
    checkpoint = Run.open(out).latest_checkpoint()
    assert checkpoint is not None
    assert f"saved after step {checkpoint.step} of" in errors[0]


def test_ranks_that_cannot_share_a_batch_are_told(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    ranks = start_ranks("train", "digits/vanilla", "data.batch_size=33", "--out", out)
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "2 ranks cannot share batches of 33" in errors
        assert "Traceback" not in errors
