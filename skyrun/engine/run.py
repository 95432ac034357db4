"""Make the clip of a job and yield events. Finished work is saved and not lost.

When memory runs out, a smaller plan takes over from the last finished step. The time left is corrected by the second
step: the first one holds compilation and a cold disk.
"""

import gc
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import replace

from skyrun.engine.checkpoint import Keeper
from skyrun.engine.clip import ClipWriter, Result
from skyrun.engine.output import alone, check_free
from skyrun.engine.preview import preview_image
from skyrun.engine.resume import continue_or_start
from skyrun.engine.together import run_together
from skyrun.engine.warm_up import WarmUp
from skyrun.errors import WILL_NOT_FIT, SkyrunError
from skyrun.events import Event, Notice, Preview, Progress, Replanned, StageEnded, StageStarted, TimeLeft, drain, now
from skyrun.kernels.machine.device import triton_problem
from skyrun.kernels.machine.failures import is_out_of_memory, refused_allocations
from skyrun.parallel.group import here
from skyrun.pipelines import PIPELINES
from skyrun.pipelines.state import RunState
from skyrun.planning.densities import remember_density
from skyrun.planning.job import Job
from skyrun.planning.request import Request
from skyrun.presets import Plan, Workload, choose, probe
from skyrun.presets.alternatives import largest_size, most_frames
from skyrun.presets.memory import CONTEXT_BYTES, GIB
from skyrun.presets.timing import corrected
from skyrun.streaming.device import finish, out_of_memory, out_of_memory_explained, peak_bytes, use_device, vram_limited

__all__ = ["Result", "run", "run_job"]

_SHRINK = 0.85  # of the memory that was too much, as the limit of the next plan


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
    if job.request.devices > here().size:
        return (yield from run_together(run_job, job, keep_frames, state, previews))
    with alone(job.request.output), out_of_memory_explained():
        check_free(job.request)  # again, because another run may just have finished
        use_device(job.device)  # where Triton launches
        if job.device.type == "cuda" and (problem := triton_problem(job.device)):
            yield Notice(problem)
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


def recovering(job: Job, state: RunState) -> Generator[Event, None, None]:
    """Run the pipeline of a job; when memory runs out, run it again with a smaller plan.

    The same plan is tried again only if it finished something. Raises SkyrunError (exit code 3) if no plan needs less.
    """
    stage = ""
    while True:
        finished, refused = state.mark, refused_allocations()
        try:
            for event in _with_warm_up(job, state):
                stage = event.stage if isinstance(event, StageStarted) else stage
                yield event
            return
        except (OSError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error, refused) or here().size > 1:  # the other devices wait for this one
                raise
            shortage = out_of_memory(error)
        gc.collect()  # outside of the handler no traceback holds tensors
        finish(job.device)
        limit = _SHRINK * _taken(job.plan, stage)
        smaller = _smaller(job, limit)
        if smaller is None and state.mark == finished:
            hint = _what_fits(job, limit) or "close other programs: no smaller clip would take less"
            raise SkyrunError(f"{stage} is {shortage.message}, and no plan takes less", hint, WILL_NOT_FIT)
        job = replace(job, plan=smaller or job.plan)
        yield Replanned(f"{stage} is {shortage.message}; {_going_on(smaller)}", job.plan)


def _with_warm_up(job: Job, state: RunState) -> Generator[Event, None, None]:
    """Run the pipeline of a job. Kernels are compiled while the text is encoded, if it is still to be."""
    with ExitStack() as stack:
        kernels = stack.enter_context(WarmUp(job)) if "text" not in state.encoded else None
        for event in PIPELINES[job.request.spec.pipeline](job, state):
            yield event
            if kernels is not None and isinstance(event, StageEnded) and event.stage == "text":
                yield from kernels.finish()


def _taken(plan: Plan, stage: str) -> int:
    """Bytes that the plan expects for a stage: of GPU memory on a GPU, of RAM otherwise."""
    name = {"load": "denoise", "kernels": "text"}.get(stage, stage)
    taken = {stage.name: stage.device_bytes if plan.device == "cuda" else stage.host_bytes for stage in plan.stages}
    return taken.get(name, plan.peak_bytes)


def _smaller(job: Job, limit: float) -> Plan | None:
    """The plan for a limit, or the nearest to it, if it needs less than the job's plan. Dtypes do not change."""
    plan = job.plan
    smaller = _choose(job, limit)
    if sum(_taken(smaller, s.name) for s in smaller.stages) >= sum(_taken(plan, s.name) for s in plan.stages):
        return None
    if plan.device == "cuda" and max(stage.host_bytes for stage in smaller.stages) > _ram(job):
        return None
    return replace(smaller, limit_bytes=plan.limit_bytes, problem="")


def _choose(job: Job, limit: float) -> Plan:
    request, cuda = job.request, job.plan.device == "cuda"
    return choose(
        probe(job.plan.device),
        job.workload,
        precision=job.plan.precision,
        attention=job.plan.asked,
        dtype=job.plan.dtype,
        max_vram=limit / GIB if cuda else request.max_vram,
        max_ram=request.max_ram if cuda else limit / GIB,
    )


def _ram(job: Job) -> int:
    free = probe("cpu").ram_free
    return free if job.request.max_ram is None else min(free, int(job.request.max_ram * GIB))


def _going_on(smaller: Plan | None) -> str:
    if smaller is None:
        return "going on from the last finished step"
    rows = f", {smaller.token_rows} tokens at a time" if smaller.token_rows else ""
    return f"going on from the last finished step with a plan that takes {smaller.peak_bytes / GIB:.2f} GiB{rows}"


def _what_fits(job: Job, limit: float) -> str:
    """Options that the job would have fitted into the limit with; empty if there are none."""

    def fits(workload: Workload) -> bool:
        return not _choose(replace(job, workload=workload), limit).problem

    frames, size = most_frames(job.workload, fits), largest_size(job.workload, fits)
    named = "resolution" if size in job.request.spec.resolutions else "size"
    options = [f"--frames {frames}"] * bool(frames) + [f"--{named} {size}"] * bool(size)
    return f"{' or '.join(options)} would fit in {limit / GIB:.1f} GiB" if options else ""
