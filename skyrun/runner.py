"""Make the clip of a job, handing out events on the way. What is finished is not lost."""

import gc
import json
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from skyrun.device import finish, is_out_of_memory, out_of_memory, peak_bytes, vram_limited
from skyrun.errors import FAILED, SkyrunError
from skyrun.events import Event, FramesReady, LatentsReady, Notice, StageEnded, StageStarted, drain, now
from skyrun.job import Job, prepare, shrunk
from skyrun.keeper import Keeper
from skyrun.kernels.atomic import replacing
from skyrun.pipelines.reference import reference_to_video
from skyrun.presets import Plan
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.request import FPS, Request
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
    state = state or RunState()
    keeper = Keeper(job, state)
    stages: list[StageEnded] = []
    try:
        with vram_limited(job.device, job.plan.limit_bytes - CONTEXT_BYTES):
            while True:
                shortage: SkyrunError | None = None
                try:
                    frames, latents, failure = yield from _attempt(job, state, keeper, stages, keep_frames)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    shortage = out_of_memory(error)
                if shortage is None:
                    break
                job = yield from _go_on(job, shortage)  # here, where no traceback holds on to tensors
    except BaseException:
        keeper.save()
        raise
    keeper.remove()
    if failure is not None:  # only now: the clip itself could be made
        raise failure
    return Result(frames, latents, FPS, job.request, job.plan, tuple(stages))


def _go_on(job: Job, shortage: SkyrunError) -> Generator[Event, None, Job]:
    """The job by a smaller plan, with a notice of it."""
    gc.collect()
    finish(job.device)
    smaller = shrunk(job)
    if smaller is None:
        raise shortage
    plan = smaller.plan
    size = f"{plan.peak_bytes / (1 << 30):.1f} instead of {job.plan.peak_bytes / (1 << 30):.1f} GiB"
    rows = f", {plan.token_rows} tokens at a time" if plan.token_rows else ""
    yield Notice(f"{shortage.message}; going on from the last finished step with a plan that takes {size}{rows}")
    return smaller


def _attempt(
    job: Job, state: RunState, keeper: Keeper, stages: list[StageEnded], keep_frames: bool
) -> Generator[Event, None, tuple[Frames, Tensor, SkyrunError | None]]:
    """Run the stages that are left. The frames, if they are kept, the latents, and why they could not be saved."""
    request, kept, latents = job.request, [], torch.empty(0)
    failure: SkyrunError | None = None
    with ExitStack() as stack:
        writer = None
        if request.output is not None:
            video = writing_video(request.output, job.height, job.width, FPS, request.as_json())
            writer = stack.enter_context(video)
        for event in reference_to_video(job, state):
            if isinstance(event, LatentsReady):
                latents = event.latents.clone()  # an ordinary tensor, not one of inference mode
                failure = _save_latents(request, latents)
            elif isinstance(event, FramesReady):
                if writer is not None:
                    writer.add(event.frames)
                if keep_frames:
                    kept.append(event.frames)
            elif isinstance(event, StageEnded):
                stages.append(event)
            if (notice := keeper.after(event)) is not None:
                yield notice
            yield event
        if writer is not None:
            start = now()
            yield StageStarted("write", 1, "file")
            stack.close()
            yield StageEnded("write", now() - start, peak_bytes(job.device))
    frames = np.concatenate(kept) if kept else np.empty((0, job.height, job.width, 3), np.uint8)
    return frames, latents, failure


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
    """Make a clip and wait for it. Raises SkyrunError; nothing half-written is left behind."""
    return drain(run_job(prepare(request)))
