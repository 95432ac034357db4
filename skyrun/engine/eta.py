"""How long a run takes, corrected after its first step."""

from skyrun.events import Event, Notice, Progress, Replanned, StageStarted, now
from skyrun.presets import Plan
from skyrun.presets.timing import corrected
from skyrun.units import duration


class Forecast:
    """Watches the events of a run and speaks once: when a step has been measured."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._start: float | None = None
        self._spoken = False

    def after(self, event: Event) -> Notice | None:
        """What to say after an event."""
        if isinstance(event, Replanned):
            self.plan, self._start = event.plan, None
        elif isinstance(event, StageStarted) and event.stage == "denoise":
            self._start = now()
        elif isinstance(event, Progress) and event.stage == "denoise" and self._start is not None:
            return self._correct(now() - self._start)
        return None

    def _correct(self, step_seconds: float) -> Notice | None:
        if self._spoken:
            return None
        self._spoken = True
        expected, self.plan = self.plan.step_seconds, corrected(self.plan, step_seconds)
        return Notice(
            f"the first step took {duration(step_seconds)}, {duration(expected)} were expected: "
            f"the clip will take about {duration(self.plan.seconds)} in all"
        )
