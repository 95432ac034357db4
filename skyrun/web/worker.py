"""The process that makes the clip of one job: python -m skyrun.web.worker FOLDER ID

Events go to stdout, as `--json` prints them, text for people to stderr. It works as long as its stdin is open: when
the server closes that, or is gone, it stops as after Ctrl-C, and what is finished is kept.
"""

import _thread
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from skyrun.engine.checkpoint import kept
from skyrun.engine.output import is_made
from skyrun.engine.preview import preview_frames
from skyrun.engine.resume import continue_or_start
from skyrun.engine.run import run_job
from skyrun.errors import FAILED, INTERRUPTED, SkyrunError
from skyrun.events import Event, Notice, Preview, StageEnded, StageStarted, as_json, listen
from skyrun.hub.local import wanted_name, whole_folder
from skyrun.hub.manifest import note_use
from skyrun.media.image import write_animation
from skyrun.planning.job import Job as Prepared
from skyrun.planning.request import Request
from skyrun.tasks.windows import FRAMES_PER_LATENT
from skyrun.units import duration, printable
from skyrun.web.folder import Folder
from skyrun.web.jobs import Job
from skyrun.web.values import request_of

_stop = threading.Event()
Emit = Callable[[dict[str, Any]], None]


def main(root: str, id: str) -> int:
    """Make the clip of a job. Returns the exit code of the command line."""
    emit = _emitter()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have asked the server to ignore it
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_watch, daemon=True).start()
    try:
        return _make(Folder(Path(root)), id, emit)
    except SkyrunError as error:
        return _failed(emit, error)
    except KeyboardInterrupt:
        return _failed(emit, SkyrunError("interrupted", "", INTERRUPTED))
    except OSError as error:
        return _failed(emit, SkyrunError(str(error), "check the path, its permissions and free space", FAILED))
    except Exception as error:
        traceback.print_exc()
        told = f"the run failed with an error that it should not have: {type(error).__name__}: {error}"
        return _failed(emit, SkyrunError(told, "the log of the job has the details", FAILED))


def _emitter() -> Emit:
    """A function that prints a value as a line of JSON. What libraries print goes to the log."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(values: dict[str, Any]) -> None:
        try:
            print(json.dumps(values), file=lines, flush=True)
        except (OSError, ValueError) as error:  # the server is gone
            raise KeyboardInterrupt from error

    return emit


def _watch() -> None:
    """Interrupt the main thread when stdin ends."""
    with suppress(OSError):
        while os.read(0, 1):
            pass
    _stop.set()
    _thread.interrupt_main()


def _failed(emit: Emit, error: SkyrunError) -> int:
    if _stop.is_set():  # libraries may turn the interrupt into an error of their own
        error = SkyrunError("interrupted", "", INTERRUPTED)
    _say(f"error: {error.message}\n{error.hint}".rstrip())
    with suppress(KeyboardInterrupt):
        emit({"event": "error", "message": error.message, "hint": error.hint, "code": error.code})
    return error.code


def _say(text: str) -> None:
    with suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr, flush=True)


def _make(folder: Folder, id: str, emit: Emit) -> int:
    job = Job.read(folder.jobs / f"{id}.json")
    if job is None:
        raise SkyrunError(f"the file of job {id} is damaged or gone", "ask for the clip again")
    place = folder.jobs / id
    with FileLock(place / "lock"):  # of an earlier process that still saves what is finished
        request = replace(request_of(job.values, folder), output=folder.root / job.clip)
        prepared, state = continue_or_start(_located(request, emit))
        emit({"event": "plan"} | prepared.as_json())
        _say("\n".join(prepared.notices))
        seconds: dict[str, float] = {}
        if not is_made(prepared.request):
            seconds = _run(prepared, state, emit, place / "preview.webp")
        emit({"event": "result", "output": job.clip, "seed": prepared.request.seed, "seconds": seconds})
    return 0


def _located(request: Request, emit: Emit) -> Request:
    """The request with the folder of its model, which is fetched if it is not there."""
    name = wanted_name(request.model.as_posix() if request.model else None, request.task, request.quant)
    if name is None:
        return request
    if (folder := whole_folder(name)) is None:
        from skyrun.hub.pull import pull_for  # runs with local files do not need the hub

        fetched = listen(pull_for(request, name, named=request.model is not None), lambda event: _tell(event, emit))
        folder = fetched.folder
    note_use(folder)
    return replace(request, model=folder, quant=None)


def _run(prepared: Prepared, state: Any, emit: Emit, picture: Path) -> dict[str, float]:
    """Make the clip, tell its events, draw the previews. Returns the seconds of each stage."""

    def on(event: Event) -> None:
        if isinstance(event, Preview):
            write_animation(picture, preview_frames(event.latents), FRAMES_PER_LATENT / prepared.fps)
        _tell(event, emit)

    try:
        result = listen(run_job(prepared, False, state), on)
    except BaseException:
        if (what := kept(prepared.request)) is not None:
            with suppress(KeyboardInterrupt):
                emit(as_json(what))
        raise
    seconds: dict[str, float] = {}
    for stage in result.stages:
        seconds[stage.stage] = round(seconds.get(stage.stage, 0.0) + stage.seconds, 3)
    return seconds


def _tell(event: Event, emit: Emit) -> None:
    emit(as_json(event))
    if isinstance(event, StageStarted):
        _say(
            f"{event.stage}: {event.total} {event.unit}"
            + (f", part {event.part[0]} of {event.part[1]}" if event.part else "")
        )
    elif isinstance(event, StageEnded):
        _say(f"{event.stage}: done in {duration(event.seconds)}")
    elif isinstance(event, Notice):
        _say(event.text)
    if _stop.is_set():  # again, because the interrupt may be lost, for example in a finalizer
        raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
