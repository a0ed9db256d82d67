"""One rank of test_ranks.py: trains every method of the contract and saves what it then holds.

Each with torchrun's variables set.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from potstill import distributed, engine
from potstill.evaluate import agreement, evaluate, predict, reliability, scores
from potstill.files import save_tensors
from potstill.methods import METHODS
from potstill.stochastic_depth import stochastic
from tests.methods.test_contract import ALL, build, pace_of, trained_teacher
from tests.toys import ToyImages, toy_net


def work(folder: Path) -> None:
    images = ToyImages(dtype=torch.float64)
    for name in ALL:
        method = build(name, "group", torch.float64)
        training = engine.Training(method, images, pace_of(method, 2))
        records = [{k: v.item() for k, v in m.terms.items()} for m in training.run()]
        found = evaluate(method.predictors(), images, batch_size=30)
        save_tensors(folder / f"{name}.{distributed.rank()}.safetensors", training.state()[0], {})
        (folder / f"{name}.{distributed.rank()}.json").write_text(
            json.dumps([records, {k: list(s) for k, s in found.items()}])
        )


def calibration() -> list[float]:
    """Bins, error and agreement of two networks on 61 images: 2 ranks share the last one."""
    nets = {str(seed): toy_net(seed, "group").double().predictor() for seed in (0, 1)}
    images = ToyImages(61, dtype=torch.float64)
    one, other = predict(nets, images, batch_size=30).values()
    bins = [value or 0.0 for each in reliability(one) for value in each]
    return [*bins, scores(one).ece, agreement(one, other)]


def shared_gradients() -> dict[str, list[float]]:
    """Where autograd hands out one tensor several times: rank r sees images x = r + 1."""
    a, b = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * (distributed.rank() + 1)
    one, other = distributed.gradient(((a + b) * x).sum(), [a, b])
    (expanded,) = distributed.gradient(a.sum(), [a])
    rows = nn.Parameter(torch.ones(1, dtype=torch.float64))
    u, w = rows * 1, rows * 1
    (twice,) = distributed.gradient((distributed.gather(u) + distributed.gather(w)).sum(), [rows])
    found = {"one": one, "other": other, "expanded": expanded, "twice": twice}
    return {name: tensor.tolist() for name, tensor in found.items()}


def stochastic_networks(folder: Path) -> None:
    """kd of a stochastic teacher and dml of stochastic students, and what each of them drew.

    The teacher has BatchNorm, which uses running averages here, as on one rank.
    """
    images = ToyImages(dtype=torch.float64)
    with distributed.together():
        for draw in ("batch", "image"):
            teacher = stochastic(toy_net(9, width=6), 0.5, draw=draw)
            pair = [stochastic(toy_net(seed, "group"), 0.5, draw=draw) for seed in (0, 1)]
            for name, method in (
                ("kd", METHODS["kd"]([toy_net(0, "group")], [teacher], images.spec())),
                ("dml", METHODS["dml"](pair, [], images.spec(0))),
            ):
                training = engine.Training(method.double(), images, pace_of(method, 2))
                moments = list(training.run())
                records = [{k: v.item() for k, v in m.terms.items()} for m in moments]
                drew = [m.subnetworks for m in moments if m.epoch_done]
                place = folder / f"{name}-{draw}.{distributed.rank()}"
                save_tensors(Path(f"{place}.safetensors"), training.state()[0], {})
                Path(f"{place}.json").write_text(json.dumps([records, drew]))


def everything(folder: Path) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    trained_teacher("group")  # alone: every world size has the same teacher
    with distributed.together():
        work(folder)
        (folder / f"shared.{distributed.rank()}.json").write_text(json.dumps(shared_gradients()))
        (folder / f"bins.{distributed.rank()}.json").write_text(json.dumps(calibration()))
