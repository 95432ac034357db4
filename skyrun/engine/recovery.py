"""When memory runs out, go on from the last finished step with a smaller plan."""

import gc
from collections.abc import Callable, Generator
from dataclasses import replace

from skyrun.errors import WILL_NOT_FIT, OutOfMemory, SkyrunError
from skyrun.events import Event, Replanned
from skyrun.parallel.group import here
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.presets import Plan, Workload, choose, probe
from skyrun.presets.alternatives import largest_size, most_frames
from skyrun.presets.memory import GIB
from skyrun.streaming.device import finish

Attempt = Callable[[Job, RunState], Generator[Event, None, None]]

_SHRINK = 0.85  # of the memory that was too much, as the limit of the next plan


def recovering(job: Job, state: RunState, attempt: Attempt) -> Generator[Event, None, None]:
    """Run the pipeline of a job; when memory runs out, run it again with a smaller plan.

    The same plan is tried again only if it finished something. Raises SkyrunError (exit code 3) if no plan needs less,
    or if the other devices are processes that a launcher has started, which nobody here can start again.

    Args:
        job: The job.
        state: What is finished. It gets what every attempt finishes.
        attempt: Runs the pipeline once, on one device or on several. It raises OutOfMemory.
    """
    while True:
        finished = state.mark
        try:
            yield from attempt(job, state)
            return
        except OutOfMemory as error:
            if here().size > 1:
                raise end_of_all(error, job.plan) from error
            stage, told = error.stage, _told(error)
        gc.collect()  # outside of the handler no traceback holds tensors
        finish(job.device)
        limit = _SHRINK * _taken(job.plan, stage)
        smaller = _smaller(job, limit)
        if smaller is None and state.mark == finished:
            hint = _what_fits(job, limit) or "close other programs: no smaller clip would take less"
            raise SkyrunError(f"{told}, and no plan takes less", hint, WILL_NOT_FIT)
        job = replace(job, plan=smaller or job.plan)
        yield Replanned(f"{told}; {_going_on(smaller)}", job.plan)


def end_of_all(error: OutOfMemory, plan: Plan) -> SkyrunError:
    """The error where a launcher has started the processes, and ends all with this one. It says what to type."""
    option, limit = "--max-vram" if plan.device == "cuda" else "--max-ram", _SHRINK * _taken(plan, error.stage) / GIB
    return SkyrunError(
        _told(OutOfMemory(error.cause, error.stage, here().rank)),
        f"`torchrun ... -m skyrun resume CLIP {option} {limit:.2f}` goes on from the last finished step, if a plan "
        f"takes no more; `skyrun resume CLIP --devices N`, without torchrun, looks for smaller plans by itself",
        WILL_NOT_FIT,
    )


def _told(error: OutOfMemory) -> str:
    return f"{error.stage or 'the start'} is {error.message}"


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
