"""Go on with a run that ended early."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.models.identity import model_identity
from skyrun.pipelines.state import Origin, RunState, clip_path, load_state, state_path
from skyrun.planning.job import Job, prepare
from skyrun.planning.request import Request
from skyrun.streaming.device import choose_device

# Where things are and what a run may use do not change what it makes.
_NOT_THE_CLIP = ("output", "save_latents", "resolution", "device", "max_vram", "max_ram")


def resume(path: Path, **limits: Any) -> tuple[Job, RunState]:
    """The job whose state is in the file, or beside the clip, of that name, and what is finished of it.

    limits: device, max_vram and max_ram, where they are to be others. The clip will be beside the file, wherever that
    is now. SkyrunError if the state is damaged or the model is another by now.
    """
    path = state_path(path)
    state, origin = load_state(path)
    changes = {name: value for name, value in limits.items() if value is not None}
    clip = clip_path(path).absolute()
    if origin.request.output is not None:  # such as C.MP4
        clip = clip.with_suffix(origin.request.output.suffix)
    request = replace(origin.request, output=clip, **changes)
    job = _prepared(request, origin)
    if (problem := _other_model(job, origin, path)) is not None:
        raise problem
    return job, state


def continue_or_start(request: Request) -> tuple[Job, RunState | None]:
    """The job of a request, and what an earlier run of it has finished.

    SkyrunError if the state of another clip is in its place. One without a finished step is no loss and gives way.
    """
    path = state_path(request.output) if request.output is not None else None
    if path is None or not path.exists():
        return prepare(request), None
    state, origin = load_state(path)
    if request.seed is None:
        request = replace(request, seed=origin.request.seed)
    job = _prepared(request, origin)
    before, asked = _clip(origin.request), _clip(job.request)
    different = [name for name in before | asked if before.get(name) != asked.get(name)]
    problem = _other_clip(origin, state, path, different) if different else _other_model(job, origin, path)
    if problem is None:
        return job, state
    if state.steps or state.window:
        raise problem
    return prepare(request), None


def _prepared(request: Request, origin: Origin) -> Job:
    """The job of the request; on the same kind of device with the numbers of before, whatever is chosen there now."""
    request = replace(request, quant=request.quant or origin.request.quant)
    if choose_device(request.device).type != origin.device:
        return prepare(request)
    dtype, precision = request.dtype or origin.dtype, request.precision or origin.precision
    job = prepare(replace(request, dtype=dtype, precision=precision))
    return replace(job, request=replace(job.request, dtype=request.dtype, precision=request.precision))


def _clip(request: Request) -> dict[str, Any]:
    values = request.absolute().as_json()
    return {name: value for name, value in values.items() if name not in _NOT_THE_CLIP}


def _other_clip(origin: Origin, state: RunState, path: Path, different: list[str]) -> SkyrunError:
    before = origin.request
    windows = f"{state.window} windows and " if state.window else ""
    done = f"{windows}{state.steps} of {before.steps} steps"
    return SkyrunError(
        f"{path} holds {done} of a clip that is not finished, "
        f"with another {', '.join(different)}: {before.prompt[:60]!r}, seed {before.seed}",
        f"finish it with `skyrun resume {path}`, or choose another -o, or delete that file",
    )


def _other_model(job: Job, origin: Origin, path: Path) -> SkyrunError | None:
    """What to say if the model is not the one of before."""
    before, there = origin.model.split(), model_identity(job.files).split()
    parts = job.files.parts.items()
    changed = [f"{name} {file}" for (name, file), a, b in zip(parts, before, there, strict=True) if a != b]
    if not changed:
        return None
    return SkyrunError(
        f"the model is not the one that {path} was made with: {', '.join(changed)} changed since",
        "put the file back, or begin anew: choose another -o, or delete the state",
    )
