"""The same training as a plain loop, as it is written in research code: what is compared against.

One image at a time through PIL, in a DataLoader; float32, channels first; the teacher in every
step; figures read from the device in every step.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from potstill import training
from potstill.bench.contest import FIRST
from potstill.bench.ours import TESTED
from potstill.data.resident import Resident
from potstill.data.split import Split
from potstill.errors import PotstillError
from potstill.method import Batch, Progress, of_sum
from potstill.recipe import Recipe


def require_plain(job: training.Assembled) -> None:
    """Raise PotstillError for a training that the plain loop cannot be."""
    leave = "leave out --against loop"
    (*_, phase) = job.training.phases
    updates = [update for turn in phase.turns for update in turn.updates]
    if len(updates) != 1 or updates[0].gradients is not of_sum:
        name = type(job.method).__name__
        raise PotstillError(f"{name} takes more than one gradient in a step; {leave}")
    images = job.data.train.images
    if not isinstance(images, Resident):
        raise PotstillError(f"the plain loop decodes no files, and these images are files; {leave}")
    if images.pad_mode != "zero":
        raise PotstillError(f"the plain loop pads with black; set data.pad_mode=zero, or {leave}")


class PlainLoop:
    """The last phase of a recipe, written down plainly; one that `require_plain` lets pass.

    `workers` processes prepare batches; None: none or two, whichever is faster here.
    """

    def __init__(self, recipe: Recipe, workers: int | None = None, name: str = "loop") -> None:
        self.name = name
        plain = {"store": None, "compile": False, "precision": "fp32", "channels_last": False}
        self.job = training.assemble(recipe.model_copy(update=plain))
        self.batch_size = recipe.data.batch_size
        self.images = self.job.training.lengths[-1].images
        self.device = self.job.device
        require_plain(self.job)
        phase = self.job.training.phases[-1]
        self._turn, (self._update,) = phase.turns[0], phase.turns[0].updates
        self._optimizer = self.job.pace.plan(phase.name, self._update.name).make(
            self._update.parameters
        )
        for group in self._optimizer.param_groups:
            group["fused"] = None  # as it is unless somebody asks for it
        self._progress = Progress(0, 0, self.job.training.steps, phase.epochs)
        train, test = self.job.data.train, self.job.held_out
        self._train = _Augmented(train, True)
        few = test.first(TESTED)
        self._test, self._scale = _Augmented(few, False), len(test) / len(few)
        self.workers = self._faster() if workers is None else workers

    def begin(self) -> None:
        """Begin an epoch, up to and with its first steps."""
        self._under_way = self._batches(self._train, True)
        self.steps(FIRST)

    def steps(self, count: int) -> None:
        """Train on the next `count` batches."""
        losses, right, seen = 0.0, 0, 0
        method = self.job.method
        method.train()
        for batch in islice(self._under_way, count):
            out = self._turn.forward(batch, self._progress, None)
            terms = self._update.loss(out)
            loss = torch.stack(list(terms.values())).sum()
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            if self._turn.after_step is not None:
                self._turn.after_step(out)
            losses += loss.item() * len(batch.label)
            if getattr(out, "students", None):
                right += int((out.students[0].logits.argmax(1) == batch.label).sum())
            seen += len(batch.label)

    @torch.no_grad()
    def end_epoch(self) -> float:
        """Evaluate; the seconds that it takes on every test image."""
        began = time.perf_counter()
        predictors = self.job.method.predictors()
        self.job.method.eval()
        right = 0
        for batch in self._batches(self._test, False):
            for predictor in predictors.values():
                right += int((predictor(batch.image).argmax(1) == batch.label).sum())
        return (time.perf_counter() - began) * self._scale / self.job.evaluate_every

    def _batches(self, images: _Augmented, shuffle: bool) -> Any:
        loader: Any = torch.utils.data.DataLoader(
            images, self.batch_size, shuffle=shuffle, num_workers=self.workers
        )
        for parts in loader:
            yield Batch(*(part.to(self.device) for part in parts))

    def _faster(self) -> int:
        """Worker processes with which a few steps take less time, 0 or 2."""
        took: dict[int, float] = {}
        for number in (0, 2):
            self.workers = number
            self.begin()
            began = time.perf_counter()
            self.steps(12)
            took[number] = time.perf_counter() - began
        return min(took, key=lambda number: took[number])


class _Augmented(torch.utils.data.Dataset[Any]):
    """Images of a split, one at a time: padded, cropped, mirrored, made a tensor, normalised."""

    def __init__(self, split: Split, train: bool) -> None:
        images = split.images
        assert isinstance(images, Resident), "require_plain has seen to that"
        self.pixels = images.pixels()[split.indices.cpu()].numpy()
        self.labels = split.labels.tolist()
        self.indices = split.indices.tolist()
        self.mean = torch.tensor(split.mean).view(-1, 1, 1)
        self.std = torch.tensor(split.std).view(-1, 1, 1)
        self.padding = images.padding if train else 0
        self.flip = images.flip and train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int, int, int]:
        raw = self.pixels[row]
        image = Image.fromarray(raw[:, :, 0] if raw.shape[2] == 1 else raw)
        if self.padding:
            w, h = image.size
            padded = ImageOps.expand(image, self.padding)
            x, y = (int(torch.randint(0, 2 * self.padding + 1, (1,))) for _ in range(2))
            image = padded.crop((x, y, x + w, y + h))
        if self.flip and torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = np.array(image).reshape(raw.shape)
        tensor = torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255)
        return (tensor - self.mean) / self.std, self.labels[row], self.indices[row], 0
