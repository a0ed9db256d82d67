"""A recipe's own training, for as many steps as are asked for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from potstill import stopwatch, training
from potstill.bench.contest import FIRST
from potstill.errors import PotstillError
from potstill.evaluate import evaluate
from potstill.recipe import Recipe
from potstill.rehearsal import Few, peak_bytes
from potstill.run import Run

TESTED = 2000
"""Test images that the evaluation is timed on, at most, and scaled up from."""


class Ours:
    """The first epoch of a recipe's last phase, again and again.

    A store that has no folder of its own is kept in a temporary one. After the warm-up all outputs
    of the timed steps are in it: it is measured as a full one.
    """

    def __init__(self, recipe: Recipe, name: str = "potstill") -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="potstill-bench-")
        if recipe.store is not None and recipe.store.root is None:
            kept = recipe.store.model_copy(update={"root": f"{self._folder.name}/teachers"})
            recipe = recipe.model_copy(update={"store": kept})
        self.job = training.assemble(recipe)
        self.device = self.job.device
        self.job.training.images = Few(self.job.training.images)  # a preparation is no step
        self.batch_size = recipe.data.batch_size
        self.job.compile_networks()
        self._run = Run.create(Path(self._folder.name) / "run", recipe.to_yaml(), {})
        self._phase = len(self.job.training.phases) - 1
        length = self.job.training.lengths[self._phase]
        self.images, self._batches = length.images, length.steps_per_epoch
        test = self.job.held_out
        self._few = test.first(TESTED)
        self._scale = len(test) / len(self._few)

    def begin(self) -> None:
        """Begin the epoch anew, up to and with its first steps."""
        self.job.training.skip_to(self._phase)
        self._under_way = self.job.training.run()
        self.steps(FIRST)

    def steps(self, count: int) -> None:
        """Train on the next `count` batches."""
        done = self.job.training.step
        if done + count > self._batches:
            raise PotstillError(
                f"an epoch has {self._batches} batches, and --steps {count} comes after the first "
                f"{FIRST}; give fewer"
            )
        for _ in islice(self._under_way, count):
            pass

    def end_epoch(self) -> float:
        """Evaluate and save a checkpoint; the seconds that all of it takes, on every test image."""
        under_way = self.job.training
        began = time.perf_counter()
        predictors = (under_way.phase.predictors or self.job.method.predictors)()
        batch = training.evaluation_batch(self._few)
        evaluate(predictors, self._few, batch, self.job.data.train, self.job.pace.precision)
        tested = time.perf_counter()
        self._run.save_checkpoint(under_way.done_steps, *under_way.state())
        saved = time.perf_counter()
        return (tested - began) * self._scale / self.job.evaluate_every + (saved - tested)

    def split(self, count: int) -> Mapping[str, float]:
        """Mean seconds of a step by part, of `count` steps: data, teacher, student and so on."""
        self.begin()
        began = stopwatch.now(self.device)
        with stopwatch.running(self.device) as watch:
            self.steps(count)
        took = stopwatch.now(self.device) - began
        parts = {part: watch.seconds.get(part, 0.0) / count for part in stopwatch.PARTS}
        return {**parts, "rest": took / count - sum(parts.values())}

    def hit_rate(self) -> float | None:
        """Of the outputs asked for since the last time, the share that was stored; or None."""
        if self.job.store is None:
            return None
        counts = self.job.store.take_counts()
        asked = counts.read + counts.computed
        return counts.read / asked if asked else None

    def peak_bytes(self) -> int:
        """Of the process so far on a CPU, of this training on a GPU."""
        return peak_bytes(self.device)

    def close(self) -> None:
        """Delete what was written."""
        if self.job.store is not None:
            self.job.store.close()
        self._folder.cleanup()
