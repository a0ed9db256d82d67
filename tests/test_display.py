"""What a training looks like: on a terminal, in a file, and not at all."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from potstill import display
from potstill.display import Live, Plain, Speed, duration, epoch_line, watcher
from potstill.engine import Moment


def moment(step: int = 5, done: bool = False, **terms: float) -> Moment:
    terms = terms or {"ce": 1.5, "kd": 0.25}
    return Moment(
        phase="distill",
        epoch=2 if done else 1,
        epochs=3,
        step=step,
        steps=12,
        images=64,
        lr={"student": 0.1},
        epoch_done=done,
        terms={name: torch.tensor(value) for name, value in terms.items()},
    )


def record(**changes: Any) -> dict[str, Any]:
    return {
        "phase": "distill",
        "epoch": 2,
        "terms": {"ce": 1.23456, "kd": 0.5},
        "scores": {"student": {"top1": 71.234, "top5": 91.0, "loss": 1.0}},
        "split": "test",
        "time": {"seconds": 2.0, "images": 50_000},
        **changes,
    }


def consoles(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=200, color_system=None), text


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.6, "1:00"),
        (125, "2:05"),
        (3599.4, "59:59"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (360_000, "100:00:00"),
    ],
)
def test_durations_by_hand(seconds: float, expected: str):
    assert duration(seconds) == expected


def test_an_epoch_in_one_line():
    """50,000 images in 2 seconds are 25,000 a second."""
    assert epoch_line(record()) == (
        "distill epoch 2 · ce 1.2346 · kd 0.5000 · student 71.23 % test · 25,000 images/s"
    )


SEVERAL = {"student0.ce": 1.2, "student0.kd": 0.5, "student1.ce": 2.0, "features.student0": 0.25}
PAIR = {"student0": {"top1": 71.234}, "student1": {"top1": 60.0}, "ensemble": {"top1": 73.0}}


def test_an_epoch_of_several_networks():
    """Accuracies first; each update's terms in a second line."""
    first, second = epoch_line(record(terms=SEVERAL, scores=PAIR)).splitlines()
    assert first == (
        "distill epoch 2 · student0 71.23 % test · student1 60.00 % test · ensemble 73.00 % test · "
        "25,000 images/s"
    )
    assert second == (
        "  student0: ce 1.2000, kd 0.5000 · student1: ce 2.0000 · features: student0 0.2500"
    )


def test_an_epoch_without_scores_or_time():
    """Not evaluated, and resumed at its very end."""
    line = epoch_line(record(scores={}, time={"seconds": 0.0, "images": 0}))
    assert line == "distill epoch 2 · ce 1.2346 · kd 0.5000"


def test_the_speed_before_two_steps_is_unknown():
    speed = Speed()
    speed.note(1, 64)
    assert speed.read(100) == (0.0, 0.0)


def test_the_speed_is_that_of_the_steps_in_the_window():
    """Steps 1 to 3 at seconds 0, 1, 2 with 10 images each: 10 images a second, a second a step."""
    speed = Speed()
    for second in range(3):
        speed.note(second + 1, 10)
        _, step, images = speed.history[-1]
        speed.history[-1] = (float(second), step, images)
    assert speed.read(7) == (10.0, 7.0)


# --- plain lines --------------------------------------------------------------------------------


def test_plain_prints_epochs_as_lines_without_control_characters():
    console, text = consoles(terminal=False)
    with watcher(console) as shown:
        assert isinstance(shown, Plain)
        shown.say("run [red]7[/red] in /tmp/x")
        for step in range(1, 5):
            shown.step(step, 12, moment(step, done=step == 4))
        shown.epoch(record())
    assert text.getvalue() == "run [red]7[/red] in /tmp/x\n" + epoch_line(record()) + "\n"
    assert all(c == "\n" or c.isprintable() for c in text.getvalue())


