"""Run the pipeline of a job once: until it is done, or until something fails."""

from collections.abc import Generator
from contextlib import ExitStack

from skyrun.engine.warm_up import WarmUp
from skyrun.events import Event, StageEnded, StageStarted
from skyrun.pipelines import PIPELINES
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.streaming.device import out_of_memory_explained


def attempt(job: Job, state: RunState) -> Generator[Event, None, None]:
    """Do what the state does not have yet, in this process. Raises OutOfMemory, with the stage, where memory runs out.

    Args:
        job: The job.
        state: What is finished; it gets what this finishes.
    """
    stage = ""
    with out_of_memory_explained(lambda: stage):
        for event in _with_warm_up(job, state):
            stage = event.stage if isinstance(event, StageStarted) else stage
            yield event


def _with_warm_up(job: Job, state: RunState) -> Generator[Event, None, None]:
    """Run the pipeline. Kernels are compiled while the text is encoded, if it is still to be."""
    with ExitStack() as stack:
        kernels = stack.enter_context(WarmUp(job)) if "text" not in state.encoded else None
        for event in PIPELINES[job.request.spec.pipeline](job, state):
            yield event
            if kernels is not None and isinstance(event, StageEnded) and event.stage == "text":
                yield from kernels.finish()
