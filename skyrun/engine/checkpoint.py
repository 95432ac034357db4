"""Keeps the state of a run on disk while there is no clip yet, and the windows of a long clip that are finished."""

from collections.abc import Iterator

from torch import Tensor

from skyrun.engine.window_files import WindowStore
from skyrun.errors import FAILED, SkyrunError
from skyrun.events import BlockDone, Event, FramesReady, LatentsReady, Notice, WindowDone, now
from skyrun.media.pixels import Frames
from skyrun.models.identity import model_identity
from skyrun.pipelines.state import Origin, RunState, remove_state, save_state, state_path
from skyrun.planning.job import Job

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
        self._latents: Tensor | None = None
        self._store: WindowStore | None = None
        if self._path is not None and len(job.windows) > 1:
            self._store = WindowStore(self._path, job.height, job.width)
            self._store.begin(state.window)

    def finished(self) -> Iterator[tuple[Iterator[Frames], Tensor]]:
        """Frames and latents of every window that an earlier run has finished."""
        for window in range(self._state.window):
            assert self._store is not None
            yield self._store.read(window, self._job.windows[window].frames)

    def after(self, event: Event) -> Notice | None:
        """Save if it is time to. A notice if that fails: the run itself can go on."""
        if isinstance(event, (FramesReady, WindowDone)):
            return self._notice(self._keep(event))
        if isinstance(event, LatentsReady):
            self._latents = event.latents
        if isinstance(event, BlockDone) or self._state.groups:
            return None
        cheap = now() - self._time >= self._cost / _SHARE
        if self._state.mark == self._saved or not (cheap or isinstance(event, LatentsReady)):
            return None
        return self._notice(self.save())

    def _notice(self, error: SkyrunError | None) -> Notice | None:
        if error is None or self._failed:
            return None
        self._failed = True
        return Notice(f"{error.message}; if the run ends early it is lost")

    def _keep(self, event: FramesReady | WindowDone) -> SkyrunError | None:
        """Keep frames, or a finished window. Where that fails, the windows that were kept before stay what there is."""
        if self._store is None or self._path is None:
            return None
        try:
            if isinstance(event, FramesReady):
                self._store.add(event.frames)
                return None
            assert self._latents is not None
            self._store.finish(self._latents)
            self._store.begin(event.index + 1)
        except OSError as error:
            self._store.abandon()
            self._store = self._path = None
            return SkyrunError(f"a finished part of the clip cannot be kept: {error}", "check free space", FAILED)
        return self.save()

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
        if self._store is not None:
            self._store.abandon()
        unsaved = self._state.mark[:3] != self._saved[:3]
        asked_to_stop = not isinstance(error, Exception)
        failure = self.save() if unsaved or asked_to_stop else None
        if failure is not None:
            error.add_note(failure.message)

    def remove(self) -> None:
        """The clip is there."""
        if self._path is not None:
            remove_state(self._path)
        if self._store is not None:
            self._store.remove()


def _origin(job: Job) -> Origin:
    plan = job.plan
    return Origin(job.request, model_identity(job.files), plan.device, plan.dtype, plan.precision)
