"""Estimate the remaining time of a run from its plan and from measured steps."""

from skyrun.events import Event, Progress, Replanned, StageStarted, TimeLeft, now
from skyrun.presets import Plan
from skyrun.presets.timing import corrected


class Forecast:
    """Estimates the time left after each measured step of a run.

    The first step of a window is not measured, because it compiles kernels and reads from a cold disk.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._times: list[float] = []
        self._window, self._windows, self._steps = 1, 1, 0
        self._start: float | None = None  # of the current step, if it is measured

    def after(self, event: Event) -> TimeLeft | None:
        """The time left after an event, if the event ends a measured step."""
        if isinstance(event, Replanned):
            self._plan, self._times, self._start = event.plan, [], None
        elif isinstance(event, StageStarted) and event.stage == "denoise":
            self._steps, self._start = event.total, None
            self._window, self._windows = event.part or (1, 1)
        elif isinstance(event, Progress) and event.stage == "denoise":
            begun, self._start = self._start, now()
            if begun is not None:
                self._times.append(self._start - begun)
                return self._left(self._steps - event.done)
        return None

    def _left(self, steps: float) -> TimeLeft:
        """steps: how many are left in this window. After them, the window only has to be decoded."""
        seconds, later = sum(self._times) / len(self._times), self._windows - self._window
        ahead = (later * self._steps + steps) * seconds
        for stage in corrected(self._plan, seconds).stages:
            windows = {"images": later, "decode": later + 1}.get(stage.name, 0)
            ahead += stage.seconds * windows / self._windows
        return TimeLeft(ahead, seconds, self._plan.step_seconds)
