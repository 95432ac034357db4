"""Make the clip of a job, handing out events on the way. What is finished is not lost."""

import json
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from skyrun.engine.checkpoint import Keeper
from skyrun.engine.output import clip_format, source_frames
from skyrun.engine.recovery import recovering
from skyrun.engine.resume import continue_or_start
from skyrun.errors import FAILED, SkyrunError
from skyrun.events import Event, FramesReady, LatentsReady, Notice, Replanned, StageEnded, StageStarted, drain, now
from skyrun.kernels.atomic import replacing
from skyrun.media.pixels import Frames
from skyrun.media.video_writer import VideoWriter, writing_video
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.planning.request import Request
from skyrun.presets import Plan
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.streaming.device import peak_bytes, vram_limited


@dataclass(frozen=True)
class Result:
    """A finished clip.

    frames: uint8 [F, H, W, 3], empty if they were not kept. latents: float32 [C, F', h, w], normalised, before
    decoding, of every window after the one before. request: with the seed that was used. stages: what each took.
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
    plan, state = job.plan, state or RunState()
    state.groups = 0  # frames are this run's own
    keeper, made = Keeper(job, state), _Made(job, keep_frames)
    try:
        with vram_limited(job.device, plan.limit_bytes - CONTEXT_BYTES), ExitStack() as stack:
            for text in made.open(stack):
                yield Notice(text)
            for window, (frames, latents) in enumerate(keeper.finished()):
                made.latents[window] = latents
                for part in frames:
                    made.add(part)
            for event in stack.enter_context(closing(recovering(job, state))):
                if isinstance(event, Replanned):
                    plan = event.plan
                made.take(event)
                if (notice := keeper.after(event)) is not None:
                    yield notice
                yield event
            if made.writer is not None:
                start = now()
                yield StageStarted("write", 1, "file")
                stack.close()
                yield StageEnded("write", now() - start, peak_bytes(job.device))
        made.save_latents()
    except BaseException as error:
        keeper.save_last(error)
        raise
    keeper.remove()
    return made.result(plan)


class _Made:
    """What has been made of a clip, on its way to files and to the result."""

    def __init__(self, job: Job, keep_frames: bool) -> None:
        self._job, self._keep_frames = job, keep_frames
        self._frames: list[Frames] = []
        self._stages: list[StageEnded] = []
        self._failure: SkyrunError | None = None
        self.latents: dict[int, Tensor] = {}  # by window
        self.writer: VideoWriter | None = None

    def open(self, stack: ExitStack) -> list[str]:
        """Begin the mp4; with the video before it, if the clip is to be joined to that. Returns notices of that one."""
        notices: list[str] = []
        if self._job.request.output is None:
            return notices
        self.writer = stack.enter_context(writing_video(self._job.request.output, clip_format(self._job)))
        for frames in source_frames(self._job, notices):
            self.writer.add(frames)
        return [text for text in notices if text not in self._job.inputs.notices]

    def take(self, event: Event) -> None:
        """An event of the pipeline."""
        if isinstance(event, LatentsReady):
            self.latents[event.window] = event.latents
            if len(self._job.windows) == 1:
                self._failure = self._save_latents()
        elif isinstance(event, FramesReady):
            self.add(event.frames)
        elif isinstance(event, StageEnded):
            self._stages.append(event)

    def add(self, frames: Frames) -> None:
        """Frames of the clip."""
        if self.writer is not None:
            self.writer.add(frames)
        if self._keep_frames:
            self._frames.append(frames)

    def save_latents(self) -> None:
        """SkyrunError if that failed, now or before: the clip itself could be made."""
        if len(self._job.windows) > 1:
            self._failure = self._save_latents()
        if self._failure is not None:
            raise self._failure

    def _save_latents(self) -> SkyrunError | None:
        """Save them if the request says where. Returns why it failed."""
        request = self._job.request
        if request.save_latents is None:
            return None
        try:
            with replacing(request.save_latents) as partial:
                metadata = {"request": json.dumps(request.as_json())}
                save_file({"latents": torch.cat(list(self.latents.values()), 1).contiguous()}, partial, metadata)
        except (OSError, SafetensorError) as error:
            message = f"cannot write {request.save_latents}: {error}"
            return SkyrunError(message, "check free space and permissions", FAILED)
        return None

    def result(self, plan: Plan) -> Result:
        """All of it."""
        job, empty = self._job, np.empty((0, self._job.height, self._job.width, 3), np.uint8)
        frames = np.concatenate([empty, *self._frames])
        latents = torch.cat(list(self.latents.values()), 1).clone()  # an ordinary tensor, not one of inference mode
        return Result(frames, latents, job.fps, job.request, plan, tuple(self._stages))


def run(request: Request) -> Result:
    """Make a clip and wait for it, from where an earlier run of it ended. SkyrunError if it cannot be made.

    Nothing half-written is left behind.
    """
    job, state = continue_or_start(request)
    return drain(run_job(job, state=state))
