"""Make the clip of a job and yield events. Finished work is saved and not lost.

The time left is corrected by the second step: the first one holds compilation and a cold disk.
"""

from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

from skyrun.engine.attempt import attempt
from skyrun.engine.checkpoint import Keeper
from skyrun.engine.clip import ClipWriter, Result
from skyrun.engine.output import alone, check_free
from skyrun.engine.preview import preview_image
from skyrun.engine.recovery import Attempt, recovering
from skyrun.engine.resume import continue_or_start
from skyrun.engine.together import attempt_together, workers
from skyrun.events import Event, Notice, Preview, Progress, Replanned, StageEnded, StageStarted, TimeLeft, drain, now
from skyrun.kernels.machine.device import triton_problem
from skyrun.parallel.group import here
from skyrun.parallel.team import Team
from skyrun.pipelines.state import RunState
from skyrun.planning.densities import remember_density
from skyrun.planning.job import Job
from skyrun.planning.request import Request
from skyrun.presets import Plan
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.presets.timing import corrected
from skyrun.streaming.device import out_of_memory_explained, peak_bytes, use_device, vram_limited

__all__ = ["Result", "run", "run_job"]


def run_job(
    job: Job,
    keep_frames: bool = True,
    state: RunState | None = None,
    previews: bool = False,
    team: Team | None = None,
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
        team: Workers that run the pipeline, and stay. Without it this process does, or, for more devices than there
            are, workers that end with the run.
    """
    with ExitStack() as stack:
        stack.enter_context(alone(job.request.output))
        stack.enter_context(out_of_memory_explained())
        check_free(job.request)  # again, because another run may just have finished
        use_device(job.device)  # where Triton launches
        if job.device.type == "cuda" and (problem := triton_problem(job.device)):
            yield Notice(problem)
        if team is None and job.request.devices > here().size:
            team = stack.enter_context(closing(workers(job.request.devices, job.device)))
        once = attempt if team is None else partial(attempt_together, team)
        return (yield from _made(job, keep_frames, state or RunState(), previews, once))


def _made(
    job: Job, keep_frames: bool, state: RunState, previews: bool, once: Attempt
) -> Generator[Event, None, Result]:
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
            for event in stack.enter_context(closing(recovering(job, state, once))):
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
            clip.note(state.learned)
            if clip.video is not None:
                start = now()
                yield StageStarted("write", 1, "file")
                stack.close()
                yield StageEnded("write", now() - start, peak_bytes(job.device))
        clip.save_latents()
        result = clip.result(plan, state.learned)
    except BaseException as error:
        keeper.save_last(error)
        raise
    keeper.remove()
    if result.skipped is not None and plan.sparse:
        remember_density(job.workload, plan.sparse, result.skipped.density)
    return result


def run(request: Request) -> Result:
    """Make a clip and return it, or resume an earlier run of the same request.

    Raises SkyrunError if the clip cannot be made. No half-written file is left behind.
    """
    job, state = continue_or_start(request)
    return drain(run_job(job, state=state))


class Forecast:
    """Estimates the time left after each measured step of a run.

    The first step of a window is not measured, because it compiles kernels and reads from a cold disk.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._times: list[float] = []
        self._window, self._windows, self._steps = 1, 1, 0
        self._start: float | None = None  # of the current step, if it is measured

    def after(self, event: Event) -> TimeLeft | None:
        """The time left after an event, if the event ends a measured step."""
        if isinstance(event, Replanned):
            self._plan, self._times, self._start = event.plan, [], None
        elif isinstance(event, StageStarted) and event.stage == "denoise":
            self._steps, self._start = event.total, None
            self._window, self._windows = event.part or (1, 1)
        elif isinstance(event, Progress) and event.stage == "denoise":
            begun, self._start = self._start, now()
            if begun is not None:
                self._times.append(self._start - begun)
                return self._left(self._steps - event.done)
        return None

    def _left(self, steps: float) -> TimeLeft:
        """steps: how many are left in this window. After them, the window only has to be decoded."""
        seconds, later = sum(self._times) / len(self._times), self._windows - self._window
        ahead = (later * self._steps + steps) * seconds
        for stage in corrected(self._plan, seconds).stages:
            windows = {"images": later, "load": later, "decode": later + 1, "write": self._windows}.get(stage.name, 0)
            ahead += stage.seconds * windows / self._windows
        return TimeLeft(ahead, seconds, self._plan.step_seconds)
