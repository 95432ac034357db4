"""Go on with a run that ended early."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.job import Job, prepare
from skyrun.model_files import fingerprints
from skyrun.request import Request
from skyrun.run_state import RunState, load_state, state_path

_WHERE = ("device", "max_vram", "max_ram")  # what a run may use does not change what it makes


def resume(path: Path, **limits: Any) -> tuple[Job, RunState]:
    """The job whose state is in the file, or beside the clip, of that name, and what is finished of it.

    limits: device, max_vram and max_ram, where they are to be others. SkyrunError if the state is damaged or the model
    is another by now.
    """
    path = state_path(path)
    state, request = load_state(path)
    job = prepare(replace(request, **{name: value for name, value in limits.items() if value is not None}))
    if fingerprints(job.files) != state.model:
        raise SkyrunError(
            f"the model in {job.files.transformer.path.parent} is not the one that {path} was made with",
            "put the model back, or delete the file and run again",
        )
    return job, state


def continue_or_start(request: Request) -> tuple[Job, RunState | None]:
    """The job of a request, and the state of it that a run left behind. SkyrunError if one of another run is there."""
    path = state_path(request.output) if request.output is not None else None
    if path is None or not path.exists():
        return prepare(request), None
    state, before = load_state(path)
    if request.seed is None:
        request = replace(request, seed=before.seed)
    job = prepare(request)
    if _identity(job.request) != _identity(before) or fingerprints(job.files) != state.model:
        raise SkyrunError(
            f"{path} holds another run that is not finished: {before.prompt[:60]!r}, seed {before.seed}",
            f"finish it with `skyrun resume {path}`, delete that file, or choose another -o",
        )
    return job, state


def _identity(request: Request) -> dict[str, Any]:
    """What a run makes and how, wherever it is started."""
    values = request.absolute().as_json()
    return {name: value for name, value in values.items() if name not in _WHERE}
