"""The runs of a plan: how long they will take, and those that are missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console

from potstill import display, files, rehearsal, training
from potstill.errors import PotstillError, StorageError, first_line
from potstill.recipe import Recipe
from potstill.reproduce.outcome import record
from potstill.reproduce.plan import Plan, Setting
from potstill.run import Run, locked

LOCK, LOGS, RECIPES = ".reproduce.lock", "logs", "recipes"
POLL_SECONDS = 0.2
STOP_SECONDS = 60.0
"""How long a run that was asked to stop may take to save itself."""


class RunsFailed(PotstillError):
    """Some runs of a plan failed; what each of them said."""


@dataclass(frozen=True)
class Estimate:
    """How long runs will take, as far as a few real steps can tell."""

    seconds: Mapping[str, float]
    """Of one run, by setting; of those that have runs to do and could be tried."""
    faults: Mapping[str, str]
    """Why others could not be tried, by setting."""
    left: float
    """Seconds until all runs have finished, but for what could not be tried."""


def estimate(
    plan: Plan, jobs: int, say: Callable[[str], None] = lambda line: None, seconds: float = 1.0
) -> Estimate:
    """Try every setting that has runs to do, the steps of each phase for about `seconds`.

    Teachers that are still to be trained are replaced by untrained ones, which cost the same.
    """
    missing, threads = plan.missing, torch.get_num_threads()
    found, faults = {}, {}
    if jobs > 1:
        torch.set_num_threads(threads_of(jobs))
    try:
        for setting in {s.name: s for s, _ in missing}.values():
            say(f"measuring a few steps of {setting.label}")
            try:
                job = training.assemble(_with_untrained_teachers(setting.recipe))
                found[setting.name] = rehearsal.rehearse(job, seconds).total_seconds
            except PotstillError as error:
                faults[setting.name] = str(error)
    finally:
        torch.set_num_threads(threads)
    left = sum(found.get(s.name, 0.0) * (1 - _done(plan.place(s, seed), s)) for s, seed in missing)
    return Estimate(found, faults, left / min(jobs, max(1, len(missing))))


def _done(place: Path, setting: Setting) -> float:
    """Share of a run's epochs that its record has."""
    if not (place / "recipe.yaml").exists():
        return 0.0
    return len(Run(place).metrics) / setting.epochs


def _with_untrained_teachers(recipe: Recipe) -> Recipe:
    """The recipe without weights that are not there yet."""
    teachers = [
        teacher if teacher.weights is None or os.path.isfile(teacher.weights)
        else teacher if Run(Path(teacher.weights.partition(":")[0])).finished
        else teacher.model_copy(update={"weights": None})
        for teacher in recipe.teachers
    ]  # fmt: skip
    return recipe.model_copy(update={"teachers": teachers})


