"""Where the time goes, by parts: exclusive of what is measured within them."""

import time

import pytest
import torch

from potstill import stopwatch
from potstill.engine import Training
from potstill.methods import METHODS
from tests.toys import ToyImages, pace, toy_net

CPU = torch.device("cpu")


def test_what_is_measured_within_a_part_is_taken_off_it(monkeypatch):
    """A clock by hand: outer 0 to 10, inner 2 to 5, and again 6 to 7."""
    times = iter([0.0, 2.0, 5.0, 6.0, 7.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    with stopwatch.running(CPU) as watch, stopwatch.part("outer"):
        for _ in range(2):
            with stopwatch.part("inner"):
                pass
    assert dict(watch.seconds) == {"inner": 4.0, "outer": 6.0}


def test_an_error_within_a_part_ends_it():
    with stopwatch.running(CPU) as watch:
        with pytest.raises(ZeroDivisionError), stopwatch.part("one"), stopwatch.part("two"):
            _ = 1 / 0
        with stopwatch.part("three"):
            pass
    assert set(watch.seconds) == {"one", "two", "three"}
    assert watch._within == []


def test_nothing_is_measured_unless_somebody_asks():
    with stopwatch.running(CPU) as watch:
        pass
    with stopwatch.part("late"):
        pass
    assert not watch.seconds
    assert stopwatch.part("late") is stopwatch.part("other")


def test_one_that_runs_within_another_hides_it_and_goes():
    with stopwatch.running(CPU) as outer:
        with stopwatch.running(CPU) as inner, stopwatch.part("a"):
            pass
        with stopwatch.part("b"):
            pass
    assert (set(outer.seconds), set(inner.seconds)) == ({"b"}, {"a"})


def test_a_training_is_measured_by_all_parts_and_they_are_no_more_than_it():
    method = METHODS["kd"]([toy_net()], [toy_net(1)], ToyImages().spec())
    steps = Training(method, ToyImages(), pace(method)).run()
    began = time.perf_counter()
    with stopwatch.running(CPU) as watch:
        next(steps)
    took = time.perf_counter() - began
    assert set(watch.seconds) == set(stopwatch.PARTS)
    assert all(seconds > 0 for seconds in watch.seconds.values())
    assert sum(watch.seconds.values()) <= took