def test_plain_does_not_wrap_long_lines():
    text = io.StringIO()
    with watcher(Console(file=text, width=20)) as shown:
        shown.epoch(record())
    assert text.getvalue() == epoch_line(record()) + "\n"


def test_plain_says_where_it_stands_within_a_long_epoch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(display, "LINE_SECONDS", -1.0)
    console, text = consoles(terminal=False)
    with watcher(console, prefix="kd · ") as shown:
        shown.step(5, 36, moment())
    (line,) = text.getvalue().splitlines()
    assert line.startswith("kd ·   distill epoch 2/3 · step 5/36 · ")
    assert line.endswith(" left · ce 1.500 · kd 0.250")


# --- the live line ------------------------------------------------------------------------------


def test_live_shows_step_speed_and_terms(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(display, "REFRESH_SECONDS", -1.0)
    console, text = consoles(terminal=True)
    with watcher(console, prefix="kd · ") as shown:
        assert isinstance(shown, Live)
        shown.step(5, 36, moment())
        assert "kd · distill epoch 2/3 · step 5/36 · 0 images/s" in text.getvalue()
        assert "left · ce 1.500 · kd 0.250" in text.getvalue()
        shown.step(6, 36, moment(6, done=True))
        assert "distill epoch 2/3 · step 6/36" in text.getvalue()
        shown.epoch(record())
    assert f"kd · {epoch_line(record())}" in text.getvalue()


@pytest.mark.parametrize("width", [60, 200])
def test_live_shows_the_loss_of_every_update_and_the_last_accuracies(
    width: int, monkeypatch: pytest.MonkeyPatch
):
    """1.2 + 0.5 = 1.7. Nothing is cut off on a narrow terminal; an epoch that is not evaluated
    leaves the accuracies before.
    """
    monkeypatch.setattr(display, "REFRESH_SECONDS", -1.0)
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, color_system=None)
    with watcher(console) as shown:
        shown.step(5, 36, moment(**SEVERAL))
        assert "%" not in text.getvalue().partition("step")[2]
        shown.epoch(record(terms=SEVERAL, scores=PAIR))
        shown.epoch(record(terms=SEVERAL, scores={}))
        text.truncate(0)
        shown.step(6, 36, moment(6, **SEVERAL))
    seen = " ".join(text.getvalue().split())
    for part in (
        "loss student0 1.700, student1 2.000, features 0.250",
        "student0 71.23 % test",
        "student1 60.00 % test",
        "ensemble 73.00 % test",
    ):
        assert part in seen, seen


def test_live_shows_names_with_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(display, "REFRESH_SECONDS", -1.0)
    console, text = consoles(terminal=True)
    with watcher(console, prefix="[seed 1/3] ") as shown:
        shown.step(5, 36, moment())
        shown.say("done")
    assert "[seed 1/3] distill epoch" in text.getvalue()
    assert "[seed 1/3] done" in text.getvalue()


def test_live_gives_the_terminal_back_on_an_error():
    console, text = consoles(terminal=True)
    with pytest.raises(KeyboardInterrupt), watcher(console):
        raise KeyboardInterrupt
    assert text.getvalue().count("\x1b[?25h") == 1  # the cursor is shown again


# --- brief and quiet ----------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_prints_nothing(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(display, "LINE_SECONDS", -1.0)
    console, text = consoles(terminal)
    with watcher(console, quiet=True) as shown:
        shown.say("line")
        shown.step(5, 36, moment())
        shown.epoch(record())
    assert text.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_brief_leaves_lines_out_but_not_the_bar(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(display, "REFRESH_SECONDS", -1.0)
    console, text = consoles(terminal=True)
    with watcher(console, brief=True) as shown:
        shown.step(5, 36, moment())
        shown.epoch(record())
    assert "step 5/36" in text.getvalue()
    assert epoch_line(record()) not in text.getvalue()
    plain, written = consoles(terminal=False)
    with watcher(plain, brief=True) as shown:
        shown.epoch(record())
    assert written.getvalue() == ""
