"""Keeps the state of a run on disk while there is no clip yet."""

from skyrun.errors import FAILED, SkyrunError
from skyrun.events import BlockDone, Event, LatentsReady, Notice, now
from skyrun.job import Job
from skyrun.model_files import model_identity
from skyrun.run_state import Origin, RunState, remove_state, save_state, state_path

_SHARE = 0.05  # of the time that goes into saving, at most; a kill costs what was done since


class Keeper:
    """Saves what is finished as often as is cheap, and always before decoding. Nowhere without an output."""

    def __init__(self, job: Job, state: RunState) -> None:
        self._state, self._job = state, job
        self._path = state_path(job.request.output) if job.request.output else None
        self._origin: Origin | None = None
        self._saved = state.mark
        self._time, self._cost = now(), 0.0
        self._failed = False

    def after(self, event: Event) -> Notice | None:
        """Save if it is time to. A notice if that fails: the run itself can go on."""
        if isinstance(event, BlockDone) or self._state.groups:
            return None
        cheap = now() - self._time >= self._cost / _SHARE
        if self._state.mark == self._saved or not (cheap or isinstance(event, LatentsReady)):
            return None
        error = self.save()
        if error is None or self._failed:
            return None
        self._failed = True
        return Notice(f"{error.message}; if the run ends early it is lost")

    def save(self) -> SkyrunError | None:
        """Save now. Returns why it failed."""
        if self._path is None:
            return None
        start = now()
        try:
            self._origin = self._origin or _origin(self._job)
            save_state(self._path, self._state, self._origin)
        except (OSError, SkyrunError) as error:
            hint = "check free space and permissions"
            return SkyrunError(f"what is finished cannot be kept in {self._path}: {error}", hint, FAILED)
        finally:
            self._time = now()
            self._cost = self._time - start
        self._saved = self._state.mark
        return None

    def save_last(self, error: BaseException) -> None:
        """The run ends with this error: save what is not saved yet. An interrupted run goes on with the same seed."""
        unsaved = self._state.mark[:2] != self._saved[:2]
        asked_to_stop = not isinstance(error, Exception)
        failure = self.save() if unsaved or asked_to_stop else None
        if failure is not None:
            error.add_note(failure.message)

    def remove(self) -> None:
        """The clip is there."""
        if self._path is not None:
            remove_state(self._path)


def _origin(job: Job) -> Origin:
    plan = job.plan
    return Origin(job.request, model_identity(job.files), plan.device, plan.dtype, plan.precision)
