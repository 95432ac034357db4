"""`skyrun run`: make one or more clips and show progress."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from skyrun.cli.batch import free_name, requests_of
from skyrun.cli.commands.plan import blocks_text, weights_text
from skyrun.cli.console import emit, say, show_error
from skyrun.cli.launched import launched
from skyrun.cli.progress import shown
from skyrun.cli.several import SeveralClips
from skyrun.engine.checkpoint import kept
from skyrun.engine.clip import Result
from skyrun.engine.output import check_outputs, is_made
from skyrun.engine.resume import continue_or_start
from skyrun.engine.run import run_job
from skyrun.errors import FAILED, SkyrunError
from skyrun.events import Event, Preview, as_json
from skyrun.hub.adapters import fetch_adapters, found_adapters
from skyrun.hub.local import wanted_name, whole_folder
from skyrun.hub.manifest import note_use
from skyrun.media.contact_sheet import contact_sheet, places
from skyrun.media.image import write_image
from skyrun.media.video_reader import frame_count, frames_at
from skyrun.models.umt5 import TEXT_LENGTH
from skyrun.parallel.group import here
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.planning.request import Request
from skyrun.presets import Plan
from skyrun.presets.advice import precisions
from skyrun.presets.machine.named import preset_limits
from skyrun.units import GIB, duration, size, table


def execute(arguments: Namespace) -> int:
    """Make the clips, or with --dry-run only check and plan them.

    If one clip fails, the others are still made.
    """
    return launched(arguments, _execute)


def _execute(arguments: Namespace) -> int:
    _force_preset(arguments)
    requests = [replace(request, loras=found_adapters(request.loras)) for request in requests_of(arguments)]
    for request in requests:
        check_outputs(request, pictures_of(request.output, arguments))
    first = _located(requests[0], arguments)  # all clips use the same model and adapters
    if first is None:
        return 0
    first = replace(first, loras=shown(fetch_adapters(first.loras, arguments.dry_run), False))
    if len(requests) == 1:
        run_clip(first, arguments)
        return 0
    model, quant, loras = first.model, first.quant, first.loras
    requests = [replace(request, model=model, quant=quant, loras=loras) for request in requests]
    if 1 < first.devices <= len(requests) and not arguments.dry_run:
        try:
            failed = SeveralClips(requests, _prepared, _finish, arguments).make()
        except KeyboardInterrupt:
            say("the same command goes on with what is kept, and makes what is missing")
            raise
    else:
        failed = _one_by_one(requests, arguments)
    if failed:
        names = ", ".join(str(request.output) for request in failed)
        say(f"{len(failed)} of {len(requests)} clips failed: {names}; the same command makes what is missing")
    return FAILED if failed else 0


def _one_by_one(requests: Sequence[Request], arguments: Namespace) -> list[Request]:
    """Make clips, each on all devices. Returns those that failed."""
    failed = []
    for number, request in enumerate(requests, 1):
        say(f"clip {number} of {len(requests)}: {request.output}")
        try:
            run_clip(request, arguments)
        except SkyrunError as error:
            if here().size > 1:  # the processes that have followed cannot tell where this one is
                raise
            show_error(error, arguments.json)
            failed.append(request)
        except OSError as error:
            show_error(SkyrunError(str(error), "check the path, its permissions and free space"), arguments.json)
            failed.append(request)
    return failed


def _prepared(request: Request, arguments: Namespace) -> tuple[Job, RunState | None] | None:
    """The job of a request and the state of an earlier run; None if the clip is there already."""
    job, state = continue_or_start(request)
    if not _is_there(job, arguments):
        return job, state
    return None


def _finish(job: Job, arguments: Namespace) -> None:
    """Draw what belongs to a clip that is made."""
    if arguments.sheet:
        draw_sheet(job)


def _is_there(job: Job, arguments: Namespace) -> bool:
    """Whether the clip was made before and is to be kept. Draws the contact sheet that it may lack, and says so."""
    if not is_made(job.request) or job.request.overwrite:
        return False
    _say_it_is_there(job.request, arguments)
    if arguments.sheet and not arguments.dry_run and not sheet_path(job).exists():
        draw_sheet(job)
    return True


def _force_preset(arguments: Namespace) -> None:
    """Apply the limits of --preset, unless other limits are given."""
    if arguments.preset == "cpu":
        arguments.device = arguments.device or "cpu"
    elif arguments.preset:
        for name, limit in preset_limits(arguments.preset).items():
            if getattr(arguments, name) is None:
                setattr(arguments, name, limit)


def _located(request: Request, arguments: Namespace) -> Request | None:
    """Find or fetch the model, and return the request with its path.

    Returns None if the model is missing and this is a dry run, which fetches nothing.
    """
    model = arguments.model or (str(request.model) if request.model else None)
    name = wanted_name(model, request.task, request.quant)
    if name is None:
        return replace(request, model=Path(model or ""))
    if (folder := whole_folder(name)) is not None:
        note_use(folder)
        return replace(request, model=folder, quant=None)
    from skyrun.hub.pull import pull_for  # runs with local files do not need the hub

    missing = shown(pull_for(request, name, named=model is not None, dry_run=arguments.dry_run), False)
    if not arguments.dry_run:
        return replace(request, model=missing.folder, quant=None)
    say("without --dry-run this is fetched first, then the clip is made")
    if arguments.json:
        emit({"event": "pull"} | missing.as_json())
    return None


def run_clip(request: Request, arguments: Namespace) -> None:
    """Make a clip, go on with it, or say that it is there already.

    Args:
        request: The request, with the path of its model.
        arguments: json, preview, sheet and dry_run are used.
    """
    job, state = continue_or_start(request)  # without the preview, which an earlier clip of the batch may have drawn
    if job.request.output is None:
        output = free_name(f"{request.task}-{job.request.seed}", ".mp4")
        job = replace(job, request=replace(job.request, output=output))
        check_outputs(job.request, pictures_of(output, arguments))
    announce(job, state, arguments.json)
    if not _is_there(job, arguments) and not arguments.dry_run:
        make(job, state, arguments)


def _say_it_is_there(request: Request, arguments: Namespace) -> None:
    say(f"{request.output}: it is there already (--overwrite makes it again)")
    if arguments.json and not arguments.dry_run:
        emit({"event": "result", "output": str(request.output), "seed": request.seed, "seconds": {}})


def pictures_of(output: Path | None, arguments: Namespace) -> list[Path]:
    """The preview and the sheet that will be drawn, if the name of the clip is known."""
    sheet = output.with_suffix(".png") if arguments.sheet and output is not None else None
    return [place for place in (arguments.preview, sheet) if place is not None]


def announce(job: Job, state: RunState | None, as_json_too: bool) -> None:
    """Print the plan, and what an earlier run has finished of the clip.

    Args:
        job: The job to run.
        state: The state of an earlier run, if there is one.
        as_json_too: Whether to print the plan as JSON as well.
    """
    say(plan_text(job))
    if state is not None:
        say(state_text(job, state))
    if as_json_too:
        emit({"event": "plan"} | job.as_json())


def make(job: Job, state: RunState | None, arguments: Namespace) -> Result:
    """Make the clip or resume it, show the progress, and say where the clip is.

    Args:
        job: The job to run.
        state: The state of an earlier run.
        arguments: json, preview and sheet are used.
    """
    drawn: Path | None = arguments.preview

    def draw(event: Event) -> dict[str, Any]:
        if drawn is None or not isinstance(event, Preview) or event.image is None:
            return {}
        write_image(drawn, event.image)
        return {"path": str(drawn)}

    try:
        result = shown(run_job(job, False, state, drawn is not None), arguments.json, draw)
    except BaseException:
        _say_what_is_kept(job, arguments.json)
        raise
    say(result_text(result))
    if arguments.json:
        stages: dict[str, float] = {}
        for stage in result.stages:
            stages[stage.stage] = round(stages.get(stage.stage, 0.0) + stage.seconds, 3)
        skipped = {} if result.skipped is None else {"attention": asdict(result.skipped)}
        values = {"event": "result", "output": str(result.output), "seed": result.request.seed, "seconds": stages}
        emit(values | skipped)
    if arguments.sheet:
        draw_sheet(job)
    return result


def draw_sheet(job: Job) -> None:
    """Draw a contact sheet beside the clip, without the frames of the video that it is joined to."""
    assert job.request.output is not None
    clip, count = job.request.output, frame_count(job.request.output)
    frames = frames_at(clip, (count - job.frames + place for place in places(job.frames)))
    write_image(sheet_path(job), contact_sheet(frames))
    say(f"{sheet_path(job)}: the clip at a glance")


def sheet_path(job: Job) -> Path:
    """The path of a clip's contact sheet."""
    assert job.request.output is not None
    return job.request.output.with_suffix(".png")


