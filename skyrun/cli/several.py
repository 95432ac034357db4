"""Show clips that several devices make at the same time, line by line."""

from argparse import Namespace
from collections.abc import Callable, Sequence

from skyrun.cli.console import emit, say, show_error
from skyrun.engine.checkpoint import kept
from skyrun.engine.clip import Result
from skyrun.engine.side_by_side import Prepare, SideBySide, Told
from skyrun.errors import SkyrunError
from skyrun.events import Notice, Preview, Progress, StageEnded, as_json
from skyrun.media.image import write_image
from skyrun.planning.job import Job
from skyrun.planning.request import Request
from skyrun.streaming.device import choose_device
from skyrun.units import duration


def make_side_by_side(
    requests: Sequence[Request], prepare: Prepare, finish: Callable[[Job], None], arguments: Namespace
) -> list[Request]:
    """Make clips, as many at a time as there are devices. Returns those that failed.

    Args:
        requests: The clips.
        prepare: Makes the job of a request and the state of an earlier run; None if the clip is there already.
        finish: Called with the job of each clip that is made.
        arguments: json and preview are used.
    """
    device = choose_device(requests[0].device, requests[0].devices)
    failed = []
    jobs: dict[int, Job] = {}
    with SideBySide(prepare, requests, device, arguments.preview is not None) as devices:
        for told in devices.told():
            _show(told, len(requests), jobs, arguments.json)
            if isinstance(told.what, SkyrunError):
                failed.append(requests[told.clip])
            elif isinstance(told.what, Result):
                finish(jobs[told.clip])
            elif isinstance(told.what, Preview) and told.what.image is not None:
                write_image(arguments.preview, told.what.image)
    return failed


def _show(told: Told, clips: int, jobs: dict[int, Job], as_json_too: bool) -> None:
    """Say what matters of a clip, with its number; as JSON say all."""
    name, what, values = f"clip {told.clip + 1} of {clips}, device {told.device}", told.what, None
    if isinstance(what, Job):
        jobs[told.clip] = what
        values = {"event": "plan"} | what.as_json()
        notes = "".join(f"\nnote: {notice}" for notice in what.notices)
        say(f"{name}: {what.request.output}, {duration(what.plan.seconds)} expected{notes}")
    elif isinstance(what, Result):
        seconds: dict[str, float] = {}
        for stage in what.stages:
            seconds[stage.stage] = round(seconds.get(stage.stage, 0.0) + stage.seconds, 3)
        values = {"event": "result", "output": str(what.output), "seed": what.request.seed, "seconds": seconds}
        say(f"{name}: {what.output} in {duration(sum(seconds.values()))}")
    elif isinstance(what, SkyrunError):
        say(f"{name}:")
        show_error(what, as_json_too)
        if told.clip in jobs and (left := kept(jobs[told.clip].request)) is not None:
            say(f"what is finished is kept; go on with: {left.command}")
    elif what is not None:
        values = as_json(what)
        if isinstance(what, Progress) and what.stage == "denoise":
            say(f"{name}: step {what.done:.0f} of {jobs[told.clip].request.passes}")
        elif isinstance(what, StageEnded):
            say(f"{name}: {what.stage} done in {duration(what.seconds)}")
        elif isinstance(what, Notice):
            say(f"{name}: {what.text}")
    if as_json_too and values is not None:
        emit(values | {"clip": told.clip + 1, "device": told.device})
