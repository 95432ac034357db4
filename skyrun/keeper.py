"""Keeps the state of a run on disk while there is no clip yet."""

from skyrun.events import Event, LatentsReady, Notice, Progress, StageEnded, now
from skyrun.job import Job
from skyrun.model_files import fingerprints
from skyrun.run_state import RunState, remove_state, save_state, state_path

_SECONDS = 20.0  # between two saves: what a kill may cost


class Keeper:
    """Saves after stages and steps, not more often than is worth it, and always before decoding. Nowhere without -o."""

    def __init__(self, job: Job, state: RunState) -> None:
        self._request, self._files, self._state = job.request, job.files, state
        self._path = state_path(job.request.output) if job.request.output else None
        self._last = now()
        self._failed = False

    def after(self, event: Event) -> Notice | None:
        """Save if this event makes it worth it. A notice if that fails: the run itself can go on."""
        finished = isinstance(event, LatentsReady)
        progress = isinstance(event, (StageEnded, Progress)) and event.stage != "decode"
        if self._path is None or not (finished or progress and now() - self._last >= _SECONDS):
            return None
        error = self.save()
        if error is None or self._failed:
            return None
        self._failed = True
        return Notice(f"what is finished cannot be kept in {self._path}: {error}; if the run ends early it is lost")

    def save(self) -> OSError | None:
        """Save now, if there is anything. Returns why it failed."""
        if self._path is None or not self._state.is_worth_keeping:
            return None
        try:
            self._state.model = self._state.model or fingerprints(self._files)
            save_state(self._path, self._state, self._request)
        except OSError as error:
            return error
        self._last = now()
        return None

    def remove(self) -> None:
        """The clip is there."""
        if self._path is not None:
            remove_state(self._path)
