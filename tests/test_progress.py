"""What a person sees of a run."""

import pytest

from skyrun.cli import progress
from skyrun.cli.progress import Display
from skyrun.events import Progress, StageEnded, StageStarted
from skyrun.units import duration


class Notes:
    """A bar that writes down what it is told."""

    def __init__(self):
        self.said = []

    def start(self, name):
        self.said.append(name)

    def update(self, fraction, text):
        self.said.append(f"{fraction:.0%} {text}")

    def finish(self, text):
        self.said.append(text)

    def note(self, text):
        self.said.append(text)


@pytest.fixture
def clock(monkeypatch):
    time = [100.0]
    monkeypatch.setattr(progress, "now", lambda: time[0])
    return time


def test_windows_say_which_they_are_and_how_long_all_will_take(clock):
    notes = Notes()
    display = Display(notes)
    for window in (2, 3, 4):
        for stage in ("images", "denoise", "decode"):
            display.show(StageStarted(stage, 4, "steps", part=(window, 6)))
            clock[0] += 20
            display.show(StageEnded(stage, 20.0, 0))
    said = [line for line in notes.said if "window" in line]
    assert said == [
        "window 2 of 6",
        "window 3 of 6, about 4 min 0 s left in all",
        "window 4 of 6, about 3 min 0 s left in all",
    ]


def test_time_left_is_that_of_the_work_of_this_run(clock):
    notes = Notes()
    display = Display(notes)
    display.show(StageStarted("denoise", 8, "steps", before=4))
    clock[0] += 30
    display.show(Progress("denoise", 6))
    assert notes.said[-1] == "75% 6 of 8 steps, 30 s left"


def test_durations():
    assert [duration(s) for s in (0.26, 59, 61, 3700)] == ["0.3 s", "59 s", "1 min 1 s", "1 h 1 min"]
