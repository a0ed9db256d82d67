"""One rank of test_ranks.py: trains every method of the contract and saves what it then holds.

Run as `python -m tests.ranks_worker FOLDER` with torchrun's variables set.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from potstill import distributed, engine
from potstill.evaluate import evaluate
from potstill.files import save_tensors
from tests.methods.test_contract import ALL, build, pace_of, trained_teacher
from tests.toys import ToyImages


def work(folder: Path) -> None:
    images = ToyImages(dtype=torch.float64)
    for name in ALL:
        method = build(name, "group", torch.float64)
        training = engine.Training(method, images, pace_of(method, 2))
        records = [{k: v.item() for k, v in m.terms.items()} for m in training.run()]
        scores = evaluate(method.predictors(), images, batch_size=30)
        save_tensors(folder / f"{name}.{distributed.rank()}.safetensors", training.state()[0], {})
        (folder / f"{name}.{distributed.rank()}.json").write_text(
            json.dumps([records, {k: list(s) for k, s in scores.items()}])
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained_teacher("group")  # alone: every world size has the same teacher
    distributed.start()
    work(Path(sys.argv[1]))
    distributed.stop()
