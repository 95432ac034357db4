"""`skyrun run`: make one or more clips and show progress."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from skyrun.cli.batch import free_name, requests_of
from skyrun.cli.console import emit, say, show_error
from skyrun.cli.making import announce, draw_sheet, make, pictures_of, sheet_path
from skyrun.cli.progress import shown
from skyrun.engine.output import check_outputs, is_made
from skyrun.engine.resume import continue_or_start
from skyrun.errors import FAILED, SkyrunError
from skyrun.hub.manifest import note_use
from skyrun.hub.store import wanted_name, whole_folder
from skyrun.planning.request import Request
from skyrun.presets.named import preset_limits


def execute(arguments: Namespace) -> int:
    """Make the clips, or with --dry-run only check and plan them.

    If one clip fails, the others are still made.
    """
    _force_preset(arguments)
    requests = requests_of(arguments)
    for request in requests:
        check_outputs(request, pictures_of(request.output, arguments))
    first = _located(requests[0], arguments)  # all clips use the same model
    if first is None:
        return 0
    if len(requests) == 1:
        _run_clip(first, arguments)
        return 0
    failed = []
    for number, request in enumerate(requests, 1):
        say(f"clip {number} of {len(requests)}: {request.output}")
        try:
            _run_clip(replace(request, model=first.model, quant=first.quant), arguments)
        except SkyrunError as error:
            show_error(error, arguments.json)
            failed.append(request)
    if failed:
        names = ", ".join(str(request.output) for request in failed)
        say(f"{len(failed)} of {len(requests)} clips failed: {names}; the same command makes what is missing")
    return FAILED if failed else 0


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


def _run_clip(request: Request, arguments: Namespace) -> None:
    job, state = continue_or_start(request)  # without the preview, which an earlier clip of the batch may have drawn
    if job.request.output is None:
        output = free_name(f"{request.task}-{job.request.seed}", ".mp4")
        job = replace(job, request=replace(job.request, output=output))
        check_outputs(job.request, pictures_of(output, arguments))
    announce(job, state, arguments.json)
    if is_made(job.request) and not job.request.overwrite:
        _say_it_is_there(job.request, arguments)
        if arguments.sheet and not arguments.dry_run and not sheet_path(job).exists():
            draw_sheet(job)
    elif not arguments.dry_run:
        make(job, state, arguments)


def _say_it_is_there(request: Request, arguments: Namespace) -> None:
    say(f"{request.output}: it is there already (--overwrite makes it again)")
    if arguments.json and not arguments.dry_run:
        emit({"event": "result", "output": str(request.output), "seed": request.seed, "seconds": {}})
