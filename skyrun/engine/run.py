"""Make the clip of a job and yield events. Finished work is saved and not lost."""

from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import replace

from skyrun.engine.checkpoint import Keeper
from skyrun.engine.clip import ClipWriter, Result
from skyrun.engine.eta import Forecast
from skyrun.engine.output import alone, check_free
from skyrun.engine.preview import preview_image
from skyrun.engine.recovery import recovering
from skyrun.engine.resume import continue_or_start
from skyrun.events import Event, Notice, Preview, Replanned, StageEnded, StageStarted, drain, now
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.planning.request import Request
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.streaming.device import peak_bytes, vram_limited

__all__ = ["Result", "run", "run_job"]


def run_job(
    job: Job, keep_frames: bool = True, state: RunState | None = None, previews: bool = False
) -> Generator[Event, None, Result]:
    """Make the clip and yield events. Frames are written as soon as they are decoded.

    Until the clip is finished, its state is saved beside it; after an error `checkpoint.kept` tells where. When memory
    runs out, the run goes on from its last finished step with a smaller plan. Raises SkyrunError if there is none (exit
    code 3), or if another run is making this clip or another clip has its name (exit code 2).

    Args:
        job: The job to run.
        keep_frames: Whether the result contains the frames.
        state: The state of an earlier run to resume from.
        previews: Whether an image is drawn after every step.
    """
    with alone(job.request.output):
        check_free(job.request)  # again, because another run may just have finished
        return (yield from _made(job, keep_frames, state or RunState(), previews))


def _made(job: Job, keep_frames: bool, state: RunState, previews: bool) -> Generator[Event, None, Result]:
    plan = job.plan
    state.groups = 0  # frames are handed out anew by each run
    keeper, clip = Keeper(job, state), ClipWriter(job, keep_frames)
    forecast = Forecast(plan)
    try:
        with vram_limited(job.device, plan.limit_bytes - CONTEXT_BYTES), ExitStack() as stack:
            for text in clip.open(stack):
                yield Notice(text)
            for window, (frames, latents) in enumerate(keeper.finished()):
                clip.latents[window] = latents
                for part in frames:
                    clip.add(part)
            for event in stack.enter_context(closing(recovering(job, state))):
                if isinstance(event, Replanned):
                    plan = event.plan
                clip.take(event)
                if (notice := keeper.after(event)) is not None:
                    yield notice
                if isinstance(event, Preview) and previews:
                    event = replace(event, image=preview_image(event.latents))
                yield event
                if (left := forecast.after(event)) is not None:
                    yield left
            if clip.video is not None:
                start = now()
                yield StageStarted("write", 1, "file")
                stack.close()
                yield StageEnded("write", now() - start, peak_bytes(job.device))
        clip.save_latents()
    except BaseException as error:
        keeper.save_last(error)
        raise
    keeper.remove()
    return clip.result(plan)


def run(request: Request) -> Result:
    """Make a clip and return it, or resume an earlier run of the same request.

    Raises SkyrunError if the clip cannot be made. No half-written file is left behind.
    """
    job, state = continue_or_start(request)
    return drain(run_job(job, state=state))