def threads_of(jobs: int) -> int:
    """Threads of each of several processes that share the processor."""
    return max(1, (os.cpu_count() or 1) // jobs)


def require_alone(plan: Plan) -> None:
    """Raises PotstillError where another process is at work in the plan's folder."""
    if (plan.out / LOCK).exists():
        with locked(plan.out / LOCK, _at_work(plan)):
            pass


def _at_work(plan: Plan) -> str:
    return (
        f"another reproduce is at work in {plan.out}, or a run that it has started; wait for it, "
        "stop it, or choose another folder with --out"
    )


def carry_out(plan: Plan, jobs: int, console: Console, command: Sequence[str]) -> None:
    """Train what is missing, and keep beside the runs what they are for.

    A run that fails is told and left; the others go on. Raises PotstillError where another process
    is at work in the folder, Interrupted on Ctrl-C, and RunsFailed at the end where some failed.
    """
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.storage_error(plan.out, "made", error) from error
    with locked(plan.out / LOCK, _at_work(plan)) as lock:
        record(plan, command)
        missing = plan.missing
        failed = (
            _one_by_one(plan, missing, console)
            if jobs == 1
            else _in_processes(plan, missing, jobs, console, lock)
        )
    if failed:
        count = "1 run has" if len(failed) == 1 else f"{len(failed)} runs have"
        lines = [f"{name}: {reason}" for name, reason in failed.items()]
        raise RunsFailed("\n".join([f"{count} failed; the others are done:", *lines]))


def _named(setting: Setting, seed: int) -> str:
    return f"{setting.label}, seed {seed}"


def _finished_line(number: str, name: str, run: Run) -> str:
    result = run.result or {}
    scores = ", ".join(f"{n} {s['top1']:.2f} %" for n, s in result["scores"].items())
    return f"{number} {name}: {scores} in {display.duration(result['seconds'])}"


def _one_by_one(
    plan: Plan, missing: Sequence[tuple[Setting, int]], console: Console
) -> dict[str, str]:
    """In this process; what failed, and why."""
    failed: dict[str, str] = {}
    lost: set[str] = set()
    for number, (setting, seed) in enumerate(missing, 1):
        name, of = _named(setting, seed), f"[{number}/{len(missing)}]"
        try:
            if setting.teacher in lost:
                raise PotstillError("its teacher's run failed")
            one = setting.recipe.model_copy(update={"seed": seed})
            with display.watcher(console, f"{of} {name} · ", brief=True) as watcher:
                run = training.train(one, plan.place(setting, seed), watcher, resume=True)
        except training.Interrupted as error:
            raise training.Interrupted(
                f"{name}: {error}; the same command goes on from there"
            ) from error
        except PotstillError as error:
            failed[name] = str(error)
            lost.add(setting.name)
            _print(console, f"{of} {name}: failed: {first_line(error)}")
        else:
            _print(console, _finished_line(of, name, run))
    return failed


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    setting: Setting
    seed: int
    log: Path


def _in_processes(
    plan: Plan,
    missing: Sequence[tuple[Setting, int]],
    jobs: int,
    console: Console,
    lock: IO[str],
) -> dict[str, str]:
    """Each run in a process of its own, `jobs` at once; what failed, and why."""
    waiting, working = list(missing), list[_Worker]()
    failed: dict[str, str] = {}
    lost: set[str] = set()
    ended = 0
    with _stop_requests() as requested:
        while waiting or working:
            if requested:
                _stop(working)
                raise training.Interrupted(
                    f"interrupted with {len(missing) - ended} of {len(missing)} runs to finish; "
                    "those at work have saved themselves; the same command goes on from there"
                )
            for setting, seed in list(waiting):
                if len(working) == jobs:
                    break
                if setting.teacher in lost:
                    waiting.remove((setting, seed))
                    ended += 1
                    failed[_named(setting, seed)] = "its teacher's run failed"
                elif _teacher_is_there(plan, setting):
                    waiting.remove((setting, seed))
                    working.append(_start(plan, setting, seed, jobs, lock))
            for worker in [w for w in working if w.process.poll() is not None]:
                working.remove(worker)
                ended += 1
                of, name = f"[{ended}/{len(missing)}]", _named(worker.setting, worker.seed)
                run = Run(plan.place(worker.setting, worker.seed))
                if worker.process.returncode == 0 and run.finished:
                    _print(console, _finished_line(of, name, run))
                    continue
                failed[name] = f"{_last_line(worker.log)} (all of it: {worker.log})"
                lost.add(worker.setting.name)
                _print(console, f"{of} {name}: failed: {failed[name]}")
            time.sleep(POLL_SECONDS)
    return failed


def _teacher_is_there(plan: Plan, setting: Setting) -> bool:
    if setting.teacher is None:
        return True
    return Run(plan.place(plan.settings[setting.teacher], 0)).finished


def _start(plan: Plan, setting: Setting, seed: int, jobs: int, lock: IO[str]) -> _Worker:
    """`potstill train` on the setting's recipe, which is kept for everyone to repeat."""
    recipe, log = plan.out / RECIPES / f"{setting.name}.yaml", plan.out / LOGS
    log /= f"{setting.name}-seed{seed}.log"
    for folder in (recipe.parent, log.parent):
        folder.mkdir(exist_ok=True)
    files.write_bytes(recipe, setting.recipe.to_yaml().encode())
    command = [sys.executable, "-m", "potstill", "train", str(recipe), f"seed={seed}"]
    command += ["--out", str(plan.place(setting, seed)), "--resume"]
    threads = str(threads_of(jobs))
    # threads that wait by spinning take the processor from the other processes
    quiet = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**quiet, **os.environ},
            start_new_session=True,  # Ctrl-C is ours to hand on, once
            pass_fds=[lock.fileno()],  # as long as it works, nobody else does
        )
    return _Worker(process, setting, seed, log)


def _stop(working: Sequence[_Worker]) -> None:
    """Let every run save itself and end; one that does not in time is killed."""
    for worker in working:
        worker.process.terminate()
    until = time.monotonic() + STOP_SECONDS
    for worker in working:
        try:
            worker.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM, to be acted on when nothing is half done."""
    requested: list[int] = []

    def note(number: int, frame: Any) -> None:
        requested.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError as error:
        raise StorageError(f"{log} cannot be read: {error}") from error
    return lines[-1].removeprefix("potstill: ") if lines else "it printed nothing"


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