def _say_what_is_kept(job: Job, as_json_too: bool) -> None:
    if (what := kept(job.request)) is not None:
        say(f"what is finished is kept; go on with: {what.command}")
        if as_json_too:
            emit(as_json(what))


def plan_text(job: Job) -> str:
    """A description of the job, with memory and time of each stage."""
    plan, request = job.plan, job.request
    length = job.frames / job.fps
    windows = f" in {len(job.windows)} windows" if len(job.windows) > 1 else ""
    head = [
        f"{request.task}: {job.height}x{job.width} (height x width), {job.frames} frames ({length:.1f} s){windows}, "
        f"{request.steps} steps, {job.workload.tokens} tokens, seed {request.seed}",
        f"{job.files.transformer.path.name} on {_devices(plan)}, {_dtypes(plan)} (decoding in {plan.decoding.dtype})",
        blocks_text(plan.resident_blocks, job.workload.layers),
        *([weights_text(plan)] if plan.devices > 1 else []),
        *_passing(plan),
        f"estimated memory, {plan.limit_bytes / GIB:.1f} GiB may be used, and time, {duration(plan.seconds)} in all:",
    ]
    columns = ["VRAM GiB", "RAM GiB"] if plan.device == "cuda" else ["RAM GiB"]
    tokens = job.encoder.token_count(request.prompt)
    if tokens > TEXT_LENGTH:
        head.insert(1, f"the prompt has {tokens} tokens, the model reads {TEXT_LENGTH}: its end is cut off")
    rows = [["  stage", *columns, "time"]]
    for stage in plan.stages:
        sizes = [stage.device_bytes, stage.host_bytes] if plan.device == "cuda" else [stage.host_bytes]
        rows.append([f"  {stage.name}", *(f"{nbytes / GIB:.2f}" for nbytes in sizes), duration(stage.seconds)])
    return "\n".join([*head, table(rows), *(f"note: {notice}" for notice in job.notices)])


