"""Make the clip of a job, handing out events on the way."""

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

from skyrun.device import out_of_memory_explained, peak_bytes, vram_limited
from skyrun.errors import FAILED, SkyrunError
from skyrun.events import Event, FramesReady, LatentsReady, StageEnded, StageStarted, drain, now
from skyrun.job import Job, prepare
from skyrun.kernels.atomic import replacing
from skyrun.pipelines.reference import reference_to_video
from skyrun.presets import Plan
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.request import FPS, Request
from skyrun.video import writing_video


@dataclass(frozen=True)
class Result:
    """A finished clip.

    frames: uint8 [F, H, W, 3], empty if they were not kept. latents: float32 [C, F', h, w], normalised, before
    decoding. request: with the seed that was used. stages: what each took.
    """

    frames: np.ndarray[Any, np.dtype[np.uint8]]
    latents: Tensor
    fps: int
    request: Request
    plan: Plan
    stages: tuple[StageEnded, ...]

    @property
    def output(self) -> Path | None:
        """The mp4, if one was written."""
        return self.request.output


def run_job(job: Job, keep_frames: bool = True) -> Generator[Event, None, Result]:
    """Make the clip. Yields events; latents are saved before decoding, frames are written as they come."""
    request = job.request
    kept, stages, latents = [], [], torch.empty(0)
    failure: SkyrunError | None = None
    allowed = job.plan.limit_bytes - CONTEXT_BYTES
    with out_of_memory_explained(), vram_limited(job.device, allowed), ExitStack() as stack:
        writer = None
        if request.output is not None:
            video = writing_video(request.output, job.height, job.width, FPS, request.as_json())
            writer = stack.enter_context(video)
        for event in reference_to_video(job):
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
            yield event
        if writer is not None:
            start = now()
            yield StageStarted("write", 1, "file")
            stack.close()
            yield StageEnded("write", now() - start, peak_bytes(job.device))
    if failure is not None:  # only now: the clip itself could be made
        raise failure
    frames = np.concatenate(kept) if kept else np.empty((0, job.height, job.width, 3), np.uint8)
    return Result(frames, latents, FPS, request, job.plan, tuple(stages))


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
