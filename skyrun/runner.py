"""Make the clip of a job, handing out events on the way. What is finished is not lost."""

import json
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from skyrun.device import peak_bytes, vram_limited
from skyrun.errors import FAILED, SkyrunError
from skyrun.events import Event, FramesReady, LatentsReady, Replanned, StageEnded, StageStarted, drain, now
from skyrun.job import Job
from skyrun.keeper import Keeper
from skyrun.kernels.atomic import replacing
from skyrun.presets import Plan
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.recovery import recovering
from skyrun.request import FPS, Request
from skyrun.resume import continue_or_start
from skyrun.run_state import RunState
from skyrun.video import writing_video

Frames = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Result:
    """A finished clip.

    frames: uint8 [F, H, W, 3], empty if they were not kept. latents: float32 [C, F', h, w], normalised, before
    decoding. request: with the seed that was used. stages: what each took.
    """

    frames: Frames
    latents: Tensor
    fps: int
    request: Request
    plan: Plan
    stages: tuple[StageEnded, ...]

    @property
    def output(self) -> Path | None:
        """The mp4, if one was written."""
        return self.request.output


def run_job(job: Job, keep_frames: bool = True, state: RunState | None = None) -> Generator[Event, None, Result]:
    """Make the clip. Yields events; frames are written as they come.

    state: what an earlier run has finished. It is kept beside the clip while there is no clip. When memory runs out
    the run goes on from its last finished step by a plan that takes less; SkyrunError (exit code 3) if there is none.
    """
    request, plan, state = job.request, job.plan, state or RunState()
    state.groups = 0  # frames are this run's own
    keeper = Keeper(job, state)
    kept: list[Frames] = []
    stages: list[StageEnded] = []
    failure: SkyrunError | None = None
    try:
        with vram_limited(job.device, plan.limit_bytes - CONTEXT_BYTES), ExitStack() as stack:
            writer = None
            if request.output is not None:
                video = writing_video(request.output, job.height, job.width, FPS, request.as_json())
                writer = stack.enter_context(video)
            for event in stack.enter_context(closing(recovering(job, state))):
                if isinstance(event, LatentsReady):
                    failure = _save_latents(request, event.latents)
                elif isinstance(event, FramesReady):
                    if writer is not None:
                        writer.add(event.frames)
                    if keep_frames:
                        kept.append(event.frames)
                elif isinstance(event, StageEnded):
                    stages.append(event)
                elif isinstance(event, Replanned):
                    plan = event.plan
                if (notice := keeper.after(event)) is not None:
                    yield notice
                yield event
            if writer is not None:
                start = now()
                yield StageStarted("write", 1, "file")
                stack.close()
                yield StageEnded("write", now() - start, peak_bytes(job.device))
        if failure is not None:  # only now: the clip itself could be made
            raise failure
    except BaseException as error:
        keeper.save_last(error)
        raise
    keeper.remove()
    frames = np.concatenate(kept) if kept else np.empty((0, job.height, job.width, 3), np.uint8)
    assert state.latents is not None
    latents = state.latents.clone()  # an ordinary tensor, not one of inference mode
    return Result(frames, latents, FPS, request, plan, tuple(stages))


def _save_latents(request: Request, latents: Tensor) -> SkyrunError | None:
    """Save them if the request says where. Returns why it failed."""
    path = request.save_latents
    if path is None:
        return None
    try:
        with replacing(path) as partial:
            save_file({"latents": latents.contiguous()}, partial, {"request": json.dumps(request.as_json())})
    except (OSError, SafetensorError) as error:
        return SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED)
    return None


def run(request: Request) -> Result:
    """Make a clip and wait for it, from where an earlier run of it ended. SkyrunError if it cannot be made.

    Nothing half-written is left behind.
    """
    job, state = continue_or_start(request)
    return drain(run_job(job, state=state))