def _devices(plan: Plan) -> str:
    return plan.device_name if plan.devices == 1 else f"{plan.devices} devices, each {plan.device_name}"


def _passing(plan: Plan) -> list[str]:
    if plan.token_rows is None:
        return []
    waiting = ", the others wait on the host" if plan.parked_tokens else ""
    return [f"{plan.token_rows} tokens pass through a block at a time{waiting}"]


def _dtypes(plan: Plan) -> str:
    quick = precisions(plan)
    return f"{plan.dtype}{quick} (--exact does without)" if quick else plan.dtype


def state_text(job: Job, state: RunState) -> str:
    """A sentence about what an earlier run has finished."""
    windows = f"{state.window} of {len(job.windows)} windows" if state.window else ""
    if windows and not state.steps:
        return f"{windows} were finished before: going on from there"
    if windows:
        return f"{windows} and {state.steps} steps of the next were finished before: going on from there"
    if state.steps >= job.request.steps:
        return "denoising was finished before: what is left is decoding"
    if state.steps:
        return f"{state.steps} of {job.request.steps} steps were finished before: going on from there"
    return "an earlier run finished no step: going on with its seed"


def result_text(result: Result) -> str:
    """Where the clip is, how long it took, and how fast weights were streamed."""
    total = sum(stage.seconds for stage in result.stages)
    lines = [f"{result.output} in {duration(total)}"]
    denoising = [stage for stage in result.stages if stage.stage == "denoise"]
    nbytes, seconds = (sum(getattr(s, name) for s in denoising) for name in ("bytes_read", "read_seconds"))
    if seconds:
        hidden = 1 - min(1.0, sum(stage.stall_seconds for stage in denoising) / seconds)
        rate = f"{nbytes / seconds / 1e9:.2f} GB/s"
        lines.append(f"streamed {size(nbytes)} of weights at {rate}, {hidden:.0%} hidden behind computing")
    if result.skipped is not None:
        lines.append(result.skipped.text)
    return "\n".join(lines)
