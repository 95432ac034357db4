"""Resume a run that ended early."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyrun.engine.checkpoint import Origin, load_state
from skyrun.engine.output import NOT_THE_CLIP, check_free, check_outputs, clip_path, request_of, state_path
from skyrun.errors import SkyrunError
from skyrun.models.identity import model_identity
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job, prepare
from skyrun.planning.request import Request
from skyrun.streaming.device import choose_device


def resume(path: Path, pictures: Sequence[Path] = (), **changes: Any) -> tuple[Job, RunState]:
    """Load a state, and prepare the job that it belongs to. Returns both.

    The clip will be written beside the state, wherever that is now. Raises SkyrunError if the state is damaged, if the
    model has changed since, or if a file would be lost.

    Args:
        path: The path of the state or of the clip.
        pictures: The previews and sheets that will be drawn.
        changes: New values for device, devices, max_vram, max_ram and overwrite. None keeps a value.
    """
    path = state_path(path)
    state, origin = load_state(path)
    changes = {name: value for name, value in changes.items() if value is not None}
    made = origin.request.output
    output = clip_path(path, made.suffix if made is not None else ".mp4").absolute()
    request = replace(origin.request, output=output, **changes)
    check_outputs(request, pictures)
    job = _prepared(request, origin)
    if (problem := _other_model(job, origin, path)) is not None:
        raise problem
    return job, state


def continue_or_start(request: Request, pictures: Sequence[Path] = ()) -> tuple[Job, RunState | None]:
    """Prepare the job of a request. Returns it with the state of an earlier run of the same request, if there is one.

    Raises SkyrunError if another clip has the same name, finished or not. The state of an unfinished clip without a
    finished step is discarded. pictures: the previews and sheets that will be drawn.
    """
    check_outputs(request, pictures)
    job, state = _continued(request)
    check_free(job.request, pictures)  # again, because the request is complete now
    return job, state


def _continued(request: Request) -> tuple[Job, RunState | None]:
    path = state_path(request.output) if request.output is not None else None
    if path is None or not path.exists():
        return prepare(_with_the_seed_there(request)), None
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


def _with_the_seed_there(request: Request) -> Request:
    """A request that leaves the seed open and may be the one that the clip of its name was made from has that seed."""
    if request.seed is not None or request.overwrite or request.output is None or not request.output.exists():
        return request
    seed = (request_of(request.output) or {}).get("seed")
    return replace(request, seed=seed) if isinstance(seed, int) else request


def _prepared(request: Request, origin: Origin) -> Job:
    """Prepare the request; on the same device type, reuse the saved dtype and precisions."""
    request = replace(request, quant=request.quant or origin.request.quant)
    if choose_device(request.device).type != origin.device:
        return prepare(request)
    names = ("dtype", "precision", "attention")
    job = prepare(replace(request, **{name: getattr(request, name) or getattr(origin, name) for name in names}))
    return replace(job, request=replace(job.request, **{name: getattr(request, name) for name in names}))


def _clip(request: Request) -> dict[str, Any]:
    values = request.absolute().as_json()
    return {name: value for name, value in values.items() if name not in NOT_THE_CLIP}


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
    """The error if the model has changed since the state was saved; None if it has not."""
    before, there = origin.model.split(), model_identity(job.files).split()
    before = before if len(before) == len(there) else [""] * len(there)  # of other parts
    parts = job.files.parts.items()
    changed = [f"{name} {file}" for (name, file), a, b in zip(parts, before, there, strict=True) if a != b]
    if not changed:
        return None
    return SkyrunError(
        f"the model is not the one that {path} was made with: {', '.join(changed)} changed since",
        "put the file back, or begin anew: choose another -o, or delete the state",
    )
