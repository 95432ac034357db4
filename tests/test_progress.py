"""What a person sees of a run."""

import pytest

from skyrun.cli import progress
from skyrun.cli.progress import Display
from skyrun.engine import run as eta
from skyrun.engine.run import Forecast
from skyrun.events import BlockDone, Progress, Replanned, StageEnded, StageStarted, TimeLeft, as_json, listen
from skyrun.presets.autoencoder import Autoencoder
from skyrun.presets.plan import Plan, StagePlan
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


def test_the_first_step_shows_its_blocks(clock):
    notes = Notes()
    display = Display(notes)
    display.show(StageStarted("denoise", 8, "steps"))
    clock[0] += 10
    display.show(BlockDone(9, 40, 0, 0, 0, 0))
    assert notes.said[-1] == "3% 0 of 8 steps, block 10 of 40, 5 min 10 s left"


PLAN = Plan(
    *("cuda", "a card", "exact", "exact", "bfloat16"),
    *(Autoencoder("float32", None, None, 0), Autoencoder("bfloat16", None, None, 0), 3, 0, None, False),
    stages=tuple(StagePlan(name, 0, 0, seconds) for name, seconds in zip(
        ("text", "images", "denoise", "decode"), (5.0, 8.0, 80.0, 20.0), strict=True
    )),
    limit_bytes=1,
    step_seconds=10.0,
)  # fmt: skip


def steps(forecast, clock, times, part=None, before=0, total=8):
    """What is said after each of these steps of a window."""
    said = [forecast.after(StageStarted("denoise", total, "steps", before, part))]
    for number, seconds in enumerate(times, before + 1):
        clock[0] += seconds
        said.append(forecast.after(Progress("denoise", number)))
    return said


@pytest.fixture
def ticks(monkeypatch):
    time = [100.0]
    monkeypatch.setattr(eta, "now", lambda: time[0])
    return time


def test_the_second_step_corrects_the_time_left(ticks):
    """The first holds compilation and a cold disk."""
    start, first, second, third = steps(Forecast(PLAN), ticks, (300.0, 20.0, 30.0))
    assert start is first is None
    assert second == TimeLeft(6 * 20.0 + 20.0, 20.0, 10.0)
    assert third == TimeLeft(5 * 25.0 + 20.0, 25.0, 10.0)


def test_the_time_left_of_windows(ticks):
    """Images and decoding of later windows are to come; a plan has them for all windows."""
    forecast = Forecast(PLAN)
    assert steps(forecast, ticks, (10.0, 10.0), (2, 4), before=4)[-1].seconds == (2 * 8 + 2) * 10 + 2 * 2.0 + 3 * 5.0
    assert steps(forecast, ticks, (90.0, 10.0), (4, 4), before=0)[-1].seconds == 6 * 10 + 5.0


def test_a_new_plan_measures_anew(ticks):
    forecast = Forecast(PLAN)
    steps(forecast, ticks, (10.0, 10.0))
    forecast.after(Replanned("less memory", PLAN))
    assert steps(forecast, ticks, (500.0, 40.0), before=2)[-1].step_seconds == 40.0


def test_names_of_events_are_in_one_case():
    assert as_json(TimeLeft(1.0, 2.0, 3.0))["event"] == "time_left"
    assert as_json(Progress("x", 1)) == {"event": "progress", "stage": "x", "done": 1}


def test_a_listener_that_fails_tells_the_generator():
    heard = []

    def events():
        try:
            yield Progress("x", 1)
        except ValueError as error:
            heard.append(str(error))
            raise

    def on(event):
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        listen(events(), on)
    assert heard == ["no room"]
