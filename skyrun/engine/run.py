"""Make the clip of a job, handing out events on the way. What is finished is not lost."""

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
    """Make the clip. Yields events; frames are written as they come.

    The state is kept beside the clip while there is no clip; after an error `checkpoint.kept` says where. When memory
    runs out the run goes on from its last finished step by a plan that takes less; SkyrunError (exit code 3) if there
    is none, or (exit code 2) if another run is making this clip or another clip is there.

    Args:
        job: What to make.
        keep_frames: Whether the result holds the frames.
        state: What an earlier run has finished.
        previews: Whether an image is drawn after every step.
    """
    with alone(job.request.output):
        check_free(job.request)  # again: another run may just have finished
        return (yield from _made(job, keep_frames, state or RunState(), previews))


def _made(job: Job, keep_frames: bool, state: RunState, previews: bool) -> Generator[Event, None, Result]:
    plan = job.plan
    state.groups = 0  # frames are this run's own
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
    """Make a clip and wait for it, from where an earlier run of it ended. SkyrunError if it cannot be made.

    Nothing half-written is left behind.
    """
    job, state = continue_or_start(request)
    return drain(run_job(job, state=state))
