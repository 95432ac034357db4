"""`skyrun run` and `skyrun resume`: clips one after the other, shown while they are made."""

import shlex
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from skyrun.cli.batch import free_name, is_made, requests_of
from skyrun.cli.commands.pull import shown
from skyrun.cli.console import emit, say
from skyrun.cli.progress import progress
from skyrun.cli.report import plan_text, result_text, state_text
from skyrun.cli.signals import raise_if_asked
from skyrun.engine.eta import Forecast
from skyrun.engine.preview import Previewer
from skyrun.engine.resume import continue_or_start, resume
from skyrun.engine.run import Result, run_job
from skyrun.errors import SkyrunError
from skyrun.events import Event, Preview
from skyrun.events import as_json as event_json
from skyrun.hub.manifest import note_use
from skyrun.hub.store import wanted_name, whole_folder
from skyrun.media.contact_sheet import contact_sheet, places
from skyrun.media.image import suffix_problems, write_image
from skyrun.media.video_reader import frames_at
from skyrun.pipelines.state import RunState, state_path
from skyrun.planning.job import Job
from skyrun.planning.problems import place_problems
from skyrun.planning.request import Request
from skyrun.presets.named import preset_limits

if TYPE_CHECKING:
    from skyrun.hub.pull import Pull


def run_clips(arguments: Namespace) -> int:
    """Make the clips of `skyrun run`, or say with --dry-run how they would be made."""
    _force_preset(arguments)
    requests = requests_of(arguments)
    for index, request in enumerate(requests):
        if len(requests) > 1:
            say(f"clip {index + 1} of {len(requests)}: {request.output}")
            if is_made(request):
                say("it is there already")
                continue
        model = arguments.model or (str(request.model) if request.model else None)
        request, missing = _located(request, model, arguments.dry_run)
        if missing is not None:
            say("without --dry-run this is fetched first, then the clip is made")
            if arguments.json:
                emit({"event": "pull"} | missing.as_json())
            return 0
        _run_clip(request, arguments)
    return 0


def _located(request: Request, model: str | None, dry_run: bool) -> tuple[Request, "Pull | None"]:
    """The request with the place of its model: a path, or a name, by default that of the task.

    A model that is not there is fetched; of a dry run the second value is then what would be.
    """
    name = wanted_name(model, request.task, request.quant)
    if name is None:
        return replace(request, model=Path(model or "")), None
    if (folder := whole_folder(name)) is not None:
        note_use(folder)
        return replace(request, model=folder, quant=None), None
    from skyrun.hub.pull import pull_for

    pull = shown(pull_for(request, name, named=model is not None, dry_run=dry_run))
    return replace(request, model=pull.folder, quant=None), pull if dry_run else None


def _run_clip(request: Request, arguments: Namespace) -> None:
    job, state = continue_or_start(request)
    if job.request.output is None:
        output = free_name(f"{request.task}-{job.request.seed}", ".mp4")
        job = replace(job, request=replace(job.request, output=output))
    assert job.request.output is not None
    sheet = job.request.output.with_suffix(".png") if arguments.sheet else None
    _check_pictures(job.request, [place for place in (arguments.preview, sheet) if place is not None])
    _announce(job, state, arguments.json)
    if arguments.dry_run:
        return
    _made(job, state, arguments.json, arguments.preview)
    if sheet is not None:
        write_image(sheet, _sheet_of(job.request.output, job.frames))
        say(f"{sheet}: the clip at a glance")


def _check_pictures(request: Request, places: list[Path]) -> None:
    """Better before the run than after its first step, or when a picture of the clip's is gone."""
    problems = [problem for place in places for problem in (*suffix_problems(place), *place_problems(place))]
    inputs = {image.resolve() for image in request.images}
    problems += [
        f"{place} is what the clip is made from, it would be lost" for place in places if place.resolve() in inputs
    ]
    if problems:
        raise SkyrunError.listing("pictures of the clip cannot be drawn", problems, "choose other names")


def resume_clip(arguments: Namespace) -> int:
    """Go on with a clip whose run ended early."""
    limits = {"device": arguments.device, "max_vram": arguments.max_vram, "max_ram": arguments.max_ram}
    job, state = resume(arguments.file, **limits)
    _announce(job, state, arguments.json)
    _made(job, state, arguments.json)
    return 0


def _force_preset(arguments: Namespace) -> None:
    """Limits of the preset that is asked for, where no others are given."""
    if arguments.preset == "cpu":
        arguments.device = arguments.device or "cpu"
    elif arguments.preset:
        for name, limit in preset_limits(arguments.preset).items():
            if getattr(arguments, name) is None:
                setattr(arguments, name, limit)


def _announce(job: Job, state: RunState | None, as_json: bool) -> None:
    """The plan, and what of the clip an earlier run has finished."""
    say(plan_text(job))
    if state is not None:
        say(state_text(job, state))
    if as_json:
        emit({"event": "plan"} | job.as_json())


def _made(job: Job, state: RunState | None, as_json: bool, preview: Path | None = None) -> Result:
    """Make the clip, or what is missing of it, and say where it is."""
    result = follow(job, as_json, state, preview)
    say(result_text(result))
    if as_json:
        stages: dict[str, float] = {}
        for stage in result.stages:
            stages[stage.stage] = round(stages.get(stage.stage, 0.0) + stage.seconds, 3)
        emit({"event": "result", "output": str(result.output), "seed": result.request.seed, "seconds": stages})
    return result


def follow(job: Job, as_json: bool, state: RunState | None = None, preview: Path | None = None) -> Result:
    """Run a job, from its state on, and show its events. preview: where to draw what is known of the clip."""
    events, forecast = run_job(job, keep_frames=False, state=state), Forecast(job.plan)
    draw = _drawing(job, preview)
    try:
        with progress() as display:
            while True:
                try:
                    event = next(events)
                except StopIteration as stop:
                    result: Result = stop.value
                    return result
                display.show(event)
                if (notice := forecast.after(event)) is not None:
                    display.show(notice)
                draw(event)
                if as_json:
                    emit(event_json(event))
                raise_if_asked()
    except BaseException as error:
        with suppress(BaseException):  # this one again, or what became of it
            events.throw(error)  # the run saves its state, unless the error came from there: then it has
        _say_what_is_kept(job, error)
        raise


def _drawing(job: Job, path: Path | None) -> Callable[[Event], None]:
    if path is None:
        return lambda event: None
    return partial(_draw, Previewer(job.files.vae, path))


def _draw(previewer: Previewer, event: Event) -> None:
    if isinstance(event, Preview):
        previewer.write(event.latents)


def _say_what_is_kept(job: Job, error: BaseException) -> None:
    for note in getattr(error, "__notes__", ()):
        say(note)
    if job.request.output is not None and (kept := state_path(job.request.output)).exists():
        say(f"what is finished is kept; go on with: skyrun resume {shlex.quote(str(kept))}")


def _sheet_of(clip: Path, count: int) -> Image:
    return contact_sheet(frames_at(clip, places(count)))
