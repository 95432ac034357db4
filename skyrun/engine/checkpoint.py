"""Save the state of an unfinished run beside its clip, and load it to resume the run.

The state is a safetensors file with JSON in its metadata. It is written atomically, and removed when the clip is
finished. The frames of finished windows are in files beside it.
"""

import json
import shlex
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skyrun.engine.output import clip_path, state_path
from skyrun.engine.window_files import WindowStore
from skyrun.errors import FAILED, SkyrunError
from skyrun.events import BlockDone, Event, FramesReady, Kept, LatentsReady, Notice, WindowDone, now
from skyrun.kernels.files.atomic import replacing
from skyrun.media.pixels import Frames
from skyrun.models.dit.sparse import Learned
from skyrun.models.identity import model_identity
from skyrun.pipelines.samplers import restored
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.planning.problems import parse_request
from skyrun.planning.request import Request

_SHARE = 0.05  # of the run's time that saving may take; a kill loses what was done since the last save
_VERSION = 3
_START_ANEW = "begin anew with `skyrun run`; delete the file if -o is to keep its name"
_NONSENSE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)  # in the description
_ENCODED, _CARRIED, _SAMPLER, _LEARNED = "encoded.", "carried.", "sampler.", "attention."


@dataclass(frozen=True)
class Origin:
    """The run that a state belongs to.

    model: identity of its files. device, dtype, precision, attention: of the plan, as a request would have them.
    """

    request: Request
    model: str
    device: str
    dtype: str
    precision: str
    attention: str


class Keeper:
    """Saves the state as often as is cheap, and always before decoding. Saves nothing if the run has no output."""

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
        """Frames and latents of each window that an earlier run has finished."""
        for window in range(self._state.window):
            assert self._store is not None
            yield self._store.read(window, self._job.windows[window].frames)

    def after(self, event: Event) -> Notice | None:
        """Save the state if it is time to. Returns a notice if that fails: the run itself can go on."""
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
        return Notice(f"{error.message}; if the run ends early, it is lost")

    def _keep(self, event: FramesReady | WindowDone) -> SkyrunError | None:
        """Store frames, or a finished window. If that fails, windows saved earlier remain the recoverable state."""
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
        """Save the state now. Returns the error if that fails."""
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
        """Save what is not saved yet, because the run ends with this error. An interrupted run keeps its seed."""
        if self._store is not None:
            self._store.abandon()
        unsaved = self._state.mark[:3] != self._saved[:3]
        asked_to_stop = not isinstance(error, Exception)
        failure = self.save() if unsaved or asked_to_stop else None
        if failure is not None:
            error.add_note(failure.message)

    def remove(self) -> None:
        """Remove the state and the windows: the clip is finished."""
        if self._path is not None:
            remove_state(self._path)
        if self._store is not None:
            self._store.remove()


def _origin(job: Job) -> Origin:
    plan = job.plan
    return Origin(job.request, model_identity(job.files), plan.device, plan.dtype, plan.precision, plan.asked)


def kept(request: Request) -> Kept | None:
    """Where the state of a request's unfinished clip is, and how to resume it; None if there is no state."""
    path = state_path(request.output) if request.output is not None else None
    if path is None or not path.exists():
        return None
    replace = " --overwrite" if request.overwrite and request.output is not None and request.output.exists() else ""
    return Kept(path, f"skyrun resume {shlex.quote(str(path))}{replace}")


def save_state(path: Path, state: RunState, origin: Origin) -> None:
    """Write the state atomically. Raises OSError if it cannot be written; the earlier state remains then.

    Args:
        path: Where to write it.
        state: The state.
        origin: The run that it belongs to.
    """
    tensors = {f"{_ENCODED}{name}": tensor for name, tensor in state.encoded.items()}
    tensors |= {f"{_CARRIED}{name}": tensor for name, tensor in state.carried.items()}
    learned = vars(state.learned).items()
    tensors |= {f"{_LEARNED}{name}": tensor for name, tensor in learned if tensor is not None}
    if state.latents is not None:
        tensors["latents"] = state.latents
    described: dict[str, Any] = {**vars(origin), "request": origin.request.absolute().as_json(), "window": state.window}
    if state.sampler is not None:
        history, described["sampler"] = state.sampler.state()
        tensors |= {f"{_SAMPLER}{name}": tensor for name, tensor in history.items()}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(described)
    try:
        with replacing(path) as partial:
            save_file(whole, partial, {"version": str(_VERSION), "run": text, "crc32": _checksum(text, whole)})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def load_state(path: Path) -> tuple[RunState, Origin]:
    """Load a state and its origin. Raises SkyrunError if it is damaged or from another version."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is not a dict
        version, text = metadata["version"], metadata["run"]
        if version == str(_VERSION):
            if metadata["crc32"] != _checksum(text, tensors):
                raise ValueError("its checksum does not match its contents")
            described = json.loads(text)
            sampler, window = described.pop("sampler", None), int(described.pop("window"))
            origin = Origin(**described | {"request": parse_request(described["request"])})
            if not all(isinstance(value, str) for name, value in vars(origin).items() if name != "request"):
                raise ValueError("what it was made from is not described in words")
            return _state(tensors, window, sampler, origin.request), origin
    except FileNotFoundError as error:
        clip = clip_path(path)
        is_whole = f": {clip} is finished" if clip.exists() else ""
        raise SkyrunError(f"there is no unfinished run in {path}{is_whole}", "start one with `skyrun run`") from error
    except (SafetensorError, OSError, *_NONSENSE) as error:
        raise SkyrunError(f"{path} is not the state of a run, or is damaged: {error}", _START_ANEW) from error
    message = f"{path} is a state of version {version}, this skyrun reads version {_VERSION}"
    raise SkyrunError(message, f"use the skyrun that wrote it, or {_START_ANEW}")


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(tensors[name].numpy(), checksum)  # type: ignore[arg-type]
    return f"{checksum:08x}"


def _state(tensors: dict[str, Tensor], window: int, described: dict[str, Any] | None, request: Request) -> RunState:
    """Build the state. Raises ValueError if the tensors do not fit the request."""

    def named(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    if window < 0:
        raise ValueError(f"it says that {window} windows are finished")
    state = RunState(named(_ENCODED), window, named(_CARRIED), tensors.get("latents"))
    state.learned = Learned(**named(_LEARNED))
    if described is not None:
        if described["steps"] != request.steps:
            raise ValueError(f"its sampler has {described['steps']} steps, its request {request.steps}")
        history = named(_SAMPLER)
        state.sampler = restored(described, history)
        if not isinstance(request.size, tuple):
            raise ValueError("its request has no size")
        shape = (_latent_frames(request, window), *(side // 8 for side in request.size))
        clips = [*history.values(), *([] if state.latents is None else [state.latents])]
        if state.latents is None or any(tuple(tensor.shape[1:]) != shape for tensor in clips):
            raise ValueError(f"its tensors are not those of a clip of {shape} latents")
        if missing := request.spec.encoded - set(state.encoded):
            raise ValueError(f"its {', '.join(sorted(missing))} is missing")
    return state


def _latent_frames(request: Request, window: int) -> int:
    """Noisy latent frames of a window. All windows of speech are alike; a request does not know how many there are."""
    windows = request.windows()
    return windows[min(window, len(windows) - 1) if request.spec.audio else window].latents


def remove_state(path: Path) -> None:
    """Remove the state of a finished clip. Raises SkyrunError if that fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SkyrunError(f"{path} is no longer needed, but cannot be removed: {error}", "remove it", FAILED) from error
